"""Which activations carry what one text has and another lacks: put them there, and see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.analysis.grid import Components, Grid, Layers, Numbers, make_grid
from mlxterp.analysis.metrics import Answers, Measure, Metric, find_metric, texts_of
from mlxterp.analysis.patches import Patch, Reader, Recorded, logits, record
from mlxterp.analysis.patching_result import PatchingResult, Place

Direction = Literal["denoising", "noising"]
Align = Literal["start", "end"]
SMALLEST = 1e-5  # a share of the size: less is rounding


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs: activations of the `source` are put into the run of `reader.tokens`."""

    reader: Reader
    source_tokens: mx.array
    source_value: float
    base_value: float
    known: np.ndarray  # [S], whether the source has something at a position of the base
    at_end: bool = False
    direction: Direction = "denoising"
    reason: str = ""

    @property
    def gap(self) -> float:
        """How far apart the metric is in the two runs."""
        return self.source_value - self.base_value

    def recorded(self, grid: Grid) -> Recorded:
        """What the source run has where the base is patched."""
        source = record(self.reader.model, self.source_tokens, grid.wheres)
        return source.aligned(self.reader.tokens.shape[1], self.at_end)

    def percent(self, values: np.ndarray) -> np.ndarray:
        """Values of the metric as shares of the way from the base to the source."""
        if self.reason:
            return np.full(values.shape, np.nan)
        return 100 * (values - self.base_value) / self.gap

    def result(self, title: str, grid: Grid, values: np.ndarray, **more: Any) -> PatchingResult:
        """Percentages of all patches that there are as a result."""
        ids: Any = self.reader.tokens[0].tolist()
        return PatchingResult(
            title=title,
            recovered=grid.filled(values.tolist()),
            axes=grid.axes,
            metric=self.reader.metric.label,
            source=self.source_value,
            base=self.base_value,
            direction=self.direction,
            tokens=tuple(texts_of(self.reader.model, ids)),
            reason=self.reason,
            **more,
        )


def activation_patching(
    model: Any,
    clean_text: Any,
    corrupted_text: Any,
    component: Components = "mlp",
    layers: Layers | None = None,
    metric: str | Measure = "l2",
    *,
    positions: Numbers | None = None,
    heads: Numbers | None = None,
    answers: Answers | None = None,
    direction: Direction = "denoising",
    align: Align | None = None,
    metric_position: int = -1,
    batch_rows: int | None = None,
) -> PatchingResult:
    """What comes back of a clean run where single activations of it are put into a corrupted one.

        recovered = 100 (m(patched) - m(corrupted)) / (m(clean) - m(corrupted))

    100 is as in the clean run, 0 as in the corrupted one. With `direction="noising"` activations of
    the corrupted run are put into the clean one, and 100 is as in the corrupted run.

    Each of the `layers` (all that have it) is patched by itself at the `component`, `mlp`, `attn`,
    `output` (the block's) or any other of `model.sites()`, over the whole text. There are more axes
    with a list of components, with `positions="each"` or a list of them, and with `heads="each"` or
    a list: then what single heads return is patched, before the output projection. Several that
    stand together in a list, such as `layers=[(0, 1), (2, 3)]`, are patched together.

    The `metric` m, `l2`, `mse`, `cosine`, `kl`, `logit_diff` with `answers=(right, wrong)`,
    `probability` with `answers=right`, or a function of `logits [1, S, vocab]`, is taken at
    `metric_position`; see `mlxterp.analysis.metrics.find_metric`. Many patches share one pass, of
    `batch_rows`, by default as many as the memory allows.

    Texts must have as many tokens as each other, or be aligned at the `start` or `end`; positions
    are those of the text that is patched, and those that the other lacks stay as they are.

    Raises `ValueError` for texts of different lengths without `align`, unknown names, and numbers
    out of range. Reference: Heimersheim and Nanda 2024, arXiv 2404.15255.
    """
    pair = make_pair(model, clean_text, corrupted_text, metric, answers, direction, align,
                     metric_position, batch_rows)  # fmt: skip
    grid = make_grid(model, pair.reader.tokens, component, layers, positions, heads)
    patches = [patch for patch in grid.patches if patch is not None]
    values = measured(pair, grid, patches)
    title = f"Activation patching ({direction}) of {named(component, heads)}"
    return pair.result(title, grid, values)


