"""What a task of the benchmark found: figures over several seeds, each beside its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.evals.noise import Difference, Score, finite
from mlxterp.sae.visualization import COLOURS, Table, dress, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Values:
    """A number under each of several seeds, and what each control scores under the same seeds.

    The first of the `controls` is the one that a score stands beside. A seed draws what is trained
    and what is tested, so that seeds share most of their data: `overlap` is the number of tests for
    each that is trained on, by which the standard error of their mean is corrected. Where values
    are not `by_seed` they are of features, drawn from all, and nothing pairs them with others.
    """

    values: tuple[float, ...]
    controls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    overlap: float = 0.0
    by_seed: bool = True

    @property
    def score(self) -> Score:
        """The mean and its spread: the standard deviation over the seeds, or the standard error
        over features; and the mean of the first control."""
        known = _finite(self.values)
        if not known:
            return Score(None, reason="it is not defined under any of the seeds")
        first = _finite(next(iter(self.controls.values()), ()))
        score = Score.over_seeds(known, first)
        if self.by_seed or score.spread is None:
            return score
        return replace(score, spread=score.spread / math.sqrt(len(known)))

    def control(self, name: str) -> Score:
        """The score of one of the controls."""
        return Values(self.controls[name], by_seed=self.by_seed).score

    def minus(self, other: Values) -> Difference:
        """The mean difference under equal seeds, with the standard error

            sd * sqrt(1 / n + overlap)

        of n seeds, as splits that share data are not independent; of values of features, the root
        of the sum of the squares of both standard errors. Raises `ValueError` for different numbers
        of seeds.

        Reference: Nadeau and Bengio 2003, "Inference for the Generalization Error".
        """
        if not (self.by_seed and other.by_seed):
            one, two = self.score, other.score
            errors = [score.spread for score in (one, two) if score.spread is not None]
            spread = math.hypot(*errors) if len(errors) == 2 else None
            return Difference(float(one) - float(two), spread)
        if len(self.values) != len(other.values):
            raise ValueError(
                f"Differences need the same seeds, got {len(self.values)} and {len(other.values)}."
            )
        pairs = np.subtract(self.values, other.values)
        known = pairs[np.isfinite(pairs)]
        mean = float(known.mean()) if len(known) else math.nan
        if len(known) < 2:
            return Difference(mean, None)
        spread = known.std(ddof=1) * math.sqrt(1 / len(known) + self.overlap)
        return Difference(mean, float(spread))

    def above(self, name: str = "") -> Difference:
        """How much more it is than a control, by default the first."""
        name = name or next(iter(self.controls))
        return self.minus(Values(self.controls[name], by_seed=self.by_seed))

    def to_dict(self) -> dict[str, Any]:
        """The score, and the values of all seeds and controls."""
        controls = {name: [finite(x) for x in values] for name, values in self.controls.items()}
        values = [finite(x) for x in self.values]
        return self.score.to_dict() | {"values": values, "controls": controls}


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


@dataclass(frozen=True)
class TaskResult:
    """The figures of a task, by name, the most important first.

    `details` are those of each part of the task, such as a labelled set or a letter; `left_out`
    says of other parts why there are none. `settings` are what the task was run with.
    """

    task: str
    figures: Mapping[str, Values]
    details: Mapping[str, Mapping[str, Values]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Values:
        if name not in self.figures:
            raise KeyError(f"{name!r} is none of the figures {list(self.figures)}.")
        return self.figures[name]

    def minus(self, other: TaskResult) -> dict[str, Difference]:
        """The differences of the figures that both have; raises `ValueError` for another task."""
        if self.task != other.task or dict(self.settings) != dict(other.settings):
            raise ValueError(
                "Only one task with the same settings can be compared, got "
                f"{self.task!r} with {dict(self.settings)} and {other.task!r} with "
                f"{dict(other.settings)}."
            )
        both = [name for name in self.figures if name in other.figures]
        return {name: self.figures[name].minus(other.figures[name]) for name in both}

    @property
    def table(self) -> Table:
        """One row for each figure, and for the first of each part."""
        firsts = {part: dict([*figures.items()][:1]) for part, figures in self.details.items()}
        parts = {"": self.figures, **firsts}
        controls = [*dict.fromkeys(c for part in parts.values() for v in part.values()
                                   for c in v.controls)]  # fmt: skip
        rows = tuple(
            (f"{part}: {name}" if part else name, *_cells(values, controls))
            for part, figures in parts.items()
            for name, values in figures.items()
        )
        title = [self.task, *(f"left out, {part}: {why}" for part, why in self.left_out.items())]
        return Table("\n".join(title), ("", "value", "spread", *controls), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        details = {
            part: {name: values.to_dict() for name, values in figures.items()}
            for part, figures in self.details.items()
        }
        return {
            "task": self.task,
            "figures": {name: values.to_dict() for name, values in self.figures.items()},
            "details": details,
            "left_out": dict(self.left_out),
            "settings": dict(self.settings),
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the figures with their spread, and of their controls."""
        ax = new_axis(6.4, 1.4 + 0.3 * len(self.figures)) if ax is None else ax
        controls = [*dict.fromkeys(c for v in self.figures.values() for c in v.controls)]
        for i, values in enumerate(self.figures.values()):
            score = values.score
            ax.errorbar(
                float(score), i, xerr=score.spread, fmt="o", color=COLOURS[0], capsize=3,
                label="coder" if not i else None,
            )  # fmt: skip
        for j, name in enumerate(controls):
            at = [i for i, values in enumerate(self.figures.values()) if name in values.controls]
            scores = [float(v.control(name)) for v in self.figures.values() if name in v.controls]
            ax.scatter(scores, at, marker="x", color=COLOURS[1 + j % (len(COLOURS) - 1)],
                       label=name)  # fmt: skip
        ax.set_yticks(range(len(self.figures)), [*self.figures])
        ax.set_ylim(len(self.figures) - 0.5, -0.5)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 + len(controls))
        return dress(ax, self.task)


def _cells(values: Values, controls: list[str]) -> list[str]:
    known = (values.control(name) if name in values.controls else None for name in controls)
    rest = ["" if score is None else score.cells(".3f")[0] for score in known]
    return [*values.score.cells(".3f")[:2], *rest]
