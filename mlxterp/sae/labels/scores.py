"""How good a label is: what a judge, or a rule, that knows nothing else gets right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.959964  # 95 % of a normal distribution


@dataclass(frozen=True)
class Score:
    """What was said about contexts (or tokens) where a feature fires and where it does not.

    `hits` of the former were said to be such and `misses` were not; of the latter `false_alarms`
    were and `rejections` were not. About `unanswered` ones no answer could be read.
    """

    hits: int
    misses: int
    false_alarms: int
    rejections: int
    unanswered: int = 0

    @property
    def n(self) -> int:
        """How many were judged."""
        return self.hits + self.misses + self.false_alarms + self.rejections

    @property
    def recall(self) -> float:
        """The share found of those where the feature fires."""
        return _ratio(self.hits, self.hits + self.misses)

    @property
    def precision(self) -> float:
        """The share where the feature fires of those said to be such; 0 where none was."""
        return _ratio(self.hits, self.hits + self.false_alarms)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the shares that are right where the feature fires and where it does not: 0.5
        for whoever always says the same, and for who guesses."""
        return (self.recall + _ratio(self.rejections, self.rejections + self.false_alarms)) / 2

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return _ratio(2 * self.hits, 2 * self.hits + self.misses + self.false_alarms)

    @property
    def base_rate(self) -> float:
        """The share where the feature fires."""
        return _ratio(self.hits + self.misses, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % confidence interval of the balanced accuracy.

        Joined from the Wilson intervals of its two shares by the square root of the sum of squares
        of their distances (Newcombe 1998; Zou and Donner 2008).
        """
        shares = (
            wilson(self.hits, self.hits + self.misses),
            wilson(self.rejections, self.rejections + self.false_alarms),
        )
        middle = self.balanced_accuracy
        low = math.hypot(*(p - low for p, low, _ in shares)) / 2
        high = math.hypot(*(high - p for p, _, high in shares)) / 2
        return max(0.0, middle - low), min(1.0, middle + high)

    def to_dict(self) -> dict[str, Any]:
        """The figures to four digits, and what was counted."""
        figures = ("balanced_accuracy", "f1", "precision")
        return {
            **{name: round(getattr(self, name), 4) for name in figures},
            "interval": [round(end, 4) for end in self.interval],
            **vars(self),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Score:
        """The inverse of `to_dict`; raises `ValueError` for values that are no counts."""
        names = ("hits", "misses", "false_alarms", "rejections", "unanswered")
        counts: list[Any] = [values.get(name) for name in names]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"A score has the counts {list(names)}, got {values!r}.")
        return cls(*counts)

    def __repr__(self) -> str:
        low, high = self.interval
        left = f", {self.unanswered} unanswered" if self.unanswered else ""
        return (
            f"Score(balanced accuracy {self.balanced_accuracy:.3f} [{low:.3f}, {high:.3f}], "
            f"F1 {self.f1:.3f}, n={self.n:,}{left})"
        )


@dataclass(frozen=True)
class Mean:
    """The mean of a figure in [0, 1] over `n` features, and a 95 % interval: 1.96 standard errors
    to either side, all of [0, 1] for a single feature."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value."""
        n, mean = len(values), statistics.fmean(values)
        half = Z * statistics.stdev(values) / math.sqrt(n) if n > 1 else 1.0
        return cls(mean, max(0.0, mean - half), min(1.0, mean + half), n)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return dict(vars(self))

    def __repr__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n:,})"


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """A share, and the ends of its 95 % confidence interval (Wilson 1927)."""
    if n == 0:
        return 0.0, 0.0, 1.0
    p, slack = right / n, Z * Z / n
    middle = (p + slack / 2) / (1 + slack)
    half = Z / (1 + slack) * math.sqrt(p * (1 - p) / n + slack / (4 * n))
    return p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
