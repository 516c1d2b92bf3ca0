"""What a dashboard says of a coder, its model, its data and its training, as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dashboard.layout import FORMAT_VERSION
from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.metadata import Statistics
from mlxterp.sae.source import ActivationSource
from mlxterp.version import __version__

REPORTS = 400  # of a curve


def facts_of(
    data: FeatureData,
    source: ActivationSource,
    title: str,
    statistics: Statistics,
    measured: tuple[Fidelity | None, LossRecovered | None],
) -> dict[str, Any]:
    """The facts of a bundle, but for those of its arrays; `title` may be empty."""
    coder = data.coder
    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "title": title or _title(coder),
        "coder": _coder(coder),
        "model": _model(source),
        "data": _data(data),
        "numbers": _numbers(*measured),
        **_curves(statistics),
        "bin_edges": data.bin_edges.tolist(),
        "norm_sites": norm_sites(coder),
        "code": {"load": _code(coder)},
        "scale": data.codes.scale,
    }


def norm_sites(coder: SparseCoder) -> list[str] | None:
    """The sites whose norms are told apart, where several are written."""
    return [*coder.writes.names] if len(coder.writes.names) > 1 else None


def _title(coder: SparseCoder) -> str:
    of = [
        names[0] if len(names) == 1 else f"{len(names)} sites"
        for names in (coder.reads.names, coder.writes.names)
    ]
    between = of[0] if coder.reads == coder.writes else " to ".join(of)
    return f"{type(coder).__name__} of {between}"


def _coder(coder: SparseCoder) -> dict[str, Any]:
    return {
        "kind": getattr(coder, "kind", "coder"),
        "reads": coder.reads.to_list(),
        "writes": coder.writes.to_list(),
        "n_features": coder.n_features,
        "activation_function": coder.activation_name,
        "k": coder.k,
        "skip": coder.has_skip,
    }


def _code(coder: SparseCoder) -> str:
    """How to get at the coder in Python; without directories, which others have not."""
    path = getattr(coder, "path", None)
    return f"sae = load_sae({'sae.mlx' if path is None else path.name!r})"


def _model(source: ActivationSource) -> dict[str, Any]:
    found = {name: getattr(source, name, None) for name in ("n_layers", "d_model")}
    return {"name": source.name, **found}


def _data(data: FeatureData) -> dict[str, Any]:
    return {
        "n_tokens": data.n_tokens,
        "n_kept_tokens": data.codes.n_tokens,
        "n_contexts": data.n_contexts,
        "n_documents": data.corpus.n_documents,
        "context_length": data.corpus.context,
    }


def _numbers(fidelity: Fidelity | None, loss: LossRecovered | None) -> dict[str, Any]:
    return {
        "fidelity": None if fidelity is None else fidelity.to_dict(),
        "loss": None if loss is None else loss.to_dict(),
    }


def _curves(statistics: Statistics) -> dict[str, Any]:
    """The reports of a training, evenly thinned out where there are many."""
    found = {"training": statistics.training, "validation": statistics.validation}
    return {
        name: [
            dict(reports[i])
            for i in np.unique(np.linspace(0, len(reports) - 1, min(REPORTS, len(reports))).round())
            .astype(int)
            .tolist()
        ]
        for name, reports in found.items()
    }
