"""The labels of a coder's features, with what they are worth, and their file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxterp.sae.features.display import visible
from mlxterp.sae.files import read_json, write_json
from mlxterp.sae.labels.scores import Mean, Score
from mlxterp.sae.visualization import COLOURS, Table, dress, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
LABELS_FILE = "labels.json"
USER, TOKENS = "user", "tokens"
SCORES = ("detection", "fuzzing", "tokens", "control")
SHOWN = 20  # rows of a table
WIDEST = 60  # characters of a label in it


@dataclass(frozen=True)
class Rule:
    """Tokens on which a label says that the feature fires, and on what share of them it did, `n`
    times. `token` or `previous` is None where it may be any."""

    previous: str | None
    token: str | None
    share: float
    n: int


@dataclass(frozen=True)
class Label:
    """What a feature is said to respond to, by whom, and how good that is.

    `source` is `"user"`, `"tokens"` for what tables of tokens say, or the name of a labeller, with
    its `settings`. `detection` and `fuzzing` are scores of a `judge`, `tokens` that of the rules of
    a table; `control` is the score of another feature's label on this feature: what chance gives.
    """

    text: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    judge: str = ""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    detection: Score | None = None
    fuzzing: Score | None = None
    tokens: Score | None = None
    control: Score | None = None
    rules: tuple[Rule, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, as plain values."""
        found = {name: value for name, value in vars(self).items() if value}
        found |= {name: found[name].to_dict() for name in SCORES if name in found}
        return found | ({"rules": [vars(rule) for rule in self.rules]} if self.rules else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Label:
        """The inverse of `to_dict`; raises `ValueError` for what is no label."""
        try:
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            known |= {name: Score.from_dict(known[name]) for name in SCORES if name in known}
            known["rules"] = tuple(Rule(**rule) for rule in known.get("rules", ()))
            label = cls(**known)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{values!r} is no label: {error}.") from None
        if not isinstance(label.text, str) or not isinstance(label.source, str):
            raise ValueError(f"{values!r} is no label.")
        return label

    def __repr__(self) -> str:
        scores = ((name, getattr(self, name)) for name in SCORES)
        lines = [f"{visible(self.text)!r}, by {visible(self.source)}"]
        lines += [f"  {name}: {score!r}" for name, score in scores if score is not None]
        return "\n".join(lines)


class FeatureLabels(Mapping[int, Label]):
    """The label of each feature that has one: `labels[42]`, `labels.set(42, "French words")`.

    A feature may have several, one of each source (`labels.of(42)`). The one that counts is the
    user's own; else what a labeller said last; else what tables of tokens say. With a `path`, the
    file `labels.json` of a coder's directory, changes by `set` and `remove` are written at once.

    `failures` are the features that have no label or no score, and why, from the last run that
    tried; `stopped` is why a run ended before its end.
    """

    def __init__(self, n_features: int, path: str | Path | None = None):
        self.n_features = n_features
        self.path = None if path is None else Path(path)
        self.failures: dict[int, str] = {}
        self.stopped = ""
        self._labels: dict[int, dict[str, Label]] = {}

    def __getitem__(self, feature_id: int) -> Label:
        found = self._labels[feature_id]
        return found.get(USER) or next(
            (label for name, label in reversed(found.items()) if name != TOKENS), None
        ) or found[TOKENS]  # fmt: skip

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._labels))

    def __len__(self) -> int:
        return len(self._labels)

    def of(self, feature_id: int) -> tuple[Label, ...]:
        """All labels of a feature, one of each source."""
        return tuple(self._labels.get(feature_id, {}).values())

    def by(self, source: str) -> dict[int, Label]:
        """The labels of one source."""
        return {i: found[source] for i, found in self._labels.items() if source in found}

    @property
    def texts(self) -> dict[int, str]:
        """The text of each feature's label."""
        return {i: self[i].text for i in self}

    def set(self, feature_id: int, text: str) -> None:
        """Give a feature a label of one's own, which no run replaces."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must be a str that is not empty, got {text!r}.")
        self.add(feature_id, Label(" ".join(text.split()), USER))
        self.write()

    def remove(self, feature_id: int, source: str | None = None) -> None:
        """Forget what one source says of a feature, or what all do."""
        if source is None:
            self._labels.pop(feature_id, None)
        else:
            self._labels.get(feature_id, {}).pop(source, None)
            if not self._labels.get(feature_id, True):
                del self._labels[feature_id]
        self.write()

    def add(self, feature_id: int, label: Label) -> None:
        """Note a label in the place of an older one of its source, without writing the file."""
        if not 0 <= feature_id < self.n_features:
            raise ValueError(
                f"feature_id must be in [0, {self.n_features - 1}], got {feature_id!r}."
            )
        found = self._labels.setdefault(int(feature_id), {})
        found.pop(label.source, None)
        found[label.source] = label

    def update(self, feature_id: int, source: str, **changes: Any) -> None:
        """Change a label where it is, without writing the file."""
        found = self._labels[feature_id]
        found[source] = replace(found[source], **changes)

    @property
    def means(self) -> dict[str, Mean]:
        """The mean of each figure over the features whose label has it: the balanced accuracy of
        every kind of score and, of labels by tables of tokens, the F1 of them and of their
        controls."""
        found = {
            name: [x for i in self if (x := read(self[i])) is not None]
            for name, read in FIGURES.items()
        }
        return {name: Mean.of(values) for name, values in found.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values: the content of the file."""
        return {
            "format_version": FORMAT_VERSION,
            "n_features": self.n_features,
            "labels": {
                str(i): [label.to_dict() for label in self._labels[i].values()] for i in self
            },
            "failures": {str(i): reason for i, reason in self.failures.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write everything to a file, replacing it whole, and return its path."""
        return write_json(path, self.to_dict())

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is not None:
            self.save(self.path)

    @classmethod
    def of_coder(cls, directory: Path | None, n_features: int) -> FeatureLabels:
        """The labels beside a saved coder; none yet where it has none, or was not saved."""
        path = None if directory is None else directory / LABELS_FILE
        if path is not None and path.is_file():
            return cls.load(path, n_features)
        return cls(n_features, path)

    @classmethod
    def load(cls, path: str | Path, n_features: int | None = None) -> FeatureLabels:
        """What `save` wrote; raises `ValueError`, naming the file, where it is missing, damaged or
        of a coder with another number of features."""
        path = Path(path)
        facts = read_json(path, ("format_version", "n_features", "labels"))
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {facts['format_version']!r}; this release of mlxterp "
                f"reads {FORMAT_VERSION}."
            )
        if n_features not in (None, facts["n_features"]):
            raise ValueError(
                f"{path} is of a coder with {facts['n_features']} features, not {n_features}."
            )
        labels = cls(facts["n_features"], path)
        try:
            for i, found in facts["labels"].items():
                for values in found:
                    labels.add(int(i), Label.from_dict(values))
            failures = facts.get("failures", {}).items()
            labels.failures = {int(i): str(reason) for i, reason in failures}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold labels: {error}") from None
        return labels

    @property
    def table(self) -> Table:
        """The best labels with their scores, and the means as title."""
        title = [f"Labels of {len(self):,} of {self.n_features:,} features"]
        title += [f"mean {name} {mean!r}" for name, mean in self.means.items()]
        if self.failures:
            i, reason = next(iter(self.failures.items()))
            title.append(f"{len(self.failures):,} failed, such as {i}: {visible(reason)}")
        if self.stopped:
            title.append(f"stopped: {self.stopped}")
        ranked = sorted(self, key=lambda i: (-_worth(self[i]), i))[:SHOWN]
        figures = [
            name for name, read in FIGURES.items() if any(read(self[i]) is not None for i in ranked)
        ]
        rows = tuple(
            (
                f"{i:>{len(str(self.n_features - 1))}}  {_cut(visible(self[i].text))}",
                *(_shown(FIGURES[name](self[i])) for name in figures),
                visible(self[i].source),
            )
            for i in ranked
        )
        return Table("\n".join(title), ("feature", *figures, "by"), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the balanced accuracies of each kind of score; 0.5 is chance.
        Raises `ImportError` where matplotlib is missing."""
        ax = new_axis() if ax is None else ax
        bins = [i / 40 for i in range(41)]
        for name, colour in zip(SCORES, COLOURS, strict=False):
            values = [x for i in self if (x := FIGURES[name](self[i])) is not None]
            if values:
                ax.hist(
                    values, bins, histtype="step", color=colour, label=f"{name} ({len(values):,})"
                )
        ax.axvline(0.5, color="#999999", linestyle=":", linewidth=1)
        if ax.patches:
            ax.legend()
        ax.set_xlim(0, 1)
        return dress(ax, "balanced accuracy of a label (0.5 is chance)", "features")


def _worth(label: Label) -> float:
    """What labels are ranked by: what a judge found or, after all of these, the F1 of rules."""
    if label.detection is not None:
        return 1 + label.detection.balanced_accuracy
    return label.tokens.f1 if label.tokens is not None else -1.0


def _figure(name: str, figure: str, source: str = "") -> Callable[[Label], float | None]:
    """Reads a figure of one kind of score, of labels of one source or of any."""

    def read(label: Label) -> float | None:
        score = getattr(label, name) if source in ("", label.source) else None
        return None if score is None else getattr(score, figure)

    return read


FIGURES = {name: _figure(name, "balanced_accuracy") for name in SCORES} | {
    f"{name} F1": _figure(name, "f1", TOKENS) for name in ("tokens", "control")
}


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
