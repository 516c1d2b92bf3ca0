// A matrix of coloured cells, on a canvas, with heads beside and above it.

import { bdi, colours, context2d, h } from "../dom.js";
import { hush, tell, tellAt } from "./tip.js";

const MOST_PIXELS = 16000;

/**
 * Cells in `rows x columns`. `share(i, j)` in [-1, 1] gives the colour, null for not known; `text(i, j)` what is
 * written into it where there is room; `lines(i, j)` what is told of it; `onChoose(i, j)` is called for a cell;
 * `ends` are what the colours of the two ends of the scale stand for.
 */
export function heatmap({
  rows,
  columns,
  share,
  text = () => "",
  lines,
  onChoose = null,
  onPoint = null,
  cell = [18, 26],
  name,
  signal,
  ends = null,
}) {
  const ratio = devicePixelRatio || 1,
    [wide, high] = [Math.max(2, Math.min(cell[0], MOST_PIXELS / ratio / columns.length)), cell[1]];
  const width = Math.ceil(wide * columns.length),
    height = high * rows.length;
  const canvas = h("canvas", {
    role: "img",
    tabindex: 0,
    "aria-label": `${name}; arrow keys go from cell to cell`,
  });
  const ringed = h("div", { class: "ring", hidden: true });
  let at = null;

  function paint() {
    const pen = context2d(canvas, width, height);
    const [more, less, empty, ink, strong, line] = colours("more", "less", "cell", "ink", "strong", "soft");
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const gap = wide > 6 ? 1 : 0;
    for (let i = 0; i < rows.length; i++)
      for (let j = 0; j < columns.length; j++) {
        const value = share(i, j),
          [x, y] = [j * wide, i * high];
        pen.globalAlpha = 1;
        pen.fillStyle = empty;
        pen.fillRect(x, y, wide - gap, high - 1);
        if (value === null) {
          pen.strokeStyle = line;
          pen.globalAlpha = 0.5;
          pen.beginPath();
          pen.moveTo(x + wide * 0.35, y + high * 0.65);
          pen.lineTo(x + wide * 0.65, y + high * 0.35);
          pen.stroke();
          continue;
        }
        if (value) {
          pen.globalAlpha = 0.1 + 0.9 * Math.min(1, Math.abs(value));
          pen.fillStyle = value > 0 ? more : less;
          pen.fillRect(x, y, wide - gap, high - 1);
        }
        const written = wide >= 30 ? text(i, j) : value < 0 && wide >= 12 ? "−" : "";
        pen.globalAlpha = 1;
        pen.fillStyle = Math.abs(value) > 0.55 ? strong : ink;
        if (written) pen.fillText(written, x + (wide - gap) / 2, y + high / 2);
      }
  }

  function go(i, j, x = null, y = null) {
    at = [Math.max(0, Math.min(rows.length - 1, i)), Math.max(0, Math.min(columns.length - 1, j))];
    ringed.hidden = false;
    Object.assign(ringed.style, {
      left: `${at[1] * wide}px`,
      top: `${at[0] * high}px`,
      width: `${Math.max(2, wide - 1)}px`,
      height: `${high - 1}px`,
    });
    if (x === null) {
      ringed.scrollIntoView({ block: "nearest", inline: "nearest" });
      tellAt(ringed, lines(...at));
    } else tell(x, y, lines(...at));
    onPoint?.(...at);
  }
  const leave = () => {
    at = null;
    ringed.hidden = true;
    hush();
    onPoint?.(null, null);
  };
  canvas.addEventListener("pointermove", event => {
    const { left, top } = canvas.getBoundingClientRect();
    go(
      Math.floor((event.clientY - top) / high),
      Math.floor((event.clientX - left) / wide),
      event.clientX,
      event.clientY,
    );
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("click", () => {
    if (at) onChoose?.(...at);
  });
  canvas.addEventListener("keydown", event => {
    const [i, j] = at ?? [0, -1];
    const to = { ArrowRight: [i, j + 1], ArrowLeft: [i, j - 1], ArrowDown: [i + 1, j], ArrowUp: [i - 1, j] }[
      event.key
    ];
    if (to) go(...to);
    else if (event.key === "Enter" && at) onChoose?.(...at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  paint();
  document.addEventListener("themechange", paint, { signal });
  const heads = columns.map(title =>
    h("div", { class: "column-head", vars: { width: `${wide}px` } }, wide >= 9 ? bdi(title) : ""),
  );
  const scale =
    ends &&
    h(
      "div",
      { class: ends[0] === "0" ? "scale" : "scale two-sided" },
      h("span", {}, ends[0]),
      h("i"),
      h("span", {}, ends[1]),
    );
  return h(
    "div",
    { class: "heatmap", role: "group", "aria-label": name },
    scale,
    h(
      "div",
      { class: "row-heads" },
      rows.map(head => h("div", { class: "row-head", vars: { height: `${high}px` } }, head)),
    ),
    h(
      "div",
      { class: "cells" },
      h("div", { class: "column-heads", vars: { width: `${width}px` } }, heads),
      h("div", { class: "canvas", vars: { width: `${width}px`, height: `${height}px` } }, canvas, ringed),
    ),
  );
}
