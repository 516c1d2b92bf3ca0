// Where everything comes from: a server, or the file that the page is part of.

import { EmbeddedSource } from "./embedded.js";
import { Kept, Source } from "./reader.js";

/** The source of this page. */
export async function openSource() {
  const bundle = document.getElementById("mlxterp-bundle");
  return bundle ? new EmbeddedSource(JSON.parse(bundle.textContent)) : new HttpSource();
}

async function answer(path, options = {}) {
  let response;
  try {
    response = await fetch(`/api/${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?", { cause: error });
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error || `The server answers ${response.status}.`);
}

const sent = (method, content) => ({
  method,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(content),
});

/** The page's own server. */
class HttpSource extends Source {
  #others = new Kept(16);

  async _read(name, kind) {
    const response = await answer(name);
    return kind === "json" ? response.json() : response.arrayBuffer();
  }

  other(i) {
    return this.#others.get(i, async () => new HttpSource(`others/${i}/`));
  }
  async together(features) {
    return (await answer("together", sent("POST", { features }))).json();
  }
  async text(request) {
    return (await answer("text", sent("POST", request))).json();
  }

  async setLabel(id, text) {
    return (await (await answer(`labels/${id}`, sent("PUT", { text }))).json()).label;
  }

  async steer(request, onPiece, signal) {
    const response = await answer("steer", { ...sent("POST", request), signal });
    for await (const { name, data } of events(response.body)) {
      if (name === "piece") onPiece(data);
      else if (name === "end") return data;
      else if (name === "error") throw new Error(data.error);
    }
    throw new Error("The server ended the text too early.");
  }
}

/** The server-sent events of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const of = field =>
        block
          .split("\n")
          .filter(line => line.startsWith(`${field}:`))
          .map(line => line.slice(field.length + 1).trimStart());
      const data = of("data").join("\n");
      if (data) yield { name: of("event")[0] ?? "message", data: JSON.parse(data) };
    }
  }
}
