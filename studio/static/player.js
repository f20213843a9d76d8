// Frames to a canvas at the video's rate, out of a buffer of about a block, and what has been shown back to the server.

const MOST_WAITING = 48; // frames; who is further behind goes on from later ones
const DECODED_AHEAD = 16;
const REPORT_MS = 90;
const REFILL_FRAMES = 4; // after the picture has stood still
const REFILL_MS = 300;
const LATE_MS = 250; // beyond which lost time is not caught up with

export class Player {
  // `onShown(frame)` hears of every frame that is drawn, `onProgress(take, count)` now and then how many were.
  constructor(canvas, onShown, onProgress) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onShown = onShown;
    this.onProgress = onProgress;
    this.fps = 16;
    this.frozen = false;
    this.shownTimes = [];
    this.begin(-1);
    requestAnimationFrame((now) => this.tick(now));
  }

  size(width, height) {
    Object.assign(this.canvas, { width, height });
  }

  begin(take) {
    for (const frame of this.waiting ?? []) frame.bitmap?.close();
    this.take = take;
    this.waiting = [];
    this.stalledAt = performance.now();
    this.nextAt = 0;
    this.shown = 0;
    this.reportedAt = 0;
  }

  push(frame) {
    if (frame.take !== this.take % 2 ** 16) return; // the message has two bytes for it
    this.waiting.push(frame);
    while (this.waiting.length > MOST_WAITING) this.waiting.shift().bitmap?.close();
    this.decode();
  }

  decode() {
    for (const frame of this.waiting.slice(0, DECODED_AHEAD)) {
      if (frame.decoding) continue;
      frame.decoding = true;
      createImageBitmap(frame.picture).then(
        (bitmap) => {
          frame.bitmap = bitmap;
          frame.picture = null;
        },
        () => (frame.broken = true),
      );
    }
  }

  // Frames a second on the screen, over the last two seconds.
  rate(now = performance.now()) {
    while (this.shownTimes.length && now - this.shownTimes[0] > 2000) this.shownTimes.shift();
    const times = this.shownTimes;
    return times.length > 1 ? (1000 * (times.length - 1)) / (times.at(-1) - times[0]) : null;
  }

  tick(now) {
    requestAnimationFrame((later) => this.tick(later));
    if (this.frozen) {
      this.nextAt = now;
      return;
    }
    if (this.stalledAt !== null && !this.isRefilled(now)) return;
    if (this.stalledAt !== null) {
      this.stalledAt = null;
      this.nextAt = now;
    }
    if (now < this.nextAt) return;
    const frame = this.waiting[0];
    if (frame === undefined) {
      this.stalledAt = now;
      return;
    }
    if (frame.broken) this.waiting.shift();
    if (!frame.bitmap) return;
    this.waiting.shift();
    this.draw(frame, now);
    this.nextAt += 1000 / this.fps;
    if (now - this.nextAt > LATE_MS) this.nextAt = now;
    this.decode();
  }

  isRefilled(now) {
    if (!this.waiting.length) {
      this.stalledAt = Math.max(this.stalledAt, now - REFILL_MS);
      return false;
    }
    return this.shown === 0 || this.waiting.length >= REFILL_FRAMES || now - this.stalledAt > 2 * REFILL_MS;
  }

  draw(frame, now) {
    this.context.drawImage(frame.bitmap, 0, 0, this.canvas.width, this.canvas.height);
    frame.bitmap.close();
    this.shown = frame.frame + 1;
    this.shownTimes.push(now);
    this.onShown(frame, now);
    if (now - this.reportedAt > REPORT_MS || !this.waiting.length) {
      this.reportedAt = now;
      this.onProgress(this.take, this.shown);
    }
  }
}
