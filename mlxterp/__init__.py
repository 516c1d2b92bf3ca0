"""Trace, edit and understand MLX language models, and learn the features hidden in them."""

from mlxterp import backend

backend.prepare()  # MLX must be prepared before it is imported

# ruff: noqa: E402
from mlxterp import interventions, visualization
from mlxterp.analysis import (
    ActivationCache,
    TunedLens,
    batch_get_activations,
    collect_activations,
    get_activations,
    train_tuned_lens,
)
from mlxterp.interventions import (
    InterventionComposer,
    add_vector,
    clamp,
    noise,
    replace_with,
    scale,
    zero_out,
)
from mlxterp.model import InterpretableModel
from mlxterp.sae import SAE, SAEConfig, SAETrainer
from mlxterp.sites import Site
from mlxterp.version import __version__ as __version__

__all__ = [
    "ActivationCache",
    "InterpretableModel",
    "InterventionComposer",
    "SAE",
    "SAEConfig",
    "SAETrainer",
    "Site",
    "TunedLens",
    "add_vector",
    "batch_get_activations",
    "clamp",
    "collect_activations",
    "get_activations",
    "interventions",
    "noise",
    "replace_with",
    "scale",
    "train_tuned_lens",
    "visualization",
    "zero_out",
]
