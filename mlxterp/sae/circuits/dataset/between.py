"""Which features of one layer make which of a later one fire, over a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.cost import CircuitCost
from mlxterp.sae.circuits.dataset.effects import KEPT, Effects, Look
from mlxterp.sae.circuits.dataset.pathway import Pathway
from mlxterp.sae.circuits.given import Method, check_choice, check_counts, fitting, pairs, site_of
from mlxterp.sae.circuits.validation import Validation
from mlxterp.sae.coder import check_feature
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.source import ActivationSource

SCREENED = 4  # tokens of each target that the fast pass looks at
CANDIDATES = 2  # times as many edges as are asked for choose the targets of the close look
MOST_TARGETS = 64


def find_feature_circuits(
    model: ActivationSource | None = None,
    saes: Mapping[int, BaseSAE] | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    dataset: Iterable[str] | ActivationDataset | None = None,
    top_k: int = 50,
    *,
    method: Method = "integrated_gradients",
    target_features: Mapping[int, Sequence[int]] | None = None,
    n_steps: int = 8,
    n_tokens: int = 24,
    max_tokens: int = 20_000,
    context_length: int = 64,
    seed: int = 0,
    verbose: bool = True,
) -> Circuit:
    """The strongest effects between the features of coders of several layers, over a dataset.

    From `source_layer` to `target_layer`, by default the first and the last of `saes`, the value of
    a later feature where it fires, before its activation function, is traced back through the real
    model to the features of an earlier coder, whose errors are kept:

        effect of i on j = mean over tokens where j fires of
            sum over all tokens t of z[t, i] W_dec[i] . mean of d value_j / d written[t]

    The derivative is averaged over `n_steps` midpoints of the way from none of the earlier features
    to all of them (`method="integrated_gradients"`), or taken at the end alone (`"gradient"`: fast,
    and wrong where attention is saturated). With `"ablation"` the effect is what the value loses
    when the feature is taken out, for the edges that are strongest by gradient. Coders between the
    two keep their values; where they describe the whole residual stream nothing gets past them, so
    that each coder is then traced to the one before it only.

    A fast pass by gradients looks at every later feature that fires, or at the `target_features` of
    a layer, on a few tokens. The targets of its strongest edges are then looked at on up to
    `n_tokens` random tokens on which they fire, and the `top_k` strongest edges are returned, with
    the errors' effect on the same targets. Of `dataset`, texts or a dataset of texts, no more than
    `max_tokens` are used. `circuit_cost` says beforehand how long it takes.

    Raises `ValueError` for a layer without a coder, a coder of another model, coders of which the
    later does not come after the earlier, and for a dataset without texts.

    References: Marks et al. 2024, arXiv 2403.19647; Sundararajan et al. 2017, arXiv 1703.01365.
    """
    search = _search(
        model, saes or {}, source_layer, target_layer, dataset, top_k, method=method,
        target_features=target_features, n_steps=n_steps, n_tokens=n_tokens, max_tokens=max_tokens,
        context_length=context_length, seed=seed, verbose=verbose,
    )  # fmt: skip
    return search.origin().circuit(top_k, method)


def circuit_cost(
    model: ActivationSource | None = None,
    saes: Mapping[int, BaseSAE] | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    dataset: Iterable[str] | ActivationDataset | None = None,
    top_k: int = 50,
    **options: Any,
) -> CircuitCost:
    """What `find_feature_circuits` would take with the same arguments.

    The tokens are encoded and a few derivatives taken to see how long they take; nothing else is
    done. Interventions (`method="ablation"`) are not counted. Raises `ValueError` as it does.
    """
    search = _search(model, saes or {}, source_layer, target_layer, dataset, top_k, **options)
    return search.cost()


@dataclass(frozen=True, eq=False)
class _Search:
    """What is to be looked at: between which layers, and which targets there."""

    coders: Mapping[int, BaseSAE]
    data: Mapping[int, FeatureData]
    looks: Mapping[tuple[int, int], Look]
    targets: Mapping[tuple[int, int], np.ndarray]
    top_k: int
    n_steps: int
    n_tokens: int

    def origin(self) -> _Origin:
        """Take all derivatives."""
        parts = []
        for (a, b), look in self.looks.items():
            title = f"layer {a} to {b}"
            fast = look.effects(self.targets[a, b], SCREENED, 0, f"{title}, fast pass", KEPT)
            best = fast.targets[fast.rows[fast.strongest(CANDIDATES * self.top_k)]]
            targets = np.array([*dict.fromkeys(best.tolist())][:MOST_TARGETS], int)
            effects = look.effects(targets, self.n_tokens, self.n_steps, title)
            parts.append(_Part(a, b, look, effects, self.n_tokens))
        return _Origin(self.coders, self.data, tuple(parts))

    def cost(self) -> CircuitCost:
        """Take a few derivatives, and see how many there are."""
        fast, close, seconds = 0, 0, 0.0
        for ends, look in self.looks.items():
            targets = self.targets[ends]
            counts = look.data.codes.firing_counts[targets]
            chosen = targets[np.argsort(-counts, kind="stable")[:MOST_TARGETS]]
            work = look.work(targets, SCREENED), look.work(chosen, self.n_tokens)
            fast, close = fast + work[0], close + work[1] * max(1, self.n_steps)
            seconds += look.seconds(targets, SCREENED) * (work[0] + work[1] * max(1, self.n_steps))
        n_tokens = next(iter(self.data.values())).codes.n_tokens
        return CircuitCost(n_tokens, fast, close, seconds)


def _search(
    model: ActivationSource | None,
    saes: Mapping[int, BaseSAE],
    source_layer: int | None,
    target_layer: int | None,
    dataset: Iterable[str] | ActivationDataset | None,
    top_k: int = 50,
    *,
    method: Method = "integrated_gradients",
    target_features: Mapping[int, Sequence[int]] | None = None,
    n_steps: int = 8,
    n_tokens: int = 24,
    max_tokens: int = 20_000,
    context_length: int = 64,
    seed: int = 0,
    verbose: bool = True,
) -> _Search:
    """Check everything and collect where features fire; raises `ValueError`."""
    check_choice("method", method, get_args(Method))
    check_counts(top_k=top_k, n_steps=n_steps, n_tokens=n_tokens)
    coders = _chosen(saes, source_layer, target_layer)
    wanted = _wanted(coders, target_features or {})
    source = fitting(model, coders)
    data = _collected(source, coders, dataset, max_tokens, context_length, seed, verbose)
    looks = {
        (a, b): Look(
            Pathway(source, coders[a], coders[b], [coders[layer] for layer in between]),
            data[b], seed, verbose,
        )
        for a, b, between in pairs(coders)
    }  # fmt: skip
    return _Search(
        coders, data, looks,
        {ends: wanted.get(ends[1], look.firing()) for ends, look in looks.items()},
        top_k, n_steps if method == "integrated_gradients" else 0, n_tokens,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Part:
    """What was found of an earlier and a later layer."""

    earlier: int
    later: int
    look: Look
    effects: Effects
    n_tokens: int

    def strongest(self, n: int) -> Iterator[_Found]:
        """The `n` strongest effects of features."""
        e = self.effects
        for i in e.strongest(n).tolist():
            row = int(e.rows[i])
            known = {"share": float(e.shares[i]), "consistency": float(e.consistencies[i])}
            known["n"] = int(e.counts[row])
            yield _Found(self, int(e.sources[i]), int(e.targets[row]), float(e.means[i]), known)

    def losses(self, features: Sequence[tuple[int, int]], factor: float) -> np.ndarray:
        """What was measured by intervention for pairs of features."""
        title = f"layer {self.earlier} to {self.later}, interventions"
        return self.look.losses(features, self.n_tokens, factor, title)


@dataclass(frozen=True, eq=False)
class _Found:
    """An edge in the making."""

    part: _Part
    source: int
    target: int
    weight: float
    known: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Origin:
    """The coders, the data and the effects that a circuit was made from."""

    coders: Mapping[int, BaseSAE]
    data: Mapping[int, FeatureData]
    parts: tuple[_Part, ...]

    def circuit(self, top_k: int, method: Method) -> Circuit:
        """The circuit of the strongest effects."""
        found = [edge for part in self.parts for edge in part.strongest(top_k)]
        if method == "ablation":
            pairs = [(edge.part, edge.source, edge.target) for edge in found]
            found = [
                replace(edge, weight=loss, known=edge.known | {"measured": loss})
                for edge, loss in zip(found, self._losses(pairs, 0.0).tolist(), strict=True)
            ]
        found = sorted(found, key=lambda edge: -abs(edge.weight))[:top_k]
        nodes: dict[Node, int] = {}
        edges = []
        for edge in found:
            ends = (
                self._node(edge.part.earlier, edge.source),
                self._node(edge.part.later, edge.target),
            )
            a, b = (nodes.setdefault(node, len(nodes)) for node in ends)
            edges.append(Edge(a, b, edge.weight, **edge.known))
        for part, target in dict.fromkeys((edge.part, edge.target) for edge in found):
            error = Node("error", self._site(part.earlier), -1)
            at = int(np.flatnonzero(part.effects.targets == target)[0])
            ends = error, self._node(part.later, target)
            a, b = (nodes.setdefault(node, len(nodes)) for node in ends)
            edges.append(Edge(a, b, float(part.effects.errors[at]), n=int(part.effects.counts[at])))
        return Circuit(
            nodes=tuple(nodes),
            edges=tuple(edges),
            levels=tuple(self._site(layer) for layer in self.coders),
            facts={"method": method} | self._explained(found),
            origin=self,
        )

    def validate(self, circuit: Circuit, *, n: int = 50, factor: float = 0.0) -> Validation:
        """Multiply the source of each of the `n` strongest edges between features by a factor (0
        takes it out) and compare what the target's value loses with what the edge says."""
        check_counts(n=n)
        layers = {self._site(layer): layer for layer in self.coders}
        parts = {(part.earlier, part.later): part for part in self.parts}
        chosen, pairs = [], []
        for i, edge in enumerate(circuit.edges):
            a, b = circuit.nodes[edge.source], circuit.nodes[edge.target]
            if a.kind == b.kind == "feature" and len(chosen) < n:
                chosen.append(i)
                pairs.append((parts[layers[a.site], layers[b.site]], a.index, b.index))
        weights = np.array([circuit.edges[i].weight for i in chosen])
        return Validation(
            predicted=(1 - factor) * weights,
            measured=self._losses(pairs, factor),
            edges=tuple(chosen),
            method="sources taken out" if factor == 0 else f"sources multiplied by {factor:g}",
        )

    def _losses(self, pairs: Sequence[tuple[_Part, int, int]], factor: float) -> np.ndarray:
        losses = np.zeros(len(pairs))
        for part in self.parts:
            own = [i for i, (other, _, _) in enumerate(pairs) if other is part]
            if own:
                losses[own] = part.losses([pairs[i][1:] for i in own], factor)
        return losses

    def _explained(self, found: Sequence[_Found]) -> dict[str, float]:
        """What the edges listed, all features and the errors add to the targets' values, as shares
        of what these are above those without any of the earlier features."""
        totals = np.zeros(4)
        for part in self.parts:
            own = np.isin(part.effects.targets, [e.target for e in found if e.part is part])
            e = part.effects
            listed = sum(edge.weight for edge in found if edge.part is part)
            sums = (e.rises, e.explained(), e.errors)
            totals += [listed, *(float(values[own].sum()) for values in sums)]
        listed, rise, features, errors = (totals / (totals[1] or 1.0)).tolist()
        return {"explained": listed, "all_features": features, "errors": errors} if rise else {}

    def _site(self, layer: int) -> str:
        return site_of(self.coders[layer])

    def _node(self, layer: int, feature_id: int) -> Node:
        mean = float(self.data[layer].means[feature_id])
        return Node("feature", self._site(layer), feature_id, value=mean)


