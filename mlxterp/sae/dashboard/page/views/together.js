// Which of some features fire on the same tokens.

import { bdi, button, h, segments } from "../dom.js";
import { clustered } from "../clusters.js";
import { fixed, number, percent, short, whole } from "../format.js";
import { ranked } from "../app.js";
import { heatmap } from "../parts/heatmap.js";
import { chip, featureName, picker } from "../parts/picker.js";
import { go, featureLink, ids, remember } from "../router.js";

export const name = "Together";

const MEASURES = [
  ["jaccard", "Jaccard"],
  ["conditional", "Conditional"],
  ["lift", "Against chance"],
];
const EXPLAINED = {
  jaccard: "Both fire, as a share of the tokens on which either does.",
  conditional: "Of the tokens on which the row's feature fires, the share on which the column's does too.",
  lift: "How often both fire, against what independent features would: log₂ of the ratio, so +1 is twice as often and −1 half as often.",
};

/** The measures of features `i` and `j`; null for what is not known. */
export function measure({ counts, n_tokens: n }, kind, i, j) {
  const [a, b, both] = [counts[i][i], counts[j][j], counts[i][j]];
  if (both === null || both === undefined) return null;
  if (kind === "jaccard") return a + b - both > 0 ? both / (a + b - both) : 0;
  if (kind === "conditional") return a > 0 ? both / a : 0;
  return a > 0 && b > 0 ? Math.log2(Math.max(both, 0.5) / ((a * b) / n)) : 0;
}

/** Features to start with: a frequent one and those that fire with it. */
async function suggested(app) {
  const { firing_rates: rates } = app.columns;
  const first = ranked(rates, app.n).find(id => app.included(id) && rates[id] > 0 && rates[id] < 0.1);
  if (first === undefined) return [];
  const feature = await app.source.feature(first);
  return [first, ...feature.co_active.map(other => other.id)].slice(0, 12);
}

export async function show(app, route, signal) {
  const most = app.meta.live.limits?.together ?? 64,
    { query } = route;
  const state = {
    chosen: ids(query.get("f"), app.n).slice(0, most),
    kind: MEASURES.some(([kind]) => kind === query.get("by")) ? query.get("by") : "jaccard",
    order: query.get("order") === "id" ? "id" : "clusters",
  };
  if (!state.chosen.length && query.get("f") === null) state.chosen = await suggested(app);
  const chips = h("div", { class: "chips" }),
    result = h("div", { class: "result" });
  let found = null,
    latest = 0;

  const keep = () =>
    remember("together", [], {
      f: state.chosen.join(",") || "none",
      by: state.kind === "jaccard" ? "" : state.kind,
      order: state.order === "id" ? "id" : "",
    });
  function change(chosen) {
    state.chosen = [...new Set(chosen)].slice(0, most);
    load();
  }
  async function load() {
    keep();
    chips.replaceChildren(
      ...state.chosen.map(id => chip(app, id, () => change(state.chosen.filter(other => other !== id)))),
    );
    const turn = ++latest;
    try {
      found = state.chosen.length ? await app.source.together(state.chosen) : null;
      if (turn === latest && !signal.aborted) draw();
    } catch (error) {
      if (turn === latest)
        result.replaceChildren(h("p", { class: "problem", role: "alert" }, bdi(error.message)));
    }
  }
  function draw() {
    keep();
    result.replaceChildren(
      ...(found
        ? [matrix(app, found, state, signal)]
        : [h("p", { class: "hint" }, "Choose features: by number, label or token.")]),
    );
  }
  async function addPartners() {
    const features = await Promise.all(
      state.chosen.slice(0, 8).map(id => app.source.feature(id).catch(() => null)),
    );
    change([
      ...state.chosen,
      ...features.flatMap(feature => feature?.co_active.slice(0, 3).map(other => other.id) ?? []),
    ]);
  }
  const element = h(
    "div",
    {},
    h("div", { class: "heading" }, h("h1", {}, "What fires together")),
    h(
      "section",
      { class: "card form" },
      h(
        "div",
        { class: "filters" },
        picker(app, {
          name: "Add a feature",
          placeholder: "Add: number, label or token",
          isSearch: true,
          onPick: id => change([...state.chosen, id]),
        }),
        button("Add what fires with them", addPartners),
        button("Clear", () => change([]), { class: "quiet" }),
        segments("Measure", MEASURES, state.kind, kind => {
          state.kind = kind;
          if (found) draw();
        }),
        segments(
          "Order",
          [
            ["clusters", "Clusters"],
            ["id", "By number"],
          ],
          state.order,
          order => {
            state.order = order;
            if (found) draw();
          },
        ),
      ),
      chips,
    ),
    result,
  );
  return { title: "Together", element, shown: load };
}

