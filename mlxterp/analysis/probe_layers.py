"""Probes of one component in every layer: where something can be read first, and best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxterp.analysis.probe_fits import Method
from mlxterp.analysis.probes import Place, Probe, train_probes
from mlxterp.analysis.site_rows import vector_site
from mlxterp.analysis.source import Readable
from mlxterp.notebook import Table
from mlxterp.sae.visualization import COLOURS, dress, new_axis
from mlxterp.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LayerProbes(Mapping[int, Probe]):
    """The probe of each layer, all of the same texts, labels and split."""

    probes: dict[int, Probe]

    def __getitem__(self, layer: int) -> Probe:
        if layer not in self.probes:
            raise KeyError(f"no probe of layer {layer}; there are {', '.join(map(str, self))}")
        return self.probes[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    @property
    def best(self) -> Probe:
        """The probe with the highest held-out accuracy, the earliest of equals. It was chosen by
        this accuracy, which flatters it: check it on new texts."""
        return max(self.values(), key=lambda probe: probe.accuracy)

    @property
    def table(self) -> Table:
        """Held-out accuracy with its interval, and the controls, of each layer."""
        rows = []
        for layer, probe in self.items():
            found = probe.score
            numbers = (found.accuracy, *found.interval, found.shuffled, found.majority)
            auc = () if found.auc is None else (f"{found.auc:.3f}",)
            rows.append((str(layer), *(f"{number:.3f}" for number in numbers), *auc))
        header = ("layer", "accuracy", "from", "to", "shuffled", "majority")
        header += ("AUC",) * (len(rows[0]) > len(header))
        one = next(iter(self.values()))
        title = (
            f"{one.method} probes of {one.site.component} for {', '.join(map(str, one.classes))}"
        )
        return Table(title, header, tuple(rows))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Held-out accuracy with its interval by layer, between the controls."""
        ax = new_axis() if ax is None else ax
        layers, found = list(self), [probe.score for probe in self.values()]
        means = [one.accuracy for one in found]
        low, high = ([one.interval[i] for one in found] for i in (0, 1))
        ax.fill_between(layers, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        ax.plot(layers, means, color=COLOURS[0], marker="o", markersize=5, label="held out")
        shuffled = [one.shuffled for one in found]
        ax.plot(layers, shuffled, color=COLOURS[6], marker="s", markersize=4, label="shuffled")
        ax.axhline(found[0].majority, color=COLOURS[5], linestyle=":", label="majority class")
        ax.set_ylim(top=1.02)
        ax.legend()
        return dress(ax, "layer", "accuracy")

    def to_dict(self) -> dict[str, Any]:
        """What is known of each probe, by layer, as plain values."""
        return {str(layer): probe.to_dict() for layer, probe in self.items()}

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def probe_layers(
    model: Readable,
    texts: Iterable[Any],
    labels: Iterable[Any],
    layers: Iterable[int] | None = None,
    component: str | None = None,
    position: Place = -1,
    method: Method = "logistic",
    test_split: float = 0.25,
    seed: int = 0,
    *,
    l2: float = 1.0,
    groups: Iterable[Any] | None = None,
) -> LayerProbes:
    """The probes of some layers, or of all that have the component; the texts are read once.

    Arguments are those of `probes.train_probe`. Raises `ValueError` as it does, and where no layer
    is named.
    """
    sites: list[Site]
    if layers is None:
        sites = model.architecture.expand(f"layers.*.{component or 'resid_post'}")
    else:
        sites = [vector_site(model, layer, component) for layer in layers]
    if not sites:
        raise ValueError("layers must have at least one number: the list is empty.")
    sites = [vector_site(model, site) for site in sites]
    about = (position, method, test_split, seed, l2, groups)
    probes = train_probes(model, texts, labels, sites, *about)
    return LayerProbes(
        {site.layer: probe for site, probe in probes.items() if site.layer is not None}
    )
