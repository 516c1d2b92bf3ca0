"""Which heads make a token likelier by attending to it, whatever the pattern."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxterp.analysis.heads import HeadPlace, tapped
from mlxterp.analysis.source import Readable
from mlxterp.sites import Site
from mlxterp.visualization.heads import HeadScores
from mlxterp.visualization.sampling import drawn, plain_ids

COPIES = 0.9


def detect_copying_heads(
    model: Readable,
    threshold: float = COPIES,
    layers: int | Iterable[int] | None = None,
    n_tokens: int = 128,
    seed: int = 42,
) -> HeadScores:
    """The heads whose output raises the logit of the token that it was made of above others.

        logits[t] = unembed(what the head writes where it attends to the embedding of t alone)
        score = mean over t of the share of tokens u != t with c[t, u] < c[t, t],
        c = logits less the mean over t

    over `n_tokens` random tokens: 1 where every token has the largest logit for itself, 1/2 by
    chance, 0 where heads make tokens less likely. Vectors go through the model's own modules,
    norms and head, so that quantised weights, shared values and gates are what they are; biases
    are taken away. Raises `ValueError` for layers without softmax attention, and for blocks that
    do not add what their attention writes.

    After the copying heads of Elhage et al. 2021 (A Mathematical Framework for Transformer
    Circuits) and the copy score of Wang et al. 2022, arXiv 2211.00593.
    """
    ids = drawn(plain_ids(model), n_tokens, np.random.default_rng(seed))
    if len(ids) < 2:
        raise ValueError(f"n_tokens must be >= 2, and so must be the vocabulary, not {len(ids)}")
    tokens = mx.array(ids.astype(np.int32)[:, None])
    counts = {call.layer: call.q.shape[1] for call in model.attention(tokens[:1], layers).calls}
    circuits = _Circuits(model, tokens, list(counts))
    without = circuits.written(None)
    every = {}
    for head in range(max(counts.values())):
        written = circuits.written(head)
        for layer in (layer for layer, count in counts.items() if head < count):
            logits = model.unembed(written[layer] - without[layer]).astype(mx.float32)
            every[layer, head] = _own_rank(np.array(logits[:, mx.array(ids)]))
    return HeadScores("copying", dict(sorted(every.items())), threshold)


class _Circuits:
    """What single heads write, each layer reading the embeddings of `tokens [N, 1]` alone."""

    def __init__(self, model: Readable, tokens: mx.array, layers: list[int]) -> None:
        first = Site(0, "resid_pre")
        start = model.run(tokens, capture=[first], stop=True)[first]
        self.model, self.tokens, self.layers = model, tokens, layers
        self.ends = {layer: Site(layer, "attn_out") for layer in layers}
        self.edits = {Site(layer, "resid_pre"): lambda x: start.astype(x.dtype) for layer in layers}

    def written(self, head: int | None) -> dict[int, mx.array]:
        """What the attention of each layer adds, `[N, d_model]`, with one head alone or none."""

        def alone(z: mx.array, call: int) -> mx.array:
            keep = mx.arange(z.shape[1]) == (-1 if head is None else head)
            return mx.where(keep[:, None, None], z, mx.zeros_like(z))

        heads = {HeadPlace(layer, "z"): alone for layer in self.layers}
        with tapped(self.model.architecture, heads):
            done = self.model.run(
                self.tokens, capture=[*self.ends.values()], edit=self.edits, stop=True
            )
        return {layer: done[site][:, 0] for layer, site in self.ends.items()}


def _own_rank(logits: np.ndarray) -> float:
    """The share of other tokens with less than the own in `logits [N, N]`; ties count half."""
    centred = logits.astype(np.float64) - logits.mean(axis=0, dtype=np.float64)
    own = np.diag(centred)[:, None]
    ranks = (centred < own) + (centred == own) / 2
    n = len(logits)
    return float((ranks.sum() - n / 2) / (n * (n - 1)))
