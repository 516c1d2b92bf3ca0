"""Transcoders of circuit-tracer: a set with one for each layer, or one across all layers.

    config.yaml              model_name, model_kind, feature_input_hook, feature_output_hook, ...
    layer_{i}.safetensors    W_enc [F, d], W_dec [F, d], b_enc, b_dec, perhaps W_skip [d, d] and
                             activation_function.threshold [F]

    z  = pre where it is above the threshold (or above 0), with pre = x @ W_enc.T + b_enc
    y' = z @ W_dec + b_dec (+ x @ W_skip.T)

Some sets have a matrix the other way round, `[d, F]`: the shapes decide. The files of a set may
also be listed in `config.yaml`. Those across layers are read by `circuit_tracer_cross_layer`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import mlx.core as mx

from mlxterp.sae.files import sync, write_directory, write_file
from mlxterp.sae.formats import circuit_tracer_cross_layer as cross_layer
from mlxterp.sae.formats.circuit_tracer_files import (
    CONFIG,
    check_names,
    config_of,
    facts,
    layers_of,
    read_config,
    read_threshold,
    sites_of,
    threshold_of,
)
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import names_in, parts_between, transposed, two_sites
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "circuit_tracer"
SET, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
ARRAYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
THRESHOLDS = ("activation_function.threshold", "threshold")
LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")


def recognise(path: Path) -> bool:
    """Whether it is a folder of circuit-tracer, or the file of one layer of a set."""
    if not path.is_dir():
        return bool(LAYER_FILE.fullmatch(path.name)) and names_in(path) >= ARRAYS
    try:
        if read_config(path).get("model_kind") in (SET, CROSS_LAYER):
            return True
        files = _layer_files(path).values()
    except (OSError, ValueError):
        return False
    return cross_layer.recognise(path) or any(names_in(file) >= ARRAYS for file in files)


def read(path: Path, site: str | None = None) -> Parts:
    """The transcoder of one layer of a set, or the cross-layer transcoder in a folder.

    `path` is the file of a layer, or the folder of a set and `site` the layer, such as `layers.8`.
    Where `config.yaml` is missing, `site` says both sites: `layers.8.mlp_in -> layers.8.mlp_out`.
    Raises `ValueError` where a layer has to be named or its file is not in the folder, for
    thresholds below zero, and for arrays that are missing, not known, or of other shapes.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    across = config.get("model_kind") == CROSS_LAYER or cross_layer.recognise(path)
    if path.is_dir() and across:
        if site is not None:
            raise ValueError(f"{path} is across layers, whose sites it names; got site={site!r}.")
        return cross_layer.read(path, config, NAME)
    layer, file = _file_of_layer(path, config, site)
    sites = two_sites(site) if site and "->" in site else sites_of(config, layer, folder)
    if site is not None and "->" not in site and site not in (f"layers.{layer}", *sites):
        raise ValueError(f"{file} is between {' and '.join(sites)}, not of site={site!r}.")
    with open_tensors(file) as tensors:
        arrays = _arrays(tensors)
    said = facts(config)
    return parts_between(
        *sites, "jumprelu" if "threshold" in arrays else "relu", arrays,
        source={"format": NAME, **said}, model=said.get("model_name"),
    )  # fmt: skip


def write(parts: Parts, path: Path) -> Path:
    """Write a transcoder as a layer of a set in a folder, or a cross-layer transcoder.

    A layer joins those that are in the folder, where the set is of the same sites and model. Raises
    `ValueError` for another kind, for an activation function other than `relu`, `jumprelu` and
    `batch_topk`, and for sites that are not in one layer and of one width.
    """
    if parts.kind not in ("transcoder", "cross_layer_transcoder"):
        raise ValueError(f"circuit-tracer knows transcoders only, got a {parts.kind}.")
    if parts.token_norm != "none":
        raise ValueError(
            f"circuit-tracer normalises no tokens, got token_norm={parts.token_norm!r}."
        )
    if {*parts.reads.widths} != {*parts.writes.widths}:
        raise ValueError(
            f"circuit-tracer knows sites of one width only, got {parts.reads} and {parts.writes}."
        )
    threshold = threshold_of(parts)
    if parts.kind == "cross_layer_transcoder":
        contents = {CONFIG: config_of(parts, CROSS_LAYER), **cross_layer.files(parts)}
        return write_directory(path, contents, marker=CONFIG)
    arrays = {name: parts.arrays[name] for name in (*ARRAYS, "W_skip") if name in parts.arrays}
    if threshold is not None:
        arrays[THRESHOLDS[0]] = threshold
    (layer,) = layers_of(parts.reads)
    return _add(path, config_of(parts, SET), f"layer_{layer}.safetensors", arrays)


