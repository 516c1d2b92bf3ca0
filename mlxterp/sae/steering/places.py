"""Where an edit takes place: some positions of a pass, the prompt, or what is generated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

Positions = Iterable[int] | slice | None
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Places:
    """Which positions of a pass are edited: some or all, in one phase of a generation or both."""

    positions: tuple[int, ...] | slice | None = None
    phase: str | None = None

    @classmethod
    def of(cls, positions: Positions, phase: str | None) -> Places:
        """Raises `ValueError` for positions that are no whole numbers, for no ascending slice, and
        for another phase."""
        if phase not in (None, *get_args(Phase)):
            raise ValueError(f"phase must be None or one of {get_args(Phase)}, got {phase!r}.")
        if isinstance(positions, (int, np.integer)):
            raise ValueError(f"positions must be several or a slice: write [{positions}].")
        if isinstance(positions, slice):
            if positions.step is not None and positions.step < 1:
                raise ValueError(f"positions must have a step of 1 or more, got {positions}.")
        elif positions is not None:
            given = tuple(positions)
            if not all(isinstance(p, (int, np.integer)) for p in given):
                raise ValueError(f"positions must be whole numbers, got {given}.")
            positions = tuple(map(int, given))
        return cls(positions, phase)

    def mask(self, context: Any) -> mx.array | bool:
        """The positions `[1 or B, S, 1]` that are edited, or whether all or none are."""
        if self.positions is None and self.phase is None:
            return True
        if context is None:
            raise ValueError("An edit of some positions or of one phase needs its context.")
        if self.phase not in (None, context.phase):
            return False
        if self.positions is None:
            return True
        if context.positions is None:
            raise ValueError(
                "This pass does not know its positions, since its cache does not count tokens: "
                "leave positions= out."
            )
        return self._among(context.positions[None], context)[..., None]

    def _among(self, here: mx.array, context: Any) -> mx.array:
        if not isinstance(self.positions, slice):
            positions = self.positions or ()
            ahead = mx.array([p for p in positions if p >= 0], dtype=here.dtype)
            found = (here[..., None] == ahead).any(axis=-1)
            for p in positions:
                found = found | (here == _absolute(p, context)) if p < 0 else found
            return found
        start, stop, step = self.positions.start, self.positions.stop, self.positions.step
        start = mx.maximum(_absolute(start or 0, context), 0)
        found = (here >= start) & ((here - start) % (step or 1) == 0)
        return found if stop is None else found & (here < _absolute(stop, context))


def _absolute(position: int, context: Any) -> mx.array | int:
    """The position, or where it is negative that before the end of each row's prompt, `[B, 1]`."""
    if position >= 0:
        return position
    if context.prompt_end is None:
        raise ValueError(
            "Negative positions count from the end of the prompt, which is not known where a "
            "cache may hold a part of it: give absolute ones."
        )
    padding = 0 if context.mask is None else (~context.mask).sum(axis=-1, keepdims=True)
    return context.prompt_end - padding + position
