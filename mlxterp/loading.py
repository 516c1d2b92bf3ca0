"""Load models with mlx-lm, with errors that say what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

DEMO = Path(__file__).parent / "assets" / "tiny"

_CHECKED_AT_ONCE = 1 << 22  # entries of an array
_SLOW_ON_CPU = (mx.bfloat16, mx.float16)
_CONTEXT_LENGTH = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
    "seq_length", "context_length", "max_context_length",
)  # fmt: skip


def load(name: str, tokenizer: Any = None) -> tuple[nn.Module, Any, dict]:
    """The model, tokenizer and config of a Hub name or local directory.

    Raises `ValueError` where there is no such model, or mlx-lm does not know its architecture.
    """
    import mlx_lm
    from mlx_lm.utils import load_model

    path = Path(name).expanduser()
    if not path.exists() and _looks_local(name):
        raise ValueError(f"no model directory at {name!r}: the path does not exist")
    if path.exists() and not (path / "config.json").exists():
        raise ValueError(f"no model in {name!r}: the directory has no config.json")
    tried = []
    try:
        loaded: Any = mlx_lm.load(str(path) if path.exists() else name, return_config=True)
        model, found, config = loaded
        return model, found if tokenizer is None else tokenizer, config
    except Exception as error:
        tried.append(f"mlx_lm.load: {_first_line(error)}")
        cause = error
    if path.exists():
        try:
            model, config = load_model(path)
            return model, tokenizer, config
        except Exception as error:
            tried.append(f"mlx_lm.utils.load_model (without a tokenizer): {_first_line(error)}")
    raise ValueError(
        f"could not load the model {name!r}. Tried:\n  "
        + "\n  ".join(tried)
        + "\nGive the name of a "
        "model on the Hugging Face Hub (see mlx-community), the path of a local directory with "
        "config.json and model*.safetensors, or a loaded MLX module with its tokenizer"
    ) from cause


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def cast(model: nn.Module, dtype: mx.Dtype | None, loaded: bool) -> None:
    """Cast the weights to `dtype`; None means float32 for half precision just loaded on a CPU."""
    if dtype is not None:
        model.set_dtype(dtype)
    elif loaded and mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32, lambda current: current in _SLOW_ON_CPU)


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell a model by its arrays' names, shapes and weights.

    The same weights have the same fingerprint in bfloat16 as in the float32 they were cast to.
    """
    arrays: Any = sorted(tree_flatten(model.parameters()))
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name} {array.shape} {_checksums(array)}\n".encode())
    return digest.hexdigest()[:16]


def _checksums(array: mx.array) -> list[int]:
    """Of each part of an array the sum of its values' bits, each times its place, modulo 2^32."""
    flat, sums = array.reshape(-1), []
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        part = flat[start : start + _CHECKED_AT_ONCE]
        if mx.issubdtype(part.dtype, mx.floating):
            part = part.astype(mx.bfloat16).view(mx.uint16)
        places = 2 * mx.arange(part.size, dtype=mx.uint32) + 1
        sums.append((part.astype(mx.uint32) * places).sum())
        mx.async_eval(sums[-1])
    found: Any = mx.stack(sums).tolist() if sums else []
    return found


def precision(model: nn.Module) -> dict[str, str | None]:
    """The floating types of the weights, and how some of them are quantised."""
    arrays: Any = tree_flatten(model.parameters())
    floating = {a.dtype for _, a in arrays if mx.issubdtype(a.dtype, mx.floating)}
    quantised = sorted(
        {
            (getattr(module, "mode", "affine"), module.bits, module.group_size)
            for module in model.modules()
            if hasattr(module, "bits") and hasattr(module, "group_size")
        }
    )
    how = [f"{mode}, {bits} bits in groups of {size}" for mode, bits, size in quantised]
    return {
        "dtype": ", ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in floating)),
        "quantization": "; ".join(how) or None,
    }


def context_length(model: nn.Module, config: dict) -> int | None:
    """The longest input that the model was made for, where its config says."""
    arguments = getattr(model, "args", None) or getattr(model, "config", None)
    sources = [config, config.get("text_config") or {}, getattr(arguments, "__dict__", {})]
    for source in sources:
        for key in _CONTEXT_LENGTH:
            if isinstance(value := source.get(key), int):
                return value
    return None


def facts(model: Any) -> list[tuple[str, str]]:
    """What there is to know of an `InterpretableModel` at a glance, in words."""
    weights: list[Any] = [array for _, array in tree_flatten(model.parameters())]
    types = sorted({str(array.dtype).removeprefix("mlx.core.") for array in weights})
    size = sum(array.nbytes for array in weights) / 1e6
    return [
        ("type", model.model_type),
        ("layers", f"{model.n_layers}, of width {model.d_model}"),
        ("vocabulary", "unknown" if model.vocab_size is None else f"{model.vocab_size:,} tokens"),
        ("weights", f"{size:,.1f} MB, {', '.join(types)}"),
        ("tokenizer", "none" if model.tokenizer is None else type(model.tokenizer).__name__),
    ]
