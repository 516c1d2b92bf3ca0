"""SAEs as folders of dictionary_learning, which its `load_dictionary` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.files import write_directory
from mlxterp.sae.formats.parts import SITES, Parts
from mlxterp.sae.formats.single import centred
from mlxterp.sae.formats.torch_writing import torch_file
from mlxterp.sites import Site

WEIGHTS = "ae.pt"
CONFIG = "config.json"
CLASSES = {
    "relu": "AutoEncoderNew",
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


def write(parts: Parts, path: Path) -> Path:
    """Write an SAE as a folder with `ae.pt` and `config.json`, and return its path.

    Raises `ValueError` for another kind, an activation function that the library does not have, a
    norm of tokens, and a `path` where something else is.
    """
    if parts.kind != "sae":
        raise ValueError(f"dictionary_learning knows SAEs only, got a {parts.kind}.")
    if parts.activation_function not in CLASSES:
        raise ValueError(
            f"dictionary_learning knows the activation functions {', '.join(CLASSES)}, got "
            f"{parts.activation_function}."
        )
    if parts.token_norm != "none":
        raise ValueError(
            f"dictionary_learning normalises no tokens, got token_norm={parts.token_norm!r}."
        )
    state = STATES[parts.activation_function](parts.arrays)
    weights: dict[str, np.ndarray] = {
        name: np.array(array, dtype=np.float32) for name, array in state.items()
    }
    if "k" in parts.options:
        weights["k"] = np.array(parts.options["k"], dtype=np.int32)
        # Of per-token top-k the library knows a threshold too, here one that was never set.
        weights["threshold"] = np.array(parts.arrays.get("threshold", -1), dtype=np.float32)
    contents = {CONFIG: _config(parts), WEIGHTS: torch_file(weights)}
    return write_directory(path, contents, marker=WEIGHTS)


def _linear(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    return {"encoder.weight": arrays["W_enc"], "decoder.weight": arrays["W_dec"].T}


def _uncentred(arrays: Mapping[str, mx.array]) -> mx.array:
    """The bias of an encoder that reads `x - b_dec`."""
    return centred(arrays["W_enc"], arrays["b_enc"], -arrays["b_dec"])


def _relu(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    biases = {"encoder.bias": arrays["b_enc"], "decoder.bias": arrays["b_dec"]}
    return _linear(arrays) | biases


def _top_k(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    return _linear(arrays) | {"encoder.bias": _uncentred(arrays), "b_dec": arrays["b_dec"]}


def _jump_relu(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    kept = ("b_enc", "W_dec", "b_dec", "threshold")
    return {"W_enc": arrays["W_enc"].T} | {name: arrays[name] for name in kept}


def _gated(arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    gate, log_gain = _uncentred(arrays), arrays["log_gain"]
    return _linear(arrays) | {
        "decoder_bias": arrays["b_dec"],
        "gate_bias": gate,
        "mag_bias": arrays["offset"] + mx.exp(log_gain) * gate,
        "r_mag": log_gain,
    }


STATES = {
    "relu": _relu, "topk": _top_k, "batch_topk": _top_k, "jumprelu": _jump_relu, "gated": _gated,
}  # fmt: skip


def _config(parts: Parts) -> dict[str, Any]:
    site = parts.reads.names[0]
    place = Site.from_string(site)
    named = site if place.layer is None else f"{place.component}_layer_{place.layer}"
    trainer: dict[str, Any] = {
        "dict_class": CLASSES[parts.activation_function],
        "activation_dim": parts.reads.width,
        "dict_size": parts.n_features,
        "layer": place.layer,
        "lm_name": parts.metadata.model.get("name"),
        "submodule_name": named,
        SITES: [site, site],
    }
    if "k" in parts.options:
        trainer["k"] = parts.options["k"]
    return {"trainer": trainer, "buffer": {"io": "out", "d_submodule": parts.reads.width}}
