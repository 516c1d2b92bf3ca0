"""SAEs and transcoders of SAELens: a folder with `cfg.json` and `sae_weights.safetensors`.

Arrays are `W_enc [d, F]`, `W_dec [F, d_out]`, `b_enc`, `b_dec`, and those of the architecture. An
SAE may subtract `b_dec` from its input; (batch) top-k may select by the value times the norm of the
decoder's row. Both are folded into our arrays. Files of releases before 6.0 have a flat
configuration with other names. Release 6 itself is what the codes are compared with.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.files import read_json
from mlxterp.sae.formats.names import from_hugging_face, from_transformer_lens
from mlxterp.sae.formats.parts import SITES, Parts
from mlxterp.sae.formats.saelens_writing import write  # noqa: F401 - a format's modules have both
from mlxterp.sae.formats.single import (
    centred,
    json_or_nothing,
    no_site,
    parts_between,
    transposed,
    two_sites,
)
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "saelens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
LARGEST_SCALE = 1e20
SCALER = "activation_scaler.json"  # beside a checkpoint of a training run

# What each architecture has besides W_enc, W_dec and b_dec.
ARCHITECTURES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "batchtopk": ("b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
NO_CODER = {
    "temporal": "predicts codes from earlier tokens",
    "matching_pursuit": "encodes in many steps, each with what the last one left",
}
TOKEN_NORMS = {
    "none": "none",
    "expected_average_only_in": "none",
    "constant_norm_rescale": "rescale",
    "layer_norm": "layer_norm",
}
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


@dataclass(frozen=True)
class Config:
    """What `cfg.json` says, in the words of release 6; `facts` are its metadata."""

    file: Path
    values: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """One of `ARCHITECTURES`."""
        return self.values["architecture"]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another site than it reads."""
        return self.architecture.endswith("transcoder")

    def size(self, key: str) -> int:
        """A width or a number of features."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.file}: {key!r} must be a whole number >= 1, got {value!r}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A switch."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {key!r} must be true or false, got {value!r}.")
        return value


def recognise(path: Path) -> bool:
    """Whether it is a folder with the two files."""
    return (path / WEIGHTS).is_file() and "d_in" in json_or_nothing(path / CONFIG)


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE or transcoder in a folder of SAELens, of a training checkpoint too.

    Codes and reconstructions are those of SAELens' class at inference; batch top-k is that with its
    running threshold. Raises `ValueError` for weights that do not fit the configuration, for an
    architecture or a setting that makes no code of one token alone, and where the site has to be
    given.
    """
    config = _config(path / CONFIG)
    reads, writes = _sites(config, site)
    with open_tensors(path / WEIGHTS) as file:
        _check_names(file, config)
        arrays = _arrays(file, config)
    arrays = _scaled(arrays, path, config)
    function, options = _activation(arrays, config)
    parts = parts_between(
        reads, writes, function, arrays, options=options, token_norm=_token_norm(config),
        source={"architecture": config.architecture, **config.facts}, model=_model(config),
    )  # fmt: skip
    return replace(parts, firing_rates=_firing_rates(path / SPARSITY, config))


def _config(file: Path) -> Config:
    values = read_json(file, ("d_in", "d_sae"))
    facts = values.get("metadata")
    if not isinstance(facts, dict):  # before 6.0 everything is in one place
        values = {OLD_NAMES.get(key, key): value for key, value in values.items()}
        facts = {key: values[key] for key in FACTS if key in values}
        values = _modern(values, file)
    architecture = str(values.setdefault("architecture", "standard"))
    if architecture in NO_CODER:
        reason = NO_CODER[architecture]
        raise ValueError(f"{file}: the architecture {architecture} {reason}; it is not read.")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file}: 'architecture' must be one of {sorted(ARCHITECTURES)}, got {architecture!r}."
        )
    return Config(file, values, facts)


