"""Small language models whose circuits are known, to test what looks for circuits.

Wrap the `model` of a testbed in an `InterpretableModel`, with its `tokenizer`, to use it.
"""

from mlxterp.sae.testbeds.handmade import WordTokenizer
from mlxterp.sae.testbeds.induction import Induction, InductionStep, induction
from mlxterp.sae.testbeds.planted import PlantedCircuit, PlantedEdge, planted_circuit
from mlxterp.sae.testbeds.repetition import repetition_accuracy, repetitions
from mlxterp.sae.testbeds.trained import TrainedInduction, train_induction

__all__ = [
    "Induction",
    "InductionStep",
    "PlantedCircuit",
    "PlantedEdge",
    "TrainedInduction",
    "WordTokenizer",
    "induction",
    "planted_circuit",
    "repetition_accuracy",
    "repetitions",
    "train_induction",
]
