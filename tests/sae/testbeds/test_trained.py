import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.testbeds.repetition import repetition_accuracy, repetitions
from mlxterp.sae.testbeds.trained import LENGTH, PERIODS, TrainedInduction, _batch, train_induction

PERIOD = 12


@pytest.fixture(scope="module")
def found() -> TrainedInduction:
    return train_induction()


@pytest.fixture(scope="module")
def model(found) -> InterpretableModel:
    return InterpretableModel(found.model, found.tokenizer)


@pytest.fixture(scope="module")
def tokens(found) -> np.ndarray:
    return found.sequences(32, PERIOD, seed=5)


def accuracy_without(model: InterpretableModel, tokens: np.ndarray, *sites: str) -> float:
    """How much is foreseen in the second half where what these sites write is taken away."""
    edit = {site: lambda x: mx.zeros_like(x) for site in sites}
    foreseen = np.array(model.run(mx.array(tokens), edit=edit).output).argmax(axis=-1)
    return float((foreseen[:, PERIOD + 1 : -1] == tokens[:, PERIOD + 2 :]).mean())


def test_the_model_learns_to_go_on_with_what_repeats(found):
    assert found.accuracy > 0.98 and len(found.losses) == 240
    assert found.losses[:5].mean() > 3 and found.losses[-20:].mean() < 0.1
    assert repr(found) == f"TrainedInduction(32 words, accuracy={found.accuracy:.3f})"
    assert not found.model.training


@pytest.mark.parametrize("period", [4, 8, 12, 18])
def test_it_does_so_at_periods_that_it_never_saw_as_well(found, period):
    assert repetition_accuracy(found.model, found.sequences(64, period, seed=7), period) > 0.95


def test_heads_of_layer_1_look_behind_the_same_token(model, tokens):
    patterns = model.attention(mx.array(tokens))
    queries = np.arange(PERIOD + 1, 2 * PERIOD + 1)
    scores = []
    for layer in (0, 1):
        pattern = np.array(patterns[layer].pattern)
        scores.append(pattern[:, :, queries, queries - PERIOD + 1].mean(axis=(0, 2)))
    assert scores[1].max() > 0.8 and scores[0].max() < 0.1


def test_a_head_of_layer_0_looks_at_the_token_before(model, tokens):
    pattern = np.array(model.attention(mx.array(tokens), 0)[0].pattern)
    places = np.arange(1, tokens.shape[1])
    assert pattern[:, :, places, places - 1].mean(axis=(0, 2)).max() > 0.4


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_does_it_and_no_mlp(model, tokens, layer):
    assert accuracy_without(model, tokens) > 0.98
    assert accuracy_without(model, tokens, f"layers.{layer}.attn_out") < 0.2
    assert accuracy_without(model, tokens, f"layers.{layer}.mlp_out") > 0.9


def test_a_seed_decides_and_no_other_random_state(capsys):
    first = train_induction(20, 31, seed=3)
    assert capsys.readouterr().err == ""
    mx.random.seed(5)
    again = train_induction(20, 31, seed=3, verbose=True)
    assert "induction: 100%" in capsys.readouterr().err
    np.testing.assert_allclose(again.losses, first.losses, rtol=1e-5)
    other = train_induction(20, 31, seed=4)
    assert np.abs(other.losses - first.losses).max() > 0.01
    assert other.tokenizer.vocab_size == 20 and 0 < other.accuracy < 0.5
    unseen = repetitions(64, 20, PERIODS[1], seed=5)
    assert other.accuracy == repetition_accuracy(other.model, unseen, PERIODS[1])


def test_training_counts_only_what_can_be_foreseen():
    tokens, counts = (np.array(a) for a in _batch(np.random.default_rng(0), 32))
    assert tokens.shape == (32, 1 + LENGTH) and counts.shape == (32, LENGTH)
    found = set()
    for row, count in zip(tokens, counts, strict=True):
        period = int(np.argmax(row[2:] == row[1])) + 1
        found.add(period)
        assert row[0] == 0 and len(set(row[1 : period + 1])) == period
        np.testing.assert_array_equal(row[1 + period :], row[1:-period])
        # The first token of the second period comes as a surprise; those behind it do not.
        np.testing.assert_array_equal(count, np.arange(LENGTH) > period)
    assert min(found) >= PERIODS[0] and max(found) <= PERIODS[1] and len(found) > 6


def test_settings_that_cannot_train_are_errors():
    with pytest.raises(ValueError, match="n_words must be >= 17, got 16"):
        train_induction(16)
    with pytest.raises(ValueError, match="n_steps must be > 30, got 30"):
        train_induction(n_steps=30)
