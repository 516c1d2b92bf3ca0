"""What a number is due to that a model computes from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.ablation import Prompt, State
from mlxterp.sae.circuits.behavior.targets import Edits, Target
from mlxterp.sae.circuits.given import Method

MOST_MEASURED = 1024  # features and errors of a coder
MOST_RANKED = 1 << 16
STEPS = (9, 27, 81, 243)
LARGEST_GAP = 0.01  # a share of the rise


@dataclass(frozen=True)
class Way:
    """How effects are found: derivatives at `n_steps` midpoints of the way from nothing kept to
    everything kept, on which the `errors` stay or go with the features; 0 steps are its end alone,
    and None as few of `STEPS` as let the effects of a coder add up to the rise but for
    `LARGEST_GAP`. With `exact` effects are measured instead: they are what is lost where only a
    `factor` is left of what a node has more than where it is not kept."""

    n_steps: int | None = None
    errors: bool = False
    exact: bool = False
    factor: float = 0.0

    @property
    def method(self) -> Method:
        """What the way is called."""
        if self.exact:
            return "ablation"
        return "gradient" if self.n_steps == 0 else "integrated_gradients"

    def tries(self) -> tuple[int, ...]:
        """The numbers of steps to be tried, one after the other."""
        return STEPS if self.n_steps is None else (self.n_steps,)


def midpoints(n_steps: int) -> np.ndarray:
    """How far along the way derivatives are taken; at its end for 0 steps."""
    return (np.arange(n_steps) + 0.5) / n_steps if n_steps else np.ones(1)


@dataclass(frozen=True, eq=False)
class Flow:
    """What a target is due to at one coder.

    `features [S, n_features]` and `errors [S]` are effects, `slopes [S, n_features]` the mean
    derivatives by the features' values, over `n_steps`. The target is `rise` above what it is with
    nothing kept.
    """

    features: np.ndarray
    errors: np.ndarray
    slopes: np.ndarray
    rise: float
    n_steps: int

    def of(self, position: int, feature_id: int) -> float:
        """The effect of a feature, or of the error (-1), at a position."""
        if feature_id < 0:
            return float(self.errors[position])
        return float(self.features[position, feature_id])

    def total(self, with_errors: bool) -> float:
        """The sum of all effects, of features alone or of errors too."""
        return float(self.features.sum() + (self.errors.sum() if with_errors else 0))

    def gap(self, with_errors: bool) -> float:
        """How far the sum of all effects is from the rise, as a share of it."""
        return abs(self.total(with_errors) - self.rise) / abs(self.rise) if self.rise else 0.0

    def nodes(self) -> list[tuple[int, int]]:
        """Those that have an effect, as (position, feature), the strongest first."""
        both = np.concatenate([self.features, self.errors[:, None]], axis=1)
        positions, features = np.nonzero(both)
        order = np.argsort(-np.abs(both[positions, features]), kind="stable")[:MOST_RANKED]
        features = np.where(features == self.features.shape[1], -1, features)
        return [(int(positions[i]), int(features[i])) for i in order]


def find_flow(prompt: Prompt, state: State, target: Target, way: Way) -> Flow:
    """The effects of a coder's features and errors on the target.

        effect of i at t = (z[t, i] - z0[t, i]) W_dec[i] . mean of d target / d written[t]

    The mean is over the way from what is written with nothing kept, `z0`, to what is (integrated
    gradients, Sundararajan et al. 2017, arXiv 1703.01365). Measured are those that are strongest
    by that; the others count as having none.
    """
    ends = state.found.written, state.found.written - state.difference(way.errors)
    # One at a time, because a batch of another size may be rounded in another way.
    values = [float(prompt.measured(target, state.edits(x))[0]) for x in ends]
    for n_steps in way.tries():
        slopes = mean_slopes(prompt, state, target, way.errors, n_steps)
        flow = _flow(state, slopes, values[0] - values[1], n_steps)
        if flow.gap(way.errors) <= LARGEST_GAP:
            break
    return _measured(prompt, state, target, flow) if way.exact else flow


def _flow(state: State, slopes: mx.array, rise: float, n_steps: int) -> Flow:
    coder, found = state.coder, state.found
    parts = [
        slopes[:, block.writes] @ rows.astype(mx.float32).T
        for block, rows in zip(coder.blocks, coder.decoder_blocks(), strict=True)
    ]
    by_value = mx.concatenate(parts, axis=-1)
    return Flow(
        features=np.array(by_value * (found.codes - state.codes)),
        errors=np.array(((found.errors - state.errors) * slopes).sum(axis=-1)),
        slopes=np.array(by_value),
        rise=rise,
        n_steps=n_steps,
    )


def _measured(prompt: Prompt, state: State, target: Target, flow: Flow) -> Flow:
    more = np.array(state.found.codes - state.codes)
    nodes = flow.nodes()[:MOST_MEASURED]
    features, errors, slopes = (np.zeros_like(x) for x in (flow.features, flow.errors, flow.slopes))
    found = losses(prompt, state, target, nodes).tolist() if nodes else []
    for (position, i), loss in zip(nodes, found, strict=True):
        if i < 0:
            errors[position] = loss
        else:
            features[position, i] = loss
            slopes[position, i] = loss / more[position, i]
    return replace(flow, features=features, errors=errors, slopes=slopes)


def mean_slopes(
    prompt: Prompt, state: State, target: Target, errors: bool, n_steps: int,
    held: Edits | None = None,
) -> mx.array:  # fmt: skip
    """The mean derivative of the target by what is written `[S, d_out]` on the way to it, on which
    errors go with the features or stay, where other sites are `held`."""
    written, less = state.found.written, state.difference(errors)
    total, points = mx.zeros(written.shape), midpoints(n_steps)
    for start in range(0, len(points), size := prompt.rows_per_pass()):
        left = mx.array(1 - points[start : start + size])[:, None, None].astype(mx.float32)

        def summed(x: mx.array) -> mx.array:
            return prompt.measured(target, {**(held or {}), **state.edits(x)}, len(x)).sum()

        total = total + mx.grad(summed)(written - left * less).sum(axis=0)
        mx.eval(total)
    return total / len(points)


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
    plain = prompt.measured(target, {**(held or {}), **state.edits(state.found.written)})
    for start in range(0, len(nodes), size):
        some = nodes[start : start + size]
        edits = {**(held or {}), **state.edits(state.without(some, factor))}
        found.append(np.array(plain - prompt.measured(target, edits, len(some))))
    return np.concatenate(found)
