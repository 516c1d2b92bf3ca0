"""The tokens that features make more and less likely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature, check_sized
from mlxterp.sae.features.display import visible
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import (
    LESS,
    MORE,
    Table,
    dress,
    names,
    new_axis,
    plain,
)
from mlxterp.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = Literal["total", "direct"]
Feature = int | Mapping[int, float]
FEATURES_PER_PASS = 128
TOKENS_PER_PASS = 512
WIDEST = 9.0  # of a token in a figure, in sizes of its font


@dataclass(frozen=True)
class LogitEffects:
    """The tokens that a feature makes most and least likely, with its effect on their logits.

    `path` is None where the effect is that of the decoder row by itself; else it is a derivative at
    real positions, its mean over `n_tokens` of them.
    """

    top: tuple[tuple[str, float], ...]
    bottom: tuple[tuple[str, float], ...]
    path: str | None = None
    n_tokens: int | None = None

    def __repr__(self) -> str:
        lines = [] if self.path is None else [self._title()]
        for name, tokens in (("raises", self.top), ("lowers", self.bottom)):
            lines.append(f"{name}  " + "  ".join(f"{t!r} ({x:.2f})" for t, x in tokens[:10]))
        return "\n".join(lines)

    def _title(self) -> str:
        if self.path is None:
            return "effect of the decoder row on the logits"
        return f"{self.path} effect on the logits, mean of {self.n_tokens:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def plot(self, ax: Axes | None = None, n: int = 8) -> Figure:
        """A matplotlib figure of the effects on the `n` tokens that are raised and lowered most, in
        logits for each unit of the feature."""
        pairs = [*self.top[:n], *reversed(self.bottom[:n])]
        ax = new_axis(5.2, 0.9 + 0.24 * len(pairs)) if ax is None else ax
        places = range(len(pairs))
        ax.barh(places, [x for _, x in pairs], color=[MORE if x > 0 else LESS for _, x in pairs])
        ax.set_yticks(places, names((t for t, _ in pairs), WIDEST), **plain())
        ax.invert_yaxis()
        ax.axvline(0, color="0.3", linewidth=0.8)
        return dress(ax, "effect on the logit, for a unit of the feature")

    def _repr_html_(self) -> str:
        cells = ([(visible(t), f"{x:.2f}") for t, x in side] for side in (self.top, self.bottom))
        rows = tuple(a + b for a, b in zip_longest(*cells, fillvalue=("", "")))
        return Table(self._title(), ("raises", "", "lowers", ""), rows)._repr_html_()


@overload
def logit_effects(
    coder: SparseCoder,
    source: ActivationSource,
    feature_id: int,
    top_k: int = ...,
    site: str | None = ...,
    texts: str | Sequence[str] | None = ...,
    path: Path = ...,
) -> LogitEffects: ...
@overload
def logit_effects(
    coder: SparseCoder,
    source: ActivationSource,
    feature_id: Iterable[int],
    top_k: int = ...,
    site: str | None = ...,
    texts: str | Sequence[str] | None = ...,
    path: Path = ...,
) -> dict[int, LogitEffects]: ...
def logit_effects(
    coder: SparseCoder,
    source: ActivationSource,
    feature_id: int | Iterable[int],
    top_k: int = 10,
    site: str | None = None,
    texts: str | Sequence[str] | None = None,
    path: Path = "total",
) -> LogitEffects | dict[int, LogitEffects]:
    """The tokens that a feature promotes and suppresses most; of several features, by id.

    Without `texts` the decoder row is read by the model's own final norm and head as if it were the
    residual stream; of a coder that writes several sites of one model the sum of the rows is, or
    that of one `site`.

    With `texts` it is the derivative of the logits by the feature's value at the same position,
    its mean over all tokens of the texts that are not special:

        total    d logits[t] / d z[t], where z * W_dec[site] is added to every site that the coder
                 writes, through all that the real model does from there on
        direct   d unembed(h[t] + z * W_dec) / dz, where h[t] is the last residual stream: what goes
                 there straight, past the layers between

    `total` takes a pass for every feature and token: it is for a few features and short texts.

    Raises `ValueError` where the row does not have the width of the stream (`total` does not need
    it), for a coder that writes several models where no site is named and, with `texts`, for one
    that normalises tokens.
    """
    if path not in get_args(Path):
        raise ValueError(f"path must be one of {get_args(Path)}, got {path!r}.")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    if texts is not None:
        check_sized(coder, "logit_effects of texts")
    several = isinstance(feature_id, Iterable)
    ids = [check_feature(coder, i) for i in (feature_id if several else [feature_id])]  # pyright: ignore
    model, n_tokens = written(coder, source, site)[0], None
    if texts is None:
        parts = _by_weights(coder, source, ids, site)
    else:
        rows, at = _token_rows(source, texts), _total if path == "total" else _direct
        n_tokens = sum(len(positions) for _, positions in rows)
        parts = (at(coder, source, some, site, rows) for some in _chunks(ids))
    way = None if texts is None else path
    found = [
        LogitEffects(*_ends(model, row, top_k), path=way, n_tokens=n_tokens)
        for part in parts
        for row in part
    ]
    return dict(zip(ids, found, strict=True)) if several else found[0]


def logit_directions(
    coder: SparseCoder,
    source: ActivationSource,
    features: Iterable[Feature],
    sites: str | Sequence[str] | None = None,
) -> np.ndarray:
    """What decoder rows do to the logits by themselves, `[n, vocabulary]`.

    Each of the `features` is an id or a sum of several, `{id: factor}`. As in `logit_effects` the
    rows are summed over the sites, all or those named. The result of thousands of features may be
    too large to hold: take them in parts.
    """
    return np.concatenate([*_by_weights(coder, source, list(features), sites)])


def written(
    coder: SparseCoder, source: ActivationSource, sites: str | Sequence[str] | None = None
) -> tuple[ActivationSource, dict[str, Any]]:
    """The one model that a coder writes, and by what name it knows each site of the coder.

    Raises `ValueError` where the sites, all or those named, are of several models.
    """
    names = (sites,) if isinstance(sites, str) else sites
    writes = coder.writes if names is None else coder.writes.those(tuple(names))
    owners = {name: owner(source, name) for name in writes.names}
    model = owners[writes.names[0]][0]
    if any(other is not model for other, _ in owners.values()):
        raise ValueError(f"This coder writes {writes}: name one of its sites with site=...")
    return model, {name: inner for name, (_, inner) in owners.items()}


def writes_stream(
    coder: SparseCoder, source: ActivationSource, sites: str | Sequence[str] | None = None
) -> bool:
    """Whether decoder rows can be read as the residual stream of one model."""
    try:
        _stream(coder, source, sites)
    except ValueError:
        return False
    return True


def _stream(
    coder: SparseCoder, source: ActivationSource, sites: str | Sequence[str] | None
) -> tuple[ActivationSource, dict[str, Any]]:
    """As `written`; raises `ValueError` where a site is not of the stream's width, too."""
    model, names = written(coder, source, sites)
    writes = coder.writes.those(tuple(names))
    width = getattr(model, "d_model", None) or writes.widths[0]
    if set(writes.widths) != {width}:
        raise ValueError(
            f"This coder writes {writes}, and only rows of the width of the residual stream, "
            f"{width}, can be read as such: name one of its sites with site=..."
        )
    if any(Site.from_string(str(site)).component == "attn_z" for site in names.values()):
        raise ValueError(
            f"This coder writes {writes}: an output projection follows, so that its rows are no "
            "directions of the residual stream."
        )
    return model, names


