"""What a number is due to that a model computes from a prompt: features, and edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.ablation import Prompt, State
from mlxterp.sae.circuits.pathway import COTANGENTS_PER_PASS, Clean, Pathway
from mlxterp.sae.circuits.targets import Edits, Target
from mlxterp.sae.coder import SparseCoder


@dataclass(frozen=True, eq=False)
class Flow:
    """What a target is due to at one coder.

    `features [S, n_features]` and `errors [S]` are effects, `slopes [S, n_features]` the mean
    derivatives by the features' values. The target is `rise` above what it is with nothing kept.
    """

    features: np.ndarray
    errors: np.ndarray
    slopes: np.ndarray
    rise: float

    def of(self, position: int, feature_id: int) -> float:
        """The effect of a feature, or of the error (-1), at a position."""
        if feature_id < 0:
            return float(self.errors[position])
        return float(self.features[position, feature_id])


def find_flow(
    prompt: Prompt, state: State, target: Target, n_steps: int = 0, with_errors: bool = False
) -> Flow:
    """The effects of a coder's features and errors on the target.

        effect of i at t = (z[t, i] - z0[t, i]) W_dec[i] . mean of d target / d written[t]

    The mean is over `n_steps` midpoints of the way from what is written with nothing kept, `z0`, to
    what is (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365); with 0 the
    derivative is taken at the end alone. Errors are kept all the way, or go with the features.
    """
    slopes = mean_slopes(prompt, state, target, n_steps, with_errors)
    coder, found = state.coder, state.found
    parts = [
        slopes[:, block.writes] @ rows.astype(mx.float32).T
        for block, rows in zip(coder.blocks, coder.decoder_blocks(), strict=True)
    ]
    by_value = mx.concatenate(parts, axis=-1)
    errors = ((found.errors - state.errors) * slopes).sum(axis=-1)
    without = state.found.written - state.difference(with_errors)
    # One at a time: a batch of another size is rounded in another way.
    ends = [prompt.measured(target, state.edits(x)) for x in (found.written, without)]
    return Flow(
        features=np.array(by_value * (found.codes - state.codes)),
        errors=np.array(errors),
        slopes=np.array(by_value),
        rise=float(ends[0][0] - ends[1][0]),
    )


def mean_slopes(
    prompt: Prompt,
    state: State,
    target: Target,
    n_steps: int = 0,
    with_errors: bool = False,
    held: Edits | None = None,
) -> mx.array:
    """The mean derivative of the target by what is written `[S, d_out]`, where other sites are
    `held`; see `find_flow`."""
    written, less = state.found.written, state.difference(with_errors)
    total, steps = mx.zeros(written.shape), _midpoints(n_steps)
    for start in range(0, len(steps), size := prompt.rows_per_pass()):
        way = mx.array(1 - steps[start : start + size])[:, None, None]

        def added(x: mx.array) -> mx.array:
            return prompt.measured(target, {**(held or {}), **state.edits(x)}, len(x)).sum()

        total = total + mx.grad(added)(written - way * less).sum(axis=0)
        mx.eval(total)
    return total / len(steps)


def losses(
    prompt: Prompt,
    state: State,
    target: Target,
    nodes: Sequence[tuple[int, int]],
    factor: float = 0.0,
    held: Edits | None = None,
) -> np.ndarray:
    """By how much less the target is where one feature, or error (-1), at one position has only a
    `factor` of what is more than in the place of it, `[n]`; for nodes (position, feature)."""
    found, size = [np.zeros(0)], prompt.rows_per_pass()
    plain = float(prompt.measured(target, {**(held or {}), **state.edits(state.found.written)})[0])
    for start in range(0, len(nodes), size):
        positions, features = zip(*nodes[start : start + size], strict=True)
        written = _without(state, positions, features, factor)
        edits = {**(held or {}), **state.edits(written)}
        found.append(plain - np.array(prompt.measured(target, edits, len(positions))))
    return np.concatenate(found)


class Between:
    """From the features and errors of an earlier coder to the values of features of a later one."""

    def __init__(
        self, prompt: Prompt, earlier: State, later: SparseCoder, between: Sequence[SparseCoder]
    ):
        self._prompt, self._earlier = prompt, earlier
        self._pathway = Pathway(prompt.source, earlier.coder, later, between)
        self._clean = self._pathway.clean(np.array([prompt.tokens]))

    def effects(
        self,
        sources: Sequence[tuple[int, int]],
        targets: Sequence[tuple[int, int]],
        n_steps: int = 0,
        with_errors: bool = False,
    ) -> np.ndarray:
        """The effect of each source on the pre-activation of each target `[n_sources, n_targets]`,
        both as (position, feature), as in `find_flow`."""
        positions, features = map(np.array, zip(*targets, strict=True))
        rows = self._pathway.encoders(features)
        written, less = self._earlier.found.written, self._earlier.difference(with_errors)
        at, ids = zip(*sources, strict=True)
        moves, steps, found = self._earlier.moves(at, ids), _midpoints(n_steps), []
        for start in range(0, len(targets), COTANGENTS_PER_PASS):
            some = slice(start, start + COTANGENTS_PER_PASS)
            own = mx.array(positions[some])
            cotangents = mx.zeros((len(own), 1, len(self._prompt.tokens), rows.shape[-1]))
            cotangents[mx.arange(len(own)), 0, own] = rows[some]
            slopes = mx.zeros((len(own), *written.shape))
            for step in steps.tolist():
                slopes = slopes + self._slopes((written - (1 - step) * less)[None], cotangents)
                mx.eval(slopes)
            effects = (slopes[:, mx.array(at)] * moves).sum(axis=-1) / len(steps)
            found.append(np.array(effects).T)
        return np.concatenate(found, axis=1)

    def losses(
        self, sources: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        """By how much less each target is where one source is not kept `[n_sources, n_targets]`."""
        positions, features = map(np.array, zip(*targets, strict=True))
        plain = self._values(self._earlier.found.written[None], positions, features)
        found, size = [], self._prompt.rows_per_pass()
        for start in range(0, len(sources), size):
            at, ids = zip(*sources[start : start + size], strict=True)
            written = _without(self._earlier, at, ids)
            found.append(plain - self._values(written, positions, features))
        return np.concatenate(found)

    def _values(self, written: mx.array, positions: np.ndarray, features: np.ndarray) -> np.ndarray:
        """The pre-activations of features at positions for each row of what is written."""
        n, clean = len(written), self._clean
        tokens = mx.broadcast_to(clean.tokens, (n, clean.tokens.shape[1]))
        read = self._pathway.read(replace(clean, tokens=tokens), written)[:, mx.array(positions)]
        return np.array((read * self._pathway.encoders(features)).sum(axis=-1))

    def _slopes(self, written: mx.array, cotangents: mx.array) -> mx.array:
        clean: Clean = self._clean

        def one(cotangent: mx.array) -> mx.array:
            return mx.vjp(lambda x: self._pathway.read(clean, x), [written], [cotangent])[1][0][0]

        return mx.vmap(one)(cotangents)


def _midpoints(n_steps: int) -> np.ndarray:
    return (np.arange(n_steps) + 0.5) / n_steps if n_steps else np.ones(1)


def _without(
    state: State, positions: Sequence[int], features: Sequence[int], factor: float = 0.0
) -> mx.array:
    """What is written without one feature or error, `[n, S, d_out]`."""
    here = mx.arange(len(state.found.written)) == mx.array(positions)[:, None]
    moves = (1 - factor) * state.moves(positions, features)
    return state.found.written - here[..., None] * moves[:, None]
