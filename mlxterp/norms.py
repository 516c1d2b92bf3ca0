"""The gain and the bias of a norm, whatever its class calls them."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context

import mlx.core as mx
import mlx.nn as nn

_SIZE = 64.0  # of the probe, beside which the epsilon of a norm vanishes
_TOLERANCE = 1e-2


def gain_and_bias(norm: nn.Module) -> tuple[mx.array, mx.array]:
    """`g [d]` and `b [d]` of a norm `y = g unit(x) + b`; nothing is computed yet.

    `unit(x)` is `x / rms(x)`, of a layer norm `(x - mean) / std`.
    """
    signs = 1.0 - 2.0 * (mx.arange(_width(norm)) % 2)  # of mean zero
    outputs = _call(norm, mx.stack([signs, -signs]) * _SIZE)
    return (outputs[0] - outputs[1]) * signs / 2, (outputs[0] + outputs[1]) / 2


def why_not_units(norms: Sequence[nn.Module]) -> list[str]:
    """Why `unit(x)` cannot be had from what each norm returns; empty where it can."""
    measured = [_measured(norm) for norm in norms]
    mx.eval([found for found in measured if not isinstance(found, str)])
    return [found if isinstance(found, str) else _reason(*found) for found in measured]


def _measured(norm: nn.Module) -> tuple[mx.array, mx.array] | str:
    """The gain, and how far `unit(x)` is from that of an RMS norm or a layer norm."""
    try:
        gain, bias = gain_and_bias(norm)
        x = mx.random.normal((_width(norm),), key=mx.random.key(0))
        unit = (_call(norm, x) - bias) / gain
    except Exception as error:  # a norm may need more than the array that it norms
        return f"its norm cannot be called by itself ({error})"
    plain = (y * mx.rsqrt(y.square().mean()) for y in (x, x - x.mean()))
    return gain, mx.minimum(*(mx.abs(unit - y).max() for y in plain))


def _reason(gain: mx.array, error: mx.array) -> str:
    if mx.any(gain == 0).item():
        return "some gains of its norm are zero"
    return "" if (error <= _TOLERANCE).item() else "its norm is no RMS norm or layer norm"


def _width(norm: nn.Module) -> int:
    return norm["weight"].shape[-1]


def _call(norm: nn.Module, x: mx.array) -> mx.array:
    # In a context of its own: this is no call of the model that anybody watches.
    return Context().run(norm, x).astype(mx.float32)
