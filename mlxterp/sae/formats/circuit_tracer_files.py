"""What the files of circuit-tracer have in common: the configuration, hooks and thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlxterp.sae.formats.names import from_transformer_lens, to_transformer_lens
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.tensors import TensorFile
from mlxterp.sites import Site

CONFIG = "config.yaml"
HOOKS = ("feature_input_hook", "feature_output_hook")
LARGEST = 1 << 20  # bytes of a configuration


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a folder, empty where there is none; raises `ValueError` where it holds no
    mapping."""
    file = folder / CONFIG
    if not file.exists():
        return {}
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file} is too large for a configuration.")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping, not {type(content).__name__}.")
    return content


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    """What a configuration says in words."""
    names = ("model_name", "model_kind", *HOOKS, "scan")
    return {name: config[name] for name in names if isinstance(config.get(name), str)}


def sites_of(config: Mapping[str, Any], layer: int, folder: Path) -> tuple[str, str]:
    """The sites that the hooks of a configuration, such as `mlp.hook_in`, are in a layer."""
    hooks = [config.get(name) for name in HOOKS]
    if not all(isinstance(hook, str) for hook in hooks):
        raise ValueError(
            f"{folder / CONFIG} does not name the hooks, {' and '.join(HOOKS)}: give "
            f"site='layers.{layer}.mlp_in -> layers.{layer}.mlp_out', or those that it is of."
        )
    reads, writes = (from_transformer_lens(f"blocks.{layer}.{hook}") for hook in hooks)
    return reads, writes


def config_of(parts: Parts, kind: str) -> dict[str, Any]:
    """The configuration to write; raises `ValueError` for sites that are not at one pair of hooks
    in their layers."""
    hooks = [
        {to_transformer_lens(name).split(".", 2)[2] for name in columns.names}
        for columns in (parts.reads, parts.writes)
    ]
    if any(len(names) > 1 for names in hooks) or layers_of(parts.reads) != layers_of(parts.writes):
        raise ValueError(
            "circuit-tracer knows transcoders that read and write the same sites in every layer, "
            f"got {parts.reads} and {parts.writes}."
        )
    named = dict(zip(HOOKS, (names.pop() for names in hooks), strict=True))
    model = parts.metadata.model.get("name")
    return {"model_kind": kind, **named, **({"model_name": model} if model else {})}


def layers_of(columns: Any) -> list[int | None]:
    """The layers of some sites."""
    return [Site.from_string(name).layer for name in columns.names]


def threshold_of(parts: Parts) -> mx.array | None:
    """The threshold of each feature `[F]`; None where there is none, as of `relu`."""
    if parts.activation_function == "relu":
        return None
    if parts.activation_function not in ("jumprelu", "batch_topk"):
        raise ValueError(
            "circuit-tracer knows the activation functions relu and jumprelu, as which batch_topk "
            f"works after training; got {parts.activation_function!r}."
        )
    threshold = parts.arrays["threshold"].reshape(-1)  # of batch_topk one for each block
    return mx.repeat(threshold, parts.n_features // threshold.size)


def read_threshold(file: TensorFile, names: Sequence[str], n: int) -> dict[str, mx.array]:
    """`{"threshold": [n]}` of the first of the names that a file has; empty where it has none."""
    for name in names:
        if not file.has(name):
            continue
        shape = file.shape(name)
        if shape not in ((n,), (1, n), (1,), ()):
            raise ValueError(f"{file.path}: {name!r} must have shape {(n,)}, got {shape}.")
        threshold = mx.broadcast_to(file.read(name).reshape(-1), (n,))
        if (threshold < 0).any().item():
            raise ValueError(
                f"{file.path}: {name!r} is below zero for some features, whose values could then "
                "be negative; such transcoders are not read."
            )
        return {"threshold": threshold}
    return {}


def check_names(file: TensorFile, needed: set[str], others: set[str]) -> None:
    """Raises `ValueError` for arrays that are missing, and for those that are not known."""
    missing, unknown = needed - set(file.names), set(file.names) - needed - others
    if missing or unknown:
        raise ValueError(
            f"{file.path}: arrays are missing, {sorted(missing)}, or unknown, {sorted(unknown)}."
        )
