"""What features read and write, from weights alone: tokens, and features of other coders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.features.logit_effects import logit_effects
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import LESS, MORE, Table, dress, new_figure
from mlxterp.sites import COMPONENTS, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS_PER_BLOCK = 4096
LARGEST_MATRIX = 2**24
NormWeights = Mapping[str, mx.array]


@dataclass(frozen=True)
class Connected:
    """What drives a feature (`direction="reads"`) or what it drives (`"writes"`).

    `top` and `bottom` are the largest and the smallest weights, with a token's text or the number
    of a feature each.
    """

    feature_id: int
    direction: str
    top: tuple[tuple[str | int, float], ...]
    bottom: tuple[tuple[str | int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        cells = ([(str(name), f"{w:.2f}") for name, w in side] for side in (self.top, self.bottom))
        rows = tuple(a + b for a, b in zip_longest(*cells, fillvalue=("", "")))
        return Table(self._title(), ("+", "", "-", ""), rows)._repr_html_()

    def _title(self) -> str:
        what = "tokens" if any(isinstance(name, str) for name, _ in self.top) else "features"
        return f"{what} that feature {self.feature_id} {self.direction}"

    def __repr__(self) -> str:
        lines = [self._title()]
        for sign, pairs in (("+", self.top), ("-", self.bottom)):
            lines.append(f"  {sign} " + "  ".join(f"{name!r} ({w:.2f})" for name, w in pairs[:8]))
        return "\n".join(lines)


@dataclass(frozen=True)
class Connection:
    """The weight from a feature of an earlier coder to one of a later coder."""

    earlier: int
    later: int
    weight: float

    def __repr__(self) -> str:
        return f"{self.earlier} -> {self.later}: {self.weight:+.3f}"


@dataclass(frozen=True, eq=False)
class InputInvariantWeights:
    """The weights between all features of two coders.

    `connections` are the strongest of them, by size; `rms` is the root mean square of all weights,
    with which a strong one can be compared; `matrix` `[n_earlier, n_later]` holds all, `None` where
    they are too many.
    """

    n_earlier: int
    n_later: int
    rms: float
    connections: tuple[Connection, ...]
    matrix: np.ndarray | None = None

    def strongest(self, n: int = 10) -> tuple[Connection, ...]:
        """The `n` connections of the largest weight, of either sign."""
        return self.connections[:n]

    def to_dict(self) -> dict[str, Any]:
        """The connections and the sizes, without the matrix."""
        listed = [asdict(connection) for connection in self.connections]
        return {
            "n_earlier": self.n_earlier,
            "n_later": self.n_later,
            "rms": self.rms,
            "connections": listed,
        }

    def _times(self, connection: Connection) -> float:
        return abs(connection.weight) / self.rms if self.rms else 0.0

    def __repr__(self) -> str:
        lines = [
            f"InputInvariantWeights({self.n_earlier:,} earlier x {self.n_later:,} later features, "
            f"root mean square {self.rms:.3g})"
        ]
        lines += [f"  {c!r}  ({self._times(c):.1f} times that)" for c in self.strongest()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = tuple(
            (f"{c.earlier} → {c.later}", f"{c.weight:+.3f}", f"{self._times(c):.1f}")
            for c in self.strongest()
        )
        title = (
            f"Weights of {self.n_earlier:,} earlier x {self.n_later:,} later features, "
            f"root mean square {self.rms:.3g}"
        )
        return Table(title, ("features", "weight", "times that"), rows)._repr_html_()

    def plot(self, n: int = 20, axes: Axes | None = None) -> Figure:
        """A matplotlib figure of the `n` strongest connections, as bars; the band is what weights
        are on average. Raises `ImportError` where matplotlib is missing."""
        shown = self.strongest(n)
        ax: Any = axes or new_figure(5.2, 0.8 + 0.24 * len(shown)).subplots()
        colors = [MORE if c.weight > 0 else LESS for c in shown]
        ax.axvspan(-self.rms, self.rms, color="0.9", zorder=0)
        ax.barh(range(len(shown)), [c.weight for c in shown], color=colors)
        ax.set_yticks(range(len(shown)), [f"{c.earlier} → {c.later}" for c in shown])
        ax.invert_yaxis()
        ax.axvline(0, color="0.3", linewidth=0.8)
        return dress(ax, "weight of the connection", "earlier feature → later feature")


def reads(
    coder: SparseCoder,
    feature_id: int,
    other: SparseCoder | ActivationSource,
    *,
    top_k: int = 10,
    norm_weights: NormWeights | None = None,
) -> Connected:
    """What drives a feature: the features of an earlier coder, or the tokens of a model.

    The weight of a token is `W_enc[i] . embedding`, the embedding being what the first block
    receives for the token alone; for features and `norm_weights` see `input_invariant_weights`.
    Raises `ValueError` where the coder does not read the width of the stream.
    """
    feature_id = check_feature(coder, feature_id)
    late = _row(_encoders(coder, norm_weights), feature_id)
    if isinstance(other, SparseCoder):
        found = np.zeros(other.n_features)
        for early in _decoders(other):
            if (product := _product(early, late)) is not None:
                found[early.features] = np.array(product)[:, 0]
        return Connected(feature_id, "reads", *_ends(found, top_k))
    model = owner(other, coder.reads.names[0])[0]
    weights = _token_weights(model, mx.stack(list(late.rows.values())).sum(axis=0)[0])
    return Connected(feature_id, "reads", *_ends(weights, top_k, model))


def writes(
    coder: SparseCoder,
    feature_id: int,
    other: SparseCoder | ActivationSource,
    *,
    top_k: int = 10,
    site: str | None = None,
    norm_weights: NormWeights | None = None,
) -> Connected:
    """What a feature drives: the features of a later coder, or the tokens of a model, through the
    model's own head as in `logit_effects` (of one `site`, where it writes several).

    For features and `norm_weights` see `input_invariant_weights`.
    """
    feature_id = check_feature(coder, feature_id)
    if not isinstance(other, SparseCoder):
        effects = logit_effects(coder, other, feature_id, top_k, site)
        return Connected(feature_id, "writes", effects.top, effects.bottom)
    early = _row(_decoders(coder), feature_id)
    if site is not None:
        if site not in early.rows:
            raise ValueError(f"Feature {feature_id} writes {[*early.rows]}, got site={site!r}.")
        early = _Part(early.features, {site: early.rows[site]})
    found = np.zeros(other.n_features)
    for late in _encoders(other, norm_weights):
        if (product := _product(early, late)) is not None:
            found[late.features] = np.array(product)[0]
    return Connected(feature_id, "writes", *_ends(found, top_k))


def input_invariant_weights(
    earlier: SparseCoder,
    later: SparseCoder,
    *,
    top_k: int = 100,
    norm_weights: NormWeights | None = None,
) -> InputInvariantWeights:
    """How strongly each feature of one coder drives each of another through the residual stream.

        weights = W_dec_earlier @ W_enc_later.T     [n_earlier, n_later]

    What a feature with value `z` adds to the later one's pre-activation is `z` times its weight,
    whatever the input, divided by what the norm before the later coder divides by. Left out are
    that divisor, the mean that a LayerNorm subtracts, a coder's own norm of tokens, and all paths
    through attention and other MLPs. An RMSNorm's weight is taken into account where `norm_weights`
    gives it, `[width]` by read site of the later coder, as in `{"layers.3.mlp_in": norm.weight}`.

    Of coders of several sites each site that is written adds to each that is read further on in
    the model, with attention before the MLP in a layer; the two coders may be the same. Products
    are made in blocks: the `top_k` strongest pairs are kept, and the whole matrix up to 16 million
    entries. Raises `ValueError` for widths that differ and where nothing is written before
    something is read.

    Reference: Dunefsky et al. 2024, arXiv 2406.11944.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}.")
    shape = earlier.n_features, later.n_features
    matrix = np.zeros(shape, np.float32) if np.prod(shape) <= LARGEST_MATRIX else None
    best, squares, connected = _Strongest(top_k), 0.0, False
    for early in _in_blocks(_decoders(earlier)):
        for late in _in_blocks(_encoders(later, norm_weights)):
            if (product := _product(early, late)) is None:
                continue
            connected = True
            weights = np.array(product)
            squares += np.array(product.square().sum(axis=1), np.float64).sum()
            best.add(weights, early.features.start, late.features.start)
            if matrix is not None:
                matrix[early.features, late.features] = weights
    if not connected:
        raise ValueError(
            f"Nothing that the earlier coder writes, {earlier.writes}, comes before what the later "
            f"one reads, {later.reads}."
        )
    rms = float(np.sqrt(squares / np.prod(shape)))
    return InputInvariantWeights(*shape, rms, best.connections(), matrix)


