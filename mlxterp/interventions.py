"""Edits of an activation: pure functions that keep its shape and dtype."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx

Intervention = Callable[..., mx.array]


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether `function` has a second argument without a default, or one called `context`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of MLX itself
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        return False
    return positional[1].default is inspect.Parameter.empty or positional[1].name == "context"


def zero_out(x: mx.array) -> mx.array:
    """Zeros in the place of `x`."""
    return mx.zeros_like(x)


def scale(factor: float) -> Intervention:
    """`x * factor`."""
    return lambda x: (x * factor).astype(x.dtype)


def add_vector(vector: mx.array) -> Intervention:
    """`x + vector`, broadcast over the positions of `x [B, S, d]`."""
    return lambda x: x + mx.array(vector).astype(x.dtype)


def replace_with(
    value: mx.array | float, align: Literal["end", "start", "strict"] = "end"
) -> Intervention:
    """`value` in the place of `x`: a number fills it, an array is broadcast.

    An array `[B, S', d]` of another length replaces the positions that both have, counted from the
    `end` or the `start`; with `align="strict"` another length is a `ValueError`.
    """
    if align not in ("end", "start", "strict"):
        raise ValueError(f"align must be 'end', 'start' or 'strict', not {align!r}")

    def replace(x: mx.array) -> mx.array:
        new = mx.array(value).astype(x.dtype)
        one = new.ndim > 1 and new.shape[1] == 1 and align != "strict"
        if new.ndim == x.ndim >= 2 and new.shape[1] != x.shape[1] and not one:
            return _overlay(x, new, align)
        return mx.broadcast_to(new, x.shape)

    return replace


def _overlay(x: mx.array, new: mx.array, align: str) -> mx.array:
    if align == "strict":
        raise ValueError(
            f"replace_with(align='strict') needs {x.shape[1]} positions: "
            f"the value has {new.shape[1]}"
        )
    n = min(x.shape[1], new.shape[1])
    if align == "start":
        return mx.concatenate(
            [mx.broadcast_to(new[:, :n], (*x.shape[:1], n, *x.shape[2:])), x[:, n:]], axis=1
        )
    tail = mx.broadcast_to(new[:, -n:], (*x.shape[:1], n, *x.shape[2:]))
    return mx.concatenate([x[:, : x.shape[1] - n], tail], axis=1)


def clamp(min_val: float | None = None, max_val: float | None = None) -> Intervention:
    """`x` limited to `min_val` from below and `max_val` from above."""
    if min_val is None and max_val is None:
        raise ValueError("clamp needs min_val, max_val or both: both are None")
    return lambda x: mx.clip(x, min_val, max_val).astype(x.dtype)


def noise(std: float = 0.1, seed: int = 0) -> Intervention:
    """`x` plus normal noise of standard deviation `std`.

    It is drawn from `seed`, the site and the first position, so that the layers of a pass and the
    steps of a generation get noise of their own.
    """
    if std < 0:
        raise ValueError(f"std must be at least 0, not {std}")

    def add(x: mx.array, context: Any = None) -> mx.array:
        # Split, or the noise of one seed at one position were that of another seed at another.
        key = mx.random.split(mx.random.key(seed))[0]
        if context is not None:
            start = context.step if context.positions is None else context.positions[0]
            site = zlib.crc32(str(context.site).encode())
            key = key ^ mx.stack([mx.array(x).astype(mx.uint32) for x in (site, start)])
        return x + (std * mx.random.normal(x.shape, key=key)).astype(x.dtype)

    return add


class InterventionComposer:
    """Interventions one after another: `compose().add(scale(2.0)).add(clamp(-1, 1)).build()`."""

    def __init__(self) -> None:
        self._functions: tuple[Intervention, ...] = ()

    def add(self, function: Intervention) -> InterventionComposer:
        """Put `function` after those added before."""
        if not callable(function):
            raise TypeError(f"an intervention must be a function, not {type(function).__name__}")
        self._functions += (function,)
        return self

    def build(self) -> Intervention:
        """One function that applies all of them, left to right."""
        functions = self._functions

        def composed(x: mx.array, context: Any = None) -> mx.array:
            for function in functions:
                x = function(x, context) if takes_context(function) else function(x)
            return x

        return composed


compose = InterventionComposer
