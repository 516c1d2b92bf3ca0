"""What every head of every layer attends to: exact queries, keys, values and patterns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import mlx.core as mx

from mlxterp import tracing
from mlxterp.architecture import Architecture
from mlxterp.hooks import Around, Hooks

Mask = mx.array | str | None


def attention_pattern(
    q: mx.array, k: mx.array, scale: float, mask: Mask = None, sinks: mx.array | None = None
) -> mx.array:
    """`softmax(scale q k^T + mask)` in float32, `[B, H, S, T]`, of `q [B, H, S, d]` and `k` with
    as many heads or fewer, each for a group of those of `q`.

    A mask is "causal" (the last query sees all keys), True where a query sees a key, or added. A
    sink is one more score of each head `[H]` that takes its share of the row and has no value.
    """
    scores = attention_scores(q, k, scale, mask)
    if sinks is None:
        return mx.softmax(scores, axis=-1, precise=True)
    column = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (*scores.shape[:-1], 1))
    return mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1, precise=True)[..., 1:]


def attention_scores(q: mx.array, k: mx.array, scale: float, mask: Mask = None) -> mx.array:
    """What `attention_pattern` takes the softmax of, `[B, H, S, T]`."""
    k = expand_heads(k, q.shape[1])
    scores = (q.astype(mx.float32) * scale) @ k.astype(mx.float32).swapaxes(-1, -2)
    if mask is None:
        return scores
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask must be "causal", an array or None, not {mask!r}')
        n_queries, n_keys = scores.shape[-2:]
        mask = mx.arange(n_keys - n_queries, n_keys)[:, None] >= mx.arange(n_keys)
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(mx.float32).min)
    return scores + mask


def expand_heads(x: mx.array, n_heads: int) -> mx.array:
    """Keys or values `[B, H_kv, T, d]` with each head repeated for its group, `[B, H, T, d]`."""
    return x if x.shape[1] == n_heads else mx.repeat(x, n_heads // x.shape[1], axis=1)


def attend(pattern: mx.array, v: mx.array) -> mx.array:
    """`z = pattern @ v [B, H, S, d_v]` of a pattern `[B, H, S, T]`; heads of `v` may be grouped."""
    groups, heads = v.shape[1], pattern.shape[1]
    if groups == heads:
        return pattern.astype(v.dtype) @ v
    z = (
        pattern.astype(v.dtype).reshape(-1, groups, heads // groups, *pattern.shape[2:])
        @ v[:, :, None]
    )
    return z.reshape(z.shape[0], heads, *z.shape[3:])


@dataclass(frozen=True, eq=False)
class AttentionHeads:
    """One call of the attention of `layer`, of H heads.

        pattern = softmax(scale q k^T + mask),  z = pattern @ v

    `q [B, H, S, d]`, `k [B, H, T, d]` and `v [B, H, T, d_v]` are what is really used, after norms
    and rotary embeddings; heads that share keys and values have them repeated, `n_kv_heads` says
    how many there are. `mask` is as in `attention_pattern`: latent attention (DeepSeek) has its
    rotary scores in it. `z [B, H, S, d_v]` is what was returned.
    """

    layer: int
    q: mx.array
    k: mx.array
    v: mx.array
    z: mx.array
    scale: float
    mask: Mask = None
    sinks: mx.array | None = None
    n_kv_heads: int = 0

    @cached_property
    def pattern(self) -> mx.array:
        """From query to key, `[B, H, S, T]` in float32; rows sum to 1, or less with sinks."""
        return attention_pattern(self.q, self.k, self.scale, self.mask, self.sinks)

    @property
    def scores(self) -> mx.array:
        """The scores before the softmax, `[B, H, S, T]` in float32; hidden keys have the least."""
        return attention_scores(self.q, self.k, self.scale, self.mask)

    def __repr__(self) -> str:
        batch, heads, queries, width = self.q.shape
        return (
            f"AttentionHeads(layer {self.layer}: {heads} heads of width {width}, {self.n_kv_heads} "
            f"of keys and values, {batch} x {queries} queries, {self.k.shape[2]} keys)"
        )


class Attention(Mapping[int, AttentionHeads]):
    """The attention of some layers in one pass: `attention[layer].pattern`.

    `calls` has all in their order; a layer that attends several times, as in looped models, is in
    it several times and has no single entry.
    """

    def __init__(self, calls: Iterable[AttentionHeads]) -> None:
        self.calls = tuple(calls)

    def __getitem__(self, layer: int) -> AttentionHeads:
        found = [call for call in self.calls if call.layer == layer]
        if not found:
            raise KeyError(f"layer {layer} is not held; held: {', '.join(map(str, self))}")
        if len(found) > 1:
            raise ValueError(f"layer {layer} attended {len(found)} times: take them from .calls")
        return found[0]

    def __contains__(self, layer: object) -> bool:
        return any(call.layer == layer for call in self.calls)

    def __iter__(self) -> Iterator[int]:
        return iter(dict.fromkeys(call.layer for call in self.calls))

    def __len__(self) -> int:
        return len({call.layer for call in self.calls})

    def __repr__(self) -> str:
        return "\n".join(["Attention", *(f"  {call!r}" for call in self.calls)])


def attention(
    architecture: Architecture,
    tokens: mx.array,
    layers: int | Iterable[int] | None = None,
    plan: tracing.Plan | None = None,
    **kwargs: Any,
) -> Attention:
    """The attention of `layers` (all that have it where None) in a pass over `tokens`.

    Other arguments are those of `tracing.run`. Raises `ValueError` for a layer whose attention is
    not a call of `mx.fast.scaled_dot_product_attention`.
    """
    n_layers = len(architecture.blocks)
    wanted = _layers(layers, n_layers)
    with watched(architecture, wanted) as calls:
        tracing.run(architecture, tokens, plan or tracing.make_plan(architecture), **kwargs)
    return complete(architecture, calls, wanted or ())


@contextmanager
def watched(
    architecture: Architecture, layers: Collection[int] | None = None
) -> Iterator[list[AttentionHeads]]:
    """A list that gets every call of the attention of `layers` (of all where None) in the block."""
    calls: list[AttentionHeads] = []
    hooks = _hooks(architecture, set(layers or range(len(architecture.blocks))), calls)
    try:
        with hooks:
            yield calls
    finally:
        hooks.clear()


def complete(
    architecture: Architecture, calls: Iterable[AttentionHeads], layers: Iterable[int] = ()
) -> Attention:
    """The calls by layer; raises `ValueError` where there are none, or none of some `layers`."""
    held = Attention(calls)
    missing = [layer for layer in layers if layer not in held]
    if missing or not held:
        raise ValueError(_no_attention(architecture, missing, set(held)))
    return held


def _layers(layers: int | Iterable[int] | None, count: int) -> list[int] | None:
    if layers is None:
        return None
    numbers = [index(n) for n in (layers if isinstance(layers, Iterable) else (layers,))]
    wrong = [n for n in numbers if not -count <= n < count]
    if wrong or not numbers:
        raise ValueError(f"layers must be of -{count} to {count - 1}, not {wrong or numbers}")
    return [n % count for n in numbers]


def _hooks(architecture: Architecture, layers: set[int], calls: list[AttentionHeads]) -> Hooks:
    """Hooks that add to `calls`; the layer is that of the block that is being executed."""
    hooks = Hooks()
    current = executing(architecture, range(len(architecture.blocks)), hooks)

    def around(function: Around, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        z = function(q, k, v, **kwargs)
        if current and current[-1] in layers:
            groups, heads = k.shape[1], q.shape[1]
            k, v = expand_heads(k, heads), expand_heads(v, heads)
            about = {name: kwargs.get(name) for name in ("mask", "sinks")}
            calls.append(
                AttentionHeads(current[-1], q, k, v, z, kwargs["scale"], **about, n_kv_heads=groups)
            )
        return z

    hooks.add_around("scaled_dot_product_attention", around)
    return hooks


def executing(architecture: Architecture, layers: Iterable[int], hooks: Hooks) -> list[int]:
    """A list whose last entry is, while the hooks are open, the layer whose block is executed; of
    these layers, and empty outside of them."""
    current: list[int] = []

    def block_of(layer: int) -> Around:
        def call(function: Around, *args: Any, **kwargs: Any) -> Any:
            current.append(layer)
            try:
                return function(*args, **kwargs)
            finally:
                current.pop()

        return call

    for layer in layers:
        hooks.add_around(architecture.blocks[layer], block_of(layer))
    return current


def _no_attention(architecture: Architecture, missing: list[int], found: set[int]) -> str:
    where = f"layers {', '.join(map(str, missing))}" if missing else "no layer"
    verb = "do not call" if missing else "calls"
    have = f"; layers {', '.join(map(str, sorted(found)))} do" if found else ""
    return (
        f"{where} of this model ({type(architecture.model).__module__}) {verb} "
        f"mx.fast.scaled_dot_product_attention{have}: they have no softmax attention, compute it "
        "by hand (as gemma2 does), or keep a quantised cache"
    )
