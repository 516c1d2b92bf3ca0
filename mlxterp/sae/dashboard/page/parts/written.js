// Two texts beside each other, as they are written.

import { bdi, h } from "../dom.js";

/** The two texts; the part of the steered one up to the first difference is soft. */
export function written() {
  const texts = {
    plain: h("div", { class: "written", dir: "auto" }),
    steered: h("div", { class: "written", dir: "auto" }),
  };
  const problem = h("p", { class: "problem", role: "alert" });
  const column = (side, title) =>
    h("section", { class: "card", "aria-label": title }, h("h2", {}, title), texts[side]);
  const full = { plain: "", steered: "" };
  function differ() {
    let same = 0;
    const shortest = Math.min(full.plain.length, full.steered.length);
    while (same < shortest && full.plain[same] === full.steered[same]) same++;
    for (const side of ["plain", "steered"])
      texts[side].replaceChildren(
        h("span", { class: "same" }, full[side].slice(0, same)),
        h("span", {}, full[side].slice(same)),
      );
  }
  return {
    element: h(
      "div",
      {},
      problem,
      h("div", { class: "two" }, column("plain", "Plain"), column("steered", "Steered")),
    ),
    clear() {
      problem.textContent = "";
      for (const side of Object.keys(texts)) {
        full[side] = "";
        texts[side].replaceChildren();
        texts[side].classList.add("writing");
      }
    },
    piece({ side, text }) {
      full[side] += text;
      texts[side].append(text);
    },
    end(whole) {
      Object.assign(full, { plain: whole.plain, steered: whole.steered });
      this.stopped();
    },
    stopped() {
      for (const side of Object.keys(texts)) texts[side].classList.remove("writing");
      differ();
    },
    problem(message) {
      this.stopped();
      problem.replaceChildren(bdi(message));
    },
  };
}
