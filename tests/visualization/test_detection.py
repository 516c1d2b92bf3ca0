"""Heads that are known are found, others are not."""

import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.visualization import (
    AttentionPatternDetector,
    HeadScore,
    detect_head_types,
    detect_induction_heads,
    find_attention_pattern,
    induction_score,
    previous_token_score,
)
from mlxterp.visualization.sampling import repeated_tokens
from tests.pages import checked
from tests.tiny_models import build

TEXT = "def add(first, second):\n    return first + second\n\ndef add(first, second):"


def test_the_heads_of_a_model_written_by_hand_are_found(handmade):
    found = detect_induction_heads(handmade)
    assert [(head.layer, head.head, head.head_type) for head in found] == [(1, 0, "induction")]
    assert found[0].score > 0.99 and found.every[0, 0] < 0.01
    types = detect_head_types(handmade, handmade.decode(range(1, 12)))
    assert types["previous_token"] == [(0, 0)] and types["induction"] == [(1, 0)]
    assert types["first_token"] == [(1, 0)] and types["unknown"] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_heads_of_a_trained_model_are_found(trained, seed):
    found = detect_induction_heads(trained, n_random_tokens=12, seed=seed)
    assert {(head.layer, head.head) for head in found} == {(1, 0), (1, 1)}
    assert found[0].score >= found[1].score > 0.8
    assert all(found.every[0, head] < 0.1 for head in (0, 1))


def test_all_types_of_a_trained_model(trained):
    text = trained.decode(np.random.default_rng(0).permutation(31)[:24] + 1)
    types = detect_head_types(trained, text, copying=True, n_random_tokens=12)
    assert types["previous_token"] == [(0, 1)]
    assert types["induction"] == types["copying"] == [(1, 0), (1, 1)]
    assert types["duplicate_token"] == []
    assert types.thresholds["copying"] == 0.9 and types.thresholds["induction"] == 0.4
    assert detect_head_types(trained, text, induction=False).keys() == {
        "previous_token", "first_token", "current_token", "duplicate_token", "unknown",
    }  # fmt: skip


def test_scores_are_those_of_the_attention_of_the_same_tokens(trained):
    tokens, period = repeated_tokens(trained, 10, 3, 2, seed=7)
    assert tokens.shape == (2, 31) and period == 10
    found = detect_induction_heads(trained, 10, 3, seed=7, n_sequences=2, threshold=-1)
    assert len(found) == 4
    for head in found:
        pattern = np.array(trained.attention(tokens)[head.layer].pattern)[:, head.head]
        expected = [
            pattern[row, 1 + t, 1 + t - period + 1] for row in (0, 1) for t in range(period, 30)
        ]
        assert head.score == pytest.approx(np.mean(expected), abs=1e-6)


def test_tokens_repeat_themselves_and_none_is_special(demo):
    tokens, period = repeated_tokens(demo, 40, 2, 3, seed=1)
    assert tokens.shape == (3, 81) and period == 40
    assert (tokens[:, 0] == demo.tokenizer.bos_token_id).all()
    np.testing.assert_array_equal(tokens[:, 1:41], tokens[:, 41:])
    assert not set(tokens[:, 1:].ravel().tolist()) & demo.special_token_ids
    assert all(len(set(row)) == 40 for row in tokens[:, 1:41].tolist())
    again, _ = repeated_tokens(demo, 40, 2, 3, seed=1)
    other, _ = repeated_tokens(demo, 40, 2, 3, seed=2)
    assert (again == tokens).all() and (other != tokens).any()


def test_models_without_a_tokenizer_and_of_mixed_layers():
    found = detect_induction_heads(InterpretableModel(build("jamba")), 20, n_sequences=2)
    assert found == [] and {layer for layer, _ in found.every} == {1, 3}
    with pytest.raises(ValueError, match="no softmax attention"):
        detect_induction_heads(InterpretableModel(build("rwkv7")), 20)


def test_a_small_vocabulary_has_a_shorter_period(handmade):
    tokens, period = repeated_tokens(handmade, 50, 2, 1, seed=0)
    assert period == 11 and sorted(tokens[0, 1:12]) == [*range(1, 12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_random_tokens": 1}, "n_random_tokens must be >= 2, not 1"),
        ({"n_repeats": 1}, "n_repeats must be >= 2"),
        ({"n_sequences": 0}, "n_sequences must be >= 1"),
        ({"n_random_tokens": 3000}, r"must fit into the context of \d+ tokens"),
        ({"layers": [17]}, "layers must be of -6 to 5"),
    ],
)
def test_what_cannot_be_looked_for_is_an_error(demo, options, message):
    with pytest.raises(ValueError, match=message):
        detect_induction_heads(demo, **options)


