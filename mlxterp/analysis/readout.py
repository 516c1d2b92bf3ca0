"""Logits of many hidden states by the model's own tail, in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxterp import tracing
from mlxterp.analysis.source import Readable
from mlxterp.sites import OUTPUT, Site

LOGIT_BYTES = 256 << 20  # of the logits that are held at once

Norm = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Head:
    """What makes logits `[N, vocab]` of hidden states `[N, d_model]`: all that the model does after
    its last block, with `norm` in the place of its final norm where one is given.

    Scales, soft-caps, tied and quantised heads are the model's own. Raises `ValueError` where a
    norm is given and the model's is no module, which could be replaced.
    """

    model: Readable
    norm: Norm | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and self.model.architecture.final_norm is None:
            raise ValueError(
                f"{self.model.name} has no final norm that is a module: final_norm and skip_norm "
                "cannot replace it"
            )

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return self.model.width(Site(None, OUTPUT))

    @property
    def rows_at_once(self) -> int:
        """How many hidden states are read together."""
        return max(1, LOGIT_BYTES // (4 * self.vocabulary))

    def __call__(self, hidden: mx.array) -> mx.array:
        logits = self.model.unembed(hidden) if self.norm is None else self._replaced(hidden)
        return logits.astype(mx.float32)

    def parts(self, hidden: mx.array) -> Iterator[mx.array]:
        """The logits of some of `hidden` after the other, `[n, vocab]`."""
        for start in range(0, len(hidden), self.rows_at_once):
            yield self(hidden[start : start + self.rows_at_once])

    def _replaced(self, hidden: mx.array) -> mx.array:
        architecture, norm = self.model.architecture, self.norm
        assert norm is not None and architecture.final_norm is not None
        rows = norm(hidden)[:, None]
        if rows.shape != (len(hidden), 1, hidden.shape[-1]):
            raise ValueError(
                f"final_norm must keep the shape {list(hidden.shape)}, it made {list(rows.shape)}"
            )
        paths = {id(module): path for path, module in architecture.modules.items()}
        site = self.model.site(paths[id(architecture.final_norm)])
        plan = tracing.Plan(edits={site: (lambda x, context: rows.astype(x.dtype),)})
        tokens = mx.zeros((len(hidden), 1), dtype=mx.int32)
        return tracing.run(architecture, tokens, plan).output[:, 0]


def replaced_norm(final_norm: nn.Module | None, skip_norm: bool) -> Norm | None:
    """What is to take the place of the model's final norm, None where that stays."""
    if final_norm is not None and skip_norm:
        raise ValueError("final_norm is not used with skip_norm=True: give one of them")
    if final_norm is not None and not callable(final_norm):
        raise TypeError(f"final_norm must be a module, not {type(final_norm).__name__}")
    return (lambda x: x) if skip_norm else final_norm
