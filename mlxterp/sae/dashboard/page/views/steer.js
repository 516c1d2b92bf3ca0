// Text as the model writes it beside text with features turned up or down.

import { button, h, say, select } from "../dom.js";
import { needsModel } from "../parts/needs.js";
import { picker } from "../parts/picker.js";
import { slider, strengths } from "../parts/strengths.js";
import { written } from "../parts/written.js";
import { remember } from "../router.js";

export const name = "Steer";

const MODES = { add: "add", clamp: "clamp to", min_clamp: "at least", scale: "scale by", ablate: "ablate" };
const EXPLAINED = {
  add: "Adds the feature's direction at every token.",
  clamp: "Holds the feature at this value at every token.",
  min_clamp: "Raises the feature to at least this value.",
  scale: "Multiplies the feature's value; 0 takes it away.",
  ablate: "Takes the feature away.",
};
const PROMPT = "The function returns";

const whole = (text, least, most, otherwise) =>
  text && /^\d+$/.test(text) ? Math.min(most, Math.max(least, Number(text))) : otherwise;

export async function show(app, route, signal) {
  if (!app.meta.live.steer)
    return {
      title: "Steer",
      element: needsModel(app, "Here you turn features up and down and see what the model writes then."),
    };
  const { live } = app.meta,
    { limits } = live,
    { query } = route;
  const heat = query.get("heat");
  const state = {
    prompt: query.get("p") ?? PROMPT,
    features: strengths(query.get("f"), app),
    mode: live.modes.includes(query.get("mode")) ? query.get("mode") : live.modes[0],
    unit: query.get("unit") === "activation" || !live.maximum_known ? "activation" : "max",
    n: whole(query.get("n"), 1, limits.max_tokens, Math.min(60, limits.max_tokens)),
    temperature: heat && Number(heat) >= 0 ? Number(heat) : 0,
    seed: whole(query.get("seed"), 0, 2 ** 31 - 1, 0),
  };
  const keep = () =>
    remember("steer", [], {
      p: state.prompt === PROMPT ? "" : state.prompt,
      f: [...state.features].map(([id, strength]) => `${id}:${strength}`).join(","),
      mode: state.mode === live.modes[0] ? "" : state.mode,
      unit: state.unit === "max" || !live.maximum_known ? "" : state.unit,
      n: state.n === 60 ? "" : state.n,
      heat: state.temperature || "",
      seed: state.seed || "",
    });
  const list = h("div", { class: "steered-features" }),
    note = h("p", { class: "note" });
  const outputs = written();

  function drawFeatures() {
    list.replaceChildren(
      ...[...state.features].map(([id, strength]) =>
        slider(app, state, id, strength, keep, () => {
          state.features.delete(id);
          drawFeatures();
        }),
      ),
    );
    if (!state.features.size) list.append(h("p", { class: "hint" }, "Add a feature to steer with."));
    note.textContent = `${EXPLAINED[state.mode] ?? ""} ${state.mode === "ablate" || state.mode === "scale" ? "" : state.unit === "max" ? "A strength of 1 is the largest value that the feature had." : "Strengths are values of the feature."}`;
    keep();
  }
  const start = button("Write", () => run(), { class: "primary", title: "Ctrl + Enter" });
  const stop = button("Stop", () => running?.abort(), { disabled: true });
  let running = null;

  async function run() {
    if (!state.features.size) return outputs.problem("Add a feature to steer with.");
    running?.abort();
    const mine = (running = new AbortController());
    signal.addEventListener("abort", () => mine.abort(), { once: true });
    start.disabled = true;
    stop.disabled = false;
    outputs.clear();
    keep();
    const request = {
      prompt: state.prompt,
      features: [...state.features].map(([id, strength]) => ({ id, strength })),
      mode: state.mode,
      unit: state.unit,
      max_tokens: state.n,
      temperature: state.temperature,
      seed: state.seed,
    };
    try {
      outputs.end(await app.source.steer(request, outputs.piece, mine.signal));
      say("Done.");
    } catch (error) {
      if (error.name === "AbortError") outputs.stopped();
      else outputs.problem(error.message);
    } finally {
      if (running === mine) {
        start.disabled = false;
        stop.disabled = true;
      }
    }
    return undefined;
  }
  const count = (key, label, most, attributes = {}) =>
    h(
      "label",
      { class: "field" },
      h("span", {}, label),
      h("input", {
        type: "number",
        class: "short",
        min: 0,
        max: most,
        value: state[key],
        ...attributes,
        onchange: event => {
          const value = Number(event.target.value);
          if (event.target.checkValidity() && event.target.value !== "") state[key] = value;
          else event.target.value = state[key];
          keep();
        },
      }),
    );
  const prompt = h("textarea", {
    rows: 3,
    "aria-label": "Prompt",
    value: state.prompt,
    maxlength: limits.prompt_chars,
    dir: "auto",
    spellcheck: "false",
    oninput: () => {
      state.prompt = prompt.value;
    },
    onchange: keep,
    onkeydown: event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run();
      }
    },
  });
  drawFeatures();
  const element = h(
    "div",
    {},
    h("div", { class: "heading" }, h("h1", {}, "Steer")),
    h(
      "section",
      { class: "card form" },
      prompt,
      list,
      h(
        "div",
        { class: "filters" },
        picker(app, {
          name: "Add a feature",
          placeholder: "Add: number, label or token",
          isSearch: true,
          onPick: id => {
            if (state.features.size < limits.steer_features && !state.features.has(id))
              state.features.set(id, state.mode === "scale" ? 2 : 1);
            drawFeatures();
          },
        }),
        select(
          "mode",
          live.modes.map(mode => [mode, MODES[mode] ?? mode]),
          state.mode,
          mode => {
            state.mode = mode;
            drawFeatures();
          },
        ),
        live.maximum_known &&
          select(
            "unit",
            [
              ["max", "its largest value"],
              ["activation", "activation"],
            ],
            state.unit,
            unit => {
              state.unit = unit;
              drawFeatures();
            },
          ),
        count("n", "tokens", limits.max_tokens, { min: 1 }),
        count("temperature", "temperature", 5, { step: "any" }),
        count("seed", "seed", 2 ** 31 - 1),
      ),
      note,
      h("div", { class: "filters" }, start, stop),
    ),
    outputs.element,
  );
  return { title: "Steer", element };
}
