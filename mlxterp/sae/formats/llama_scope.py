"""Llama Scope: SAEs and transcoders of OpenMOSS from before their files were renamed.

Llama Scope has `hyperparams.json` and `checkpoints/final.safetensors`, with one number
`jump_relu_threshold` for all features; Llama Scope R1 Distill has `config.json` and
`sae_weights.safetensors`, with `log_jumprelu_threshold [F]`. The arrays are those of two
`nn.Linear`: `encoder.weight [F, d]`, `encoder.bias`, `decoder.weight [d, F]`, `decoder.bias`.
With `s = sqrt(d) / average norm in the dataset`, of what is read and of what is written,

    pre = s_in * x @ W_enc.T + b_enc          z = pre where active, else 0
    y'  = (z @ W_dec + b_dec) / s_out

A feature is active where `pre * |W_dec row|` exceeds the threshold, without the norm of the row
where `sparsity_include_decoder_norm` is false. Llama Scope's one threshold is in units of what is
written: it is compared with `pre * |W_dec row| / s_out`. So it is in the original library; SAELens
leaves the norms of the rows out, and has the same codes only where these are 1.

Reference: He et al. 2024, arXiv 2410.20526.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.files import read_json
from mlxterp.sae.formats.names import from_transformer_lens
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import (
    centred,
    in_path,
    json_or_nothing,
    names_in,
    no_site,
    parts_between,
    transposed,
    two_sites,
)
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "llama_scope"
# Configuration and weights of Llama Scope, and of Llama Scope R1 Distill.
LAYOUTS = (
    ("hyperparams.json", "checkpoints/final.safetensors"),
    ("config.json", "sae_weights.safetensors"),
)
KEYS = {"encoder.weight", "encoder.bias", "decoder.weight"}
NORM = "dataset_average_activation_norm"
LOG_THRESHOLD = "log_jumprelu_threshold"


def recognise(path: Path) -> bool:
    """Whether it is a folder of Llama Scope."""
    for config, weights in LAYOUTS:
        if "d_model" in json_or_nothing(path / config):
            return names_in(path / weights) >= KEYS
    return False


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE or transcoder in a folder of Llama Scope, for activations as the model has them.

    Codes are the `z` above. Raises `ValueError` for another architecture, another normalisation
    than that of the dataset, and weights that do not fit the configuration.
    """
    config_file, weights = next(
        ((path / config, path / file) for config, file in LAYOUTS if (path / config).is_file()),
        (path / LAYOUTS[0][0], path / LAYOUTS[0][1]),
    )
    config = read_json(config_file, ("d_model",))
    _check(config, config_file)
    n, d = _sizes(config, config_file)
    reads, writes = _sites(config, config_file, site)
    with open_tensors(weights) as file:
        s_in, s_out = (math.sqrt(d) / norm for norm in _norms(config, config_file, file, d))
        arrays = _arrays(file, config, n, d)
        threshold = _threshold(file, config, config_file, arrays["W_dec"], s_out)
    arrays |= {
        "W_enc": arrays["W_enc"] * s_in,
        "W_dec": arrays["W_dec"] / s_out,
        "b_dec": arrays["b_dec"] / s_out,
        "threshold": threshold,
    }
    facts = ("hook_point_in", "hook_point_out", "expansion_factor", "top_k", NORM)
    source = {key: config.get(key) for key in facts}
    model = "meta-llama/Llama-3.1-8B" if in_path("/Llama3_1-8B-Base-L", path) else None
    return parts_between(reads, writes, "jumprelu", arrays, source=source, model=model)


def _check(config: dict[str, Any], config_file: Path) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "sae_type": ("sae",),
        "act_fn": ("jumprelu",),
        "norm_activation": ("dataset-wise", "inference", "none"),
        "use_glu_encoder": (False,),
    }
    for key, values in wanted.items():
        if config.get(key, values[0]) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{config_file}: {key!r} must be {allowed}, got {config[key]!r}.")


