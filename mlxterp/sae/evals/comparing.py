"""Several coders on the same tokens: what sparsity costs each, and which differences are noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxterp.sae.bound import BoundCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.evaluating import MAX_LOSS_TOKENS, MAX_TOKENS, evaluate
from mlxterp.sae.evals.noise import Difference, Score, finite, spread_of
from mlxterp.sae.evals.report import Evaluation
from mlxterp.sae.files import write_text
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import Table, plot_frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARED = {
    "explained_variance": "explained variance",
    "cosine": "cosine",
    "l0": "L0",
    "difference": "loss difference",
    "kl": "KL",
}
ALL_PAIRS = 4  # coders of which every pair is shown

Coders = Sequence[BoundCoder] | Mapping[str, BoundCoder | Sequence[BoundCoder]]


@dataclass(frozen=True, eq=False)
class CoderComparison:
    """Reports on several coders by name, all of the same tokens.

    `lines` are the names that belong together, such as coders of one kind and several sparsities.
    """

    evaluations: Mapping[str, Evaluation]
    lines: Mapping[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> Evaluation:
        if name not in self.evaluations:
            raise ValueError(f"name must be one of {list(self.evaluations)}, got {name!r}.")
        return self.evaluations[name]

    def difference(self, first: str, second: str, score: str = "explained_variance") -> Difference:
        """A score of the second coder less that of the first.

        The standard error is that of the difference itself: both are scored on the same documents,
        drawn again together. It knows nothing of how coders differ that were trained with other
        seeds. Raises `ValueError` for a name or a score that there is not.
        """
        a, b = self[first], self[second]
        if score not in a.draws or score not in b.draws:
            known = [name for name in COMPARED if name in a.draws and name in b.draws]
            raise ValueError(f"score must be one of {known}, got {score!r}.")
        draws = b.draws[score] - a.draws[score]
        value = float(_score(b, score)) - float(_score(a, score))
        return Difference(value, spread_of(draws, a.data.n_clusters))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs whose differences are shown: all of few coders, of many each with the first."""
        names = list(self.evaluations)
        if len(names) <= ALL_PAIRS:
            return [*combinations(names, 2)]
        return [(names[0], name) for name in names[1:]]

    @property
    def scores(self) -> list[str]:
        """The scores that all coders have."""
        reports = self.evaluations.values()
        return [name for name in COMPARED if all(name in report.draws for report in reports)]

    @property
    def table(self) -> Table:
        """A row for each coder."""
        scores = self.scores
        rows = tuple(
            (name, *(_cell(_score(report, s), s) for s in scores))
            for name, report in self.evaluations.items()
        )
        data = next(iter(self.evaluations.values())).data
        title = f"{len(rows)} coders on {data.n_tokens:,} tokens"
        title += f", ± one standard error over {data.clusters}"
        return Table(title, ("", *(COMPARED[score] for score in scores)), rows)

    @property
    def differences(self) -> Table:
        """A row for each pair of coders; `=` marks differences that are within the noise."""
        scores = self.scores
        rows = tuple(
            (f"{b} - {a}", *(_difference_cell(self.difference(a, b, s), s) for s in scores))
            for a, b in self.pairs
        )
        title = "Differences on the same documents (=: less than two standard errors)"
        return Table(title, ("", *(COMPARED[score] for score in scores)), rows)

    def __repr__(self) -> str:
        return f"{self.table!r}\n\n{self.differences!r}" if self.pairs else repr(self.table)

    def _repr_html_(self) -> str:
        pairs = self.differences._repr_html_() if self.pairs else ""
        return self.table._repr_html_() + pairs

    def to_dict(self) -> dict[str, Any]:
        """The reports, and the differences of all pairs, as plain values."""
        names = combinations(self.evaluations, 2)
        return {
            "evaluations": {name: found.to_dict() for name, found in self.evaluations.items()},
            "differences": [
                {"first": a, "second": b}
                | {score: self.difference(a, b, score).to_dict() for score in self.scores}
                for a, b in names
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, which is also written to a `path`."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the frontier: FVU over L0, a line for each name."""
        found = self.evaluations
        return plot_frontier({line: [found[n] for n in ns] for line, ns in self.lines.items()}, ax)


def compare(
    coders: Coders,
    model: ActivationSource | None = None,
    dataset: Iterable[Any] | ActivationDataset | None = None,
    *,
    max_tokens: int | None = MAX_TOKENS,
    max_loss_tokens: int | None = MAX_LOSS_TOKENS,
    seed: int = 0,
) -> CoderComparison:
    """Measure several coders on the same tokens; see `evaluating.evaluate`.

    A mapping names them, and may have several coders of one name, of different sparsity. `model`
    may be left out where the first coder knows it. Raises `ValueError` for no coder, and without a
    dataset or texts: what one coder held out another may have been trained on.
    """
    lines, named = _named(coders)
    if dataset is None:
        raise ValueError("dataset must be texts that no coder was trained on, or made of such.")
    data = dataset
    if not isinstance(data, ActivationDataset):
        first = next(iter(named.values()))
        sites = dict.fromkeys(
            name for coder in named.values() for name in coder.reads.union(coder.writes).names
        )
        context = first.metadata.data.get("context_length")
        data = ActivationDataset.from_texts(
            first.known_model(model), data, list(sites), context_length=context
        )
    found = evaluate(
        [*named.values()], data, max_tokens=max_tokens, max_loss_tokens=max_loss_tokens, seed=seed
    )
    return CoderComparison(dict(zip(named, found, strict=True)), lines)


def _named(coders: Coders) -> tuple[dict[str, tuple[str, ...]], dict[str, BoundCoder]]:
    """The names of each line, and the coder of each name."""
    if not isinstance(coders, Mapping):
        labels = [_label(coder) for coder in coders]
        twice = {label for label in labels if labels.count(label) > 1}
        unique = [f"{x} ({i + 1})" if x in twice else x for i, x in enumerate(labels)]
        coders = dict(zip(unique, coders, strict=True))
    lines, named = {}, {}
    for name, given in coders.items():
        several = [given] if isinstance(given, BoundCoder) else [*given]
        names = [name] if len(several) == 1 else [f"{name} {i + 1}" for i in range(len(several))]
        lines[name] = tuple(names)
        named |= dict(zip(names, several, strict=True))
    if not named:
        raise ValueError("coders must be at least one coder, got none.")
    return lines, named


def _label(coder: BoundCoder) -> str:
    if coder.path is not None:
        return coder.path.name
    k = "" if coder.k is None else f", k {coder.k}"
    return f"{coder.activation_name}, {coder.n_features:,} features{k}"


def _score(report: Evaluation, name: str) -> Score:
    parts = (report.fidelity, report.sparsity, report.loss)
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def _cell(score: Score, name: str) -> str:
    value, spread, _ = score.cells(".2f" if name == "l0" else ".4f")
    return value if spread == "-" else f"{value} ± {spread}"


def _difference_cell(found: Difference, name: str) -> str:
    form = "+.2f" if name == "l0" else "+.4f"
    if finite(found.value) is None:
        return "-"
    return f"{found.value:{form}}{' =' * bool(found.is_noise)}"
