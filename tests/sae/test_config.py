import dataclasses

import pytest

from mlxterp.sae import SAEConfig


def test_the_documented_defaults():
    config = SAEConfig()
    documented = {
        "expansion_factor": 16, "k": 100, "learning_rate": 1e-4, "batch_size": 256,
        "num_epochs": 10, "lambda_sparse": 0.0, "normalize_activations": True,
        "tied_weights": False, "dead_neuron_threshold": 1e-6, "resample_dead_every": 10_000,
        "warmup_steps": 1000, "gradient_clip": 1.0, "checkpoint_every": 5000,
        "validation_split": 0.05,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in documented} == documented


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expansion_factor", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")),
        ("k", 0), ("k", 2.5), ("batch_size", 0), ("num_epochs", 0), ("log_every", 0),
        ("lambda_sparse", -1), ("auxiliary_coefficient", -0.1), ("resample_dead_every", -1),
        ("warmup_steps", -1), ("gradient_clip", -1), ("checkpoint_every", -1),
        ("validation_split", 1.0), ("validation_split", -0.1), ("dead_neuron_threshold", 1),
        ("lr_schedule", "sometimes"), ("dead_window", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}"):
        SAEConfig(**{field: value})


def test_a_config_cannot_be_changed_but_copied_with_changes():
    config = SAEConfig(k=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 8
    changed = config.replace(batch_size=32)
    assert (changed.k, changed.batch_size, config.batch_size) == (7, 32, 256)


def test_replace_checks_names_and_values():
    with pytest.raises(ValueError, match=r"\['momentum'\]; known are \["):
        SAEConfig().replace(momentum=0.9)
    with pytest.raises(ValueError, match="k must be"):
        SAEConfig().replace(k=0)


@pytest.mark.parametrize("value", [True, False])
def test_normalize_input_is_another_spelling(value):
    assert SAEConfig(normalize_input=value).normalize_activations is value


def test_plain_values_make_the_same_config_again():
    config = SAEConfig(k=3, normalize_input=False, dead_window=1000, lr_schedule="cosine")
    assert SAEConfig.from_dict(config.to_dict()) == config


def test_the_number_of_features_follows_the_width():
    assert SAEConfig(expansion_factor=16).n_features(128) == 2048
    assert SAEConfig(expansion_factor=1.5, k=1).n_features(3) == 4


def test_k_above_the_number_of_features_is_an_error_with_both():
    with pytest.raises(ValueError, match=r"k must be at most the number of features, 64.*got 100"):
        SAEConfig(expansion_factor=4, k=100).n_features(16)


@pytest.mark.parametrize("n_tokens", [1, 1000, 600_000, 10**9])
@pytest.mark.parametrize("d_in", [1, 6, 128, 2048, 16_384])
def test_a_recipe_exists_for_every_width_and_amount_of_data(d_in, n_tokens):
    config = SAEConfig.recommended(d_in, n_tokens)
    assert 1 <= config.k <= config.n_features(d_in)
    assert config.num_epochs >= 1


def test_the_other_spelling_of_normalisation_may_be_replaced_too():
    assert not SAEConfig().replace(normalize_input=False).normalize_activations
    assert (
        SAEConfig(normalize_activations=False).replace(normalize_input=True).normalize_activations
    )
