import dataclasses
import json

import pytest

from mlxterp.sae import SAEConfig

PENALISED = ("jumprelu", "relu", "gated")
SELECTING = ("topk", "batch_topk", "abs_topk")


def test_the_documented_defaults():
    config = SAEConfig()
    documented = {
        "expansion_factor": 16, "k": 100, "learning_rate": 1e-4, "batch_size": 256,
        "num_epochs": 10, "lambda_sparse": 0.0, "normalize_activations": True,
        "tied_weights": False, "dead_neuron_threshold": 1e-6, "resample_dead_every": 10_000,
        "warmup_steps": 1000, "gradient_clip": 1.0, "checkpoint_every": 5000,
        "validation_split": 0.05, "activation_function": "topk", "matryoshka_prefixes": (),
        "decoder_unit_norm": True, "precision": "float32",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in documented} == documented


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expansion_factor", 0), ("learning_rate", -1e-3), ("learning_rate", NAN),
        ("k", 0), ("k", 2.5), ("k", True), ("batch_size", 0), ("num_epochs", 0), ("log_every", 0),
        ("lambda_sparse", -1), ("auxiliary_coefficient", -0.1), ("resample_dead_every", -1),
        ("warmup_steps", -1), ("gradient_clip", -1), ("gradient_clip", INF),
        ("checkpoint_every", -1), ("checkpoints_kept", 0), ("validation_split", 1.0),
        ("validation_split", -0.1), ("dead_neuron_threshold", 1), ("lr_schedule", "sometimes"),
        ("dead_window", 0), ("validate_every", 0), ("validate_every", 1.5), ("bandwidth", 0),
        ("bandwidth", "wide"), ("initial_threshold", 0), ("initial_threshold", NAN),
        ("sparsity_warmup_steps", -1), ("k_anneal_steps", -1), ("k_anneal_steps", 0.5),
        ("bias_init", "median"), ("precision", "float16"), ("activation_function", "sigmoid"),
        ("activation_function", ["topk"]), ("seed", -1), ("seed", None),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_field_and_value(field, value):
    with pytest.raises(ValueError) as error:
        SAEConfig(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field} must be ") and message.endswith(f", got {value!r}.")


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("activation_function", ("abs_topk", "batch_topk", "gated", "jumprelu", "relu", "topk")),
        ("lr_schedule", ("constant", "cosine", "linear")),
        ("bias_init", ("geometric_median", "mean")),
        ("precision", ("bfloat16", "float32")),
    ],
)
def test_every_choice_is_taken_and_the_error_names_them_all(field, allowed):
    for value in allowed:
        assert getattr(SAEConfig(**{field: value}), field) == value
    with pytest.raises(ValueError) as error:
        SAEConfig(**{field: "other"})
    assert all(repr(value) in str(error.value) for value in allowed)


@pytest.mark.parametrize(
    "shares", [(0.0, 0.5), (0.5, 1.0), (0.5, 0.25), (0.25, 0.25), (-0.5,), (NAN,), ("a",), (True,)]
)
def test_prefixes_must_be_ascending_shares(shares):
    with pytest.raises(ValueError, match=r"matryoshka_prefixes must be ascending shares in \(0, 1"):
        SAEConfig(matryoshka_prefixes=shares)


@pytest.mark.parametrize("name", SELECTING)
def test_functions_that_select_take_no_target(name):
    with pytest.raises(ValueError, match="target_l0 must be None.*for functions whose L0 is k.*32"):
        SAEConfig(activation_function=name, target_l0=32)


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("target", [0, -1, NAN, "many"])
def test_a_target_must_be_above_zero(name, target):
    with pytest.raises(ValueError, match="target_l0 must be None or a number above 0"):
        SAEConfig(activation_function=name, target_l0=target)


@pytest.mark.parametrize(
    ("name", "penalties"),
    [
        ("jumprelu", {"l0", "l1", "tanh", "quadratic"}),
        *((name, {"l1", "tanh"}) for name in ("relu", "gated", *SELECTING)),
    ],
)
def test_each_activation_function_has_its_penalties(name, penalties):
    for penalty in ("l0", "l1", "tanh", "quadratic"):
        options = {"activation_function": name, "sparsity_penalty": penalty, "lambda_sparse": 0.1}
        if penalty in penalties:
            assert SAEConfig(**options).penalty == penalty
            continue
        with pytest.raises(ValueError, match="sparsity_penalty must be None or one of") as error:
            SAEConfig(**options)
        assert repr(name) in str(error.value) and repr(penalty) in str(error.value)


