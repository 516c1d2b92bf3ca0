"""Random coders on a prompt of the bundled model, and interventions by edits of the model alone."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.ablation import Kept, Prompt, find_states
from mlxterp.sae.circuits.behavior.targets import Target, find_target
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.sae import SAE
from tests.sae.features.coders import KINDS, filled, make

TEXT = "def add(a, b):\n    return a + b"
OTHER = "def sub(x, y):\n    return x - y"
ONE_PASS = [kind for kind in KINDS if kind != "crosscoder"]


def sae_of(layer: int, component: str = "resid_post", n_features: int = 40) -> SAE:
    columns = Columns((f"layers.{layer}.{component}",), (128,))
    return filled(SAE(columns, columns, n_features, k=6))


def ids_of(model, text: str = TEXT) -> list[int]:
    return model.encode(text)


def prompt_of(
    model,
    coders: Mapping[int, SparseCoder],
    corrupted: str | None = None,
    others: Sequence[str] | None = None,
) -> Prompt:
    ids = ids_of(model)
    other = None if corrupted is None else ids_of(model, corrupted)
    texts = None if others is None else [ids_of(model, text) for text in others]
    return Prompt(model, tuple(ids), find_states(model, coders, ids, other, texts))


def two_saes() -> dict[int, SparseCoder]:
    return {2: make("sae"), 4: sae_of(4)}


def logit_of(model, coders, token: int = 65) -> Target:
    return find_target(model, coders, ids_of(model), token)


def all_kept(prompt: Prompt, features: bool = True, errors: bool = True) -> dict[int, Kept]:
    found = {}
    for layer, state in prompt.states.items():
        shape = state.found.codes.shape
        found[layer] = Kept(np.full(shape, features), np.full(shape[0], errors))
    return found


def captured(model, tokens, names: Sequence[str], edit=None) -> np.ndarray:
    """What sites hold, joined, `[S, width]`."""
    found = model.run(mx.array([[*tokens]]), capture=[*names], edit=edit or {})
    return np.concatenate([np.array(found[name][0].astype(mx.float32)) for name in names], axis=-1)


def replaced(coder: SparseCoder, written: np.ndarray) -> dict:
    """Edits by which the sites of a coder hold what is written."""
    return {
        name: lambda x, part=part: mx.array(written[None, :, part].astype(np.float32))
        for name, part in coder.writes.slices.items()
    }


def directions(coder: SparseCoder) -> np.ndarray:
    """The decoder rows of all features `[n_features, d_out]`."""
    return np.stack([np.array(coder.direction(i)) for i in range(coder.n_features)])


def logits(model, tokens, edit=None) -> np.ndarray:
    """The logits at the last token."""
    return np.array(model.run(mx.array([[*tokens]]), edit=edit or {}).output[0, -1], np.float64)
