"""Attention patterns and the scales of norms as constants, so that what remains is affine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp import tracing
from mlxterp.architecture import Architecture
from mlxterp.constants import Live, Playback, Recorder, Recording
from mlxterp.hooks import Hooks
from mlxterp.sites import Site


@contextmanager
def frozen(architecture: Architecture, recording: Recording | None = None) -> Iterator[None]:
    """Hold attention patterns and the scales of norms constant in passes of the model.

        RMSNorm:   y = w x s,             s = 1 / sqrt(mean(x^2) + eps)        constant
        LayerNorm: y = w (x - mean) s + b, s = 1 / sqrt(var(x) + eps)          constant
        attention: z = P v,               P = softmax(scale q k^T + mask)      constant

    Without a `recording` values are those of the plain pass to the bit, and the constants have no
    derivative. With one, its constants take the place of those of every pass in the block, which
    must be over tokens of the same shape (any number of rows where one was recorded), so that
    interventions act through values alone. Where also the MLPs are cut, by
    `edit={"layers.*.mlp": mx.stop_gradient}` or by holding their outputs, every later site is an
    affine function of every earlier one, in the architectures for which `check` finds it so.

    A softmax by hand in an attention module (gemma2) is held as well. Acts in this thread alone;
    of nested blocks the innermost acts. A function of `mx.compile` keeps what it was traced with.
    Ameisen et al. 2025, Circuit Tracing.
    """
    forward = Playback(recording) if recording is not None else Live()
    with _hooked(architecture, forward):
        yield


def record(
    architecture: Architecture,
    tokens: mx.array,
    plan: tracing.Plan | None = None,
    **kwargs: Any,
) -> Recording:
    """The patterns and scales of a pass over `tokens`; other arguments are of `tracing.run`."""
    forward = Recorder()
    with _hooked(architecture, forward):
        tracing.run(architecture, tokens, plan or tracing.make_plan(architecture), **kwargs)
    mx.eval(forward.kept)
    return Recording({name: tuple(arrays) for name, arrays in forward.kept.items()})


@contextmanager
def _hooked(architecture: Architecture, forward: Live) -> Iterator[None]:
    # Standing hooks of a subject of their own: of several that are open the last acts alone.
    hooks = Hooks(architecture.model, standing=forward)
    parts = architecture.list_path.split(".")
    paths = ("", *(".".join(parts[:n]) for n in range(1, len(parts) + 1)))
    for path in paths:
        if path in architecture.modules:
            hooks.add_around(architecture.modules[path], forward.pass_)
    for block in architecture.survey().blocks:
        if block.attn is not None:
            hooks.add_around(block.attn.module, forward.attend)
    for name in ("rms_norm", "layer_norm", "scaled_dot_product_attention", "softmax"):
        hooks.add_around(name, forward.inside(getattr(forward, name)))
    try:
        with hooks:
            yield
    finally:
        hooks.clear()


@dataclass(frozen=True)
class FreezingCheck:
    """How far each site is from an affine function of the stream at the beginning, see `check`."""

    errors: Mapping[Site, float]
    tolerance: float

    @property
    def error(self) -> float:
        """The largest error of all sites."""
        return max(self.errors.values())

    @property
    def holds(self) -> bool:
        """Whether all errors are within the tolerance; one that is not a number is not."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __bool__(self) -> bool:
        return self.holds

    def __repr__(self) -> str:
        if self.holds:
            return f"FreezingCheck(affine: error {self.error:.1e})"
        first = next(site for site, error in self.errors.items() if not error <= self.tolerance)
        return f"FreezingCheck(not affine from {first} on: error {self.error:.1e})"


def check(
    architecture: Architecture,
    tokens: mx.array,
    *,
    size: float = 3.0,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> FreezingCheck:
    """Whether the frozen model with its MLPs cut is affine, from the first block's input on.

        error at a site = |f(x + d) - f(x) - J d| / |J d|

    `f` has the patterns, scales and MLP outputs of the pass over `tokens`; `J` is the derivative
    of the plain values in `frozen`; `d` is random and `size` times as long as the stream. What is
    left is due to parts that are neither attention nor norm nor MLP: gates, convolutions, states.
    The tolerance is for float32.
    """
    n_layers = len(architecture.blocks)
    start = architecture.site("layers.0.resid_pre")
    sites = [architecture.site(f"layers.{n}.resid_post") for n in range(n_layers)]
    mlps = [Site(n, "mlp") for n, b in enumerate(architecture.survey().blocks) if b.mlp is not None]
    clean = tracing.run(architecture, tokens, tracing.make_plan(architecture, (start, *mlps)))
    recording = record(architecture, tokens)
    x = clean[start]
    noise = mx.random.normal(x.shape, key=mx.random.key(seed)).astype(x.dtype)
    d = noise * (size * mx.linalg.norm(x) / mx.linalg.norm(noise))

    def outputs(delta: mx.array, edits: Mapping[Site, tracing.Edit]) -> list[mx.array]:
        plan = tracing.make_plan(architecture, sites, {**edits, start: lambda value: value + delta})
        done = tracing.run(architecture, tokens, plan, stop=True)
        return [done[site] for site in sites]

    cut = {site: mx.stop_gradient for site in mlps}
    held = {site: lambda value, site=site: clean[site] for site in mlps}
    with frozen(architecture):
        slopes = _directional(lambda delta: outputs(delta, cut), mx.zeros_like(d), d)
    with frozen(architecture, recording):
        before, after = outputs(mx.zeros_like(d), held), outputs(d, held)
    errors = {
        site: float(np.array(mx.linalg.norm(b - a - slope) / mx.linalg.norm(slope)))
        for site, a, b, slope in zip(sites, before, after, slopes, strict=True)
    }
    return FreezingCheck(errors, tolerance)


def _directional(
    function: Callable[[mx.array], list[mx.array]], x: mx.array, d: mx.array
) -> list[mx.array]:
    """`J d` by reverse mode alone, as the derivative of `c -> (c J) . d`, which is linear: some
    operations, such as those of a mixture of experts, have no forward mode."""

    def along(*cotangents: mx.array) -> mx.array:
        return (mx.vjp(function, [x], list(cotangents))[1][0] * d).sum()

    zeros = [mx.zeros_like(value) for value in function(x)]
    slopes = mx.grad(along, argnums=tuple(range(len(zeros))))(*zeros)
    return list(slopes)
