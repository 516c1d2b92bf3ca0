"""A model on one prompt as an affine function of what its coders find there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    def _rows(self) -> dict[tuple[int, int], list[tuple[int, mx.array]]]:
        """By coder and position, the held sites and what its features write there, `[n, width]`."""
        number = {held.name: i for i, held in enumerate(self.held)}
        found: dict[tuple[int, int], list[tuple[int, mx.array]]] = {}
        for i, coder in enumerate(self.coders):
            decoders = coder.decoder_blocks()
            for t in range(self.n_tokens):
                place = i * self.n_tokens + t
                own = slice(*np.searchsorted(self._places, [place, place + 1]))
                ids, z = self.features[own, 2], mx.array(self.values[own])
                pieces = []
                for block, W_dec in zip(coder.blocks, decoders, strict=True):
                    start, stop = np.searchsorted(ids, [block.features.start, block.features.stop])
                    some = mx.array(ids[start:stop] - block.features.start)
                    rows = W_dec[some].astype(mx.float32) * z[start:stop, None]
                    pieces.append(coder.in_place(rows, block))
                written = mx.concatenate(pieces)
                found[i, t] = [
                    (number[name], written[:, part]) for name, part in coder.writes.slices.items()
                ]
        return found

    @cached_property
    def _places(self) -> np.ndarray:
        """The coder and the position of each feature as one number, ascending."""
        return self.features[:, 0] * self.n_tokens + self.features[:, 1]

    def _parts(self, slopes: Sequence[mx.array]) -> np.ndarray:
        """The parts of all sources, from the derivatives by what is written at each held site,
        `[n, S, width]`."""
        parts = [mx.zeros((slopes[0].shape[0], 0))]
        for (_, t), writes in self._rows.items():
            first, *more = (slopes[i][:, t] @ rows.T for i, rows in writes)
            parts.append(sum(more, first))
        of_errors = [
            (slope * held.errors).sum(axis=-1)
            for slope, held in zip(slopes, self.held, strict=True)
        ]
        return np.array(mx.concatenate([*parts, *of_errors[1:], of_errors[0]], axis=1))

    def writes(self, number: int) -> dict[int, tuple[int, mx.array]]:
        """What one source writes, by held site: a position and a vector."""
        if number < len(self.features):
            coder, position, _ = self.features[number].tolist()
            first = int(np.searchsorted(self._places, self._places[number]))
            writes = self._rows[coder, position]
            return {i: (position, rows[number - first]) for i, rows in writes}
        i, position = divmod(number - len(self.features), self.n_tokens)
        i = (i + 1) % len(self.held)  # embeddings are held first, and numbered last
        return {i: (position, self.held[i].errors[position])}
