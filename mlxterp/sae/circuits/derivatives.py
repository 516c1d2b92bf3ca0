"""Derivatives of many numbers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
from mlx.utils import tree_map

T = TypeVar("T", mx.array, list[mx.array])


def for_each(slopes: Callable[[mx.array], T], cotangents: mx.array) -> T:
    """`slopes(cotangent)` of each of some cotangents `[n, ...]`, stacked along a new first axis.

    All at once where MLX can; one by one where an operation of the model has no such form, as
    products with quantised weights have none.
    """
    try:
        return mx.vmap(slopes)(cotangents)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
    found = []
    for cotangent in cotangents:
        found.append(slopes(cotangent))
        mx.eval(found[-1])
    return tree_map(lambda *parts: mx.stack(list(parts)), *found)
