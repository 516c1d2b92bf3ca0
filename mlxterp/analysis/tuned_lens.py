"""The tuned lens: an affine map for each layer, so that its states can be read by the head."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.analysis.logit_lens import Lenses, look
from mlxterp.analysis.readout import Head, replaced_norm
from mlxterp.analysis.source import Readable
from mlxterp.sae.files import read_json, write_bytes, write_json
from mlxterp.sae.formats.tensors import open_tensors


class Translator(nn.Linear):
    """`h @ weight.T + bias`, the identity at first."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)  # that of a linear layer would draw random numbers
        self.weight = mx.eye(width)
        self.bias = mx.zeros((width,))


class TunedLens(nn.Module):
    """One affine map of the residual stream for each layer, `translators[layer]`.

        logits[layer] = head(norm(h[layer] @ weight.T + bias))      weight [d_model, d_model]

    The maps are the identity until they are trained, see `train_tuned_lens`. Raises `ValueError`
    for sizes below 1.

    Reference: Belrose et al. 2023, arXiv 2303.08112.
    """

    def __init__(self, num_layers: int, hidden_dim: int) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("hidden_dim", hidden_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.translators = [Translator(hidden_dim) for _ in range(num_layers)]

    def __call__(self, h: mx.array, layer_idx: int) -> mx.array:
        """States `[..., hidden_dim]` after a layer as they would be after the last, in their type.

        Raises `ValueError` for a layer or a width that the lens does not have.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise ValueError(f"layer_idx must be 0 to {self.num_layers - 1}, not {layer_idx}")
        if h.shape[-1] != self.hidden_dim:
            raise ValueError(f"h must have width {self.hidden_dim}, not {h.shape[-1]}")
        return self.translators[layer_idx](h.astype(mx.float32)).astype(h.dtype)

    def save(self, path: str | Path) -> None:
        """Write `path.npz`, with `translators_{i}_weight` and `_bias`, and `path.json`."""
        stem, arrays = _stem(path), {}
        for i, translator in enumerate(self.translators):
            arrays |= {f"translators_{i}_{name}": translator[name] for name in ("weight", "bias")}
        arrays: dict[str, Any] = {name: np.array(array) for name, array in arrays.items()}
        np.savez(file := io.BytesIO(), **arrays)
        write_bytes(f"{stem}.npz", file.getvalue())
        sizes = {"num_layers": self.num_layers, "hidden_dim": self.hidden_dim}
        write_json(f"{stem}.json", sizes)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what `save` wrote; shapes are checked before memory is taken.

        Raises `ValueError` naming the file where one is missing, or is not what it should be.
        """
        stem = _stem(path)
        sizes = read_json(Path(f"{stem}.json"), ("num_layers", "hidden_dim"))
        layers, width = (_size(stem, sizes, name) for name in ("num_layers", "hidden_dim"))
        with open_tensors(Path(f"{stem}.npz")) as file:
            shapes = {"weight": (width, width), "bias": (width,)}
            read = [
                {name: file.read(f"translators_{i}_{name}", shapes[name]) for name in shapes}
                for i in range(layers)
            ]
        lens = cls(layers, width)
        lens.update({"translators": read})
        mx.eval(lens.parameters())
        return lens

    def __repr__(self) -> str:
        return f"TunedLens(num_layers={self.num_layers}, hidden_dim={self.hidden_dim})"


def tuned_lens(
    model: Readable,
    text: Any,
    lens: TunedLens,
    top_k: int = 1,
    layers: int | Iterable[int] | None = None,
    position: int | Iterable[int] | None = None,
    final_norm: nn.Module | None = None,
    skip_norm: bool = False,
) -> Lenses:
    """The tokens that the model's own tail makes of each layer's states as the lens maps them.

    Otherwise as `logit_lens`. Raises `ValueError` for a lens of another size than the model's too.

    Reference: Belrose et al. 2023, arXiv 2303.08112.
    """
    _check_fit(model, lens)
    head = Head(model, replaced_norm(final_norm, skip_norm))
    return look(model, text, head, top_k, layers, position, lens, "tuned lens")


def load_for(model: Readable, path: str | Path) -> TunedLens:
    """The lens saved at `path`; raises `ValueError` where it is of another size than the model."""
    lens = TunedLens.load(path)
    _check_fit(model, lens)
    return lens


def _check_fit(model: Readable, lens: TunedLens) -> None:
    sizes, wanted = (lens.num_layers, lens.hidden_dim), (model.n_layers, model.d_model)
    if sizes != wanted:
        raise ValueError(
            f"the lens is for {sizes[0]} layers of width {sizes[1]}, and {model.name} has "
            f"{wanted[0]} of width {wanted[1]}"
        )


def _stem(path: str | Path) -> Path:
    """The path that both files have but for their last extension."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".npz", ".json") else path


def _size(stem: Path, sizes: dict[str, Any], name: str) -> int:
    value = sizes[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{stem}.json: {name} must be a whole number >= 1, got {value!r}.")
    return value
