// What is told of a circuit's nodes and edges beside its drawing.

import { bdi, h } from "../dom.js";
import { fixed, percent, signed } from "../format.js";
import { featureLink } from "../router.js";
import { bars } from "./charts.js";
import { featureWords } from "./picker.js";
import { tokenStrip } from "./tokens.js";

const sizeOf = edge => Math.abs(edge.weight);

function entries(title, graph, edges, drawing, choose, draw) {
  return [
    h("h3", { class: "minor" }, title, h("span", {}, String(edges.length))),
    edges.length
      ? h(
          "ul",
          { class: "edges" },
          edges.map(i => {
            const edge = graph.edges[i],
              light = on => () => drawing.point(i, on);
            const { names, to } = draw(edge);
            return h(
              "li",
              {},
              h(
                "button",
                {
                  type: "button",
                  onclick: () => choose(to),
                  onpointerenter: light(true),
                  onfocus: light(true),
                  onpointerleave: light(false),
                  onblur: light(false),
                },
                h("b", { class: edge.weight < 0 ? "lowers" : "raises" }, signed(edge.weight)),
                h("span", {}, names),
              ),
            );
          }),
        )
      : h("p", { class: "none" }, "none that is shown"),
  ];
}

const bySize = (graph, edges) => [...edges].sort((a, b) => sizeOf(graph.edges[b]) - sizeOf(graph.edges[a]));

/** What is told where no node is chosen. */
export function strongest(graph, kept, drawing, choose) {
  return [
    h(
      "p",
      { class: "note" },
      "Choose a node to see what it comes from and leads to. Arrow keys go along edges, Enter chooses, and Enter again opens the feature.",
    ),
    ...entries("Strongest edges", graph, bySize(graph, kept).slice(0, 16), drawing, choose, edge => ({
      names: [bdi(graph.nodes[edge.source].name), " → ", bdi(graph.nodes[edge.target].name)],
      to: edge.target,
    })),
  ];
}

/** A node: its numbers, its feature, and its edges. */
export function about(app, graph, kept, i, drawing, choose, signal) {
  const node = graph.nodes[i],
    of = (end, other) =>
      entries(
        end === "target" ? "Comes from" : "Leads to",
        graph,
        bySize(
          graph,
          kept.filter(at => graph.edges[at][end] === i),
        ),
        drawing,
        choose,
        edge => ({ names: bdi(graph.nodes[edge[other]].name), to: edge[other] }),
      );
  const inside = h("div", { class: "about" });
  if (node.feature !== null && node.feature !== undefined) fill(app, node.feature, inside, signal);
  return [
    h("h2", {}, bdi(node.name)),
    node.label && h("p", {}, bdi(node.label)),
    h(
      "dl",
      { class: "numbers" },
      node.numbers.map(([title, value]) => h("div", {}, h("dt", {}, bdi(title)), h("dd", {}, bdi(value)))),
    ),
    inside,
    ...of("target", "source"),
    ...of("source", "target"),
  ].filter(Boolean);
}

/** A few words about a feature of this coder. */
async function fill(app, id, box, signal) {
  try {
    const feature = await app.source.feature(id);
    if (signal.aborted) return;
    const strips = feature.examples.slice(0, 3).map(e =>
      tokenStrip(e.tokens.slice(Math.max(0, e.peak - 6), e.peak + 5), {
        values: e.values.slice(Math.max(0, e.peak - 6), e.peak + 5),
        peak: Math.min(6, e.peak),
        largest: feature.maximum,
        name: `Example with the value ${fixed(e.values[e.peak])}`,
      }),
    );
    const side = feature.sides[0]?.top.slice(0, 5) ?? [];
    box.replaceChildren(
      h("p", {}, h("a", { class: "button", href: featureLink(id) }, `Open feature ${id}`)),
      h("p", { class: "note" }, featureWords(app, id), ` fires on ${percent(feature.firing_rate, 2)}`),
      ...strips,
      side.length ? bars(side, { name: "more likely", format: x => signed(x) }) : "",
    );
  } catch (error) {
    box.replaceChildren(h("p", { class: "none" }, error.message));
  }
}
