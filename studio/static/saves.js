// Save: progress, then the files, fetched with the token, and the command that makes the video again.

import { byId, element } from "./dom.js";

const NAMES = { mp4: "Video (mp4)", jsonl: "Storyboard line", yaml: "Settings (YAML)" };

export class Saves {
  constructor(ask, token, complain) {
    Object.assign(this, { ask, token, complain });
    this.waiting = false;
  }

  begin() {
    if (this.waiting || !this.ask()) return;
    this.waiting = true;
    this.show(element("p", { textContent: "Saving" }), element("progress"));
  }

  progress({ done, of }) {
    if (this.waiting) this.show(element("p", { textContent: "Saving" }), element("progress", { value: done, max: of }));
  }

  failed() {
    if (this.waiting) byId("saved").hidden = true;
    this.waiting = false;
  }

  done({ name, frames, files, command }) {
    this.waiting = false;
    const buttons = Object.entries(files).map(([kind, path]) =>
      element("button", { type: "button", textContent: NAMES[kind], onclick: () => this.fetch(path, `${name}.${kind}`) }),
    );
    const title = element("p", { textContent: `Saved: ${frames} frames. The same video again, on the server's machine:` });
    const close = element("button", { type: "button", className: "quiet", textContent: "Close", onclick: () => (byId("saved").hidden = true) });
    this.show(title, element("code", { textContent: command }), element("div", { className: "row" }, ...buttons, close));
  }

  async fetch(path, name) {
    const token = this.token();
    const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
    if (!answer.ok) {
      this.complain(`${name} cannot be fetched (${answer.status})`);
      return;
    }
    const link = element("a", { href: URL.createObjectURL(await answer.blob()), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  show(...children) {
    byId("saved").hidden = false;
    byId("saved").replaceChildren(...children);
  }
}
