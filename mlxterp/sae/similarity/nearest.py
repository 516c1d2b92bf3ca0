"""Which features are alike: by the directions that they read or write, and by when they fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.features.codes import association
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.kernels import top_k as select_top_k
from mlxterp.sae.similarity.directions import (
    Directions,
    Side,
    chance_of_nearest,
    directions_of,
    pair_of_directions,
)
from mlxterp.sae.visualization import Table

# Of a pair that fires apart: its cosine, the tokens on which independent features would both
# fire, and the share of these on which it may.
APART_COSINE, APART_EXPECTED, APART_SHARE = 0.1, 10.0, 0.1


class Neighbour(NamedTuple):
    """A feature, and the cosine of its direction with that of the one asked for."""

    feature_id: int
    cosine: float


@dataclass(frozen=True)
class Neighbours(Sequence[Neighbour]):
    """The features nearest to one, nearest first; a sequence of `(feature_id, cosine)`.

    `chance` is the largest cosine that as many random directions have on average.
    """

    feature_id: int
    by: Side
    found: tuple[Neighbour, ...]
    chance: float

    @overload
    def __getitem__(self, index: int) -> Neighbour: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Neighbour, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    @property
    def table(self) -> Table:
        """Features and cosines."""
        title = (
            f"features nearest to {self.feature_id} by {self.by} cosine; the nearest of as many "
            f"random directions: {self.chance:.2f}"
        )
        rows = ((str(near.feature_id), f"{near.cosine:+.3f}") for near in self.found)
        return Table(title, ("feature", "cosine"), (*rows,))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "feature_id": self.feature_id,
            "by": self.by,
            "chance": self.chance,
            "found": [near._asdict() for near in self.found],
        }


class Nearest(NamedTuple):
    """For every feature the nearest ones: `ids` and `cosines` `[n_features, k]`, nearest first."""

    ids: np.ndarray
    cosines: np.ndarray


def nearest(
    coder: SparseCoder,
    feature_id: int,
    other: SparseCoder | None = None,
    *,
    by: Side = "decoder",
    top_k: int = 10,
    site: str | None = None,
    other_site: str | None = None,
    absolute: bool = False,
) -> Neighbours:
    """The features whose directions are nearest to a feature's, in the coder or in another one.

        cosine = d_i . d_j / (|d_i| |d_j|)

    of the decoder rows (`by="decoder"`) or the encoder rows (`"encoder"`). Of coders of several
    sites they are the rows of all sites joined, each in units of its activations as in
    `coder.decoder_norms`, or those of one `site`; the other coder is compared at `other_site`,
    by default the one of the same name, or its only one.

    Cosines keep their sign, so that the opposite of a feature (-1), which is another feature where
    codes are not negative, comes last. With `absolute=True` features are ranked by the size of
    their cosines. Raises `ValueError` for an unknown feature or site and for widths that differ.
    """
    feature_id = check_feature(coder, feature_id)
    own, theirs = pair_of_directions(coder, other, by, site, other_site)
    cosines = own.cosines_with(feature_id, theirs)
    scores = np.abs(cosines) if absolute else cosines.copy()
    left_out = 0
    if other is None:
        scores[feature_id], left_out = -np.inf, 1
    best = np.argsort(-scores, kind="stable")[: min(_checked(top_k), len(scores) - left_out)]
    found = tuple(Neighbour(int(i), float(cosines[i])) for i in best)
    n = (2 if absolute else 1) * (theirs.n_features - left_out)
    return Neighbours(feature_id, by, found, chance_of_nearest(n, own.dimensions(feature_id)))


def nearest_all(
    coder: SparseCoder,
    other: SparseCoder | None = None,
    *,
    by: Side = "decoder",
    top_k: int = 10,
    site: str | None = None,
    other_site: str | None = None,
    absolute: bool = False,
) -> Nearest:
    """The nearest features of every feature, as in `nearest`, in blocks of bounded memory."""
    own, theirs = pair_of_directions(coder, other, by, site, other_site)
    return scan(own, theirs, _checked(top_k), absolute, within=other is None)[0]


def scan(
    own: Directions, theirs: Directions, top_k: int, absolute: bool = False, within: bool = False
) -> tuple[Nearest, Nearest]:
    """The `top_k` nearest of `theirs` to each of `own`, and the one nearest of `own` to each of
    `theirs`, in one pass over all cosines; `within` leaves a feature itself out."""
    k = min(top_k, theirs.n_features - within)
    ids = np.zeros((own.n_features, k), np.int64)
    cosines = np.zeros((own.n_features, k), np.float32)
    back_ids, back = mx.zeros(theirs.n_features, mx.int32), mx.full(theirs.n_features, -mx.inf)
    back_cosines = mx.zeros(theirs.n_features)
    for features, block in own.cosines(theirs):
        scores = mx.abs(block) if absolute else block
        if within:
            row, n = mx.arange(len(block)), features.start
            scores = mx.where(mx.arange(theirs.n_features) == row[:, None] + n, -2.0, scores)
        chosen = select_top_k(scores, k) if k else mx.zeros((len(block), 0), mx.int32)
        at = scores.argmax(axis=0)
        found, best = mx.take_along_axis(block, chosen, axis=-1), scores.max(axis=0)
        better = best > back
        back = mx.where(better, best, back)
        back_ids = mx.where(better, at.astype(mx.int32) + features.start, back_ids)
        signed = mx.take_along_axis(block, at[None], axis=0)[0]
        back_cosines = mx.where(better, signed, back_cosines)
        mx.eval(chosen, found, back, back_ids, back_cosines)
        ids[features], cosines[features] = np.array(chosen), np.array(found)
    order = np.lexsort((ids, -(np.abs(cosines) if absolute else cosines)))
    there = Nearest(*(np.take_along_axis(array, order, axis=1) for array in (ids, cosines)))
    return there, Nearest(np.array(back_ids)[:, None], np.array(back_cosines)[:, None])


def _checked(top_k: int) -> int:
    if top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}.")
    return top_k


@dataclass(frozen=True)
class Relation:
    """Two features: the cosine of their decoder rows, on how many tokens both fire (`together`),
    on how many they would if they were independent (`expected`), and `jaccard`, the tokens of both
    by those of either.

    `apart`: they write alike (a cosine above .1), and still fire together on less than a tenth of
    the tokens expected, of which there are ten or more. That is a hint of absorption: one feature
    takes the place of the other where both should fire. It is no proof.
    """

    feature_id: int
    cosine: float
    together: int
    expected: float
    jaccard: float
    apart: bool


@dataclass(frozen=True)
class Neighbourhood:
    """The features nearest to one, and those that fire most often with it, by cosine."""

    feature_id: int
    relations: tuple[Relation, ...]
    n_tokens: int

    @property
    def table(self) -> Table:
        """One line for each of the features."""
        header = ("feature", "cosine", "together", "expected", "Jaccard", "")
        rows = (
            (
                str(r.feature_id), f"{r.cosine:+.3f}", f"{r.together:,}", f"{r.expected:,.1f}",
                f"{r.jaccard:.3f}", "apart" if r.apart else "",
            )
            for r in self.relations
        )  # fmt: skip
        return Table(
            f"around feature {self.feature_id}, on {self.n_tokens:,} tokens", header, (*rows,)
        )

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def neighbourhood(data: FeatureData, feature_id: int, top_k: int = 10) -> Neighbourhood:
    """A feature beside the `top_k` nearest by decoder cosine and the `top_k` that fire most often
    on the same tokens, by Jaccard index; counted on the tokens whose codes are kept.

    Reference: features that write alike and never fire together are a sign of absorption, Chanin
    et al. 2024, arXiv 2409.14507.
    """
    feature_id = check_feature(data.coder, feature_id)
    own = directions_of(data.coder)
    cosines = own.cosines_with(feature_id, own)
    together, counts = data.codes.together(feature_id), data.codes.firing_counts
    n_tokens = data.codes.n_tokens
    jaccard = association(together, counts, feature_id, n_tokens, "jaccard")
    expected = counts[feature_id] * counts / max(1, n_tokens)
    chosen: set[int] = set()
    for scores in (cosines, np.where(together > 0, jaccard, -np.inf)):
        ranked = np.argsort(-scores, kind="stable")[: _checked(top_k) + 1].tolist()
        others = [i for i in ranked if i != feature_id and scores[i] > -np.inf]
        chosen |= set(others[:top_k])
    apart = (cosines > APART_COSINE) & (expected >= APART_EXPECTED)
    apart &= together <= APART_SHARE * expected
    relations = (
        Relation(
            i, float(cosines[i]), int(together[i]), float(expected[i]), float(jaccard[i]),
            bool(apart[i]),
        )
        for i in sorted(chosen, key=lambda i: -cosines[i])
    )  # fmt: skip
    return Neighbourhood(feature_id, tuple(relations), n_tokens)