def measured(pair: Pair, grid: Grid, patches: Sequence[Patch]) -> np.ndarray:
    """What each patch recovers, in percent, `[n]`."""
    if pair.reason:
        return np.full(len(patches), np.nan)
    values = pair.reader.measure(patches, pair.recorded(grid), pair.known)
    return pair.percent(values.mean(axis=-1))


def measuring(pair: Pair, grid: Grid) -> Any:
    """A function that measures patches of a grid by their places."""

    def measure(places: Sequence[Place]) -> np.ndarray:
        numbers = [int(np.ravel_multi_index(place, grid.shape)) for place in places]
        return measured(pair, grid, [grid.patches[i] or () for i in numbers])

    return measure


def make_pair(
    model: Any,
    clean_text: Any,
    corrupted_text: Any,
    metric: str | Measure,
    answers: Answers | None,
    direction: Direction,
    align: Align | None,
    metric_position: int,
    batch_rows: int | None,
) -> Pair:
    """The two runs and what is measured of them."""
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction must be 'denoising' or 'noising', got {direction!r}.")
    if align not in (None, "start", "end"):
        raise ValueError(f"align must be 'start', 'end' or None, got {align!r}.")
    if batch_rows is not None and batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}.")
    texts = {"clean_text": clean_text, "corrupted_text": corrupted_text}
    clean, corrupted = (one_row(model, name, text) for name, text in texts.items())
    if clean.shape != corrupted.shape and align is None:
        raise ValueError(_lengths(model, clean, corrupted))
    for tokens in (clean, corrupted):
        if not -tokens.shape[1] <= metric_position < tokens.shape[1]:
            raise ValueError(
                f"metric_position must be in [{-tokens.shape[1]}, {tokens.shape[1] - 1}], "
                f"got {metric_position}."
            )
    rows = [logits(model, tokens, {}, {}, metric_position)[0] for tokens in (clean, corrupted)]
    found = find_metric(model, metric, rows[0], answers)
    readers = [Reader(model, x, found, metric_position, batch_rows=batch_rows)
               for x in (clean, corrupted)]  # fmt: skip
    values = [float(reader.plain()[0]) for reader in readers]
    reason = too_close(found, values, rows)
    base, source = (1, 0) if direction == "denoising" else (0, 1)
    tokens = (clean, corrupted)
    length, other = tokens[base].shape[1], tokens[source].shape[1]
    known = np.arange(length) >= length - other if align == "end" else np.arange(length) < other
    return Pair(readers[base], tokens[source], values[source], values[base], known,
                align == "end", direction, reason)  # fmt: skip


def one_row(model: Any, name: str, text: Any) -> mx.array:
    """The tokens `[1, S]` of one text."""
    tokens, _ = model.tokens(text)
    if tokens.ndim != 2 or len(tokens) != 1:
        raise ValueError(f"{name} must be one text, or the ids of one, got {len(tokens)}.")
    return tokens


def too_close(metric: Metric, values: Sequence[float], rows: Sequence[mx.array] = ()) -> str:
    """Why the clean and the corrupted run cannot be told apart by values of the metric, or by their
    logits; empty where they can."""
    if not all(map(np.isfinite, values)):
        return f"the metric is {values[0]} in the clean run and {values[1]} in the corrupted one"
    gap, size = abs(values[0] - values[1]), max(map(abs, values))
    alike = gap <= SMALLEST * size
    if rows and metric.is_distance:  # the size of a distance says nothing of what rounding does
        clean, corrupted = (np.array(row.astype(mx.float32), np.float64) for row in rows)
        alike = bool(np.linalg.norm(clean - corrupted) <= SMALLEST * np.linalg.norm(clean))
    if not alike:
        return ""
    return (
        f"the runs do not differ in the metric, {values[0]:.6g} clean and {values[1]:.6g} corrupted"
    )


def _lengths(model: Any, clean: mx.array, corrupted: mx.array) -> str:
    ids: list[Any] = [tokens[0].tolist() for tokens in (clean, corrupted)]
    texts = [texts_of(model, row) for row in ids]
    return (
        f"The texts must have as many tokens as each other, got {len(texts[0])} and "
        f"{len(texts[1])}: {texts[0]} and {texts[1]}. Change words for others of as many tokens, "
        "or give align='end' (or 'start'), which patches the positions that both have, counted "
        "from there."
    )


def named(component: Components, heads: Any) -> str:
    """What is patched, in words."""
    if heads is not None:
        return "heads"
    if isinstance(component, str):
        return component
    return ", ".join(x if isinstance(x, str) else "+".join(x) for x in component)
