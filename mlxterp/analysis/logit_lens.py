"""The logit lens: what each layer would predict if it were the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.analysis.lens import LogitLens, Prediction
from mlxterp.analysis.metrics import texts_of
from mlxterp.analysis.predictions import best_tokens
from mlxterp.analysis.readout import Head, replaced_norm
from mlxterp.analysis.source import Readable
from mlxterp.notebook import show

Lenses = LogitLens | list[LogitLens]


def logit_lens(
    model: Readable,
    text: Any,
    top_k: int = 1,
    layers: int | Iterable[int] | None = None,
    position: int | Iterable[int] | None = None,
    final_norm: nn.Module | None = None,
    skip_norm: bool = False,
) -> Lenses:
    """The `top_k` tokens that the model's own tail makes of the stream after each layer.

        logits[layer] = head(norm(h[layer]))       h [S, d_model], logits [S, vocab]

    `text` may also be token ids; several texts (rows of ids, an array `[B, S]`) give a list of
    results. `layers` and `position` choose some; negative ones count from the end, that of each
    text. The states of all layers are read in one batch, in place of the last block's output, so
    that the last layer has the model's logits. `final_norm` takes the place of the model's norm,
    and with `skip_norm` there is none. Raises `ValueError` for a layer, position or `top_k` out of
    range, and for a model that keeps several streams.

    Reference: nostalgebraist 2020; Belrose et al. 2023, arXiv 2303.08112.
    """
    head = Head(model, replaced_norm(final_norm, skip_norm))
    return look(model, text, head, top_k, layers, position)


def look(
    model: Readable,
    text: Any,
    head: Head,
    top_k: int = 1,
    layers: int | Iterable[int] | None = None,
    position: int | Iterable[int] | None = None,
    translate: Callable[[mx.array, int], mx.array] | None = None,
    name: str = "logit lens",
) -> Lenses:
    """A lens that passes what is read after each layer through `translate(h, layer)` first."""
    chosen = _layers(model, layers)
    if not 1 <= top_k <= head.vocabulary:
        raise ValueError(f"top_k must be 1 to {head.vocabulary}, not {top_k}")
    ids, mask = model.tokens(text)
    if mask is None:
        raise ValueError(f"a {name} reads text or token ids, not an array of {ids.dtype}")
    places = _places(np.array(mask).sum(axis=1).tolist(), position)
    streams, last = _streams(model, ids, chosen, places)
    if translate is not None:
        streams = {layer: translate(h, layer) for layer, h in streams.items()}
    found = _predictions(model, head, mx.concatenate([*streams.values()]), top_k)
    rows, count, start = np.array(ids).tolist(), sum(map(len, places)), 0
    lenses = []
    for row, own in zip(rows, places, strict=True):
        part = slice(start, start := start + len(own))
        read = [row[place] for place in own]
        at = {layer: count * i + part.start for i, layer in enumerate(chosen)}
        lenses.append(
            LogitLens(
                {layer: found[first : first + len(own)] for layer, first in at.items()},
                name=name,
                positions=own,
                tokens=read,
                texts=texts_of(model, read),
                streams={layer: h[part] for layer, h in streams.items()},
                last=last[part],
                head=head,
            )
        )
    return lenses if _several(text) else lenses[0]


def plotted(lenses: Lenses, plot: bool, *options: Any) -> Lenses:
    """The same lenses, if it is to be with a `figure` each, which a notebook shows."""
    several = lenses if isinstance(lenses, list) else [lenses]
    for lens in several if plot else ():
        lens.figure = lens.plot(*options)
        show(lens.figure)
    return lenses


def _layers(model: Readable, layers: int | Iterable[int] | None) -> list[int]:
    if layers is None:
        return [*range(model.n_layers)]
    numbers = [index(n) for n in (layers if isinstance(layers, Iterable) else (layers,))]
    wrong = [n for n in numbers if not -model.n_layers <= n < model.n_layers]
    if wrong or not numbers:
        count = model.n_layers
        raise ValueError(f"layers must be of -{count} to {count - 1}, not {wrong or numbers}")
    return sorted({n % model.n_layers for n in numbers})


def _places(lengths: list[int], position: int | Iterable[int] | None) -> list[list[int]]:
    """The positions that are read of each text."""
    if position is None:
        return [[*range(length)] for length in lengths]
    wanted = [index(p) for p in (position if isinstance(position, Iterable) else (position,))]
    shortest = min(lengths)
    wrong = [p for p in wanted if not -shortest <= p < shortest]
    if wrong or not wanted:
        raise ValueError(
            f"position must be of -{shortest} to {shortest - 1}, because the "
            f"{'shortest ' if len(lengths) > 1 else ''}text has {shortest} tokens: "
            f"{wrong or wanted}"
        )
    return [[p % length for p in wanted] for length in lengths]


def _streams(
    model: Readable, ids: mx.array, layers: list[int], places: list[list[int]]
) -> tuple[Mapping[int, mx.array], mx.array]:
    """The stream after each layer, and after the last one, at the places of all rows, `[N, d]`."""
    sites = {n: model.site(n, "resid_post") for n in {*layers, model.n_layers - 1}}
    done = model.run(ids, capture=tuple(sites.values()), stop=True)
    rows = mx.array([i for i, own in enumerate(places) for _ in own])
    columns = mx.array([place for own in places for place in own])
    if len(rows) == ids.size:
        read = {n: done[site].reshape(-1, done[site].shape[-1]) for n, site in sites.items()}
    else:
        read = {n: done[site][rows, columns] for n, site in sites.items()}
    mx.eval(read)
    return {layer: read[layer] for layer in layers}, read[model.n_layers - 1]


def _predictions(
    model: Readable, head: Head, hidden: mx.array, top_k: int
) -> list[list[Prediction]]:
    ids: list[list[int]] = []
    scores: list[list[float]] = []
    for logits in head.parts(hidden):
        best, values = best_tokens(logits, top_k)
        ids += best
        scores += values
    distinct = sorted({i for row in ids for i in row})
    texts = dict(zip(distinct, texts_of(model, distinct), strict=True))
    return [
        [(i, score, texts[i]) for i, score in zip(*pair, strict=True)]
        for pair in zip(ids, scores, strict=True)
    ]


def _several(text: Any) -> bool:
    """Whether an input is of several texts, be it of one that is in a list."""
    if isinstance(text, (list, tuple)):
        return isinstance(text[0], (str, list, tuple))
    return getattr(text, "ndim", 1) == 2
