// A text of one's own: which features fire on which token.

import { bdi, button, h, say, select } from "../dom.js";
import { whole } from "../format.js";
import { needsModel } from "../parts/needs.js";
import { chip, picker } from "../parts/picker.js";
import { RANKS, reading } from "../parts/reading.js";
import { ids, remember } from "../router.js";

export const name = "Text";

const TOP = 16,
  MOST_IN_LINK = 1500;

export async function show(app, route, signal) {
  if (!app.meta.live.text)
    return {
      title: "Text",
      element: needsModel(app, "Here you type a text and see which features fire on which token."),
    };
  const { live } = app.meta,
    { query } = route;
  const state = {
    text: query.get("t") ?? "",
    rank: live.rank_by.includes(query.get("by")) ? query.get("by") : live.rank_by[0],
    target: query.get("target") ?? "",
    position: /^\d+$/.test(query.get("at") ?? "") ? Number(query.get("at")) : -1,
    pinned: ids(query.get("pin"), app.n).slice(0, live.limits.pinned),
  };
  const field = h("textarea", {
    rows: 4,
    "aria-label": "Text",
    placeholder: "Type a text, then press Ctrl + Enter",
    maxlength: live.limits.text_chars,
    value: state.text,
    dir: "auto",
    spellcheck: "false",
    oninput: () => {
      state.text = field.value;
      state.position = -1;
    },
    onkeydown: event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run();
      }
    },
  });
  const target = h("input", {
    type: "text",
    class: "token-field",
    "aria-label": "Target token",
    placeholder: "model's choice",
    value: state.target,
    oninput: () => {
      state.target = target.value;
    },
  });
  const targetField = h(
    "label",
    { class: "field", hidden: state.rank === "activation" },
    h("span", {}, "on the token"),
    target,
  );
  const start = button("Analyse", () => run(), { class: "primary" });
  const result = h("div", { class: "result" }),
    chips = h("div", { class: "chips" });
  let found = null,
    latest = 0;

  function pin(id, on) {
    state.pinned = on
      ? [...new Set([...state.pinned, id])].slice(0, live.limits.pinned)
      : state.pinned.filter(other => other !== id);
    drawChips();
    if (found) run();
    else keep();
  }
  const drawChips = () =>
    chips.replaceChildren(...state.pinned.map(id => chip(app, id, () => pin(id, false))));
  const keep = () =>
    remember("text", [], {
      t: state.text.length <= MOST_IN_LINK ? state.text : "",
      by: state.rank === live.rank_by[0] ? "" : state.rank,
      target: state.rank === "activation" ? "" : state.target,
      at: state.rank === "attribution" && state.position >= 0 ? state.position : "",
      pin: state.pinned.join(","),
    });

  function attribute(at) {
    state.position = at;
    run();
  }

  async function run() {
    keep();
    if (!state.text.trim()) return result.replaceChildren(h("p", { class: "hint" }, "There is no text yet."));
    const turn = ++latest;
    start.disabled = true;
    result.classList.add("waiting");
    const request = {
      text: state.text,
      rank_by: state.rank,
      top_k: Math.min(TOP, live.limits.top_k),
      features: state.pinned,
    };
    if (state.rank !== "activation" && state.target) request.target = state.target;
    if (state.rank === "attribution") request.position = state.position;
    try {
      const answer = await app.source.text(request);
      if (turn !== latest || signal.aborted) return;
      found = answer;
      result.replaceChildren(...reading(app, found, state, { pin, attribute, signal }));
      say(`${whole(found.tokens.length)} tokens`);
    } catch (error) {
      if (turn === latest)
        result.replaceChildren(h("p", { class: "problem", role: "alert" }, bdi(error.message)));
    } finally {
      if (turn === latest) {
        start.disabled = false;
        result.classList.remove("waiting");
      }
    }
  }
  drawChips();
  const element = h(
    "div",
    {},
    h("div", { class: "heading" }, h("h1", {}, "Features of a text")),
    h(
      "section",
      { class: "card form" },
      field,
      h(
        "div",
        { class: "filters" },
        start,
        select(
          "rank by",
          live.rank_by.map(value => [value, RANKS[value] ?? value]),
          state.rank,
          value => {
            state.rank = value;
            targetField.hidden = value === "activation";
            if (found) run();
          },
        ),
        targetField,
        h(
          "span",
          { class: "field" },
          h("span", {}, "pin"),
          picker(app, { name: "Pin a feature", onPick: id => pin(id, true) }),
        ),
        chips,
      ),
    ),
    result,
  );
  return {
    title: "Text",
    element,
    shown: () => {
      if (state.text) run();
      else field.focus();
    },
  };
}
