"""Sparse autoencoders: train them, save and load them, and read what their features mean."""

from mlxterp.sae.callbacks import Callback, EarlyStopping, ProgressBar, StopTraining
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.trainer import TrainingError

__all__ = [
    "ActivationDataset",
    "Callback",
    "EarlyStopping",
    "JSONLLogger",
    "ProgressBar",
    "SAE",
    "SAEConfig",
    "SAETrainer",
    "StopTraining",
    "TensorBoardLogger",
    "TrackioLogger",
    "TrainingError",
    "WandbLogger",
    "load_sae",
]
