// What was said when: a strip in proportion, and a list, the newest first, with how long each took to the screen.

import { byId, clock, element } from "./dom.js";

const MOST_SHOWN = 200;

export class Timeline {
  constructor() {
    this.begin(16, []);
  }

  begin(fps, scenes) {
    this.fps = fps;
    this.scenes = [...scenes];
    this.pending = new Map();
    this.latencies = new Map();
    this.now = -1;
    this.draw();
  }

  // A prompt that has been typed and is not on yet.
  typed(id, text) {
    this.pending.set(id, text);
    this.draw();
  }

  refused(id) {
    this.pending.delete(id);
    this.draw();
  }

  scene({ scene, frame, text, id }) {
    this.scenes[scene] = { frame, text, id };
    const mine = this.pending.has(id); // else another viewer's, whose numbers are his own
    for (const waiting of this.pending.keys()) if (mine && waiting <= id) this.pending.delete(waiting);
    this.draw();
  }

  onScreen(scene, latency) {
    if (latency !== undefined) this.latencies.set(scene, latency);
    if (scene === this.now && latency === undefined) return;
    this.now = scene;
    this.draw();
  }

  draw() {
    const rows = this.scenes.slice(-MOST_SHOWN).map((said, index) => this.row(said, index + Math.max(0, this.scenes.length - MOST_SHOWN)));
    const waiting = [...this.pending.values()].map((text) =>
      element("li", { className: "waiting" }, element("time", { textContent: "…" }), element("span", { textContent: text })),
    );
    byId("timeline").replaceChildren(...waiting.reverse(), ...rows.reverse());
    this.strip(this.shown ?? 0);
  }

  row(said, index) {
    const latency = this.latencies.get(index);
    return element(
      "li",
      { className: index === this.now ? "now" : "" },
      element("time", { textContent: clock(said.frame / this.fps) }),
      element("span", { textContent: said.text }),
      element("small", { textContent: latency === undefined ? "" : `${latency.toFixed(2)} s` }),
    );
  }

  strip(shown) {
    this.shown = shown;
    const ends = [...this.scenes.slice(1).map((said) => said.frame), Math.max(shown, this.scenes.at(-1)?.frame ?? 0)];
    const parts = this.scenes.map((said, index) => {
      const part = element("span", { title: said.text });
      part.style.flexGrow = Math.max(ends[index] - said.frame, 0.01);
      return part;
    });
    byId("strip").replaceChildren(...parts.slice(-MOST_SHOWN));
  }
}
