"""A behaviour of a model on a prompt: what it is due to, and how much of it a circuit restores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mlxterp.sae.circuits.behavior.ablation import Prompt
from mlxterp.sae.circuits.behavior.edges import Edges, Place
from mlxterp.sae.circuits.behavior.flows import Flow, Way, losses
from mlxterp.sae.circuits.behavior.restoration import Errors, Restoration
from mlxterp.sae.circuits.behavior.targets import Target
from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.given import check_choice, check_counts, site_of
from mlxterp.sae.circuits.validation import Validation


@dataclass(frozen=True, eq=False)
class Behavior:
    """A number that a model computes from a prompt, and what of it the features of coders do.

    It is the `origin` of the circuits of `find_behavior_circuit`. `flows` are the effects of all
    features and errors by layer, found by `way`.
    """

    prompt: Prompt
    target: Target
    flows: Mapping[int, Flow]
    way: Way
    verbose: bool = False

    @cached_property
    def restoration(self) -> Restoration:
        """Runs with some of the features kept."""
        shapes = {layer: flow.features.shape for layer, flow in self.flows.items()}
        return Restoration(self.prompt, self.target, shapes)

    @cached_property
    def ranking(self) -> tuple[Place, ...]:
        """All features and errors that have an effect, those first whose effect is the largest
        share of its coder's."""
        return tuple(sorted(self.shares, key=lambda place: -self.shares[place]))

    @cached_property
    def shares(self) -> dict[Place, float]:
        """The size of each effect as a share of the sum of these sizes of its coder."""
        found = {}
        for layer, flow in self.flows.items():
            total = float(np.abs(flow.features).sum() + np.abs(flow.errors).sum())
            found |= {(layer, *node): abs(flow.of(*node)) / total for node in flow.nodes()}
        return found

    def strongest(self, share: float) -> list[Place]:
        """The strongest nodes of each coder, as few as make up that share of its effects."""
        chosen, sums = [], dict.fromkeys(self.flows, 0.0)
        for place in self.ranking:
            if sums[place[0]] < share:
                chosen.append(place)
                sums[place[0]] += self.shares[place]
        return chosen

    def faithfulness(self, circuit: Circuit, errors: Errors | None = None) -> float:
        """How much of the behaviour the features of a circuit restore by themselves.

            (m(circuit) - m(nothing)) / (m(model) - m(nothing))

        `m` is the number that the model computes where the features that are not in the circuit
        have the values that take their place; those in it have what they have in that run. Errors
        are kept (`errors="kept"`), kept where they are nodes of the circuit (`"nodes"`), or not
        kept (`"removed"`); by default they are as the circuit was found. 1 where all is kept, 0 for
        no features; nan where they do not matter.

        Reference: Marks et al. 2024, arXiv 2403.19647.
        """
        return self.restoration.share(self._places(circuit), self._errors(errors))

    def completeness(self, circuit: Circuit, errors: Errors | None = None) -> float:
        """The faithfulness of all that is not in a circuit: near 0 where the circuit has all that
        matters."""
        return self.restoration.share(self._places(circuit), self._errors(errors), complement=True)

    def minimal(
        self,
        faithfulness: float = 0.8,
        *,
        by: Literal["size", "effect"] = "size",
        errors: Errors | None = None,
        edge_share: float = 0.95,
    ) -> Circuit:
        """The circuit of as few of the strongest nodes as have that faithfulness, measured.

        Nodes are taken in the order of `ranking`, or with `by="effect"` those first that add most
        to the number: then about half as many do, but those that act against it are missing. How
        many are needed is found by bisection: `facts["n_nodes"]` of them, after `facts["n_runs"]`
        runs. Faithfulness need not rise with every node: with one less it is not reached, with much
        fewer it might be. Raises `ValueError` where it is not reached with all nodes.
        """
        check_choice("by", by, ("size", "effect"))
        if not faithfulness > 0:
            raise ValueError(f"faithfulness must be > 0, got {faithfulness}.")
        kept = self._errors(errors)
        order = [p for p in self.ranking if kept == "nodes" or p[2] >= 0]
        if by == "effect":
            sign = np.sign(self.restoration.whole(kept))
            order.sort(key=lambda p: -sign * self.flows[p[0]].of(*p[1:]))
        reached = {n: self.restoration.share(order[:n], kept) for n in (0, len(order))}
        low, high = 0, len(order)
        if not reached[high] >= faithfulness:
            raise ValueError(
                f"faithfulness must be one that all {high} features and errors have together, "
                f"{reached[high]:.3f}, or less, got {faithfulness}."
            )
        while high - low > 1:
            middle = (low + high) // 2
            reached[middle] = self.restoration.share(order[:middle], kept)
            low, high = (low, middle) if reached[middle] >= faithfulness else (middle, high)
        found = self.circuit(order[:high], edge_share, kept)
        return replace(found, facts={**found.facts, "n_nodes": high, "n_runs": len(reached)})

    def validate(
        self,
        circuit: Circuit,
        *,
        n: int = 50,
        factor: float = 0.0,
        of: Literal["nodes", "edges"] = "nodes",
    ) -> Validation:
        """Compare effects with what is measured by taking out one feature at a time, or leaving a
        `factor` of what it has more than the value in its place.

        Of the `n` strongest features of a circuit it is what the number itself loses. Of the `n`
        strongest `edges` between features, and from them to the number, it is what the value of the
        edge's target loses, coders between held, times the slope that the edge's weight has too.

        Integrated gradients say how the whole number comes about, from no features to all; what is
        lost when one feature alone is taken out of all is nearer to gradients.
        """
        check_choice("of", of, ("nodes", "edges"))
        check_counts(n=n)
        places = self._places(circuit)
        features = {number: place for place, number in places.items() if place[2] >= 0}
        find = self._nodes_measured if of == "nodes" else self._edges_measured
        chosen, predicted, measured = find(circuit, features, n, factor)
        return Validation(
            predicted=(1 - factor) * np.array(predicted),
            measured=np.array(measured),
            edges=() if of == "nodes" else tuple(chosen),
            nodes=tuple(chosen) if of == "nodes" else (),
            method="taken out" if factor == 0 else f"multiplied by {factor:g}",
        )

    def _nodes_measured(
        self, circuit: Circuit, features: Mapping[int, Place], n: int, factor: float
    ) -> tuple[list[int], list[float], list[float]]:
        effects = {i: self.flows[p[0]].of(*p[1:]) for i, p in features.items()}
        chosen = sorted(effects, key=lambda i: -abs(effects[i]))[:n]
        found: dict[Place, float] = {}
        for layer, state in self.prompt.states.items():
            own = [features[i] for i in chosen if features[i][0] == layer]
            lost = losses(self.prompt, state, self.target, [p[1:] for p in own], factor)
            found |= dict(zip(own, lost.tolist(), strict=True))
        return chosen, [effects[i] for i in chosen], [found[features[i]] for i in chosen]

    def _edges_measured(
        self, circuit: Circuit, features: Mapping[int, Place], n: int, factor: float
    ) -> tuple[list[int], list[float], list[float]]:
        edges = circuit.edges
        own = [i for i, edge in enumerate(edges) if edge.source in features]
        chosen = sorted(own, key=lambda i: -abs(edges[i].weight))[:n]
        ends = [(features[edges[i].source], features.get(edges[i].target)) for i in chosen]
        used = dict.fromkeys(place for pair in ends for place in pair if place)
        way = replace(self.way, exact=True, factor=factor)
        found = {(a, b): lost for a, b, lost in self._edges(way).among(used)}
        return chosen, [edges[i].weight for i in chosen], [found.get(pair, 0.0) for pair in ends]

    def _edges(self, way: Way) -> Edges:
        return Edges(self.prompt, self.target, self.flows, way, self.verbose)

    def circuit(
        self, places: Sequence[Place], edge_share: float = 0.95, errors: Errors | None = None
    ) -> Circuit:
        """The circuit of some nodes, with as few of the strongest edges between them as make up
        that share of the sizes of all, and the strongest edge of every node."""
        found = sorted(self._edges(self.way).among(places), key=lambda edge: -abs(edge[2]))
        sizes = np.cumsum([abs(weight) for *_, weight in found])
        n = int(np.searchsorted(sizes, edge_share * sizes[-1])) + 1 if found else 0
        kept = found[:n] + _first_of_each(found[n:], {source for source, *_ in found[:n]})
        number: dict[Place | None, int] = {place: i for i, place in enumerate(places)}
        number[None] = len(places)
        levels = [self._site(layer) for layer in self.flows]
        if self.target.node.kind == "feature":
            levels.append(self.target.node.site)
        return Circuit(
            nodes=(*map(self._node, places), self._end()),
            edges=tuple(Edge(number[a], number[b], weight) for a, b, weight in kept),
            levels=tuple(levels),
            tokens=tuple(self.prompt.source.to_str_tokens(list(self.prompt.tokens))),
            facts=self._facts(places, self._errors(errors)),
            origin=self,
        )

    def _end(self) -> Node:
        node = self.target.node
        return replace(node, value=self.restoration.value) if node.kind == "feature" else node

    def _node(self, place: Place) -> Node:
        layer, position, i = place
        found, share = self.prompt.states[layer].found, self.shares.get(place, 0.0)
        of_error = i < 0
        value = np.linalg.norm(found.errors[position]) if of_error else found.codes[position, i]
        return Node(
            "error" if of_error else "feature", self._site(layer), i, position,
            value=float(value), influence=share, effect=self.flows[layer].of(position, i),
        )  # fmt: skip

    def _facts(self, places: Sequence[Place], errors: Errors) -> dict[str, Any]:
        flows, with_errors = self.flows, self.way.errors
        rise = sum(flow.rise for flow in flows.values())
        kept = [place for place in places if with_errors or place[2] >= 0]
        listed = sum(flows[place[0]].of(*place[1:]) for place in kept)
        return {
            "target": self.target.text,
            "value": self.restoration.value,
            "faithfulness": self.restoration.share(places, errors),
            "completeness": self.restoration.share(places, errors, complement=True),
            "explained": listed / rise if rise else math.nan,
            "gap": max(flow.gap(with_errors) for flow in flows.values()),
            "method": self.way.method,
            "errors": errors,
            "levels": {
                self._site(layer): {
                    "rise": flow.rise, "effects": flow.total(with_errors), "n_steps": flow.n_steps,
                }
                for layer, flow in flows.items()
            },
        }  # fmt: skip

    def _site(self, layer: int) -> str:
        return site_of(self.prompt.states[layer].coder)

    def _places(self, circuit: Circuit) -> dict[Place, int]:
        """The features and errors of a circuit by what they are called here, and their numbers."""
        layers = {self._site(layer): layer for layer in self.flows}
        found = {}
        for number, node in enumerate(circuit.nodes):
            if node.key == self.target.node.key or node.kind not in ("feature", "error"):
                continue
            if node.site not in layers or not 0 <= (node.position or 0) < len(self.prompt.tokens):
                raise ValueError(f"circuit must be one of {self.target.text} here, it has {node}.")
            found[layers[node.site], node.position or 0, node.index] = number
        return found

    def _errors(self, errors: Errors | None) -> Errors:
        default: Errors = "nodes" if self.way.errors else "kept"
        return default if errors is None else errors


def _first_of_each(
    edges: Sequence[tuple[Place, Place | None, float]], known: set[Place]
) -> list[tuple[Place, Place | None, float]]:
    """The first edge of every source that is not among those known."""
    found = {edge[0]: edge for edge in reversed(edges) if edge[0] not in known}
    return [edge for edge in edges if found.get(edge[0]) is edge]