FACTS = (
    "model_name", "hook_name", "hook_head_index", "hook_name_out", "hf_hook_name",
    "hf_hook_name_out", "model_class_name", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "context_size", "seqpos_slice", "dataset_path", "neuronpedia_id",
    "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip


def _modern(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """A configuration from before 6.0 in the words of that release."""
    function, options = values.get("activation_fn", "relu"), values.get("activation_fn_kwargs")
    if function == "topk":
        k = options.get("k") if isinstance(options, dict) else None
        values = {"k": k, **values, "architecture": "topk"}
    elif function != "relu":
        raise ValueError(f"{file}: 'activation_fn' must be relu or topk, got {function!r}.")
    norm = values.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    return {**values, "normalize_activations": norm}


def _sites(config: Config, site: str | None) -> tuple[str, str]:
    if site is not None:
        return two_sites(site) if config.is_transcoder else (site, site)
    if config.facts.get("hook_head_index") is not None:
        raise ValueError(
            f"{config.file}: it is of one head, number {config.facts['hook_head_index']}, which is "
            "no site of ours: give site='...' for what its columns are."
        )
    match config.facts.get(SITES):
        case [str(reads), str(writes)]:
            return reads, writes
    reads = _site(config, "")
    return reads, _site(config, "_out") if config.is_transcoder else reads


def _site(config: Config, suffix: str) -> str:
    hook, path = config.facts.get(f"hook_name{suffix}"), config.facts.get(f"hf_hook_name{suffix}")
    try:
        if isinstance(hook, str):
            return from_transformer_lens(hook, _model(config))
        if isinstance(path, str):
            return from_hugging_face(path)
    except ValueError as error:
        raise ValueError(f"{config.file}: {error} Give site='...' to name it.") from None
    example = "layers.8.mlp_in -> layers.8.mlp_out" if config.is_transcoder else None
    raise no_site(config.file, *([example] if example else []))


def _model(config: Config) -> str | None:
    name = config.facts.get("model_name")
    return name if isinstance(name, str) else None


def _check_names(file: TensorFile, config: Config) -> None:
    own = {"W_enc", "W_dec", "b_dec", *ARCHITECTURES[config.architecture]}
    known = own | {"scaling_factor", "finetuning_scaling_factor", "log_threshold"}
    unknown = sorted(set(file.names) - known)
    if unknown:
        raise ValueError(
            f"{file.path} holds {unknown}, which the architecture {config.architecture} has not."
        )


def _arrays(file: TensorFile, config: Config) -> dict[str, mx.array]:
    """All arrays in our orientation, under SAELens' names."""
    d, n = config.size("d_in"), config.size("d_sae")
    d_out = config.size("d_out") if config.is_transcoder else d
    shapes: dict[str, tuple[int, ...]] = {"topk_threshold": (), "W_skip": (d_out, d)}
    arrays = {
        "W_enc": transposed(file.read("W_enc", (d, n))),
        "W_dec": file.read("W_dec", (n, d_out)),
        "b_dec": file.read("b_dec", (d_out,)),
    }
    for name in ARCHITECTURES[config.architecture]:
        if name == "threshold" and not file.has(name) and file.has("log_threshold"):
            arrays[name] = mx.exp(file.read("log_threshold", (n,)))
        else:
            arrays[name] = file.read(name, shapes.get(name, (n,)))
    _scale_finetuned(arrays, file, config)
    return arrays


def _scale_finetuned(arrays: dict[str, mx.array], file: TensorFile, config: Config) -> None:
    """Values may have been scaled after training, before they are decoded."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if not file.has(name):
            continue
        factor = file.read(name, arrays["b_enc" if "b_enc" in arrays else "b_mag"].shape)
        if config.flag("finetuning_scaling_factor", False):
            arrays["W_dec"] = arrays["W_dec"] * factor[:, None]
        elif not mx.allclose(factor, mx.ones_like(factor)).item():
            raise ValueError(
                f"{file.path}: {name!r} is there and not 1, but 'finetuning_scaling_factor' is "
                f"false in {config.file}."
            )


def _scaled(arrays: dict[str, mx.array], path: Path, config: Config) -> dict[str, mx.array]:
    """The arrays for what the model has, of a checkpoint that was trained on scaled activations."""
    norm = config.values.get("normalize_activations", "none")
    if norm != "expected_average_only_in":
        return arrays
    factor = json_or_nothing(path / SCALER).get("scaling_factor")
    if factor is None:
        warnings.warn(
            f"{config.file}: it was trained on activations scaled to one mean norm, and does not "
            "say by which factor; as SAELens does, it is used as it is.",
            stacklevel=2,
        )
        return arrays
    if not isinstance(factor, (int, float)) or not 0 < factor < LARGEST_SCALE:
        raise ValueError(
            f"{path / SCALER}: 'scaling_factor' must be in (0, {LARGEST_SCALE:g}), got {factor!r}."
        )
    scaled = {name: arrays[name] / factor for name in ("W_dec", "b_dec")}
    scaled["W_enc"] = arrays["W_enc"] * factor
    if "topk_threshold" in arrays and _by_norm(config):
        scaled["topk_threshold"] = arrays["topk_threshold"] / factor
    return arrays | scaled


def _token_norm(config: Config) -> str:
    norm = str(config.values.get("normalize_activations", "none"))
    if norm not in TOKEN_NORMS:
        raise ValueError(
            f"{config.file}: 'normalize_activations' must be one of {sorted(TOKEN_NORMS)}, got "
            f"{norm!r}; a whitening is folded into what SAELens saves for inference."
        )
    return TOKEN_NORMS[norm]


def _by_norm(config: Config) -> bool:
    topk = config.architecture.endswith("topk")
    return topk and config.flag("rescale_acts_by_decoder_norm", False)


def _activation(arrays: dict[str, mx.array], config: Config) -> tuple[str, dict[str, Any]]:
    """The name of our activation function and its options; `arrays` become ours."""
    if config.architecture == "gated":
        gate, log_gain = arrays.pop("b_gate"), arrays.pop("r_mag")
        offset = arrays.pop("b_mag") - mx.exp(log_gain) * gate
        arrays |= {"b_enc": gate, "log_gain": log_gain, "offset": offset}
    if config.flag("apply_b_dec_to_input", not config.is_transcoder):
        if config.is_transcoder:
            raise ValueError(f"{config.file}: a transcoder cannot subtract 'b_dec' from its input.")
        arrays["b_enc"] = centred(arrays["W_enc"], arrays["b_enc"], arrays["b_dec"])
    if _by_norm(config):
        norms = mx.linalg.norm(arrays["W_dec"], axis=-1)
        arrays["W_enc"] = arrays["W_enc"] * norms[:, None]
        arrays["b_enc"] = arrays["b_enc"] * norms
        arrays["W_dec"] = arrays["W_dec"] / mx.where(norms > 0, norms, 1)[:, None]
    if config.architecture.endswith("batchtopk"):
        return _batch_topk(arrays, config)
    if config.architecture in ("topk", "abstopk"):
        return {"topk": "topk", "abstopk": "abs_topk"}[config.architecture], {"k": config.size("k")}
    if config.architecture.startswith("jumprelu"):
        return "jumprelu", {}
    return ("gated" if config.architecture == "gated" else "relu"), {}


def _batch_topk(arrays: dict[str, mx.array], config: Config) -> tuple[str, dict[str, Any]]:
    threshold, k = arrays.pop("topk_threshold"), config.values.get("k")
    if isinstance(k, int) or (isinstance(k, float) and k.is_integer()):
        arrays["threshold"] = threshold
        return "batch_topk", {"k": int(k)}
    arrays["threshold"] = mx.full(arrays["b_enc"].shape, threshold)
    return "jumprelu", {}


def _firing_rates(file: Path, config: Config) -> np.ndarray:
    """The share of tokens on which each feature fired; the file has the logarithm to base 10 of
    that and 1e-10."""
    if not file.is_file():
        return np.zeros(0)
    with open_tensors(file) as tensors:
        logs = np.array(tensors.read("sparsity", (config.size("d_sae"),)), dtype=np.float64)
    return np.clip(10.0 ** np.minimum(logs, 1) - 1e-10, 0, 1).round(9)
