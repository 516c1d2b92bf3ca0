"""Reports in the shapes of SAELens's and SAEBench's JSON, so that what reads those reads ours."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.model_loss import ModelLoss
from mlxterp.sae.evals.origin import EvaluationData, weights_of
from mlxterp.sae.evals.reconstruction import Reconstruction
from mlxterp.sae.evals.sparsity import Sparsity
from mlxterp.sae.formats.names import to_transformer_lens
from mlxterp.version import __version__

Schema = Literal["mlxterp", "saelens", "saebench"]
NOTHING = -1  # SAELens's and SAEBench's numbers that are none
WEIGHTS = ("encoder_norm", "encoder_bias", "encoder_decoder_cosine_sim")  # SAELens's
NEAREST = ("max_encoder_cosine_sim", "max_decoder_cosine_sim")  # SAEBench's besides
COMPUTED = (
    "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics",
    "compute_variance_metrics", "compute_featurewise_density_statistics",
    "compute_featurewise_weight_based_metrics",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a report consists of."""

    fidelity: Reconstruction
    sparsity: Sparsity
    loss: ModelLoss | None
    data: EvaluationData
    coder: SparseCoder


def in_schema(parts: Parts, schema: Schema, everything: Mapping[str, Any]) -> dict[str, Any]:
    """A report in the shape of another library; `everything` is what has no place in it.

    Numbers that are none are -1 there. The ablation is that by zeros, as in both. SAEBench 0.6
    names `explained_variance` what is `quasi_uncentred` here: it gets the right one, and the others
    are among `everything`. Raises `ValueError` for another schema.
    """
    if schema == "saelens":
        return _saelens(parts)
    if schema == "saebench":
        return _saebench(parts, everything)
    raise ValueError(f"schema must be one of {list(get_args(Schema))}, got {schema!r}.")


def _saelens(parts: Parts) -> dict[str, Any]:
    data, source = parts.data, parts.data.coder["source"]
    release, name = str(source.get("release", "mlxterp")), _name(data)
    per_batch = data.context_length and -(-data.n_tokens // data.context_length)
    features, weights = _features(parts.sparsity), weights_of(parts.coder)
    features |= {name: weights[name] for name in WEIGHTS if name in weights}
    return {
        "unique_id": f"{release}-{name}",
        "sae_set": release,
        "sae_id": name,
        "eval_cfg": {
            "context_size": data.context_length,
            "dataset": "",
            "library_version": f"mlxterp {__version__}",
            "git_hash": "unknown",
            "batch_size_prompts": per_batch,
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
            **_computed(parts),
        },
        "metrics": _metrics(parts),
        "feature_metrics": {name: _numbers(values) for name, values in features.items()},
        "sae_cfg": _coder(data),
    }


def _saebench(parts: Parts, everything: Mapping[str, Any]) -> dict[str, Any]:
    data = parts.data
    unknown = dict.fromkeys((*WEIGHTS, *NEAREST), np.full(parts.coder.n_features, np.nan))
    features = _features(parts.sparsity) | unknown | weights_of(parts.coder)
    columns = {name: _numbers(values) for name, values in features.items()}
    rows = zip(*columns.values(), strict=True)
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": data.model,
            "llm_dtype": "float32",
            "batch_size_prompts": data.n_contexts,
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
            "dataset": "",
            "context_size": data.context_length,
            **_computed(parts),
            "exclude_special_tokens_from_reconstruction": True,
            "verbose": False,
        },
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(1000 * time.time()),
        "eval_result_metrics": _metrics(parts) | {"misc_metrics": _misc(parts.sparsity, features)},
        "eval_result_details": [
            {"index": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)
        ],
        "eval_result_unstructured": dict(everything),
        "sae_bench_commit_hash": f"mlxterp {__version__}",
        "sae_lens_id": _name(data),
        "sae_lens_release_id": data.coder["source"].get("release"),
        "sae_lens_version": None,
        "sae_cfg_dict": _coder(data),
    }


