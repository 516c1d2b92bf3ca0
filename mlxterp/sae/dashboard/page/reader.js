// What every source can do: read a coder's data and keep what was read.

import { parseTable } from "./safetensors.js";

/** Results of calls without side effects, by key; what failed is asked for again. */
export class Kept {
  #found = new Map();
  #most;

  constructor(most) {
    this.#most = most;
  }

  get(key, make) {
    if (!this.#found.has(key)) {
      const result = make();
      result.catch(() => this.#found.delete(key));
      this.#found.set(key, result);
      if (this.#found.size > this.#most) this.#found.delete(this.#found.keys().next().value);
    }
    return this.#found.get(key);
  }
}

/** The methods that read a coder's data, over `_read(name, kind)` that gives the answer of an endpoint. */
export class Source {
  #kept = new Kept(512);

  constructor(prefix = "") {
    this.prefix = prefix;
  }

  json(name) {
    return this.#kept.get(name, () => this._read(this.prefix + name, "json"));
  }
  async binary(name) {
    return parseTable(await this._read(this.prefix + name, "binary"));
  }

  meta() {
    return this.json("meta");
  }
  table() {
    return this.#kept.get("table", () => this.#table());
  }
  async labels() {
    return (await this.json("labels")).labels;
  }
  feature(id) {
    return this.json(`features/${id}`);
  }
  circuit(i) {
    return this.json(`circuits/${i}`);
  }
  comparison(i) {
    return this.#kept.get(`matching/${i}`, () => this.#comparison(i));
  }

  async #table() {
    const [table, { strings }] = await Promise.all([this.binary("table"), this.json("strings")]);
    return { ...table, strings };
  }

  async #comparison(i) {
    const [facts, { columns }] = await Promise.all([
      this.json(`compare/${i}`),
      this.binary(`compare/${i}/table`),
    ]);
    return { ...facts, columns };
  }
}
