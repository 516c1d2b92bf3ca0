"""A graph of features, and what is known of every edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from mlxterp.sae.circuits.validation import Validation

NodeKind = Literal["feature", "error", "embedding", "logit"]


@dataclass(frozen=True)
class Node:
    """A feature, or what else an effect can come from or go to.

    `site` is where a feature or an error is, and empty for embeddings and logits. `index` is the
    number of the feature, or the id of the token of an embedding or a logit, and -1 for an error.
    `position` is that of the token in the prompt, None in a circuit over a dataset. `value` is the
    feature's value there, its mean where it fires over a dataset, or the probability of a logit.
    `influence` is the share of what the circuit explains that goes through the node, where known.
    """

    kind: NodeKind
    site: str
    index: int
    position: int | None = None
    value: float = 0.0
    influence: float | None = None
    label: str | None = None

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """What tells nodes of a circuit apart."""
        return self.kind, self.site, self.index, self.position


@dataclass(frozen=True)
class Edge:
    """The effect of one node on another, by their numbers in `Circuit.nodes`.

    `weight` is the part of the target's value that is due to the source (for a dataset: the mean
    over the tokens on which the target was looked at). Over a dataset `share` is on which share of
    these tokens the source has an effect, `consistency` on which share of these it has the sign of
    `weight`, `n` how many tokens were looked at. `measured` is the effect found by an actual
    intervention, where one was made.
    """

    source: int
    target: int
    weight: float
    share: float | None = None
    consistency: float | None = None
    n: int | None = None
    measured: float | None = None


class Origin(Protocol):
    """What a circuit was found in: it can intervene there."""

    def validate(self, circuit: Circuit, **options: Any) -> Validation: ...


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

    def to_dict(self) -> dict[str, Any]:
        """Everything but the origin, as plain values."""
        return {
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [asdict(edge) for edge in self.edges],
            "levels": list(self.levels),
            "tokens": list(self.tokens),
            "facts": dict(self.facts),
        }