@dataclass(frozen=True)
class _Part:
    """The rows `[n, width]` of some features at each of some sites."""

    features: slice
    rows: Mapping[str, mx.array]

    def of(self, start: int, stop: int) -> _Part:
        first = self.features.start
        rows = {name: rows[start - first : stop - first] for name, rows in self.rows.items()}
        return _Part(slice(start, stop), rows)


def _decoders(coder: SparseCoder) -> Iterator[_Part]:
    """What features write, by block."""
    for block, rows in zip(coder.blocks, coder.decoder_blocks(), strict=True):
        slices = {name: coder.writes.slices[name] for name in coder.writes.names[block.sites]}
        yield _Part(block.features, _columns(rows, slices, block.writes.start))


def _encoders(coder: SparseCoder, norm_weights: NormWeights | None) -> Iterator[_Part]:
    """What features read, by block, times the weight of the norm before each site."""
    norms = norm_weights or {}
    for name in norms:
        coder.reads.only(name)
    for block, rows in zip(coder.blocks, coder.of_blocks(coder.W_enc), strict=True):
        slices = {
            name: part
            for name, part in coder.reads.slices.items()
            if block.reads.start <= part.start and part.stop <= block.reads.stop
        }
        found = _columns(rows, slices, block.reads.start)
        yield _Part(
            block.features, {n: x * norms[n] if n in norms else x for n, x in found.items()}
        )


