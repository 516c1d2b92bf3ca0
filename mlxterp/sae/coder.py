"""The one model behind SAE, transcoder and crosscoder: a sparse code between joined sites."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.sae.activation_functions import make_activation_function
from mlxterp.sae.kernels import joined
from mlxterp.sae.token_norms import TOKEN_NORMS, normalise, shift_and_scale

# By this file a saved coder is known; a `config.json` is in many directories, such as a model's.
MARKER = "encoder_bias.safetensors"


@dataclass(frozen=True)
class Columns:
    """Which columns of a joined activation belong to which site.

    `names` are site names, `widths` their numbers of columns, in the order of joining.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"Every site may be named once only; {twice} stand there again.")

    def __str__(self) -> str:
        sites = zip(self.names, self.widths, strict=True)
        return ", ".join(f"{name} (width {width})" for name, width in sites)

    @property
    def width(self) -> int:
        """The number of columns of all sites together."""
        return sum(self.widths)

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of each site."""
        ends = list(itertools.accumulate(self.widths))
        return {
            name: slice(end - width, end)
            for name, width, end in zip(self.names, self.widths, ends, strict=True)
        }

    def only(self, name: str) -> Columns:
        """The columns of one site by themselves; raises `ValueError` where there is none."""
        return self.those((name,))

    def those(self, names: tuple[str, ...]) -> Columns:
        """The columns of some sites, in that order; raises `ValueError` where one is missing."""
        _check_sites(names, list(self.names))
        return Columns(names, tuple(self.widths[self.names.index(name)] for name in names))

    def union(self, others: Columns) -> Columns:
        """These columns, followed by those of the other sites that are not among them."""
        new = others.those(tuple(name for name in others.names if name not in self.names))
        return Columns(self.names + new.names, self.widths + new.widths)

    def has(self, others: Columns) -> bool:
        """Whether all of the other sites are among these, with the same widths."""
        found = dict(zip(self.names, self.widths, strict=True))
        return dict(zip(others.names, others.widths, strict=True)).items() <= found.items()

    def to_list(self) -> list[dict[str, str | int]]:
        """Names and widths as plain values."""
        return [{"site": n, "width": w} for n, w in zip(self.names, self.widths, strict=True)]

    def join(self, activations: Mapping[str, mx.array]) -> mx.array:
        """One array `[..., width]` from one array per site."""
        found = {str(site): x for site, x in activations.items()}
        _check_sites(self.names, list(found))
        return mx.concatenate([found[name] for name in self.names], axis=-1)

    def take(self, joined: mx.array, names: tuple[str, ...]) -> mx.array:
        """The columns `[..., d]` of the named sites, in that order, out of `[..., width]`."""
        if names == self.names:
            return joined
        _check_sites(names, list(self.names))
        return mx.concatenate([joined[..., self.slices[name]] for name in names], axis=-1)


def _check_sites(wanted: tuple[str, ...], found: list[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"The sites {missing} are missing; there are {found}.")


@dataclass(frozen=True)
class Block:
    """Features that read the same columns and write the same columns.

    `features` are among all features, `reads` and `writes` among the columns that the coder reads
    and writes, `sites` among its write sites.
    """

    features: slice
    reads: slice
    writes: slice
    sites: slice


class SparseCoder(nn.Module):
    """A sparse code that reads some sites and writes some sites.

        pre = x @ W_enc.T + b_enc        x   [..., d_in]
        z   = activation_function(pre)   z   [..., n_features], few of them not zero
        y'  = z @ W_dec + b_dec          y'  [..., d_out]
              (+ x @ W_skip.T            where the coder has a skip connection)

    Rows of `W_enc` `[n_features, d_in]` and of `W_dec` `[n_features, d_out]` belong to features.

    `token_norm` is how every token is normalised before it is encoded, by its own numbers alone:

        layer_norm   (x - mean(x)) / (std(x) + 1e-5)     with the unbiased standard deviation
        rescale      x * sqrt(d_in) / |x|

    Where the coder writes the site that it reads, the reconstruction is scaled back:
    `y' * std(x) + mean(x)`, or `y' * |x| / sqrt(d_in)`. Coders of ours have none; those of some
    other libraries do. Raises `ValueError` for another one, and where several sites are read.

    In a coder of several `blocks` the features of each read and write some of the columns only, and
    the activation function selects within a block. Of both matrices only these columns are stored:
    `W_enc` is `[n_features, columns that a block reads]`, and `W_dec` has one row for every feature
    and site that it writes.
    """

    def __init__(
        self,
        reads: Columns,
        writes: Columns,
        n_features: int,
        activation_function: str = "topk",
        k: int | None = 100,
        skip: bool = False,
        token_norm: str = "none",
    ):
        super().__init__()
        if token_norm not in TOKEN_NORMS:
            raise ValueError(f"token_norm must be one of {TOKEN_NORMS}, got {token_norm!r}.")
        if token_norm != "none" and len(reads.names) > 1:
            raise ValueError(f"token_norm is for coders that read one site, got {reads}.")
        self.reads = reads
        self.writes = writes
        blocks = self.make_blocks(n_features)
        function = make_activation_function(activation_function, n_features, k, len(blocks))
        width = writes.width if len(blocks) == 1 else writes.widths[0]
        n_rows = sum(_size(b.features) * _size(b.writes) for b in blocks) // width
        self.W_enc = mx.zeros((n_features, _size(blocks[0].reads)))
        self.b_enc = mx.zeros((n_features,))
        self.W_dec = mx.zeros((n_rows, width))
        self.b_dec = mx.zeros((writes.width,))
        if skip:
            self.W_skip = mx.zeros((writes.width, reads.width))
        if len(writes.names) > 1:
            self.site_scale = mx.ones((len(writes.names),))
        self.activation_name = activation_function
        self.activation_function = function
        self.token_norm = token_norm

    def make_blocks(self, n_features: int) -> tuple[Block, ...]:
        """The blocks of that many features; one, which reads and writes everything."""
        return (
            Block(
                slice(0, n_features),
                slice(0, self.reads.width),
                slice(0, self.writes.width),
                slice(0, len(self.writes.names)),
            ),
        )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The features that read and write the same columns, in order."""
        return self.make_blocks(self.n_features)

    @property
    def n_features(self) -> int:
        """The number of features."""
        return self.b_enc.shape[0]

    @property
    def d_in(self) -> int:
        """The width of what is read."""
        return self.reads.width

    @property
    def d_out(self) -> int:
        """The width of what is written."""
        return self.writes.width

    @property
    def k(self) -> int | None:
        """The number of features of a block that may be active on one token (with BatchTopK on
        average); `None` where the activation function sets none."""
        return self.activation_function.options.get("k")

    @property
    def has_skip(self) -> bool:
        """Whether what is read also goes straight to what is written, by `W_skip`."""
        return "W_skip" in self

    def of_blocks(self, array: mx.array) -> list[mx.array]:
        """The parts of an array that has a row for every feature, by block."""
        ends = [block.features.stop for block in self.blocks]
        return list(mx.split(array, ends[:-1])) if len(ends) > 1 else [array]

    def decoder_blocks(self, W_dec: mx.array | None = None) -> list[mx.array]:
        """The decoder of each block, `[its features, its write columns]`.

        `W_dec` is an array of the shape of the coder's, by default that itself.
        """
        W_dec = self.W_dec if W_dec is None else W_dec
        blocks = self.blocks
        if len(blocks) == 1:
            return [W_dec]
        shapes = [(_size(block.features), _size(block.writes)) for block in blocks]
        ends = itertools.accumulate(n * d // W_dec.shape[1] for n, d in shapes)
        parts = mx.split(W_dec, list(ends)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def joined_decoder(self, parts: list[mx.array]) -> mx.array:
        """The inverse of `decoder_blocks`."""
        return joined([part.reshape(-1, self.W_dec.shape[1]) for part in parts])

    def direction(self, feature_id: int) -> mx.array:
        """The decoder row `[d_out]` of a feature, 0 in the columns that it does not write."""
        for block, rows in zip(self.blocks, self.decoder_blocks(), strict=True):
            if feature_id < block.features.stop:
                row = rows[feature_id - block.features.start]
                return mx.pad(row, (block.writes.start, self.d_out - block.writes.stop))
        raise IndexError(f"feature_id must be below {self.n_features}, got {feature_id}.")

    def site_norms(self, W_dec: mx.array, block: Block) -> mx.array:
        """The norms of a block's decoder rows at every site that it writes, `[n, n_sites]`."""
        names, widths = self.writes.names[block.sites], self.writes.widths[block.sites]
        parts = Columns(names, widths).slices.values()
        return mx.stack([mx.linalg.norm(W_dec[:, part], axis=-1) for part in parts], axis=-1)

    def decoder_norms(self) -> mx.array:
        """The norm of each feature's decoder row at each write site, `[n_features, n_sites]`.

        Sites differ in the size of their activations: these norms are in units of each, as in
        training, which scales all sites to the same size (by `site_scale`).
        """
        n_sites = len(self.writes.names)
        parts = [
            mx.pad(self.site_norms(W, b), [(0, 0), (b.sites.start, n_sites - b.sites.stop)])
            for W, b in zip(self.decoder_blocks(), self.blocks, strict=True)
        ]
        return mx.concatenate(parts) * self.get("site_scale", mx.ones((1,)))

    def _joined(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        x = self.reads.join(x) if isinstance(x, Mapping) else mx.array(x)
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"The activation must have shape [..., {self.d_in}], got {tuple(x.shape)}."
            )
        return x.astype(self.W_enc.dtype)

    @property
    def scales_back(self) -> bool:
        """Whether a reconstruction depends on the token that was read, besides its code."""
        return self.token_norm != "none" and self.reads == self.writes

    def pre_activations(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """`x @ W_enc.T + b_enc`, `[..., n_features]`, of normalised tokens where there is a
        `token_norm`."""
        parts = self.of_blocks(self.W_enc), self.of_blocks(self.b_enc)
        x = normalise(self.token_norm, self._joined(x))
        pre = [
            mx.addmm(b, x[..., block.reads], W.T)
            for block, W, b in zip(self.blocks, *parts, strict=True)
        ]
        return joined(pre, axis=-1)

    def encode(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """The code `[..., n_features]` of an activation `[..., d_in]`.

        A coder of several sites also takes `{site: array}`. Raises `ValueError` for another width.
        """
        return self.activation_function(self.pre_activations(x))

    def encode_block(self, i: int, x: mx.array) -> mx.array:
        """The code `[..., its features]` of a block from the columns that it reads."""
        block = self.blocks[i]
        W_enc, b_enc = self.W_enc[block.features], self.b_enc[block.features]
        pre = mx.addmm(b_enc, normalise(self.token_norm, x.astype(W_enc.dtype)), W_enc.T)
        return self.activation_function.of_block(i, block.features)(pre)

    def decode(
        self, z: mx.array, like: mx.array | Mapping[str, mx.array] | None = None
    ) -> mx.array:
        """The reconstruction `[..., d_out]` of a code `[..., n_features]`, without what a skip
        connection adds.

        A coder with a `token_norm` that is scaled back needs `like`, the tokens `[..., d_in]` that
        were encoded, as their code does not know their size; raises `ValueError` without.
        """
        z = mx.array(z)
        if z.ndim == 0 or z.shape[-1] != self.n_features:
            raise ValueError(
                f"The code must have shape [..., {self.n_features}], got {tuple(z.shape)}."
            )
        parts = [
            self.in_place(z[..., block.features] @ W_dec, block)
            for block, W_dec in zip(self.blocks, self.decoder_blocks(), strict=True)
        ]
        y_hat = sum(parts[1:], parts[0]) + self.b_dec
        if not self.scales_back:
            return y_hat
        if like is None:
            raise ValueError(
                f"This coder normalises every token (token_norm={self.token_norm!r}), so a code "
                "alone has no size: pass what was encoded, decode(z, like=activation)."
            )
        shift, scale = self.token_scale(like)
        return y_hat * scale + shift

    def token_scale(self, x: mx.array | Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """The shift and the scale `[..., 1]` of tokens, by which their reconstruction is scaled
        back: 0 and 1 where it is not."""
        return shift_and_scale(self.token_norm if self.scales_back else "none", self._joined(x))

    def in_place(self, written: mx.array, block: Block) -> mx.array:
        """What a block writes, `[..., its columns]`, among all columns `[..., d_out]`."""
        before, after = block.writes.start, self.d_out - block.writes.stop
        if not before and not after:
            return written
        return mx.pad(written, [(0, 0)] * (written.ndim - 1) + [(before, after)])

    def __call__(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """The reconstruction `[..., d_out]` of what is written, from what is read."""
        x = self._joined(x)
        y_hat = self.decode(self.encode(x), like=x)
        return y_hat + x @ self.W_skip.T if self.has_skip else y_hat

    def array_files(self) -> dict[str, dict[str, mx.array]]:
        """The arrays of the coder and of its activation function by the file that holds them."""
        written = ("W_dec", "b_dec", "W_skip", "site_scale")
        return {
            "encoder.safetensors": {"W_enc": self.W_enc, **self.activation_function.arrays},
            "decoder.safetensors": {name: self[name] for name in written if name in self},
            MARKER: {"b_enc": self.b_enc},
        }

    def set_array(self, name: str, array: mx.array) -> None:
        """Replace one of the arrays of `array_files`."""
        owner = self.activation_function if name in self.activation_function.arrays else self
        owner[name] = array

    def __repr__(self) -> str:
        sites = _listed(self.reads.names)
        if self.writes != self.reads:
            sites += f" -> {_listed(self.writes.names)}"
        width = f"d_in={self.d_in}" + (f", d_out={self.d_out}" if self.d_out != self.d_in else "")
        k = "" if self.k is None else f", k={self.k}"
        return (
            f"{type(self).__name__}({sites}, {width}, n_features={self.n_features}, "
            f"{self.activation_name}{k}{', skip' if self.has_skip else ''}"
            f"{'' if self.token_norm == 'none' else f', {self.token_norm}'})"
        )


def check_feature(coder: SparseCoder, feature_id: int) -> int:
    """The id itself; raises `ValueError` where the coder has no such feature."""
    whole = isinstance(feature_id, (int, np.integer)) and not isinstance(feature_id, bool)
    if not whole or not 0 <= feature_id < coder.n_features:
        raise ValueError(f"feature_id must be in [0, {coder.n_features - 1}], got {feature_id!r}.")
    return int(feature_id)


def check_sized(coder: SparseCoder, what: str) -> None:
    """Raises `ValueError` for a coder that normalises tokens: `what` takes the value of a feature
    for what the model has."""
    if coder.token_norm != "none":
        raise ValueError(
            f"{what} needs a coder that takes activations as they are; this one normalises every "
            f"token (token_norm={coder.token_norm!r})."
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]}"


def _size(part: slice) -> int:
    return part.stop - part.start
