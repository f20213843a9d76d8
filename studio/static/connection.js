// The WebSocket: says hello, hands on what comes, and comes back by itself when the line breaks.

const VERSION = 1;
const HEADER_BYTES = 16;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
const NORMAL = 1000;
const POLICY = 1008;

// Of a frame's message: version, kind of picture, take, block, frame, scene; then the picture.
export function readFrame(buffer) {
  const view = new DataView(buffer);
  return {
    take: view.getUint16(2),
    block: view.getUint32(4),
    frame: view.getUint32(8),
    scene: view.getUint32(12),
    picture: new Blob([new Uint8Array(buffer, HEADER_BYTES)], { type: "image/jpeg" }),
  };
}

export class Connection {
  // `hello` gives the fields of the first message; `onEvent`, `onFrame`, `onLost`, `onOver` are told what happens.
  constructor({ hello, onEvent, onFrame, onLost, onOver }) {
    Object.assign(this, { hello, onEvent, onFrame, onLost, onOver });
    this.wait = FIRST_WAIT_MS;
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/ws`);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.say("hello", { version: VERSION, ...this.hello() });
    socket.onmessage = ({ data }) => {
      this.wait = FIRST_WAIT_MS;
      if (typeof data === "string") this.onEvent(JSON.parse(data));
      else this.onFrame(readFrame(data));
    };
    socket.onclose = ({ code, reason }) => {
      if (this.socket !== socket) return;
      if (code === NORMAL || code === POLICY) {
        this.onOver(reason);
        return;
      }
      this.onLost(reason);
      setTimeout(() => this.open(), this.wait);
      this.wait = Math.min(2 * this.wait, LONGEST_WAIT_MS);
    };
    this.socket = socket;
  }

  say(type, fields = {}) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify({ type, ...fields }));
    return true;
  }
}
