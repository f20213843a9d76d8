// Policy, frames a head, seed and sinks: what the next video is made with.

import { byId, element } from "./dom.js";

export class Settings {
  constructor(onRestart) {
    this.policies = [];
    byId("policy").addEventListener("change", () => this.showDial());
    byId("dial").addEventListener("input", () => (byId("dial-value").textContent = byId("dial").value));
    byId("dice").addEventListener("click", () => (byId("seed").value = Math.floor(Math.random() * 1e6)));
    byId("settings").addEventListener("submit", (event) => {
      event.preventDefault();
      onRestart(this.fields());
    });
  }

  offer(policies) {
    this.policies = policies;
    byId("policy").replaceChildren(...policies.map(({ name, label }) => element("option", { value: name, textContent: label })));
  }

  // What the video under way is made with.
  show({ policy, seed, frames_per_head, global_sink }) {
    byId("policy").value = policy;
    byId("seed").value = seed;
    byId("sink").checked = global_sink;
    this.showDial(frames_per_head);
  }

  showDial(value) {
    const dial = this.policies.find(({ name }) => name === byId("policy").value)?.dial;
    byId("dial-row").hidden = !dial;
    if (!dial) return;
    const [least, most, usual] = dial;
    Object.assign(byId("dial"), { min: least, max: most });
    byId("dial").value = value ?? usual;
    byId("dial-value").textContent = byId("dial").value;
  }

  fields() {
    const fields = { policy: byId("policy").value, seed: Number(byId("seed").value), global_sink: byId("sink").checked };
    if (!byId("dial-row").hidden) fields.frames_per_head = Number(byId("dial").value);
    return fields;
  }
}
