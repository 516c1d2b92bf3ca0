import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.testbeds.induction import Induction, InductionStep, induction
from mlxterp.sae.testbeds.repetition import repetition_accuracy, repetitions
from tests.sae.testbeds.reference import forward

SITES = ("mlp_in", "mlp_out", "resid_post")


@pytest.fixture(scope="module")
def found() -> Induction:
    return induction()


@pytest.fixture(scope="module")
def model(found) -> InterpretableModel:
    return InterpretableModel(found.model, found.tokenizer)


def codes(n_words: int, tokens: np.ndarray, pattern: np.ndarray) -> dict[str, np.ndarray]:
    """The features by their meaning `[S, n_words]`, from the pattern of the second head."""
    here, before = np.eye(n_words)[tokens], np.eye(n_words)[[tokens[0], *tokens[:-1]]]
    taken = pattern @ here * (np.arange(n_words) > 0)
    return {"here": here, "before": before, "next": np.maximum(2 * taken - 1, 0)}


@pytest.mark.parametrize(
    ("n_words", "match", "period"), [(12, 16, 6), (12, 16, 11), (3, 8, 2), (32, 8, 31), (32, 64, 9)]
)
def test_every_token_of_the_second_half_is_foreseen(n_words, match, period):
    found = induction(n_words, match=match)
    tokens = found.sequences(20, period, seed=3)
    assert repetition_accuracy(found.model, tokens, period) == 1.0
    logits = np.array(found.model(mx.array(tokens)))
    others = np.sort(logits, axis=-1)[:, period + 1 :, :-1]
    assert (logits[:, period + 1 :].max(axis=-1) > 0.85 * found.logit).all()
    np.testing.assert_allclose(others, 0, atol=1e-3)


def test_nothing_is_foreseen_before_the_repetition(found):
    logits = np.array(found.model(mx.array(found.sequences(20))))
    np.testing.assert_allclose(logits[:, :7], 0, atol=1e-3)


def test_the_first_head_looks_at_the_token_before(found, model):
    tokens = repetitions(2, found.n_words, 6, length=511, seed=1)
    pattern = np.array(model.attention(mx.array(tokens), 0)[0].pattern)[:, 0]
    expected = np.eye(512, k=-1)
    expected[0, 0] = 1
    np.testing.assert_allclose(pattern, np.broadcast_to(expected, pattern.shape), atol=1e-6)


def test_the_second_head_looks_behind_the_same_token_or_rests_at_the_first(found, model):
    tokens = found.sequences(8)
    pattern = np.array(model.attention(mx.array(tokens), 1)[1].pattern)[:, 0]
    looks = np.zeros((13, 13))
    looks[range(7), 0] = 1
    looks[range(7, 13), range(2, 8)] = 1
    np.testing.assert_allclose(pattern, np.broadcast_to(looks, pattern.shape), atol=0.003)


def test_scores_are_those_of_the_docstring(found, model):
    tokens = found.sequences(8)
    scores = np.array(model.attention(mx.array(tokens), 1)[1].scores)[:, 0]
    for row, ids in zip(scores, tokens, strict=True):
        for query, key in np.ndindex(13, 13):
            if key <= query:
                match = ids[query] == ids[max(0, key - 1)]
                assert row[query, key] == found.match * match + found.match / 2 * (key == 0)


@pytest.mark.parametrize("match", [8, 16, 40.5])
def test_scores_are_sums_over_pairs_of_features(match):
    found = induction(match=match)
    tokens = mx.array(np.random.default_rng(0).integers(0, found.n_words, (6, 20)))
    model = InterpretableModel(found.model, found.tokenizer)
    scores = np.array(model.attention(tokens, 1)[1].scores)[:, 0]
    code = np.array(found.saes[0].encode(model.run(tokens, capture="layers.0.resid_post")[0]))
    expected = code @ found.pair_scores @ code.swapaxes(1, 2)
    seen = np.tri(20, dtype=bool)
    np.testing.assert_allclose(scores[:, seen], expected[:, seen], rtol=1e-6)
    assert len(np.unique(expected[:, seen])) == 4  # 0, the rest, a match and both


def test_features_mean_what_the_docstring_says(found, model):
    for tokens in found.sequences(5, seed=4):
        held = model.run(
            tokens.tolist(), capture=[f"layers.{i}.{s}" for i in (0, 1) for s in SITES]
        )
        reference = forward(found.model, tokens)
        code = codes(found.n_words, tokens, reference["layers.1.pattern"])
        first = np.concatenate([code["here"], code["before"]], axis=1)
        second = np.concatenate([first, code["next"]], axis=1)
        for layer, expected in enumerate((first, second)):
            x = held[f"layers.{layer}.resid_post"][0]
            np.testing.assert_allclose(x, reference[f"layers.{layer}.resid_post"], atol=1e-6)
            np.testing.assert_allclose(found.saes[layer].encode(x), expected, atol=1e-6)
        for layer, name in enumerate(("before", "next")):
            coder = found.transcoders[layer]
            z = coder.encode(held[f"layers.{layer}.mlp_in"][0])
            np.testing.assert_allclose(z, code[name], atol=1e-6)
            np.testing.assert_allclose(
                coder.decode(z), held[f"layers.{layer}.mlp_out"][0], atol=1e-6
            )
        np.testing.assert_allclose(reference["logits"], found.logit * code["next"], atol=1e-5)


