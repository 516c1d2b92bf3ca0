"""What steering does: generations side by side, and the response to every dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering.edits import Edit, Features, steering_edit
from mlxterp.sae.visualization import COLOURS, Table, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Edits = Mapping[str, Edit]


@dataclass(frozen=True)
class Comparison:
    """What a model writes after each of the `prompts`, plain and with every edit: `texts[i][j]` is
    what the `j`-th of the `names` makes of the `i`-th prompt."""

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """One table for each prompt."""
        return tuple(
            Table(
                f"After {prompt!r}",
                ("", "text"),
                tuple(zip(self.names, map(repr, texts), strict=True)),
            )
            for prompt, texts in zip(self.prompts, self.texts, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        lines, width = [], max(map(len, self.names))
        for prompt, texts in zip(self.prompts, self.texts, strict=True):
            lines += [f"After {prompt!r}"]
            lines += [f"  {n:<{width}}  {t!r}" for n, t in zip(self.names, texts, strict=True)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in self.tables)


def compare(
    coder: SparseCoder,
    source: ActivationSource,
    features: Features | Mapping[str, Edits],
    prompts: str | Sequence[str],
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
    *,
    max_tokens: int = 40,
    sampling: Mapping[str, Any] | None = None,
    **options: Any,
) -> Comparison:
    """Generations after the same prompts, plain and steered with features at several strengths.

    In place of features `{name: edits}` compares any edits. `sampling` are arguments of `generate`,
    such as a temperature; `options` are those of `steering_edit`.
    """
    given: Any = features
    if not isinstance(given, Mapping) or not all(isinstance(e, Mapping) for e in given.values()):
        given = {f"{s:g}": steering_edit(coder, given, s, **options) for s in strengths}
    named = {"plain": {}, **given}
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    texts = tuple(
        tuple(
            _generated(source, prompt, edit, max_tokens=max_tokens, **(sampling or {}))
            for edit in named.values()
        )
        for prompt in prompts
    )
    return Comparison(prompts, tuple(named), texts)


def _generated(source: ActivationSource, prompt: str, edits: Edits, **options: Any) -> str:
    model, own = of_one_model(source, edits)
    return model.generate(prompt, edit=own, **options).text


def of_one_model(source: ActivationSource, edits: Edits) -> tuple[ActivationSource, dict]:
    """The model that edits are of, and they by its own names of the sites."""
    found = {name: owner(source, name) for name in edits}
    models = {id(model): model for model, _ in found.values()} or {0: source}
    if len(models) > 1:
        raise ValueError(
            f"These edits are of several models, {sorted(edits)}: name one site with site=..."
        )
    (model,) = models.values()
    return model, {found[name][1]: edit for name, edit in edits.items()}


@dataclass(frozen=True)
class Response:
    """What one direction does at every strength, arrays `[n_strengths]`.

    `effects` is the change of the log-probability of the target tokens, mean over them and over
    positions, in nats; `others` the mean size of the changes, each a mean over positions, of all
    other tokens; `kl` the divergence of the plain from the steered prediction, in nats per token;
    `perplexities` those of the texts.
    """

    name: str
    effects: np.ndarray
    others: np.ndarray
    kl: np.ndarray
    perplexities: np.ndarray

    @property
    def specificity(self) -> np.ndarray:
        """`effects / others`; NaN where nothing changes."""
        return np.divide(
            self.effects, self.others, np.full(len(self.others), np.nan), where=self.others > 0
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values; None for what is not finite."""
        arrays = {"effects": self.effects, "specificity": self.specificity, "kl": self.kl,
                  "perplexities": self.perplexities}  # fmt: skip
        return {"name": self.name} | {
            name: [_finite(x) for x in a.tolist()] for name, a in arrays.items()
        }


