"""Sparse autoencoders, transcoders and crosscoders: train them, save and load them, and read what
their features mean."""

from mlxterp.sae.callbacks import Callback, EarlyStopping, ProgressBar, StopTraining
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.config import CrosscoderConfig, CrossLayerConfig, SAEConfig, TranscoderConfig
from mlxterp.sae.cross_layer import CrossLayerTrainer, CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder, CrosscoderTrainer
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.steering.edits import splice
from mlxterp.sae.trainer import TrainingError
from mlxterp.sae.transcoder import Transcoder, TranscoderTrainer

__all__ = [
    "ActivationDataset",
    "Callback",
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
    "load_sae",
    "splice",
]
