// One feature: what it fires on, what it does, and what is like it.

import { bdi, button, h, say } from "../dom.js";
import { fixed, number, percent, signed, whole } from "../format.js";
import { bars, histogram } from "../parts/charts.js";
import { exampleList } from "../parts/examples.js";
import { labelEditor } from "../parts/label.js";
import { featureName } from "../parts/picker.js";
import { featureLink, go, link, remember } from "../router.js";

export const name = "Feature";

function logits(app, feature) {
  return app.meta.sides.map((side, i) => {
    const { top, bottom } = feature.sides[i] ?? { top: [], bottom: [] };
    if (!top.length && !bottom.length) return null;
    const largest = Math.max(...[...top, ...bottom].map(([, value]) => Math.abs(value)), 1e-9);
    const half = (title, rows) =>
      h("div", {}, h("h4", {}, title), bars(rows, { name: title, format: x => signed(x), largest }));
    return h(
      "section",
      { class: "card side" },
      h("h3", {}, bdi(side.title)),
      h(
        "div",
        { class: "halves" },
        half(side.direction === "reads" ? "reads most" : "more likely", top),
        half(side.direction === "reads" ? "reads least" : "less likely", bottom),
      ),
    );
  });
}

/** Other features, each with a number: `[id, text, hint]`. */
function neighbours(app, title, hint, rows) {
  return (
    rows.length > 0 &&
    h(
      "section",
      { class: "card near" },
      h("h3", { title: hint }, title),
      h(
        "ul",
        {},
        rows.map(([id, text, more]) =>
          h("li", {}, featureName(app, id), h("span", { class: "value", title: more }, text)),
        ),
      ),
    )
  );
}

function values(app, feature, signal) {
  const edges = app.meta.bin_edges,
    counts = feature.histogram;
  let first = counts.findIndex(n => n > 0),
    last = counts.findLastIndex(n => n > 0);
  [first, last] = [Math.max(0, first - 1), Math.min(counts.length - 1, last + 1)];
  const shown = counts.slice(first, last + 1),
    of = edges.slice(first, last + 2);
  const step = Math.max(1, Math.ceil(shown.length / 6));
  const figure = histogram(shown, of, {
    signal,
    name: "Its values",
    height: 128,
    asX: x => number(x, 2),
    marks: of.flatMap((_, i) => (i % step ? [] : [i])),
    describe: i => [`${whole(shown[i])} tokens`, ["values", `${number(of[i])} to ${number(of[i + 1])}`]],
  });
  const place = value => {
    const size = Math.abs(value),
      i = of.findIndex((edge, at) => size >= edge && size < of[at + 1]);
    if (i < 0) return size >= of.at(-1) ? shown.length : 0;
    return i + (of[i] > 0 ? Math.log(size / of[i]) / Math.log(of[i + 1] / of[i]) : 0.5);
  };
  return { figure, point: value => figure.mark(value === null || value === 0 ? null : place(value)) };
}

function python(app, id) {
  const code = [app.meta.code?.load, `sae.visualize_feature(${id})`].filter(Boolean).join("\n");
  const copy = button(
    "Copy as Python",
    async () => {
      try {
        await navigator.clipboard.writeText(code);
        copy.textContent = "Copied";
        say("Copied");
      } catch {
        shown.hidden = false;
        getSelection().selectAllChildren(shown);
      }
      setTimeout(() => {
        copy.textContent = "Copy as Python";
      }, 1500);
    },
    { title: code },
  );
  const shown = h("pre", { class: "code", hidden: true, tabindex: 0 }, code);
  return [copy, shown];
}