def _columns(rows: mx.array, slices: Mapping[str, slice], first: int) -> dict[str, mx.array]:
    return {
        name: rows[:, part.start - first : part.stop - first].astype(mx.float32)
        for name, part in slices.items()
    }


def _row(parts: Iterable[_Part], feature_id: int) -> _Part:
    part = next(part for part in parts if feature_id < part.features.stop)
    return part.of(feature_id, feature_id + 1)


def _in_blocks(parts: Iterable[_Part]) -> Iterator[_Part]:
    for part in parts:
        end = part.features.stop
        for start in range(part.features.start, end, ROWS_PER_BLOCK):
            yield part.of(start, min(start + ROWS_PER_BLOCK, end))


def _product(early: _Part, late: _Part) -> mx.array | None:
    """The weights `[n_early, n_late]`; None where nothing written comes before what is read."""
    products = []
    for site, encoder in late.rows.items():
        before = [rows for name, rows in early.rows.items() if _precedes(name, site)]
        for rows in before:
            if rows.shape[1] != encoder.shape[1]:
                raise ValueError(
                    f"What is written has width {rows.shape[1]}, {site} has {encoder.shape[1]}: "
                    "features are connected through the residual stream of one model."
                )
        if before:
            products.append(sum(before[1:], before[0]) @ encoder.T)
    return sum(products[1:], products[0]) if products else None


def _precedes(written: str, read: str) -> bool:
    """Whether one site is before the other in the same model; unknown names are taken to be."""
    (model, _, name), (other, _, later) = written.rpartition(":"), read.rpartition(":")
    places = [Site.from_string(name), Site.from_string(later)]
    if model != other or places[0].component == "attn_z":  # a projection follows it
        return False
    if any(place.layer is None or place.component not in COMPONENTS for place in places):
        return True
    first, second = ((place.layer, COMPONENTS.index(place.component)) for place in places)
    return first < second


def token_embeddings(model: ActivationSource, width: int) -> Iterator[tuple[int, mx.array]]:
    """What the first block receives for each token alone, `[n, width]` in float32, some tokens at a
    time with the first of them.

    Raises `ValueError` where that has another width, and for a model that has no `vocab_size`.
    """
    size = getattr(model, "vocab_size", None)
    if size is None:
        raise ValueError("The tokens that a feature reads need a model that has a vocab_size.")
    site = str(model.site(0, "resid_pre"))
    if model.width(site) != width:
        raise ValueError(
            f"This coder reads a width of {width}, and embeddings have {model.width(site)}."
        )
    for start in range(0, size, ROWS_PER_BLOCK):
        tokens = mx.arange(start, min(start + ROWS_PER_BLOCK, size))[:, None]
        yield start, model.run(tokens, capture=[site], stop=True)[site][:, 0].astype(mx.float32)


def _token_weights(model: ActivationSource, row: mx.array) -> np.ndarray:
    """The product of every token's embedding with a row, `[n_vocabulary]`."""
    return np.concatenate([np.array(x @ row) for _, x in token_embeddings(model, len(row))])


def _ends(
    weights: np.ndarray, top_k: int, model: ActivationSource | None = None
) -> list[tuple[tuple[str | int, float], ...]]:
    """The largest and the smallest weights, with tokens of a model or with numbers."""
    order = np.argsort(weights)
    return [
        tuple((int(i) if model is None else model.to_str_tokens([int(i)])[0], float(weights[i]))
              for i in ids)
        for ids in (order[::-1][:top_k], order[:top_k])
    ]  # fmt: skip


class _Strongest:
    """The entries of the largest size among matrices that come one after another."""

    def __init__(self, n: int):
        self._n = n
        self._found = np.zeros((0, 3))

    def add(self, weights: np.ndarray, first_row: int, first_column: int) -> None:
        """Let the entries of a part of the whole matrix compete."""
        flat = np.abs(weights).reshape(-1)
        full = len(self._found) == self._n
        # Few entries pass the bar once there is one, so that sorting them costs little.
        at = np.flatnonzero(flat > abs(self._found[-1, 2])) if full else np.arange(len(flat))
        if len(at) > self._n:
            at = at[np.argpartition(-flat[at], self._n)[: self._n]]
        rows, columns = np.unravel_index(at, weights.shape)
        added = np.stack([rows + first_row, columns + first_column, weights[rows, columns]], axis=1)
        found = np.concatenate([self._found, added])
        self._found = found[np.argsort(-np.abs(found[:, 2]), kind="stable")[: self._n]]

    def connections(self) -> tuple[Connection, ...]:
        """What is left, strongest first."""
        return tuple(Connection(int(i), int(j), float(weight)) for i, j, weight in self._found)
