"""Read and change what single heads of attention take and give, in any architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx

from mlxterp.architecture import Architecture
from mlxterp.attention import executing, expand_heads
from mlxterp.hooks import Around, Hooks

Part = Literal["q", "k", "v", "z"]
PARTS: tuple[Part, ...] = get_args(Part)


class HeadPlace(NamedTuple):
    """What the heads of a layer's attention use, `q`, `k`, `v` after norms and rotary embeddings,
    or what they return, `z`: arrays `[B, H, S, d]`."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"layers.{self.layer}.attn.{self.part}"


HeadEdit = Callable[[mx.array, int], mx.array]  # of the array, and which call of the layer it is
Calls = dict[HeadPlace, list[mx.array]]


@contextmanager
def tapped(
    architecture: Architecture,
    edits: Mapping[HeadPlace, HeadEdit] | None = None,
    capture: Collection[HeadPlace] = (),
) -> Iterator[Calls]:
    """Edit and hold parts of heads in the one pass that the block runs.

    What is held is what there is after the edit, call by call of the layer. Keys and values that
    heads share are repeated for each of them where they are edited or held. The layer is that of
    the block that is being executed; what does not call
    `mx.fast.scaled_dot_product_attention` has no heads that are seen here.
    """
    edits = edits or {}
    held: Calls = {}
    hooks = Hooks()
    layers = {place.layer for place in (*edits, *capture)}
    current = executing(architecture, layers, hooks)
    counts: dict[int, int] = {}

    def seen(place: HeadPlace, value: mx.array) -> mx.array:
        if place in edits:
            value = edits[place](value, counts[place.layer])
        if place in capture:
            held.setdefault(place, []).append(value)
        return value

    def attend(function: Around, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        if not current:
            return function(q, k, v, **kwargs)
        layer, n_heads = current[-1], q.shape[1]
        counts[layer] = counts.get(layer, -1) + 1
        places = [HeadPlace(layer, part) for part in PARTS]
        if any(place in edits or place in capture for place in places[1:3]):
            k, v = expand_heads(k, n_heads), expand_heads(v, n_heads)
        q, k, v = (seen(place, x) for place, x in zip(places, (q, k, v), strict=False))
        return seen(places[3], function(q, k, v, **kwargs))

    hooks.add_around("scaled_dot_product_attention", attend)
    try:
        with hooks:
            yield held
    finally:
        hooks.clear()
