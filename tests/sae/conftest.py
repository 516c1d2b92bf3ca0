from pydoc_data.topics import topics

import pytest

from mlxterp.sae import SAE, SAEConfig, SAETrainer


@pytest.fixture(scope="session")
def model(demo):
    return demo


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [text[:2000] for text in list(topics.values())[:40]]


@pytest.fixture(scope="session")
def sae(model, texts) -> SAE:
    """A small SAE of the bundled model that knows its model and its data."""
    config = SAEConfig(
        expansion_factor=4, k=8, learning_rate=3e-3, num_epochs=3, resample_dead_every=0
    )
    return SAETrainer.train(
        model=model, layer=2, component="residual", dataset=texts, config=config, verbose=False
    )
