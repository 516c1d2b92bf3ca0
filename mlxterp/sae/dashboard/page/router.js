// Deep links: `#/view/argument?name=value`.

/** What a hash says: `{view, args, query}`. */
export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, ...args] = path.split("/").map(part => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { view: view || "overview", args, query: new URLSearchParams(query) };
}

/** The hash of a view; names without a value are left out. */
export function link(view, args = [], query = {}) {
  const kept = Object.entries(query).filter(
    ([, value]) => value !== null && value !== undefined && value !== "",
  );
  const search = new URLSearchParams(kept).toString().replaceAll("%2C", ",");
  return `#/${[view, ...args].map(encodeURIComponent).join("/")}${search ? `?${search}` : ""}`;
}

export const featureLink = id => link("feature", [id]);

/** Whole numbers of a list such as `3,14`, within `[0, n)`, each once. */
export function ids(text, n) {
  const found = (text ?? "")
    .split(",")
    .filter(part => /^\d+$/.test(part.trim()))
    .map(Number);
  return [...new Set(found)].filter(id => id < n);
}

/** Goes to a hash, as a step that the back button undoes. */
export function go(hash) {
  location.hash = hash;
}

/** Lets the address say what is shown, without a step and without drawing anew. */
export function remember(view, args, query) {
  const hash = link(view, args, query);
  if (hash !== location.hash) history.replaceState(null, "", hash);
}
