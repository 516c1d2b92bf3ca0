// A table of any number of rows, of which those in view are in the document.

import { button, h } from "../dom.js";
import { whole } from "../format.js";

const ROW = 34,
  SPARE = 6;

/**
 * A table of features: `columns` are `{key, title, width, draw(id) -> node or text, number, descending, hint}`,
 * `onSort(key, descending)`, `onOpen(id)`, `onPoint(id | null)`. `show(ids, sort)` gives it rows.
 */
export function virtualTable({ columns, name, height = 560, onSort, onOpen, onPoint = () => {}, signal }) {
  const body = h("div", { class: "rows", role: "rowgroup" });
  const template = columns.map(column => column.width).join(" ");
  const heads = columns.map(column =>
    h(
      "div",
      { role: "columnheader", class: column.number ? "number" : "" },
      column.key
        ? button([column.title, h("span", { class: "way", "aria-hidden": "true" })], () => turn(column), {
            title: column.hint ?? null,
          })
        : column.title,
    ),
  );
  const head = h(
    "div",
    { class: "row head", role: "row", "aria-rowindex": 1, vars: { "grid-template-columns": template } },
    heads,
  );
  const scroll = h(
    "div",
    { class: "table", role: "grid", "aria-label": name, tabindex: 0, vars: { height: `${height}px` } },
    h("div", { role: "rowgroup", class: "heads" }, head),
    body,
  );
  const empty = h("p", { class: "none", hidden: true }, "No feature is like that.");
  const drawn = new Map();
  let ids = [],
    sort = { key: "id", descending: false },
    current = 0,
    chosen = null;

  function turn(column) {
    const same = sort.key === column.key;
    onSort(column.key, same ? !sort.descending : Boolean(column.descending));
  }

  function row(at) {
    const id = ids[at];
    const element = h(
      "div",
      {
        class: "row",
        role: "row",
        id: `row-${id}`,
        "aria-rowindex": at + 2,
        vars: { top: `${at * ROW}px`, "grid-template-columns": template },
      },
      columns.map(column =>
        h("div", { role: "gridcell", class: column.number ? "number" : "" }, column.draw(id)),
      ),
    );
    element.dataset.at = at;
    element.setAttribute("aria-selected", String(at === current));
    if (id === chosen) element.classList.add("chosen");
    return element;
  }

  function refresh() {
    const room = scroll.clientHeight - head.offsetHeight;
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
    const last = Math.min(ids.length, Math.ceil((scroll.scrollTop + room) / ROW) + SPARE);
    for (const [at, element] of drawn)
      if (at < first || at >= last) {
        element.remove();
        drawn.delete(at);
      }
    for (let at = first; at < last; at++)
      if (!drawn.has(at)) {
        const element = row(at);
        drawn.set(at, element);
        body.append(element);
      }
  }

  function move(to, quietly = false) {
    if (!ids.length) return;
    drawn.get(current)?.setAttribute("aria-selected", "false");
    current = Math.max(0, Math.min(ids.length - 1, to));
    const room = scroll.clientHeight - head.offsetHeight,
      top = current * ROW;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    else if (top + ROW > scroll.scrollTop + room) scroll.scrollTop = top + ROW - room;
    refresh();
    drawn.get(current)?.setAttribute("aria-selected", "true");
    scroll.setAttribute("aria-activedescendant", `row-${ids[current]}`);
    if (!quietly) onPoint(ids[current]);
  }

  const under = event => {
    const element = event.target.closest?.(".row[data-at]");
    return element ? Number(element.dataset.at) : null;
  };
  scroll.addEventListener("scroll", refresh, { passive: true });
  body.addEventListener("click", event => {
    const at = under(event);
    if (at === null || event.target.closest("a, button") || event.ctrlKey || event.metaKey) return;
    move(at);
    onOpen(ids[at]);
  });
  body.addEventListener("pointerover", event => {
    const at = under(event);
    onPoint(at === null ? null : ids[at]);
  });
  body.addEventListener("pointerleave", () => onPoint(null));
  scroll.addEventListener("keydown", event => {
    if (event.target !== scroll) return;
    const page = Math.floor(scroll.clientHeight / ROW) - 2;
    const to = {
      ArrowDown: current + 1,
      j: current + 1,
      ArrowUp: current - 1,
      k: current - 1,
      PageDown: current + page,
      PageUp: current - page,
      Home: 0,
      End: ids.length - 1,
    }[event.key];
    if (to !== undefined) move(to);
    else if (event.key === "Enter" && ids.length) onOpen(ids[current]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const observer = new ResizeObserver(refresh);
  observer.observe(scroll);
  signal.addEventListener("abort", () => observer.disconnect());

  const element = h("div", { class: "table-box" }, scroll, empty);
  return {
    element,
    focus: () => scroll.focus(),
    /** Rows, and which column they are sorted by. */
    show(newIds, newSort, keepPlace = false) {
      const id = ids[current];
      [ids, sort] = [newIds, newSort];
      for (const old of drawn.values()) old.remove();
      drawn.clear();
      body.style.height = `${ids.length * ROW}px`;
      scroll.setAttribute("aria-rowcount", ids.length + 1);
      empty.hidden = ids.length > 0;
      columns.forEach((column, i) => {
        const on = column.key === sort.key;
        heads[i].setAttribute("aria-sort", !on ? "none" : sort.descending ? "descending" : "ascending");
      });
      current = keepPlace ? Math.max(0, ids.indexOf(id)) : 0;
      if (!keepPlace) scroll.scrollTop = 0;
      refresh();
      move(current, true);
    },
    /** Marks a feature's row and brings it into view. */
    choose(id) {
      chosen = id;
      for (const [at, row] of drawn) row.classList.toggle("chosen", ids[at] === id);
      const at = ids.indexOf(id);
      if (at >= 0) move(at, true);
    },
    get size() {
      return whole(ids.length);
    },
  };
}
