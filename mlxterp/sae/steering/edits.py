"""Change a model's behaviour: steer with features, or put a coder in place of what it describes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Block, SparseCoder, check_feature
from mlxterp.sae.steering.places import Phase, Places, Positions

Edit = Callable[..., mx.array]
Change = float | Callable[[mx.array], mx.array]
Features = int | Iterable[int] | Mapping[int, float]
Mode = Literal["add", "clamp", "min_clamp", "scale", "ablate"]
Unit = Literal["max", "activation"]
Maxima = np.ndarray | Callable[[], np.ndarray] | None


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
    units of the activation; where the coder scales tokens back (`token_norm`), in units of the
    token's size. Raises `ValueError` for an unknown feature or site, or another width.
    """
    names = coder.writes.names if site is None else coder.writes.only(site).names
    direction = coder.writes.take(coder.direction(check_feature(coder, feature_id)), names)
    activation = mx.array(activation)
    if activation.ndim == 0 or activation.shape[-1] != len(direction):
        raise ValueError(
            f"The activation must have shape [..., {len(direction)}], "
            f"got {tuple(activation.shape)}."
        )
    step = strength * direction
    if coder.scales_back:
        step = coder.token_scale(activation)[1] * step
    return activation + step.astype(activation.dtype)


def steering_edit(
    coder: SparseCoder,
    features: Features,
    strength: float = 1.0,
    *,
    mode: Mode = "add",
    unit: Unit = "max",
    maxima: Maxima = None,
    keep_error: bool = True,
    positions: Positions = None,
    phase: Phase | None = None,
    site: str | None = None,
) -> dict[str, Edit]:
    """`{site: edit}` that changes what features write, for `run`, `trace`, `generate` and
    `editing`.

        x + sum over i of (z'_i - z_i) * W_dec[i]      times the token's scale, if it is normalised

        add        z'_i = z_i + a_i
        clamp      z'_i = a_i
        min_clamp  z'_i = max(z_i, a_i)
        scale      z'_i = strength_i * z_i
        ablate     z'_i = 0

    `features` is an id, several, or `{id: strength}`, which `strength` multiplies. The amount `a_i`
    is the strength times the feature's largest value, of `maxima [n_features]` or of what a
    function returns, or with `unit="activation"` the strength itself. Where no `z'_i` differs from
    `z_i` the activation stays as it is, bit for bit. With `keep_error=False` the coder's
    reconstruction of the changed code takes its place everywhere, see `splice`.

    All positions are edited, those of special tokens too, or only `positions`: absolute ones, or
    counted from the end of the prompt where they are negative; several or a slice. `phase` limits
    edits to the prompt ("prefill") or to what `generate` adds to it ("decode"). `site` is the only
    one to be written of several.

    Raises `ValueError` for bad arguments, where a maximum is not known, and as `splice` does where
    the code that a mode other than `add` needs is not known within one pass.

    References: Templeton et al. 2024, "Scaling Monosemanticity" (clamp with the error kept); Wu et
    al. 2025, arXiv 2501.17148 (units of the maximum).
    """
    for name, value, kind in (("mode", mode, Mode), ("unit", unit, Unit)):
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}.")
    places = Places.of(positions, phase)
    strengths = feature_strengths(coder, features, strength)
    if mode == "ablate" and any(value != 1 for value in strengths.values()):
        raise ValueError(f"mode='ablate' has no strength, got {strengths}.")
    if unit == "max" and mode not in ("scale", "ablate"):
        known = maxima() if callable(maxima) else maxima
        strengths = {i: value * _maximum(coder, known, i) for i, value in strengths.items()}
    if mode == "add" and keep_error and not coder.scales_back:
        return _additions(coder, strengths, places, site)
    changes = {i: _change(mode, amount) for i, amount in strengths.items()}
    return _Spliced(coder, changes, keep_error, places, site).edits()


