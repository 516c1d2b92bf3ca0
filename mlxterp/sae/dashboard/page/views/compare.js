// Two coders: how far they found the same features, and which.

import { App } from "../app.js";
import { bdi, h, segments, select } from "../dom.js";
import { fixed, number, percent, tick, whole } from "../format.js";
import { card } from "../parts/card.js";
import { histogram } from "../parts/charts.js";
import { idCell } from "../parts/columns.js";
import { featureWords } from "../parts/picker.js";
import { virtualTable } from "../parts/table.js";
import { go, link, remember } from "../router.js";
import { kept, sorted } from "../rows.js";

export const name = "Compare";

const SCORES = {
  mmcs: ["Mean largest cosine", "of each feature here with the most similar one there"],
  mmcs_back: ["The same, back", "of each feature there with the most similar one here"],
  mcc: ["Mean cosine of pairs", "one to one"],
  shared: ["Shared", "pairs above the threshold"],
};
const BINS = 50;

function scores(comparison) {
  const { scores: found, chance } = comparison;
  return h(
    "dl",
    { class: "tiles" },
    Object.entries(SCORES)
      .filter(([key]) => found[key] !== undefined && found[key] !== null)
      .map(([key, [title, explained]]) => {
        const show = key === "shared" ? percent : number;
        return h(
          "div",
          { class: "tile" },
          h("dt", {}, title),
          h("dd", {}, h("b", {}, show(found[key])), h("span", {}, explained)),
          chance?.[key] !== undefined &&
            chance[key] !== null &&
            h("dd", { class: "chance" }, "by chance ", h("b", {}, show(chance[key]))),
        );
      }),
  );
}

function cosines(comparison, signal) {
  const {
    columns: { cosines: values },
    threshold,
  } = comparison;
  let low = 0;
  for (const value of values) if (value < 0) low = -1;
  const counts = new Array(BINS).fill(0),
    edges = Array.from({ length: BINS + 1 }, (_, i) => low + ((1 - low) * i) / BINS);
  for (const value of values)
    if (value === value)
      counts[Math.max(0, Math.min(BINS - 1, Math.floor(((value - low) / (1 - low)) * BINS)))]++;
  return histogram(counts, edges, {
    signal,
    name: `Cosines of the pairs, shared from ${tick(threshold)}`,
    rule: ((threshold - low) / (1 - low)) * BINS,
    asX: tick,
    marks: [0, 10, 20, 30, 40, 50],
    describe: i => [
      `${whole(counts[i])} pairs`,
      ["cosine", `${number(edges[i])} to ${number(edges[i + 1])}`],
    ],
  });
}

