"""The rows of a coder as directions whose cosines are taken, a block of them at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder

Side = Literal["decoder", "encoder"]

BLOCK_ENTRIES, BLOCK_ROWS = 1 << 24, 4096
CHANCE_DRAWS = 64


@dataclass(frozen=True, eq=False)
class Part:
    """The rows `[n, width]` of the features `ids` `[n]`, which are zero outside `columns`.

    Directions are `rows * scale * inverse`, of norm 1, with `scale` `[width]` and `inverse` `[n]`;
    they are never made of all rows at once.
    """

    ids: np.ndarray
    columns: slice
    rows: mx.array
    scale: mx.array
    inverse: mx.array

    @classmethod
    def of(cls, ids: np.ndarray, columns: slice, rows: mx.array, scale: mx.array) -> Self:
        """With the inverse norms found, 0 of rows that are zero."""
        found = [
            mx.linalg.norm(rows[start : start + BLOCK_ROWS] * scale, axis=-1)
            for start in range(0, len(ids), BLOCK_ROWS)
        ]
        norms = mx.concatenate(found) if found else mx.zeros((0,))
        inverse = mx.where(norms > 0, 1 / mx.where(norms > 0, norms, 1), 0)
        mx.eval(inverse)
        return cls(ids, columns, rows, scale, inverse)

    def directions(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop` of the part, of norm 1."""
        return self.rows[start:stop] * self.scale * self.inverse[start:stop, None]

    def cosines(self, start: int, stop: int, other: Part) -> mx.array:
        """The cosines `[stop - start, n_other]` of some rows with all of another part."""
        first = max(self.columns.start, other.columns.start)
        last = min(self.columns.stop, other.columns.stop)
        if first >= last or not len(other.ids):
            return mx.zeros((stop - start, len(other.ids)))
        own, others = (
            slice(first - part.columns.start, last - part.columns.start) for part in (self, other)
        )
        left = self.directions(start, stop)[:, own] * other.scale[others]
        return left @ other.rows[:, others].T * other.inverse


