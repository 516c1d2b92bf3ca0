"""What features, errors and tokens add to each other and to the logits, on one prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.graph.checks import ErrorNodes, check_pruning
from mlxterp.sae.circuits.graph.influence import (
    Adjacency,
    Extent,
    Pruned,
    Scores,
    prune,
    score,
    score_pruned,
)
from mlxterp.sae.circuits.graph.readouts import level_of, target_groups
from mlxterp.sae.circuits.graph.replacement import Replacement, Run
from mlxterp.sae.circuits.nodes import NodeKind
from mlxterp.sae.circuits.validation import Validation
from mlxterp.sae.features.display import pieces
from mlxterp.sites import Site


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The linear effects of features, errors and embeddings on each other and on logits, where
    attention patterns and norm scales are held; see `find_attribution_graph`.

    It is the `origin` of the circuits that are parts of it. Nodes are numbered: the sources of the
    `replacement` (features, errors, embeddings), then the `logits`. `weights [n_targets,
    n_sources]` is what each source adds to the value of each of the `targets [n_targets]`: to the
    logits, less their mean, which `outputs` reads, and to the pre-activations of the features that
    were looked at. `checks` are the errors that were found, `head` says what stands for the head of
    the model where that is not affine.
    """

    replacement: Replacement
    logits: tuple[Node, ...]
    outputs: Run
    weights: np.ndarray
    targets: np.ndarray
    checks: Mapping[str, Any]
    head: str = ""

    @property
    def n_nodes(self) -> int:
        """The number of nodes."""
        return self.replacement.n_sources + len(self.logits)

    @cached_property
    def adjacency(self) -> Adjacency:
        """The graph as numbers alone."""
        starts = np.zeros(self.n_nodes)
        starts[self.replacement.n_sources :] = [node.value for node in self.logits]
        sources = np.arange(self.replacement.n_sources)
        return Adjacency(self.weights, self.targets, sources, starts)

    @cached_property
    def influences(self) -> np.ndarray:
        """What goes through each node to the logits, `[n_nodes]`; see `Adjacency.influences`."""
        return self.adjacency.influences()

    @cached_property
    def scores(self) -> Scores:
        """How much of the graph is explained by features that were looked at."""
        return score(self.adjacency, self._of_kind("embedding"), self._explained)

    @property
    def conservation_error(self) -> float:
        """How far the influences of all nodes without inputs are from adding up to the logits'
        probabilities, as a share of these."""
        graph, ends = self.adjacency, ~self.adjacency.has_inputs()
        return abs(float((self.influences + graph.starts)[ends].sum() / graph.starts.sum()) - 1)

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """The sites of features and errors, in the order of the layers."""
        return tuple(sorted(self.replacement.error_sites, key=_layer))

    def node(self, number: int) -> Node:
        """A node by its number; its `influence` is the share of all probability that goes through
        it."""
        r = self.replacement
        n_features, n_tokens = len(r.features), r.n_tokens
        if number >= r.n_sources:
            return self.logits[number - r.n_sources]
        share = float(self.influences[number] / self.adjacency.starts.sum())
        if number < n_features:
            coder, position, i = r.features[number].tolist()
            value = float(r.values[number])
            return Node("feature", level_of(r.coders[coder], i), i, position, value, share)
        i, position = divmod(number - n_features, n_tokens)
        if i == len(r.error_sites):
            return Node("embedding", "", int(r.tokens[0, position]), position, influence=share)
        return Node("error", r.error_sites[i], -1, position, float(self._sizes[i, position]), share)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The size of each error, `[n_sites, S]`."""
        norms = [mx.linalg.norm(held.errors, axis=-1) for held in self.replacement.held[1:]]
        return np.array(mx.stack(norms)) if norms else np.zeros((0, self.replacement.n_tokens))

    def circuit(
        self,
        node_share: float = 0.8,
        edge_share: float = 0.98,
        errors: ErrorNodes = "pruned",
        *,
        n_nodes: int | None = None,
        n_edges: int | None = None,
    ) -> Circuit:
        """The nodes and edges that matter most to the logits, as `influence.prune` chooses them.

        Kept are as few nodes as have `node_share` of all influence, or `n_nodes`, and as few edges
        between them as pass on `edge_share` of it, or at most `n_edges`: a few dozen can be drawn.
        Embeddings and logits stay; errors are pruned as features are, or stay where they have any
        influence (`errors="kept"`). Raises `ValueError` for shares outside (0, 1] and numbers
        below 1.
        """
        r, extent = self.replacement, Extent(node_share, edge_share, n_nodes, n_edges)
        check_pruning(extent, errors)
        always = self._of_kind("embedding", "logit")
        if errors == "kept":
            always |= self._of_kind("error") & (self.influences > 0)
        unseen = self._of_kind("feature") & ~self._explained
        ends = ~self.adjacency.has_inputs() & ~unseen
        kept = prune(self.adjacency, self.influences, extent, always, ends)
        numbers = np.flatnonzero(kept.nodes)
        place = np.zeros(self.n_nodes, int)
        place[numbers] = np.arange(len(numbers))
        order = np.argsort(-np.abs(kept.weights), kind="stable")
        ends_of, weights = place[kept.edges[order]].tolist(), kept.weights[order].tolist()
        return Circuit(
            nodes=tuple(self.node(int(i)) for i in numbers),
            edges=tuple(Edge(a, b, w) for (a, b), w in zip(ends_of, weights, strict=True)),
            levels=self.levels,
            tokens=pieces(r.source, np.array(r.tokens[0]).tolist()),
            facts=self._facts(kept) | extent.to_dict(),
            origin=self,
        )

    def validate(
        self,
        circuit: Circuit,
        *,
        n: int = 50,
        factor: float = 2.0,
        frozen: bool = True,
        kinds: Collection[NodeKind] = ("feature", "error", "embedding"),
    ) -> Validation:
        """Multiply the source of each of the `n` strongest edges by a factor (0 takes it out) and
        compare by how much the target's value rises with what the edge says; of edges from sources
        of some `kinds`.

        In the frozen model the two are equal. With `frozen=False` patterns, scales and what MLPs do
        change as well: then it shows how well direct effects predict those in the model itself.
        Raises `ValueError` for a circuit with nodes that the graph has not.
        """
        r, numbers = self.replacement, self._numbers(circuit)
        chosen = [i for i, e in enumerate(circuit.edges) if circuit.nodes[e.source].kind in kinds]
        chosen = sorted(chosen, key=lambda i: -abs(circuit.edges[i].weight))[:n]
        pairs = [
            (numbers[circuit.edges[i].source], numbers[circuit.edges[i].target]) for i in chosen
        ]
        found: dict[tuple[int, int], float] = {}
        targets = {target for _, target in pairs}
        for group in target_groups(r, self.outputs, len(self.logits), targets):
            place = {target: j for j, target in enumerate(group.numbers.tolist())}
            own = [pair for pair in pairs if pair[1] in place]
            sources = sorted({source for source, _ in own})
            gains = r.gains(group.run, sources, factor - 1, frozen)
            found |= {(a, b): float(gains[sources.index(a), place[b]]) for a, b in own}
        weights = np.array([circuit.edges[i].weight for i in chosen])
        where = "patterns and scales held" if frozen else "in the model as it is"
        done = "sources taken out" if factor == 0 else f"sources multiplied by {factor:g}"
        return Validation(
            (factor - 1) * weights,
            np.array([found[pair] for pair in pairs]),
            tuple(chosen),
            f"{done}, {where}",
        )

    def _of_kind(self, *kinds: str) -> np.ndarray:
        r = self.replacement
        n_tokens = r.n_tokens
        counts = {
            "feature": len(r.features),
            "error": n_tokens * len(r.error_sites),
            "embedding": n_tokens,
            "logit": len(self.logits),
        }
        return np.repeat([kind in kinds for kind in counts], [*counts.values()])

    @cached_property
    def _explained(self) -> np.ndarray:
        """All nodes but errors, and features that were not looked at, as a mask."""
        looked_at = np.zeros(self.n_nodes, bool)
        looked_at[self.targets] = True
        return self._of_kind("embedding", "logit") | (self._of_kind("feature") & looked_at)

    def _numbers(self, circuit: Circuit) -> list[int]:
        """The numbers of a circuit's nodes here."""
        found = []
        for node in circuit.nodes:
            number = self._by_key.get(node.key)
            if number is None:
                raise ValueError(
                    f"circuit must be a part of this attribution graph, it has {node}."
                )
            found.append(number)
        return found

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, int, int | None], int]:
        return {self.node(i).key: i for i in range(self.n_nodes)}

    def _facts(self, kept: Pruned) -> dict[str, Any]:
        r, total = self.replacement, self.adjacency.starts.sum()
        pruned = score_pruned(self.adjacency, kept, self._of_kind("embedding"), self._explained)
        unseen = self._of_kind("feature") & ~self._explained
        facts: dict[str, Any] = {
            "targets": ", ".join(f"{node.label!r} {node.value:.1%}" for node in self.logits),
            "replacement_score": self.scores.replacement,
            "completeness_score": self.scores.completeness,
            "pruned_replacement_score": pruned.replacement,
            "pruned_completeness_score": pruned.completeness,
            "path_length": float(self.influences.sum() / total),
            "n_features": len(r.features),
            "n_looked_at": len(self.targets) - len(self.logits),
            "not_looked_at": float(self.influences[unseen].sum() / total),
            "checks": {**self.checks, "conservation_error": self.conservation_error},
        }
        if self.head:
            facts["head"] = self.head
        coded = {name for coder in r.coders for name in coder.writes.names}
        if others := [name for name in self.levels if name not in coded]:
            facts["only_errors_at"] = ", ".join(others)
        return facts


def _layer(name: str) -> int:
    return Site.from_string(name).layer or 0
