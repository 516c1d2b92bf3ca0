// What a view says that needs a model, in a page without one.

import { bdi, h } from "../dom.js";

/** Why there is nothing, and how to get it. */
export function needsModel(app, what) {
  const code = [app.meta.code?.load ?? "", "sae.dashboard(model=model)"].filter(Boolean).join("\n");
  return h(
    "div",
    { class: "empty" },
    h("h1", {}, "This needs the model"),
    h("p", {}, `${what} This page has no model behind it: it is a saved file, or was started without one.`),
    h("p", {}, "To get it, start the dashboard with a model:"),
    h("pre", { class: "code" }, bdi(code)),
  );
}
