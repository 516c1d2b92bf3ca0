"""The parts of a number that flow from the features of one coder to those of a later one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.circuits.behavior.ablation import Prompt, State
from mlxterp.sae.circuits.behavior.flows import Flow, Way, losses, mean_slopes, midpoints
from mlxterp.sae.circuits.behavior.targets import Target
from mlxterp.sae.circuits.dataset.pathway import COTANGENTS_PER_PASS, Pathway
from mlxterp.sae.circuits.given import pairs, whole_stream
from mlxterp.sae.coder import SparseCoder

Place = tuple[int, int, int]  # the layer of a coder, a position, and a feature or -1 for the error
Nodes = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges between features and errors of several coders, and from there to a target.

        weight = effect of the source on the value of its target . slope of the target's value

    Sites that coders between the two write are held, and nothing gets past a coder of the whole
    residual stream. There are no edges to errors.
    """

    prompt: Prompt
    target: Target
    flows: Mapping[int, Flow]
    way: Way
    verbose: bool = False

    def among(self, places: Iterable[Place]) -> Iterator[tuple[Place, Place | None, float]]:
        """The edges between nodes, and to the target (None), with their weights."""
        nodes: dict[int, list[tuple[int, int]]] = {layer: [] for layer in self.prompt.states}
        for layer, position, feature_id in places:
            nodes[layer].append((position, feature_id))
        coders = {layer: state.coder for layer, state in self.prompt.states.items()}
        for a, b, between in pairs(coders):
            targets = [node for node in nodes[b] if node[1] >= 0]
            if nodes[a] and targets:
                weights = self._between(a, b, nodes[a], targets, between)
                for i, j in zip(*np.nonzero(weights), strict=True):
                    yield (a, *nodes[a][i]), (b, *targets[j]), float(weights[i, j])
        for a in coders:
            later = [layer for layer in coders if layer > a]
            if nodes[a] and not any(whole_stream(coders[layer]) for layer in later):
                for node, weight in zip(nodes[a], self._to_target(a, nodes[a], later), strict=True):
                    if weight:
                        yield (a, *node), None, float(weight)

    def _between(
        self, a: int, b: int, sources: Nodes, targets: Nodes, between: Sequence[int]
    ) -> np.ndarray:
        states = self.prompt.states
        held = [states[layer].coder for layer in between]
        path = Between(self.prompt, states[a], states[b].coder, held)
        if self.way.exact:
            effects = path.losses(sources, targets, self.way.factor)
        else:
            way = self.way.errors, self.flows[a].n_steps
            effects = path.effects(sources, targets, *way, f"layer {a} to {b}", self.verbose)
        return effects * np.array([self.flows[b].slopes[node] for node in targets])

    def _to_target(self, a: int, sources: Nodes, between: Sequence[int]) -> np.ndarray:
        state, held = self.prompt.states[a], {}
        if not between and not self.way.exact:
            return np.array([self.flows[a].of(*node) for node in sources])
        for other in (self.prompt.states[layer] for layer in between):
            held |= other.edits(other.found.written)
        if self.way.exact:
            return losses(self.prompt, state, self.target, sources, self.way.factor, held)
        way = self.way.errors, self.flows[a].n_steps
        slopes = mean_slopes(self.prompt, state, self.target, *way, held)
        at = mx.array([position for position, _ in sources])
        return np.array((state.moves(sources) * slopes[at]).sum(axis=-1))


class Between:
    """From the features and errors of an earlier coder to the values of features of a later one."""

    def __init__(
        self, prompt: Prompt, earlier: State, later: SparseCoder, between: Sequence[SparseCoder]
    ):
        self._prompt, self._earlier = prompt, earlier
        self._pathway = Pathway(prompt.source, earlier.coder, later, between)
        self._clean = self._pathway.clean(np.array([prompt.tokens]))

    def effects(
        self, sources: Nodes, targets: Nodes, errors: bool, n_steps: int, title: str = "",
        verbose: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """The effect of each source on the pre-activation of each target `[n_sources, n_targets]`,
        by derivatives on the way on which errors go with the features or stay."""
        positions, features = np.array(targets).T
        rows, points = self._pathway.encoders(features), midpoints(n_steps)
        written, less = self._earlier.found.written, self._earlier.difference(errors)
        moves, found = self._earlier.moves(sources), []
        at = mx.array([position for position, _ in sources])
        starts = range(0, len(targets), COTANGENTS_PER_PASS)
        for start in tqdm(starts, desc=title, unit="pass", disable=not verbose):
            own = mx.array(positions[start : start + COTANGENTS_PER_PASS])
            cotangents = mx.zeros((len(own), 1, len(written), rows.shape[-1]))
            cotangents[mx.arange(len(own)), 0, own] = rows[start : start + COTANGENTS_PER_PASS]
            slopes = mx.zeros((len(own), 1, *written.shape))
            for point in points.tolist():
                there = (written - (1 - point) * less)[None]
                slopes = slopes + self._pathway.slopes(self._clean, there, cotangents)
                mx.eval(slopes)
            found.append(np.array((slopes[:, 0, at] * moves).sum(axis=-1) / len(points)).T)
        return np.concatenate(found, axis=1)

    def losses(self, sources: Nodes, targets: Nodes, factor: float = 0.0) -> np.ndarray:
        """By how much less each target is where only a factor is left of what one source has more
        `[n_sources, n_targets]`."""
        plain = self._values(self._earlier.found.written[None], targets)
        found, size = [], self._prompt.rows_per_pass()
        for start in range(0, len(sources), size):
            written = self._earlier.without(sources[start : start + size], factor)
            found.append(plain - self._values(written, targets))
        return np.concatenate(found)

    def _values(self, written: mx.array, targets: Nodes) -> np.ndarray:
        """The pre-activations of targets, less their bias, for each row of what is written."""
        positions, features = np.array(targets).T
        clean = replace(
            self._clean,
            tokens=mx.broadcast_to(self._clean.tokens, written.shape[:2]),
            activations={
                name: mx.broadcast_to(x, (len(written), *x.shape[1:]))
                for name, x in self._clean.activations.items()
            },
        )
        read = self._pathway.read(clean, written)
        rows = self._pathway.encoders(features)
        return np.array((read[:, mx.array(positions)] * rows).sum(axis=-1))
