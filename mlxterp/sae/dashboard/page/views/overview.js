// The coder as a whole: numbers, curves, the map and the table of all features.

import { bdi, button, h, select } from "../dom.js";
import { percent, tick, whole } from "../format.js";
import { histogram, lineChart } from "../parts/charts.js";
import { featureMap } from "../parts/map.js";
import { virtualTable } from "../parts/table.js";
import { featureLink, go, remember } from "../router.js";
import { SHOWN, kept, sorted } from "../rows.js";
import { featureColumns } from "../parts/columns.js";
import { facts, numbers } from "./summary.js";

export const name = "Overview";

/** The charts about training and densities. */
function charts(app, signal, density) {
  const { training, validation } = app.meta;
  const of = (reports, key) =>
    reports
      .filter(r => r.tokens !== undefined && r[key] !== undefined && r[key] !== null)
      .map(r => [r.tokens, r[key]]);
  const curves = (key, title, format, axis) => {
    const series = [
      { name: "training", kind: "first", points: of(training, key) },
      { name: "held out", kind: "second", points: of(validation, key) },
    ].filter(line => line.points.length > 1);
    return series.length ? lineChart(series, { signal, name: title, format, axis, low: 0 }) : null;
  };
  const found = [
    curves("fvu", "Variance unexplained (FVU)") ?? curves("loss", "Loss"),
    curves(
      "dead",
      "Dead features in training",
      x => percent(x, 2),
      x => `${tick(100 * x)} %`,
    ) ?? curves("l0", "Features on a token (L0)"),
    density,
  ].filter(Boolean);
  return h("section", { class: "charts", "aria-label": "Curves" }, found);
}

/** Bins of log10 firing rates, eight to a decade. */
function densities(app) {
  const rates = app.columns.firing_rates;
  let lowest = 0;
  for (const rate of rates) if (rate > 0) lowest = Math.min(lowest, Math.log10(rate));
  const first = Math.floor(lowest),
    n = Math.max(1, -first) * 8,
    counts = new Array(n).fill(0);
  for (const rate of rates)
    if (rate > 0) counts[Math.min(n - 1, Math.max(0, Math.floor((Math.log10(rate) - first) * 8 + 1e-9)))]++;
  const edges = Array.from({ length: n + 1 }, (_, i) => 10 ** (first + i / 8));
  return { counts, edges, marks: edges.flatMap((_, i) => (i % 8 ? [] : [i])) };
}

const numberOf = text =>
  text !== null && text !== "" && Number.isFinite(Number(text)) ? Number(text) : null;

/** What the address says of filters and order. */
function asked(query) {
  const bin = query.get("bin");
  return {
    text: query.get("q") ?? "",
    show: query.get("show") ?? "all",
    low: numberOf(query.get("from")),
    high: numberOf(query.get("to")),
    bin: bin !== null && /^\d+$/.test(bin) ? Number(bin) : null,
    key: query.get("sort") ?? "id",
    descending: query.get("way") === "down",
  };
}

export async function show(app, route, signal) {
  const state = asked(route.query),
    spread = densities(app);
  const count = h("span", { class: "count", role: "status" });
  const density = histogram(spread.counts, spread.edges, {
    signal,
    name: "How often features fire",
    asX: x => `${tick(100 * x)} %`,
    marks: spread.marks,
    chosen: state.bin,
    describe: i => [
      `${whole(spread.counts[i])} features`,
      ["fire on", `${percent(spread.edges[i], 2)} to ${percent(spread.edges[i + 1], 2)}`],
      "click to list them",
    ],
    onChoose: i => {
      state.bin = state.bin === i ? null : i;
      apply();
    },
  });
  const table = virtualTable({
    columns: featureColumns(app),
    name: "Features",
    signal,
    height: 596,
    onSort: (key, descending) => {
      Object.assign(state, { key, descending });
      apply();
    },
    onOpen: id => go(featureLink(id)),
    onPoint: id => map?.point(id),
  });
  const map =
    app.meta.map && app.columns.map
      ? featureMap(app, { signal, height: 470, onOpen: id => go(featureLink(id)) })
      : null;
  const bin = button(
    "",
    () => {
      state.bin = null;
      apply();
    },
    { class: "chip-button", hidden: true },
  );

  function apply(isFirst = false) {
    const rates =
      state.bin === null || state.bin >= spread.counts.length
        ? null
        : [spread.edges[state.bin] * (1 - 1e-6), spread.edges[state.bin + 1] * (1 - 1e-6)];
    const ids = sorted(app, kept(app, { ...state, rates }), state.key, state.descending);
    table.show(ids, state);
    map?.show(ids);
    density.press(state.bin);
    bin.hidden = !rates;
    bin.replaceChildren(rates ? `fires on ${percent(rates[0], 2)} – ${percent(rates[1], 2)} ×` : "");
    count.textContent =
      ids.length === app.n ? `${whole(app.n)} features` : `${whole(ids.length)} of ${whole(app.n)} features`;
    app.goThrough(ids, ids.length === app.n ? "all features" : "the features found");
    if (!isFirst)
      remember("overview", [], {
        q: state.text,
        show: state.show === "all" ? "" : state.show,
        from: state.low,
        to: state.high,
        bin: state.bin,
        sort: state.key === "id" ? "" : state.key,
        way: state.descending ? "down" : "",
      });
  }

  const bound = (key, label) =>
    h("input", {
      type: "number",
      step: "any",
      min: 0,
      class: "short",
      "aria-label": label,
      placeholder: key === "low" ? "from" : "to",
      value: state[key] ?? "",
      oninput: event => {
        state[key] = numberOf(event.target.value);
        apply();
      },
    });
  const search = h("input", {
    type: "search",
    "data-search": true,
    placeholder: "Label, token or number",
    "aria-label": "Search features",
    value: state.text,
    spellcheck: "false",
    oninput: event => {
      state.text = event.target.value;
      apply();
    },
    onkeydown: event => {
      if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        table.focus();
      }
    },
  });
  const filters = h(
    "div",
    { class: "filters", role: "search" },
    search,
    select("show", SHOWN, state.show, value => {
      state.show = value;
      apply();
    }),
    h(
      "div",
      { class: "field", role: "group", "aria-label": "Largest value" },
      h("span", {}, "largest value"),
      bound("low", "Largest value from"),
      bound("high", "Largest value to"),
    ),
    bin,
    count,
  );
  const place =
    map &&
    h(
      "figure",
      { class: "map-box" },
      h("figcaption", {}, h("span", {}, "Map of the features")),
      map.element,
      h("p", { class: "note" }, app.meta.map.caption, explained(app.meta.map)),
    );
  apply(true);
  return {
    title: "Overview",
    element: h(
      "div",
      {},
      h("div", { class: "heading" }, h("h1", {}, bdi(app.meta.title)), facts(app)),
      numbers(app),
      charts(app, signal, density),
      h(
        "section",
        { class: "all", "aria-label": "All features" },
        filters,
        h("div", { class: map ? "pair" : "" }, place, table.element),
      ),
    ),
    shown: () => table.show(sorted(app, app.order, state.key, state.descending), state),
  };
}

const explained = ({ explained: shares }) =>
  shares ? ` The two directions hold ${percent(shares[0] + shares[1], 2)} of the variance.` : "";
