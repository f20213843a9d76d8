// The numbers beside the picture: measured here (what is on the screen) and on the server.

import { byId, bytes, element, median } from "./dom.js";

const rate = (value) => (value == null ? "–" : `${value.toFixed(value < 100 ? 1 : 0)} fps`);
const seconds = (value) => (value == null ? "–" : `${value.toFixed(2)} s`);

export function drawNumbers({ told, shownFps, latencies }) {
  const latest = latencies.at(-1);
  const typical = latencies.length > 1 ? ` (median ${median(latencies).toFixed(2)})` : "";
  const rows = [
    ["Prompt to screen", latest === undefined ? "–" : `${seconds(latest)}${typical}`],
    ["On the screen", shownFps == null ? "–" : `${shownFps.toFixed(1)} of ${told?.fps ?? "–"} fps`],
    ["End to end", rate(told?.end_to_end_fps)],
    ["Transformer", rate(told?.transformer_fps)],
    ["Real time", told?.real_time == null ? "–" : `× ${told.real_time.toFixed(2)}`],
    ["First frame", seconds(told?.first_frame_s)],
    ["Memory", told?.memory.resident == null ? "–" : bytes(told.memory.resident)],
  ];
  if (told?.memory.gpu != null) rows.push(["GPU memory", bytes(told.memory.gpu)]);
  if (told?.lost_frames) rows.push(["Frames lost by slow viewers", told.lost_frames]);
  if (told?.recording) rows.push(["Recording", told.recording]);
  const cells = rows.flatMap(([name, value], index) => [
    element("dt", { textContent: name, className: index ? "" : "first" }),
    element("dd", { textContent: value, className: index ? "" : "first" }),
  ]);
  byId("numbers").replaceChildren(...cells);
}