def test_a_text_gives_the_scores_of_its_patterns(demo):
    types = detect_head_types(demo, TEXT, layers=[1, 2])
    ids = demo.encode(TEXT)
    for layer in (1, 2):
        pattern = np.array(demo.attention(TEXT, layer)[layer].pattern)[0]
        for head in range(4):
            own = types.scores["previous_token"][layer, head]
            assert own == pytest.approx(np.diagonal(pattern[head], -1).mean(), abs=1e-6)
            sums = [
                sum(pattern[head, t, s] for s in range(t) if ids[s] == ids[t])
                for t in range(len(ids))
                if ids[t] in ids[:t]
            ]
            assert types.scores["duplicate_token"][layer, head] == pytest.approx(
                np.mean(sums), abs=1e-6
            )
    placed = {place for name, places in types.items() for place in places}
    assert placed == {(layer, head) for layer in (1, 2) for head in range(4)}
    assert (1, 3) in types["previous_token"]


def test_several_texts_at_once_are_refused(demo):
    for call in (detect_head_types, lambda *a: find_attention_pattern(*a, previous_token_score)):
        with pytest.raises(ValueError, match="text must be one text, not 2"):
            call(demo, ["one", "two"])


def test_any_function_of_a_pattern_finds_heads(demo):
    found = find_attention_pattern(demo, TEXT, previous_token_score, threshold=0.5)
    assert {(head.layer, head.head) for head in found} >= {(1, 3)}
    assert all(head.score > 0.5 and head.head_type == "custom" for head in found)
    assert [head.score for head in found] == sorted((h.score for h in found), reverse=True)
    assert len(found.every) == 24
    assert find_attention_pattern(demo, TEXT, lambda p: p.shape[0] / 100, layers=0) == []
    with pytest.raises(ValueError, match="must return a finite number, not nan"):
        find_attention_pattern(demo, TEXT, lambda p: np.nan)


def test_a_detector_names_a_head_by_its_thresholds():
    t = np.arange(8)
    inducing, before = np.eye(8)[np.maximum(t - 3, 0)], np.eye(8)[np.maximum(t - 1, 0)]
    detector = AttentionPatternDetector(first_token_threshold=0.6)
    expected = {"previous_token": 1 / 7, "first_token": 1 / 2, "current_token": 1 / 8}
    assert detector.analyze_head(inducing) == pytest.approx(expected)
    assert detector.analyze_head(inducing, 4) == pytest.approx(expected | {"induction": 1})
    assert detector.classify_head(inducing, 4) == ["induction"]
    assert detector.classify_head(inducing) == ["unknown"]
    assert AttentionPatternDetector().classify_head(inducing, 4) == ["first_token", "induction"]
    assert detector.classify_head(before, 4) == ["previous_token"]
    again = np.eye(8)[np.maximum(t - 4, 0)]
    assert detector.classify_head(again, 4, tokens="abcdabcd") == ["first_token", "duplicate_token"]
    both = detector.analyze_head(np.stack([inducing, before]), 4)
    assert both["induction"].tolist() == [1.0, induction_score(before, 4)]
    with pytest.raises(ValueError, match=r"\[B, H, S, T\]|shape"):
        detector.classify_head(np.stack([inducing, before]))


def test_results_can_be_seen_and_kept(demo, trained):
    found = detect_induction_heads(trained, 12)
    assert isinstance(found, list) and isinstance(found[0], HeadScore) and len(found[:1]) == 1
    assert "induction: 2 of 4 heads above 0.4" in repr(found)
    assert "1.1" in checked(found._repr_html_()).text
    kept = found.to_dict()
    assert kept["heads"][0]["score"] == found[0].score and set(kept["every"]) == {
        "0.0", "0.1", "1.0", "1.1",
    }  # fmt: skip
    image = found.plot().axes[0].get_images()[0].get_array()
    assert image.shape == (2, 2) and image[0].min() > 0.8 > 0.1 > image[1].max()
    types = detect_head_types(demo, TEXT)
    assert "previous_token" in repr(types) and "1.3" in checked(types._repr_html_()).text
    assert types.to_dict()["heads"]["previous_token"] == [[1, 1], [1, 3], [2, 1]]
    assert types.plot().axes[0].get_images()[0].get_array().shape == (5, 24)
