"""Our coders as folders that SAELens reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.files import write_directory
from mlxterp.sae.formats.names import to_transformer_lens
from mlxterp.sae.formats.parts import SITES, Parts
from mlxterp.version import __version__

# Of what the layout is. SAELens takes files that do not say it for those of an older one.
LAYOUT = "6.0.0"
WEIGHTS = "sae_weights.safetensors"
ARCHITECTURES = {
    "sae": {
        "relu": "standard", "topk": "topk", "abs_topk": "abstopk", "batch_topk": "jumprelu",
        "jumprelu": "jumprelu", "gated": "gated",
    },
    "transcoder": {
        "relu": "transcoder", "jumprelu": "jumprelu_transcoder",
        "batch_topk": "jumprelu_transcoder",
    },
}  # fmt: skip
NORMS = {"none": "none", "rescale": "constant_norm_rescale", "layer_norm": "layer_norm"}
KEPT = ("dataset_path", "context_size", "prepend_bos", "neuronpedia_id", "seqpos_slice")


def write(parts: Parts, path: Path) -> Path:
    """Write an SAE or transcoder as a folder that SAELens' `SAE.load_from_disk` reads.

    `batch_topk` becomes `jumprelu` with its threshold for every feature, as SAELens does with its
    own. Sites that have no hook in TransformerLens go by our name. Raises `ValueError` for what
    SAELens has no class for.
    """
    known = ARCHITECTURES.get(parts.kind, {})
    if parts.activation_function not in known:
        listed = ", ".join(f"{kind}: {', '.join(names)}" for kind, names in ARCHITECTURES.items())
        raise ValueError(
            f"SAELens has no class for a {parts.kind} with {parts.activation_function}; it has "
            f"those for {listed}."
        )
    architecture = known[parts.activation_function]
    if "W_skip" in parts.arrays:
        architecture = architecture.replace("transcoder", "skip_transcoder")
    contents: dict[str, Any] = {"cfg.json": _config(parts, architecture), WEIGHTS: _arrays(parts)}
    if len(parts.firing_rates):
        logs = np.log10(np.asarray(parts.firing_rates, dtype=np.float64) + 1e-10)
        contents["sparsity.safetensors"] = {"sparsity": mx.array(logs.astype(np.float32))}
    return write_directory(path, contents, marker=WEIGHTS)


def _arrays(parts: Parts) -> dict[str, mx.array]:
    own = parts.arrays
    arrays = {
        "W_enc": mx.contiguous(own["W_enc"].T),
        **{name: own[name] for name in ("W_dec", "b_dec", "W_skip") if name in own},
    }
    if parts.activation_function == "gated":
        gain = mx.exp(own["log_gain"])
        magnitude = own["offset"] + gain * own["b_enc"]
        return {**arrays, "b_gate": own["b_enc"], "r_mag": own["log_gain"], "b_mag": magnitude}
    arrays["b_enc"] = own["b_enc"]
    if "threshold" in own:
        arrays["threshold"] = mx.contiguous(mx.broadcast_to(own["threshold"], own["b_enc"].shape))
    return arrays


def _config(parts: Parts, architecture: str) -> dict[str, Any]:
    reads, writes = parts.reads.names[0], parts.writes.names[0]
    config = {
        "architecture": architecture,
        "d_in": parts.reads.width,
        "d_sae": parts.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": NORMS[parts.token_norm],
        "reshape_activations": "hook_z" if reads.endswith(".attn_z") else "none",
        "metadata": _metadata(parts, reads),
    }
    if parts.kind == "transcoder":
        config |= {"d_out": parts.writes.width, "reshape_activations": "none"}
        config["metadata"]["hook_name_out"] = _hook(writes)
    if "k" in parts.options and architecture in ("topk", "abstopk"):
        config |= {"k": parts.options["k"], "rescale_acts_by_decoder_norm": False}
    return config


def _metadata(parts: Parts, reads: str) -> dict[str, Any]:
    ours = parts.metadata
    known = {
        "model_name": ours.model.get("name"),
        "context_size": ours.data.get("context_length"),
        **{key: ours.source.get(key) for key in KEPT if ours.source.get(key) is not None},
    }
    return {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": ours.source.get("sae_lens_training_version"),
        "mlxterp_version": __version__,
        SITES: [reads, parts.writes.names[0]],
        "hook_name": _hook(reads),
        **{key: value for key, value in known.items() if value is not None},
    }


def _hook(site: str) -> str:
    try:
        return to_transformer_lens(site)
    except ValueError:
        return site