def splice(
    coder: SparseCoder,
    *,
    features: Mapping[int, Change] | None = None,
    keep_error: bool = False,
) -> dict[str, Edit]:
    """`{site: edit}` that puts the coder in the place of the computation it describes, for `run`,
    `trace`, `generate` and `editing`.

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
    changes = {check_feature(coder, i): change for i, change in (features or {}).items()}
    return _Spliced(coder, changes, keep_error).edits()


def feature_strengths(
    coder: SparseCoder, features: Features, strength: float = 1.0
) -> dict[int, float]:
    """The strength of each feature."""
    if isinstance(features, Mapping):
        given: dict[Any, float] = dict(features)
    elif isinstance(features, Iterable) and not isinstance(features, str):
        given = dict.fromkeys(features, 1.0)
    else:
        given = {features: 1.0}
    found = {check_feature(coder, i): float(strength * own) for i, own in given.items()}
    if not found:
        raise ValueError("features must name at least one feature.")
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"strength must be finite, got {found}.")
    return found


def _maximum(coder: SparseCoder, maxima: np.ndarray | None, feature_id: int) -> float:
    if maxima is None:
        raise ValueError(
            "unit='max' needs each feature's largest value: call sae.collect(dataset) first, or "
            "give strengths in units of the activation, with unit='activation'."
        )
    if len(maxima) != coder.n_features:
        raise ValueError(f"maxima must have {coder.n_features} values, got {len(maxima)}.")
    found = abs(float(maxima[feature_id]))
    if not found:
        raise ValueError(
            f"Feature {feature_id} never fired in the data that was collected, so that its "
            "largest value is not known: use unit='activation'."
        )
    return found


def _change(mode: Mode, amount: float) -> Change:
    if mode == "clamp":
        return amount
    if mode == "ablate":
        return 0.0
    functions = {
        "add": lambda value: value + amount,
        "min_clamp": lambda value: mx.maximum(value, amount),
        "scale": lambda value: value * amount,
    }
    return functions[mode]


def _written(coder: SparseCoder, blocks: Iterable[Block], site: str | None) -> list[str]:
    """The sites that blocks write, or the one that is asked for of them."""
    names = {name for block in blocks for name in coder.writes.names[block.sites]}
    if site is not None and coder.writes.only(site).names[0] not in names:
        raise ValueError(f"The features do not write {site!r}, but {sorted(names)}.")
    return [name for name in coder.writes.names if name in names and site in (None, name)]


def _block_of(coder: SparseCoder, feature_id: int) -> int:
    return next(i for i, b in enumerate(coder.blocks) if feature_id < b.features.stop)


def _additions(
    coder: SparseCoder, amounts: Mapping[int, float], places: Places, site: str | None
) -> dict[str, Edit]:
    blocks = [coder.blocks[_block_of(coder, i)] for i in amounts]
    rows = [amount * coder.direction(i) for i, amount in amounts.items() if amount]
    names, slices = _written(coder, blocks, site), coder.writes.slices
    if not rows:
        return dict.fromkeys(names, _unchanged)
    total = reduce(operator.add, rows)
    return {name: partial(_add, total[slices[name]], places) for name in names}


def _unchanged(x: mx.array, context: Any = None) -> mx.array:
    return x


def _add(row: mx.array, places: Places, x: mx.array, context: Any = None) -> mx.array:
    return _where(places.mask(context), (x.astype(row.dtype) + row).astype(x.dtype), x)


def _where(mask: mx.array | bool, edited: mx.array, x: mx.array) -> mx.array:
    return mx.where(mask, edited, x) if isinstance(mask, mx.array) else edited if mask else x


class _Spliced:
    """What the blocks of a coder have written in the current pass, until their sites come."""

    def __init__(
        self,
        coder: SparseCoder,
        changes: Mapping[int, Change],
        keep_error: bool,
        places: Places | None = None,
        site: str | None = None,
    ):
        self._coder = coder
        self._decoders = coder.decoder_blocks()
        self._keep_error = keep_error
        self._places = places or Places()
        self._changes: dict[int, dict[int, Change]] = {}
        for feature_id, change in changes.items():
            i = _block_of(coder, feature_id)
            at = feature_id - coder.blocks[i].features.start
            self._changes.setdefault(i, {})[at] = change
        numbers = range(len(coder.blocks)) if not keep_error else sorted(self._changes)
        blocks = [coder.blocks[i] for i in numbers]
        self._names = _written(coder, blocks, site)
        self._reads = {i: self._site_of(coder.blocks[i].reads) for i in numbers}
        self._parts: dict[str, dict[int, tuple]] = {name: {} for name in self._names}

    def edits(self) -> dict[str, Edit]:
        edits: dict[str, Edit] = {name: partial(self._read, i) for i, name in self._reads.items()}
        for name in self._names:
            write = partial(self._write, name)
            edits[name] = (
                partial(_one_after_the_other, edits[name], write) if name in edits else write
            )
        return edits

    def _site_of(self, reads: slice) -> str:
        found = [name for name, part in self._coder.reads.slices.items() if part == reads]
        if not found:
            raise ValueError(
                "This coder reads several sites before it can write the first of them, so that its "
                "code is not known within one pass: features can be added, but it cannot be "
                "spliced. Capture its sites in a clean pass, encode them, and give the columns of "
                "the reconstruction as edits of a second pass; coder.evaluate does so."
            )
        return found[0]

    def _read(self, i: int, x: mx.array, context: Any = None) -> mx.array:
        """Encode what the `i`-th block reads, and keep what it writes; returns `x` itself."""
        if self._places.mask(context) is False:
            return x
        coder, block = self._coder, self._coder.blocks[i]
        z = coder.encode_block(i, x)
        difference, changed = self._difference(i, z)
        y = difference
        if not self._keep_error:
            y = y + z @ self._decoders[i]
            if coder.has_skip:
                y += x.astype(y.dtype) @ coder.W_skip[block.writes, block.reads].T
        if coder.scales_back:
            y = self._scaled_back(y, x)
        for name in self._parts.keys() & coder.writes.names[block.sites]:
            part, start = coder.writes.slices[name], block.writes.start
            self._parts[name][i] = y[..., part.start - start : part.stop - start], changed
        return x

    def _scaled_back(self, y: mx.array, x: mx.array) -> mx.array:
        """What a coder of normalised tokens writes besides `b_dec`, in the size of the tokens."""
        shift, scale = self._coder.token_scale(x)
        if self._keep_error:
            return y * scale
        return (y + self._coder.b_dec) * scale + shift - self._coder.b_dec

    def _difference(self, i: int, z: mx.array) -> tuple[Any, mx.array | bool]:
        """`(z' - z) @ W_dec` of a block, and on which tokens it is not zero."""
        changes = self._changes.get(i)
        if not changes:
            return 0, False
        features = mx.array([*changes])
        old = z[..., features]
        new = mx.stack(
            [
                change(old[..., j]) if callable(change) else mx.full(z.shape[:-1], change)
                for j, change in enumerate(changes.values())
            ],
            axis=-1,
        ).astype(z.dtype)
        changed = (new != old).any(axis=-1, keepdims=True)
        return (new - old) @ self._decoders[i][features], changed

    def _write(self, name: str, x: mx.array, context: Any = None) -> mx.array:
        """What the blocks that have read make of the site."""
        coder, part = self._coder, self._coder.writes.slices[name]
        parts, self._parts[name] = self._parts[name], {}
        mask = self._places.mask(context)
        if mask is False:
            return x
        for i, read in self._reads.items():
            if name in coder.writes.names[coder.blocks[i].sites] and i not in parts:
                raise ValueError(
                    f"{name} is written before {read} is read, from which the coder "
                    "makes it: such a coder cannot be spliced within one pass."
                )
        base = x if self._keep_error else coder.b_dec[part]
        y = sum((y for y, _ in parts.values()), start=base.astype(coder.b_dec.dtype))
        if self._keep_error:
            changed = reduce(operator.or_, (changed for _, changed in parts.values()))
            mask = changed if mask is True else changed & mask
        return _where(mask, y.astype(x.dtype), x)


def _one_after_the_other(first: Edit, second: Edit, x: mx.array, context: Any = None) -> mx.array:
    return second(first(x, context), context)
