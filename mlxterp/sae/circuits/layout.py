"""Where the nodes of a circuit are drawn, and the curves between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from mlxterp.sae.circuits.nodes import EMBEDDINGS, LOGITS, Edge, Names, Node, cells

Point = tuple[float, float]

HEIGHT, PITCH = 0.26, 0.36  # of a box, and of a row of them; all lengths are inches
WIDE, BETWEEN = 2.3, 1.5  # boxes and gaps of columns of levels
SLIM, NARROW, BESIDE = 0.6, 1.35, 0.12  # boxes over a prompt, by what is in them, and gaps
GUTTER, EMPTY, ROW_GAP = 0.4, 0.6, 0.8  # between columns, empty columns, and between rows
ABREAST = 14  # boxes of one row and position side by side
MARGIN, HEADING = 0.2, 0.4
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
        way.append((end[0] - WIDE / 2, end[1]))
        # Level where it begins, at each point of the way, and at the end.
        curves.append((way[0], *(point for pair in pairwise(way) for point in _level_at(*pair))))
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
    near = _near(edges)
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
    longest = max(cells(names.within(node)) for node in nodes)
    width = min(NARROW, max(SLIM, 0.22 + 0.07 * longest))
    groups: dict[tuple[int, int | None], list[int]] = defaultdict(list)
    for r, row in enumerate(rows):
        for i in row:
            groups[r, nodes[i].position].append(i)
    abreast: dict[int | None, int] = defaultdict(int)
    for (_, position), group in groups.items():
        abreast[position] = max(abreast[position], min(len(group), ABREAST))
    # Lines above each other are half a box apart.
    room = {position: n + (n == ABREAST) / 2 for position, n in abreast.items()}
    columns, marks, total = _columns(room, names, n_tokens, MARGIN + 1.25, width)
    lines = [
        max(-(-len(group) // abreast[p]) for (r, p), group in groups.items() if r == rank)
        for rank in range(len(rows))
    ]
    heights = _stacked(lines)
    headings, rules = [], []
    for rank, row in enumerate(rows):
        y = heights[rank]
        headings.append(Text(MARGIN + 0.55, y, names.level(nodes[row[0]]), 1.2))
        rules.append(y + lines[rank] * PITCH / 2 + ROW_GAP / 2)
    places: dict[int, Point] = {}

    def arrange_group(rank: int, position: int | None, group: Sequence[int]) -> None:
        n_lines = -(-len(group) // abreast[position])
        size = -(-len(group) // n_lines)
        for n, i in enumerate(group):
            line, at = divmod(n, size)
            beside = at - (min(size, len(group) - line * size) - 1) / 2
            if n_lines > 1 and len(group) % size == 0:  # edges are seen between boxes above
                beside += 0.25 if line % 2 else -0.25
            above = line - (n_lines - 1) / 2
            places[i] = (
                columns[position] + beside * (width + BESIDE),
                heights[rank] + above * PITCH,
            )

    near = _near(edges)
    for group in groups.values():
        group.sort(key=lambda i: -sum(w for _, w in near[i]))
    for _ in range(SWEEPS):
        for (rank, position), group in groups.items():
            arrange_group(rank, position, group)

        def wanted(i: int) -> tuple[bool, float]:
            weight = sum(w for _, w in near[i])
            mean = sum(places[m][0] * w for m, w in near[i]) / weight if weight else places[i][0]
            return nodes[i].kind == "error", mean

        for group in groups.values():
            group.sort(key=wanted)
    for (rank, position), group in groups.items():
        arrange_group(rank, position, group)
    below = max(rules) if rules else MARGIN
    return Layout(
        places=tuple(places[i] for i in range(len(nodes))),
        box=(width, HEIGHT),
        curves=_upwards(edges, places, width),
        headings=tuple(headings[::-1]),
        marks=tuple(Text(mark.x, below + 0.12, mark.text, mark.width) for mark in marks),
        rules=tuple(rules[::-1]),
        size=(total, below + 0.37),
    )


def _stacked(lines: Sequence[int]) -> list[float]:
    """The heights of the middle of rows of so many lines, the first row at the bottom."""
    heights, y = [], MARGIN
    for n in reversed(lines):
        heights.append(y + n * PITCH / 2)
        y += n * PITCH + ROW_GAP
    return heights[::-1]


def _near(edges: Sequence[Edge]) -> dict[int, list[tuple[int, float]]]:
    """The neighbours of each node, and the sizes of the weights between them."""
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for edge in edges:
        near[edge.source].append((edge.target, abs(edge.weight)))
        near[edge.target].append((edge.source, abs(edge.weight)))
    return near


def _upwards(
    edges: Sequence[Edge], places: Mapping[int, Point], width: float
) -> tuple[tuple[Point, ...], ...]:
    """Curves from the top of boxes to the bottom of others, side by side where there are several
    at one box."""
    starts, ends = defaultdict(list), defaultdict(list)
    for k, edge in enumerate(edges):
        starts[edge.source].append((places[edge.target][0], k))
        ends[edge.target].append((places[edge.source][0], k))
    at: dict[tuple[str, int], float] = {}
    for name, groups in (("start", starts), ("end", ends)):
        for i, group in groups.items():
            step = min(0.12, 0.7 * width / len(group))
            for n, (_, k) in enumerate(sorted(group)):
                at[name, k] = places[i][0] + (n - (len(group) - 1) / 2) * step
    curves = []
    for k, edge in enumerate(edges):
        a = at["start", k], places[edge.source][1] - HEIGHT / 2
        b = at["end", k], places[edge.target][1] + HEIGHT / 2
        reach = max(ROW_GAP / 2, 0.45 * (a[1] - b[1]))
        curves.append((a, (a[0], a[1] - reach), (b[0], b[1] + reach), b))
    return tuple(curves)


def _columns(
    room: Mapping[int | None, float], names: Names, n_tokens: int, left: float, width: float
) -> tuple[dict[int | None, float], list[Text], float]:
    """The centre of the column of each position that has boxes, with `room` for so many, what is
    written under it, and the width of all; many positions in a row without any share one column."""
    last = max([n_tokens - 1, *(position for position in room if position is not None)])
    columns: dict[int | None, float] = {}
    marks = []
    x = left
    for occupied, group in groupby(range(last + 1), key=lambda position: position in room):
        run = [*group]
        if not occupied and len(run) > 3:
            marks.append(Text(x + EMPTY / 2, 0, "…", EMPTY))
            x += EMPTY
            continue
        for position in run:
            wide = room[position] * (width + BESIDE) + GUTTER if occupied else EMPTY
            marks.append(Text(x + wide / 2, 0, names.token(position), wide - 0.05))
            if occupied:
                columns[position] = x + wide / 2
            x += wide
    if None in room:
        wide = room[None] * (width + BESIDE) + GUTTER
        columns[None] = x + wide / 2
        x += wide
    return columns, marks, x + MARGIN


def _level_at(a: Point, b: Point) -> Iterator[Point]:
    reach = 0.45 * (b[0] - a[0])
    yield from ((a[0] + reach, a[1]), (b[0] - reach, b[1]), b)
