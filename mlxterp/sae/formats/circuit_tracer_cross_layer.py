"""Cross-layer transcoders of circuit-tracer: two files for each layer.

W_enc_{i}.safetensors    W_enc_{i} [F, d], b_enc_{i}, b_dec_{i}, perhaps threshold_{i} [F]
W_dec_{i}.safetensors    W_dec_{i} [F, L - i, d]: what its features write to its own layer and
                         each later one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.coder import Columns
from mlxterp.sae.formats.circuit_tracer_files import (
    check_names,
    facts,
    layers_of,
    read_threshold,
    sites_of,
    threshold_of,
)
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.tensors import TensorFile, open_tensors
from mlxterp.sae.metadata import Metadata

ENCODER, DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"


def recognise(path: Path) -> bool:
    """Whether it is a folder with both files of the first layer."""
    return all((path / name.format(0)).is_file() for name in (ENCODER, DECODER))


def read(path: Path, config: Mapping[str, Any], name: str) -> Parts:
    """The cross-layer transcoder in a folder; `name` is that of the format.

    Raises `ValueError` where a layer is missing, for other shapes, and for one with skip
    connections, as our coders have none across layers.
    """
    n_layers = _count(path)
    with open_tensors(path / ENCODER.format(0)) as file:
        shape = file.shape("W_enc_0")
    if len(shape) != 2:
        raise ValueError(f"{path / ENCODER.format(0)}: 'W_enc_0' must be [F, d], got {shape}.")
    _check_decoders(path, n_layers, *shape)
    layers = [_layer(path, i, n_layers, *shape) for i in range(n_layers)]
    if len({frozenset(layer) for layer in layers}) > 1:
        raise ValueError(f"{path}: some layers have a threshold and others have none.")
    arrays = {key: mx.concatenate([layer.pop(key) for layer in layers]) for key in [*layers[0]]}
    mx.eval(arrays)
    sites = [sites_of(config, i, path) for i in range(n_layers)]
    reads, writes = (Columns(names, (shape[1],) * n_layers) for names in zip(*sites, strict=True))
    said = facts(config)
    model = {"name": said["model_name"]} if "model_name" in said else {}
    return Parts(
        "cross_layer_transcoder", reads, writes, "jumprelu" if "threshold" in arrays else "relu",
        arrays, metadata=Metadata(model=model, source={"format": name, **said}),
    )  # fmt: skip


def files(parts: Parts) -> dict[str, dict[str, mx.array]]:
    """The arrays of the files by their names; raises `ValueError` where a layer is left out."""
    n = len(parts.reads.names)
    if layers_of(parts.reads) != list(range(n)):
        raise ValueError(
            "circuit-tracer knows cross-layer transcoders of all layers from the first one on, got "
            f"the layers {layers_of(parts.reads)}."
        )
    if parts.n_features % n:
        raise ValueError(f"All layers must have equally many features, got {parts.n_features}.")
    found, start, each = {}, 0, parts.n_features // n
    threshold = threshold_of(parts)
    for i in range(n):
        own, rows = slice(i * each, (i + 1) * each), each * (n - i)
        W_dec = parts.arrays["W_dec"][start : start + rows].reshape(each, n - i, -1)
        start += rows
        encoder = {
            f"W_enc_{i}": parts.arrays["W_enc"][own],
            f"b_enc_{i}": parts.arrays["b_enc"][own],
            f"b_dec_{i}": mx.split(parts.arrays["b_dec"], n)[i],
        }
        if threshold is not None:
            encoder[f"threshold_{i}"] = threshold[own]
        found |= {ENCODER.format(i): encoder, DECODER.format(i): {f"W_dec_{i}": W_dec}}
    return found


def _count(path: Path) -> int:
    """The number of layers; raises `ValueError` where one is missing."""
    names = [file.name for file in path.iterdir()]
    matches = (re.fullmatch(r"W_(?:enc|dec)_(\d+)\.safetensors", name) for name in names)
    n_layers = 1 + max(int(match[1]) for match in matches if match)
    wanted = {name.format(i) for name in (ENCODER, DECODER) for i in range(min(n_layers, 10_000))}
    if n_layers < 2 or not wanted <= set(names):
        raise ValueError(
            f"{path} must hold both files of each of two or more layers, 0 to {n_layers - 1}; it "
            f"lacks {sorted(wanted - set(names))[:4]}."
        )
    return n_layers


def _check_decoders(path: Path, n_layers: int, n: int, d: int) -> None:
    for i in range(n_layers):
        with open_tensors(path / DECODER.format(i)) as file:
            check_names(file, {f"W_dec_{i}"}, set())
            if (shape := file.shape(f"W_dec_{i}")) != (n, n_layers - i, d):
                raise ValueError(
                    f"{file.path}: 'W_dec_{i}' must have shape {(n, n_layers - i, d)}, got {shape}."
                )


def _layer(path: Path, i: int, n_layers: int, n: int, d: int) -> dict[str, mx.array]:
    with open_tensors(path / ENCODER.format(i)) as file:
        _refuse_skip(file, i)
        needed = {f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"}
        check_names(file, needed, {f"threshold_{i}"})
        arrays = {
            "W_enc": file.read(f"W_enc_{i}", (n, d)),
            "b_enc": file.read(f"b_enc_{i}", (n,)),
            "b_dec": file.read(f"b_dec_{i}", (d,)),
            **read_threshold(file, [f"threshold_{i}"], n),
        }
    with open_tensors(path / DECODER.format(i)) as file:
        arrays["W_dec"] = file.read(f"W_dec_{i}").reshape(n * (n_layers - i), d)
    return arrays


def _refuse_skip(file: TensorFile, i: int) -> None:
    if file.has(f"W_skip_{i}"):
        raise ValueError(
            f"{file.path}: cross-layer transcoders with skip connections ('W_skip_{i}') are not "
            "read, as ours have none."
        )
