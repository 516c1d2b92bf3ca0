"""Results of tasks in the shape of SAEBench's reports, so that what reads those reads ours."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.version import __version__

NOTHING = -1  # a number that is none


def in_saebench_shape(
    results: Mapping[str, TaskResult], coder: Mapping[str, Any], model: str
) -> dict[str, dict[str, Any]]:
    """A report for each task that SAEBench has, by the name of its type.

    Figures of ours that it has no name for, with all spreads and controls, are under
    `eval_result_unstructured`. Protocols differ, as the docs say: numbers in these fields are of
    the same kind, and not from the same data.
    """
    found = {}
    for task, result in results.items():
        if task in SHAPES:
            type_id, metrics = SHAPES[task]
            found[type_id] = _envelope(type_id, metrics(result), result, coder, model)
    return found


def _envelope(
    type_id: str, metrics: dict[str, Any], result: TaskResult, coder: Mapping[str, Any], model: str
) -> dict[str, Any]:
    sites = "+".join(site["site"] for site in coder.get("writes", ()))
    return {
        "eval_type_id": type_id,
        "eval_config": {"model_name": model, **result.settings},
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(1000 * time.time()),
        "eval_result_metrics": metrics,
        "eval_result_details": _details(type_id, result),
        "eval_result_unstructured": result.to_dict(),
        "sae_bench_commit_hash": f"mlxterp {__version__}",
        "sae_lens_id": coder.get("file") or sites,
        "sae_lens_release_id": coder.get("source", {}).get("release") or "mlxterp",
        "sae_lens_version": None,
        "sae_cfg_dict": {
            "architecture": coder.get("activation_function"),
            "d_sae": coder.get("n_features"),
            "model_name": model,
            "hook_name": sites,
        },
    }


def _details(type_id: str, result: TaskResult) -> list[dict[str, Any]]:
    key = {"absorption_first_letter": "first_letter", "sparse_probing": "dataset_name"}
    return [
        {key.get(type_id, "name"): part}
        | {_field(name): _number(values) for name, values in figures.items()}
        for part, figures in result.details.items()
    ]


def _field(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def _probing(result: TaskResult) -> dict[str, Any]:
    """Accuracies of probes of the activations and of the code; there is none of the whole code."""
    llm: dict[str, Any] = {"llm_test_accuracy": NOTHING}
    sae: dict[str, Any] = {"sae_test_accuracy": NOTHING}
    for name, values in result.figures.items():
        measure, _, which = name.partition(", ")
        if measure != "accuracy":
            continue
        if not which.startswith("k = "):
            llm["llm_test_accuracy"] = _number(values)
            continue
        field = f"top_{which[4:]}_test_accuracy"
        sae[f"sae_{field}"] = _number(values)
        llm[f"llm_{field}"] = _number(Values(values.controls["neurons"]))
    return {"llm": llm, "sae": sae}


def _absorption(result: TaskResult) -> dict[str, Any]:
    names = {
        "absorption_fraction_score": "absorption fraction",
        "full_absorption_score": "full absorption",
        "num_split_features": "features for a letter",
    }
    mean = {f"mean_{field}": _number(result.figures[name]) for field, name in names.items()}
    spread = {f"std_dev_{field}": _over_parts(result, name) for field, name in names.items()}
    return {"mean": mean | spread}


def _over_parts(result: TaskResult, name: str) -> float:
    """The standard deviation over the letters."""
    means = tuple(float(figures[name].score) for figures in result.details.values())
    spread = Values(means).score.spread
    return NOTHING if spread is None else spread


def _perturbation(result: TaskResult) -> dict[str, Any]:
    fields = {
        "TPP": "total_metric",
        "intended": "intended_diff_only",
        "unintended": "unintended_diff_only",
    }
    found = {}
    for name, values in result.figures.items():
        kind, _, n = name.partition(", n = ")
        found[f"tpp_threshold_{n}_{fields[kind]}"] = _number(values)
    return {"tpp_metrics": found}


def _autointerp(result: TaskResult) -> dict[str, Any]:
    """The first figure: balanced accuracy of detection, or F1 of rules; not SAEBench's accuracy,
    for which saying always no has .714."""
    values = next(iter(result.figures.values()))
    deviation = Values(values.values).score.spread
    return {
        "autointerp": {
            "autointerp_score": _number(values),
            "autointerp_std_dev": NOTHING if deviation is None else deviation,
        }
    }


def _number(values: Values) -> float:
    value = values.score.value
    return NOTHING if value is None else value


SHAPES: dict[str, tuple[str, Callable[[TaskResult], dict[str, Any]]]] = {
    "probing": ("sparse_probing", _probing),
    "absorption": ("absorption_first_letter", _absorption),
    "perturbation": ("tpp", _perturbation),
    "autointerp": ("autointerp", _autointerp),
}
