"""A circuit as a page that needs nothing but itself: hover, click, prune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlxterp.sae.circuits.layout import Layout, Text
from mlxterp.sae.circuits.nodes import Edge, Names, Node
from mlxterp.sae.visualization import render

PIXELS = 92  # to an inch of the layout


def circuit_page(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    layout: Layout,
    names: Names,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The HTML of a page that shows a circuit: one file, which asks the network for nothing."""
    content = page_content(nodes, edges, layout, names)
    return render("circuit.html", title=title, facts=facts, content=content)


def page_content(
    nodes: Sequence[Node], edges: Sequence[Edge], layout: Layout, names: Names
) -> dict[str, Any]:
    """What a page draws, in pixels, as plain values."""
    return {
        "nodes": [_node(*pair, names) for pair in zip(nodes, layout.places, strict=True)],
        "edges": [_edge(*pair) for pair in zip(edges, layout.curves, strict=True)],
        "box": _pixels(layout.box),
        "size": _pixels(layout.size),
        "headings": [_text(heading) for heading in layout.headings],
        "marks": [_text(mark) for mark in layout.marks],
        "rules": _pixels(layout.rules),
    }


def _node(node: Node, place: tuple[float, float], names: Names) -> dict[str, Any]:
    names_of = ("site", "value", "effect", "influence")
    known = {name: getattr(node, name) for name in names_of}
    return {
        "at": _pixels(place),
        "kind": node.kind,
        "text": names.within(node),
        "name": names.full(node),
        "numbers": [[name, _shown(x)] for name, x in known.items() if x not in (None, "")],
    }


def _edge(edge: Edge, curve: Sequence[tuple[float, float]]) -> dict[str, Any]:
    (x, y), *rest = (_pixels(point) for point in curve)
    known = {name: value for name, value in asdict(edge).items() if value is not None}
    return {
        "source": known.pop("source"),
        "target": known.pop("target"),
        "weight": edge.weight if math.isfinite(edge.weight) else 0.0,
        "path": f"M{x},{y}C" + " ".join(f"{a},{b}" for a, b in rest),
        "numbers": [[name, _shown(value)] for name, value in known.items()],
    }


def _text(text: Text) -> dict[str, Any]:
    x, y, width = _pixels((text.x, text.y, text.width))
    return {"at": [x, y], "text": text.text, "width": width}


def _pixels(lengths: Sequence[float]) -> list[float]:
    return [round(PIXELS * length, 1) for length in lengths]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
