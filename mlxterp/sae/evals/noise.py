"""How sure a score is: its spread over documents or seeds, what chance gives, and differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

N_DRAWS = 1000
N_GROUPS = 256
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Score:
    """A number, how much it would change by chance, and what means nothing scores.

    `spread` is one standard error over documents, or one standard deviation over seeds; `control`
    the same number for what knows nothing, such as random directions or shuffled labels. Each is
    `None` where there is none. A `value` of `None` is a number that would mean nothing, for the
    `reason` given.
    """

    value: float | None
    spread: float | None = None
    control: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.reason):
            raise ValueError(
                "A score has either a value or a reason why there is none, got "
                f"value={self.value} and reason={self.reason!r}."
            )

    @classmethod
    def over_seeds(cls, values: Sequence[float], controls: Sequence[float] = ()) -> Score:
        """The mean over several seeds, its standard deviation, and the mean of the controls."""
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), spread, float(np.mean(controls)) if controls else None)

    def __float__(self) -> float:
        return math.nan if self.value is None else self.value

    def __format__(self, form: str) -> str:
        return self.cells(form)[0] if form else repr(self)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, and the reason where there is no value."""
        numbers = {name: finite(getattr(self, name)) for name in ("value", "spread", "control")}
        return numbers | ({"reason": self.reason} if self.reason else {})

    def cells(self, form: str = ".4f") -> tuple[str, str, str]:
        """Value, spread and control as text; `-` for what there is not."""
        numbers = (finite(self.value), finite(self.spread), finite(self.control))
        return tuple("-" if x is None else format(x, form) for x in numbers)  # type: ignore[return-value]

    def __repr__(self) -> str:
        if self.value is None:
            return f"no value: {self.reason}"
        value, spread, control = self.cells()
        text = value if self.spread is None else f"{value} ± {spread}"
        return text if self.control is None else f"{text} (control {control})"


@dataclass(frozen=True)
class Difference:
    """A score of one less that of another on the same documents, and its standard error."""

    value: float
    spread: float | None

    @property
    def is_noise(self) -> bool | None:
        """Whether it is no more than two standard errors; `None` where that is not known."""
        return None if self.spread is None else abs(self.value) <= SURE * self.spread

    def to_dict(self) -> dict[str, Any]:
        """The numbers and the verdict."""
        value, spread = finite(self.value), finite(self.spread)
        return {"value": value, "spread": spread, "is_noise": self.is_noise}

    def __repr__(self) -> str:
        if self.spread is None:
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} ± {self.spread:.4f}{' (noise)' * bool(self.is_noise)}"


def finite(x: float | None) -> float | None:
    """The number; `None` where it is none, as JSON wants it."""
    return None if x is None or not math.isfinite(x) else float(x)


def groups_of(documents: np.ndarray, n_documents: int) -> np.ndarray:
    """The group of each token, by the document that it is of: at most `N_GROUPS`.

    Tokens of a document depend on each other, documents do not: what is drawn again are documents,
    or groups of them where there are many.
    """
    return documents % min(N_GROUPS, max(1, n_documents))


def redraw(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """A statistic of sums over tokens `[n_draws]`, with the groups drawn again with replacement.

    `sums` are `[n_groups, ...]`; `statistic` takes their total, `[n_draws, ...]`. Equal seeds draw
    the same groups, so that results of the same groups can be subtracted: a paired bootstrap.

    Reference: Efron 1979, "Bootstrap Methods"; of clusters, Field and Welsh 2007.
    """
    n = len(sums)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws)
    totals = weights.astype(np.float64) @ np.asarray(sums, np.float64).reshape(n, -1)
    return statistic(totals.reshape(n_draws, *np.shape(sums)[1:]))


def spread_of(draws: np.ndarray, n_groups: int) -> float | None:
    """The standard error that draws of so many groups tell; `None` of fewer than two."""
    known = draws[np.isfinite(draws)]
    if n_groups < 2 or len(known) < 2:
        return None
    # Of n groups drawn again the variance is (n - 1) / n of that of n groups drawn anew.
    return float(known.std() * math.sqrt(n_groups / (n_groups - 1)))
