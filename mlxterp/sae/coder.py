"""The one model behind SAE, transcoder and crosscoder: a sparse code between joined sites."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxterp.sae.activation_functions import make_activation_function


@dataclass(frozen=True)
class Columns:
    """Which columns of a joined activation belong to which site.

    `names` are site names, `widths` their numbers of columns, in the order of joining.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

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
        _check_sites((name,), list(self.names))
        return Columns((name,), (self.widths[self.names.index(name)],))

    def to_list(self) -> list[dict[str, str | int]]:
        """Names and widths as plain values."""
        return [{"site": n, "width": w} for n, w in zip(self.names, self.widths, strict=True)]

    def join(self, activations: Mapping[str, mx.array]) -> mx.array:
        """One array `[..., width]` from one array per site."""
        _check_sites(self.names, list(activations))
        return mx.concatenate([activations[name] for name in self.names], axis=-1)

    def take(self, joined: mx.array, names: tuple[str, ...]) -> mx.array:
        """The columns `[..., d]` of the named sites, in that order, out of `[..., width]`."""
        if names == self.names:
            return joined
        _check_sites(names, list(self.names))
        return mx.concatenate([joined[..., self.slices[name]] for name in names], axis=-1)


def _check_sites(wanted: tuple[str, ...], found: list[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"Activations of {missing} are missing; got {found}.")


class SparseCoder(nn.Module):
    """A sparse code that reads some sites and writes some sites.

        pre = x @ W_enc.T + b_enc        x   [..., d_in]
        z   = activation_function(pre)   z   [..., n_features], few of them not zero
        y'  = z @ W_dec + b_dec          y'  [..., d_out]

    Rows of `W_enc` `[n_features, d_in]` and of `W_dec` `[n_features, d_out]` belong to features.
    """

    def __init__(
        self,
        reads: Columns,
        writes: Columns,
        n_features: int,
        activation_function: str = "topk",
        k: int | None = 100,
    ):
        super().__init__()
        function = make_activation_function(activation_function, n_features, k)
        self.reads = reads
        self.writes = writes
        self.W_enc = mx.zeros((n_features, reads.width))
        self.b_enc = mx.zeros((n_features,))
        self.W_dec = mx.zeros((n_features, writes.width))
        self.b_dec = mx.zeros((writes.width,))
        self.activation_name = activation_function
        self.activation_function = function

    @property
    def n_features(self) -> int:
        """The number of features."""
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """The width of what is read."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """The width of what is written."""
        return self.W_dec.shape[1]

    @property
    def k(self) -> int | None:
        """The number of features that may be active on one token (with BatchTopK on average);
        `None` where the activation function sets none."""
        return self.activation_function.options.get("k")

    def _joined(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        x = self.reads.join(x) if isinstance(x, Mapping) else mx.array(x)
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"The activation must have shape [..., {self.d_in}], got {tuple(x.shape)}."
            )
        return x.astype(self.W_enc.dtype)

    def pre_activations(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """`x @ W_enc.T + b_enc`, `[..., n_features]`."""
        return mx.addmm(self.b_enc, self._joined(x), self.W_enc.T)

    def encode(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """The code `[..., n_features]` of an activation `[..., d_in]`.

        A coder of several sites also takes `{site: array}`. Raises `ValueError` for another width.
        """
        return self.activation_function(self.pre_activations(x))

    def decode(self, z: mx.array) -> mx.array:
        """The reconstruction `[..., d_out]` of a code `[..., n_features]`."""
        z = mx.array(z)
        if z.ndim == 0 or z.shape[-1] != self.n_features:
            raise ValueError(
                f"The code must have shape [..., {self.n_features}], got {tuple(z.shape)}."
            )
        return z @ self.W_dec + self.b_dec

    def __call__(self, x: mx.array | Mapping[str, mx.array]) -> mx.array:
        """The reconstruction `[..., d_out]` of what is written, from what is read."""
        return self.decode(self.encode(x))
