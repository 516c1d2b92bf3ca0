// Finding, filtering and sorting features of the table.

const DENSE = 0.1;

export const SHOWN = [
  ["all", "all"],
  ["alive", "that fire"],
  ["dead", "dead"],
  ["dense", `dense (> ${100 * DENSE} %)`],
  ["labelled", "labelled"],
  ["mine", "labelled by me"],
];

const KEEPS = {
  all: () => () => true,
  alive: app => id => app.columns.firing_counts[id] > 0,
  dead: app => id => app.columns.firing_counts[id] === 0,
  dense: app => id => app.columns.firing_rates[id] > DENSE,
  labelled: app => id => Boolean(app.labels[id]),
  mine: app => id => app.labels[id]?.source === "user",
};

/** A test of features: their id, label, peaks or promoted tokens have the text. */
function finder(app, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return () => true;
  if (/^#?\d+$/.test(wanted)) {
    const id = Number(wanted.replace("#", ""));
    if (wanted.startsWith("#")) return i => i === id;
    const digits = String(id),
      texts = inTexts(app, wanted);
    return i => String(i).startsWith(digits) || texts(i);
  }
  return inTexts(app, wanted);
}

const matches = { of: null, wanted: null, found: null };

function inTexts(app, wanted) {
  if (matches.of !== app || matches.wanted !== wanted) {
    const { strings } = app.table,
      found = new Uint8Array(strings.length);
    for (let i = 0; i < strings.length; i++) if (strings[i].toLowerCase().includes(wanted)) found[i] = 1;
    Object.assign(matches, { of: app, wanted, found });
  }
  const { found } = matches,
    { peaks, promotes } = app.columns;
  const { peaks: n, promotes: m } = app.table.width;
  return id => {
    for (let i = id * n; i < (id + 1) * n; i++) if (peaks[i] >= 0 && found[peaks[i]]) return true;
    for (let i = id * m; i < (id + 1) * m; i++) if (promotes[i] >= 0 && found[promotes[i]]) return true;
    return (app.labels[id]?.text ?? "").toLowerCase().includes(wanted);
  };
}

/** The ids that `filters` keep: `{text, show, low, high, rates: [from, to] | null}` (maxima in `[low, high]`). */
export function kept(app, { text = "", show = "all", low = null, high = null, rates = null }) {
  const shown = (KEEPS[show] ?? KEEPS.all)(app),
    found = finder(app, text);
  const { maxima, firing_rates: firing } = app.columns,
    ids = [];
  for (let id = 0; id < app.n; id++) {
    if (!shown(id) || (low !== null && !(maxima[id] >= low)) || (high !== null && !(maxima[id] <= high)))
      continue;
    if (rates && !(firing[id] >= rates[0] && firing[id] < rates[1])) continue;
    if (found(id)) ids.push(id);
  }
  return Int32Array.from(ids);
}

/** Ids by a column, what is not known last; equal ones by id. */
export function sorted(app, ids, key, descending) {
  const way = descending ? -1 : 1;
  if (key === "id") return descending ? ids.slice().reverse() : ids;
  if (key === "label") {
    const by = new Intl.Collator("en", { numeric: true });
    const texts = new Map(Array.from(ids, id => [id, app.label(id)]));
    return ids.slice().sort((a, b) => {
      const [x, y] = [texts.get(a), texts.get(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1) || a - b;
      return way * by.compare(x, y) || a - b;
    });
  }
  const values =
    key === "score"
      ? Float32Array.from({ length: app.n }, (_, id) => bestScore(app.labels[id]))
      : app.columns[key];
  return ids.slice().sort((a, b) => {
    const x = values[a],
      y = values[b];
    if (x !== x || y !== y) return (x !== x ? 1 : 0) - (y !== y ? 1 : 0) || a - b;
    return way * (x - y) || a - b;
  });
}

/** The score of a label that says most: detection, else fuzzing, else that of its tokens. */
export function bestScore(label) {
  const scores = label?.scores ?? {};
  return scores.detection ?? scores.fuzzing ?? scores.tokens ?? NaN;
}

/** Up to `most` features for what was typed: exact ids, then labels, tokens they fire on, tokens they promote. */
export function suggestions(app, text, most = 8) {
  const wanted = text.trim().replace("#", "");
  const exact = /^\d+$/.test(wanted) && Number(wanted) < app.n ? [Number(wanted)] : [];
  const alive = app.columns.firing_counts;
  const found = Array.from(kept(app, { text })).filter(id => id !== exact[0]);
  const has = texts => texts.some(part => part.toLowerCase().includes(wanted.toLowerCase()));
  const fit = Array.from(found, id => (has([app.label(id)]) ? 2 : has(app.strings("peaks", id)) ? 1 : 0));
  const order = Array.from(found.keys()).sort((a, b) => fit[b] - fit[a] || alive[found[b]] - alive[found[a]]);
  return [...exact, ...order.map(i => found[i])].slice(0, most);
}
