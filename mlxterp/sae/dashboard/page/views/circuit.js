// A circuit: which features lead to which.

import { bdi, button, h, say, segments, select, svg } from "../dom.js";
import { number } from "../format.js";
import { drawGraph } from "../parts/graph.js";
import { about, strongest } from "../parts/node.js";
import { featureLink, go, link, remember } from "../router.js";

export const name = "Circuit";

const sizeOf = edge => Math.abs(edge.weight);

/** Which edges and nodes are left: the share `prune` of the edges, or of the nodes by influence, is gone. */
function left(graph, by, prune) {
  const edges = [...graph.edges.keys()];
  if (by === "influence") {
    const ranks = graph.nodes
      .map((_, i) => i)
      .sort((a, b) => (graph.nodes[b].influence ?? Infinity) - (graph.nodes[a].influence ?? Infinity));
    const used = new Set(ranks.slice(0, Math.max(1, Math.round(graph.nodes.length * (1 - prune)))));
    const least = Math.min(...[...used].map(i => graph.nodes[i].influence ?? Infinity));
    return {
      kept: edges.filter(i => used.has(graph.edges[i].source) && used.has(graph.edges[i].target)),
      used,
      least,
    };
  }
  const kept = edges
    .sort((a, b) => sizeOf(graph.edges[b]) - sizeOf(graph.edges[a]))
    .slice(0, Math.max(1, Math.round(edges.length * (1 - prune))));
  const used =
    prune === 0
      ? new Set(graph.nodes.keys())
      : new Set(kept.flatMap(i => [graph.edges[i].source, graph.edges[i].target]));
  return { kept, used, least: kept.length ? sizeOf(graph.edges[kept.at(-1)]) : 0 };
}

export async function show(app, route, signal) {
  const { circuits } = app.meta,
    which = Number(route.args[0] ?? 0);
  if (!circuits.length)
    return {
      title: "Circuit",
      element: h(
        "div",
        { class: "empty" },
        h("h1", {}, "No circuit"),
        h("p", {}, "This page was made without circuits. Give them to it:"),
        h("pre", { class: "code" }, "sae.dashboard(model=model, circuits=[circuit])"),
      ),
    };
  if (!circuits[which])
    throw new Error(`There is no circuit ${route.args[0]}; there are ${circuits.length}.`);
  const graph = await app.source.circuit(which);
  const byInfluence = graph.nodes.some(node => node.influence !== null && node.influence !== undefined);
  const asked = Number(route.query.get("prune")),
    node = route.query.get("node");
  const state = {
    by: byInfluence && route.query.get("by") === "influence" ? "influence" : "weight",
    prune: asked > 0 && asked <= 1 ? asked : 0,
    chosen: node !== null && graph.nodes[Number(node)] ? Number(node) : null,
  };
  const said = h("output", {}),
    panel = h("aside", { class: "panel", "aria-label": "The chosen node", "aria-live": "polite" });
  const open = i => {
    if (graph.nodes[i].feature !== null && graph.nodes[i].feature !== undefined)
      go(featureLink(graph.nodes[i].feature));
  };
  const words = node =>
    node.feature === null || node.feature === undefined || node.label ? "" : app.words(node.feature);
  const drawing = drawGraph(graph, {
    words,
    onChoose: i => {
      state.chosen = state.chosen === i ? null : i;
      refresh();
    },
    onOpen: open,
  });
  const slide = h("input", {
    type: "range",
    min: 0,
    max: 1,
    step: 0.005,
    value: state.prune,
    "aria-label": "Prune",
    oninput: () => {
      state.prune = Number(slide.value);
      refresh();
    },
  });

  function refresh() {
    const { kept, used, least } = left(graph, state.by, state.prune);
    drawing.refresh(kept, used, state.chosen);
    const text = `${kept.length} of ${graph.edges.length} edges, ${used.size} of ${graph.nodes.length} nodes${state.prune ? `; ${state.by === "weight" ? "|weight|" : "influence"} ≥ ${number(least)}` : ""}`;
    said.textContent = text;
    slide.setAttribute("aria-valuetext", text);
    panel.replaceChildren(
      ...(state.chosen === null
        ? strongest(graph, kept, drawing, choose)
        : about(app, graph, kept, state.chosen, drawing, choose, signal)),
    );
    remember("circuit", [which], {
      prune: state.prune || "",
      by: state.by === "weight" ? "" : state.by,
      node: state.chosen ?? "",
    });
  }
  function choose(i) {
    state.chosen = i;
    refresh();
    if (i !== null) drawing.focus(i);
  }
  const scroll = h(
    "div",
    { class: "graph", tabindex: -1, "aria-label": "The graph" },
    h("div", { class: "room" }, drawing.element),
  );
  const zooming = zoom(scroll, drawing.element, graph.size);
  const key = (kind, text) =>
    h(
      "span",
      { class: `key-line ${kind}` },
      svg(
        "svg",
        { viewBox: "0 0 32 8", "aria-hidden": "true" },
        svg("path", { class: "curve", d: "M0 4H32", "stroke-width": 3 }),
      ),
      text,
    );
  const element = h(
    "div",
    {
      onkeydown: event => {
        if (event.key === "Escape" && state.chosen !== null) choose(null);
      },
    },
    h(
      "div",
      { class: "heading" },
      h(
        "div",
        { class: "heading-line" },
        h("h1", {}, bdi(graph.title || graph.name)),
        circuits.length > 1 &&
          select(
            "circuit",
            circuits.map((circuit, i) => [i, circuit.name]),
            which,
            i => go(link("circuit", [i])),
          ),
      ),
      h(
        "ul",
        { class: "facts" },
        (graph.facts ?? []).map(([title, text]) => h("li", {}, bdi(title), h("span", {}, " ", bdi(text)))),
      ),
    ),
    h(
      "section",
      { class: "card form" },
      h(
        "div",
        { class: "filters" },
        h("label", { class: "field" }, h("span", {}, "prune"), slide),
        byInfluence &&
          segments(
            "Prune by",
            [
              ["weight", "Edges by weight"],
              ["influence", "Nodes by influence"],
            ],
            state.by,
            by => {
              state.by = by;
              refresh();
            },
          ),
        said,
        h("span", { class: "spring" }),
        key("raises", "raises its target"),
        key("lowers", "lowers it"),
        zooming.element,
      ),
    ),
    h("div", { class: "circuit-columns" }, scroll, panel),
  );
  return {
    title: graph.title || graph.name,
    element,
    shown: () => {
      zooming.start();
      refresh();
      say(said.textContent);
    },
  };
}

function zoom(scroll, stage, [width, height]) {
  let now = 1;
  const set = to => {
    now = Math.min(3, Math.max(0.1, to));
    stage.style.transform = `scale(${now})`;
    Object.assign(stage.parentElement.style, { width: `${width * now}px`, height: `${height * now}px` });
  };
  const fitting = () => Math.min((scroll.clientWidth - 8) / width, (scroll.clientHeight - 8) / height);
  return {
    element: h(
      "span",
      { class: "segments", role: "group", "aria-label": "Zoom" },
      button("−", () => set(now / 1.25), { "aria-label": "Smaller" }),
      button("Fit", () => set(Math.min(3, fitting()))),
      button("+", () => set(now * 1.25), { "aria-label": "Larger" }),
    ),
    // As wide as there is room for, while it can be read.
    start: () => set(Math.min(1, Math.max(0.72, (scroll.clientWidth - 8) / width))),
  };
}
