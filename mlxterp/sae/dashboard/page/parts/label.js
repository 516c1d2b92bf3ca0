// The label of a feature, which can be edited where there is a server.

import { bdi, button, h, say } from "../dom.js";
import { fixed } from "../format.js";

const NAMES = { detection: "detection", fuzzing: "fuzzing", tokens: "tokens", control: "control" };
const MEANINGS = {
  detection: "balanced accuracy of telling by the label on which texts the feature fires",
  fuzzing: "balanced accuracy of telling by the label whether the right tokens are marked",
  tokens: "balanced accuracy of the label's tokens on texts that were not used to find them",
  control: "the same for a label of another feature: what chance gives",
};

function shown(app, id, edit) {
  const label = app.labels[id];
  const change =
    app.meta.live.labels &&
    button(label ? "Edit" : "Name it", edit, {
      class: "quiet",
      id: "edit-label",
      "aria-label": label ? "Edit the label" : "Give it a label",
    });
  if (!label)
    return [
      h("p", { class: "label-text none" }, app.isDead(id) ? "never fires" : "no label yet", " ", change),
    ];
  const scores = Object.entries(label.scores ?? {}).map(([name, score]) =>
    h(
      "span",
      { class: "score", title: MEANINGS[name] ?? null },
      `${NAMES[name] ?? name} `,
      h("b", {}, fixed(score)),
    ),
  );
  return [
    h("p", { class: "label-text" }, bdi(label.text), " ", change),
    h(
      "p",
      { class: "label-source" },
      h("span", {}, label.source === "user" ? "named by you" : ["by ", bdi(label.source)]),
      scores,
      (label.others ?? []).map(other =>
        h("span", { class: "other" }, bdi(other.source), ": ", bdi(other.text)),
      ),
    ),
  ];
}

/** A label that becomes a field to edit it in. */
export function labelEditor(app, id) {
  const box = h("div", { class: "label-box" });
  const draw = () => box.replaceChildren(...shown(app, id, edit));
  function edit() {
    const old = app.labels[id]?.source === "user" ? app.labels[id].text : "";
    const field = h("input", {
      type: "text",
      maxlength: app.meta.live.limits.label_chars,
      value: old || app.label(id),
      "aria-label": "Label",
      dir: "auto",
    });
    const problem = h("span", { class: "problem", role: "alert" });
    const leave = () => {
      draw();
      box.querySelector("#edit-label")?.focus();
    };
    async function keep(text) {
      try {
        const label = await app.source.setLabel(id, text);
        if (label) app.labels[id] = label;
        else delete app.labels[id];
        leave();
        say(label ? "The label is kept." : "Your label is gone.");
      } catch (error) {
        problem.textContent = error.message;
      }
    }
    field.addEventListener("keydown", event => {
      if (event.key === "Enter") keep(field.value.trim());
      else if (event.key === "Escape") leave();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    box.replaceChildren(
      h(
        "div",
        { class: "label-edit" },
        field,
        button("Keep", () => keep(field.value.trim()), { class: "primary" }),
        old && button("Remove mine", () => keep("")),
        button("Cancel", leave, { class: "quiet" }),
      ),
      problem,
    );
    field.focus();
    field.select();
  }
  draw();
  return box;
}