def _chosen(saes: Mapping[int, BaseSAE], first: int | None, last: int | None) -> dict[int, BaseSAE]:
    """The coders from one layer to another."""
    layers = sorted(saes)
    if len(layers) < 2:
        raise ValueError(f"saes must hold the coders of two layers or more, got {layers}.")
    first, last = layers[0] if first is None else first, layers[-1] if last is None else last
    for name, layer in {"source_layer": first, "target_layer": last}.items():
        if layer not in saes:
            raise ValueError(f"{name} must be a layer that saes holds, {layers}, got {layer}.")
    if first >= last:
        raise ValueError(f"source_layer must be before target_layer, got {first} and {last}.")
    return {layer: saes[layer] for layer in layers if first <= layer <= last}


def _wanted(
    coders: Mapping[int, BaseSAE], target_features: Mapping[int, Sequence[int]]
) -> dict[int, np.ndarray]:
    """The features of each layer that are asked for."""
    later = [*coders][1:]
    for layer in target_features:
        if layer not in later:
            raise ValueError(f"target_features must be of layers of {later}, got {layer}.")
    return {
        layer: np.array([check_feature(coders[layer], feature_id) for feature_id in ids], int)
        for layer, ids in target_features.items()
    }


def _collected(
    source: ActivationSource,
    coders: Mapping[int, BaseSAE],
    dataset: Iterable[str] | ActivationDataset | None,
    max_tokens: int,
    context_length: int,
    seed: int,
    verbose: bool,
) -> dict[int, FeatureData]:
    if dataset is None:
        raise ValueError("dataset must be texts, or a dataset of texts, got None.")
    if not isinstance(dataset, ActivationDataset):
        sites = dict.fromkeys(name for coder in coders.values() for name in coder.reads.names)
        dataset = ActivationDataset.from_texts(
            source, dataset, [*sites], context_length=context_length, max_samples=max_tokens
        )
    options: dict[str, Any] = {"n_examples": 1, "max_tokens": max_tokens, "seed": seed}
    return {
        layer: collect(coder, dataset, verbose=verbose, **options)
        for layer, coder in coders.items()
    }
