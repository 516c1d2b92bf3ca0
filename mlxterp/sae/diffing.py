"""What two models have in common and what one has alone, by the features of their crosscoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.latent_scaling import LatentScaling, latent_scaling, of_site
from mlxterp.sae.sharing import SHARED, SPECIFIC, delta_norms, ids_of, norms_of, ratio
from mlxterp.sae.visualization import Table, plot_shares

# Minder et al. 2025 call a feature exclusive below these.
LARGEST_NU_ERROR, LARGEST_NU_RECONSTRUCTION = 0.2, 0.5
# What noise alone gives the weaker model, as a share of the stronger one's strength.
LARGEST_NOISE = 0.2
# The law of shrinkage holds at the optimum, for features by themselves: some slack.
SLACK = 1.5

SHRUNK = "unclear: shrinkage explains it"
DENIED = "unclear: latent scaling denies it"
RARE = "unclear: too few firings"


@dataclass(frozen=True)
class ModelDiff:
    """What a crosscoder's features are in two models A and B, the write sites `sites`.

    All arrays have one entry for every feature. Strengths are in units of `coder.decoder_norms`;
    ratios are those of the weaker model to the stronger one, by decoder norm.

    - `relative_norms`: B's share of the decoder norm; `delta_norms`: see `sharing.delta_norms`.
    - `nu_error`, `nu_reconstruction`: latent scaling by the stronger model's decoder row, of the
      error with the feature's own part added back, and of the reconstruction. NaN where the
      models' widths differ, infinite where the stronger one has less than nothing of the row;
      without meaning where they share no basis.
    - `ratios`: the same for the error by any direction, `|Y_weaker^T f| / |Y_stronger^T f|`, less
      what noise alone gives; `noise`: that, as a share of the stronger model's strength.
    - `shrinkage` `[n_features, 2]`: how much of each norm the sparsity penalty may have taken away;
      NaN where the penalty's `coefficient` is not known.
    - `verdicts`: see `diff`; `reasons`: why a verdict is `"unclear"`, empty for others.
    """

    sites: tuple[str, str]
    verdicts: np.ndarray
    reasons: np.ndarray
    relative_norms: np.ndarray
    delta_norms: np.ndarray
    nu_error: np.ndarray
    nu_reconstruction: np.ndarray
    ratios: np.ndarray
    noise: np.ndarray
    shrinkage: np.ndarray
    firing_rates: np.ndarray
    n_tokens: int
    coefficient: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """All verdicts that there are for these sites."""
        return ("shared", "scaled", *(f"only {site}" for site in self.sites), "unclear", "dead")

    @property
    def counts(self) -> dict[str, int]:
        """How many features have each verdict."""
        return {name: int((self.verdicts == name).sum()) for name in self.names}

    def features(self, verdict: str) -> np.ndarray:
        """The ids of the features with a verdict; a site's name stands for those of it alone.

        Raises `ValueError` for a name that is neither.
        """
        return ids_of(self.verdicts, verdict, self.names)

    @property
    def table(self) -> Table:
        """Counts and medians by verdict."""
        columns = (self.relative_norms, self.ratios, self.nu_error, self.nu_reconstruction)
        rows = []
        for kinds, names in ((self.verdicts, self.names), (self.reasons, (SHRUNK, DENIED, RARE))):
            for name in names:
                chosen = kinds == name
                if kinds is self.verdicts or chosen.any():
                    medians = (_median(column[chosen]) for column in columns)
                    rows.append((name, f"{chosen.sum():,}", *medians))
        title = (
            f"{len(self.verdicts):,} features, {self.n_tokens:,} tokens; medians of the relative "
            f"norm at\n{self.sites[1]} and of the weaker model's strength"
        )
        header = ("", "features", "norm", "strength", "nu error", "nu rec.")
        return Table(title, header, (*rows,))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; `None` for what is not known."""
        return {
            name: _plain(value) if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        } | {"sites": [*self.sites], "counts": self.counts}

    def plot(self, ax: Any = None) -> Any:
        """A matplotlib histogram of the relative norms, coloured by verdict."""
        label = f"relative decoder norm at {self.sites[1]}\n(the rest is at {self.sites[0]})"
        return plot_shares(self.relative_norms, self.verdicts, self.names[:-1], label, ax)


