"""Gemma Scope 1 and 2: JumpReLU coders that subtract no bias from their input.

    z = max(pre, 0) where pre = x @ w_enc + b_enc exceeds threshold;  y' = z @ w_dec + b_dec

Gemma Scope 1 has `layer_20/width_16k/average_l0_71/params.npz` with `W_enc [d, F]`, `W_dec [F, d]`,
`b_enc`, `b_dec`, `threshold [F]`, and no configuration: the repository and the folder say of which
site it is. Gemma Scope 2 has `resid_post/layer_17_width_16k_l0_big/` with `params.safetensors`,
keys in lower case, and `config.json`; a transcoder may have `affine_skip_connection [d_in, d_out]`.
Its cross-layer transcoders are read by `gemma_scope_cross_layer`.

Reference: Lieberum et al. 2024, arXiv 2408.05147.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.files import read_json
from mlxterp.sae.formats import gemma_scope_cross_layer as cross_layer
from mlxterp.sae.formats.names import from_hugging_face
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import (
    in_path,
    names_in,
    no_site,
    parts_between,
    transposed,
    two_sites,
)
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "gemma_scope"
FILES = ("params.npz", "params.safetensors")
CONFIG = "config.json"
KEYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
SKIP = "affine_skip_connection"
REPOSITORY = r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?=/|$)"
FOLDER = r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_"
# What the SAEs of each kind of repository, or of folder, read and write. The transcoders of Gemma
# Scope 1 were trained on a model whose norms' gains were folded into the MLP.
SITES = {
    "res": ("resid_post", "resid_post"),
    "mlp": ("mlp_out", "mlp_out"),
    "att": ("attn_z", "attn_z"),
    "transcoders": ("mlp_unit", "mlp_out"),
    "resid_post": ("resid_post", "resid_post"),
    "mlp_out": ("mlp_out", "mlp_out"),
    "attn_out": ("attn_z", "attn_z"),
    "transcoder": ("mlp_in", "mlp_out"),
}
EMBEDDING = "model.embed_tokens"


def recognise(path: Path) -> bool:
    """Whether it is a folder, or a file, of Gemma Scope's parameters."""
    if cross_layer.recognise(path):
        return True
    weights = _weights(path)
    if weights.suffix not in (".npz", ".safetensors"):
        return False
    names = names_in(weights)
    lower = {name.lower() for name in names}
    if not lower >= KEYS:
        return False
    return weights.suffix == ".npz" or names >= KEYS


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE or transcoder in a folder of Gemma Scope, or the cross-layer transcoder.

    Where neither `config.json` nor the path say the site it has to be given, that of a transcoder
    as `layers.8.mlp_in -> layers.8.mlp_out`. SAEs of the embedding read what the embedding
    returns, before the model scales it. Raises `ValueError` for other shapes and architectures.
    """
    if cross_layer.recognise(path):
        return cross_layer.read(path)
    weights = _weights(path)
    config_file = weights.parent / CONFIG
    config = read_json(config_file) if config_file.exists() else {}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu" or config.get("type", "sae") not in ("sae", "transcoder"):
        raise ValueError(
            f"{config_file}: SAEs, transcoders and cross-layer transcoders of the architecture "
            f"'jump_relu' are read, not {config.get('type')!r} of {architecture!r}."
        )
    with open_tensors(weights) as file:
        skips = file.has(SKIP)
        reads, writes = _sites(weights, config, site, skips)
        arrays = _arrays(file)
    source = dict(config)
    for key, pattern in (("width", r"width_(\w+?)(?:_|/|$)"), ("l0", r"l0_(\w+?)(?:_|/|$)")):
        found = in_path(pattern, weights.parent)
        if found and key not in source:
            source[key] = found[1]
    return parts_between(
        reads, writes, "jumprelu", arrays, source=source, model=_model(weights, config)
    )


def _weights(path: Path) -> Path:
    if not path.is_dir():
        return path
    return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])


def _arrays(file: TensorFile) -> dict[str, mx.array]:
    key = {name.lower(): name for name in file.names}
    missing = sorted(KEYS - set(key))
    if missing:
        raise ValueError(f"{file.path} has no keys {missing}; it holds {sorted(file.names)}.")
    shape, width = file.shape(key["w_enc"]), file.shape(key["b_dec"])
    if len(shape) != 2 or len(width) != 1:
        raise ValueError(f"{file.path}: 'w_enc' has shape {shape}, 'b_dec' {width}: not an SAE.")
    (d_in, n), (d_out,) = shape, width
    if "scaling_factor" in key and not (file.read(key["scaling_factor"]) == 1).all().item():
        raise ValueError(f"{file.path}: a 'scaling_factor' other than 1 is not read.")
    arrays = {
        "b_enc": file.read(key["b_enc"], (n,)),
        "b_dec": file.read(key["b_dec"], (d_out,)),
        "threshold": file.read(key["threshold"], (n,)),
        "W_dec": file.read(key["w_dec"], (n, d_out)),
        "W_enc": transposed(file.read(key["w_enc"], (d_in, n))),
    }
    if SKIP in key:
        arrays["W_skip"] = transposed(file.read(key[SKIP], (d_in, d_out)))
    return arrays


def _sites(weights: Path, config: dict[str, Any], site: str | None, skips: bool) -> tuple[str, str]:
    """What it reads and writes, as the user, the configuration or else the path say."""
    repository, folder = in_path(REPOSITORY, weights), in_path(FOLDER, weights)
    layer = in_path(r"/layer_(\d+)(?=[/_])", weights)
    hooks = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if site is not None:
        kind = config.get("type") or (repository and repository[3]) or (folder and folder[1]) or ""
        between = skips or kind.startswith("transcoder") or "->" in site
        return two_sites(site) if between else (site, site)
    if isinstance(hooks[0], str):
        reads = from_hugging_face(hooks[0])
        return reads, from_hugging_face(hooks[1]) if isinstance(hooks[1], str) else reads
    if repository and repository[3] == "res" and in_path("/embedding/", weights):
        return EMBEDDING, EMBEDDING
    if folder:
        reads, writes = SITES[folder[1]]
        return f"layers.{int(folder[2])}.{reads}", f"layers.{int(folder[2])}.{writes}"
    if repository and layer:
        reads, writes = SITES[repository[3]]
        return f"layers.{int(layer[1])}.{reads}", f"layers.{int(layer[1])}.{writes}"
    raise no_site(weights, f"layers.{int(layer[1]) if layer else 8}.resid_post")


def _model(weights: Path, config: dict[str, Any]) -> str | None:
    """The name of the language model; `-pt`, which the smallest Gemma 3 lacks, as it is written."""
    name = config.get("model_name")
    if isinstance(name, str):
        return name
    if second := in_path(r"gemma-scope-2-(\w+-(?:pt|it))(?=/|$)", weights):
        return f"google/gemma-3-{second[1]}"
    if first := in_path(REPOSITORY, weights):
        return f"google/gemma-2-{first[1]}{'-it' if first[2] == 'it' else ''}"
    return None
