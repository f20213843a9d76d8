// The page: what is pressed and typed goes to the server, what comes back to the parts that show it.

import { Connection } from "./connection.js";
import { byId, clock, element } from "./dom.js";
import { drawHeads } from "./headmap.js";
import { drawNumbers } from "./numbers.js";
import { Player } from "./player.js";
import { Saves } from "./saves.js";
import { Settings } from "./settings.js";
import { Timeline } from "./timeline.js";

const ALERT_MS = 9000;

const state = { fps: 16, steers: false, paused: false, scenes: [], told: null, latencies: [] };
let nextId = Math.floor(Math.random() * 2 ** 31); // not what another tab counts from
const typedAt = new Map(); // prompts on their way, by id

const address = new URLSearchParams(location.hash.slice(1));
const stored = (key) => sessionStorage.getItem(`studio.${key}`);
const store = (key, value) => sessionStorage.setItem(`studio.${key}`, value);
if (address.has("token")) store("token", address.get("token"));
if (address.has("token")) history.replaceState(null, "", address.has("watch") ? `#watch=${address.get("watch")}` : location.pathname);

const player = new Player(byId("canvas"), onShown, (take, frame) => connection.say("at", { take, frame }));
const timeline = new Timeline();
const saves = new Saves(() => connection.say("save"), () => stored("token"), alertWith);
const settings = new Settings((fields) => restart(fields));
const connection = new Connection({
  hello: () => ({ token: stored("token"), join: address.get("watch") ?? stored("key") }),
  onEvent: (event) => handlers[event.type]?.(event),
  onFrame: (frame) => {
    player.push(frame);
    hideVeil();
  },
  onLost: (reason) => veil(reason || "The line is broken. Trying again"),
  onOver: (reason) => over(reason),
});

const handlers = {
  loading: () => veil("The model is being loaded"),
  welcome: (event) => {
    state.fps = player.fps = event.fps;
    player.size(event.width, event.height);
    byId("model").textContent = `${event.model}, ${event.width} × ${event.height}`;
    settings.offer(event.policies);
    showExamples(event.examples);
  },
  waiting: ({ place, of }) => veil(`All sessions are taken. You are number ${place} of ${of} in the line`),
  session: (event) => {
    state.steers = event.steers;
    state.watch = event.watch;
    if (event.steers) store("key", event.key);
    for (const control of document.querySelectorAll("button:disabled, input:disabled, select:disabled")) control.disabled = !event.steers;
    byId("share").disabled = false;
    document.body.classList.toggle("watching", !event.steers);
    byId("watching").hidden = event.steers;
    setPaused(event.paused);
    veil("The first frames are being made");
  },
  viewers: ({ count, steering }) => {
    byId("audience").hidden = count < 2;
    byId("audience").textContent = `${count} viewers${steering ? "" : ", nobody steers"}`;
  },
  take: (event) => {
    player.begin(event.take);
    state.scenes = event.scenes;
    timeline.begin(state.fps, event.scenes);
    typedAt.clear();
    settings.show(event);
  },
  scene: (event) => {
    state.scenes[event.scene] = event;
    timeline.scene(event);
  },
  heads: (event) => {
    byId("heads-card").hidden = false;
    drawHeads(event);
  },
  numbers: (event) => {
    state.told = event;
    player.fps = event.playing_fps;
  },
  paused: ({ on }) => setPaused(on),
  saving: (event) => saves.progress(event),
  saved: (event) => saves.done(event),
  notice: ({ message }) => alertWith(message),
  error: ({ message, id }) => {
    if (id) timeline.refused(id);
    saves.failed();
    alertWith(message);
  },
  ended: ({ reason }) => over(reason),
};

