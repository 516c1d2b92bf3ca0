"""Runs of a model on a prompt in which only some of what its coders find is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.targets import Edits, Target
from mlxterp.sae.circuits.given import read_by
from mlxterp.sae.coder import Block, SparseCoder
from mlxterp.sae.features.logit_effects import decoder_rows
from mlxterp.sae.source import ActivationSource

TOKENS_PER_PASS = 512


@dataclass(frozen=True, eq=False)
class Found:
    """What a coder finds on a prompt: what it reads `[S, d_in]`, what is written `[S, d_out]`, the
    `codes [S, n_features]`, which are zero at special tokens, and the `errors [S, d_out]`: what is
    written that neither the features write nor the bias nor a skip connection."""

    read: mx.array
    written: mx.array
    codes: mx.array
    errors: mx.array


@dataclass(frozen=True, eq=False)
class State:
    """What a coder finds on a prompt, and the codes and errors that take the place of what is not
    kept."""

    coder: SparseCoder
    found: Found
    codes: mx.array
    errors: mx.array

    def difference(self, with_errors: bool = False) -> mx.array:
        """What is written more than with nothing kept, or nothing but the errors, `[S, d_out]`."""
        z = self.found.codes - self.codes
        written = self.coder.decode(z) - self.coder.b_dec
        return written + self.found.errors - self.errors if with_errors else written

    def moves(self, nodes: Sequence[tuple[int, int]]) -> mx.array:
        """What each of some features, or errors (-1), at positions writes more than where it is not
        kept, `[n, d_out]`."""
        at, ids = np.array(nodes).T
        features = np.maximum(ids, 0)
        rows = decoder_rows(self.coder, features.tolist()).astype(mx.float32)
        more = (self.found.codes - self.codes)[mx.array(at), mx.array(features)]
        of_errors = (self.found.errors - self.errors)[mx.array(at)]
        return mx.where(mx.array(ids < 0)[:, None], of_errors, more[:, None] * rows)

    def without(self, nodes: Sequence[tuple[int, int]], factor: float = 0.0) -> mx.array:
        """What is written where one feature or error has only a `factor` of what it has more,
        `[n, S, d_out]`."""
        at = mx.array([position for position, _ in nodes])
        here = mx.arange(len(self.found.written)) == at[:, None]
        return self.found.written - (1 - factor) * here[..., None] * self.moves(nodes)[:, None]

    def edits(self, written: mx.array) -> dict[str, Callable[[mx.array], mx.array]]:
        """Edits by which the sites hold what is `written [..., S, d_out]`."""
        return {
            name: lambda x, part=part: mx.broadcast_to(written[..., part], x.shape).astype(x.dtype)
            for name, part in self.coder.writes.slices.items()
        }


@dataclass(frozen=True, eq=False)
class Kept:
    """Which features `[S, n_features]` and which errors `[S]` of a coder are kept."""

    features: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of a prompt and the states of coders on it, in the order of the forward pass."""

    source: ActivationSource
    tokens: tuple[int, ...]
    states: Mapping[int, State]

    def measured(self, target: Target, edits: Edits, n: int = 1) -> mx.array:
        """A target in `n` rows of a batch, under edits of them, `[n]`."""
        rows = mx.broadcast_to(mx.array([self.tokens]), (n, len(self.tokens)))
        return target.measure(rows, edits)

    def rows_per_pass(self) -> int:
        """How many rows of a batch are looked at in one pass."""
        return max(1, TOKENS_PER_PASS // len(self.tokens))

    def keeping(self, kept: Mapping[int, Kept]) -> dict[str, Callable[[mx.array], mx.array]]:
        """Edits by which every coder stands in the place of what it describes and only what is
        `kept` of it is left.

        The others have the values that take their place. What is kept has the value of the run
        itself, in which the earlier coders write what is kept of them: it is found in one pass for
        each coder, up to what it reads. Errors that are kept are those of the plain model. Where
        everything is kept nothing is changed, bit for bit.
        """
        edits: dict[str, Callable[[mx.array], mx.array]] = {}
        for layer, state in self.states.items():
            coder, own = state.coder, kept[layer]
            lost = mx.where(mx.array(own.errors)[:, None], 0, state.found.errors - state.errors)
            written = state.found.written - lost
            for i, block in enumerate(coder.blocks):
                x = self._read(coder, block, edits)
                z = encoded(coder, i, x, self._special())
                old = state.found.codes[:, block.features]
                keep = mx.array(own.features[:, block.features])
                new = mx.where(keep, z, state.codes[:, block.features])
                change = (new - old) @ coder.decoder_blocks()[i].astype(mx.float32)
                if coder.has_skip:
                    W_skip = coder.W_skip[block.writes, block.reads].astype(mx.float32)
                    change += (x - state.found.read[:, block.reads]) @ W_skip.T
                written = written + coder.in_place(change, block)
                edits |= state.edits(written)
        return edits

    def _read(self, coder: SparseCoder, block: Block, edits: Edits) -> mx.array:
        """The columns that a block reads, `[S, its columns]`."""
        names = read_by(coder, block)
        captured = self.source.run(
            mx.array([self.tokens]), capture=names, edit=dict(edits), stop=True
        )
        return mx.concatenate([captured[name][0].astype(mx.float32) for name in names], axis=-1)

    def _special(self) -> np.ndarray:
        return special(self.source, self.tokens)


def find_states(
    source: ActivationSource,
    coders: Mapping[int, SparseCoder],
    tokens: Sequence[int],
    corrupted: Sequence[int] | None = None,
    others: Sequence[Sequence[int]] | None = None,
) -> dict[int, State]:
    """The states of coders on a prompt.

    In the place of what is not kept stands zero, what is found on a `corrupted` prompt of as many
    tokens, or the mean over the tokens of `others` that are not special. Zeros and means leave what
    is written at special tokens as it is.
    """
    clean = find(source, coders, tokens)
    other = None if corrupted is None else find(source, coders, corrupted)
    means = None if others is None else _means(source, coders, others)
    at_special = mx.array(special(source, tokens))[:, None]
    states = {}
    for layer, coder in coders.items():
        own = clean[layer]
        if other is not None:
            codes, errors = other[layer].codes, other[layer].errors
        else:
            zeros = mx.zeros_like(own.codes[0]), mx.zeros_like(own.errors[0])
            z, e = zeros if means is None else means[layer]
            codes = mx.where(at_special, own.codes, z)
            errors = mx.where(at_special, own.errors, e)
        states[layer] = State(coder, own, codes, errors)
    return states


def find(
    source: ActivationSource, coders: Mapping[int, SparseCoder], tokens: Sequence[int]
) -> dict[int, Found]:
    """What coders find on a prompt, from one plain pass."""
    sites = [n for coder in coders.values() for n in (*coder.reads.names, *coder.writes.names)]
    captured = source.run(mx.array([[*tokens]]), capture=[*dict.fromkeys(sites)], stop=True)
    at_special = special(source, tokens)
    found = {}
    for layer, coder in coders.items():
        x, written = (
            mx.concatenate([captured[n][0].astype(mx.float32) for n in names], axis=-1)
            for names in (coder.reads.names, coder.writes.names)
        )
        parts = [
            encoded(coder, i, x[:, block.reads], at_special) for i, block in enumerate(coder.blocks)
        ]
        z = mx.concatenate(parts, axis=-1)
        y = coder.decode(z).astype(mx.float32)
        y = y + x @ coder.W_skip.T.astype(mx.float32) if coder.has_skip else y
        found[layer] = Found(x, written, z, written - y)
        mx.eval(written, z, found[layer].errors)
    return found


def encoded(coder: SparseCoder, i: int, x: mx.array, at_special: np.ndarray) -> mx.array:
    """The code of a block, zero at special tokens."""
    return mx.where(mx.array(at_special)[:, None], 0, coder.encode_block(i, x)).astype(mx.float32)


def special(source: ActivationSource, tokens: Sequence[int]) -> np.ndarray:
    """At which tokens there are no features, `[S]`."""
    return np.isin(np.asarray(tokens), list(source.special_token_ids))


def _means(
    source: ActivationSource, coders: Mapping[int, SparseCoder], texts: Sequence[Sequence[int]]
) -> dict[int, tuple[Any, Any]]:
    """The means of codes and of errors over all tokens that are not special."""
    totals: dict[int, tuple[Any, Any]] = dict.fromkeys(coders, (0.0, 0.0))
    count = 0
    for tokens in texts:
        plain = mx.array(~special(source, tokens))[:, None]
        count += int(plain.sum())
        for layer, one in find(source, coders, tokens).items():
            sums = ((plain * x).sum(axis=0) for x in (one.codes, one.errors))
            totals[layer] = tuple(a + b for a, b in zip(totals[layer], sums, strict=True))  # pyright: ignore
            mx.eval(totals[layer])
    if not count:
        raise ValueError("mean_of must be texts with at least one token that is not special.")
    return {layer: (z / count, e / count) for layer, (z, e) in totals.items()}
