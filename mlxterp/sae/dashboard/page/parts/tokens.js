// A text as tokens, coloured by a feature's values.

import { bdi, h } from "../dom.js";
import { number } from "../format.js";
import { hush, tell, tellAt } from "./tip.js";

/** Tokens as they are drawn: those without a text of their own belong to the one before. */
export function joined(tokens, values, peak = -1) {
  const groups = [];
  tokens.forEach((text, i) => {
    const value = values?.[i] ?? 0,
      last = groups.at(-1);
    if (text === "" && last) {
      last.last = i;
      if (Math.abs(value) > Math.abs(last.value)) last.value = value;
    } else groups.push({ text, value, first: i, last: i });
  });
  for (const group of groups) group.peak = peak >= group.first && peak <= group.last;
  return groups;
}

/** Colours a token by the share that its value has of the largest. */
export function shade(element, value, largest) {
  const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
  element.classList.toggle("more", value > 0);
  element.classList.toggle("less", value < 0);
  element.classList.toggle("strong", share > 0.55);
  element.style.setProperty("--share", value ? (0.12 + 0.88 * share).toFixed(3) : "0");
}

const REACH = 12; // tokens before the peak that a line starts with

/** A strip of tokens: `{values, peak, largest, onPoint(value | null), onChoose(i), lines(i) for the tip, name, whole}`. */
export function tokenStrip(
  tokens,
  {
    values = null,
    peak = -1,
    largest = 0,
    onPoint = null,
    onChoose = null,
    lines = null,
    name = "Text",
    whole = true,
  },
) {
  const groups = joined(tokens, values, peak);
  const centre = groups.findIndex(group => group.peak);
  const start = whole || centre < REACH ? 0 : centre - REACH;
  const strip = h("div", { class: "strip", role: "group", "aria-label": name, dir: "auto" });
  const marks = groups.slice(start).map((group, at) => {
    const mark = bdi(group.text, { class: group.peak ? "token peak" : "token", tabindex: -1, "data-at": at });
    if (values) shade(mark, group.value, largest);
    if (onChoose) mark.setAttribute("role", "button");
    return mark;
  });
  if (start) strip.append(h("span", { class: "cut", "aria-hidden": "true" }, "… "));
  strip.append(...marks);
  const shown = groups.slice(start);
  const told = at =>
    lines?.(shown[at].first) ?? [
      shown[at].text,
      ["value", number(values?.[shown[at].first] === shown[at].value ? shown[at].value : shown[at].value)],
    ];
  let current = Math.max(
    0,
    shown.findIndex(group => group.peak),
  );
  if (marks.length) marks[current].tabIndex = 0;
  const at = event => {
    const mark = event.target.closest?.(".token");
    return mark ? Number(mark.dataset.at) : null;
  };
  const focus = to => {
    marks[current].tabIndex = -1;
    current = Math.max(0, Math.min(marks.length - 1, to));
    marks[current].tabIndex = 0;
    marks[current].focus();
  };
  strip.addEventListener("pointermove", event => {
    const i = at(event);
    if (i === null) return leave();
    tell(event.clientX, event.clientY, told(i));
    onPoint?.(shown[i].value);
  });
  const leave = () => {
    hush();
    onPoint?.(null);
  };
  strip.addEventListener("pointerleave", leave);
  strip.addEventListener("focusout", leave);
  strip.addEventListener("focusin", event => {
    const i = at(event);
    if (i === null || !event.target.matches(":focus-visible")) return;
    tellAt(marks[i], told(i));
    onPoint?.(shown[i].value);
  });
  strip.addEventListener("click", event => {
    const i = at(event);
    if (i !== null && onChoose) {
      focus(i);
      onChoose(shown[i].first);
    }
  });
  strip.addEventListener("keydown", event => {
    const to = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: marks.length - 1 }[event.key];
    if (to !== undefined) focus(to);
    else if (onChoose && (event.key === "Enter" || event.key === " ")) onChoose(shown[current].first);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  strip.colour = (newValues, newLargest) => {
    const again = joined(tokens, newValues).slice(start);
    again.forEach((group, i) => {
      shown[i].value = group.value;
      shade(marks[i], group.value, newLargest);
    });
  };
  strip.press = first =>
    shown.forEach((group, i) =>
      marks[i].setAttribute("aria-pressed", String(first >= group.first && first <= group.last)),
    );
  return strip;
}