@dataclass(frozen=True, eq=False)
class Directions:
    """The decoder or encoder rows of a coder as directions in the joined columns of `sites`.

    A feature that has no row there, or a row that is zero, has a cosine of 0 with everything.
    """

    sites: Columns
    parts: tuple[Part, ...]

    @cached_property
    def n_features(self) -> int:
        """The number of features."""
        return sum(len(part.ids) for part in self.parts)

    def take(self, ids: np.ndarray) -> Directions:
        """The directions of some features, by ascending ids, with numbers from 0."""
        parts, n = [], 0
        for part in self.parts:
            at = np.flatnonzero(np.isin(part.ids, ids))
            rows, inverse = (array[mx.array(at)] for array in (part.rows, part.inverse))
            own = np.arange(n, n + len(at))
            parts.append(replace(part, ids=own, rows=rows, inverse=inverse))
            n += len(at)
        return Directions(self.sites, tuple(part for part in parts if len(part.ids)))

    def cosines(self, other: Directions) -> Iterator[tuple[slice, mx.array]]:
        """The cosines `[n, other.n_features]` of one block of features after another."""
        size = min(BLOCK_ROWS, max(1, BLOCK_ENTRIES // max(1, other.n_features)))
        for part, start, stop in self._blocks(size):
            found = [part.cosines(start, stop, theirs) for theirs in other.parts]
            yield (
                slice(int(part.ids[start]), int(part.ids[stop - 1]) + 1),
                mx.clip(mx.concatenate(found, axis=-1), -1, 1),
            )

    def cosines_with(self, feature_id: int, other: Directions) -> np.ndarray:
        """The cosines `[other.n_features]` of one feature."""
        ((_, cosines),) = self.take(np.array([feature_id])).cosines(other)
        return np.array(cosines[0])

    def cosines_of_pairs(
        self, own: np.ndarray, other: Directions, theirs: np.ndarray
    ) -> np.ndarray:
        """The cosines `[n]` of the features `own` `[n]` with the features `theirs` `[n]`."""
        found = np.zeros(len(own), np.float32)
        for a in self.parts:
            for b in other.parts:
                first = max(a.columns.start, b.columns.start)
                last = min(a.columns.stop, b.columns.stop)
                here = np.flatnonzero(np.isin(own, a.ids) & np.isin(theirs, b.ids))
                for start in range(0, len(here) if first < last else 0, BLOCK_ROWS):
                    at = here[start : start + BLOCK_ROWS]
                    units = [
                        _units(part, ids[at])[:, first - part.columns.start :][:, : last - first]
                        for part, ids in ((a, own), (b, theirs))
                    ]
                    found[at] = np.array((units[0] * units[1]).sum(axis=-1))
        return found.clip(-1, 1)

    def blocks(self) -> Iterator[tuple[slice, slice, mx.array]]:
        """Features, their columns and their directions `[n, width]` there, block by block."""
        for part, start, stop in self._blocks(BLOCK_ROWS):
            ids = slice(int(part.ids[start]), int(part.ids[stop - 1]) + 1)
            yield ids, part.columns, part.directions(start, stop)

    def _blocks(self, size: int) -> Iterator[tuple[Part, int, int]]:
        for part in self.parts:
            for start in range(0, len(part.ids), size):
                yield part, start, min(start + size, len(part.ids))

    def random(self, seed: int = 0) -> Directions:
        """As many random directions, each with the norms at the sites that the feature has."""
        parts = []
        keys = mx.random.split(mx.random.key(seed), len(self.parts))
        for part, key in zip(self.parts, keys, strict=True):
            rows = mx.random.normal(part.rows.shape, key=key)
            pieces = []
            for columns in _pieces(self.sites, part.columns):
                wanted = mx.linalg.norm(part.rows[:, columns] * part.scale[columns], axis=-1)
                norms = mx.linalg.norm(rows[:, columns], axis=-1)
                pieces.append(rows[:, columns] * (wanted / norms)[:, None])
            rows = mx.concatenate(pieces, axis=-1) if len(pieces) > 1 else (pieces or [rows])[0]
            mx.eval(rows)
            parts.append(replace(part, rows=rows, scale=mx.ones_like(part.scale)))
        return Directions(self.sites, tuple(parts))

    def dimensions(self, feature_id: int) -> float:
        """The number of dimensions among which a feature's direction is spread: the width of a
        site, or more where the norm is shared by several."""
        for part in self.parts:
            if feature_id in part.ids:
                row = np.array(_units(part, np.array([feature_id]))[0], np.float64)
                pieces = _pieces(self.sites, part.columns)
                spread = sum(np.square(row[p]).sum() ** 2 / (p.stop - p.start) for p in pieces)
                return 1 / spread if spread else float(self.sites.width)
        raise IndexError(f"feature_id must be below {self.n_features}, got {feature_id}.")


def directions_of(coder: SparseCoder, by: Side = "decoder", site: str | None = None) -> Directions:
    """The decoder or encoder rows of all features, at one site or at all of them together.

    Sites together count as they did in training, which scaled their activations to one size
    (`coder.site_scale`). Raises `ValueError` for another side and for an unknown site.
    """
    if by not in ("decoder", "encoder"):
        raise ValueError(f"by must be 'decoder' or 'encoder', got {by!r}.")
    columns = coder.writes if by == "decoder" else coder.reads
    chosen = columns if site is None else columns.only(site)
    wanted = slice(0, columns.width) if site is None else columns.slices[site]
    scale = _scale(coder, by)
    matrices = coder.decoder_blocks() if by == "decoder" else coder.of_blocks(coder.W_enc)
    parts = []
    for block, rows in zip(coder.blocks, matrices, strict=True):
        there = block.writes if by == "decoder" else block.reads
        first, last = max(there.start, wanted.start), min(there.stop, wanted.stop)
        last = max(first, last)
        rows = rows[:, first - there.start : last - there.start].astype(mx.float32)
        own = slice(first - wanted.start, last - wanted.start)
        ids = np.arange(block.features.start, block.features.stop)
        parts.append(Part.of(ids, own, rows, scale[first:last]))
    return Directions(chosen, tuple(parts))


def pair_of_directions(
    coder: SparseCoder,
    other: SparseCoder | None,
    by: Side,
    site: str | None,
    other_site: str | None,
) -> tuple[Directions, Directions]:
    """The directions of two coders, in columns of the same widths; see `similarity.nearest`."""
    own = directions_of(coder, by, site)
    if other is None:
        return own, own
    sites = other.writes if by == "decoder" else other.reads
    if other_site is None and site is not None and (len(sites.names) > 1 or site in sites.names):
        other_site = site
    theirs = directions_of(other, by, other_site)
    names = own.sites.names, theirs.sites.names
    if names[0] != names[1] and set(names[0]) == set(names[1]):
        raise ValueError(
            f"The sites must be in the same order, got {own.sites} and {theirs.sites}."
        )
    if own.sites.widths != theirs.sites.widths:
        raise ValueError(
            f"Directions are compared in columns of the same widths, got {own.sites} and "
            f"{theirs.sites}; site=... and other_site=... choose one site of several."
        )
    return own, theirs


def chance_of_nearest(n: int, dimensions: float) -> float:
    """The mean of the largest cosine of a direction with `n` random ones."""
    if n < 1 or dimensions <= 1:
        return 1.0 if n else 0.0
    rng = np.random.default_rng(0)
    along = rng.standard_normal((CHANCE_DRAWS, n), np.float32)
    rest = rng.chisquare(dimensions - 1, (CHANCE_DRAWS, n))
    return float((along / np.sqrt(np.square(along) + rest)).max(axis=1).mean())


def needed(module: str, package: str = "", extra: str = "analysis") -> Any:
    """A module that is imported where it is used; raises `ImportError` naming the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ImportError(f"{package} is missing: pip install 'mlxterp[{extra}]'") from error


def _units(part: Part, ids: np.ndarray) -> mx.array:
    at = mx.array(np.searchsorted(part.ids, ids))
    return part.rows[at] * part.scale * part.inverse[at, None]


def _scale(coder: SparseCoder, by: Side) -> mx.array:
    """By column, what brings all sites to one size."""
    columns = coder.writes if by == "decoder" else coder.reads
    if "site_scale" not in coder or (by == "encoder" and coder.reads != coder.writes):
        return mx.ones((columns.width,))
    by_site = coder.site_scale.astype(mx.float32)
    # What an encoder row reads is scaled, and so the row itself is by the inverse.
    by_site = by_site if by == "decoder" else 1 / by_site
    parts = [mx.broadcast_to(by_site[i], (d,)) for i, d in enumerate(columns.widths)]
    return mx.concatenate(parts)


def _pieces(sites: Columns, columns: slice) -> list[slice]:
    """The columns of each site within some columns, counted from the first of these."""
    return [
        slice(part.start - columns.start, part.stop - columns.start)
        for part in sites.slices.values()
        if columns.start <= part.start and part.stop <= columns.stop and part.start < part.stop
    ]