def test_the_usual_penalty_where_none_is_named():
    assert SAEConfig(activation_function="jumprelu").penalty in ("l0", "quadratic")
    assert SAEConfig(activation_function="jumprelu", lambda_sparse=0.1).penalty == "l0"
    for name in ("relu", "gated"):
        assert SAEConfig(activation_function=name).penalty == "l1"
    for name in SELECTING:
        assert SAEConfig(activation_function=name).penalty is None
        assert SAEConfig(activation_function=name, sparsity_penalty="tanh").penalty is None
        assert SAEConfig(activation_function=name, lambda_sparse=0.1).penalty == "l1"


@pytest.mark.parametrize("name", PENALISED)
def test_a_run_steers_to_its_target_unless_the_coefficient_is_given(name):
    steered = SAEConfig(activation_function=name, k=20, sparsity_penalty="tanh")
    assert steered.steers_l0 and steered.wanted_l0 == 20
    by_target = steered.replace(target_l0=12.5)
    assert by_target.steers_l0 and by_target.wanted_l0 == 12.5
    assert not steered.replace(lambda_sparse=0.1).steers_l0
    from_there = steered.replace(lambda_sparse=0.1, target_l0=12.5)
    assert from_there.steers_l0 and from_there.wanted_l0 == 12.5


def test_a_quadratic_penalty_and_functions_that_select_are_not_steered():
    quadratic = SAEConfig(activation_function="jumprelu", sparsity_penalty="quadratic", target_l0=9)
    assert not quadratic.steers_l0 and quadratic.wanted_l0 == 9
    for name in SELECTING:
        assert not SAEConfig(activation_function=name).steers_l0
        assert not SAEConfig(activation_function=name, lambda_sparse=0.1).steers_l0


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


@pytest.mark.parametrize(
    "config",
    [
        SAEConfig(k=3, normalize_input=False, dead_window=1000, lr_schedule="cosine"),
        SAEConfig(matryoshka_prefixes=(1 / 16, 1 / 4), k_anneal_steps=10, precision="bfloat16"),
        SAEConfig(activation_function="jumprelu", sparsity_penalty="quadratic", target_l0=7.5,
                  bandwidth=0.5, initial_threshold=0.25, decoder_unit_norm=False,
                  bias_init="geometric_median", validate_every=7, checkpoints_kept=5),
    ],
)  # fmt: skip
def test_plain_values_make_the_same_config_again_also_by_way_of_json(config):
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    for again in (values, json.loads(json.dumps(values))):
        found = SAEConfig.from_dict(again)
        assert found == config and hash(found) == hash(config)
        assert isinstance(found.matryoshka_prefixes, tuple)


def test_the_number_of_features_follows_the_width():
    assert SAEConfig(expansion_factor=16).n_features(128) == 2048
    assert SAEConfig(expansion_factor=1.5, k=1).n_features(3) == 4


def test_more_active_features_than_there_are_is_an_error_with_both():
    with pytest.raises(ValueError, match=r"k must be at most the number of features, 64.*got 100"):
        SAEConfig(expansion_factor=4, k=100).n_features(16)
    target = SAEConfig(activation_function="relu", expansion_factor=4, target_l0=65)
    with pytest.raises(ValueError, match=r"target_l0 must be at most .* 64 .*x width 16.*got 65"):
        target.n_features(16)


@pytest.mark.parametrize("n_tokens", [1, 1000, 600_000, 10**9])
@pytest.mark.parametrize("d_in", [1, 6, 128, 2048, 16_384])
def test_a_recipe_exists_for_every_width_and_amount_of_data(d_in, n_tokens):
    config = SAEConfig.recommended(d_in, n_tokens)
    assert 1 <= config.k <= config.n_features(d_in)
    assert config.num_epochs >= 1


def test_the_rest_of_the_recipe_goes_with_the_settings_that_are_given():
    usual = SAEConfig.recommended(128, 600_000)
    assert (usual.num_epochs, usual.batch_size, usual.learning_rate) == (5, 1024, 6e-3)
    # A quarter of the tokens: smaller batches, and a rate that falls with the root of their size.
    fewer = SAEConfig.recommended(128, 600_000, num_epochs=1, k=9)
    assert (fewer.batch_size, fewer.learning_rate, fewer.k) == (256, 3e-3, 9)
    # And with the root of the number of features.
    wider = SAEConfig.recommended(128, 600_000, expansion_factor=64)
    assert wider == usual.replace(expansion_factor=64, learning_rate=3e-3)
    assert SAEConfig.recommended(128, 600_000, learning_rate=1.0).learning_rate == 1.0


def test_the_other_spelling_of_normalisation_may_be_replaced_too():
    assert not SAEConfig().replace(normalize_input=False).normalize_activations
    assert (
        SAEConfig(normalize_activations=False).replace(normalize_input=True).normalize_activations
    )