def _sites(config: dict[str, Any], config_file: Path, site: str | None) -> tuple[str, str]:
    hook = config.get("hook_point_in")
    hooks = hook, config.get("hook_point_out") or hook
    if site is not None:
        return (site, site) if hooks[0] == hooks[1] and "->" not in site else two_sites(site)
    if not all(isinstance(hook, str) for hook in hooks):
        raise no_site(config_file)
    return from_transformer_lens(str(hooks[0])), from_transformer_lens(str(hooks[1]))


def _norms(
    config: dict[str, Any], config_file: Path, file: TensorFile, d: int
) -> tuple[float, float]:
    """The average norms in the dataset of what is read and of what is written: they are in the
    configuration, by `in` and `out`, or among the weights, by hooks."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return math.sqrt(d), math.sqrt(d)
    norms = config.get(NORM)
    norms = norms if isinstance(norms, dict) else {}
    hook_in = config.get("hook_point_in")
    hook_out = config.get("hook_point_out") or hook_in
    names = {"in": [str(hook_in), "in"], "out": [str(hook_out), "out"]}
    if hook_in == hook_out:
        names["out"].append("in")
    averages = []
    for side, keys in names.items():
        found = [file.value(f"{NORM}.{key}") for key in keys if file.has(f"{NORM}.{key}")]
        found += [norms[key] for key in keys if key in norms]
        if not found:
            raise ValueError(
                f"{config_file}: {NORM!r}, the average norm of the activations, is missing for "
                f"{side!r}; without it a dataset-wise normalisation cannot be undone."
            )
        if not _positive(found[0]):
            raise ValueError(f"{config_file}: {NORM!r} must be > 0, got {found[0]!r}.")
        averages.append(float(found[0]))
    return averages[0], averages[1]


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _sizes(config: dict[str, Any], config_file: Path) -> tuple[int, int]:
    """The number of features and the width."""
    d, n = config["d_model"], config.get("d_sae")
    if n is None and _positive(d) and _positive(config.get("expansion_factor")):
        n = round(d * config["expansion_factor"])
    if not (isinstance(d, int) and isinstance(n, int) and d > 0):
        raise ValueError(
            f"{config_file}: 'd_model' and 'd_sae', or 'expansion_factor', must be whole numbers, "
            f"got {d!r} and {n!r}."
        )
    return n, d


def _arrays(file: TensorFile, config: dict[str, Any], n: int, d: int) -> dict[str, mx.array]:
    W_enc = file.read("encoder.weight", (n, d))
    b_enc = file.read("encoder.bias", (n,))
    W_dec = transposed(file.read("decoder.weight", (d, n)))
    has_bias = config.get("use_decoder_bias", True)
    b_dec = file.read("decoder.bias", (d,)) if has_bias else mx.zeros((d,))
    if config.get("apply_decoder_bias_to_pre_encoder", False):
        b_enc = centred(W_enc, b_enc, b_dec)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _threshold(
    file: TensorFile, config: dict[str, Any], config_file: Path, W_dec: mx.array, s_out: float
) -> mx.array:
    """What `pre` has to exceed, for each feature `[F]`."""
    n = W_dec.shape[0]
    if file.has(LOG_THRESHOLD):
        threshold = mx.exp(file.read(LOG_THRESHOLD, (n,)))
    else:
        value: Any = config.get("jump_relu_threshold")
        if not _positive(value) and value != 0:
            raise ValueError(
                f"{config_file}: 'jump_relu_threshold' must be a number >= 0, got {value!r}."
            )
        threshold = mx.full((n,), value * s_out)
    if not config.get("sparsity_include_decoder_norm", True):
        return threshold
    norms = mx.linalg.norm(W_dec, axis=1)
    # A row of zeros: a feature that is never active, which changes nothing.
    return mx.where(norms > 0, threshold / mx.where(norms > 0, norms, 1), 1e30)
