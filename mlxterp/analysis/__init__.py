"""Read activations of many prompts, what layers predict, and what brings a prediction about."""

from mlxterp.analysis.activations import (
    ActivationCache,
    batch_get_activations,
    collect_activations,
    get_activations,
)
from mlxterp.analysis.lens import LogitLens
from mlxterp.analysis.lens_training import train_tuned_lens
from mlxterp.analysis.logit_parts import LogitParts
from mlxterp.analysis.patching_result import PatchingResult
from mlxterp.analysis.predictions import get_token_predictions
from mlxterp.analysis.probe_layers import LayerProbes
from mlxterp.analysis.probes import Probe
from mlxterp.analysis.source import Readable
from mlxterp.analysis.steering_vectors import SteeringVector
from mlxterp.analysis.tuned_lens import TunedLens

__all__ = [
    "ActivationCache",
    "LayerProbes",
    "LogitLens",
    "LogitParts",
    "PatchingResult",
    "Probe",
    "Readable",
    "SteeringVector",
    "TunedLens",
    "batch_get_activations",
    "collect_activations",
    "get_activations",
    "get_token_predictions",
    "train_tuned_lens",
]
