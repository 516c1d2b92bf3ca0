// Keys that work everywhere, and the list of them.

import { button, h } from "./dom.js";
import { go, link } from "./router.js";

const KEYS = [
  ["/", "search"],
  ["j k, → ←", "next and previous feature (in the table: rows)"],
  ["Enter", "open the row"],
  ["r", "a random feature"],
  ["1 – 7", "the views"],
  ["Alt ←", "back"],
  ["t", "light or dark"],
  ["?", "these keys"],
  ["Esc", "let go, close"],
  ["in texts", "arrow keys go from token to token and tell their values"],
  ["in matrices and charts", "arrow keys go from cell to cell"],
  ["in a circuit", "arrow keys go along edges, Enter opens the feature"],
];

const dialog = h(
  "dialog",
  { class: "help", "aria-labelledby": "help-title" },
  h("h2", { id: "help-title" }, "Keys"),
  h(
    "dl",
    {},
    KEYS.map(([key, what]) => h("div", {}, h("dt", {}, key), h("dd", {}, what))),
  ),
  button("Close", () => dialog.close(), { class: "primary" }),
);

export function showKeys() {
  if (!dialog.isConnected) document.body.append(dialog);
  dialog.showModal();
}

const isField = element =>
  element.matches?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]");

/** Listens for keys; `app` knows the features, `views` their names in the order of the numbers, `turn` the theme. */
export function listen({ current, views, step, random, turn }) {
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    if (event.key === "Escape" && isField(event.target)) return event.target.blur();
    if (isField(event.target) || event.defaultPrevented) return;
    const feature = current() === "feature";
    if (event.key === "/")
      (document.querySelector("#main [data-search]") ?? document.querySelector("#jump input")).focus();
    else if (event.key === "?") showKeys();
    else if (event.key === "r") random();
    else if (event.key === "t") turn();
    else if (/^[1-9]$/.test(event.key) && views[event.key - 1]) go(link(views[event.key - 1]));
    else if (event.key === "j" || (feature && event.key === "ArrowRight" && !event.target.matches("input")))
      step(1);
    else if (event.key === "k" || (feature && event.key === "ArrowLeft" && !event.target.matches("input")))
      step(-1);
    else return;
    event.preventDefault();
  });
}
