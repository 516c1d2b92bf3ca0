"""Where a model recalls what it knows of a subject: blur the subject, and put activations back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.analysis.grid import Axis, Components, Numbers, make_grid, numbers
from mlxterp.analysis.metrics import Answers, Measure, find_metric, texts_of
from mlxterp.analysis.patches import Reader, logits
from mlxterp.analysis.patching import Pair, named, one_row, too_close
from mlxterp.analysis.patching_result import PatchingResult
from mlxterp.sites import Site

SAMPLED = 4096  # rows of the embedding, to find how far apart its entries are


def causal_tracing(
    model: Any,
    text: Any,
    subject: str | Sequence[int],
    component: Components = "output",
    layers: Sequence[int] | None = None,
    metric: str | Measure = "probability",
    *,
    answers: Answers | None = None,
    positions: Numbers | None = "each",
    window: int = 1,
    noise: float = 3.0,
    n_seeds: int = 10,
    seed: int = 0,
    metric_position: int = -1,
    batch_rows: int | None = None,
) -> PatchingResult:
    """What comes back of a prediction when clean activations are put into a run that cannot see the
    subject.

        embedding[t] + noise sigma e,   e ~ N(0, 1)        at the tokens t of the subject
        recovered = 100 (mean m(restored) - mean m(corrupted)) / (m(clean) - mean m(corrupted))

    The means are over `n_seeds` draws of e, the same for all patches; sigma is the standard
    deviation of the entries of the embedding. `subject` is a part of the text, wherever it stands
    there, or positions. By default the stream after each layer is restored at each position; with a
    `window` so many layers about each are restored together, as Meng et al. do (10) for `mlp` and
    `attn`. The default metric is the probability of the token that is likeliest when clean.
    `spread` is the standard error of `recovered` over the draws. Other arguments are those of
    `activation_patching`.

    Raises `ValueError` for a subject that is not in the text, and settings out of range.

    Reference: Meng et al. 2022, Locating and Editing Factual Associations, arXiv 2202.05262.
    """
    rows = 1 if batch_rows is None else batch_rows
    counts = {"window": window, "n_seeds": n_seeds, "batch_rows": rows}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 < noise < np.inf:
        raise ValueError(f"noise must be above 0 and finite, got {noise}.")
    tokens = one_row(model, "text", text)
    if not -tokens.shape[1] <= metric_position < tokens.shape[1]:
        raise ValueError(
            f"metric_position must be in [{-tokens.shape[1]}, {tokens.shape[1] - 1}], "
            f"got {metric_position}."
        )
    clean = logits(model, tokens, {}, {}, metric_position)
    found = find_metric(model, metric, clean[0], answers)
    where = subject_positions(model, tokens, subject)
    clean_reader = Reader(model, tokens, found, metric_position, batch_rows=batch_rows)
    reader = replace(clean_reader, noise=_noise(model, tokens, where, noise, n_seeds, seed))
    clean_value, corrupted = float(clean_reader.plain()[0]), reader.plain()
    reason = too_close(found, [clean_value, float(corrupted.mean())])
    pair = Pair(reader, tokens, clean_value, float(corrupted.mean()),
                np.ones(tokens.shape[1], bool), reason=reason)  # fmt: skip
    chosen = range(model.n_layers) if layers is None else layers
    windows = layers if window == 1 else [_window(model, n, window) for n in chosen]
    grid = make_grid(model, tokens, component, windows, positions, None)
    if window > 1:
        labels = tuple(str(n % model.n_layers) for n in chosen)
        axis = Axis("layer", tuple(map(int, labels)), labels)
        grid = replace(grid, axes=(axis, *grid.axes[1:]))
    title = f"Causal tracing of {named(component, None)}"
    title += f", {window} layers at a time" if window > 1 else ""
    patches = [patch for patch in grid.patches if patch is not None]
    if reason:
        return pair.result(title, grid, np.full(len(patches), np.nan))
    more = reader.measure(patches, pair.recorded(grid), pair.known) - corrupted
    shares, spread = 100 * more / pair.gap, None
    if n_seeds > 1:
        spread = grid.filled((shares.std(axis=-1, ddof=1) / n_seeds**0.5).tolist())
    return pair.result(title, grid, shares.mean(axis=-1), spread=spread)


def subject_positions(model: Any, tokens: mx.array, subject: str | Sequence[int]) -> list[int]:
    """The positions of a part of the text, of all its occurrences, or those given."""
    length = tokens.shape[1]
    if not isinstance(subject, str):
        return sorted({n for group in numbers("subject", subject, length) for n in group})
    ids: Any = tokens[0].tolist()
    texts = texts_of(model, ids)
    whole, ends = "".join(texts), np.cumsum([len(text) for text in texts])
    found: set[int] = set()
    start = whole.find(subject) if subject else -1
    while start >= 0:
        stop = start + len(subject)
        found |= {i for i, end in enumerate(ends) if end > start and end - len(texts[i]) < stop}
        start = whole.find(subject, stop)
    if not found:
        raise ValueError(f"subject must be a part of the text, {whole!r}, got {subject!r}.")
    return sorted(found)


def _noise(
    model: Any, tokens: mx.array, where: Sequence[int], noise: float, n_seeds: int, seed: int
) -> dict[Site, mx.array]:
    """What is added to the embedding in each run, `[n_seeds, S, d]`."""
    embedding: Any = model.architecture.embedding
    if embedding is None:
        raise ValueError(f"{model.name} has no embedding of tokens that could be found.")
    path = next(p for p, module in model.architecture.modules.items() if module is embedding)
    ids = np.unique(np.linspace(0, model.vocab_size - 1, SAMPLED).astype(np.int32))
    rows = embedding(mx.array(ids)).astype(mx.float32)
    size = noise * mx.sqrt(mx.var(rows))
    shape = (n_seeds, tokens.shape[1], rows.shape[-1])
    here = mx.array([i in where for i in range(shape[1])])[:, None]
    drawn = mx.random.normal(shape, key=mx.random.key(seed))
    return {model.site(path): mx.where(here, size * drawn, 0)}


def _window(model: Any, layer: int, size: int) -> tuple[int, ...]:
    """So many layers about one, fewer at the ends."""
    first = layer % model.n_layers - size // 2
    return tuple(range(max(0, first), min(model.n_layers, first + size)))