def _median(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{np.median(values):.2f}" if len(values) else "-"


def _plain(array: np.ndarray) -> list[Any]:
    if array.dtype.kind != "f":
        return array.tolist()
    values = array.astype(object)
    values[~np.isfinite(array)] = None
    return values.tolist()


def diff(
    coder: SparseCoder,
    dataset: ActivationDataset,
    *,
    coefficient: float | None = None,
    max_tokens: int | None = None,
) -> ModelDiff:
    """What each feature of a crosscoder of two models is: in both, or in one of them alone.

    One pass over a dataset of both sites; the models are not needed. Verdicts:

    - `only <site>`: the weaker model has less than .1 of the decoder norm, and the data agree: with
      Y_m the error at site m with the feature's own part `f d_m` added back, the strength
      `|Y_m^T f| / |f|^2` of the weaker model is also less than .1 of both, `nu_error` is below .2
      and `nu_reconstruction` below .5.
    - `unclear`: the norms say so, but the data do not; `reasons` has why. `shrinkage explains it`:
      the feature is there in the weaker model, as strong as the penalty can take from a norm.
      `latent scaling denies it`: it is there, or written by other features. `too few firings`: the
      noise is too large to tell.
    - `shared`, `scaled`: in both, with at least .3 of the norm in each, or less in one; norms after
      what the penalty took is added back.
    - `dead`: it never fires on these tokens, or writes nothing.

    `coefficient` is that of the sparsity penalty; by default what training reported. Raises
    `ValueError` for a coder that does not write two sites.

    Reference: latent scaling is by Minder et al. 2025, arXiv 2504.02922. By the fixed direction it
    is blind where the models share no basis; the strengths are not.
    """
    delta, norms = delta_norms(coder), norms_of(coder)
    found = latent_scaling(coder, dataset, coefficient, max_tokens)
    verdicts, reasons = _judge(coder.writes.names, norms, found)
    silent = (found.firings == 0) | np.isnan(delta)
    a, b = coder.writes.names
    return ModelDiff(
        sites=(a, b),
        verdicts=np.where(silent, "dead", verdicts),
        reasons=np.where(silent, "", reasons),
        relative_norms=ratio(norms[:, 1], norms.sum(axis=1)),
        delta_norms=delta,
        nu_error=found.nu_error,
        nu_reconstruction=found.nu_reconstruction,
        ratios=found.ratios,
        noise=found.noise,
        shrinkage=found.shrinkage,
        firing_rates=found.firings / found.n_tokens,
        n_tokens=found.n_tokens,
        coefficient=found.coefficient,
    )


def _judge(
    sites: tuple[str, ...], norms: np.ndarray, found: LatentScaling
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts and reasons of features that are not dead."""
    stronger = norms.argmax(axis=1)
    weaker = 1 - stronger
    lost = np.nan_to_num(found.shrinkage)
    exclusive = _share(norms, weaker) < SPECIFIC
    even = _share(norms + lost, weaker) >= SHARED / 2
    present = _share(found.strengths, weaker) >= SPECIFIC
    present |= found.nu_error >= LARGEST_NU_ERROR
    elsewhere = found.nu_reconstruction >= LARGEST_NU_RECONSTRUCTION
    loud = ~(found.noise <= LARGEST_NOISE)
    missing = of_site(found.strengths - norms, weaker)
    shrunk = present & (missing <= SLACK * of_site(lost, weaker))
    reasons = np.select([loud, shrunk, present | elsewhere], [RARE, SHRUNK, DENIED], "")
    reasons = np.where(exclusive, reasons, "")
    alone = np.array([f"only {site}" for site in sites])[stronger]
    verdicts = np.where(exclusive, alone, np.where(even, "shared", "scaled"))
    return np.where(reasons != "", "unclear", verdicts), reasons


def _share(values: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """For every feature, what one site has of `values` `[n_features, 2]`."""
    return ratio(of_site(values, sites), values.sum(axis=1))
