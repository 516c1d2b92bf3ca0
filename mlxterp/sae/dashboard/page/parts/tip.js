// The one box that tells what is pointed at.

import { h } from "../dom.js";

const box = h("div", { id: "tip", role: "tooltip", hidden: true });

/** Shows lines beside a point of the window; a line is a text, `[name, value]` or a node. */
export function tell(x, y, lines) {
  if (!box.isConnected) document.body.append(box);
  box.replaceChildren(
    ...lines.map(line =>
      Array.isArray(line)
        ? h("div", { class: "pair" }, h("span", {}, line[0]), h("b", {}, h("bdi", {}, line[1])))
        : h("div", {}, typeof line === "string" ? h("bdi", {}, line) : line),
    ),
  );
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(6, Math.min(x + 12, innerWidth - width - 8));
  const top = y + 18 + height > innerHeight ? y - height - 10 : y + 18;
  box.style.left = `${left}px`;
  box.style.top = `${Math.max(6, top)}px`;
}

/** Shows lines under an element, for people who use the keyboard. */
export function tellAt(element, lines) {
  const { left, bottom } = element.getBoundingClientRect();
  tell(left, bottom - 12, lines);
}

export function hush() {
  box.hidden = true;
}

addEventListener("scroll", hush, { capture: true, passive: true });
addEventListener("hashchange", hush);
