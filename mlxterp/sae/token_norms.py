"""Norms of single tokens, by which some libraries scale what a coder reads and writes."""

from __future__ import annotations

import math

import mlx.core as mx

TOKEN_NORMS = ("none", "layer_norm", "rescale")
EPSILON = 1e-5


def shift_and_scale(name: str, x: mx.array) -> tuple[mx.array, mx.array]:
    """The shift and the scale `[..., 1]` of tokens `[..., d]`: a reconstruction `y` of a normalised
    one stands for `y * scale + shift`.

    They are mean and unbiased standard deviation (`layer_norm`), 0 and `|x| / sqrt(d)` (`rescale`),
    or 0 and 1 (`none`).
    """
    d = x.shape[-1]
    if name == "layer_norm":
        shift = x.mean(axis=-1, keepdims=True)
        # Of the centred values: differences of squares lose what is small beside the mean.
        return shift, mx.linalg.norm(x - shift, axis=-1, keepdims=True) / math.sqrt(max(1, d - 1))
    if name == "rescale":
        scale = mx.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(d)
        return mx.zeros_like(scale), scale
    scale = mx.ones((*x.shape[:-1], 1), x.dtype)
    return mx.zeros_like(scale), scale


def normalise(name: str, x: mx.array) -> mx.array:
    """Tokens `[..., d]` of one size: see `SparseCoder`."""
    if name == "none":
        return x
    shift, scale = shift_and_scale(name, x)
    if name == "layer_norm":
        return (x - shift) / (scale + EPSILON)
    return x / mx.where(scale > 0, scale, 1)  # a token of zeros has no direction