@dataclass(frozen=True)
class SteeringReport:
    """Dose and response of steering: see `strength_sweep`.

    `targets` are the tokens whose log-probability counts, `logprob` that of the plain model, and
    `perplexity` the plain model's, over `n_tokens` predicted tokens. `steered` is the response to
    the features, `random` those to random directions of the same norm, `difference` that to the
    difference of means, if there are texts for it.
    """

    features: Mapping[int, float]
    strengths: tuple[float, ...]
    targets: tuple[str, ...]
    n_tokens: int
    logprob: float
    perplexity: float
    steered: Response
    random: tuple[Response, ...]
    difference: Response | None = None

    @property
    def is_monotone(self) -> bool:
        """Whether the targets become likelier with every step of the strength."""
        order = np.argsort(self.strengths)
        return all(a < b for a, b in pairwise(self.steered.effects[order]))

    @property
    def slope(self) -> float:
        """Nats that the targets gain for each unit of strength, by least squares; NaN for one."""
        return _slope(self.strengths, self.steered.effects)

    @property
    def random_slopes(self) -> np.ndarray:
        """The slopes of the random directions, `[n_random]`."""
        return np.array([_slope(self.strengths, r.effects) for r in self.random])

    @property
    def table(self) -> Table:
        """One row for each strength."""
        header = ["strength", "targets", "specific", "KL", "perplexity"]
        header += ["random targets", "KL", "perplexity"] if self.random else []
        header += ["difference targets", "KL", "perplexity"] if self.difference else []
        rows = [(f"{s:g}", *self._cells(i)) for i, s in enumerate(self.strengths)]
        return Table(self._title(), tuple(header), tuple(rows))

    def _title(self) -> str:
        which = ", ".join(map(str, self.features))
        tokens = "  ".join(map(repr, self.targets))
        title = (
            f"Steering with {which}: {tokens}\n"
            f"plain: log-probability {self.logprob:.2f}, perplexity {self.perplexity:.2f} "
            f"({self.n_tokens:,} tokens)"
        )
        if len(self.strengths) > 1:
            title += f"; slope {self.slope:+.2f} nats per unit of strength"
            if self.random:
                mean, sd = self.random_slopes.mean(), self.random_slopes.std()
                title += f", random directions {mean:+.2f} ± {sd:.2f}"
        return title

    def _cells(self, i: int) -> list[str]:
        mine = self.steered
        cells = [f"{mine.effects[i]:+.3f}", f"{mine.specificity[i]:.2f}"]
        cells += [f"{mine.kl[i]:.3f}", f"{mine.perplexities[i]:.2f}"]
        if self.random:
            effects, kl, perplexity = (
                np.array([getattr(r, name)[i] for r in self.random])
                for name in ("effects", "kl", "perplexities")
            )
            cells += [f"{effects.mean():+.3f} ± {effects.std():.3f}", f"{kl.mean():.3f}"]
            cells += [f"{perplexity.mean():.2f}"]
        if self.difference:
            other = self.difference
            cells += [f"{other.effects[i]:+.3f}", f"{other.kl[i]:.3f}"]
            cells += [f"{other.perplexities[i]:.2f}"]
        return cells

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "features": {str(i): strength for i, strength in self.features.items()},
            "strengths": list(self.strengths),
            "targets": list(self.targets),
            "n_tokens": self.n_tokens,
            "logprob": self.logprob,
            "perplexity": self.perplexity,
            "slope": _finite(self.slope),
            "monotone": self.is_monotone,
            "steered": self.steered.to_dict(),
            "random": [response.to_dict() for response in self.random],
            "difference": self.difference and self.difference.to_dict(),
        }

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def plot(self) -> Figure:
        """The effect on the targets by strength, and by what it costs, in nats of divergence."""
        figure = new_figure(9.0, 3.8)
        by_strength, by_cost = figure.subplots(1, 2, sharey=True)
        drawn = [(r, "random directions", COLOURS[6], 1.0) for r in self.random]
        drawn += [(r, r.name, COLOURS[1], 1.8) for r in (self.difference,) if r]
        drawn += [(self.steered, "steered", COLOURS[0], 1.8)]
        order = np.argsort(self.strengths)
        for response, label, colour, width in drawn:
            style: dict[str, Any] = {"color": colour, "linewidth": width, "marker": "o"}
            style |= {"markersize": 3.5, "label": label}
            by_strength.plot(np.array(self.strengths)[order], response.effects[order], **style)
            by_cost.plot(response.kl[order], response.effects[order], **style)
        handles, labels = by_strength.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        by_strength.legend(unique.values(), unique.keys())
        dress(by_strength, "strength", "change of the targets' log-probability (nats)")
        return dress(by_cost, "KL(plain ‖ steered) (nats per token)")


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


def _slope(strengths: Sequence[float], effects: np.ndarray) -> float:
    x = np.array(strengths) - np.mean(strengths)
    return float(x @ effects / (x @ x)) if len(strengths) > 1 else float("nan")
