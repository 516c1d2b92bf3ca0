"""Language models run with sites replaced: their loss, and how far they are from themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering.edits import Edit, splice

LOGIT_ENTRIES = 1 << 25  # at once
ABLATIONS = ("zero", "mean", "resample")
Block = tuple[slice, mx.array, mx.array]


@dataclass(frozen=True)
class Replacement:
    """Sites that are replaced together: by what the `coder`-th coder writes, or by an `ablation`;
    by nothing where both are `None`."""

    sites: tuple[str, ...]
    coder: int | None = None
    ablation: str | None = None


class Donors(NamedTuple):
    """What ablation puts in the place of activations: the mean of each site, `[width]`, and the
    activations of other tokens to draw from, `[n, width]`."""

    means: Mapping[str, mx.array]
    others: Mapping[str, mx.array]


class Outcome(NamedTuple):
    """Of each token that another one predicts, `[rows, context - 1]`: the loss, and the divergence
    KL(clean || replaced) of its prediction, both in nats."""

    loss: np.ndarray
    kl: np.ndarray


class Replacing:
    """The passes of a language model, or of several, in which sites of coders are replaced.

    Positions that do not count keep their activations. A site is replaced by what a coder makes of
    a clean pass; all sites of a cross-layer transcoder together by what it makes of the already
    replaced stream, see `steering.splice`. Of several models, those whose sites are replaced are
    judged, each by itself, and the outcome is their mean.
    """

    def __init__(
        self,
        coders: Sequence[SparseCoder],
        source: ActivationSource,
        donors: Donors,
        seed: int = 0,
    ):
        self._coders, self._donors = tuple(coders), donors
        self._random = np.random.default_rng(seed)
        self._models: dict[int, ActivationSource] = {}
        self._own: dict[int, dict[str, Any]] = {}
        sites = (name for c in coders for name in (*c.reads.names, *c.writes.names))
        for name in dict.fromkeys(sites):
            model, site = owner(source, name)
            self._models[id(model)] = model
            self._own.setdefault(id(model), {})[name] = site
        self._reads = {name for coder in coders for name in coder.reads.names}

    def outcomes(
        self,
        replacements: Sequence[Replacement],
        tokens: mx.array,
        counts: mx.array,
        with_kl: bool = True,
    ) -> Iterator[Outcome]:
        """The outcome of each replacement on rows of tokens, `[n, context]`; that of one without a
        coder or an ablation is the model as it is."""
        clean, captured = {}, {}
        for key, own in self._own.items():
            read = {name: site for name, site in own.items() if name in self._reads}
            done = self._models[key].run(tokens, capture=list(read.values()))
            captured |= {name: done[site] for name, site in read.items()}
            clean[key] = _Predictions.of(done.output, tokens)
        written = [coder(captured) for coder in self._coders]
        certain = {key: found.probabilities for key, found in clean.items()} if with_kl else {}
        draw = self._random.integers(0, self._n_donors, size=tokens.shape)
        for replacement in replacements:
            keys = [key for key, own in self._own.items() if set(own) & set(replacement.sites)]
            found = []
            edits = self._edits(replacement, written, mx.array(draw))
            for key in keys:
                before = clean[key]
                if edits:
                    output = self._run(key, edits, replacement, tokens, counts)
                    after = _Predictions.of(output, tokens)
                else:
                    after = before
                kl = np.zeros_like(after.loss)
                if with_kl and edits:
                    kl = before.divergence(after, certain[key])
                found.append((after.loss, kl))
            yield Outcome(*(np.mean(both, axis=0) for both in zip(*found, strict=True)))

    @property
    def _n_donors(self) -> int:
        return min((len(x) for x in self._donors.others.values()), default=1)

    def _edits(
        self, replacement: Replacement, written: Sequence[mx.array], draw: mx.array
    ) -> Mapping[str, Edit]:
        sites = replacement.sites
        if replacement.coder is not None:
            coder = self._coders[replacement.coder]
            if len(sites) > 1 and len(coder.blocks) > 1:
                return splice(coder)
            columns, made = coder.writes.slices, written[replacement.coder]
            return {name: _constant(made[..., columns[name]]) for name in sites}
        if replacement.ablation == "mean":
            return {name: _constant(self._donors.means[name]) for name in sites}
        if replacement.ablation == "zero":
            return {name: mx.zeros_like for name in sites}
        if replacement.ablation == "resample":
            return {name: _constant(self._donors.others[name][draw]) for name in sites}
        return {}

    def _run(
        self,
        key: int,
        edits: Mapping[str, Edit],
        replacement: Replacement,
        tokens: mx.array,
        counts: mx.array,
    ) -> mx.array:
        own = {
            site: _where(counts, edits[name]) if name in replacement.sites else edits[name]
            for name, site in self._own[key].items()
            if name in edits
        }
        return self._models[key].run(tokens, edit=own).output


def blocks(source: ActivationSource, corpus: Corpus) -> tuple[int, Iterator[Block]]:
    """How many tokens a model predicts, and all contexts of a corpus, as many at a time as logits
    fit into memory: which they are, token ids `[n, context]`, and which positions count."""
    n_vocabulary = source.run(mx.array(corpus.tokens[:1, :2])).output.shape[-1]
    fitting = LOGIT_ENTRIES // (corpus.context * n_vocabulary)
    size = max(1, min(corpus.rows_per_forward, fitting))

    def parts() -> Iterator[Block]:
        for start in range(0, len(corpus), size):
            part = slice(start, start + size)
            counts: Any = corpus.documents(part) >= 0
            yield part, mx.array(corpus.tokens[part]), mx.array(counts)

    return n_vocabulary, parts()


def _constant(value: mx.array) -> Edit:
    return lambda x: mx.broadcast_to(value, x.shape)


def _where(counts: mx.array, function: Callable[[mx.array], mx.array]) -> Edit:
    return lambda x: mx.where(counts[..., None], function(x).astype(x.dtype), x)


class _Predictions(NamedTuple):
    """Logits of the tokens after each but the last one, `[n, context - 1, n_vocabulary]`, the
    logarithms of their sums `[n, context - 1]`, and the losses."""

    logits: mx.array
    log_sums: mx.array
    loss: np.ndarray

    @classmethod
    def of(cls, output: mx.array, tokens: mx.array) -> _Predictions:
        logits = output[:, :-1].astype(mx.float32)
        log_sums = mx.logsumexp(logits, axis=-1)
        of_next = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return cls(logits, log_sums, np.array(log_sums - of_next, np.float64))

    @property
    def probabilities(self) -> mx.array:
        return mx.exp(self.logits - self.log_sums[..., None])

    def divergence(self, other: _Predictions, p: mx.array) -> np.ndarray:
        """KL(self || other) = sum_v p_v (a_v - b_v - log sum exp a + log sum exp b), with the
        probabilities p of these logits."""
        # The sums are taken off each logit: in the end they would leave the rounding of large ones.
        change = self.logits - other.logits - (self.log_sums - other.log_sums)[..., None]
        kl = mx.where(p > 0, p * change, 0).sum(axis=-1)
        return np.array(mx.maximum(kl, 0), np.float64)
