"""A quantised language model is one like any other."""

import pytest
from mlx import nn

from mlxterp import InterpretableModel
from mlxterp.sae import CrosscoderTrainer, SAEConfig, SAETrainer, TranscoderTrainer

CONFIG = SAEConfig(
    expansion_factor=2, k=8, learning_rate=3e-3, batch_size=64, num_epochs=4, warmup_steps=0,
    log_every=100, resample_dead_every=0, validation_split=0.1, validate_every=4,
)  # fmt: skip
TEXTS = [
    f"def f{i}(x, y={i}):\n    return [x + {i * i}, y] if x > {i} else None\n" for i in range(24)
]


TRAINED = {
    "sae": lambda model: SAETrainer.train(model, 2, "residual", TEXTS, CONFIG, verbose=False),
    "transcoder": lambda model: TranscoderTrainer.train(
        model, 2, dataset=TEXTS, from_component="mlp_in", to_component="mlp_out", skip=True,
        config=CONFIG, verbose=False,
    ),
    "crosscoder": lambda model: CrosscoderTrainer.train(
        model, 2, ["mlp", "attn"], TEXTS, config=CONFIG, verbose=False
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantised() -> InterpretableModel:
    base = InterpretableModel.demo()
    nn.quantize(base.model, group_size=64, bits=4)
    return InterpretableModel(base.model, base.tokenizer)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_coder_of_a_quantised_model_learns_and_knows_whose_it_is(kind, quantised, demo):
    coder = TRAINED[kind](quantised)
    first, last = (coder.statistics.validation[i]["fvu"] for i in (0, -1))
    assert 0 < last < 0.8 * first
    assert coder.metadata.model["fingerprint"] == quantised.fingerprint != demo.fingerprint
    assert coder.is_compatible(quantised)
    assert "trained on other weights" in repr(coder.is_compatible(demo))