function walk(app, id) {
  const at = app.order.indexOf(id),
    to = (by, text, label) => {
      const next = app.beside(id, by);
      return h(
        "a",
        {
          class: "button",
          "aria-label": label,
          href: next === null ? null : featureLink(next),
          "aria-disabled": next === null ? "true" : null,
          role: "link",
        },
        text,
      );
    };
  return h(
    "div",
    { class: "walk", role: "group", "aria-label": "Other features" },
    to(-1, "←", "Previous feature"),
    to(1, "→", "Next feature"),
    button(
      "Random",
      () => {
        const other = app.random();
        if (other !== null) go(featureLink(other));
      },
      { title: "r" },
    ),
    at >= 0 &&
      h(
        "span",
        { class: "soft" },
        `${whole(at + 1)} of ${whole(app.order.length)}${app.described === "all features" ? "" : ` ${app.described}`}`,
      ),
  );
}

function top(app, feature) {
  const { id } = feature,
    live = app.meta.live;
  return h(
    "div",
    { class: "heading" },
    h("div", { class: "heading-line" }, h("h1", {}, `Feature ${id}`), walk(app, id)),
    h(
      "div",
      { class: "label-line" },
      labelEditor(app, id),
      h(
        "div",
        { class: "actions" },
        live.steer && h("a", { class: "button", href: link("steer", [], { f: `${id}:1` }) }, "Steer with it"),
        feature.co_active.length > 0 &&
          h(
            "a",
            {
              class: "button",
              href: link("together", [], {
                f: [id, ...feature.co_active.slice(0, 9).map(other => other.id)].join(","),
              }),
            },
            "What fires together",
          ),
        python(app, id),
      ),
    ),
  );
}

function numbersOf(feature) {
  const rows = [
    ["fires on", percent(feature.firing_rate)],
    ["tokens", whole(feature.firing_count)],
    ["mean", number(feature.mean)],
    ["largest", number(feature.maximum)],
  ];
  return h(
    "dl",
    { class: "numbers" },
    rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

export async function show(app, route, signal) {
  const id = route.args[0] ? Number(route.args[0]) : (app.seen ?? app.beside(-1, 1));
  if (!Number.isInteger(id) || id < 0 || id >= app.n)
    throw new Error(
      `There is no feature ${route.args[0] ?? ""}; they are numbered from 0 to ${whole(app.n - 1)}.`,
    );
  const feature = await app.source.feature(id);
  const shown = () => {
    app.seen = id;
    remember("feature", [id]);
  };
  if (feature.firing_count === 0)
    return {
      title: `Feature ${id}`,
      shown,
      element: h(
        "div",
        {},
        top(app, feature),
        h(
          "div",
          { class: "columns" },
          h(
            "div",
            {},
            h(
              "p",
              { class: "empty" },
              `It does not fire on any of the ${whole(app.meta.data.n_tokens)} tokens.`,
            ),
          ),
          side(app, feature, []),
        ),
      ),
    };
  const found = values(app, feature, signal);
  return {
    title: `Feature ${id}`,
    shown,
    element: h(
      "div",
      {},
      top(app, feature),
      h(
        "div",
        { class: "columns" },
        exampleList(feature, found.point),
        side(app, feature, [h("section", { class: "card" }, numbersOf(feature), found.figure)]),
      ),
    ),
  };
}

function side(app, feature, first) {
  const sites = app.meta.norm_sites;
  return h(
    "aside",
    { "aria-label": "Numbers and neighbours" },
    first,
    logits(app, feature),
    feature.norms &&
      sites &&
      h(
        "section",
        { class: "card" },
        h(
          "h3",
          { title: "Decoder norms in units of each site's activations" },
          "How much it writes at each site",
        ),
        bars(
          sites.map((site, i) => [site, feature.norms[i]]),
          { name: "Norms by site", format: x => fixed(x) },
        ),
      ),
    neighbours(
      app,
      "Similar directions",
      "Cosine of the decoder rows",
      feature.similar.map(({ id, cosine }) => [id, fixed(cosine), `cosine ${fixed(cosine)}`]),
    ),
    neighbours(
      app,
      "Fires together with",
      "Jaccard index: both over either",
      feature.co_active.map(({ id, score, count }) => [id, fixed(score), `on ${whole(count)} tokens`]),
    ),
  );
}
