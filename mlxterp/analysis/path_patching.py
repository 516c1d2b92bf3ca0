"""What one part of a model does to another directly, all else being held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.analysis.grid import Numbers
from mlxterp.analysis.heads import HeadEdit, HeadPlace, tapped
from mlxterp.analysis.metrics import Answers, Measure
from mlxterp.analysis.patches import Patch, Reader, Recorded, record, replacing
from mlxterp.analysis.patching import Align, Direction, Pair, make_pair
from mlxterp.analysis.patching_result import PatchingResult
from mlxterp.analysis.paths import (
    Receiver,
    Receivers,
    Sender,
    find_receivers,
    held_sites,
    sender_grid,
)
from mlxterp.sites import Site


def path_patching(
    model: Any,
    clean_text: Any,
    corrupted_text: Any,
    senders: Literal["heads", "mlps"] | Sequence[Sender | Sequence[Sender]] = "heads",
    receivers: Receiver | Sequence[Receiver] = "logits",
    metric: str | Measure = "logit_diff",
    *,
    positions: Numbers | None = None,
    freeze: Sequence[Literal["attn", "mlp"]] = ("attn", "mlp"),
    answers: Answers | None = None,
    direction: Direction = "denoising",
    align: Align | None = None,
    metric_position: int = -1,
    batch_rows: int | None = None,
) -> PatchingResult:
    """What comes back through the direct paths from each sender to the receivers alone.

    Two passes over the base run, the corrupted one (with `direction="noising"` the clean one):

        1. the sender has its activation of the source run, the outputs of all other attentions and
           MLPs those of the base run; what the receivers then take in is kept
        2. the receivers take that in, and all else is computed

        recovered = 100 (m(pass 2) - m(base)) / (m(source) - m(base))

    `senders` are all `heads`, all `mlps`, or a list: `(layer, head)`, a site such as `layers.3.mlp`
    or `layers.0.resid_pre` (all that the blocks start from), or a list of those that send together.
    `receivers` are the `logits`, or one or more of `(layer, head, "q")`, with `k` or `v`, and
    `layers.5.mlp`, which is the input of that MLP: all receive together. Receivers take in through
    the norms before them, which are computed and not held, as the final one is. `positions` are
    those at which the sender sends. With `freeze=("attn",)` MLPs on the way are part of the path,
    as in Wang et al. NaN where no receiver comes after the sender. The other arguments are those of
    `activation_patching`.

    Raises `ValueError` as it does, and for blocks that do not add one attention and one MLP to a
    stream, once in a pass, which is what is held.

    References: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
    """
    pair = make_pair(model, clean_text, corrupted_text, metric, answers, direction, align,
                     metric_position, batch_rows)  # fmt: skip
    if wrong := [name for name in freeze if name not in ("attn", "mlp")]:
        raise ValueError(f"freeze must be of 'attn' and 'mlp', got {wrong[0]!r}.")
    held = held_sites(model, freeze)
    tokens = pair.reader.tokens
    into = find_receivers(model, tokens, receivers)
    grid = sender_grid(model, tokens, senders, positions, into)
    title = f"Path patching ({direction}) to {_named(receivers)}"
    patches = [patch for patch in grid.patches if patch is not None]
    if pair.reason:
        return pair.result(title, grid, np.full(len(patches), np.nan))
    base = record(model, tokens, [*held, *grid.wheres])
    values = _measure(pair, patches, pair.recorded(grid), base, held, into)
    return pair.result(title, grid, pair.percent(values))


def _measure(
    pair: Pair,
    patches: Sequence[Patch],
    source: Recorded,
    base: Recorded,
    held: Sequence[Site],
    into: Receivers,
) -> np.ndarray:
    """The metric of pass 2, of each patch, `[n]`; for logits there is but one pass."""
    found, reader = [np.zeros(0)], pair.reader
    for start in range(0, len(patches), size := reader.rows_per_pass()):
        some = patches[start : start + size]
        edits, taps = _sending(some, source, base, held, pair.known)
        if into:
            edits, taps = _receiving(reader, edits, taps, len(some), into)
        found.append(np.array(reader.read(edits, taps, len(some)), np.float64))
    return np.concatenate(found)


def _sending(
    patches: Sequence[Patch],
    source: Recorded,
    base: Recorded,
    held: Sequence[Site],
    known: np.ndarray,
) -> tuple[dict[Site, Any], dict[HeadPlace, HeadEdit]]:
    """Edits of pass 1: all as in the base run but what the sender of each row sends.

    Where heads of a layer send, its attention is computed from its heads, of which the others are
    held.
    """
    sent, sent_by_heads = replacing(patches, source, known)
    edits: dict[Site, Any] = dict(sent)
    for site in held:
        place = HeadPlace(site.layer or 0, "z")
        free = _rows_with(place, patches) if site.component == "attn" else [False] * len(patches)
        edits[site] = _holding(base.values[site][0], free, sent.get(site))
    taps = {
        place: _holding_heads(base.values[place], _rows_with(place, patches), tap)
        for place, tap in sent_by_heads.items()
    }
    return edits, taps


def _rows_with(place: HeadPlace, patches: Sequence[Patch]) -> list[bool]:
    """Whether heads of a layer send, in each row."""
    return [any(spot.where == place for spot in patch) for patch in patches]


def _receiving(
    reader: Reader, edits: Mapping[Site, Any], taps: Mapping[HeadPlace, HeadEdit], n_rows: int,
    into: Receivers,
) -> tuple[dict[Site, Any], dict[HeadPlace, HeadEdit]]:  # fmt: skip
    """Edits of pass 2: receivers take in what they did in pass 1."""
    tokens = mx.broadcast_to(reader.tokens, (n_rows, reader.tokens.shape[1]))
    with tapped(reader.model.architecture, taps, capture=[*into.heads]) as heads:
        done = reader.model.run(tokens, capture=into.inputs, edit=edits)
    received: dict[Site, Any] = {
        site: lambda x, value=done[site]: value.astype(x.dtype) for site in into.inputs
    }
    return received, {
        place: _of_heads(numbers, heads[place]) for place, numbers in into.heads.items()
    }


def _holding(
    value: mx.array, free: Sequence[bool], then: Callable[[mx.array], mx.array] | None
) -> Callable[[mx.array], mx.array]:
    """A value in all rows but those that are free, and then what is sent."""
    rows = mx.array([*free]).reshape(-1, *(1,) * (value.ndim - 1))

    def edit(x: mx.array) -> mx.array:
        x = mx.where(rows, x, value.astype(x.dtype))
        return x if then is None else then(x)

    return edit


def _holding_heads(values: Sequence[mx.array], rows: Sequence[bool], then: HeadEdit) -> HeadEdit:
    """The values of all heads in some rows, and then what is sent."""
    here = mx.array([*rows]).reshape(-1, 1, 1, 1)
    return lambda x, call: then(mx.where(here, values[call].astype(x.dtype), x), call)


def _of_heads(heads: Sequence[int], values: Sequence[mx.array]) -> HeadEdit:
    def edit(x: mx.array, call: int) -> mx.array:
        here = mx.array([h in heads for h in range(x.shape[1])])[:, None, None]
        return mx.where(here, values[call].astype(x.dtype), x)

    return edit


def _named(receivers: Any) -> str:
    return receivers if isinstance(receivers, str) else str(receivers).strip("[]")
