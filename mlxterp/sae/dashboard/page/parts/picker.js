// A field that finds features by number, label or token, and the small signs of those that were chosen.

import { bdi, button, h } from "../dom.js";
import { featureLink } from "../router.js";
import { suggestions } from "../rows.js";

let made = 0;

/** A field with a list of suggestions; `onPick(id)` is called for one of them. */
export function picker(app, { name, placeholder = "Number, label or token", onPick, isSearch = false }) {
  const list = h("ul", {
    role: "listbox",
    id: `picks-${++made}`,
    hidden: true,
    "aria-label": "Features found",
  });
  const field = h("input", {
    type: "text",
    role: "combobox",
    "aria-label": name,
    "aria-expanded": "false",
    "aria-autocomplete": "list",
    "aria-controls": list.id,
    autocomplete: "off",
    spellcheck: "false",
    placeholder,
    "data-search": isSearch,
  });
  let found = [],
    at = 0;

  function close() {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
  }
  function mark(to) {
    at = (to + found.length) % found.length;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    field.setAttribute("aria-activedescendant", list.children[at].id);
    list.children[at].scrollIntoView({ block: "nearest" });
  }
  function pick(id) {
    field.value = "";
    close();
    onPick(id);
  }
  function find() {
    found = field.value.trim() ? suggestions(app, field.value) : [];
    list.replaceChildren(
      ...found.map((id, i) =>
        h(
          "li",
          {
            role: "option",
            id: `${list.id}-${i}`,
            onpointerdown: event => {
              event.preventDefault();
              pick(id);
            },
          },
          h("b", {}, `#${id}`),
          " ",
          featureWords(app, id),
        ),
      ),
    );
    if (!found.length) {
      if (!field.value.trim()) return close();
      list.append(
        h("li", { class: "none", role: "option", "aria-disabled": "true" }, "No feature is like that."),
      );
    }
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    if (found.length) mark(0);
  }
  field.addEventListener("input", find);
  field.addEventListener("focus", find);
  field.addEventListener("blur", close);
  field.addEventListener("keydown", event => {
    if (event.key === "ArrowDown" && found.length) mark(at + 1);
    else if (event.key === "ArrowUp" && found.length) mark(at - 1);
    else if (event.key === "Enter" && found.length && !list.hidden) pick(found[at]);
    else if (event.key === "Escape") {
      if (list.hidden || !field.value) field.blur();
      field.value = "";
      close();
    } else return;
    event.preventDefault();
  });
  return h("div", { class: "picker" }, field, list);
}

/** A feature in a few words: its label, or the tokens it fires most on. */
export function featureWords(app, id) {
  if (app.label(id) || app.isDead(id)) return bdi(app.words(id));
  return h(
    "span",
    { class: "words" },
    app.strings("peaks", id).map(text => bdi(text, { class: "word" })),
  );
}

/** A feature as a link with its words. */
export function featureName(app, id) {
  return h(
    "a",
    { class: "feature", href: featureLink(id), title: app.words(id) },
    h("b", {}, `#${id}`),
    " ",
    featureWords(app, id),
  );
}

/** A feature that was chosen, with a button that takes it away. */
export function chip(app, id, remove) {
  return h(
    "span",
    { class: "chip" },
    featureName(app, id),
    button("×", () => remove(id), { class: "quiet", "aria-label": `Take away feature ${id}` }),
  );
}
