// Features to steer with, and how strong.

import { button, h } from "../dom.js";
import { featureName } from "./picker.js";

/** Features and strengths of `12:1.5,7:-2`. */
export function strengths(text, app) {
  const found = new Map();
  for (const part of (text ?? "").split(",")) {
    const [id, strength = "1"] = part.split(":");
    if (/^\d+$/.test(id) && Number(id) < app.n && Number.isFinite(Number(strength)))
      found.set(Number(id), Number(strength));
  }
  return found;
}

/** A feature with its strength; `keep` is called when somebody lets go of the slider. */
export function slider(app, state, id, strength, keep, remove) {
  const reach = Math.max(
    state.unit === "max" ? 4 : 4 * Math.max(1, Math.round(app.columns.maxima[id] || 1)),
    Math.abs(strength),
  );
  const number = h("input", {
    type: "number",
    class: "short",
    step: "any",
    value: strength,
    "aria-label": `Strength of feature ${id}`,
  });
  const range = h("input", {
    type: "range",
    min: state.mode === "scale" ? 0 : -reach,
    max: reach,
    step: reach / 80,
    value: strength,
    "aria-label": `Strength of feature ${id}`,
  });
  const set = (value, from) => {
    state.features.set(id, value);
    if (from !== number) number.value = value;
    if (from !== range) range.value = value;
  };
  range.addEventListener("input", () => set(Number(Number(range.value).toFixed(3)), range));
  range.addEventListener("change", keep);
  number.addEventListener("change", () => {
    if (number.value !== "")
      set(
        Math.max(
          -app.meta.live.limits.strength,
          Math.min(app.meta.live.limits.strength, Number(number.value)),
        ),
        null,
      );
    keep();
  });
  return h(
    "div",
    { class: "steered" },
    featureName(app, id),
    state.mode !== "ablate" && [range, number],
    button("×", remove, { class: "quiet", "aria-label": `Take away feature ${id}` }),
  );
}
