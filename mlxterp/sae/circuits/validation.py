"""Effects as they were predicted beside those of actual interventions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Validation:
    """The predicted and the measured effect of each of some edges, `[n]`, and what was done."""

    predicted: np.ndarray
    measured: np.ndarray
    edges: tuple[int, ...]
    method: str

    @property
    def correlation(self) -> float:
        """Pearson's correlation; nan for fewer than two edges."""
        if len(self.predicted) < 2:
            return float("nan")
        return float(np.corrcoef(self.predicted, self.measured)[0, 1])
