"""A dashboard: the bundle of a coder, its server while that runs, and the file that it saves as."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dashboard.build import build_bundle, compared
from mlxterp.sae.dashboard.bundle import Bundle
from mlxterp.sae.dashboard.live import Live
from mlxterp.sae.dashboard.pages import fitting_file, single_file
from mlxterp.sae.dashboard.passages import Amounts
from mlxterp.sae.dashboard.reading import open_bundle
from mlxterp.sae.dashboard.running import Running
from mlxterp.sae.dashboard.server import application
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.evals.loss import loss_recovered
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.files import write_text
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.metadata import Statistics
from mlxterp.sae.similarity.map import Method
from mlxterp.sae.similarity.matching import match
from mlxterp.sae.source import ActivationSource

HOST, PORT = "127.0.0.1", 8080
MOST_BYTES = 20_000_000  # of a saved file
MOST_EVALUATED = 20_000  # tokens


class Dashboard:
    """A coder's features to look at in a browser.

    It is served at `url` from a thread of its own, at 127.0.0.1 unless told otherwise, until `stop`
    or the end of a `with` block. `save` writes one file that needs no server, and `save_bundle`
    what `open_dashboard` and `mlxterp dashboard PATH` read.
    """

    def __init__(self, bundle: Bundle, live: Live | None = None):
        self.bundle = bundle
        self._live = live
        self._running: Running | None = None

    def start(self, host: str = HOST, port: int = PORT, hosts: Iterable[str] = ()) -> Self:
        """Serve it, or do nothing where it is served already.

        `hosts` are further names by which it may be asked for. On another host than this machine
        alone, whoever can reach it can use the model and change labels. Raises `ValueError` for a
        host or port that cannot be served, `ImportError` where Starlette or uvicorn is missing.
        """
        if self._running is None or not self._running.is_alive:
            answering = application(self.bundle, self._live, host, hosts)
            self._running = Running(answering, host, port)
        return self

    @property
    def url(self) -> str:
        """Where a browser finds it; raises `ValueError` where it is not served."""
        return self._served.url

    @property
    def port(self) -> int:
        """The port that it is served at."""
        return self._served.port

    @property
    def _served(self) -> Running:
        if self._running is None or not self._running.is_alive:
            raise ValueError("The dashboard is not being served: call start().")
        return self._running

    def wait(self) -> None:
        """Return when it is stopped, as at the end of a script; Ctrl-C stops it."""
        try:
            self._served.wait()
        except KeyboardInterrupt:
            self.stop()

    def stop(self) -> None:
        """End the server."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def save(
        self,
        path: str | Path,
        features: Iterable[int] | None = None,
        max_bytes: int = MOST_BYTES,
    ) -> Path:
        """Write one HTML file that shows the same without a server or a network.

        The table has all features. `features` are those that can be opened: by default all or, if
        the file would be larger than `max_bytes`, those with a label and then those that fire most.
        Raises `ValueError` where those that were asked for do not fit.
        """
        if features is None:
            return write_text(path, fitting_file(self.bundle, max_bytes))
        chosen = self._checked(features)
        page = single_file(self.bundle, chosen)
        if len(page) > max_bytes:
            raise ValueError(
                f"A file of {len(chosen)} features has {len(page):,} bytes, and max_bytes is "
                f"{max_bytes:,}."
            )
        return write_text(path, page)

    def _checked(self, features: Iterable[int]) -> list[int]:
        n = self.bundle.n_features
        found = sorted({int(i) for i in features})
        if not found or not 0 <= found[0] <= found[-1] < n:
            raise ValueError(f"features must be one or more in [0, {n - 1}], got {found[:10]}.")
        return found

    def save_bundle(self, path: str | Path) -> Path:
        """Write the data as a directory, by custom named `*.mlxdash`, and return its path."""
        return self.bundle.save(path)

    def __repr__(self) -> str:
        served = self._running is not None and self._running.is_alive
        where = f"at {self.url}" if served else "not served"
        return f"Dashboard({self.bundle.facts['title']}, {where})"

    def _repr_html_(self) -> str:
        text = html.escape(repr(self))
        served = self._running is not None and self._running.is_alive
        url = html.escape(self.url) if served else ""
        return f'<a href="{url}" target="_blank">{text}</a>' if served else text


def make_dashboard(
    data: FeatureData,
    labels: FeatureLabels,
    statistics: Statistics,
    dataset: ActivationDataset | None = None,
    *,
    port: int | None = PORT,
    host: str = HOST,
    hosts: Iterable[str] = (),
    title: str = "",
    circuits: Mapping[str, Any] | Sequence[Any] = (),
    compare: Mapping[str, Any] | None = None,
    max_evaluated: int = MOST_EVALUATED,
    map_method: Method | None = "pca",
    amounts: Amounts | None = None,
    verbose: bool = True,
) -> Dashboard:
    """A dashboard of what was collected, served unless `port` is None.

    `dataset` are texts on which the coder is measured, up to `max_evaluated` tokens, and other
    coders are looked at, those to `compare` with by name. The rest is as in `build_bundle` and
    `Dashboard.start`. Raises `ValueError` for another coder of which nothing is collected where
    there is no dataset.
    """
    coder, source = data.coder, data.source
    measured = None, None
    if dataset is not None and max_evaluated and None not in (dataset.corpus, dataset.source):
        measured = (
            fidelity(coder, dataset, max_evaluated),
            loss_recovered(coder, dataset, max_evaluated),
        )
    comparisons = [
        compared(name, match(coder, other), _other_bundle(name, other, data, dataset, amounts))
        for name, other in (compare or {}).items()
    ]
    bundle = build_bundle(
        data, labels, title=title, statistics=statistics, measured=measured, circuits=circuits,
        comparisons=comparisons, map_method=map_method, amounts=amounts, verbose=verbose,
    )  # fmt: skip
    made = Dashboard(bundle, None if source is None else Live(coder, source, data))
    return made if port is None else made.start(host, port, hosts)


def _other_bundle(
    name: str,
    other: Any,
    data: FeatureData,
    dataset: ActivationDataset | None,
    amounts: Amounts | None,
) -> Bundle:
    """The bundle of a coder to compare with, from what is known of it or from the dataset."""
    found = getattr(other, "features", None)
    if dataset is not None and found is None:
        found = collect(other, dataset, max_tokens=max(1, data.n_tokens))
    if found is None:
        raise ValueError(
            f"compare: nothing is collected of {name!r}: call its collect(dataset) first, or pass "
            "validation_dataset."
        )
    found = replace(found, source=found.source or data.source)
    return build_bundle(found, getattr(other, "labels", None), title=name, amounts=amounts)


def open_dashboard(
    path: str | Path,
    model: ActivationSource | None = None,
    coder: SparseCoder | None = None,
    data: FeatureData | None = None,
) -> Dashboard:
    """The dashboard of a bundle on a disk, not served yet. With a `model` and the `coder` that it
    is of, texts and steering too, in units of the largest values where `data` of the coder are
    given.

    Labels that are changed are written to the bundle. Raises `ValueError` where there is no bundle,
    for a model without a coder, and for a coder with another number of features.
    """
    bundle = open_bundle(path)
    if model is None or coder is None:
        if model is not coder:
            raise ValueError("A model needs the coder of the bundle, and the coder the model.")
        return Dashboard(bundle)
    if coder.n_features != bundle.n_features:
        raise ValueError(
            f"{path} is of {bundle.n_features} features, and the coder has {coder.n_features}."
        )
    return Dashboard(bundle, Live(coder, model, data))
