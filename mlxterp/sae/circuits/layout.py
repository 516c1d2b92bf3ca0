"""Where the nodes of a circuit are drawn, and the curves between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from mlxterp.sae.circuits.nodes import EMBEDDINGS, LOGITS, Edge, Names, Node

Point = tuple[float, float]

HEIGHT, PITCH = 0.26, 0.36  # of a box, and of a row of them; all lengths are inches
WIDE, BETWEEN = 2.3, 1.5  # boxes and gaps of columns of levels
NARROW, GUTTER, EMPTY = 1.35, 0.55, 0.6  # boxes, gaps and empty columns over a prompt
MARGIN, HEADING, ROW_GAP = 0.2, 0.4, 0.45
SWEEPS = 12


@dataclass(frozen=True)
class Text:
    """Some text, and the point at its centre."""

    x: float
    y: float
    text: str
    width: float


@dataclass(frozen=True)
class Layout:
    """Boxes of one size `box`, by their centres `places`, in a plane with its origin at the top
    left. `curves` are the points of cubic Bézier curves, one for each edge; `headings` name the
    levels, `marks` are the tokens under a prompt's columns, and `rules` the heights of thin lines.
    """

    places: tuple[Point, ...]
    box: tuple[float, float]
    curves: tuple[tuple[Point, ...], ...]
    headings: tuple[Text, ...]
    marks: tuple[Text, ...]
    rules: tuple[float, ...]
    size: tuple[float, float]


def arrange(
    nodes: Sequence[Node], edges: Sequence[Edge], levels: Sequence[str], tokens: Sequence[str] = ()
) -> Layout:
    """Levels from left to right, or, where nodes have positions in a prompt, from the bottom up
    over the positions."""
    order = {EMBEDDINGS: 0, LOGITS: len(levels) + 1} | {x: i + 1 for i, x in enumerate(levels)}
    rows: dict[int, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        rows[order[_level(node)]].append(i)
    ordered = [rows[rank] for rank in sorted(rows)]
    if any(node.position is not None for node in nodes):
        return _over_prompt(nodes, edges, ordered, Names(levels, tokens), len(tokens))
    return _side_by_side(nodes, edges, ordered)


def _level(node: Node) -> str:
    return {"embedding": EMBEDDINGS, "logit": LOGITS}.get(node.kind, node.site)


def _side_by_side(nodes: Sequence[Node], edges: Sequence[Edge], columns: list[list[int]]) -> Layout:
    columns = _untangled(nodes, edges, columns)
    longest = max(map(len, columns), default=1)
    step, top = WIDE + BETWEEN, HEADING + MARGIN
    places: dict[int, Point] = {}
    gaps: list[list[float]] = []
    for c, column in enumerate(columns):
        pitch = min(longest * PITCH / len(column), 2.5 * PITCH)
        first = top + (longest * PITCH - (len(column) - 1) * pitch) / 2
        for i, node in enumerate(column):
            places[node] = MARGIN + WIDE / 2 + c * step, first + i * pitch
        gaps.append([first + (i - 0.5) * pitch for i in range(len(column) + 1)])
    rank = {node: c for c, column in enumerate(columns) for node in column}
    curves = []
    for k, edge in enumerate(edges):
        a, b = rank[edge.source], rank[edge.target]
        start, end = places[edge.source], places[edge.target]
        way = [(start[0] + WIDE / 2, start[1])]
        for c in range(a + 1, b):
            # Between two boxes of the column, so that the edge seems to end at neither of them.
            straight = start[1] + (end[1] - start[1]) * (c - a) / (b - a)
            y = min(gaps[c], key=lambda gap: abs(gap - straight)) + 0.012 * (k % 5 - 2)
            way += [(MARGIN + c * step, y), (MARGIN + c * step + WIDE, y)]
        curves.append(_curve([*way, (end[0] - WIDE / 2, end[1])], start, end, BETWEEN, WIDE))
    headings = tuple(
        Text(MARGIN + WIDE / 2 + c * step, MARGIN + 0.1, _level(nodes[column[0]]), WIDE + 1.0)
        for c, column in enumerate(columns)
    )
    n = max(1, len(columns))
    return Layout(
        places=tuple(places[i] for i in range(len(nodes))),
        box=(WIDE, HEIGHT),
        curves=tuple(curves),
        headings=headings,
        marks=(),
        rules=(),
        size=(2 * MARGIN + n * WIDE + (n - 1) * BETWEEN, top + longest * PITCH + MARGIN),
    )


def _untangled(
    nodes: Sequence[Node], edges: Sequence[Edge], columns: list[list[int]]
) -> list[list[int]]:
    """Each node near the weighted mean height of its neighbours, errors last (Sugiyama, Tagawa and
    Toda 1981)."""
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for edge in edges:
        near[edge.source].append((edge.target, abs(edge.weight)))
        near[edge.target].append((edge.source, abs(edge.weight)))
    columns = [[*column] for column in columns]
    rank = {node: c for c, column in enumerate(columns) for node in column}
    heights = dict(pair for column in columns for pair in _heights(column))
    for sweep in range(SWEEPS):
        forwards = sweep % 2 == 0
        for c in range(len(columns)) if forwards else reversed(range(len(columns))):

            def wanted(node: int, c: int = c, forwards: bool = forwards) -> tuple[bool, float]:
                others = [(m, w) for m, w in near[node] if w > 0 and (rank[m] < c) == forwards]
                total = sum(w for _, w in others)
                mean = sum(heights[m] * w for m, w in others) / total if total else heights[node]
                return nodes[node].kind == "error", mean

            columns[c].sort(key=wanted)
            heights.update(_heights(columns[c]))
    return columns


def _heights(column: Sequence[int]) -> list[tuple[int, float]]:
    return [(node, i - (len(column) - 1) / 2) for i, node in enumerate(column)]


def _over_prompt(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    rows: list[list[int]],
    names: Names,
    n_tokens: int,
) -> Layout:
    flow: dict[int, float] = defaultdict(float)
    for edge in edges:
        flow[edge.source] += abs(edge.weight)
        flow[edge.target] += abs(edge.weight)
    left = MARGIN + 1.25
    columns, marks, width = _columns(nodes, names, n_tokens, left)
    places: dict[int, Point] = {}
    headings, rules = [], []
    y = MARGIN
    for row in reversed(rows):
        cells: dict[int | None, list[int]] = defaultdict(list)
        for node in sorted(row, key=lambda i: (nodes[i].kind == "error", -flow[i])):
            cells[nodes[node].position].append(node)
        tallest = max(map(len, cells.values()))
        for position, cell in cells.items():
            first = y + (tallest - len(cell)) * PITCH / 2 + PITCH / 2
            for i, node in enumerate(cell):
                places[node] = columns[position], first + i * PITCH
        headings.append(
            Text(MARGIN + 0.55, y + tallest * PITCH / 2, names.level(nodes[row[0]]), 1.2)
        )
        y += tallest * PITCH + ROW_GAP
        rules.append(y - ROW_GAP / 2)
    marks = tuple(Text(mark.x, y, mark.text, mark.width) for mark in marks)
    curves = []
    for edge in edges:
        start, end = places[edge.source], places[edge.target]
        side = -1 if end[0] < start[0] else 1
        way = [(start[0] + side * NARROW / 2, start[1]), (end[0] - side * NARROW / 2, end[1])]
        curves.append(_curve(way, start, end, GUTTER, NARROW))
    return Layout(
        places=tuple(places[i] for i in range(len(nodes))),
        box=(NARROW, HEIGHT),
        curves=tuple(curves),
        headings=tuple(headings),
        marks=marks,
        rules=tuple(rules),
        size=(width, y + 0.25),
    )


def _columns(
    nodes: Sequence[Node], names: Names, n_tokens: int, left: float
) -> tuple[dict[int | None, float], list[Text], float]:
    """The centre of the column of each position that has nodes, what is written under it, and the
    width of all; where many positions in a row have none they share one column."""
    used = {node.position for node in nodes}
    last = max([n_tokens - 1, *(position for position in used if position is not None)])
    columns: dict[int | None, float] = {}
    marks = []
    x = left
    for occupied, group in groupby(range(last + 1), key=lambda position: position in used):
        run = [*group]
        if not occupied and len(run) > 3:
            marks.append(Text(x + EMPTY / 2, 0, "…", EMPTY))
            x += EMPTY
            continue
        for position in run:
            width = NARROW + GUTTER if occupied else EMPTY
            marks.append(Text(x + width / 2, 0, names.token(position), width - 0.05))
            if occupied:
                columns[position] = x + width / 2
            x += width
    if None in used:
        columns[None] = x + (NARROW + GUTTER) / 2
        x += NARROW + GUTTER
    return columns, marks, x + MARGIN


def _curve(
    way: Sequence[Point], start: Point, end: Point, gap: float, width: float
) -> tuple[Point, ...]:
    """Smooth curves that are level where they begin, at each point of the way, and at the end."""
    if start[0] == end[0]:
        # Both at one position: around the right side, the farther the wider.
        side, out = start[0] + width / 2, min(0.9 * gap, 0.2 + 0.06 * abs(end[1] - start[1]))
        return (side, start[1]), (side + out, start[1]), (side + out, end[1]), (side, end[1])
    return tuple([way[0], *(point for pair in pairwise(way) for point in _level_at(*pair))])


def _level_at(a: Point, b: Point) -> Iterator[Point]:
    reach = 0.45 * (b[0] - a[0])
    yield from ((a[0] + reach, a[1]), (b[0] - reach, b[1]), b)
