// The source of a saved page: parts of the file itself, without a server.

import { Source } from "./reader.js";

const decoded = new Map();

/** The bytes of a part, or null if the file has none of that name. */
function part(name) {
  const element = document.querySelector(`script[data-part="${name}"]`);
  if (!element) return null;
  const text = atob(element.textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

/** A chunk of features, the last ones used of which are kept. */
function chunkOf(name) {
  if (!decoded.has(name)) {
    const response = part(name);
    if (!response) return null;
    decoded.set(name, response.json());
    if (decoded.size > 24) decoded.delete(decoded.keys().next().value);
  }
  return decoded.get(name);
}

const refuse = async () => {
  throw new Error("This is a saved file: there is no model behind it.");
};

/** The source that reads the parts of this file, which `index` lists. */
export class EmbeddedSource extends Source {
  constructor(index, prefix = "") {
    super(prefix);
    this.index = index;
  }

  async _read(name, kind) {
    const response = part(name);
    if (!response) throw new Error(`${name} is not in this file.`);
    return kind === "json" ? response.json() : response.arrayBuffer();
  }

  async feature(id) {
    const { ids, chunk } = this.index,
      rank = ids ? ids.indexOf(id) : id;
    const features = rank < 0 ? null : await chunkOf(`${this.prefix}features/${Math.floor(rank / chunk)}`);
    if (!features?.[id]) throw new Error(`Feature ${id} is not in this file.`);
    return features[id];
  }

  async other(i) {
    return new EmbeddedSource(this.index.others[i], `others/${i}/`);
  }

  async together(ids) {
    const [meta, { columns }, ...features] = await Promise.all([
      this.meta(),
      this.table(),
      ...ids.map(id => this.feature(id).catch(() => null)),
    ]);
    const known = new Map();
    ids.forEach((a, i) =>
      features[i]?.co_active.forEach(({ id: b, count }) => {
        known.set(`${a} ${b}`, count).set(`${b} ${a}`, count);
      }),
    );
    const own = columns.kept_counts ?? columns.firing_counts;
    const counts = ids.map(a => ids.map(b => (a === b ? own[a] : (known.get(`${a} ${b}`) ?? null))));
    return { features: ids, counts, n_tokens: meta.data.n_kept_tokens ?? meta.data.n_tokens, exact: false };
  }

  text = refuse;
  steer = refuse;
  setLabel = refuse;
}
