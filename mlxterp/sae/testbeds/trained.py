"""A small llama that learns induction, as real ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map_with_path
from tqdm.auto import tqdm

from mlxterp.sae.testbeds.handmade import CONTEXT_LENGTH, WordTokenizer, array
from mlxterp.sae.testbeds.repetition import repetition_accuracy, repetitions

WIDTH, N_HEADS, N_NEURONS = 64, 2, 64
BATCH_SIZE, WARMUP_STEPS, LEARNING_RATE = 32, 30, 5e-3
PERIODS = (5, 16)  # shortest and longest in training
LENGTH = 2 * PERIODS[1]


@dataclass(frozen=True, eq=False)
class TrainedInduction:
    """A llama of two layers that was trained for induction.

    `accuracy` is the share of tokens that it foresees in the second half of random sequences that
    it has not seen; `losses` are those of the training, one for each step.

    Reference: Olsson et al. 2022, arXiv 2209.11895.
    """

    model: nn.Module
    tokenizer: WordTokenizer
    accuracy: float
    losses: np.ndarray

    def __repr__(self) -> str:
        return f"TrainedInduction({self.tokenizer.vocab_size} words, accuracy={self.accuracy:.3f})"

    def sequences(self, n: int, period: int = 12, seed: int = 0) -> np.ndarray:
        """Random sequences of which the second half repeats the first, `[n, 1 + 2 period]`."""
        return repetitions(n, self.tokenizer.vocab_size, period, seed=seed)


def train_induction(
    n_words: int = 32, n_steps: int = 240, seed: int = 0, *, verbose: bool = False
) -> TrainedInduction:
    """A llama of two layers and width 64 that is trained to go on with random sequences which
    repeat themselves, in about five seconds.

    The periods are random, so that no fixed distance leads to the token to be copied: it must be
    found by what stood before it. Raises `ValueError` for fewer than 17 words, which the longest
    period needs, and for steps that the warm-up of 30 would fill.
    """
    if n_words <= PERIODS[1]:
        raise ValueError(f"n_words must be >= {PERIODS[1] + 1}, got {n_words}.")
    if n_steps <= WARMUP_STEPS:
        raise ValueError(f"n_steps must be > {WARMUP_STEPS}, got {n_steps}.")
    rng = np.random.default_rng(seed)
    model = _untrained(n_words, rng)
    step = _step(model, n_steps)
    losses = []
    for _ in tqdm(range(n_steps), "induction", unit="step", disable=not verbose):
        losses.append(step(*_batch(rng, n_words)))
    model.eval()
    unseen = repetitions(64, n_words, PERIODS[1], seed=seed + 1)
    return TrainedInduction(
        model,
        WordTokenizer([f"word{i}" for i in range(1, n_words)], bos="<s>"),
        repetition_accuracy(model, unseen, PERIODS[1]),
        np.array(mx.stack(losses)),
    )


def _step(model: nn.Module, n_steps: int) -> Callable[[mx.array, mx.array], mx.array]:
    """The compiled step of the training, which returns the loss before it."""
    warmup = optim.linear_schedule(0, LEARNING_RATE, WARMUP_STEPS)
    decay = optim.cosine_decay(LEARNING_RATE, n_steps - WARMUP_STEPS)
    rate = optim.join_schedules([warmup, decay], [WARMUP_STEPS])
    optimizer = optim.AdamW(rate, betas=[0.9, 0.98])
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(tokens: mx.array, counts: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, _loss)(model, tokens, counts)
        optimizer.update(model, gradients)
        return loss

    def step(tokens: mx.array, counts: mx.array) -> mx.array:
        loss = update(tokens, counts)
        mx.eval(state, loss)
        return loss

    return step


def _batch(rng: np.random.Generator, n_words: int) -> tuple[mx.array, mx.array]:
    """Sequences of various periods, `[BATCH_SIZE, 1 + LENGTH]`, and which of the tokens after the
    first count, because they can be foreseen."""
    periods = rng.integers(PERIODS[0], PERIODS[1] + 1, (BATCH_SIZE, 1))
    places = np.arange(LENGTH)
    words = rng.permuted(np.tile(np.arange(1, n_words), (BATCH_SIZE, 1)), axis=1)
    tokens = np.pad(np.take_along_axis(words, places % periods, 1), [(0, 0), (1, 0)])
    return mx.array(tokens.astype(np.int32)), mx.array((places > periods).astype(np.float32))


def _loss(model: Any, tokens: mx.array, counts: mx.array) -> mx.array:
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * counts).sum() / counts.sum()


def _untrained(n_words: int, rng: np.random.Generator) -> Any:
    """A llama with the initial values that MLX gives its layers, but by this generator."""
    from mlx_lm.models.llama import Model, ModelArgs

    args = ModelArgs(
        model_type="llama", hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=N_NEURONS,
        num_attention_heads=N_HEADS, rms_norm_eps=1e-5, vocab_size=n_words, rope_theta=100.0,
        max_position_embeddings=CONTEXT_LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = Model(args)

    def drawn(name: str, old: mx.array) -> mx.array:
        if old.ndim == 1:
            return old  # of a norm
        size = old.shape[1] ** -0.5
        if "embed" in name:
            return array(rng.normal(0, size, old.shape))
        return array(rng.uniform(-size, size, old.shape))

    model.update(tree_map_with_path(drawn, model.parameters()))
    return model
