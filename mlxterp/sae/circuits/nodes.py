"""What a circuit is made of, and what its parts are called."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxterp.sae.features.display import visible
from mlxterp.sites import Site

NodeKind = Literal["feature", "error", "embedding", "logit"]

# By layer or site, and the number of a feature; a text, or what has one as `text`.
FeatureLabels = Mapping[Any, Mapping[int, Any]]

EMBEDDINGS, LOGITS = "embeddings", "logits"
LONGEST = 16  # narrow characters of a token in a name


@dataclass(frozen=True)
class Node:
    """A feature, or what else an effect can come from or go to.

    `site` is where a feature or an error is, and empty for embeddings and logits. `index` is the
    number of the feature, or the id of the token of an embedding or a logit, and -1 for an error.
    `position` is that of the token in the prompt, None in a circuit over a dataset. `value` is the
    feature's value there, its mean where it fires over a dataset, or the probability of a logit.
    `influence` is the share of what the circuit explains that goes through the node, where known,
    and `effect` the part that is due to it of the number that the circuit is about.
    """

    kind: NodeKind
    site: str
    index: int
    position: int | None = None
    value: float = 0.0
    influence: float | None = None
    label: str | None = None
    effect: float | None = None

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


def labelled(
    nodes: Sequence[Node], levels: Sequence[str], feature_labels: FeatureLabels
) -> tuple[Node, ...]:
    """The nodes, features with the texts that they have; raises `ValueError` for a layer or site
    that is none of the levels."""
    texts: dict[tuple[str, int], str] = {}
    for key, labels in feature_labels.items():
        own = [level for level in levels if _is_of(level, key)]
        if not own:
            raise ValueError(
                f"feature_labels must be by layer or site, of {list(levels)}, got {key!r}."
            )
        for level in own:
            texts |= {(level, int(i)): str(getattr(x, "text", x)) for i, x in labels.items()}
    return tuple(
        replace(node, label=texts[node.site, node.index])
        if node.kind == "feature" and (node.site, node.index) in texts
        else node
        for node in nodes
    )


def _is_of(level: str, key: int | str) -> bool:
    """Whether a level is that of a site, or one of a layer."""
    sites = level.split(", ")
    if isinstance(key, str):
        return key == level or key in sites
    return any(Site.from_string(site).layer == key for site in sites)


class Names:
    """What nodes and levels are called, as text that can be shown anywhere."""

    def __init__(self, levels: Sequence[str], tokens: Sequence[str] = ()):
        parts = {level: [Site.from_string(name) for name in level.split(", ")] for level in levels}
        by_layer = [tuple(site.layer for site in sites) for sites in parts.values()]
        unique = len(set(by_layer)) == len(by_layer)
        self._levels = {level: _short(sites, unique) for level, sites in parts.items()}
        self._tokens = tuple(tokens)

    def level(self, node: Node) -> str:
        """The level of a node in few characters, such as `L8`."""
        ends = {"embedding": EMBEDDINGS, "logit": LOGITS}
        return ends.get(node.kind) or self._levels.get(node.site, node.site)

    def token(self, position: int) -> str:
        """The token at a position, its spaces at the ends made visible, or its number."""
        if not 0 <= position < len(self._tokens):
            return str(position)
        text = visible(self._tokens[position])
        start, end = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
        middle = text[start : len(text) - end]
        return "␣" * start + middle + "␣" * end if middle else "␣" * len(text)

    def within(self, node: Node) -> str:
        """A node among others of its level: `42 French words`."""
        label = None if node.label is None else " ".join(visible(node.label).split())
        if node.kind == "feature":
            return f"{node.index} {label}" if label else str(node.index)
        if node.kind == "error":
            return label or "error"
        if not label and node.kind == "embedding" and node.position is not None:
            label = self.token(node.position)
        text = label or f"token {node.index}"
        return f"{text} ({node.value:.1%})" if node.kind == "logit" and node.value else text

    def full(self, node: Node) -> str:
        """A node among all of the circuit: `L8/42 French words at 5 “Paris”`."""
        between = {"feature": "/", "error": " "}.get(node.kind)
        start = {"embedding": "embedding", "logit": "logit"}.get(node.kind, self.level(node))
        text = f"{start}{between}{self.within(node)}" if between else f"{start} {self.within(node)}"
        if node.position is None:
            return text
        known = node.position < len(self._tokens) and node.kind in ("feature", "error")
        token = f" “{cut(self.token(node.position), LONGEST)}”" if known else ""
        return f"{text} at {node.position}{token}"


def cells(text: str) -> int:
    """The width of a text in narrow characters; those of some scripts are twice as wide."""
    return sum(_width(character) for character in text)


def cut(text: str, widest: int) -> str:
    """The text, or its beginning, in no more than `widest` narrow characters."""
    if cells(text) <= widest:
        return text
    kept, room = 0, widest - 1
    while (room := room - _width(text[kept])) >= 0:
        kept += 1
    return text[:kept] + "…"


def _width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _short(sites: Sequence[Site], unique: bool) -> str:
    """`L8` where the layers tell levels apart, else `L8.mlp`; several sites are `L8+9`."""
    if any(site.layer is None for site in sites):
        return ", ".join(str(site) for site in sites)
    layers = "+".join(dict.fromkeys(str(site.layer) for site in sites))
    components = "+".join(dict.fromkeys(site.component for site in sites))
    return f"L{layers}" if unique else f"L{layers}.{components}"
