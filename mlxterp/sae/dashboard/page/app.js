// What all views share: the source, what is known of all features, and which of them are gone through.

/** Everything about a coder that fits in memory: facts, table, labels. */
export class App {
  constructor(source, meta, table, labels) {
    Object.assign(this, { source, meta, table, labels, columns: table.columns, n: table.n });
    this.order = Int32Array.from({ length: table.n }, (_, i) => i);
    this.described = "all features";
    this.seen = null; // the feature that was looked at last
  }

  static async of(source) {
    const [meta, table, labels] = await Promise.all([source.meta(), source.table(), source.labels()]);
    return new App(source, meta, table, labels);
  }

  label(id) {
    return this.labels[id]?.text ?? "";
  }
  included(id) {
    return !this.columns.included || this.columns.included[id] === 1;
  }
  isDead(id) {
    return this.columns.firing_counts[id] === 0;
  }

  /** The texts of a row of a column that points to strings. */
  strings(column, id) {
    const width = this.table.width[column],
      found = [];
    for (let i = id * width; i < (id + 1) * width; i++) {
      const at = this.columns[column][i];
      if (at >= 0 && this.table.strings[at] !== "") found.push(this.table.strings[at]);
    }
    return found;
  }

  /** A feature in a few words: its label, or the tokens at its strongest examples. */
  words(id) {
    if (this.label(id)) return this.label(id);
    if (this.isDead(id)) return "never fires";
    return this.strings("peaks", id)
      .map(text => `‘${text}’`)
      .join(" ");
  }

  /** Which features previous and next go through, in which order. */
  goThrough(order, described) {
    this.order = order;
    this.described = described;
  }

  /** The feature `step` places further in that order, of those that can be shown. */
  beside(id, step) {
    const { order } = this,
      at = order.indexOf(id);
    if (at < 0) {
      for (let i = id + step; i >= 0 && i < this.n; i += step) if (this.included(i)) return i;
      return null;
    }
    for (let i = at + step; i >= 0 && i < order.length; i += step)
      if (this.included(order[i])) return order[i];
    return null;
  }

  /** Any feature that fires. */
  random() {
    const alive = [];
    for (let i = 0; i < this.n; i++) if (this.included(i) && !this.isDead(i)) alive.push(i);
    return alive.length ? alive[Math.floor(Math.random() * alive.length)] : null;
  }
}

/** Feature ids by a number of each, largest first. */
export function ranked(values, most) {
  const order = Array.from(values.keys());
  return order.sort((a, b) => values[b] - values[a] || a - b).slice(0, most);
}
