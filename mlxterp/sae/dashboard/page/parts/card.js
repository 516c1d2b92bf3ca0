// A feature in short.

import { bdi, h } from "../dom.js";
import { number, percent } from "../format.js";
import { featureLink } from "../router.js";
import { bars } from "./charts.js";
import { exampleLine } from "./examples.js";

/** A feature in short, of one of the two coders. */
export async function card(app, id, title, isOwn) {
  if (id === null || id < 0)
    return h(
      "section",
      { class: "card" },
      h("h2", {}, title),
      h("p", { class: "none" }, "It has no partner there."),
    );
  const head = [
    h("h2", {}, title),
    h(
      "p",
      { class: "card-title" },
      isOwn ? h("a", { href: featureLink(id) }, `Feature ${id}`) : h("b", {}, `Feature ${id}`),
      " ",
      bdi(app.label(id)),
    ),
  ];
  try {
    const feature = await app.source.feature(id),
      side = feature.sides[0]?.top.slice(0, 6) ?? [];
    return h(
      "section",
      { class: "card" },
      head,
      h(
        "p",
        { class: "note" },
        `fires on ${percent(feature.firing_rate, 2)}, largest value ${number(feature.maximum)}`,
      ),
      h(
        "ul",
        { class: "examples" },
        feature.examples.slice(0, 5).map(example => exampleLine(example, feature.maximum, null)),
      ),
      side.length > 0 && [
        h("h3", { class: "minor" }, "more likely"),
        bars(side, { name: "more likely", format: number }),
      ],
    );
  } catch (error) {
    return h("section", { class: "card" }, head, h("p", { class: "none" }, bdi(error.message)));
  }
}
