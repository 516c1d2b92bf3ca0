"""Sparse autoencoders, transcoders and crosscoders: train them, save and load them, and read what
their features mean."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxterp.sae.callbacks import Callback, EarlyStopping, ProgressBar, StopTraining
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.config import CrosscoderConfig, CrossLayerConfig, SAEConfig, TranscoderConfig
from mlxterp.sae.cross_layer import CrossLayerTrainer, CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder, CrosscoderTrainer
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.comparing import compare
from mlxterp.sae.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.steering.edits import splice
from mlxterp.sae.trainer import TrainingError
from mlxterp.sae.transcoder import Transcoder, TranscoderTrainer

if TYPE_CHECKING:
    from mlxterp.sae.circuits.behavior.behavior import find_behavior_circuit
    from mlxterp.sae.circuits.circuit import Circuit
    from mlxterp.sae.circuits.dataset.between import find_feature_circuits
    from mlxterp.sae.circuits.graph.search import find_attribution_graph

# Read when they are asked for: most programs have no use for circuits.
_CIRCUITS = {
    "Circuit": "mlxterp.sae.circuits.circuit",
    "find_attribution_graph": "mlxterp.sae.circuits.graph.search",
    "find_behavior_circuit": "mlxterp.sae.circuits.behavior.behavior",
    "find_feature_circuits": "mlxterp.sae.circuits.dataset.between",
}

__all__ = [
    "ActivationDataset",
    "Callback",
    "Circuit",
    "CrossLayerConfig",
    "CrossLayerTrainer",
    "CrossLayerTranscoder",
    "Crosscoder",
    "CrosscoderConfig",
    "CrosscoderTrainer",
    "EarlyStopping",
    "JSONLLogger",
    "ModelPair",
    "ProgressBar",
    "SAE",
    "SAEConfig",
    "SAETrainer",
    "StopTraining",
    "TensorBoardLogger",
    "TrackioLogger",
    "TrainingError",
    "Transcoder",
    "TranscoderConfig",
    "TranscoderTrainer",
    "WandbLogger",
    "compare",
    "find_attribution_graph",
    "find_behavior_circuit",
    "find_feature_circuits",
    "load_sae",
    "splice",
]


def __getattr__(name: str) -> Any:
    if name not in _CIRCUITS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_CIRCUITS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
