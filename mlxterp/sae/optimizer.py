"""Adam with clipping, on a coder whose decoder rows may be held at norm 1.

A step whose gradient is not finite leaves parameters and moments as they are, to the last bit.

Reference: Kingma and Ba 2014, arXiv 1412.6980.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

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
def _first_moment(m: mx.array, g: mx.array, factor: mx.array, share: mx.array) -> mx.array:
    return m + share * (mx.where(share > 0, g * factor, 0) - m)


@mx.compile
def _second_moment(v: mx.array, g: mx.array, factor: mx.array, share: mx.array) -> mx.array:
    return v + share * (mx.where(share > 0, (g * factor) * (g * factor), 0) - v)


@mx.compile
def _moved(p: mx.array, m: mx.array, v: mx.array, rate: mx.array, root: mx.array) -> mx.array:
    return p - rate * m / (mx.sqrt(v) * root + EPSILON)


@mx.compile
def _without_part_along(g: mx.array, along: mx.array, rows: mx.array) -> mx.array:
    return g - along * rows


def row_dots(a: mx.array, b: mx.array) -> mx.array:
    """`sum_d a * b` of two `[n, d]` arrays, `[n, 1]`."""
    # A product with a column of ones: MLX's sums over the last axis are slower on the CPU.
    return (a * b) @ mx.ones((a.shape[1], 1), a.dtype)


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


def adam(
    params: Arrays,
    moments: dict[str, Any],
    gradients: Arrays,
    norm: mx.array,
    rate: mx.array,
    clip: float,
    unit_norm: bool,
) -> tuple[Arrays, dict[str, Any], mx.array]:
    """New parameters and moments, and whether `norm`, that of the gradient, was finite.

    The gradient is scaled down to the norm `clip`, unless that is 0.
    """
    good = mx.isfinite(norm)
    factor = mx.minimum(clip / (norm + 1e-12), 1.0) if clip else mx.array(1.0)
    t = moments["t"] + 1
    rate = mx.where(good, rate / (1 - mx.power(BETA_1, t)), 0)
    root = mx.rsqrt(1 - mx.power(BETA_2, t))
    shares = [mx.where(good, 1 - beta, 0) for beta in (BETA_1, BETA_2)]
    new: dict[str, Arrays] = {"params": {}, "m": {}, "v": {}}
    for name, p in params.items():
        g = gradients[name]
        m = _first_moment(moments["m"][name], g, factor, shares[0])
        v = _second_moment(moments["v"][name], g, factor, shares[1])
        p = _moved(p, m, v, rate, root)
        if unit_norm and name == "W_dec":
            norms = mx.sqrt(row_dots(p, p))
            p = p * mx.where(good, 1 / mx.maximum(norms, 1e-12), 1)
        for part, array in (("params", p), ("m", m), ("v", v)):
            new[part][name] = array
    moments = {"m": new["m"], "v": new["v"], "t": mx.where(good, t, moments["t"])}
    return new["params"], moments, good
