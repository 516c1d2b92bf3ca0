"""A circuit in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlxterp.sae.circuits.nodes import Edge, Names, Node, cut
from mlxterp.sae.features.display import visible
from mlxterp.sae.visualization import Table

PART_OF = "part_of"  # the key of facts about a whole of which a circuit is a part
COLUMNS = ("share", "consistency", "n", "measured")
OF_NODES = ("effect", "influence")
# Facts that are shares, and written as such.
SHARES = (
    "explained", "all_features", "errors", "faithfulness", "completeness", "replacement",
    "replacement_score", "completeness_score", "pruned_replacement_score",
    "pruned_completeness_score", "not_looked_at", "gap",
)  # fmt: skip
WIDEST = 48  # narrow characters of a node in a table
LONGEST = 100  # of a prompt or a fact


def edge_table(title: str, nodes: Sequence[Node], edges: Sequence[Edge], names: Names) -> Table:
    """Edges with all that is known of each."""
    columns = [name for name in COLUMNS if any(getattr(e, name) is not None for e in edges)]
    rows = (
        (
            cut(names.full(nodes[edge.source]), WIDEST),
            cut(names.full(nodes[edge.target]), WIDEST),
            f"{edge.weight:+.4g}",
            *(_cell(name, getattr(edge, name)) for name in columns),
        )
        for edge in edges
    )
    return Table(title, ("source", "target", "weight", *columns), tuple(rows))


def node_table(title: str, nodes: Sequence[Node], names: Names) -> Table:
    """Nodes with all that is known of each."""
    columns = ["value", *(name for name in OF_NODES if any(getattr(n, name) for n in nodes))]
    rows = ((cut(names.full(node), WIDEST), *_of_node(node, columns)) for node in nodes)
    return Table(title, ("node", *columns), tuple(rows))


def _of_node(node: Node, columns: Sequence[str]) -> list[str]:
    known = [(name, getattr(node, name)) for name in columns]
    return ["" if x is None else _cell(name, x) for name, x in known]


def describe(
    nodes: Sequence[Node], edges: Sequence[Edge], levels: Sequence[str], tokens: Sequence[str]
) -> str:
    """What a circuit is, in one line."""
    counts = Counter(node.kind for node in nodes)
    parts = [_counted(n, kind) for kind, n in counts.items()] or ["no nodes"]
    where = f"from {levels[0]} to {levels[-1]}" if len(levels) > 1 else "".join(levels)
    what = f"Circuit of {', '.join(parts)} and {_counted(len(edges), 'edge')}, {where}"
    return f"{what}: “{cut(visible(''.join(tokens)), LONGEST)}”" if tokens else what


def known(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts that can be said in a few words, by their names."""
    found = []
    for name, value in facts.items():
        if name == PART_OF and isinstance(value, Mapping):
            found.append(("part of", f"{value.get('n_edges', 'more')} edges"))
            found += [(f"whole {key}", x) for key, x in known(value) if key not in _COUNTS]
        elif isinstance(value, str | bool | int | float):
            shown = cut(visible(_value(name, value)), LONGEST)
            found.append((visible(str(name)).replace("_", " "), shown))
    return found


_COUNTS = ("n edges", "n nodes")


def wrapped(parts: Iterable[str]) -> str:
    """Parts of a title with commas between them, in lines of about `LONGEST` characters."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= LONGEST:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return ",\n  ".join(lines)


def _value(name: str, value: str | bool | int | float) -> str:
    if isinstance(value, float):
        return f"{value:z.1%}" if name in SHARES else f"{value:.4g}"
    return str(value)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("share", "consistency", "influence"):
        return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}" if name == "value" else f"{value:+.4g}"
    return str(value)
