// Starts the page: reads what is known, and shows the view that the address names.

import { App } from "./app.js";
import { h, icon, say } from "./dom.js";
import { listen, showKeys } from "./keyboard.js";
import { picker } from "./parts/picker.js";
import { featureLink, go, link, parse } from "./router.js";
import { openSource } from "./source.js";
import { isDark, startTheme, turnTheme } from "./theme.js";
import * as circuit from "./views/circuit.js";
import * as compare from "./views/compare.js";
import * as feature from "./views/feature.js";
import * as overview from "./views/overview.js";
import * as steer from "./views/steer.js";
import * as text from "./views/text.js";
import * as together from "./views/together.js";

const VIEWS = { overview, feature, text, together, steer, circuit, compare };
const SUN =
  "M8 4.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7ZM8 .5v2M8 13.5v2M.5 8h2M13.5 8h2M2.7 2.7l1.4 1.4M11.9 11.9l1.4 1.4M2.7 13.3l1.4-1.4M11.9 4.1l1.4-1.4";
const MOON = "M13.5 9.8A6 6 0 0 1 6.2 2.5a6 6 0 1 0 7.3 7.3Z";
const main = document.getElementById("main");

let app = null,
  ending = new AbortController(),
  shown = null;

/** Shows the view of the address. A view may take over a new address itself, by `update`. */
async function show() {
  const route = parse(location.hash);
  const view = VIEWS[route.view];
  if (shown?.name === route.view && shown.update?.(route)) return;
  ending.abort();
  ending = new AbortController();
  const { signal } = ending,
    isNew = shown?.name !== route.view;
  shown = { name: route.view };
  for (const tab of document.querySelectorAll("#tabs a")) {
    if (tab.dataset.view === route.view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (!view) return problem(`There is no view named ${route.view}.`);
  try {
    const found = await view.show(app, route, signal);
    if (signal.aborted) return;
    shown.update = found.update;
    main.replaceChildren(found.element);
    main.className = route.view;
    document.title = `${found.title} · ${app.meta.title}`;
    if (isNew) {
      scrollTo(0, 0);
      main.focus({ preventScroll: true });
    }
    say(found.title);
    found.shown?.();
  } catch (error) {
    if (!signal.aborted) problem(error.message);
  }
}

function problem(message) {
  main.className = "problem";
  main.replaceChildren(
    h(
      "div",
      { class: "empty", role: "alert" },
      h("h1", {}, "That did not work"),
      h("p", {}, h("bdi", {}, message)),
      h("p", {}, h("a", { href: "#/overview" }, "To the overview")),
    ),
  );
}

function drawTheme() {
  const button = document.getElementById("theme"),
    name = isDark() ? "Light" : "Dark";
  button.replaceChildren(icon(isDark() ? SUN : MOON));
  button.setAttribute("aria-label", name);
  button.title = `${name} (t)`;
}

function tabs() {
  const has = { circuit: app.meta.circuits.length, compare: app.meta.compare.length };
  const names = Object.keys(VIEWS).filter(name => has[name] !== 0);
  document.getElementById("tabs").replaceChildren(
    ...names.map(name => {
      const tab = h("a", { href: link(name), "data-view": name }, VIEWS[name].name);
      return tab;
    }),
  );
  return names;
}

const currentFeature = () => {
  const { view, args } = parse(location.hash);
  return view === "feature" ? Number(args[0]) : null;
};

function step(by) {
  const id = currentFeature();
  if (id === null) return document.querySelector("#main [role=grid]")?.focus();
  const next = app.beside(id, by);
  if (next === null) say(`This is the ${by > 0 ? "last" : "first"} one.`);
  else go(featureLink(next));
}

function random() {
  const id = app.random();
  if (id !== null) go(featureLink(id));
}

async function start() {
  startTheme();
  drawTheme();
  document.addEventListener("themechange", drawTheme);
  document.getElementById("theme").addEventListener("click", turnTheme);
  document.getElementById("keys").addEventListener("click", showKeys);
  document.getElementById("skip").addEventListener("click", event => {
    event.preventDefault();
    main.focus();
  });
  main.replaceChildren(h("p", { class: "wait" }, "Reading …"));
  try {
    app = await App.of(await openSource());
  } catch (error) {
    return problem(error.message);
  }
  document.getElementById("title").textContent = app.meta.title;
  const views = tabs();
  document.getElementById("jump").append(
    picker(app, {
      name: "Go to a feature",
      placeholder: "Go to feature …  /",
      onPick: id => go(featureLink(id)),
    }),
  );
  listen({ current: () => parse(location.hash).view, views, step, random, turn: turnTheme });
  addEventListener("hashchange", show);
  await show();
  return undefined;
}

start();
