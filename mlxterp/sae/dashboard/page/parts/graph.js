// A circuit as a drawing: levels of nodes and the edges between them.

import { bdi, h, svg } from "../dom.js";
import { hush, tell, tellAt } from "./tip.js";

const sizeOf = edge => Math.abs(edge.weight);

/** The head of an arrow, in the direction in which a path ends. */
function arrow(path, width) {
  const points = path.match(/-?[\d.]+(?:e-?\d+)?/g).map(Number);
  const [fromX, fromY, x, y] = points.slice(-4);
  const far = Math.hypot(x - fromX, y - fromY) || 1;
  const [along, across] = [(x - fromX) / far, (y - fromY) / far];
  const back = 5 + 1.5 * width,
    half = 2 + 0.8 * width;
  const corner = side =>
    `${x - back * along + side * half * across},${y - back * across - side * half * along}`;
  return `M${x},${y}L${corner(1)}L${corner(-1)}z`;
}

/** The drawing of `graph`, with `words(node)` in its nodes: `onChoose(i | null)` for a node, `onOpen(i)` for one that is entered. */
export function drawGraph(graph, { words, onChoose, onOpen }) {
  const [width, height] = graph.size,
    [boxWidth, boxHeight] = graph.box,
    largest = Math.max(...graph.edges.map(sizeOf), 1e-30);
  const lines = svg("svg", { width, height, "aria-hidden": "true" });
  const stage = h("div", { class: "stage", vars: { width: `${width}px`, height: `${height}px` } }, lines);
  for (const y of graph.rules) lines.append(svg("line", { class: "rule", x1: 0, x2: width, y1: y, y2: y }));

  const groups = graph.edges.map(edge => {
    const thick = 0.7 + (5 * sizeOf(edge)) / largest;
    const group = svg(
      "g",
      { class: edge.weight < 0 ? "edge lowers" : "edge raises" },
      svg("path", { class: "curve", d: edge.path, "stroke-width": thick }),
      svg("path", { class: "arrow", d: arrow(edge.path, thick) }),
      svg("path", { class: "hit", d: edge.path, "stroke-width": thick + 8 }),
    );
    group.addEventListener("pointermove", event =>
      tell(event.clientX, event.clientY, [
        graph.nodes[edge.source].name,
        `→ ${graph.nodes[edge.target].name}`,
        ...edge.numbers,
      ]),
    );
    group.addEventListener("pointerleave", hush);
    group.addEventListener("click", () => onChoose(edge.target));
    return group;
  });
  [...graph.edges.keys()]
    .sort((a, b) => sizeOf(graph.edges[a]) - sizeOf(graph.edges[b]))
    .forEach(i => lines.append(groups[i]));
  for (const [texts, kind] of [
    [graph.headings, "heading"],
    [graph.marks, "mark"],
  ])
    for (const { at, text, width: room } of texts)
      stage.append(
        h(
          "div",
          {
            class: `title ${kind}`,
            title: text,
            vars: { left: `${at[0]}px`, top: `${at[1]}px`, "max-width": `${room}px` },
          },
          bdi(text),
        ),
      );

  const boxes = graph.nodes.map((node, i) => {
    const box = h(
      "button",
      {
        type: "button",
        class: `node ${node.kind}`,
        "aria-label": [node.name, words(node)].filter(Boolean).join(" "),
        "aria-pressed": "false",
        tabindex: -1,
        vars: {
          left: `${node.at[0] - boxWidth / 2}px`,
          top: `${node.at[1] - boxHeight / 2}px`,
          width: `${boxWidth}px`,
          height: `${boxHeight}px`,
        },
      },
      bdi(node.text),
      words(node) && h("small", {}, bdi(words(node))),
    );
    const told = [node.name, ...node.numbers];
    box.addEventListener("pointermove", event => tell(event.clientX, event.clientY, told));
    box.addEventListener("focus", () => {
      if (box.matches(":focus-visible")) tellAt(box, told);
    });
    for (const end of ["pointerleave", "blur"]) box.addEventListener(end, hush);
    box.addEventListener("click", event => {
      if (event.detail !== 0) onChoose(i);
    });
    box.addEventListener("dblclick", () => onOpen(i));
    box.addEventListener("keydown", event => {
      const pressed = box.getAttribute("aria-pressed") === "true";
      if (event.key === "Enter" || event.key === " ") {
        if (pressed) onOpen(i);
        else onChoose(i);
      } else if (event.key.startsWith("Arrow")) step(i, event.key);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    stage.append(box);
    return box;
  });

  const focus = i => {
    for (const box of boxes) box.tabIndex = -1;
    boxes[i].tabIndex = 0;
    boxes[i].focus();
  };

  /** The strongest neighbour in a direction; where no edge leads, the nearest node there. */
  function step(from, key) {
    const along = key === "ArrowLeft" || key === "ArrowRight" ? 0 : 1,
      way = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const far = i => way * (graph.nodes[i].at[along] - graph.nodes[from].at[along]);
    let best = null,
      most = 0;
    graph.edges.forEach((edge, i) => {
      if (groups[i].hasAttribute("hidden")) return;
      const other = edge.source === from ? edge.target : edge.target === from ? edge.source : null;
      if (other !== null && far(other) > 1 && Math.abs(edge.weight) > most && isAhead(other, from, along))
        [best, most] = [other, Math.abs(edge.weight)];
    });
    if (best === null) {
      let least = Infinity;
      graph.nodes.forEach((node, i) => {
        const cost = far(i) + 3 * Math.abs(node.at[1 - along] - graph.nodes[from].at[1 - along]);
        if (!boxes[i].hidden && far(i) > 1 && cost < least) [best, least] = [i, cost];
      });
    }
    if (best !== null) focus(best);
  }
  // An edge counts as one in a direction if it goes further that way than a row is high.
  const isAhead = (i, from, along) =>
    along === 0 ||
    graph.nodes[i].at[0] === graph.nodes[from].at[0] ||
    Math.abs(graph.nodes[i].at[1] - graph.nodes[from].at[1]) > 2 * boxHeight;

  return {
    element: stage,
    focus,
    point: (i, on) => groups[i].classList.toggle("pointed", on),
    /** Shows the edges of `kept` and the nodes of `used`, and what is near the chosen node. */
    refresh(kept, used, chosen) {
      const shown = new Set(kept),
        near = new Set(
          kept.filter(i => graph.edges[i].source === chosen || graph.edges[i].target === chosen),
        );
      const around = new Set([...near].flatMap(i => [graph.edges[i].source, graph.edges[i].target]));
      groups.forEach((group, i) => {
        group.toggleAttribute("hidden", !shown.has(i));
        group.classList.toggle("near", near.has(i));
      });
      boxes.forEach((box, i) => {
        box.hidden = !used.has(i) && i !== chosen;
        box.classList.toggle("near", around.has(i));
        box.setAttribute("aria-pressed", String(i === chosen));
        box.tabIndex = -1;
      });
      const first = chosen ?? boxes.findIndex(box => !box.hidden);
      if (first >= 0) boxes[first].tabIndex = 0;
      stage.classList.toggle("choosing", chosen !== null);
    },
  };
}
