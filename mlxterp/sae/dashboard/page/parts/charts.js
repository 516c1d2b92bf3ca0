// Simple charts: lines over a number, and bars.

import { h, onResize, svg } from "../dom.js";
import { brief, number, tick, ticks } from "../format.js";
import { hush, tell, tellAt } from "./tip.js";

const HEIGHT = 176,
  LEFT = 44,
  RIGHT = 10,
  TOP = 10,
  BOTTOM = 24;

function frame(height = HEIGHT, name = "") {
  const plot = svg("svg", { class: "chart", height, role: "img", "aria-label": name, tabindex: 0 });
  return { plot, box: h("div", { class: "chart-box", vars: { height: `${height}px` } }, plot) };
}

const across = (width, low, high) => x =>
  LEFT + (high > low ? (x - low) / (high - low) : 0.5) * (width - LEFT - RIGHT);

function drawAxes(plot, width, height, { xs, ys, x, y, asX = brief, asY = tick }) {
  for (const value of ys) {
    plot.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    plot.append(
      svg("text", { class: "tick", x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, asY(value)),
    );
  }
  xs.forEach((value, i) => {
    const anchor = i === xs.length - 1 && x(value) > width - 30 ? "end" : "middle";
    plot.append(
      svg("text", { class: "tick", x: x(value), y: height - 7, "text-anchor": anchor }, asX(value)),
    );
  });
}

/** Moves a cursor over `n` places with pointer and arrow keys; `show(i)` gives the lines of the tip. */
function cursor(plot, places, show, leave, choose = null) {
  let at = null;
  const set = (i, x, y) => {
    at = i;
    const lines = show(i);
    if (x === null) tellAt(plot, lines);
    else tell(x, y, lines);
  };
  plot.onpointermove = event => {
    const x = event.clientX - plot.getBoundingClientRect().left;
    let best = 0;
    places.forEach((place, i) => {
      if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i;
    });
    set(best, event.clientX, event.clientY);
  };
  plot.onpointerleave = plot.onblur = () => {
    at = null;
    hush();
    leave();
  };
  plot.onkeydown = event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (choose && at !== null && event.key === "Enter") return choose(at);
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    set(at === null ? 0 : Math.max(0, Math.min(places.length - 1, at + step)), null, null);
  };
  if (choose)
    plot.onclick = () => {
      if (at !== null) choose(at);
    };
}

