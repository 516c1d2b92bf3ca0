"""A llama that goes on with what it has seen before, its weights written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from mlxterp.sae.sae import SAE
from mlxterp.sae.testbeds.handmade import (
    ROTATION_BASE,
    WordTokenizer,
    array,
    directions,
    llama,
    residual_sae,
    set_embeddings,
    set_neurons,
    token_ids,
    transcoder,
)
from mlxterp.sae.testbeds.repetition import repetitions
from mlxterp.sae.transcoder import Transcoder

HEAD_DIM = 64
TURNED = (0, 1, 2)  # of the rotary pairs, those that tell neighbours from other positions
STILL = (*range(16, 32), *range(48, 64))  # columns of a head that no rotation reaches
POSITION_SCORE = 512.0
LARGEST = 1024  # of scores and logits


@dataclass(frozen=True)
class InductionStep:
    """How a token is foreseen.

    The induction head looks from the token at `query` to the one at `key`, because feature
    `key_feature` there says that the token before was the one that feature `query_feature` stands
    for, and copies feature `value_feature` from there. The features are of the SAE of layer 0,
    `output_feature` is of that of layer 1, and `token` is the one that is foreseen.
    """

    query: int
    key: int
    query_feature: int
    key_feature: int
    value_feature: int
    output_feature: int
    token: int


@dataclass(frozen=True, eq=False)
class Induction:
    """A llama of two layers with an induction circuit, and the coders of its features.

    Of V tokens, 0 begins a text. Layer 0: the head looks at the token before, whichever it is, or
    at the first one from itself, and the MLP makes of what it took the feature "v was before".
    Layer 1: the head's score is

        match / 2   at the first token, where it rests
        match       at tokens before which the present token was, so that it looks there
        0           elsewhere

    and it takes the token there, but not the first, of which the MLP makes the feature "v is next".
    The logit of v is `logit` times that. MLPs are `max(2 x - 1, 0)`, so that they lose what leaks
    through the softmax from other tokens, up to `exp(-match / 2)` from each.

    The SAEs of the residual stream have the features "v is here" (number v), "v was before"
    (V + v) and, after layer 1, "v is next" (2 V + v). The transcoders have "v was before" in layer
    0 and "v is next" in layer 1, as number v. They are exact but for what leaks, which the SAE of
    layer 1 does not describe.

    Reference: Olsson et al. 2022, arXiv 2209.11895.
    """

    model: nn.Module
    tokenizer: WordTokenizer
    saes: Mapping[int, SAE]
    transcoders: Mapping[int, Transcoder]
    match: float
    logit: float

    def __repr__(self) -> str:
        return f"Induction({self.n_words} words, match={self.match}, logit={self.logit})"

    @property
    def n_words(self) -> int:
        """The number of tokens, with the one that begins a text."""
        return self.tokenizer.vocab_size

    def sequences(self, n: int, period: int = 6, seed: int = 0) -> np.ndarray:
        """Random sequences of which the second half repeats the first, `[n, 1 + 2 period]`."""
        return repetitions(n, self.n_words, period, seed=seed)

    def step(self, tokens: Sequence[int], position: int = -1) -> InductionStep:
        """What happens at a position of a sequence that token 0 begins.

        Raises `ValueError` for other sequences, and where the token has not occurred exactly once
        before.
        """
        ids = token_ids(tokens, self.n_words).tolist()
        if not -len(ids) <= position < len(ids):
            raise ValueError(f"position must be in [{-len(ids)}, {len(ids) - 1}], got {position}.")
        query = position % len(ids)
        token, before = ids[query], ids[:query]
        if ids[0] != 0 or token == 0 or before.count(token) != 1:
            raise ValueError(
                f"tokens must begin with 0, and the one at position {query} must be another that "
                f"has occurred once before, got {ids[: query + 1]}."
            )
        key = before.index(token) + 1
        foreseen, n = ids[key], self.n_words
        return InductionStep(query, key, token, n + token, foreseen, 2 * n + foreseen, foreseen)

    @property
    def pair_scores(self) -> np.ndarray:
        """What two features of value 1, one at the query and one at the key, add to the score of
        the induction head before its softmax, `[n_features, n_features]` of the SAE of layer 0."""
        n = self.n_words
        scores = np.zeros((2 * n, 2 * n))
        scores[:n, n:] = self.match * np.eye(n)
        scores[:n, 0] = self.match / 2
        return scores


def induction(n_words: int = 12, *, match: float = 16.0, logit: float = 20.0) -> Induction:
    """A llama of two layers, written by hand, that does induction; see `Induction`.

    `n_words` counts the token that begins a text, `match` is the score of the induction head where
    it looks, and `logit` that of the token that it foresees. Raises `ValueError` for `n_words`
    outside `[3, 32]`, for a `match` below 8 with which the head would not settle, or above 1024,
    and for a `logit` that is not in (0, 1024].
    """
    if not 3 <= n_words <= len(STILL):
        raise ValueError(f"n_words must be in [3, {len(STILL)}], got {n_words}.")
    if not 8 <= match <= LARGEST:
        raise ValueError(f"match must be in [8, {LARGEST}], got {match}.")
    if not 0 < logit <= LARGEST:
        raise ValueError(f"logit must be in (0, {LARGEST}], got {logit}.")
    n = n_words
    along = directions(5 * n)
    here, taken, before, copied, following = along.reshape(5, n, -1)
    model = llama(along.shape[-1], 2, n, HEAD_DIM, n)
    set_embeddings(model, here)
    first, second = (block.self_attn for block in model.layers)
    _look_before(first)
    _move(first, here, taken)
    _look_at_match(second, here, before, match)
    _move(second, here[1:], copied[1:])
    bias, mlps = np.full(n, -1.0), ((taken, before), (copied, following))
    for block, (reads, writes) in zip(model.layers, mlps, strict=True):
        set_neurons(block.mlp, 2 * reads, bias, writes)
    model.lm_head.weight = array(logit * following)
    reads = np.concatenate([here, before, following])
    writes = np.concatenate([here, taken + before, copied + following])
    saes = {i: residual_sae(i, reads[:m], writes[:m]) for i, m in ((0, 2 * n), (1, 3 * n))}
    transcoders = {i: transcoder(i, 2 * r, bias, w) for i, (r, w) in enumerate(mlps)}
    words = [f"word{i}" for i in range(1, n)]
    return Induction(model, WordTokenizer(words, bos="<s>"), saes, transcoders, match, logit)


def _look_before(attention: Any) -> None:
    """The score of a key is largest one position before the query, whatever is there:

    score(distance) = POSITION_SCORE * sum over pairs of cos(frequency * (distance - 1)).
    """
    size = (POSITION_SCORE / attention.scale) ** 0.5
    query, key = np.zeros((2, HEAD_DIM, attention.q_proj.weight.shape[1]))
    for pair in TURNED:
        frequency = ROTATION_BASE ** (-2 * pair / HEAD_DIM)
        query[pair, -1] = size * np.cos(frequency)
        query[pair + HEAD_DIM // 2, -1] = -size * np.sin(frequency)
        key[pair, -1] = size
    attention.q_proj.weight, attention.k_proj.weight = array(query), array(key)


def _look_at_match(attention: Any, here: np.ndarray, before: np.ndarray, match: float) -> None:
    """The score of a key is `match` where the token of the query was before it, and half of that at
    the token that begins the text."""
    n, d = here.shape
    still = list(STILL[:n])
    query, key = np.zeros((2, HEAD_DIM, d))
    query[still] = here / attention.scale
    key[still] = match * (before + here[0] / 2)
    attention.q_proj.weight, attention.k_proj.weight = array(query), array(key)


def _move(attention: Any, reads: np.ndarray, writes: np.ndarray) -> None:
    """What is read along each of `reads` at the key is written along each of `writes`."""
    value = np.zeros((HEAD_DIM, reads.shape[1]))
    value[: len(reads)] = reads
    out = np.zeros((reads.shape[1], HEAD_DIM))
    out[:, : len(writes)] = writes.T
    attention.v_proj.weight, attention.o_proj.weight = array(value), array(out)