def _metrics(parts: Parts) -> dict[str, dict[str, float | int]]:
    """The groups of numbers that both have."""
    fidelity, sparsity, loss = parts.fidelity, parts.sparsity, parts.loss
    found: dict[str, dict[str, Any]] = {}
    if loss is not None:
        zero = loss.ablations["zero"]
        found["model_behavior_preservation"] = {
            "kl_div_score": zero.kl_recovered.value,
            "kl_div_with_ablation": zero.kl.value,
            "kl_div_with_sae": loss.kl.value,
        }
        found["model_performance_preservation"] = {
            "ce_loss_score": zero.recovered.value,
            "ce_loss_with_ablation": zero.loss.value,
            "ce_loss_with_sae": loss.spliced.value,
            "ce_loss_without_sae": loss.clean.value,
        }
    found |= {
        "reconstruction_quality": {
            "explained_variance": fidelity.explained_variance.value,
            "explained_variance_legacy": fidelity.definitions["per_token"],
            "mse": fidelity.mse.value,
            "cossim": fidelity.cosine.value,
        },
        "shrinkage": {
            "l2_norm_in": fidelity.norm,
            "l2_norm_out": fidelity.written_norm,
            "l2_ratio": fidelity.norm_ratio.value,
            "relative_reconstruction_bias": fidelity.reconstruction_bias.value,
        },
        "sparsity": {"l0": sparsity.l0.value, "l1": sparsity.l1.value},
        "token_stats": {
            "total_tokens_eval_reconstruction": 0 if loss is None else loss.n_tokens,
            "total_tokens_eval_sparsity_variance": sparsity.n_tokens,
        },
    }
    return {
        group: {name: _number(value) for name, value in values.items()}
        for group, values in found.items()
    }


def _features(sparsity: Sparsity) -> dict[str, np.ndarray]:
    return {
        "feature_density": sparsity.density,
        "consistent_activation_heuristic": sparsity.per_context,
    }


def _misc(sparsity: Sparsity, features: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What SAEBench has besides: dense features, by number and by their share of all firings, and
    how alike features are."""
    density = sparsity.density
    total = density.sum()
    found = {"frac_alive": 1 - sparsity.dead}
    for percent in (1, 10):
        dense = density[density > percent / 100]
        found[f"freq_over_{percent}_percent"] = len(dense) / len(density)
        share = dense.sum() / total if total else 0.0
        found[f"normalized_freq_over_{percent}_percent"] = share
    for side in ("encoder", "decoder"):
        found[f"average_max_{side}_cosine_sim"] = features[f"max_{side}_cosine_sim"].mean()
    return {name: _number(value) for name, value in found.items()}


def _computed(parts: Parts) -> dict[str, bool]:
    return {
        name: parts.loss is not None or name not in ("compute_kl", "compute_ce_loss")
        for name in COMPUTED
    }


def _name(data: EvaluationData) -> str:
    """What is written, in the names of TransformerLens where it has one, as in SAELens's ids."""
    return data.coder["file"] or "+".join(_hook(site["site"]) for site in data.coder["writes"])


def _coder(data: EvaluationData) -> dict[str, Any]:
    coder = data.coder
    return {
        "architecture": coder["activation_function"],
        "d_in": sum(site["width"] for site in coder["reads"]),
        "d_sae": coder["n_features"],
        "dtype": "float32",
        "metadata": {
            "model_name": data.model,
            "hook_name": "+".join(_hook(site["site"]) for site in coder["reads"]),
            "hook_name_out": "+".join(_hook(site["site"]) for site in coder["writes"]),
            "context_size": data.context_length,
            "kind": coder["kind"],
        },
    }


def _hook(site: str) -> str:
    try:
        return to_transformer_lens(site)
    except ValueError:
        return site


def _numbers(values: np.ndarray) -> list[float | int]:
    return [_number(x) for x in values.tolist()]


def _number(value: Any) -> float | int:
    if value is None or not np.isfinite(value):
        return NOTHING
    return value if isinstance(value, int) else float(value)
