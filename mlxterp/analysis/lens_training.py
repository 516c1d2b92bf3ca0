"""Train the maps of a tuned lens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tqdm.auto import tqdm

from mlxterp.analysis.readout import Head
from mlxterp.analysis.source import Readable
from mlxterp.analysis.tuned_lens import TunedLens
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.documents import read

Arrays = dict[str, mx.array]


def train_tuned_lens(
    model: Readable,
    dataset: Any,
    num_steps: int = 250,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    max_seq_len: int = 2048,
    gradient_clip: float | None = 1.0,
    save_path: str | Path | None = None,
    verbose: bool = True,
    callback: Callable[[int, float], Any] | None = None,
    *,
    seed: int = 0,
) -> TunedLens:
    """A tuned lens whose maps bring what each layer predicts near to what the model does.

        loss[layer] = mean over tokens of KL(model || head(norm(h[layer] @ weight.T + bias)))

    by gradient descent with Nesterov momentum, at a rate that falls to 0 in a straight line. Each
    step is over one context of up to `max_seq_len` tokens (no more than the model was made for),
    in the order that `seed` shuffles them into; special tokens do not count. The gradient of all
    maps together is cut to the norm `gradient_clip`, None for no limit. The map of the last layer
    stays the identity, which has no loss. `callback(step, loss)` gets the mean loss of the others.

    `dataset` is texts, chats, token ids or files of them. Raises `ValueError` for one without
    tokens and for values out of range, and `RuntimeError` where the loss is no longer a number.

    Reference: Belrose et al. 2023, arXiv 2303.08112.
    """
    _check(num_steps, learning_rate, momentum, max_seq_len, gradient_clip)
    if model.n_layers < 2:
        raise ValueError(f"{model.name} has one layer: there is none that a lens could translate")
    context = min(max_seq_len, model.context_length or max_seq_len)
    corpus = Corpus.from_documents(model, read(dataset), context, num_steps * context, seed=seed)
    lens = TunedLens(model.n_layers, model.d_model)
    rate = optim.linear_schedule(learning_rate, 0.0, num_steps)
    optimizer = optim.SGD(rate, momentum, nesterov=momentum > 0)
    losses = _losses(model)
    bar = tqdm(_orders(len(corpus), num_steps, seed), "tuned lens", num_steps, disable=not verbose)
    for step, row in enumerate(bar):
        counted = corpus.documents([row]) >= 0
        loss, slopes = losses(lens, mx.array(corpus.tokens[[row]]), mx.array(counted.tolist()))
        optimizer.update(lens, {"translators": _clipped(slopes, gradient_clip)})
        mx.eval(lens.parameters(), optimizer.state)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} at step {step}: use a learning_rate below {learning_rate}"
            )
        bar.set_postfix(kl=f"{loss:.3f}", refresh=False)
        if callback is not None:
            callback(step, loss)
    if save_path is not None:
        lens.save(save_path)
    return lens


def _losses(model: Readable) -> Callable[..., tuple[float, list[Arrays]]]:
    """The mean loss of all layers but the last, and the slopes of all, of a row of tokens."""
    head, last = Head(model), model.n_layers - 1
    sites = [model.site(layer, "resid_post") for layer in range(model.n_layers)]
    rows = max(1, head.rows_at_once // 8)  # there are several arrays of the size

    def kl(maps: Arrays, h: mx.array, log_p: mx.array, weights: mx.array) -> mx.array:
        mapped = h.astype(mx.float32) @ maps["weight"].T + maps["bias"]
        difference = log_p - _normalised(head(mapped.astype(h.dtype)))
        return (weights * (mx.exp(log_p) * difference).sum(axis=-1)).sum()

    slope = mx.compile(mx.value_and_grad(kl))
    prediction = mx.compile(lambda h: _normalised(head(h)))

    def losses(lens: TunedLens, tokens: mx.array, counted: mx.array) -> tuple:
        done = model.run(tokens, capture=sites, stop=True)
        states = [done[site][0] for site in sites]
        mx.eval(states)
        weights = counted[0] / counted.sum()
        total = 0.0
        slopes = [_zeros(lens, layer) for layer in range(last + 1)]
        for start in range(0, tokens.shape[1], rows):
            part = slice(start, start + rows)
            log_p = prediction(states[last][part])
            for layer in range(last):
                maps = _maps(lens, layer)
                value, found = slope(maps, states[layer][part], log_p, weights[part])
                slopes[layer] = {name: slopes[layer][name] + found[name] for name in found}
                mx.eval(slopes[layer], value)
                total += float(value) / last
        return total, slopes

    return losses


def _maps(lens: TunedLens, layer: int) -> Arrays:
    return {name: lens.translators[layer][name] for name in ("weight", "bias")}


def _zeros(lens: TunedLens, layer: int) -> Arrays:
    return {name: mx.zeros_like(array) for name, array in _maps(lens, layer).items()}


def _normalised(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _clipped(slopes: list[Arrays], limit: float | None) -> list[Arrays]:
    """The slopes of all maps, together no longer than a limit."""
    if limit is None:
        return slopes
    squares = (x.square().sum() for own in slopes for x in own.values())
    factor = mx.minimum(1.0, limit / mx.maximum(mx.sqrt(sum(squares, mx.array(0.0))), 1e-12))
    return [{name: x * factor for name, x in own.items()} for own in slopes]


def _orders(count: int, num_steps: int, seed: int) -> Iterator[int]:
    """Which context each step is over: all of them in random order, again and again."""
    rng, left = np.random.default_rng(seed), num_steps
    while left > 0:
        order: Sequence[int] = rng.permutation(count)[:left].tolist()
        yield from order
        left -= len(order)


def _check(
    num_steps: int, learning_rate: float, momentum: float, max_seq_len: int, clip: float | None
) -> None:
    rules = (
        ("num_steps", num_steps, num_steps >= 1, "at least 1"),
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "above 0"),
        ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
        ("max_seq_len", max_seq_len, max_seq_len >= 2, "at least 2"),
        ("gradient_clip", clip, clip is None or 0 < clip < math.inf, "above 0, or None"),
    )
    for name, value, fits, allowed in rules:
        if not fits:
            raise ValueError(f"{name} must be {allowed}, not {value}")
