"""A model on one prompt as an affine function of what its coders find there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.ablation import TOKENS_PER_PASS, Found, find
from mlxterp.sae.circuits.behavior.targets import Edits
from mlxterp.sae.circuits.dataset.pathway import COTANGENTS_PER_PASS
from mlxterp.sae.circuits.derivatives import for_each
from mlxterp.sae.circuits.graph.held import Held, described, embeddings, held_edits, other_mlps
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.source import FreezableSource

# What is looked at: `run(tokens [B, S], edits)` returns `[B, n]`, affine in what is written.
Run = Callable[[mx.array, Edits], mx.array]

ENTRIES_PER_PASS = 1 << 26  # of the derivatives that are held at once


class Replacement:
    """A model on one prompt whose attention patterns and norm scales are held, with coders in the
    place of what they describe.

    Sources write into the residual stream: features that fire, the errors of coders, and the
    embeddings. MLPs that no coder describes are held, all of what they write is error. Everything
    else is then an affine function of what the sources write:

        value = bias + sum over sources of (their part),

    which `rows` finds by derivatives, `bias` by a pass without sources, and `gains` by actual
    interventions. Sources are numbered: `features [n, 3]` (coder, position, feature) with their
    `values` first, then errors (by held site, then position), then embeddings by position.

    Reference: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
    Models".
    """

    def __init__(
        self, source: FreezableSource, coders: Sequence[SparseCoder], tokens: Sequence[int]
    ):
        self.source, self.coders = source, tuple(coders)
        self.tokens = mx.array([[*tokens]])
        self.found: tuple[Found, ...] = tuple(
            find(source, dict(enumerate(coders)), tokens).values()
        )
        codes = [np.array(found.codes) for found in self.found]
        places = [np.argwhere(z) for z in codes]
        self.features = np.concatenate(
            [np.insert(at, 0, i, axis=1) for i, at in enumerate(places)] or [np.zeros((0, 3), int)]
        )
        self.values = np.concatenate(
            [z[tuple(at.T)] for z, at in zip(codes, places, strict=True)] or [np.zeros(0)]
        )
        self.held: tuple[Held, ...] = (
            embeddings(source, self.tokens),
            *described(self.coders, self.found),
            *other_mlps(source, self.coders, self.tokens),
        )

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the prompt."""
        return self.tokens.shape[1]

    @property
    def error_sites(self) -> tuple[str, ...]:
        """The sites whose errors are sources, in the order of their numbers."""
        return tuple(held.name for held in self.held[1:])

    @property
    def n_sources(self) -> int:
        """The number of sources of all kinds."""
        return len(self.features) + self.n_tokens * len(self.held)

    @property
    def rows_per_pass(self) -> int:
        """How many derivatives are taken at once, so that they do not fill the memory."""
        size = sum(held.base.size for held in self.held)
        return max(1, min(COTANGENTS_PER_PASS, ENTRIES_PER_PASS // size))

    def rows(self, run: Run, n: int) -> np.ndarray:
        """The part of each of `n` values that each source has, `[n, n_sources]`."""
        unit, found = mx.eye(n), [np.zeros((0, self.n_sources), np.float32)]
        zeros = [mx.zeros((1, *held.base.shape)) for held in self.held]

        def values(*more: mx.array) -> mx.array:
            written = [h.base + delta for h, delta in zip(self.held, more, strict=True)]
            return run(self.tokens, self.edits(written))[0]

        def slopes(cotangent: mx.array) -> list[mx.array]:
            return [x[0] for x in mx.vjp(values, zeros, [cotangent])[1]]

        with self.source.frozen():
            for start in range(0, n, self.rows_per_pass):
                some = unit[start : start + self.rows_per_pass]
                found.append(self._parts(for_each(slopes, some)))
        return np.concatenate(found)

    def bias(self, run: Run) -> np.ndarray:
        """The values without any source, `[n]`: what biases alone lead to."""
        written = [mx.broadcast_to(held.bias, held.base.shape) for held in self.held]
        with self.source.frozen(at=self.tokens):
            return np.array(run(self.tokens, self.edits(written))[0])

    def clean(self, run: Run) -> np.ndarray:
        """The values in the plain model, `[n]`."""
        return np.array(run(self.tokens, {})[0])

    def gains(
        self,
        run: Run,
        numbers: Sequence[int | tuple[int, ...]],
        factor: float = 1.0,
        frozen: bool = True,
    ) -> np.ndarray:
        """By how much the values rise where a source, or several together, write `factor` times
        themselves more, measured for one after the other, `[len(numbers), n]`; with `frozen=False`
        in the model as it is, where patterns, scales and what coders describe change as well."""
        size = max(1, TOKENS_PER_PASS // self.n_tokens)
        parts = (numbers[start : start + size] for start in range(0, len(numbers), size))
        return np.concatenate([self._gains(run, part, factor, frozen) for part in parts])

    def _gains(
        self, run: Run, numbers: Sequence[int | tuple[int, ...]], factor: float, frozen: bool
    ) -> np.ndarray:
        shape = len(numbers) + 1, self.n_tokens  # the last row stays as it is
        changes: dict[int, mx.array] = {}
        for row, several in enumerate(numbers):
            for number in several if isinstance(several, tuple) else (several,):
                for i, (position, vector) in self.writes(int(number)).items():
                    changes.setdefault(i, mx.zeros((*shape, vector.shape[-1])))
                    changes[i][row, position] += factor * vector
        tokens = mx.broadcast_to(self.tokens, shape)
        if frozen:
            written = [held.base + changes.get(i, 0.0) for i, held in enumerate(self.held)]
            with self.source.frozen(at=self.tokens):
                values = np.array(run(tokens, self.edits(written)))
        else:
            edits = {
                self.held[i].name: lambda x, more=more: (x + more).astype(x.dtype)
                for i, more in changes.items()
            }
            values = np.array(run(tokens, edits))
        return values[:-1] - values[-1]

    def edits(self, written: Sequence[mx.array]) -> dict[str, Callable[[mx.array], mx.array]]:
        """Edits by which each held site has what is `written [B, S, width]` there, and what a skip
        connection adds."""
        return held_edits(self.held, written)

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        """The features of each block of a coder that fire, and what they write."""
        number, found = {held.name: i for i, held in enumerate(self.held)}, []
        for i, coder in enumerate(self.coders):
            ids, parts = self.features[:, 2], list(coder.writes.slices.values())
            for block, W_dec in zip(coder.blocks, coder.decoder_blocks(), strict=True):
                own = (ids >= block.features.start) & (ids < block.features.stop)
                numbers = np.flatnonzero(own & (self.features[:, 0] == i))
                if not len(numbers):
                    continue
                positions = self.features[numbers, 1]
                ranks = np.arange(len(numbers)) - np.searchsorted(positions, positions)
                rows = W_dec[mx.array(ids[numbers] - block.features.start)].astype(mx.float32)
                rows = rows * mx.array(self.values[numbers])[:, None]
                shape = self.n_tokens, int(ranks.max()) + 1, rows.shape[-1]
                padded = mx.zeros(shape)
                padded[mx.array(positions), mx.array(ranks)] = rows
                start = block.writes.start
                written = {
                    number[name]: padded[..., part.start - start : part.stop - start]
                    for name, part in zip(
                        coder.writes.names[block.sites], parts[block.sites], strict=True
                    )
                }
                found.append(_Group(numbers, positions, ranks, written))
        return tuple(found)

    def _parts(self, slopes: Sequence[mx.array]) -> np.ndarray:
        """The parts of all sources, from the derivatives by what is written at each held site,
        `[n, S, width]`."""
        of_errors = [
            (slope * held.errors).sum(axis=-1)
            for slope, held in zip(slopes, self.held, strict=True)
        ]
        others = np.array(mx.concatenate([*of_errors[1:], of_errors[0]], axis=1))
        found = np.empty((len(others), self.n_sources), np.float32)
        found[:, len(self.features) :] = others
        by_position = [slope.swapaxes(0, 1) for slope in slopes]
        for group in self._groups:
            found[:, group.numbers] = group.parts(by_position)
        return found

    def writes(self, number: int) -> dict[int, tuple[int, mx.array]]:
        """What one source writes, by held site: a position and a vector."""
        if number < len(self.features):
            group = next(group for group in self._groups if number in group.numbers)
            at = int(np.searchsorted(group.numbers, number))
            position, rank = int(group.positions[at]), int(group.ranks[at])
            return {i: (position, rows[position, rank]) for i, rows in group.written.items()}
        i, position = divmod(number - len(self.features), self.n_tokens)
        i = (i + 1) % len(self.held)  # embeddings are held first, and numbered last
        return {i: (position, self.held[i].errors[position])}


@dataclass(frozen=True, eq=False)
class _Group:
    """Features that write the same sites, by their `numbers`, ascending, and what they write:
    `written[site] [S, n, width]`, at each position that of the features of all `ranks` there."""

    numbers: np.ndarray
    positions: np.ndarray
    ranks: np.ndarray
    written: dict[int, mx.array]

    def parts(self, slopes: Sequence[mx.array]) -> np.ndarray:
        """The parts of the features, `[n, len(numbers)]`, from the derivatives at each held site,
        `[S, n, width]`."""
        first, *more = (slopes[i] @ rows.swapaxes(1, 2) for i, rows in self.written.items())
        return np.array(sum(more, first))[self.positions, :, self.ranks].T