def _add(path: Path, config: dict[str, Any], name: str, arrays: dict[str, mx.array]) -> Path:
    """Write a layer beside those of the same set, or as the first one of a new set."""
    if not path.is_dir() or not any(path.iterdir()):
        return write_directory(path, {CONFIG: config, name: arrays}, marker=CONFIG)
    known = read_config(path)
    if {key: known.get(key) for key in config} != config:
        raise ValueError(
            f"{path} holds something else than a set with {config}: write to another folder."
        )
    scratch = path / f".{name.removesuffix('.safetensors')}.new.safetensors"
    scratch.unlink(missing_ok=True)
    write_file(scratch, arrays)
    os.replace(scratch, path / name)
    sync(path)
    return path


def _arrays(file: TensorFile) -> dict[str, mx.array]:
    check_names(file, ARRAYS, {*THRESHOLDS, "W_skip"})
    shapes = {name: file.shape(name) for name in sorted(ARRAYS)}
    if any(len(shape) != (2 if name[0] == "W" else 1) for name, shape in shapes.items()):
        raise ValueError(f"{file.path} holds no transcoder: its arrays have the shapes {shapes}.")
    (n,), (d_out,) = shapes["b_enc"], shapes["b_dec"]
    d_in = shapes["W_enc"][1 if shapes["W_enc"][0] == n else 0]
    arrays = {
        "W_enc": _by_rows(file, "W_enc", n, d_in),
        "b_enc": file.read("b_enc"),
        "W_dec": _by_rows(file, "W_dec", n, d_out),
        "b_dec": file.read("b_dec"),
        **read_threshold(file, THRESHOLDS, n),
    }
    if file.has("W_skip"):
        arrays["W_skip"] = file.read("W_skip", (d_out, d_in))
    return arrays


def _by_rows(file: TensorFile, name: str, n: int, d: int) -> mx.array:
    """A matrix `[n, d]`, which the file may hold as `[d, n]`."""
    shape = file.shape(name)
    if shape not in ((n, d), (d, n)):
        raise ValueError(f"{file.path}: {name!r} must have shape {(n, d)}, got {shape}.")
    return file.read(name) if shape == (n, d) else transposed(file.read(name))


def _layer_files(folder: Path) -> dict[int, Path]:
    found = ((LAYER_FILE.fullmatch(file.name), file) for file in folder.iterdir())
    return {int(match[1]): file for match, file in found if match}


def _file_of_layer(path: Path, config: Mapping[str, Any], site: str | None) -> tuple[int, Path]:
    """The layer that is asked for, and its file."""
    asked = re.search(r"layers\.(\d+)", site or "")
    if site is not None and asked is None:
        raise ValueError(f"site must name a layer, such as 'layers.8', got {site!r}.")
    layer = int(asked[1]) if asked else None
    if not path.is_dir():
        match = re.search(r"layer_(\d+)", path.name)
        if match and layer is None:
            layer = int(match[1])
        if layer is None:
            raise ValueError(f"{path} does not say its layer: give site='layers.8', or another.")
        return layer, path
    files: dict[int, Path] = _layer_files(path) | _listed(path, config)
    if layer is None and len(files) == 1:
        (layer,) = files
    if layer not in files:
        names = ", ".join(map(str, [*sorted(files)[:4], *["..."] * (len(files) > 4)]))
        raise ValueError(
            f"{path} holds transcoders of the layers {names or 'none'}: name one with "
            f"site='layers.8', or give the path of its file; got site={site!r}."
        )
    if not files[layer].is_file():
        raise ValueError(
            f"{path} has no file of layer {layer}, which {CONFIG} lists as {files[layer].name}: it "
            "may be in another repository."
        )
    return layer, files[layer]


def _listed(path: Path, config: Mapping[str, Any]) -> dict[int, Path]:
    """The files that the configuration lists for its layers, as they are called in the folder."""
    entries = config.get("transcoders")
    found: dict[int, Path] = {}
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        layer = entry.get("layer", i) if isinstance(entry, dict) else i
        place = entry.get("filepath") if isinstance(entry, dict) else entry
        if isinstance(place, str) and isinstance(layer, int):
            found[layer] = _inside(path, place)
    return found


def _inside(path: Path, place: str) -> Path:
    """A listed file, `hf://user/repository/...` or relative, where it is below the folder."""
    uri = urlparse(place)
    parts = PurePosixPath(uri.path.lstrip("/")).parts[1 if uri.scheme == "hf" else 0 :]
    if ".." in parts:
        raise ValueError(f"{path / CONFIG} lists a file outside of its folder: {place!r}.")
    within = [path.joinpath(*parts[i:]) for i in range(len(parts))] or [path]
    return next((file for file in within if file.is_file()), within[0])
