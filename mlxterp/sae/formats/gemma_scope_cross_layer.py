"""Cross-layer transcoders of Gemma Scope 2: `clt/width_262k_l0_big/` with a file for each layer.

`params_layer_{i}.safetensors` holds `w_enc [d, F]`, `b_enc`, `threshold`, `b_dec` and `w_dec`,
which is `[F, L, d]` by the layer that is written, or `[F, L - i, d]` from the own layer on.
Features write to their own layer and later ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.coder import Columns
from mlxterp.sae.files import read_json
from mlxterp.sae.formats.names import from_hugging_face
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import named_model, plain, transposed
from mlxterp.sae.formats.tensors import TensorFile, open_tensors
from mlxterp.sae.metadata import Metadata

CONFIG = "config.json"
FIRST = "params_layer_0.safetensors"
HOOKS = (
    "model.layers.{all}.pre_feedforward_layernorm.output",
    "model.layers.{all}.post_feedforward_layernorm.output",
)


def recognise(path: Path) -> bool:
    """Whether it is a folder with a file of parameters for each layer."""
    return (path / FIRST).is_file()


def read(path: Path) -> Parts:
    """The cross-layer transcoder in a folder.

    Raises `ValueError` where a layer is missing, where a feature writes to an earlier layer than
    its own, and for one with skip connections.
    """
    config_file = path / CONFIG
    config = read_json(config_file) if config_file.exists() else {}
    if config.get("type", "clt") != "clt" or config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(
            f"{config_file}: of the folders with a file for each layer, cross-layer transcoders "
            f"('clt') of 'jump_relu' are read, not {config.get('type')!r}."
        )
    files = _files(path)
    if len(files) < 2:
        raise ValueError(f"{path} must hold the files of two or more layers, got {len(files)}.")
    with open_tensors(files[0]) as file:
        d_in, n, d_out = _sizes(file)
    layers = []
    for i, weights in enumerate(files):
        with open_tensors(weights) as file:
            layers.append(_layer(file, i, len(files), (d_in, n, d_out)))
    arrays = {key: mx.concatenate([layer[key] for layer in layers]) for key in layers[0]}
    mx.eval(arrays)
    reads, writes = (
        Columns(tuple(_site(hook, i) for i in range(len(files))), (width,) * len(files))
        for hook, width in zip(_hooks(config, config_file), (d_in, d_out), strict=True)
    )
    metadata = Metadata(model=named_model(config.get("model_name")), source=plain(config))
    return Parts(
        "cross_layer_transcoder", reads, writes, "jumprelu", arrays, metadata=metadata
    )  # fmt: skip


def _files(path: Path) -> list[Path]:
    """The files in the order of the layers; raises `ValueError` where one is missing."""
    found = {
        int(match[1]): file
        for file in path.iterdir()
        if (match := re.fullmatch(r"params_layer_(\d+)\.safetensors", file.name))
    }
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise ValueError(f"{path} lacks the files of the layers {missing}.")
    return [found[i] for i in range(len(found))]


def _sizes(file: TensorFile) -> tuple[int, int, int]:
    """Width of what is read, features of a layer, width of what is written."""
    shape, width = file.shape("w_enc"), file.shape("b_dec")
    if len(shape) != 2 or len(width) != 1:
        raise ValueError(f"{file.path}: 'w_enc' has shape {shape}, 'b_dec' {width}.")
    return (*shape, *width)


def _layer(
    file: TensorFile, i: int, n_layers: int, sizes: tuple[int, int, int]
) -> dict[str, mx.array]:
    d_in, n, d_out = sizes
    if file.has("affine_skip_connection"):
        raise ValueError(
            f"{file.path}: cross-layer transcoders with skip connections ('affine') are not read."
        )
    left = n_layers - i
    shape = file.shape("w_dec")
    if shape not in ((n, n_layers, d_out), (n, left, d_out)):
        raise ValueError(
            f"{file.path}: 'w_dec' must have shape {(n, n_layers, d_out)}, or "
            f"{(n, left, d_out)} from the own layer on, got {shape}."
        )
    earlier = shape[1] - left
    for j in range(earlier):
        if (file.read_part("w_dec", (slice(None), j)) != 0).any().item():
            raise ValueError(
                f"{file.path}: features of layer {i} write to layer {j}; only those that write to "
                "their own layer and later ones are read."
            )
    W_dec = file.read_part("w_dec", (slice(None), slice(earlier, None)))
    return {
        "W_enc": transposed(file.read("w_enc", (d_in, n))),
        "b_enc": file.read("b_enc", (n,)),
        "threshold": file.read("threshold", (n,)),
        "W_dec": W_dec.reshape(n * left, d_out),
        "b_dec": file.read("b_dec", (d_out,)),
    }


def _hooks(config: dict[str, Any], config_file: Path) -> tuple[str, str]:
    reads, writes = (
        config.get(key, hook)
        for key, hook in zip(("hf_hook_point_in", "hf_hook_point_out"), HOOKS, strict=True)
    )
    for hook in (reads, writes):
        if not isinstance(hook, str) or "{all}" not in hook:
            raise ValueError(f"{config_file}: a hook of all layers has '{{all}}', got {hook!r}.")
    return reads, writes


def _site(hook: str, layer: int) -> str:
    return from_hugging_face(hook.replace("{all}", str(layer)))
