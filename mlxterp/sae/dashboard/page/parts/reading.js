// What a coder makes of a text: the tokens, the features of one, and the matrix of both.

import { bdi, button, h } from "../dom.js";
import { number, short, signed } from "../format.js";
import { heatmap } from "./heatmap.js";
import { featureName } from "./picker.js";
import { tokenStrip } from "./tokens.js";

export const RANKS = {
  activation: "largest value",
  logit_effect: "effect on the logit",
  attribution: "attribution",
};

/** The strip, the features of a token beside it, and the matrix; `pin(id, on)` and `attribute(at)` ask anew. */
export function reading(app, found, state, { pin, attribute, signal }) {
  const { tokens } = found,
    byActivation = found.rank_by === "activation";
  const rows = [
    ...found.pinned.map(row => ({ id: row.id, values: row.values, pinned: true })),
    ...found.top
      .filter(row => !(byActivation && state.pinned.includes(row.id)))
      .map(row => ({ id: row.id, values: row.scores, score: row.score })),
  ];
  const sizes = row => Math.max(...row.values.map(Math.abs), 1e-9);
  const most = Math.max(1e-9, ...rows.filter(row => !row.pinned || byActivation).map(sizes));
  const scale = row => (row.pinned && !byActivation ? sizes(row) : most);
  const best = tokens.map((_, i) => found.by_token[i]?.[0]?.[1] ?? 0);
  const lines = i => [
    tokens[i],
    ...(found.by_token[i] ?? []).slice(0, 4).map(([id, value]) => [`#${id} ${app.words(id)}`, number(value)]),
  ];
  const strip = tokenStrip(tokens, {
    values: best,
    largest: Math.max(...best.map(Math.abs)),
    onChoose: i => choose(i),
    lines,
    name: "The text",
  });
  const caption = h("p", { class: "note" }),
    of = h("section", { class: "card near", "aria-live": "polite" });
  const allFeatures = () => {
    strip.colour(best, Math.max(...best.map(Math.abs)));
    caption.textContent =
      "Coloured by the strongest feature of each token. Choose a token to list its features; point at a row below to colour by that feature.";
  };
  function point(i) {
    if (i === null) return allFeatures();
    strip.colour(rows[i].values, scale(rows[i]));
    caption.replaceChildren(`Coloured by feature ${rows[i].id}: `, bdi(app.words(rows[i].id)));
  }
  function choose(at) {
    strip.press(at);
    const list = found.by_token[at] ?? [];
    of.replaceChildren(
      h("h2", {}, "On ", bdi(tokens[at], { class: "word" }), h("span", {}, `token ${at}`)),
      list.length
        ? h(
            "ul",
            {},
            list.map(([id, value]) =>
              h("li", {}, featureName(app, id), h("span", { class: "value" }, number(value)), pinButton(id)),
            ),
          )
        : h("p", { class: "none" }, "No feature: nothing fires, or it is a special token."),
      found.rank_by === "attribution" && at !== found.position
        ? button("Attribute what follows it", () => attribute(at))
        : "",
    );
  }
  const pinButton = id => {
    const on = state.pinned.includes(id);
    return button(on ? "unpin" : "pin", () => pin(id, !on), {
      class: "quiet pin",
      "aria-label": `${on ? "Unpin" : "Pin"} feature ${id}`,
    });
  };
  const signedScale = rows.some(row => row.values.some(value => value < 0));
  const unit = byActivation ? "value" : (RANKS[found.rank_by] ?? found.rank_by);
  const matrix = heatmap({
    rows: rows.map(row =>
      h("span", { class: row.pinned ? "head pinned" : "head" }, featureName(app, row.id), pinButton(row.id)),
    ),
    columns: tokens,
    name: "Features by tokens",
    signal,
    cell: [Math.max(16, Math.min(44, Math.floor(860 / tokens.length))), 26],
    text: (i, j) => (Math.abs(rows[i].values[j]) > 0.005 ? short(rows[i].values[j]) : ""),
    share: (i, j) => rows[i].values[j] / scale(rows[i]),
    lines: (i, j) => [
      `#${rows[i].id} ${app.words(rows[i].id)}`,
      ["token", tokens[j]],
      [rows[i].pinned ? "value" : unit, byActivation ? number(rows[i].values[j]) : signed(rows[i].values[j])],
    ],
    onPoint: point,
    onChoose: (i, j) => choose(j),
    ends: signedScale ? [`−${number(most)}`, `+${number(most)}`] : ["0", number(most)],
  });
  allFeatures();
  const sized = best.map(Math.abs);
  choose(Math.max(0, found.position ?? sized.indexOf(Math.max(...sized))));
  const about = byActivation ? null : h("p", { class: "note" }, effects(found));
  return [
    h(
      "div",
      { class: "columns" },
      h("section", { class: "card" }, h("h2", {}, "The text"), strip, caption, about),
      h("aside", {}, of),
    ),
    h(
      "section",
      { class: "card wide" },
      h("h2", {}, "Features by tokens", h("span", {}, `first by ${unit}`)),
      rows.length ? matrix : h("p", { class: "none" }, "No feature fires."),
    ),
  ];
}

/** Which tokens the scores are effects on. */
function effects({ tokens, targets, position }) {
  const word = text => bdi(text, { class: "word" });
  if (position !== null)
    return ["Effects on ", word(targets[position] ?? targets[0]), " after ", word(tokens[position])];
  const all = [...new Set(targets)];
  return [
    "Effects on ",
    all.slice(0, 8).map(text => [word(text), " "]),
    all.length > 8 ? `and ${all.length - 8} more` : "",
  ];
}
