"""All tasks of the benchmark on one coder, and two coders compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.noise import Difference
from mlxterp.sae.evals.origin import described
from mlxterp.sae.evals.tasks.absorption import absorption, check_reads_what_it_writes
from mlxterp.sae.evals.tasks.autointerp import autointerp
from mlxterp.sae.evals.tasks.builtin_sets import builtin_sets
from mlxterp.sae.evals.tasks.ground_truth import recovery
from mlxterp.sae.evals.tasks.labelled import LabelledSet
from mlxterp.sae.evals.tasks.perturbation import probe_perturbation
from mlxterp.sae.evals.tasks.probing import SEEDS, sparse_probing
from mlxterp.sae.evals.tasks.result import TaskResult
from mlxterp.sae.evals.tasks.saebench import in_saebench_shape
from mlxterp.sae.evals.tasks.stability import seed_stability
from mlxterp.sae.evals.tasks.synthetic import SyntheticFeatures
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.files import write_text
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Task = Literal["probing", "absorption", "perturbation", "autointerp", "stability", "ground_truth"]
Shape = Literal["mlxterp", "saebench"]
TASKS: tuple[Task, ...] = ("probing", "absorption", "perturbation", "autointerp")
WEAK = "first letters"
TITLE = "Differences of these two coders; what other seeds of training do is not in the errors"


@dataclass(frozen=True, eq=False)
class Benchmarks:
    """What the tasks found, by their names, and of others why there is nothing."""

    results: Mapping[str, TaskResult]
    left_out: Mapping[str, str] = field(default_factory=dict)
    coder: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def __getitem__(self, task: str) -> TaskResult:
        if task not in self.results:
            why = self.left_out.get(task, f"it is none of {list(self.results)}")
            raise KeyError(f"There is no result of {task!r}: {why}")
        return self.results[task]

    def minus(self, other: Benchmarks) -> Comparison:
        """The differences of all figures that both have; tasks that were run with other settings,
        such as other letters, are left out."""
        differences, left_out = {}, {}
        for task in (task for task in self.results if task in other.results):
            try:
                differences[task] = self.results[task].minus(other.results[task])
            except ValueError as error:
                left_out[task] = str(error)
        return Comparison(differences, left_out)

    @property
    def table(self) -> Table:
        """All figures: value, spread, and the controls by name."""
        rows = tuple(
            (f"{task}: {name}", *values.score.cells(".3f")[:2], _controls(values))
            for task, result in self.results.items()
            for name, values in result.figures.items()
        )
        lines = [f"{self.coder.get('name', 'A coder')} of {self.model or 'no model'}"]
        lines += [f"left out, {task}: {why}" for task, why in self.left_out.items()]
        return Table("\n".join(lines), ("", "value", "spread", "beside it"), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "coder": dict(self.coder),
            "model": self.model,
            "results": {task: result.to_dict() for task, result in self.results.items()},
            "left_out": dict(self.left_out),
        }

    def to_json(self, path: str | Path | None = None, schema: Shape = "mlxterp") -> str:
        """The results as JSON text, which is also written to a `path`: as `to_dict` has them, or
        `"saebench"`, for each task that is there too the report that it writes, by its name.

        Raises `ValueError` for another schema.
        """
        if schema not in get_args(Shape):
            raise ValueError(f"schema must be one of {list(get_args(Shape))}, got {schema!r}.")
        value: Any = self.to_dict()
        if schema == "saebench":
            value = in_saebench_shape(self.results, self.coder, self.model)
        text = json.dumps(value, indent=2, allow_nan=False)
        if path is not None:
            write_text(path, text)
        return text

    def plot(self) -> Figure:
        """A matplotlib figure with the figures of each task beside their controls."""
        n = max(1, len(self.results))
        sizes = [1.4 + 0.3 * len(result.figures) for result in self.results.values()] or [2.0]
        figure = new_figure(6.4, sum(sizes))
        axes = figure.subplots(n, 1, squeeze=False, gridspec_kw={"height_ratios": sizes})[:, 0]
        for ax, result in zip(axes, self.results.values(), strict=False):
            result.plot(ax)
        return figure


@dataclass(frozen=True)
class Comparison:
    """The figures of one coder less those of another, by task, and why others are left out.

    Standard errors are those of the measurement. Two coders that differ in the seed of their
    training alone may differ by more: to say that of two recipes one is better takes several seeds
    of each.
    """

    differences: Mapping[str, Mapping[str, Difference]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        """One row for each figure; what is less than two standard errors is noise."""
        rows = tuple(
            (f"{task}: {name}", f"{d.value:+.3f}", _error(d), _verdict(d))
            for task, of in self.differences.items()
            for name, d in of.items()
        )
        lines = [
            TITLE,
            *(f"left out, {task}: {why}" for task, why in self.left_out.items()),
        ]
        return Table("\n".join(lines), ("", "value", "standard error", ""), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        differences = {
            task: {name: d.to_dict() for name, d in of.items()}
            for task, of in self.differences.items()
        }
        return {"differences": differences, "left_out": dict(self.left_out)}


def benchmark(
    coder: SparseCoder,
    source: ActivationSource | None = None,
    tasks: Sequence[Task] = TASKS,
    *,
    data: Callable[[], FeatureData] | None = None,
    sets: Sequence[LabelledSet] | None = None,
    labeler: Any = None,
    others: Sequence[SparseCoder] = (),
    synthetic: SyntheticFeatures | None = None,
    seeds: int = SEEDS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Benchmarks:
    """Run tasks on a coder; what cannot be asked of it is left out, and the result says why.

    - `probing`: `sparse_probing` of the labelled `sets`.
    - `absorption`: of first letters or, where the model does not know them, of what kind of thing
      a token of Python is; see `absorption`.
    - `perturbation`: `probe_perturbation`.
    - `autointerp`: of labels by a `labeler`, or by tables of tokens; needs `data`, a function that
      gives what `collect` found.
    - `stability`: `seed_stability`, with `others`.
    - `ground_truth`: `recovery` of `synthetic` features; no model is asked.

    `options` has more arguments for a task by its name. Raises `ValueError` for an unknown task.
    """
    given = {task: dict(of) for task, of in (options or {}).items()}
    for task in (*tasks, *given):
        if task not in get_args(Task):
            raise ValueError(f"tasks must be some of {list(get_args(Task))}, got {task!r}.")
    model = _Model(source)
    runs: dict[Task, Callable[..., TaskResult]] = {
        "probing": lambda **o: sparse_probing(coder, model(), sets, seeds=seeds, **o),
        "absorption": lambda **o: _absorption(coder, model(), seeds=seeds, **o),
        "perturbation": lambda **o: probe_perturbation(coder, model(), seeds=seeds, **o),
        "autointerp": lambda **o: autointerp(coder, _needed(data, "data")(), labeler, **o),
        "stability": lambda **o: seed_stability(coder, others, **o),
        "ground_truth": lambda **o: recovery(
            coder, _needed(synthetic, "synthetic"), seeds=seeds, **o
        ),
    }
    results, left_out = {}, {}
    for task in dict.fromkeys(tasks):
        try:
            results[task] = runs[task](**given.get(task, {}))
        except ValueError as error:
            left_out[task] = str(error)
    return Benchmarks(results, left_out, described(coder), "" if source is None else source.name)


class _Model:
    """The model, asked for where a task needs it."""

    def __init__(self, source: ActivationSource | None):
        self._source = source

    def __call__(self) -> ActivationSource:
        return _needed(self._source, "model")


def _needed(given: Any, name: str) -> Any:
    if given is None:
        raise ValueError(f"it needs {name}=...")
    return given


def _absorption(coder: SparseCoder, source: ActivationSource, **options: Any) -> TaskResult:
    check_reads_what_it_writes(coder, "Absorption")
    if "words" in options:
        return absorption(coder, source, **options)
    try:
        return absorption(coder, source, **options)
    except ValueError as error:
        (kind,) = builtin_sets(["kind"])
        found = absorption(coder, source, kind, **options)
        left_out = {WEAK: str(error), **found.left_out}
        return TaskResult(found.task, found.figures, found.details, left_out, found.settings)


def _controls(values: Any) -> str:
    return ", ".join(f"{name} {values.control(name).cells('.3f')[0]}" for name in values.controls)


def _error(difference: Difference) -> str:
    return "-" if difference.spread is None else f"{difference.spread:.3f}"


def _verdict(difference: Difference) -> str:
    return {True: "noise", False: "more than noise", None: "unknown"}[difference.is_noise]
