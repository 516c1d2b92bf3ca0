"""What all tests share."""

import mlxterp  # isort: skip - before MLX, so that OpenBLAS is found

import pytest


@pytest.fixture(scope="session")
def demo() -> mlxterp.InterpretableModel:
    """The bundled model."""
    return mlxterp.InterpretableModel.demo()