@pytest.mark.parametrize(("match", "error"), [(16, 12 * np.exp(-8)), (64, 1e-7)])
def test_saes_have_no_error_but_what_leaks(match, error):
    found = induction(match=match)
    model = InterpretableModel(found.model, found.tokenizer)
    held = model.run(
        mx.array(found.sequences(8)), capture=["layers.0.resid_post", "layers.1.resid_post"]
    )
    for layer, most in enumerate((0, error)):
        x = held[f"layers.{layer}.resid_post"]
        sae = found.saes[layer]
        assert np.abs(np.array(sae.decode(sae.encode(x)) - x)).max() <= most


def test_steps_are_what_happens(found, model):
    for tokens in found.sequences(6, period=5, seed=8):
        held = model.run(tokens.tolist(), capture=["layers.0.resid_post", "layers.1.resid_post"])
        first, second = (np.array(found.saes[i].encode(held[i][0])) for i in (0, 1))
        pattern = np.array(model.attention(tokens.tolist(), 1)[1].pattern)[0, 0]
        foreseen = np.array(held.output)[0].argmax(axis=-1)
        for position in range(6, 11):
            step = found.step(tokens, position)
            assert step == found.step(tokens, position - 11) and step.query == position
            assert step.key == pattern[position].argmax() == position - 4
            features = (first[step.key, step.key_feature], first[step.key, step.value_feature])
            assert (first[step.query, step.query_feature], *features) == (1, 1, 1)
            assert found.pair_scores[step.query_feature, step.key_feature] == found.match
            assert second[position, step.output_feature] > 0.99
            assert step.token == foreseen[position]
            # Without this feature at the key, the head does not find it.
            x = mx.array(held["layers.0.resid_post"])
            x[0, step.key] -= found.saes[0].W_dec[step.key_feature]
            edit = {"layers.0.resid_post": lambda _, x=x: x}
            without = np.array(model.run(tokens.tolist(), edit=edit).output)[0, position]
            assert without[step.token] < 0.01 * found.logit


def test_a_step_by_hand(found):
    assert found.step([0, 4, 7, 2, 4]) == InductionStep(4, 2, 4, 12 + 4, 7, 24 + 7, 7)
    assert found.step([0, 4, 7, 4, 2], -2) == InductionStep(3, 2, 4, 12 + 4, 7, 24 + 7, 7)
    assert found.step([0, 4, 4]) == InductionStep(2, 2, 4, 12 + 4, 4, 24 + 4, 4)


def test_texts_and_tokens_are_the_same(found, model):
    ids = found.tokenizer.encode("word4 word7 word2 word4")
    assert ids == [0, 4, 7, 2, 4] and model.decode(ids) == "<s> word4 word7 word2 word4"
    assert model.special_token_ids == {0} and model.vocab_size == found.n_words
    assert repr(found) == "Induction(12 words, match=16.0, logit=20.0)"
    logits = model.run("word4 word7 word2 word4").output
    assert logits[0, -1].argmax().item() == found.step(ids).token


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_words": 2}, r"n_words must be in \[3, 32\], got 2"),
        ({"n_words": 33}, r"n_words must be in \[3, 32\], got 33"),
        ({"match": 7.5}, r"match must be in \[8, 1024\], got 7.5"),
        ({"match": np.nan}, r"match must be in \[8, 1024\], got nan"),
        ({"logit": 0}, r"logit must be in \(0, 1024\], got 0"),
        ({"logit": np.inf}, r"logit must be in \(0, 1024\], got inf"),
    ],
)
def test_circuits_that_would_not_work_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        induction(**given)


@pytest.mark.parametrize(
    ("tokens", "position", "message"),
    [
        ([0, 1, 2, 3], -1, r"the one at position 3 must be another .* got \[0, 1, 2, 3\]"),
        ([0, 1, 1, 1], -1, "must be another that has occurred once before"),
        ([0, 1, 2, 1], 2, r"the one at position 2 .* got \[0, 1, 2\]"),
        ([1, 2, 1], -1, r"tokens must begin with 0, .* got \[1, 2, 1\]"),
        ([0, 1, 0], -1, "the one at position 2 must be another"),
        ([0, 1, 1], 3, r"position must be in \[-3, 2\], got 3"),
        ([0, 1, 12, 1], -1, r"tokens must be in \[0, 11\], got"),
        ([], -1, "tokens must be one sequence of token ids"),
    ],
)
def test_positions_where_nothing_is_foreseen_are_errors(found, tokens, position, message):
    with pytest.raises(ValueError, match=message):
        found.step(tokens, position)
