"""Models whose heads are known."""

import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.testbeds import induction, train_induction


@pytest.fixture(scope="session")
def handmade() -> InterpretableModel:
    """Head 0.0 looks at the token before, and 1.0 does induction; written by hand."""
    made = induction()
    return InterpretableModel(made.model, made.tokenizer)


@pytest.fixture(scope="session")
def trained() -> InterpretableModel:
    """A model that learnt induction on sequences of 33 tokens."""
    made = train_induction()
    return InterpretableModel(made.model, made.tokenizer)
