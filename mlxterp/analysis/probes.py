"""Linear probes: what can be read of texts or tokens from the activations at a site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from mlxterp.analysis.probe_data import (
    Place,
    classes_of,
    examples,
    held_out,
    numbered,
    shuffled,
)
from mlxterp.analysis.probe_fits import Fit, Method, ProbeScore, fit, score
from mlxterp.analysis.site_rows import as_texts, rows_at, rows_of_tokens, vector_site
from mlxterp.analysis.source import Readable
from mlxterp.analysis.steering_vectors import SteeringVector
from mlxterp.notebook import fragment
from mlxterp.sites import Site

SHUFFLES = 5


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A linear classifier of the activations at a `site`, of one `position` of a text or, with
    "each", of every token.

    `weights [1 or n_classes, d]` and `bias` are for the activations as they are: of two `classes`
    the second is said where `x . weights + bias > 0`, of more the largest. `score` is how well that
    does on held-out texts.
    """

    site: Site
    classes: tuple[Any, ...]
    weights: np.ndarray
    bias: np.ndarray
    method: str
    position: Place
    score: ProbeScore
    model: Readable

    @property
    def accuracy(self) -> float:
        """The share of held-out examples that is right."""
        return self.score.accuracy

    @property
    def direction(self) -> mx.array:
        """The weights at norm 1, `[d]` towards the second of two classes, or `[n_classes, d]`."""
        norms = np.linalg.norm(self.weights, axis=1, keepdims=True)
        rows = mx.array((self.weights / np.maximum(norms, 1e-300)).astype(np.float32))
        return rows[0] if len(self.classes) == 2 else rows

    @property
    def steering_vector(self) -> SteeringVector:
        """The direction as a vector of norm 1, to steer with, project on or ablate; raises
        `ValueError` of more than two classes."""
        if len(self.classes) != 2:
            raise ValueError(f"one direction is of two classes, and there are {self.classes}.")
        method = f"probe, {self.method}"
        return SteeringVector(self.site, self.direction, self.model.name, method)

    def decisions(self, x: Any) -> np.ndarray:
        """`x . weights + bias` of activations `[..., d]`: `[...]`, of more than two classes
        `[..., n_classes]`. Raises `ValueError` for another width."""
        x = np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else np.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.weights.shape[1]:
            width = self.weights.shape[1]
            raise ValueError(f"x must have shape [..., {width}], got {list(x.shape)}.")
        found = self._fit.decide(x.reshape(-1, x.shape[-1]))
        last = () if len(self.classes) == 2 else (len(self.classes),)
        return found.reshape(*x.shape[:-1], *last)

    def predict(self, inputs: Any) -> list[Any]:
        """The class of each of some texts, of each token of them where the probe is of tokens, or
        of each row of activations `[n, d]`."""
        if isinstance(inputs, (mx.array, np.ndarray)):
            return self._classes(self.decisions(inputs))
        texts = as_texts("inputs", inputs)
        if self.position != "each":
            return self._classes(self.decisions(self._rows(texts)))
        rows, _ = rows_of_tokens(self.model, texts, [self.site])
        return [self._classes(self.decisions(row)) for row in rows[self.site]]

    def _rows(self, texts: list[Any]) -> np.ndarray:
        assert self.position != "each"
        return rows_at(self.model, texts, [self.site], self.position)[self.site]

    def _classes(self, decisions: np.ndarray) -> list[Any]:
        rows = decisions.reshape(-1, len(self.weights))
        return [self.classes[k] for k in self._fit.classify(rows)]

    @property
    def _fit(self) -> Fit:
        return Fit(self.weights, self.bias)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the probe, which is not in it, as plain values."""
        about = {"site": str(self.site), "classes": list(self.classes), "method": self.method}
        return about | {"position": self.position, "score": asdict(self.score)}

    def _facts(self) -> list[tuple[str, str]]:
        found = self.score
        low, high = found.interval
        of_two = f", AUC {found.auc:.3f}" if found.auc is not None else ""
        texts = f" in {found.n_test_groups:,} groups" if found.n_test != found.n_test_groups else ""
        return [
            ("site", str(self.site)),
            ("classes", ", ".join(map(str, self.classes))),
            ("method", f"{self.method} at {self.position}"),
            ("held-out accuracy", f"{found.accuracy:.3f} [{low:.3f}, {high:.3f}]{of_two}"),
            ("F1", f"{found.f1:.3f}"),
            ("majority class", f"{found.majority:.3f}"),
            ("labels shuffled", f"{found.shuffled:.3f}, at most {found.shuffled_max:.3f}"),
            ("examples", f"{found.n_train:,} to train, {found.n_test:,}{texts} to test"),
        ]

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(len(name) for name, _ in facts)
        return "\n".join(["Probe", *(f"  {name:<{width}}  {value}" for name, value in facts)])

    def _repr_html_(self) -> str:
        return fragment("facts.html", title="Probe", facts=self._facts())


def train_probe(
    model: Readable,
    texts: Iterable[Any],
    labels: Iterable[Any],
    layer: int | str | Site,
    component: str | None = None,
    position: Place = -1,
    method: Method = "logistic",
    test_split: float = 0.25,
    seed: int = 0,
    *,
    l2: float = 1.0,
    groups: Iterable[Any] | None = None,
) -> Probe:
    """A linear classifier of labels by the activations at a site, judged on held-out texts.

    The site is `resid_post` of a layer, another `component`, or any spelling of a site. A label is
    anything that can be hashed, one for each text. The `position` is the last real token, another
    one, "mean" over all but special tokens, or "each": then every token but special ones is an
    example with the label of its text or, where labels are lists, with its own, None for a token
    that is left out. `method` and `l2` are those of `probe_fits.fit`; `test_split` is the share of
    the texts that is held out, of each class alike; texts of one of the `groups`, a name for each
    text, such as those of a pair, stay on one side. Raises `ValueError` for labels that do not fit
    the texts, for fewer than two classes, and for a class that is missing in one of the parts.

    References: Alain and Bengio 2016, arXiv 1610.01644; Hewitt and Liang 2019, arXiv 1909.03368
    (why a control is needed); Marks and Tegmark 2023, arXiv 2310.06824 (mean_difference).
    """
    site = vector_site(model, layer, component)
    about = (position, method, test_split, seed, l2, groups)
    return train_probes(model, texts, labels, [site], *about)[site]


def train_probes(
    model: Readable,
    texts: Iterable[Any],
    labels: Iterable[Any],
    sites: Sequence[Site],
    position: Place,
    method: Method,
    test_split: float,
    seed: int,
    l2: float,
    groups: Iterable[Any] | None = None,
) -> dict[Site, Probe]:
    """Probes of several sites, of one reading of the texts and one split of them."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if not 0 < test_split < 1:
        raise ValueError(f"test_split must be between 0 and 1, got {test_split}.")
    if not (l2 > 0 or (l2 == 0 and method == "ridge")) or not np.isfinite(l2):
        raise ValueError(f"l2 must be a number above 0, or 0 for 'ridge', got {l2}.")
    listed, given = as_texts("texts", texts), list(labels)
    if len(listed) != len(given):
        raise ValueError(f"labels must be as many as texts: {len(given)} for {len(listed)} texts.")
    rows, named, numbers = examples(model, listed, given, sites, position)
    together = numbers if groups is None else numbered(groups, len(listed))[numbers]
    classes = classes_of(named)
    y = np.array([classes.index(label) for label in named])
    rng = np.random.default_rng(seed)
    test = np.isin(together, held_out(y, together, test_split, rng))
    for part, name in ((~test, "trained on"), (test, "tested")):
        missing = sorted(set(range(len(classes))) - set(y[part].tolist()))
        if missing:
            raise ValueError(f"no example of class {classes[missing[0]]!r} would be {name}.")
    others = [shuffled(y, numbers, test, rng) for _ in range(SHUFFLES)]
    probes = {}
    for site in sites:
        x, k = rows[site], len(classes)
        made = fit(x[~test], y[~test], k, method, l2)
        chance = []
        for other in others:
            control = fit(x[~test], other[~test], k, method, l2)
            said = control.classify(control.decide(x[test]))
            chance.append(float((said == other[test]).mean()))
        found = score(made, x[test], y[test], together[test], y[~test], chance)
        probes[site] = Probe(
            site, classes, made.weights, made.bias, method, position, found, model
        )  # fmt: skip
    return probes