def decoder_rows(coder: SparseCoder, features: Sequence[Feature]) -> mx.array:
    """Their decoder rows, or sums of them, `[n, d_out]`, in float32."""
    whole = [f for f in features if not isinstance(f, Mapping)]
    if len(whole) == len(features) and len(coder.blocks) == 1:
        return coder.W_dec[mx.array(whole)].astype(mx.float32)
    terms = [f.items() if isinstance(f, Mapping) else [(f, 1.0)] for f in features]
    sums = [sum((s * coder.direction(i) for i, s in t), mx.zeros(coder.d_out)) for t in terms]
    return mx.stack(sums).astype(mx.float32)


def _by_weights(
    coder: SparseCoder,
    source: ActivationSource,
    features: Sequence[Feature],
    sites: str | Sequence[str] | None,
) -> Iterator[np.ndarray]:
    model, _ = _stream(coder, source, sites)
    for some in _chunks(features):
        yield _as_numpy(model.unembed(_summed(coder, source, some, sites)))


def _summed(
    coder: SparseCoder, source: ActivationSource, features: Sequence[Feature], sites: Any
) -> mx.array:
    rows, names = decoder_rows(coder, features), _stream(coder, source, sites)[1]
    return mx.stack([coder.writes.take(rows, (name,)) for name in names]).sum(axis=0)


