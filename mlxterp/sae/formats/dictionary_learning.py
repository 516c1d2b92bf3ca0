"""Dictionaries of dictionary_learning: a folder `trainer_i/` with `ae.pt` and `config.json`.

    AutoEncoder              encoder.weight [F, d], encoder.bias, decoder.weight [d, F], bias [d]
    AutoEncoderNew           encoder.weight, encoder.bias, decoder.weight, decoder.bias
    GatedAutoEncoder         encoder.weight, decoder.weight, decoder_bias, gate_bias, mag_bias,
                             r_mag
    JumpReluAutoEncoder      W_enc [d, F], b_enc, W_dec [F, d], b_dec, threshold [F]
    AutoEncoderTopK          encoder.weight, encoder.bias, decoder.weight, b_dec, k
    BatchTopKSAE             the same and the number threshold
    MatryoshkaBatchTopKSAE   W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes

All but AutoEncoderNew and JumpReluAutoEncoder subtract the decoder's bias from their input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.files import read_json
from mlxterp.sae.formats.dictionary_learning_writing import (  # noqa: F401 - as in other formats
    CONFIG,
    WEIGHTS,
    write,
)
from mlxterp.sae.formats.names import from_hugging_face
from mlxterp.sae.formats.parts import SITES, Parts
from mlxterp.sae.formats.single import (
    centred,
    json_or_nothing,
    names_in,
    no_site,
    parts_between,
    transposed,
)
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "dictionary_learning"
HOOKS = ("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out", "attn_in", "attn_out")

Read = tuple[str, dict[str, mx.array], dict[str, Any]]
"""The name of an activation function, our arrays, and the function's options."""


