"""Change a model's behaviour: add features, or put a coder in the place of what it describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import mlx.core as mx

from mlxterp.sae.analysis import check_feature
from mlxterp.sae.coder import SparseCoder

Edit = Callable[[mx.array], mx.array]
Change = float | Callable[[mx.array], mx.array]


def steer(
    coder: SparseCoder,
    activation: mx.array,
    feature_id: int,
    strength: float = 1.0,
    site: str | None = None,
) -> mx.array:
    """`activation + strength * direction(feature_id)`, in the dtype of the activation.

    The activation is one of all sites that the coder writes, `[..., d_out]`, or of one `site` of
    them. Decoder rows of a coder that writes one site have unit norm, so that `strength` is in
    units of the activation. Raises `ValueError` for an unknown feature or site, or another width.
    """
    names = coder.writes.names if site is None else coder.writes.only(site).names
    direction = coder.writes.take(coder.direction(check_feature(coder, feature_id)), names)
    activation = mx.array(activation)
    if activation.ndim == 0 or activation.shape[-1] != len(direction):
        raise ValueError(
            f"The activation must have shape [..., {len(direction)}], "
            f"got {tuple(activation.shape)}."
        )
    return activation + (strength * direction).astype(activation.dtype)


def steering_edit(
    coder: SparseCoder, feature_id: int, strength: float = 1.0, site: str | None = None
) -> dict[str, Edit]:
    """`{site: edit}` that adds a feature at every token, for `run`, `trace` and `generate`.

    The edits are of all sites that the feature writes, or of one `site` of them.
    """
    feature_id = check_feature(coder, feature_id)
    block = next(block for block in coder.blocks if feature_id < block.features.stop)
    names = coder.writes.names[block.sites]
    if site is not None:
        names = coder.writes.only(site).names
    direction, slices = strength * coder.direction(feature_id), coder.writes.slices
    return {name: partial(_add, direction[slices[name]]) for name in names}


def _add(row: mx.array, x: mx.array) -> mx.array:
    return x + row.astype(x.dtype)


def splice(
    coder: SparseCoder,
    *,
    features: Mapping[int, Change] | None = None,
    keep_error: bool = False,
) -> dict[str, Edit]:
    """`{site: edit}` that puts the coder in the place of the computation it describes, for `run`,
    `trace` and `generate`.

        y_site = z' @ W_dec[site] + b_dec[site] (+ x @ W_skip[site].T)

    `z` is the code of what this pass reads: of a cross-layer transcoder a later layer reads a
    stream to which the earlier replacements were added already. `z'` is `z` with the values of some
    `features` changed: to a number, or by a function of `z[..., i]`. With `keep_error` the error,
    what this pass computes at the site without the coder less the coder's reconstruction of it, is
    added back, so that nothing but changed features changes anything: `y_site = real + (z' - z) @
    W_dec[site]`.

    The edits replace every position, special tokens too, and serve one pass at a time. Raises
    `ValueError` for a coder that must read several sites before it can write the first, and, in the
    pass, where a site is written before what is read for it.

    References: Dunefsky et al. 2024, arXiv 2406.11944; Ameisen et al. 2025, "Circuit Tracing".
    """
    spliced = _Spliced(coder, features or {}, keep_error)
    edits: dict[str, Edit] = {
        name: partial(spliced.read, i) for i, name in enumerate(spliced.reads)
    }
    for name in coder.writes.names:
        write = partial(spliced.write, name)
        edits[name] = partial(_one_after_the_other, edits[name], write) if name in edits else write
    return edits


def _one_after_the_other(first: Edit, second: Edit, x: mx.array) -> mx.array:
    return second(first(x))


class _Spliced:
    """What the blocks of a coder have written in the current pass, until their sites come."""

    def __init__(self, coder: SparseCoder, features: Mapping[int, Change], keep_error: bool):
        self._coder = coder
        self._decoders = coder.decoder_blocks()
        self._changes = {check_feature(coder, i): change for i, change in features.items()}
        self._keep_error = keep_error
        self._written: dict[str, dict[int, mx.array]] = {name: {} for name in coder.writes.names}
        self.reads = [self._site_of(block.reads) for block in coder.blocks]

    def _site_of(self, reads: slice) -> str:
        found = [name for name, part in self._coder.reads.slices.items() if part == reads]
        if not found:
            raise ValueError(
                "This coder reads several sites before it can write the first of them, so that it "
                "cannot be spliced within one pass. Capture its sites in a clean pass, encode "
                "them, and give the columns of the reconstruction as edits of a second pass; "
                "evals.loss_recovered does so."
            )
        return found[0]

    def read(self, i: int, x: mx.array) -> mx.array:
        """Encode what the `i`-th block reads, and keep what it writes; returns `x` itself."""
        coder, block = self._coder, self._coder.blocks[i]
        z = coder.encode_block(i, x)
        changed = self._changed(z, block.features)
        y = (changed - z if self._keep_error else changed) @ self._decoders[i]
        if coder.has_skip and not self._keep_error:
            y += x.astype(y.dtype) @ coder.W_skip[block.writes, block.reads].T
        for name in coder.writes.names[block.sites]:
            part = coder.writes.slices[name]
            start = block.writes.start
            self._written[name][i] = y[..., part.start - start : part.stop - start]
        return x

    def _changed(self, z: mx.array, features: slice) -> mx.array:
        for i, change in self._changes.items():
            if features.start <= i < features.stop:
                at = i - features.start
                value = change(z[..., at]) if callable(change) else mx.full(z.shape[:-1], change)
                here = mx.arange(z.shape[-1]) == at
                z = mx.where(here, value[..., None].astype(z.dtype), z)
        return z

    def write(self, name: str, x: mx.array) -> mx.array:
        """What the blocks that have read make of the site."""
        coder, part = self._coder, self._coder.writes.slices[name]
        parts, self._written[name] = self._written[name], {}
        for i, block in enumerate(coder.blocks):
            if name in coder.writes.names[block.sites] and i not in parts:
                raise ValueError(
                    f"{name} is written before {self.reads[i]} is read, from which the coder "
                    "makes it: such a coder cannot be spliced within one pass."
                )
        base = x if self._keep_error else coder.b_dec[part]
        return sum(parts.values(), start=base.astype(coder.b_dec.dtype)).astype(x.dtype)
