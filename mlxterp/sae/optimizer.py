"""Adam with clipping, on a coder whose decoder rows may be held at norm 1.

A step whose gradient is not finite leaves parameters and moments as they are, to the last bit.

Reference: Kingma and Ba 2014, arXiv 1412.6980.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxterp.sae import gpu_kernels
from mlxterp.sae.parallel import UNDIVIDED, Undivided

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

Arrays = dict[str, mx.array]


def initial_moments(params: Arrays) -> dict[str, Any]:
    """Both moments at zero, and the number of steps `t`."""
    return {
        "m": {name: mx.zeros_like(array) for name, array in params.items()},
        "v": {name: mx.zeros_like(array) for name, array in params.items()},
        "t": mx.array(0.0),
    }


# One output each: MLX can then write the result over its input, and the CPU kernels are faster.
@mx.compile
def _first_moment(m: mx.array, g: mx.array, factor: mx.array) -> mx.array:
    return m + (1 - BETA_1) * (g * factor - m)


@mx.compile
def _second_moment(v: mx.array, g: mx.array, factor: mx.array) -> mx.array:
    return v + (1 - BETA_2) * ((g * factor) * (g * factor) - v)


# The root by itself, because compiled for the CPU it is computed one by one.
@mx.compile
def _moved(p: mx.array, m: mx.array, root_v: mx.array, rate: mx.array, root: mx.array) -> mx.array:
    return p - rate * m / (root_v * root + EPSILON)


@mx.compile
def _without_part_along(g: mx.array, along: mx.array, rows: mx.array) -> mx.array:
    return g - along * rows


def row_dots(a: mx.array, b: mx.array) -> mx.array:
    """`sum_d a * b` of two `[n, d]` arrays, `[n, 1]`."""
    if mx.default_device() != mx.Device(mx.cpu):
        return (a * b).sum(axis=-1, keepdims=True)
    # MLX's sums over the last axis are slower on the CPU than as many small products.
    n, d = a.shape
    return (a.reshape(n, 1, d) @ b.reshape(n, d, 1)).reshape(n, 1)


def unit_rows(array: mx.array) -> mx.array:
    """The rows of `[n, d]`, each divided by its norm."""
    return array / mx.maximum(mx.linalg.norm(array, axis=-1, keepdims=True), 1e-12)


def gradient_norm(gradients: Arrays, division: Undivided = UNDIVIDED) -> mx.array:
    """The norm of all gradients together."""
    # Summed by columns: MLX's flat sum loses several percent on large arrays on the CPU.
    squares = {name: g.square().sum(axis=0).sum() for name, g in gradients.items()}
    return mx.sqrt(division.summed_squares(squares))


def project(gradients: Arrays, params: Arrays) -> Arrays:
    """Remove from the decoder's gradient what points along its rows, which have norm 1."""
    W, g = params["W_dec"], gradients["W_dec"]
    return {**gradients, "W_dec": _without_part_along(g, row_dots(g, W), W)}


def with_norm(
    gradients: Arrays, params: Arrays, unit_norm: bool, division: Undivided = UNDIVIDED
) -> tuple[Arrays, mx.array]:
    """The gradients to give to `adam`, and the norm of their projected form if rows are held at 1.

    The kernels project them in `adam`, so that no projected ones have to be kept.
    """
    if not gpu_kernels.available():
        gradients = project(gradients, params) if unit_norm else gradients
        return gradients, gradient_norm(gradients, division)
    squares = {
        name: gpu_kernels.row_squares(
            g.reshape(-1, g.shape[-1]), params[name] if unit_norm and name == "W_dec" else None
        ).sum()
        for name, g in gradients.items()
    }
    return gradients, mx.sqrt(division.summed_squares(squares))


def adam(
    params: Arrays,
    moments: dict[str, Any],
    gradients: Arrays,
    norm: mx.array,
    rate: mx.array,
    clip: float,
    unit_norm: bool,
    *,
    lean: bool = False,
) -> tuple[Arrays, dict[str, Any]]:
    """New parameters and moments; the old ones where `norm`, that of the gradient, is not finite.

    The gradient and its norm come from `with_norm`; it is scaled down to the norm `clip`, unless
    that is 0. With `lean` the norm is known to be finite, unless the kernels are used; the arrays
    are taken out of the dicts, and a matrix is begun when those before it are computed, so that
    old ones are freed on the way.
    """
    good, t, rate, root, factor = _factors(norm, moments["t"], rate, clip)
    new: dict[str, Arrays] = {"params": {}, "m": {}, "v": {}}
    for name in list(params):
        if lean and params[name].ndim > 1:
            mx.eval(new)  # so that what it replaces is free
        old = params[name], moments["m"][name], moments["v"][name], gradients[name]
        unit = unit_norm and name == "W_dec"
        if gpu_kernels.available():
            move = gpu_kernels.adam_unit_rows if unit else gpu_kernels.adam
            arrays = move(*old, rate, root, factor, good)
        else:
            arrays = _moved_by(*old, rate, root, factor, unit)
            if not lean:
                arrays = tuple(mx.where(good, a, b) for a, b in zip(arrays, old[:3], strict=True))
        if lean:
            del old, params[name], moments["m"][name], moments["v"][name], gradients[name]
        for part, array in zip(new, arrays, strict=True):
            new[part][name] = array
    return new["params"], {"m": new["m"], "v": new["v"], "t": t}


@mx.compile
def _factors(norm: mx.array, t: mx.array, rate: mx.array, clip: float) -> tuple[mx.array, ...]:
    """Whether the norm is finite, the steps made, the rate, what scales roots and gradients."""
    good = mx.isfinite(norm)
    t = t + 1
    factor = mx.minimum(clip / (norm + 1e-12), 1.0) if clip else mx.array(1.0)
    root = mx.rsqrt(1 - mx.power(BETA_2, t))
    return good, mx.where(good, t, t - 1), rate / (1 - mx.power(BETA_1, t)), root, factor


def _moved_by(
    p: mx.array, m: mx.array, v: mx.array, g: mx.array,
    rate: mx.array, root: mx.array, factor: mx.array, unit: bool,
) -> tuple[mx.array, ...]:  # fmt: skip
    m, v = _first_moment(m, g, factor), _second_moment(v, g, factor)
    p = _moved(p, m, mx.sqrt(v), rate, root)
    if unit:
        p = p * (1 / mx.maximum(mx.sqrt(row_dots(p, p)), 1e-12))
    return p, m, v
