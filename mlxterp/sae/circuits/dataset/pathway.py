"""The effects of the features of one coder on those of a later one, through the real model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.derivatives import for_each
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.logit_effects import decoder_rows
from mlxterp.sae.source import ActivationSource

COTANGENTS_PER_PASS = 16


@dataclass(frozen=True, eq=False)
class Clean:
    """What a plain pass over some contexts holds: the activations at the sites concerned, those
    that the later coder reads and those that the earlier one writes `[n_contexts, S, width]`, the
    earlier one's `codes`, which are zero at special tokens, and what its features write together,
    without its bias and its errors."""

    tokens: mx.array
    activations: Mapping[str, mx.array]
    read: mx.array
    written: mx.array
    codes: np.ndarray
    by_features: mx.array


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the value of one target is due to: `effects` of some `features` at all tokens together,
    that of the `errors`, and how far the value is above that without any of the features."""

    features: np.ndarray
    effects: np.ndarray
    errors: float
    rise: float


class Pathway:
    """From an `earlier` coder to a `later` one, in the real model.

    The earlier coder stands in the place of what it describes, with its errors kept, so that all
    values are those of the plain model. Sites that coders `between` the two write are held at
    their plain values: effects through them belong to these coders' features and errors.
    """

    def __init__(
        self,
        source: ActivationSource,
        earlier: SparseCoder,
        later: SparseCoder,
        between: Sequence[SparseCoder] = (),
    ):
        self.source, self.earlier, self.later = source, earlier, later
        self._held = tuple(dict.fromkeys(name for c in between for name in c.writes.names))
        names = (*earlier.reads.names, *earlier.writes.names, *later.reads.names, *self._held)
        self._sites = tuple(dict.fromkeys(names))

    def clean(self, tokens: np.ndarray) -> Clean:
        """The plain pass over contexts `[n_contexts, S]`."""
        captured = self.source.run(mx.array(tokens), capture=self._sites, stop=True)
        found = {name: captured[name].astype(mx.float32) for name in self._sites}
        z = self.earlier.encode({name: found[name] for name in self.earlier.reads.names})
        special: Any = np.isin(tokens, list(self.source.special_token_ids))
        z = mx.where(mx.array(special)[..., None], 0, z)
        read, written = (
            mx.concatenate([found[name] for name in columns.names], axis=-1)
            for columns in (self.later.reads, self.earlier.writes)
        )
        by_features = (self.earlier.decode(z) - self.earlier.b_dec).astype(mx.float32)
        codes = np.array(z.astype(mx.float32))
        return Clean(mx.array(tokens), found, read, written, codes, by_features)

    def read(self, clean: Clean, written: mx.array) -> mx.array:
        """What the later coder reads `[n_contexts, S, d_in]` where the sites of the earlier one
        hold what is `written`."""
        edits: dict[str, Callable[[mx.array], mx.array]] = {
            name: lambda x, name=name: clean.activations[name].astype(x.dtype)
            for name in self._held
        }
        edits |= {
            name: lambda x, part=part: written[..., part].astype(x.dtype)
            for name, part in self.earlier.writes.slices.items()
        }
        names = self.later.reads.names
        captured = self.source.run(clean.tokens, capture=names, edit=edits, stop=True)
        return mx.concatenate([captured[name].astype(mx.float32) for name in names], axis=-1)

    def encoders(self, features: np.ndarray) -> mx.array:
        """The encoder rows of features of the later coder, `[n, d_in]`."""
        rows = []
        for feature in features.tolist():
            block = next(b for b in self.later.blocks if feature < b.features.stop)
            beside = (block.reads.start, self.later.d_in - block.reads.stop)
            rows.append(mx.pad(self.later.W_enc[feature].astype(mx.float32), beside))
        return mx.stack(rows)

    def values(
        self, read: mx.array, contexts: np.ndarray, positions: np.ndarray, encoders: mx.array
    ) -> np.ndarray:
        """The pre-activations of features of the later coder at positions of contexts, without
        their biases."""
        x = read[mx.array(contexts), mx.array(positions)]
        return np.array((x * encoders).sum(axis=-1))

    def attribute(
        self,
        clean: Clean,
        contexts: np.ndarray,
        positions: np.ndarray,
        features: np.ndarray,
        n_steps: int = 0,
    ) -> list[Attribution]:
        """What the pre-activations of features of the later coder at positions of contexts are due
        to.

            effect of i = sum over tokens t of z[t, i] W_dec[i] . mean of d value / d written[t]

        The mean is over `n_steps` midpoints of the way from what is written without the features,
        errors kept, to what is (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365);
        with 0 the derivative is taken at the end alone (gradient times activation).
        """
        errors = clean.written - self.earlier.b_dec.astype(mx.float32) - clean.by_features
        steps = (np.arange(n_steps) + 0.5) / n_steps if n_steps else np.ones(1)
        encoders = self.encoders(features)
        turns = _turns(contexts)
        found: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}
        for start in range(0, int(turns.max()) + 1, COTANGENTS_PER_PASS):
            some = np.flatnonzero((turns >= start) & (turns < start + COTANGENTS_PER_PASS))
            slots = turns[some] - start
            cotangents = mx.zeros((int(slots.max()) + 1, *clean.tokens.shape, self.later.d_in))
            cotangents[mx.array(slots), mx.array(contexts[some]), mx.array(positions[some])] = (
                encoders[mx.array(some)]
            )
            slopes = mx.zeros((len(cotangents), *clean.written.shape))
            for step in steps.tolist():
                slopes = slopes + self.slopes(
                    clean, clean.written - (1 - step) * clean.by_features, cotangents
                )
                mx.eval(slopes)
            slopes = slopes / len(steps)
            of_errors = np.array((slopes * errors).sum(axis=(-1, -2)))
            for context in np.unique(contexts[some]).tolist():
                own = contexts[some] == context
                ids, effects = self._effects(clean, context, slopes[mx.array(slots[own]), context])
                for target, slot, row in zip(some[own], slots[own], effects, strict=True):
                    found[int(target)] = ids, row, float(of_errors[slot, context])
        without = self.read(clean, clean.written - clean.by_features)
        rises = self.values(clean.read - without, contexts, positions, encoders)
        return [Attribution(*found[i], float(rise)) for i, rise in enumerate(rises)]

    def slopes(self, clean: Clean, written: mx.array, cotangents: mx.array) -> mx.array:
        """The derivatives by what is written `[n, n_contexts, S, d_out]` for each cotangent."""

        def one(cotangent: mx.array) -> mx.array:
            return mx.vjp(lambda x: self.read(clean, x), [written], [cotangent])[1][0]

        return for_each(one, cotangents)

    def _effects(
        self, clean: Clean, context: int, slopes: mx.array
    ) -> tuple[np.ndarray, np.ndarray]:
        """The features that fire in a context, and the effect of each `[n, n_features]`, from the
        derivatives `[n, S, d_out]`."""
        codes = clean.codes[context]
        ids = np.flatnonzero((codes != 0).any(axis=0))
        if not len(ids):
            return ids, np.zeros((len(slopes), 0), np.float32)
        rows = decoder_rows(self.earlier, ids.tolist())
        return ids, np.array(((slopes @ rows.T) * mx.array(codes[:, ids])).sum(axis=1))

    def losses(
        self, clean: Clean, positions: np.ndarray, features: np.ndarray, changed: np.ndarray,
        factor: float = 0.0,
    ) -> np.ndarray:  # fmt: skip
        """By how much less the value of one target of each context is, `[n_contexts]`, where one
        feature of the earlier coder is multiplied by a factor at all tokens: by 0, taken out."""
        contexts = np.arange(len(positions))
        z = mx.array(clean.codes[contexts, :, changed])
        rows = decoder_rows(self.earlier, changed.tolist())
        less = (1 - factor) * z[..., None] * rows[:, None]
        lost = clean.read - self.read(clean, clean.written - less)
        return self.values(lost, contexts, positions, self.encoders(features))


def _turns(contexts: np.ndarray) -> np.ndarray:
    """Each entry's number among those of the same context."""
    order = np.argsort(contexts, kind="stable")
    first = np.searchsorted(contexts[order], contexts[order])
    turns = np.empty(len(contexts), int)
    turns[order] = np.arange(len(contexts)) - first
    return turns
