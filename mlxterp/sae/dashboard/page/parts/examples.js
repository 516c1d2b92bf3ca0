// Examples of a feature: the strongest, some of every strength, and some at random.

import { h, segments } from "../dom.js";
import { fixed, number, percent } from "../format.js";
import { tokenStrip } from "./tokens.js";

const choice = { whole: "lines" };

/** A line with the value at an example's peak and its text. */
export function exampleLine(example, largest, onPoint) {
  const value = example.values[example.peak];
  return h(
    "li",
    { class: "example" },
    h("span", { class: "value" }, fixed(value)),
    tokenStrip(example.tokens, {
      values: example.values,
      peak: example.peak,
      largest,
      onPoint,
      whole: choice.whole === "whole",
      name: `Example with the value ${fixed(value)}`,
    }),
  );
}

const lines = (examples, largest, onPoint) =>
  h(
    "ul",
    { class: "examples" },
    examples.map(example => exampleLine(example, largest, onPoint)),
  );

function group(title, note, content) {
  return h("section", { class: "group" }, h("h3", {}, title, h("span", {}, note)), content);
}

function examples(feature, onPoint) {
  const largest = Math.max(
    Math.abs(feature.maximum),
    ...feature.examples.map(e => Math.abs(e.values[e.peak])),
  );
  const weak = feature.intervals.filter(interval => interval.examples.length);
  return [
    group("Strongest", "one of each context", lines(feature.examples, largest, onPoint)),
    h(
      "section",
      { class: "group" },
      h("h3", {}, "Of every strength", h("span", {}, "evenly spaced from the largest value to 0")),
      weak.map(interval =>
        h(
          "div",
          { class: "interval" },
          h(
            "h4",
            {},
            `${number(interval.low)} to ${number(interval.high)}`,
            h("span", {}, `${percent(interval.share, 2)} of its firings`),
          ),
          lines(interval.examples, largest, onPoint),
        ),
      ),
    ),
    group("At random", "any firing", lines(feature.random, largest, onPoint)),
  ];
}

/** All examples of a feature, and the choice of how much of each is shown. */
export function exampleList(feature, onPoint) {
  const list = h("div", { class: "all-examples" }, examples(feature, onPoint));
  const length = segments(
    "Length of the examples",
    [
      ["lines", "Around the token"],
      ["whole", "Whole"],
    ],
    choice.whole,
    value => {
      choice.whole = value;
      list.replaceChildren(...examples(feature, onPoint));
    },
  );
  return h("div", {}, h("div", { class: "bar-line" }, h("h2", {}, "Examples"), length), list);
}
