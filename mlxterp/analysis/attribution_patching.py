"""What patching would bring back, by derivatives: all patches from two runs and one way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.analysis.grid import Components, Layers, Numbers, make_grid
from mlxterp.analysis.heads import HeadEdit, HeadPlace
from mlxterp.analysis.metrics import Answers, Measure
from mlxterp.analysis.patches import Recorded, Spot, Where, record, sorted_out
from mlxterp.analysis.patching import Align, Direction, Pair, make_pair, measuring, named
from mlxterp.analysis.patching_result import PatchingResult


def attribution_patching(
    model: Any,
    clean_text: Any,
    corrupted_text: Any,
    component: Components = "mlp",
    layers: Layers | None = None,
    metric: str | Measure = "l2",
    *,
    steps: int | None = 8,
    positions: Numbers | None = None,
    heads: Numbers | None = None,
    answers: Answers | None = None,
    direction: Direction = "denoising",
    align: Align | None = None,
    metric_position: int = -1,
    batch_rows: int | None = None,
) -> PatchingResult:
    """An estimate of `activation_patching` that takes one pass with derivatives for all patches.

        m(patched) - m(base)  ~  (a_source - a_base) . dm / da

    a is the activation that is patched. The derivative is the mean over `steps` midpoints of the
    straight way from `a_base` to `a_source` of the whole site (integrated gradients), so that the
    estimates of all positions, or all heads, add up to what patching the whole site does; that
    takes `steps` rows for each layer and component. With `steps=None` it is that at the base run,
    in one row for all of them. The other arguments, and the result, are those of
    `activation_patching`; `result.verify(top=10)` patches the strongest.

    The estimate at the base run alone is good for small changes, such as those of one head or MLP
    at a position, and poor where something is saturated, as a softmax that is all but settled or a
    probability near 1, for distances such as `l2`, which bend, and for whole streams of early
    layers. Effects that cancel are missed (Kramar et al. 2024, arXiv 2403.00745, who correct some).

    Raises `ValueError` as `activation_patching` does, and for distances from the clean run at the
    clean run itself, where they have no slope (`direction="noising"` with `steps=None`).

    References: Nanda 2023, Attribution Patching; Sundararajan et al. 2017, arXiv 1703.01365.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, or None, got {steps}.")
    pair = make_pair(model, clean_text, corrupted_text, metric, answers, direction, align,
                     metric_position, batch_rows)  # fmt: skip
    if steps is None and direction == "noising" and pair.reader.metric.is_distance:
        raise ValueError(
            f"metric {metric!r} is a distance from the clean run and has no slope there: use "
            "logit_diff, probability or a function with direction='noising', or steps"
        )
    grid = make_grid(model, pair.reader.tokens, component, layers, positions, heads)
    patches = [patch for patch in grid.patches if patch is not None]
    title = f"Attribution patching ({direction}) of {named(component, heads)}"
    title += f", {steps} steps" if steps else ""
    if pair.reason:
        return pair.result(title, grid, np.full(len(patches), np.nan))
    base, source = record(model, pair.reader.tokens, grid.wheres), pair.recorded(grid)
    parts = contributions(pair, base, source, steps)
    estimates = np.array([sum(_part(parts[spot.where], spot) for spot in p) for p in patches])
    values = pair.base_value + estimates
    return pair.result(title, grid, pair.percent(values), measure=measuring(pair, grid))


def contributions(
    pair: Pair, base: Recorded, source: Recorded, steps: int | None
) -> dict[Where, np.ndarray]:
    """Derivative times difference at each position of each place, `[S]`, or `[H, S]` of heads."""
    if steps is None:
        slopes = _slopes(pair, base)
    else:
        slopes = {where: _mean_slopes(pair, where, base, source, steps) for where in base.values}
    found = {}
    for where, old in base.values.items():
        total = mx.zeros(())
        for slope, new, was in zip(slopes[where], source.values[where], old, strict=True):
            slope, new, was = (x.astype(mx.float32)[0] for x in (slope, new, was))
            product = slope * (new - was)
            axes = tuple(range(2 if isinstance(where, HeadPlace) else 1, product.ndim))
            total = total + product.sum(axis=axes)
        found[where] = np.where(pair.known, np.array(total, np.float64), 0.0)
    return found


def _slopes(pair: Pair, base: Recorded) -> dict[Where, tuple[mx.array, ...]]:
    """The derivatives of the metric at the base run, `[1, S, ...]`, of all places at once."""
    zeros = {str(w): [mx.zeros_like(x) for x in arrays] for w, arrays in base.values.items()}

    def value(deltas: Mapping[str, Sequence[mx.array]]) -> mx.array:
        edits, taps = sorted_out({where: _adding(deltas[str(where)]) for where in base.values})
        return pair.reader.read(edits, taps, 1).sum()

    slopes = mx.grad(value)(zeros)
    mx.eval(slopes)
    return {where: tuple(slopes[str(where)]) for where in base.values}


def _mean_slopes(
    pair: Pair, where: Where, base: Recorded, source: Recorded, steps: int
) -> tuple[mx.array, ...]:
    """The mean derivatives on the way from the base's activation of one place to the source's."""
    known = mx.array(pair.known)
    old = base.values[where]
    totals = [mx.zeros(x.shape) for x in old]
    shares = (np.arange(steps) + 0.5) / steps
    for start in range(0, steps, size := pair.reader.rows_per_pass(differentiated=True)):
        share = mx.array(shares[start : start + size].astype(np.float32))

        def value(points: Sequence[mx.array]) -> mx.array:
            def put(x: mx.array, call: int) -> mx.array:
                return points[call]

            edits, taps = sorted_out({where: put})
            return pair.reader.read(edits, taps, len(points[0])).sum()

        points = [
            was + share.reshape(-1, *(1,) * (was.ndim - 1)) * _masked(new - was, where, known)
            for new, was in zip(source.values[where], old, strict=True)
        ]
        slopes = mx.grad(value)([x.astype(was.dtype) for x, was in zip(points, old, strict=True)])
        totals = [t + s.sum(axis=0, keepdims=True) for t, s in zip(totals, slopes, strict=True)]
        mx.eval(totals)
    return tuple(total / steps for total in totals)


def _masked(difference: mx.array, where: Where, known: mx.array) -> mx.array:
    """A difference at the positions that both runs have."""
    after = difference.ndim - (3 if isinstance(where, HeadPlace) else 2)
    return mx.where(known.reshape(-1, *(1,) * after), difference, 0)


def _part(found: np.ndarray, spot: Spot) -> float:
    """The sum over what a spot covers."""
    part = found if spot.positions is None else found[..., list(spot.positions)]
    return float(part.sum() if spot.heads is None else part[list(spot.heads)].sum())


def _adding(deltas: Sequence[mx.array]) -> HeadEdit:
    return lambda x, call: x + deltas[call]
