"""Sparse autoencoders: train them, save and load them, and read what their features mean."""

from mlxterp.sae.callbacks import Callback, ProgressBar
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.trainer import TrainingError

__all__ = [
    "ActivationDataset",
    "Callback",
    "ProgressBar",
    "SAE",
    "SAEConfig",
    "SAETrainer",
    "TrainingError",
    "load_sae",
]