def _direct(
    coder: SparseCoder, source: ActivationSource, features: Sequence[int], site: Any, rows: Any
) -> np.ndarray:
    """The mean derivative of the logits `[n_features, vocabulary]` past the layers between."""
    model, _ = _stream(coder, source, site)
    directions = _summed(coder, source, features, site)
    total: Any = 0.0
    for ids, positions in rows:
        h = last_residual(model, ids)[mx.array(positions)]
        slopes = [_slope(model.unembed, h, mx.broadcast_to(d, h.shape)) for d in directions]
        total = total + np.stack([_as_numpy(slope.sum(axis=0)) for slope in slopes])
    return total / sum(len(positions) for _, positions in rows)


def _total(
    coder: SparseCoder, source: ActivationSource, features: Sequence[int], site: Any, rows: Any
) -> np.ndarray:
    """The mean derivative of the logits `[n_features, vocabulary]` through the real model.

    Each position has a row of the batch to itself, in which the feature changes there alone.
    """
    model, names = written(coder, source, site)
    directions = decoder_rows(coder, features)
    total = np.zeros(len(features), object)
    for ids, positions in rows:
        per_pass = max(1, TOKENS_PER_PASS // len(ids))
        for start in range(0, len(positions), per_pass):
            own = mx.array(positions[start : start + per_pass])
            logits = _logits_of_values(coder, model, names, ids, own)
            for i, row in enumerate(directions):
                slope = _slope(partial(logits, row), mx.zeros(len(own)), mx.ones(len(own)))
                total[i] = total[i] + _as_numpy(slope.sum(axis=0))
    return np.stack([*total]) / sum(len(positions) for _, positions in rows)


def _logits_of_values(
    coder: SparseCoder, model: ActivationSource, names: Mapping[str, Any], ids: Any, own: mx.array
) -> Any:
    """The logits `[n, vocabulary]` at positions `own [n]` as a function of a decoder row and of the
    value `z [n]` times which it is added there."""
    tokens = mx.broadcast_to(mx.array(ids), (len(own), len(ids)))
    here = (mx.arange(len(ids)) == own[:, None]).astype(mx.float32)[..., None]

    def logits(row: mx.array, z: mx.array) -> mx.array:
        added = here * z[:, None, None]
        parts = {inner: coder.writes.take(row, (name,)) for name, inner in names.items()}
        edits = {
            inner: lambda x, part=part: x + (added * part).astype(x.dtype)
            for inner, part in parts.items()
        }
        return model.run(tokens, edit=edits).output[mx.arange(len(own)), own]

    return logits


def _slope(function: Any, x: mx.array, tangent: mx.array) -> mx.array:
    _, (slope,) = mx.jvp(function, [x], [tangent.astype(x.dtype)])
    return slope


def last_residual(model: ActivationSource, ids: Sequence[int]) -> mx.array:
    """The residual stream `[n_tokens, d_model]` after the last block, for one text."""
    site = model.site(-1, "resid_post")
    return model.run(mx.array([list(ids)]), capture=[site], stop=True)[site][0]


def _token_rows(
    source: ActivationSource, texts: str | Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The ids of each text, and the positions of those that are not special."""
    rows = source.encode_batch([texts] if isinstance(texts, str) else list(texts))
    special = source.special_token_ids
    found = [([*ids], [p for p, i in enumerate(ids) if i not in special]) for ids in rows]
    found = [(ids, positions) for ids, positions in found if positions]
    if not found:
        raise ValueError("texts must hold at least one token that is not special.")
    return found


def _ends(
    source: ActivationSource, values: np.ndarray, top_k: int
) -> list[tuple[tuple[str, float], ...]]:
    """The largest and the smallest values with their tokens."""
    n = min(top_k, len(values))
    sides = []
    for signed in (-values, values):
        ids = np.argpartition(signed, n - 1)[:n]
        ids = ids[np.argsort(signed[ids], kind="stable")]
        tokens = source.to_str_tokens(ids.tolist())
        sides.append(tuple((t, float(values[i])) for t, i in zip(tokens, ids, strict=True)))
    return sides


def _chunks(features: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(features), FEATURES_PER_PASS):
        yield features[start : start + FEATURES_PER_PASS]


def _as_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))