def recognise(path: Path) -> bool:
    """Whether it is a folder of a trainer, or a file of weights in one."""
    weights = _weights(path)
    trainer = json_or_nothing(_config(weights)).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        return False
    return bool(names_in(weights) & {"encoder.weight", "W_enc"})


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE in a trainer's folder, or in a checkpoint `checkpoints/ae_{step}.pt` of it.

    Codes are those of the library's `load_dictionary`, which scales the decoder of an `AutoEncoder`
    to rows of norm 1. The site is that of `submodule_name` in the configuration. Raises
    `ValueError` for an unknown class, for weights that do not fit the configuration, for a
    (batch) top-k threshold that was never set, and where the site has to be given.
    """
    weights = _weights(path)
    config_file = _config(weights)
    config = read_json(config_file, ("trainer",))
    trainer = config["trainer"]
    found = trainer.get("dict_class") if isinstance(trainer, dict) else trainer
    if not isinstance(found, str) or found not in CLASSES:
        raise ValueError(
            f"{config_file}: 'dict_class' of 'trainer' must be one of {', '.join(CLASSES)}, "
            f"got {found!r}."
        )
    site = site or _site(trainer, config.get("buffer"))
    if site is None:
        raise no_site(config_file)
    with open_tensors(weights) as file:
        _check_size(file, trainer, config_file)
        function, arrays, options = CLASSES[found](file, trainer)
        groups = np.array(file.read("group_sizes")).astype(int) if file.has("group_sizes") else None
    facts = ("dict_class", "trainer_class", "layer", "submodule_name", "lr", "steps", "seed")
    source = {key: trainer.get(key) for key in facts}
    source["group_sizes"] = None if groups is None else groups.tolist()
    return parts_between(
        site, site, function, arrays, source=source, options=options, model=trainer.get("lm_name"),
    )  # fmt: skip


def _weights(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def _config(weights: Path) -> Path:
    above = weights.parent.parent
    return (above if weights.parent.name == "checkpoints" else weights.parent) / CONFIG


def _site(trainer: dict[str, Any], buffer: Any) -> str | None:
    """The site of a `submodule_name`, which is `resid_post_layer_3` or the path of a module."""
    match trainer.get(SITES):
        case [str(site), _]:
            return site
    name = trainer.get("submodule_name")
    side = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    if not isinstance(name, str) or side not in ("in", "out"):
        return None
    hook = re.fullmatch(rf"({'|'.join(HOOKS)})_layer_(\d+)", name)
    if hook:
        return f"layers.{int(hook[2])}.{hook[1]}" if side == "out" else None
    try:
        return from_hugging_face(name, f"{side}put")
    except ValueError:
        return None


def _check_size(file: TensorFile, trainer: dict[str, Any], config_file: Path) -> None:
    """Before memory is taken: the encoder is of the size that the configuration says."""
    linear = file.has("encoder.weight")
    shape = file.shape("encoder.weight" if linear else "W_enc")
    wanted = (trainer.get("dict_size"), trainer.get("activation_dim"))
    found = shape if linear else shape[::-1]
    if len(found) != 2 or any(w is not None and w != n for w, n in zip(wanted, found, strict=True)):
        raise ValueError(
            f"{file.path}: the encoder must be of {wanted[0]} features and width {wanted[1]}, as "
            f"{config_file} says, got shape {shape}."
        )


def _linear(file: TensorFile) -> tuple[mx.array, mx.array]:
    """`W_enc [F, d]` and `W_dec [F, d]` of two `nn.Linear`."""
    n, d = file.shape("encoder.weight")
    return file.read("encoder.weight"), transposed(file.read("decoder.weight", (d, n)))


def _four(file: TensorFile) -> dict[str, mx.array]:
    """The arrays of a class that names them as the papers do, `W_enc [d, F]`."""
    d, n = file.shape("W_enc")
    return {
        "W_enc": transposed(file.read("W_enc")),
        "b_enc": file.read("b_enc", (n,)),
        "W_dec": file.read("W_dec", (n, d)),
        "b_dec": file.read("b_dec", (d,)),
    }


def _of_linear(file: TensorFile, bias: str) -> dict[str, mx.array]:
    W_enc, W_dec = _linear(file)
    n, d = W_enc.shape
    b_enc, b_dec = file.read("encoder.bias", (n,)), file.read(bias, (d,))
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _centred(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    b_enc = centred(arrays["W_enc"], arrays["b_enc"], arrays["b_dec"])
    return arrays | {"b_enc": b_enc}


def _auto_encoder(file: TensorFile, trainer: dict[str, Any]) -> Read:
    arrays = _centred(_of_linear(file, "bias"))
    norms = mx.linalg.norm(arrays["W_dec"], axis=1)
    norms = mx.where(norms > 0, norms, 1)
    arrays["W_enc"] = arrays["W_enc"] * norms[:, None]
    arrays["b_enc"] = arrays["b_enc"] * norms
    arrays["W_dec"] = arrays["W_dec"] / norms[:, None]
    return "relu", arrays, {}


def _auto_encoder_new(file: TensorFile, trainer: dict[str, Any]) -> Read:
    return "relu", _of_linear(file, "decoder.bias"), {}


def _gated(file: TensorFile, trainer: dict[str, Any]) -> Read:
    W_enc, W_dec = _linear(file)
    n, d = W_enc.shape
    b_dec = file.read("decoder_bias", (d,))
    gate, magnitude = file.read("gate_bias", (n,)), file.read("mag_bias", (n,))
    log_gain = file.read("r_mag", (n,))
    return "gated", {
        "W_enc": W_enc,
        "b_enc": centred(W_enc, gate, b_dec),
        "W_dec": W_dec,
        "b_dec": b_dec,
        "log_gain": log_gain,
        "offset": magnitude - mx.exp(log_gain) * gate,
    }, {}  # fmt: skip


def _jump_relu(file: TensorFile, trainer: dict[str, Any]) -> Read:
    arrays = _four(file)
    return "jumprelu", arrays | {"threshold": file.read("threshold", arrays["b_enc"].shape)}, {}


def _top_k(file: TensorFile, trainer: dict[str, Any]) -> Read:
    return "topk", _centred(_of_linear(file, "b_dec")), {"k": _k(file, trainer)}


def _batch_top_k(file: TensorFile, trainer: dict[str, Any]) -> Read:
    threshold = _threshold(file)
    arrays = _centred(_of_linear(file, "b_dec"))
    return "batch_topk", arrays | {"threshold": threshold}, {"k": _k(file, trainer)}


def _matryoshka(file: TensorFile, trainer: dict[str, Any]) -> Read:
    threshold = _threshold(file)
    arrays = _centred(_four(file))
    return "batch_topk", arrays | {"threshold": threshold}, {"k": _k(file, trainer)}


def _k(file: TensorFile, trainer: dict[str, Any]) -> int:
    k = file.value("k") if file.has("k") else trainer.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{file.path}: 'k' must be a whole number >= 1, got {k!r}.")
    if trainer.get("k") not in (None, k):
        raise ValueError(f"{file.path}: 'k' is {k}, in {CONFIG} it is {trainer['k']!r}.")
    return k


def _threshold(file: TensorFile) -> mx.array:
    threshold = file.value("threshold")
    if threshold < 0:
        raise ValueError(
            f"{file.path}: 'threshold' is {threshold}, as before it is set: training ended before "
            "'threshold_start_step'. Without it the library has every positive feature active."
        )
    return mx.array(threshold, dtype=mx.float32)


CLASSES: dict[str, Callable[[TensorFile, dict[str, Any]], Read]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