function matrix(app, found, state, signal) {
  const { features } = found,
    n = features.length;
  const alike = features.map((_, i) => features.map((_, j) => measure(found, "jaccard", i, j)));
  const order =
    state.order === "id"
      ? features.map((_, i) => i).sort((a, b) => features[a] - features[b])
      : clustered(alike);
  const at = (i, j) => measure(found, state.kind, order[i], order[j]);
  const text = (i, j) => {
    if (i === j) return "";
    const value = at(i, j);
    return value === null ? "" : state.kind === "lift" && value > 0 ? `+${short(value)}` : short(value);
  };
  const sizes = features.flatMap((_, i) => features.map((_, j) => (i === j ? 0 : Math.abs(at(i, j) ?? 0))));
  const most =
    state.kind === "lift"
      ? Math.max(1, Math.ceil(Math.max(...sizes)))
      : Math.max(0.1, Math.ceil(20 * Math.max(...sizes)) / 20);
  const share = (i, j) => (i === j ? 0 : at(i, j) === null ? null : at(i, j) / most);
  const lines = (i, j) => {
    const [a, b] = [order[i], order[j]],
      both = found.counts[a][b];
    if (i === j) return [`#${features[a]} ${app.words(features[a])}`, ["fires on", `${whole(both)} tokens`]];
    const said = [`#${features[a]} ${app.words(features[a])}`, `#${features[b]} ${app.words(features[b])}`];
    if (both === null) return [...said, "Not among the pairs that this page knows."];
    return [
      ...said,
      ["both", `${whole(both)} tokens`],
      ["expected by chance", number((found.counts[a][a] * found.counts[b][b]) / found.n_tokens)],
      ["Jaccard", number(measure(found, "jaccard", a, b))],
      ["if the row fires", percent(measure(found, "conditional", a, b))],
    ];
  };
  const size = n <= 14 ? 46 : n <= 24 ? 34 : n <= 40 ? 22 : 16;
  const cells = h(
    "section",
    { class: "card wide" },
    h(
      "p",
      { class: "note" },
      EXPLAINED[state.kind],
      ` Over ${whole(found.n_tokens)} tokens.`,
      !found.exact && " Struck-out cells are pairs that are not listed in this file.",
    ),
    heatmap({
      rows: order.map(i => featureName(app, features[i])),
      columns: order.map(i => `#${features[i]}`),
      name: `${state.kind} of features`,
      signal,
      cell: [size, Math.min(size, 34)],
      share,
      text,
      lines,
      onChoose: (i, j) => go(featureLink(features[order[j]])),
      ends: state.kind === "lift" ? [`−${most}`, `+${most}`] : ["0", number(most, 2)],
    }),
  );
  return h(
    "div",
    { class: n <= 16 ? "columns" : "result" },
    cells,
    h("aside", {}, pairs(app, found, state.kind)),
  );
}

/** The pairs with the largest measure, in words. */
function pairs(app, found, kind) {
  const { features } = found,
    all = [];
  features.forEach((a, i) =>
    features.forEach((b, j) => {
      const value = i === j || (kind !== "conditional" && j > i) ? null : measure(found, kind, i, j);
      if (value !== null) all.push([value, a, b, found.counts[i][j]]);
    }),
  );
  all.sort((x, y) => y[0] - x[0]);
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Strongest pairs"),
    all.length
      ? h(
          "ul",
          { class: "pairs" },
          all
            .slice(0, 8)
            .map(([value, a, b, both]) =>
              h(
                "li",
                {},
                h(
                  "b",
                  { title: `on ${whole(both)} tokens` },
                  kind === "lift" && value > 0 ? `+${short(value)}` : fixed(value),
                ),
                h("div", {}, featureName(app, a), featureName(app, b)),
              ),
            ),
        )
      : h("p", { class: "none" }, "No pair is known."),
  );
}