/** Lines `{name, kind, points: [[x, y]…]}` over a number such as tokens. */
export function lineChart(
  series,
  { signal, name, format = number, axis = tick, low = null, title = "tokens" },
) {
  const drawn = series
    .map(line => ({ ...line, points: line.points.filter(p => p.every(Number.isFinite)) }))
    .filter(line => line.points.length);
  const { plot, box } = frame(HEIGHT, name);
  const all = drawn.flatMap(line => line.points);
  onResize(box, signal, width => {
    plot.replaceChildren();
    plot.setAttribute("width", width);
    const xMax = Math.max(...all.map(p => p[0])),
      yMin = low ?? Math.min(...all.map(p => p[1])),
      yTop = Math.max(...all.map(p => p[1]));
    const ys = ticks(yMin, yTop > yMin ? yTop : yMin + 1, 4),
      yMax = Math.max(yTop, ys.at(-1));
    const x = across(width, 0, xMax),
      y = value => TOP + (1 - (value - yMin) / (yMax - yMin || 1)) * (HEIGHT - TOP - BOTTOM);
    drawAxes(plot, width, HEIGHT, {
      xs: ticks(0, xMax, Math.max(2, Math.round(width / 110))),
      ys,
      x,
      y,
      asY: axis,
    });
    for (const line of drawn) {
      const path = line.points
        .map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`)
        .join("");
      plot.append(svg("path", { class: `line ${line.kind}`, d: path }));
      if (line.points.length < 30)
        for (const p of line.points)
          plot.append(svg("circle", { class: `dot ${line.kind}`, cx: x(p[0]), cy: y(p[1]), r: 2 }));
    }
    const rule = svg("line", { class: "rule", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    plot.append(rule);
    const xs = [...new Set(all.map(p => p[0]))].sort((a, b) => a - b);
    cursor(
      plot,
      xs.map(x),
      i => {
        rule.setAttribute("x1", x(xs[i]));
        rule.setAttribute("x2", x(xs[i]));
        rule.setAttribute("visibility", "visible");
        const values = drawn
          .map(line => [line.name, line.points.find(p => p[0] === xs[i])])
          .filter(([, p]) => p);
        return [`${brief(xs[i])} ${title}`, ...values.map(([of, p]) => [of, format(p[1])])];
      },
      () => rule.setAttribute("visibility", "hidden"),
    );
  });
  const key =
    drawn.length > 1 &&
    h(
      "div",
      { class: "key" },
      drawn.map(line => h("span", { class: line.kind }, h("i"), line.name)),
    );
  return h("figure", {}, h("figcaption", {}, h("span", {}, name), key), box);
}

/** Bars of the roots of counts: `rule` is a place that a line marks, `onChoose(i)` is called for a bar. */
export function histogram(
  counts,
  edges,
  {
    signal,
    name,
    asX = brief,
    marks = [],
    height = HEIGHT,
    describe,
    onChoose = null,
    chosen = null,
    rule = null,
  },
) {
  const { plot, box } = frame(
    height,
    `${name}: ${describe(counts.indexOf(Math.max(...counts)))
      .flat()
      .join(" ")} at its highest`,
  );
  const marker = svg("g", { class: "marker", visibility: "hidden" });
  let x = null,
    pressed = chosen;
  const most = Math.max(...counts, 1);
  const draw = width => {
    plot.replaceChildren();
    plot.setAttribute("width", width);
    x = across(width, 0, counts.length);
    const y = value => TOP + (1 - Math.sqrt(value / most)) * (height - TOP - BOTTOM);
    const xs = marks.length ? marks : [0, counts.length];
    drawAxes(plot, width, height, {
      xs,
      ys: [most / 4, most].filter(v => v >= 1 || most < 4),
      x,
      y,
      asX: i => asX(edges[i]),
      asY: v => brief(Math.round(v)),
    });
    const bars = Array.from(counts, (count, i) => {
      const top = count ? Math.min(y(count), height - BOTTOM - 1.5) : height - BOTTOM;
      const bar = svg("rect", {
        class: i === pressed ? "bar chosen" : "bar",
        x: x(i) + 0.5,
        width: Math.max(1, x(i + 1) - x(i) - 1),
        y: top,
        height: height - BOTTOM - top,
      });
      plot.append(bar);
      return bar;
    });
    plot.append(
      svg("line", { class: "base", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }),
    );
    marker.replaceChildren(
      svg("line", { y1: TOP - 6, y2: height - BOTTOM }),
      svg("path", { d: `M-4,${TOP - 6}h8l-4,6z` }),
    );
    plot.append(marker);
    figure.mark(rule);
    const centres = Array.from(counts, (_, i) => x(i + 0.5));
    const clear = () => bars.forEach(bar => bar.classList.remove("pointed"));
    cursor(
      plot,
      centres,
      i => {
        clear();
        bars[i].classList.add("pointed");
        return describe(i);
      },
      clear,
      onChoose,
    );
  };
  const figure = h("figure", {}, h("figcaption", {}, h("span", {}, name)), box);
  onResize(box, signal, draw);
  figure.mark = place => {
    marker.setAttribute("visibility", place === null || x === null ? "hidden" : "visible");
    if (place !== null && x !== null) marker.setAttribute("transform", `translate(${x(place).toFixed(1)},0)`);
  };
  figure.press = i => {
    pressed = i;
    if (box.clientWidth) draw(box.clientWidth);
  };
  return figure;
}

/** Named numbers as horizontal bars from a middle line, for numbers of both signs. */
export function bars(
  rows,
  { name, format = number, largest = Math.max(...rows.map(row => Math.abs(row[1])), 1e-9) },
) {
  return h(
    "div",
    { class: "bars", role: "list", "aria-label": name },
    rows.map(([text, value, extra]) =>
      h(
        "div",
        { role: "listitem", class: value < 0 ? "bar-row less" : "bar-row more" },
        h("bdi", { class: "bar-name" }, text),
        h(
          "span",
          { class: "bar-track", "aria-hidden": "true" },
          h("i", { vars: { width: `${(100 * Math.abs(value ?? 0)) / largest}%` } }),
        ),
        h("span", { class: "bar-value" }, format(value)),
        extra,
      ),
    ),
  );
}