export async function show(app, route, signal) {
  const list = app.meta.compare,
    which = Number(route.args[0] ?? 0);
  if (!list.length)
    return {
      title: "Compare",
      element: h(
        "div",
        { class: "empty" },
        h("h1", {}, "Nothing to compare with"),
        h("p", {}, "This page was made without a second coder. Give it one:"),
        h("pre", { class: "code" }, 'sae.dashboard(model=model, compare={"another seed": other})'),
      ),
    };
  if (!list[which]) throw new Error(`There is no comparison ${route.args[0]}; there are ${list.length}.`);
  const [comparison, source] = await Promise.all([app.source.comparison(which), app.source.other(which)]);
  const other = await App.of(source),
    { partners, cosines: values, best, shared } = comparison.columns;
  const both = {
    ...app,
    columns: { ...app.columns, cosines: values, best },
    label: id => app.label(id),
    isDead: id => app.isDead(id),
  };
  const asked = route.query.get("f"),
    state = {
      text: route.query.get("q") ?? "",
      show: route.query.get("show") ?? "all",
      key: "cosines",
      descending: true,
      chosen: asked !== null && /^\d+$/.test(asked) && Number(asked) < app.n ? Number(asked) : null,
    };
  const cards = h("div", { class: "two" }),
    count = h("span", { class: "count", role: "status" });
  const words = (of, id) => (id < 0 ? h("span", { class: "none" }, "none") : featureWords(of, id));
  const table = virtualTable({
    name: "Matched features",
    signal,
    height: 480,
    columns: [
      { key: "id", title: "# here", width: "5rem", number: true, draw: id => idCell(app, id) },
      { title: "here", width: "minmax(8rem, 1fr)", draw: id => words(app, id) },
      {
        key: "cosines",
        title: "cosine",
        width: "5.4rem",
        number: true,
        descending: true,
        draw: id => fixed(values[id]),
        hint: "Cosine of the pair",
      },
      {
        title: "# there",
        width: "5rem",
        number: true,
        draw: id => (partners[id] < 0 ? "–" : String(partners[id])),
      },
      { title: "there", width: "minmax(8rem, 1fr)", draw: id => words(other, partners[id]) },
      {
        key: "best",
        title: "best",
        width: "5rem",
        number: true,
        descending: true,
        draw: id => fixed(best[id]),
        hint: "Largest cosine with any feature there",
      },
      {
        key: "firing_rates",
        title: "fires",
        width: "6rem",
        number: true,
        descending: true,
        draw: id => percent(app.columns.firing_rates[id], 2),
      },
    ],
    onSort: (key, descending) => {
      Object.assign(state, { key, descending });
      apply();
    },
    onOpen: id => choose(id),
  });
  function apply() {
    const ids = kept(app, { text: state.text }).filter(
      id => state.show === "all" || Boolean(shared[id]) === (state.show === "shared"),
    );
    table.show(sorted(both, ids, state.key, state.descending), state);
    count.textContent = `${whole(ids.length)} of ${whole(app.n)} features`;
    keep();
  }
  const keep = () =>
    remember("compare", [which], {
      q: state.text,
      show: state.show === "all" ? "" : state.show,
      f: state.chosen ?? "",
    });
  async function choose(id) {
    state.chosen = id;
    keep();
    table.choose(id);
    const pair = await Promise.all([
      card(app, id, "Here", true),
      card(other, partners[id] < 0 ? null : partners[id], "There", false),
    ]);
    if (state.chosen === id && !signal.aborted) cards.replaceChildren(...pair);
  }
  const search = h("input", {
    type: "search",
    "data-search": true,
    "aria-label": "Search features",
    placeholder: "Label, token or number",
    value: state.text,
    oninput: () => {
      state.text = search.value;
      apply();
    },
  });
  const element = h(
    "div",
    {},
    h(
      "div",
      { class: "heading" },
      h(
        "div",
        { class: "heading-line" },
        h("h1", {}, bdi(app.meta.title), " beside ", bdi(comparison.name)),
        list.length > 1 &&
          select(
            "with",
            list.map((found, i) => [i, found.name]),
            which,
            i => go(link("compare", [i])),
          ),
      ),
      h(
        "ul",
        { class: "facts" },
        h("li", {}, bdi(comparison.title), h("span", {}, ` ${whole(comparison.n_features)} features`)),
        h("li", {}, `matched by ${comparison.by}`, h("span", {}, `, ${comparison.method}`)),
      ),
    ),
    scores(comparison),
    h("section", { class: "charts one" }, cosines(comparison, signal)),
    h(
      "section",
      { class: "all" },
      h(
        "div",
        { class: "filters" },
        search,
        segments(
          "Show",
          [
            ["all", "All"],
            ["shared", "Shared"],
            ["only", "Only here"],
          ],
          state.show,
          value => {
            state.show = value;
            apply();
          },
        ),
        count,
      ),
      table.element,
    ),
    cards,
  );
  return {
    title: `Compared with ${comparison.name}`,
    element,
    shown: () => {
      apply();
      choose(state.chosen ?? sorted(both, kept(app, {}), "cosines", true)[0] ?? 0);
    },
  };
}
