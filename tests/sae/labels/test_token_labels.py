from dataclasses import replace

import numpy as np
import pytest

from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.collection import collect
from mlxterp.sae.labels.contexts import Split
from mlxterp.sae.labels.labels import FeatureLabels, Label
from mlxterp.sae.labels.token_labels import token_labels
from tests.sae.labels.planted import LETTERS, planted, random_texts


def test_planted_features_are_labelled_by_their_letters():
    data = planted()
    labels = token_labels(data)
    for feature, letter in enumerate(LETTERS):
        label = labels[feature]
        assert label.text == f"'{letter}'" and label.source == "tokens"
        assert label.tokens.balanced_accuracy == label.tokens.f1 == 1
        assert label.tokens.base_rate == pytest.approx(1 / 32, rel=0.3)
        assert label.control.f1 == 0 and 0.45 < label.control.balanced_accuracy < 0.5
        assert label.rules[0].token == letter and label.rules[0].share == 1
    assert 0.45 < labels.means["control"].value < 0.5


def codes_of(codes, *rows_of_features) -> SparseCodes:
    """Codes of the same tokens, on which features fire as is said."""
    rows = np.concatenate(rows_of_features)
    features = np.repeat(np.arange(len(rows_of_features)), [len(rows) for rows in rows_of_features])
    order = np.lexsort((features, rows))
    starts = np.append(0, np.cumsum(np.bincount(rows, minlength=codes.n_tokens)))
    values, n = np.ones(len(rows), np.float16), codes.n_features
    return SparseCodes(codes.contexts, codes.positions, starts, features[order], values, 1.0, n)


def test_features_of_pairs_and_of_previous_tokens_are_told_apart():
    data = planted()
    after = data.codes.of(0)[0] + 1
    after = after[after < data.codes.n_tokens]
    both = np.intersect1d(after, data.codes.of(1)[0])
    changed = replace(data, codes=codes_of(data.codes, after, both))
    labels = token_labels(changed, [0])
    assert labels[0].text == "any token after 'a'" and labels[0].tokens.f1 > 0.9
    only_tokens = token_labels(changed, [0], kinds=("token",))
    assert only_tokens[0].tokens.f1 < 0.2
    assert token_labels(changed, [1])[1].text == "'b' after 'a'"


def test_labels_of_the_bundled_model_predict_and_those_of_others_do_not(sae):
    labels = token_labels(collect(sae, sae._training_data))
    means = labels.means
    assert means["tokens F1"].value > 0.4 and means["tokens"].value > 0.65
    assert means["control"].value == pytest.approx(0.5, abs=0.02)
    control = np.mean([labels[i].control.f1 for i in labels if labels[i].control])
    assert control < 0.1 * means["tokens F1"].value


def test_labels_by_others_stay_and_dead_features_have_none():
    data = planted(a=3, b=2)
    labels = FeatureLabels(6)
    labels.set(0, "mine")
    labels.add(1, Label("by a judge", "judge"))
    found = token_labels(data, labels=labels)
    assert found is labels and list(labels) == [0, 1]
    assert labels.texts == {0: "mine", 1: "by a judge"}
    assert [label.text for label in labels.of(1)] == ["by a judge", "'b'"]
    before = labels.of(0)
    token_labels(data, labels=labels)
    assert set(map(repr, labels.of(0))) == set(map(repr, before))


def test_features_that_fire_in_one_half_alone_are_said_to():
    texts = [text.replace("a", "z").replace("b", "y") for text in random_texts(20)]
    split = Split.of(planted(texts).corpus)
    made, scored = np.flatnonzero(~split.scored), np.flatnonzero(split.scored)
    # Which half a text is in depends on its content: several are tried.
    for i in range(100):
        changed = list(texts)
        changed[made[i % len(made)]] += "b" * (3 + i // len(made))
        changed[scored[i % len(scored)]] += "a" * (3 + i // len(scored))
        data = planted(changed, a=1, b=1, c=1)
        now = Split.of(data.corpus).scored
        if not now[made[i % len(made)]] and now[scored[i % len(scored)]]:
            break
    labels = token_labels(data)
    assert labels.failures == {0: "it fires on none of the documents that labels are made from"}
    assert 0 not in labels and labels[1].tokens is None and labels[1].text == "'b'"
    assert labels[2].tokens.f1 == 1


def test_bad_settings_are_named():
    data = planted()
    with pytest.raises(ValueError, match=r"kinds must be some of \['token', 'previous', 'pair'\]"):
        token_labels(data, kinds=("word",))
    with pytest.raises(ValueError, match=r"features must be in \[0, 5\]"):
        token_labels(data, [3, 6])
    without = replace(data, source=None)
    with pytest.raises(ValueError, match=r"sae\.bind\(model\)"):
        token_labels(without)
    assert len(token_labels(data, [])) == 0
