// Layers by heads, and in every cell what the head keeps: first frames below, last frames above, by how many it holds.

import { byId, element, svg } from "./dom.js";

const CELL = 26;
const GAP = 3;
const MARGIN = 16;
const ROLES = ["sink", "neighbor", "dummy"];

export function drawHeads({ kinds, table, roles }) {
  const columns = table[0].length;
  const scale = Math.max(1, ...kinds.map((kind) => kind.frames.length));
  const cell = columns > 8 ? CELL * 0.8 : CELL;
  const map = svg("svg", {
    viewBox: `0 0 ${MARGIN + columns * (cell + GAP)} ${MARGIN + table.length * (cell + GAP)}`,
  });
  for (let head = 0; head < columns; head++) {
    map.append(label(MARGIN + head * (cell + GAP) + cell / 2, 10, head, "middle"));
  }
  table.forEach((row, layer) => {
    const y = MARGIN + layer * (cell + GAP);
    map.append(label(MARGIN - 5, y + cell / 2 + 3, layer, "end"));
    row.forEach((place, head) => {
      const role = roles ? ROLES[roles[layer][head]] : null;
      map.append(drawCell(MARGIN + head * (cell + GAP), y, cell, kinds[place], scale, role, `layer ${layer}, head ${head}`));
    });
  });
  byId("heads").replaceChildren(map);
  byId("heads").setAttribute("aria-label", summary(kinds, table, roles));
  drawLegend(kinds, table, roles);
}

function label(x, y, text, anchor) {
  const made = svg("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

function drawCell(x, y, size, kind, scale, role, name) {
  const sinks = Math.min(kind.sink, kind.frames.length);
  const recent = kind.frames.length - sinks;
  const unit = size / scale;
  const group = svg("g", {}, svg("rect", { class: "cell", x, y, width: size, height: size, rx: 4 }));
  const part = (count, below, colour) => {
    if (count) group.append(svg("rect", { class: colour, x, y: y + size - (below + count) * unit, width: size, height: Math.max(count * unit - 1, 1), rx: 2 }));
  };
  part(sinks, 0, "sink");
  part(recent, sinks, role === "dummy" ? "dummy" : "recent");
  const title = svg("title");
  title.textContent = `${name}${role ? `, ${role}` : ""}: keeps ${inWords(kind)}; holds ${kind.frames.length ? kind.frames.join(", ") : "none yet"}`;
  group.append(title);
  return group;
}

function inWords(kind) {
  if (!kind.sink && !kind.recent) return "nothing";
  return [kind.sink && `first ${kind.sink}`, kind.recent && `last ${kind.recent}`].filter(Boolean).join(" + ");
}

function mean(kinds, table) {
  const held = table.flat().map((place) => kinds[place].frames.length);
  return held.reduce((sum, count) => sum + count, 0) / held.length;
}

function summary(kinds, table, roles) {
  const dummy = roles ? `, ${roles.flat().filter((role) => role === 2).length} dummy heads` : "";
  return `${table.length} layers of ${table[0].length} heads, ${mean(kinds, table).toFixed(2)} earlier frames a head${dummy}`;
}

function drawLegend(kinds, table, roles) {
  const entry = (colour, text) => {
    const mark = element("i");
    mark.style.background = `var(--${colour})`;
    return element("span", {}, mark, text);
  };
  const entries = [entry("sink", "first frames"), entry("neighbor", "last frames")];
  if (roles) entries.push(entry("dummy", "dummy heads"));
  byId("legend").replaceChildren(...entries, element("span", { textContent: `${mean(kinds, table).toFixed(2)} frames a head` }));
}
