"""The sites of a model that hold what sources write, in the place of what it computes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxterp.sae.circuits.behavior.ablation import Found
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.source import ActivationSource
from mlxterp.sites import Site

EMBEDDING = "layers.0.resid_pre"


@dataclass(frozen=True, eq=False)
class Held:
    """A site that holds what sources write: `base [S, width]` is their sum and the bias's part,
    without what a skip connection `W_skip` adds to it from the site that it `reads`."""

    name: str
    base: mx.array
    bias: mx.array
    errors: mx.array
    reads: str | None = None
    W_skip: mx.array | None = None


def embeddings(source: ActivationSource, tokens: mx.array) -> Held:
    """The residual stream before the first layer."""
    x = source.run(tokens, capture=EMBEDDING, stop=True)[EMBEDDING][0].astype(mx.float32)
    return Held(EMBEDDING, x, mx.zeros(x.shape[-1:]), x)


def described(coders: Sequence[SparseCoder], found: Sequence[Found]) -> list[Held]:
    """The sites that coders write."""
    held = []
    for coder, own in zip(coders, found, strict=True):
        written, W_skip, reads = own.written, None, None
        if coder.has_skip:
            W_skip, reads = coder.W_skip.astype(mx.float32), coder.reads.names[0]
            written = written - own.read @ W_skip.T
        for name, part in coder.writes.slices.items():
            bias = coder.b_dec[part].astype(mx.float32)
            held.append(Held(name, written[:, part], bias, own.errors[:, part], reads, W_skip))
    return held


def other_mlps(
    source: ActivationSource, coders: Sequence[SparseCoder], tokens: mx.array
) -> list[Held]:
    """What MLPs write that no coder describes: all of it is error."""
    written = [Site.from_string(name) for coder in coders for name in coder.writes.names]
    known = {site.layer for site in written if site.component in ("mlp", "mlp_out")}
    mlps = (site for site in source.sites() if site.component == "mlp")
    names = [str(site) for site in mlps if site.layer not in known]
    if not names:
        return []
    captured = source.run(tokens, capture=names)
    values = [captured[name][0].astype(mx.float32) for name in names]
    return [Held(n, x, mx.zeros(x.shape[-1:]), x) for n, x in zip(names, values, strict=True)]


def held_edits(
    held: Sequence[Held], written: Sequence[mx.array]
) -> dict[str, Callable[[mx.array], mx.array]]:
    """Edits by which each site has what is `written [B, S, width]` there, and what a skip
    connection adds."""
    edits: dict[str, Callable[[mx.array], mx.array]] = {}
    for site, value in zip(held, written, strict=True):
        if site.W_skip is None:
            edits[site.name] = lambda x, value=value: mx.broadcast_to(value, x.shape).astype(
                x.dtype
            )
        else:
            look, skip = _skipping(value, site.W_skip)
            edits |= {str(site.reads): look, site.name: skip}
    return edits


def _skipping(
    value: mx.array, W_skip: mx.array
) -> tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]:
    """An edit that looks at what a skip connection reads, and one that adds what it makes of it."""
    seen: list[mx.array] = []

    def look(x: mx.array) -> mx.array:
        seen[:] = [x.astype(mx.float32)]
        return x

    def skip(x: mx.array) -> mx.array:
        return (value + seen[0] @ W_skip.T).astype(x.dtype)

    return look, skip
