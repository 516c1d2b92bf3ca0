// A coder in a few numbers.

import { bdi, h } from "../dom.js";
import { brief, number, percent, whole } from "../format.js";

const KINDS = {
  sae: "sparse autoencoder",
  transcoder: "transcoder",
  crosscoder: "crosscoder",
  cross_layer_transcoder: "cross-layer transcoder",
};

const sites = columns =>
  columns.length > 3 ? `${columns.length} sites` : columns.map(column => column.site).join(", ");

/** What kind of coder it is, where it reads and writes, and what the page is made from. */
export function facts(app) {
  const { coder, model, data } = app.meta,
    reads = sites(coder.reads),
    writes = sites(coder.writes);
  const found = [
    [KINDS[coder.kind] ?? coder.kind, reads === writes ? `of ${reads}` : `from ${reads} to ${writes}`],
    [
      `${whole(coder.n_features)} features`,
      `${coder.activation_function}${coder.k ? `, k = ${coder.k}` : ""}`,
    ],
    model && [
      `model ${model.name}`,
      model.n_layers ? `${model.n_layers} layers, width ${model.d_model}` : "",
    ],
    [`${brief(data.n_tokens)} tokens`, `${whole(data.n_documents)} documents`],
  ].filter(Boolean);
  return h(
    "ul",
    { class: "facts" },
    found.map(([main, rest]) => h("li", {}, bdi(main), rest && h("span", {}, " ", bdi(rest)))),
  );
}

function tile(name, value, explained, more = null) {
  return h(
    "div",
    { class: "tile" },
    h("dt", {}, name),
    h("dd", {}, h("b", {}, value), h("span", {}, explained), more),
  );
}

/** The headline numbers; those that were not measured are left out. */
export function numbers(app) {
  const { fidelity, loss } = app.meta.numbers,
    { firing_counts: counts, firing_rates: rates } = app.columns;
  let dead = 0,
    dense = 0,
    labelled = 0;
  for (let id = 0; id < app.n; id++) {
    if (!counts[id]) dead++;
    if (rates[id] > 0.1) dense++;
    if (app.labels[id]) labelled++;
  }
  const tiles = [
    fidelity &&
      tile("FVU", number(fidelity.fvu), "of the variance is not explained", bySite(fidelity.fvu_by_site)),
    fidelity && tile("L0", number(fidelity.l0), "features on a token"),
    loss &&
      (loss.recovered === null
        ? tile("Loss", `${number(loss.spliced)}`, `with the coder, ${number(loss.clean)} without`)
        : tile(
            "Loss recovered",
            percent(loss.recovered),
            `${number(loss.clean)} plain, ${number(loss.spliced)} with the coder, ${number(loss.ablated)} ablated`,
          )),
    tile("Dead", whole(dead), `${percent(dead / app.n, 2)} never fire`),
    tile("Dense", whole(dense), "fire on more than 10 %"),
    tile("Labelled", whole(labelled), `${percent(labelled / app.n, 2)} have a label`),
  ].filter(Boolean);
  return h("dl", { class: "tiles" }, tiles);
}

function bySite(shares) {
  if (!shares) return null;
  return h(
    "details",
    {},
    h("summary", {}, "by site"),
    h(
      "ul",
      {},
      Object.entries(shares).map(([site, fvu]) => h("li", {}, bdi(site), " ", number(fvu))),
    ),
  );
}
