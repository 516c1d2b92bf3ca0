"use strict";
const { tokens, layers } = JSON.parse(document.getElementById("content").textContent);
const element = (id) => document.getElementById(id);
const make = (tag, parent, text = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  parent.append(made);
  return made;
};
for (const layer of layers) {
  const bytes = Uint8Array.from(atob(layer.data), (c) => c.charCodeAt(0));
  layer.values = new Uint16Array(bytes.buffer);
}
const { n_queries: S, n_keys: T } = layers[0];
const later = T - S; // the key at which the first query stands
const state = { layer: 0, head: 0, token: null, direction: "query", at: null };
const value = (layer, head, query, key) => layers[layer].values[(head * S + query) * T + key] / 65535;
const share = (x) => Math.sqrt(Math.min(1, x)); // of the colour: small weights are to be seen too
const shown = (x) => (x > 0 && x < 0.001 ? "< 0.001" : x.toFixed(3));
const short = (layer, head) => `L${layers[layer].layer}H${layers[layer].heads[head]}`;
const full = (layer, head) => `layer ${layers[layer].layer}, head ${layers[layer].heads[head]}`;
const accent = () => getComputedStyle(document.documentElement).getPropertyValue("--accent").trim().split(" ");

function paint(canvas, width, height, of) {
  canvas.width = width;
  canvas.height = height;
  const [r, g, b] = accent().map(Number);
  const pixels = new ImageData(width, height);
  for (let y = 0, i = 0; y < height; y++)
    for (let x = 0; x < width; x++, i += 4) {
      pixels.data.set([r, g, b, Math.round(255 * share(of(y, x)))], i);
    }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function keyboard(box, move) {
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      move(...step);
    }
  });
}

const marked = (token) => (token.trim() ? token : token.replaceAll(" ", "␣"));
const within = (x, n) => Math.max(0, Math.min(n - 1, x));

// Heads
const thumbs = layers.map((layer, l) => {
  const row = make("div", element("heads"));
  row.className = "layer";
  make("span", row, `L${layer.layer}`);
  return layer.heads.map((_, h) => {
    const button = make("button", row);
    button.setAttribute("aria-label", full(l, h));
    button.title = short(l, h);
    button.addEventListener("click", () => choose(l, h));
    make("canvas", button);
    return button;
  });
});
element("heads").parentElement.classList.toggle("many", layers.some((layer) => layer.heads.length > 12));
keyboard(element("heads"), (x, y) => {
  const layer = within(state.layer + y, layers.length);
  choose(layer, within(state.head + x, layers[layer].heads.length), true);
});

function choose(layer, head, focus = false) {
  Object.assign(state, { layer, head });
  update();
  if (focus) {
    thumbs[layer][head].focus();
    thumbs[layer][head].scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

// The map
const map = element("map");
map.style.height = `calc(var(--map) * ${S / T})`;
for (const [id, list] of [["keys", tokens], ["queries", tokens.slice(later)]]) {
  const size = parseFloat(getComputedStyle(map).width) / T;
  if (size >= 9) for (const token of list.map(marked)) make("span", element(id), token.length > 16 ? `${token.slice(0, 15)}…` : token);
}
map.addEventListener("mousemove", (event) => {
  const box = map.getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) / box.width * T);
  const y = Math.floor((event.clientY - box.top) / box.height * S);
  point(within(y, S), within(x, T));
});
map.addEventListener("mouseleave", () => point(null));
map.addEventListener("click", () => state.at && pick(state.at[0] + later));
map.addEventListener("focus", () => state.at ?? point(S - 1, 0));
keyboard(map, (x, y) => {
  const [query, key] = state.at ?? [S - 1, 0];
  point(within(query + y, S), within(key + x, T));
});

function point(query, key) {
  state.at = query === null ? null : [query, key];
  place(element("cell"), state.at && { x: key, y: query, width: 1, height: 1 });
  readout();
}

function place(box, at) {
  box.hidden = !at;
  if (!at) return;
  const parts = { left: at.x / T, top: at.y / S, width: at.width / T, height: at.height / S };
  for (const [side, part] of Object.entries(parts)) box.style[side] = `${100 * part}%`;
}

