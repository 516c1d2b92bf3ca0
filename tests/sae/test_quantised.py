"""A quantised language model is one like any other."""

from mlx import nn

from mlxterp import InterpretableModel
from mlxterp.sae import SAEConfig, SAETrainer

CONFIG = SAEConfig(
    expansion_factor=2, k=8, learning_rate=3e-3, batch_size=64, num_epochs=4, warmup_steps=0,
    log_every=100, resample_dead_every=0, validation_split=0.1, validate_every=4,
)  # fmt: skip
TEXTS = [
    f"def f{i}(x, y={i}):\n    return [x + {i * i}, y] if x > {i} else None\n" for i in range(24)
]


def test_an_sae_of_a_quantised_model_learns_and_knows_whose_it_is():
    full, base = InterpretableModel.demo(), InterpretableModel.demo()
    nn.quantize(base.model, group_size=64, bits=4)
    model = InterpretableModel(base.model, base.tokenizer)
    sae = SAETrainer.train(model, 2, "residual", TEXTS, CONFIG, verbose=False)
    first, last = sae.statistics.validation[0]["fvu"], sae.statistics.validation[-1]["fvu"]
    assert 0 < last < 0.8 * first
    assert sae.metadata.model["fingerprint"] == model.fingerprint != full.fingerprint
    assert sae.is_compatible(model)
    assert "trained on other weights" in repr(sae.is_compatible(full))
