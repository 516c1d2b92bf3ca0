"""How well what a coder writes agrees with the activations that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.evals.definitions import explained_variances, varies
from mlxterp.sae.evals.noise import Score, finite, redraw, spread_of
from mlxterp.sae.evals.sums import SCALARS, SiteSums
from mlxterp.sae.visualization import COLOURS, Table, dress, names, new_axis, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = {
    "explained_variance": "explained variance",
    "fvu": "FVU",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
    "reconstruction_bias": "reconstruction bias",
    "mse": "squared error per token",
}
CONSTANT = "the activations do not vary"
ORTHOGONAL = "what is written is orthogonal to the activations"


@dataclass(frozen=True)
class Reconstruction:
    """How well a coder writes the activations y of `n_tokens` tokens, with y' in their place.

    * `explained_variance`: `1 - sum |y - y'|^2 / sum |y - mean(y)|^2`, over all tokens and columns,
      and `fvu` what is missing from 1. `definitions` holds the other formulas in use, by name.
    * `cosine`: the mean of `y . y' / (|y| |y'|)`.
    * Shrinkage: `norm_ratio`, the mean of `|y'| / |y|`, and `reconstruction_bias`,
      `E|y'|^2 / E[y . y']`, 1 for a coder that no factor would improve (arXiv 2404.16014, eq. 10).
    * `mse`: the mean of `|y - y'|^2`, which is in units of the activations.

    Of a coder that writes several sites these are the means over the sites, and `by_site` holds
    those of each. The controls are what the `control` scores.
    """

    explained_variance: Score
    fvu: Score
    cosine: Score
    norm_ratio: Score
    reconstruction_bias: Score
    mse: Score
    norm: float
    written_norm: float
    definitions: Mapping[str, float | None]
    n_tokens: int
    control: str = ""
    by_site: Mapping[str, Reconstruction] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Names, values, spreads and controls of a table."""
        found = [(name, *getattr(self, key).cells()) for key, name in SCORES.items()]
        for site, alone in self.by_site.items():
            found.append((f"explained at {site}", *alone.explained_variance.cells()))
        return found

    @property
    def table(self) -> Table:
        """The scores, and the explained variance of each site where there are several."""
        header = ("", "value", "±", self.control or "control")
        return Table(f"Fidelity over {self.n_tokens:,} tokens", header, tuple(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The scores, all definitions of explained variance, and those of each site."""
        found: dict[str, Any] = {key: getattr(self, key).to_dict() for key in SCORES}
        found |= {"norm": finite(self.norm), "written_norm": finite(self.written_norm)}
        found |= {"definitions": dict(self.definitions), "n_tokens": self.n_tokens}
        found |= {"control": self.control}
        sites = {site: alone.to_dict() for site, alone in self.by_site.items()}
        return found | ({"by_site": sites} if sites else {})

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of explained variance by all definitions."""
        known = {name: x for name, x in self.definitions.items() if x is not None}
        ax = new_axis(6.4, 1.0 + 0.3 * len(known)) if ax is None else ax
        ax.barh(range(len(known)), [*known.values()], color=COLOURS[0], height=0.6)
        ax.set_yticks(range(len(known)), names(known), **plain())
        ax.invert_yaxis()
        return dress(ax, "explained variance")

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


Draws = dict[str, np.ndarray]


def reconstruction_of(
    sums: SiteSums, controls: tuple[float | None, float | None] = (None, None), control: str = ""
) -> tuple[Reconstruction, Draws]:
    """The report on one site, and the scores of documents that were drawn again."""
    draws = _scores(
        redraw(sums.scalars, lambda totals: totals),
        redraw(sums.shifted_sums, lambda totals: np.square(totals).sum(axis=-1)),
    )
    t, (explained, cosine) = sums.totals, controls
    values = {name: float(found[0]) for name, found in _scores_of_all(sums).items()}
    known = dict.fromkeys(SCORES, "")
    if not varies(t["variance"], t["squares"]):
        known |= dict.fromkeys(("explained_variance", "fvu"), CONSTANT)
    if not t["products"]:
        known["reconstruction_bias"] = ORTHOGONAL
    by_chance = {"explained_variance": explained, "cosine": cosine}
    by_chance["fvu"] = None if explained is None else 1 - explained
    scores: dict[str, Any] = {
        name: Score(None, reason=reason)
        if (reason := known[name])
        else Score(values[name], spread_of(draws[name], sums.n_groups), by_chance.get(name))
        for name in SCORES
    }
    n = t["n"]
    return (
        Reconstruction(
            **scores,
            norm=t["norms"] / n,
            written_norm=t["written_norms"] / n,
            definitions=explained_variances(sums),
            n_tokens=int(n),
            control=control,
        ),
        draws,
    )


def _scores_of_all(sums: SiteSums) -> Draws:
    everything = np.square(sums.shifted_sums.sum(axis=0)).sum()
    return _scores(sums.scalars.sum(axis=0)[None], everything[None])


def _scores(totals: np.ndarray, squared_sums: np.ndarray) -> Draws:
    """The scores of some totals `[n_draws, len(SCALARS)]`, where `squared_sums` `[n_draws]` are
    `|sum_i (y_i - shift)|^2`."""
    t = dict(zip(SCALARS, totals.T, strict=True))
    n = t["n"]
    with np.errstate(divide="ignore", invalid="ignore"):
        fvu = t["error"] / (t["shifted"] - squared_sums / n)
        return {
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "cosine": t["cosines"] / n,
            "norm_ratio": t["norm_ratios"] / n,
            "reconstruction_bias": t["written"] / t["products"],
            "mse": t["error"] / n,
        }


def joined(
    sites: Mapping[str, Reconstruction], draws: Mapping[str, Draws], n_groups: int
) -> tuple[Reconstruction, Draws]:
    """The means over several sites; one where a score has no value does not count for it."""
    reports = [*sites.values()]
    scores: dict[str, Any] = {}
    together: Draws = {}
    for name in SCORES:
        mine = {site: getattr(report, name) for site, report in sites.items()}
        known = {site: score for site, score in mine.items() if score.value is not None}
        together[name] = np.mean([draws[site][name] for site in known or mine], axis=0)
        scores[name] = (
            Score(
                _mean([score.value for score in known.values()]),
                spread_of(together[name], n_groups),
                _mean([score.control for score in known.values()]),
            )
            if known
            else next(iter(mine.values()))
        )
    definitions = {
        name: _mean([report.definitions[name] for report in reports])
        for name in reports[0].definitions
    }
    return (
        replace(
            reports[0],
            **scores,
            norm=float(np.mean([report.norm for report in reports])),
            written_norm=float(np.mean([report.written_norm for report in reports])),
            definitions=definitions,
            by_site=dict(sites),
        ),
        together,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return float(np.mean(known)) if known else None
