// The columns of tables of features.

import { bdi, h } from "../dom.js";
import { fixed, percent } from "../format.js";
import { featureLink } from "../router.js";
import { bestScore } from "../rows.js";

/** The number of a feature as a link. */
export const idCell = (app, id) =>
  h("a", { href: featureLink(id), tabindex: -1, class: app.included(id) ? null : "left-out" }, String(id));

const words = (app, column) => id => {
  const texts = app.strings(column, id);
  return h(
    "span",
    { class: "words", title: texts.join("  ") },
    texts.map(text => bdi(text, { class: "word" })),
  );
};

/** A share on a log scale as a small bar beside its number. */
function rate(value, lowest) {
  const share = value > 0 ? Math.max(0.03, 1 - Math.log10(value) / lowest) : 0;
  return [
    h("span", { class: "spark", "aria-hidden": "true" }, h("i", { vars: { width: `${100 * share}%` } })),
    h("span", { class: "share" }, value > 0 ? percent(value, 2) : "dead"),
  ];
}

/** All columns of the overview. */
export function featureColumns(app) {
  const { firing_rates: rates, maxima, nearest, nearest_ids: nearestIds } = app.columns;
  let lowest = -1,
    scored = false;
  for (const value of rates) if (value > 0) lowest = Math.min(lowest, Math.log10(value));
  for (const id in app.labels)
    if (bestScore(app.labels[id]) >= 0) {
      scored = true;
      break;
    }
  const columns = [
    { key: "id", title: "#", width: "3.4rem", number: true, draw: id => idCell(app, id) },
    { key: "label", title: "label", width: "minmax(7rem, 1.5fr)", draw: id => label(app, id) },
    scored && {
      key: "score",
      title: "score",
      width: "3.4rem",
      number: true,
      descending: true,
      draw: id => fixed(bestScore(app.labels[id])),
      hint: "Balanced accuracy of the label: detection, else fuzzing, else its tokens",
    },
    { title: "fires most on", width: "minmax(6rem, 1fr)", draw: words(app, "peaks") },
    { title: "promotes", width: "minmax(6rem, 1fr)", draw: words(app, "promotes") },
    {
      key: "firing_rates",
      title: "fires",
      width: "6.7rem",
      number: true,
      descending: true,
      draw: id => rate(rates[id], lowest),
      hint: "Share of the tokens on which it fires",
    },
    {
      key: "maxima",
      title: "largest",
      width: "4.2rem",
      number: true,
      descending: true,
      draw: id => fixed(maxima[id]),
      hint: "Largest value",
    },
    {
      key: "nearest",
      title: "nearest",
      width: "4.7rem",
      number: true,
      descending: true,
      hint: "Cosine of the nearest other feature",
      draw: id =>
        nearestIds[id] < 0
          ? "–"
          : h("span", { title: `#${nearestIds[id]} ${app.words(nearestIds[id])}` }, fixed(nearest[id])),
    },
  ];
  const has = column => column.title !== "promotes" || app.columns.promotes.some(at => at >= 0);
  return columns.filter(column => column && has(column));
}

function label(app, id) {
  const found = app.labels[id];
  if (!found) return h("span", { class: "none" }, "–");
  return h(
    "span",
    { class: found.source === "user" ? "label mine" : "label", title: `${found.text} (by ${found.source})` },
    bdi(found.text),
  );
}