function onShown({ frame, scene }, now) {
  const said = state.scenes[scene];
  byId("clock").hidden = byId("caption").hidden = false;
  byId("clock").textContent = clock(frame / state.fps);
  byId("caption").textContent = said?.text ?? "";
  let latency;
  if (said?.id && typedAt.has(said.id)) {
    latency = (performance.now() - typedAt.get(said.id)) / 1000;
    state.latencies.push(latency);
    for (const id of typedAt.keys()) if (id <= said.id) typedAt.delete(id);
  }
  timeline.onScreen(scene, latency);
  if (latency !== undefined) refresh();
}

function refresh() {
  drawNumbers({ told: state.told, shownFps: player.rate(), latencies: state.latencies });
  timeline.strip(player.shown);
}

function say(text) {
  const words = text.trim();
  if (!words) return;
  const id = nextId++;
  typedAt.set(id, performance.now());
  if (connection.say("prompt", { id, text: words })) timeline.typed(id, words);
  else alertWith("The line is broken; the prompt was not sent");
}

function setPaused(on) {
  state.paused = on;
  player.frozen = on && state.steers;
  byId("pause").setAttribute("aria-pressed", on);
  byId("pause").querySelector("span").textContent = on ? "Go on" : "Pause";
  byId("step").disabled = !on || !state.steers;
}

function pause() {
  connection.say("pause", { on: !state.paused });
}

function step() {
  if (!state.paused) return;
  player.frozen = false; // what waits and the new block are shown, and then nothing comes
  connection.say("step");
}

function restart(fields) {
  connection.say("restart", fields);
}

function showExamples(examples) {
  const chips = examples.map((text) => element("button", { type: "button", textContent: text, disabled: !state.steers, onclick: () => say(text) }));
  byId("examples").replaceChildren(...chips);
}

let alertTimer;
function alertWith(message) {
  byId("alert").hidden = false;
  byId("alert").querySelector("span").textContent = message;
  clearTimeout(alertTimer);
  alertTimer = setTimeout(() => (byId("alert").hidden = true), ALERT_MS);
}

function veil(text) {
  byId("veil").classList.remove("off");
  byId("veil-text").textContent = text;
  byId("again").hidden = true;
  document.querySelector(".spinner").hidden = false;
}

function hideVeil() {
  byId("veil").classList.add("off");
}

function over(reason) {
  veil(reason ? `${reason[0].toUpperCase()}${reason.slice(1)}` : "The session is over");
  document.querySelector(".spinner").hidden = true;
  byId("again").hidden = false;
  sessionStorage.removeItem("studio.key");
}

async function share() {
  const token = stored("token");
  const link = `${location.origin}/#watch=${state.watch}${token ? `&token=${token}` : ""}`;
  try {
    await navigator.clipboard.writeText(link);
    byId("share").textContent = "The link is copied";
    setTimeout(() => (byId("share").textContent = "Share"), 2500);
  } catch {
    prompt("A link for watching:", link);
  }
}

byId("say").addEventListener("submit", (event) => {
  event.preventDefault();
  say(byId("prompt").value);
  byId("prompt").value = "";
});
byId("pause").addEventListener("click", pause);
byId("step").addEventListener("click", step);
byId("restart").addEventListener("click", () => restart(settings.fields()));
byId("save").addEventListener("click", () => saves.begin());
byId("share").addEventListener("click", share);
byId("alert").querySelector("button").addEventListener("click", () => (byId("alert").hidden = true));
byId("again").addEventListener("click", () => {
  location.hash = "";
  location.reload();
});

const SHORTCUTS = { " ": pause, ".": step, r: () => restart(settings.fields()), s: () => saves.begin() };
document.addEventListener("keydown", (event) => {
  const inField = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && inField) inField.blur();
  if (inField || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("prompt").focus();
    return;
  }
  if (event.key === " " && event.target.closest("button")) return; // Space presses it
  if (SHORTCUTS[event.key] && state.steers) {
    event.preventDefault();
    SHORTCUTS[event.key]();
  }
});

setInterval(refresh, 500);
refresh();
connection.open();
window.studio = { state, player, bye: () => connection.say("bye") }; // for who looks in with the browser's tools
