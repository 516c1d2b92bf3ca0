"""Sparse autoencoders, transcoders and crosscoders: train them, save and load them, and read what
their features mean."""

from mlxterp.sae.callbacks import Callback, EarlyStopping, ProgressBar, StopTraining
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.circuits.behavior.behavior import find_behavior_circuit
from mlxterp.sae.circuits.circuit import Circuit
from mlxterp.sae.circuits.dataset.between import find_feature_circuits
from mlxterp.sae.circuits.graph.search import find_attribution_graph
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
