// Elements are made from plain values; text only ever enters as text.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** An element: `on…` are listeners, `vars` style properties, children nodes or texts. */
export const h = (name, attributes = {}, ...children) =>
  filled(document.createElement(name), attributes, children);

/** An element of a drawing. */
export const svg = (name, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, name), attributes, children);

/** A text of unknown direction. */
export const bdi = (text, attributes = {}) => h("bdi", attributes, text);

/** A drawing of an icon from its paths, in a square of 16. */
export const icon = path =>
  svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, svg("path", { d: path }));

/** A button; `press` makes it one that stays down or not. */
export function button(text, click, attributes = {}) {
  return h("button", { type: "button", onclick: click, ...attributes }, text);
}

/** A choice of one of `[value, text]`. */
export function select(name, options, chosen, change) {
  const field = h(
    "select",
    { onchange: () => change(field.value) },
    options.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen) }, text)),
  );
  return h("label", { class: "field" }, h("span", {}, name), field);
}

/** A few choices beside each other, of which one is on. */
export function segments(name, options, chosen, change) {
  const group = h("div", { class: "segments", role: "group", "aria-label": name });
  const draw = value =>
    [...group.children].forEach(part =>
      part.setAttribute("aria-pressed", String(part.value === String(value))),
    );
  for (const [value, text] of options)
    group.append(
      button(
        text,
        () => {
          draw(value);
          change(value);
        },
        { value: String(value) },
      ),
    );
  draw(chosen);
  return group;
}

/** The colours of the style sheet as a canvas wants them. */
export function colours(...names) {
  const probe = document.body.appendChild(h("span", { hidden: true }));
  const found = names.map(name => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return found;
}

/** A canvas context whose unit is a CSS pixel, cleared. */
export function context2d(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return pen;
}

/** Calls `draw` when an element gets another width, until `signal` ends. */
export function onResize(element, signal, draw) {
  let width = 0;
  const observer = new ResizeObserver(() => {
    if (element.clientWidth === width) return;
    width = element.clientWidth;
    requestAnimationFrame(() => {
      if (!signal.aborted) draw(width);
    });
  });
  observer.observe(element);
  signal.addEventListener("abort", () => observer.disconnect());
}

/** Tells people who hear the page. */
export function say(text) {
  document.getElementById("said").textContent = text;
}
