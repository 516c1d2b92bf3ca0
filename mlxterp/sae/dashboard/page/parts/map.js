// The map of all features: a point of each, so that those with similar directions are near each other.

import { colours, context2d, h, onResize } from "../dom.js";
import { percent } from "../format.js";
import { hush, tell } from "./tip.js";

const EDGE = 14,
  NEAR = 14,
  REST = 40; // milliseconds that somebody types on before the map is drawn anew

/** A map that `show(ids)` restricts and `point(id)` marks; a click calls `onOpen(id)`. */
export function featureMap(app, { signal, onOpen, onPoint, height = 360 }) {
  const points = app.columns.map,
    { firing_rates: rates } = app.columns;
  const canvas = h("canvas", {
    class: "map",
    role: "img",
    "aria-label": "Map of the features; the table below has the same features in words",
  });
  const mark = h("i", { class: "map-mark", hidden: true });
  const box = h("div", { class: "chart-box", vars: { height: `${height}px` } }, canvas, mark);
  const bounds = [0, 1].map(axis => {
    let low = Infinity,
      high = -Infinity;
    for (let i = axis; i < points.length; i += 2) {
      low = Math.min(low, points[i]);
      high = Math.max(high, points[i]);
    }
    return [low, high > low ? high : low + 1];
  });
  const logs = Float32Array.from(rates, rate => (rate > 0 ? Math.log10(rate) : NaN));
  let lowest = Infinity,
    highest = -Infinity;
  for (const log of logs)
    if (log === log) {
      lowest = Math.min(lowest, log);
      highest = Math.max(highest, log);
    }
  const shown = new Uint8Array(app.n).fill(1);
  let width = 0,
    pointed = null,
    waiting = null,
    cells = new Map();

  const x = id =>
    EDGE + ((points[2 * id] - bounds[0][0]) / (bounds[0][1] - bounds[0][0])) * (width - 2 * EDGE);
  const y = id =>
    height -
    EDGE -
    ((points[2 * id + 1] - bounds[1][0]) / (bounds[1][1] - bounds[1][0])) * (height - 2 * EDGE);

  function paint() {
    const pen = context2d(canvas, width, height);
    const [strong, soft, dead] = colours("more-ink", "faint", "soft");
    const size = app.n > 20000 ? 1.3 : app.n > 4000 ? 1.9 : 2.6;
    cells = new Map();
    for (const pass of [0, 1])
      for (let id = 0; id < app.n; id++) {
        if (shown[id] !== pass) continue;
        const [left, top] = [x(id), y(id)];
        const share = highest > lowest ? (logs[id] - lowest) / (highest - lowest) : 1;
        pen.globalAlpha = !pass ? 0.45 : share === share ? 0.22 + 0.7 * share : 0.8;
        pen.fillStyle = !pass ? soft : share === share ? strong : dead;
        pen.strokeStyle = dead;
        pen.beginPath();
        pen.arc(left, top, size, 0, 2 * Math.PI);
        if (pass && share !== share) pen.stroke();
        else pen.fill();
        if (pass) {
          const cell = `${Math.floor(left / NEAR)} ${Math.floor(top / NEAR)}`;
          if (!cells.has(cell)) cells.set(cell, []);
          cells.get(cell).push(id);
        }
      }
    ring();
  }

  /** A ring around the feature that is pointed at. */
  function ring() {
    mark.hidden = pointed === null;
    if (pointed !== null) mark.style.transform = `translate(${x(pointed)}px, ${y(pointed)}px)`;
  }

  function nearest(left, top) {
    let best = null,
      least = NEAR * NEAR;
    const [i, j] = [Math.floor(left / NEAR), Math.floor(top / NEAR)];
    for (let a = i - 1; a <= i + 1; a++)
      for (let b = j - 1; b <= j + 1; b++)
        for (const id of cells.get(`${a} ${b}`) ?? []) {
          const far = (x(id) - left) ** 2 + (y(id) - top) ** 2;
          if (far < least) [best, least] = [id, far];
        }
    return best;
  }

  const point = id => {
    if (id === pointed) return;
    pointed = id;
    if (width) ring();
  };
  canvas.addEventListener("pointermove", event => {
    const { left, top } = canvas.getBoundingClientRect();
    const id = nearest(event.clientX - left, event.clientY - top);
    point(id);
    onPoint?.(id);
    canvas.classList.toggle("over", id !== null);
    if (id === null) return hush();
    tell(event.clientX, event.clientY, [`#${id} ${app.words(id)}`, ["fires on", percent(rates[id])]]);
  });
  canvas.addEventListener("pointerleave", () => {
    point(null);
    onPoint?.(null);
    hush();
  });
  canvas.addEventListener("click", () => {
    if (pointed !== null) onOpen(pointed);
  });
  onResize(box, signal, to => {
    width = to;
    paint();
  });
  document.addEventListener(
    "themechange",
    () => {
      if (width) paint();
    },
    { signal },
  );
  return {
    element: box,
    point,
    show(ids) {
      shown.fill(ids.length === app.n ? 1 : 0);
      for (const id of ids) shown[id] = 1;
      clearTimeout(waiting);
      waiting = setTimeout(() => width && paint(), REST);
    },
  };
}