function readout() {
  const line = element("readout");
  line.replaceChildren();
  if (!state.at) {
    line.append("Point at a cell, or move through the map by arrow keys.");
    return;
  }
  const [query, key] = state.at;
  make("b", line, shown(value(state.layer, state.head, query, key)));
  line.append(" from ");
  make("code", line, marked(tokens[query + later]));
  line.append(` (${query + later}) to `);
  make("code", line, marked(tokens[key]));
  line.append(` (${key})`);
}

// The text
const words = tokens.map((token, i) => {
  const button = make("button", element("tokens"), token);
  button.setAttribute("aria-label", `${token}, position ${i}`);
  button.addEventListener("click", () => pick(state.token === i ? null : i));
  return button;
});
keyboard(element("tokens"), (x, y) => {
  const i = within(words.indexOf(document.activeElement) + x + y, tokens.length);
  pick(i);
  words[i].focus();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && pick(null));
for (const radio of document.getElementsByName("direction"))
  radio.addEventListener("change", () => {
    state.direction = radio.value;
    update();
  });

function pick(token) {
  state.token = token;
  update();
}

// How much the chosen token attends to another, or is attended to by it; none where it is no query.
function weight(layer, head, other) {
  const [query, key] = state.direction === "query" ? [state.token, other] : [other, state.token];
  return query < later ? 0 : value(layer, head, query - later, key);
}

function mean(layer, other) {
  const n = layers[layer].heads.length;
  return layers[layer].heads.reduce((sum, _, head) => sum + weight(layer, head, other), 0) / n;
}

// Across layers
const strips = layers.map((layer, l) => {
  const strip = make("div", element("layers"));
  strip.className = "strip";
  strip.style.setProperty("--n", T);
  const button = make("button", strip, `L${layer.layer}`);
  button.addEventListener("click", () => choose(l, within(state.head, layer.heads.length)));
  const canvas = make("canvas", strip);
  canvas.addEventListener("mousemove", (event) => {
    const other = within(Math.floor(event.offsetX / canvas.clientWidth * T), T);
    const line = element("mean");
    line.replaceChildren();
    make("b", line, shown(mean(l, other)));
    line.append(` is the mean of L${layer.layer} at `);
    make("code", line, marked(tokens[other]));
    line.append(` (${other})`);
  });
  canvas.addEventListener("mouseleave", () => element("mean").replaceChildren());
  return { button, canvas };
});

function draw() {
  layers.forEach((layer, l) => layer.heads.forEach((_, h) => {
    const canvas = thumbs[l][h].firstChild;
    canvas.className = T > 44 ? "fine" : "";
    paint(canvas, T, S, (y, x) => value(l, h, y, x));
  }));
  paint(element("legend").children[1], 101, 1, (_, x) => x / 100);
  update();
}

function update() {
  const { layer, head, token } = state;
  thumbs.forEach((row, l) => row.forEach((button, h) => {
    const chosen = l === layer && h === head;
    button.setAttribute("aria-pressed", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }));
  element("map-title").textContent = short(layer, head);
  paint(map.firstChild, T, S, (y, x) => value(layer, head, y, x));
  const row = token !== null && (state.direction === "query"
    ? token >= later && { x: 0, y: token - later, width: T, height: 1 }
    : { x: token, y: 0, width: 1, height: S });
  place(element("row"), row);
  readout();
  const [r, g, b] = accent();
  words.forEach((word, i) => {
    const x = token === null ? 0 : weight(layer, head, i);
    word.style.background = `rgb(${r} ${g} ${b} / ${0.75 * share(x)})`;
    word.title = token === null ? "" : shown(x);
    word.setAttribute("aria-pressed", i === token);
    word.tabIndex = i === (token ?? 0) ? 0 : -1;
  });
  const which = state.direction === "query" ? "What it attends to" : "What attends to it";
  element("flow-title").textContent = token === null
    ? "Choose a token to see it in all layers" : `${which} in each layer, as a mean over heads`;
  element("layers").hidden = element("mean").hidden = token === null;
  strips.forEach(({ button, canvas }, l) => {
    button.setAttribute("aria-label", `Show layer ${layers[l].layer}`);
    if (token !== null) paint(canvas, T, 1, (_, x) => mean(l, x));
  });
}

const heads = layers.reduce((sum, layer) => sum + layer.heads.length, 0);
const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
element("facts").textContent = `${count(layers.length, "layer")}, ${count(heads, "head")}, ${count(T, "token")}; rows are queries, columns are keys`;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
