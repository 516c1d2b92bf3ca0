"""A graph of features, and what is known of every edge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from mlxterp.sae.circuits import storage
from mlxterp.sae.circuits.drawing import draw
from mlxterp.sae.circuits.layout import Layout, arrange
from mlxterp.sae.circuits.nodes import Edge, FeatureLabels, Names, Node, labelled
from mlxterp.sae.circuits.page import circuit_page, page_content
from mlxterp.sae.circuits.summary import (
    PART_OF,
    describe,
    edge_table,
    known,
    node_table,
    wrapped,
)
from mlxterp.sae.circuits.validation import Validation
from mlxterp.sae.features.display import visible
from mlxterp.sae.files import write_text
from mlxterp.sae.similarity.directions import needed
from mlxterp.sae.visualization import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # edges of a summary


class Origin(Protocol):
    """What a circuit was found in: it can intervene there."""

    @property
    def validate(self) -> Callable[..., Validation]: ...


@dataclass(frozen=True, eq=False)
class Circuit:
    """Nodes and edges, those of the largest weight first.

    `levels` are the sites in the order of the forward pass; embeddings come before them and logits
    after. `tokens` are the pieces of the prompt, empty for a circuit over a dataset. `facts` holds
    what is known of the whole, such as the share of the targets' values that the edges explain.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    levels: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None

    def __post_init__(self) -> None:
        for node in self.nodes:
            if node.kind in ("feature", "error") and node.site not in self.levels:
                raise ValueError(f"{node} is at none of the levels {list(self.levels)}.")
        if len({node.key for node in self.nodes}) < len(self.nodes):
            key = Counter(node.key for node in self.nodes).most_common(1)[0][0]
            raise ValueError(f"nodes must differ from each other; several are {key}.")
        for edge in self.edges:
            if not all(0 <= end < len(self.nodes) for end in (edge.source, edge.target)):
                raise ValueError(f"{edge} must be between two of {len(self.nodes)} nodes.")

    def strongest(self, n: int = SHOWN, errors: bool = False) -> tuple[Edge, ...]:
        """The `n` edges of the largest weights of either sign, without those of errors unless
        they are asked for."""
        known = [e for e in self.edges if errors or not self._of_error(e)]
        return tuple(sorted(known, key=_order)[:n])

    def restricted(self, min_weight: float | None = None, n_edges: int | None = None) -> Circuit:
        """A circuit of fewer edges, without nodes that have none.

        Kept are edges whose weight of either sign is `min_weight` or more, and of these the
        `n_edges` strongest. Where there are more, errors are not counted: of their edges to the
        same targets as many again may stay, if they are not weaker than all that are counted.
        `facts` of the whole are then in `facts["part_of"]`. Raises `ValueError` for numbers below
        zero.
        """
        for name, value in {"min_weight": min_weight, "n_edges": n_edges}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}.")
        kept = [e for e in self.edges if min_weight is None or abs(e.weight) >= min_weight]
        if n_edges is not None and len(kept) > n_edges:
            features = sorted((e for e in kept if not self._of_error(e)), key=_order)[:n_edges]
            least = min((abs(e.weight) for e in features), default=math.inf)
            targets = {e.target for e in features}
            errors = sorted(
                (e for e in kept if self._of_error(e) and e.target in targets), key=_order
            )
            errors = [e for e in errors if abs(e.weight) >= least][:n_edges]
            chosen = {id(e) for e in (*features, *errors)}
            kept = [e for e in kept if id(e) in chosen]
        if len(kept) == len(self.edges):
            return self
        used = sorted({end for edge in kept for end in (edge.source, edge.target)})
        number = {old: new for new, old in enumerate(used)}
        counts = {"n_nodes": len(self.nodes), "n_edges": len(self.edges)}
        whole = self.facts.get(PART_OF) or {**self.facts, **counts}
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in used),
            edges=tuple(replace(e, source=number[e.source], target=number[e.target]) for e in kept),
            facts={PART_OF: whole},
        )

    def with_labels(self, feature_labels: FeatureLabels) -> Circuit:
        """The circuit with texts at its features: `{layer or site: {feature: text}}`.

        A layer stands for all sites of it. Labels of features that the circuit has not are left
        out. Raises `ValueError` for a layer and a site that it has not.
        """
        return replace(self, nodes=labelled(self.nodes, self.levels, feature_labels))

    def bind(self, origin: Origin) -> Circuit:
        """The circuit with something that it can be validated in: the `origin` of one found in the
        same model."""
        return replace(self, origin=origin)

    def validate(self, **options: Any) -> Validation:
        """Change features in the model and compare what that does to the targets of their edges, or
        to what the whole circuit is about, with what the circuit says; `options` are those of the
        origin, such as `n`, how many to look at. Raises `ValueError` where the circuit has no
        origin."""
        if self.origin is None:
            raise ValueError(
                "validate() needs the model and the coders that the circuit was found in, which "
                "files do not hold: find it again, or give it those of a circuit found there, "
                "circuit.bind(other.origin)."
            )
        found = self.origin.validate(self, **options)
        names = [self._names().full(node) for node in self.nodes]
        edges = [self.edges[i] for i in found.edges]
        ends = [f"{names[e.source]} → {names[e.target]}" for e in edges]
        return replace(found, names=(*ends, *(names[i] for i in found.nodes)))

    def table(self, n: int = 20, errors: bool = True) -> Table:
        """The `n` strongest edges with all that is known of each."""
        return edge_table(self._title(), self.nodes, self.strongest(n, errors), self._names())

    def node_table(self, n: int = 20) -> Table:
        """The `n` nodes of the largest effect of either sign, with all that is known of each; where
        effects are not known, those of the largest influence."""
        strongest = sorted(self.nodes, key=_size, reverse=True)[:n]
        return node_table(self._title(), strongest, self._names())

    def __repr__(self) -> str:
        return repr(self.table(SHOWN, errors=False))

    def _repr_html_(self) -> str:
        return self.table(errors=False)._repr_html_()

    def visualize(
        self, feature_labels: FeatureLabels | None = None, n: int = 30, ax: Axes | None = None
    ) -> Figure:
        """A matplotlib figure of the `n` strongest edges, chosen as by `restricted(n_edges=n)`.

        Levels go from left to right, those of a prompt from the bottom up over its tokens. For
        `feature_labels` see `with_labels`. Raises `ImportError` where matplotlib is missing.
        """
        part, layout = self._drawn(feature_labels, n)
        fewer = len(part.edges) < len(self.edges)
        note = f"{len(part.edges)} of {len(self.edges)} edges" if fewer else ""
        return draw(part.nodes, part.edges, layout, part._names(), note, ax)

    def save_html(
        self, path: str | Path, feature_labels: FeatureLabels | None = None, n: int = 500
    ) -> Path:
        """Write a page that shows the `n` strongest edges, to hover, click and prune: one file that
        needs no network. For `feature_labels` see `with_labels`."""
        part, layout = self._drawn(feature_labels, n)
        names, facts = part._names(), known(part.facts)
        page = circuit_page(part.nodes, part.edges, layout, names, part._what(), facts)
        return write_text(path, page)

    def page_content(self, n: int = 500) -> dict[str, Any]:
        """What a page needs to draw the `n` strongest edges, as plain values: the nodes and edges
        with their places in pixels, and all that is known of them."""
        part, layout = self._drawn(None, n)
        names = part._names()
        drawn = page_content(part.nodes, part.edges, layout, names)
        order = {level: i for i, level in enumerate(("", *self.levels))}
        ends = {"logit": len(order), "embedding": 0}
        for shown, node in zip(drawn["nodes"], part.nodes, strict=True):
            held = ("site", "index", "position", "value", "influence", "effect")
            shown |= {name: getattr(node, name) for name in held}
            shown["level"] = ends.get(node.kind, order.get(node.site, 0))
        levels = [names.level(Node("feature", level, 0)) for level in self.levels]
        tokens = [visible(token) for token in self.tokens]
        known_facts = [[name, str(value)] for name, value in known(part.facts)]
        texts = {"title": part._what(), "facts": known_facts, "levels": levels, "tokens": tokens}
        return storage.plain({**texts, **drawn})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the origin, as plain values."""
        return storage.plain(
            {
                "nodes": [asdict(node) for node in self.nodes],
                "edges": [asdict(edge) for edge in self.edges],
                "levels": self.levels,
                "tokens": self.tokens,
                "facts": self.facts,
            }
        )

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph` whose nodes are the numbers of the circuit's, with what is known of
        each as attributes. Raises `ImportError` where networkx is missing."""
        graph = needed("networkx").DiGraph(levels=list(self.levels), tokens=list(self.tokens))
        names = self._names()
        for i, node in enumerate(self.nodes):
            graph.add_node(i, name=names.full(node), **_held(asdict(node)))
        for edge in self.edges:
            known = _held(asdict(edge))
            graph.add_edge(known.pop("source"), known.pop("target"), **known)
        return graph

    def save(self, path: str | Path) -> Path:
        """Write everything but the origin to a JSON file, replacing it whole."""
        return storage.write_circuit(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote; raises `ValueError`, naming the file, where it is missing, damaged or
        no circuit."""
        values = storage.read_circuit(path)
        try:
            return cls(
                storage.nodes_of(values),
                storage.edges_of(values),
                storage.texts_of(values, "levels"),
                storage.texts_of(values, "tokens"),
                dict(values.get("facts") or {}),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a circuit: {error}") from None

    def _of_error(self, edge: Edge) -> bool:
        return self.nodes[edge.source].kind == "error"

    def _names(self) -> Names:
        return Names(self.levels, self.tokens)

    def _what(self) -> str:
        return describe(self.nodes, self.edges, self.levels, self.tokens)

    def _title(self) -> str:
        facts = wrapped(f"{name} {value}" for name, value in known(self.facts))
        return ",\n  ".join(text for text in (self._what(), facts) if text)

    def _drawn(self, feature_labels: FeatureLabels | None, n: int) -> tuple[Circuit, Layout]:
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}.")
        part = self.with_labels(feature_labels or {}).restricted(n_edges=n)
        return part, arrange(part.nodes, part.edges, part.levels, part.tokens)


def _held(values: dict[str, Any]) -> dict[str, Any]:
    """Without None, which most files of graphs do not know."""
    return {name: value for name, value in values.items() if value is not None}


def _size(node: Node) -> float:
    known = node.influence if node.effect is None else node.effect
    return 0.0 if known is None or math.isnan(known) else abs(known)


def _order(edge: Edge) -> float:
    return -abs(edge.weight) if math.isfinite(edge.weight) else math.inf
