"""Fits are those of scikit-learn, planted labels are found, and shuffled ones are not."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis.probe_data import held_out, shuffled
from mlxterp.analysis.probe_fits import fit, score
from mlxterp.analysis.site_rows import rows_at
from tests.pages import checked

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "analysis" / "probes.npz")
NOUNS = [
    "list", "string", "number", "object", "method", "module", "value", "file", "key", "type",
    "class", "name", "function", "set", "tuple", "iterator", "exception", "argument", "attribute",
    "line",
]  # fmt: skip
ERROR = [f"The {noun} is not found and an error is raised" for noun in NOUNS]
FOUND = [f"A {noun} was found, so that it is returned" for noun in NOUNS]
TEXTS, LABELS = ERROR + FOUND, ["error"] * len(NOUNS) + ["found"] * len(NOUNS)


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("method", ["logistic", "ridge"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_decisions_are_those_of_scikit_learn(shape, method, n_classes):
    x, y = GOLDEN[f"{shape}_x"], GOLDEN[f"{shape}_y"]
    y = y if n_classes == 3 else (y == 1).astype(int)
    decisions = fit(x, y, n_classes, method, l2=2.0).decide(x)
    expected = GOLDEN[f"{shape}_{method}_{n_classes}"].reshape(len(x), -1)
    np.testing.assert_allclose(decisions, expected, atol=2e-5)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_mean_difference_is_the_nearest_mean(shape):
    x, y = GOLDEN[f"{shape}_x"], GOLDEN[f"{shape}_y"]
    made = fit(x, y, 3, "mean_difference", 1.0)
    assert (made.classify(made.decide(x)) == GOLDEN[f"{shape}_mean_difference_3"]).all()
    two = (y == 1).astype(int)
    made = fit(x, two, 2, "mean_difference", 1.0)
    means = [x[two == k].mean(axis=0) for k in (0, 1)]
    np.testing.assert_allclose(made.weights[0], means[1] - means[0], atol=1e-12)
    np.testing.assert_allclose(made.decide(np.array([sum(means) / 2])), 0, atol=1e-12)


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_ridge_is_least_squares(shape, l2):
    x, y = GOLDEN[f"{shape}_x"], (GOLDEN[f"{shape}_y"] == 1).astype(int)
    u, t = (x - x.mean(axis=0)) / x.std(axis=0), np.where(y == 1, 1.0, -1.0)
    rows = np.concatenate([u, np.sqrt(l2) * np.eye(u.shape[1])])
    w = np.linalg.lstsq(rows, np.append(t - t.mean(), np.zeros(u.shape[1])), rcond=None)[0]
    found = fit(x, y, 2, "ridge", l2).decide(x)[:, 0]
    np.testing.assert_allclose(found, u @ w + t.mean(), atol=1e-8)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_scores_are_those_of_scikit_learn(shape):
    x, y = GOLDEN[f"{shape}_x"], GOLDEN[f"{shape}_y"]
    for n_classes, labels in ((2, (y == 1).astype(int)), (3, y)):
        made = fit(x, labels, n_classes, "ridge", 2.0)
        found = score(made, x, labels, np.arange(len(x)), labels, [0.5, 0.7])
        assert found.f1 == pytest.approx(float(GOLDEN[f"{shape}_f1_{n_classes}"]), abs=1e-9)
        assert (found.shuffled, found.shuffled_max) == (pytest.approx(0.6), 0.7)
        assert found.accuracy == (made.classify(made.decide(x)) == labels).mean()
        assert found.majority == np.bincount(labels).max() / len(labels)
        auc = pytest.approx(float(GOLDEN[f"{shape}_auc_2"])) if n_classes == 2 else None
        assert found.auc == auc


def test_the_interval_counts_texts_where_their_tokens_are_alike():
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.8
    made = fit(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2, "mean_difference", 1.0)

    def interval(said, groups):
        x = np.where(said, 1.0, -1.0)[:, None]
        return score(made, x, np.ones(len(x), int), groups, np.array([0, 1]), [0.5]).interval

    alone = interval(right, np.arange(40))
    p, z = right.mean(), 1.959964
    middle = (p + z * z / 80) / (1 + z * z / 40)
    half = z / (1 + z * z / 40) * np.sqrt(p * (1 - p) / 40 + (z / 80) ** 2)
    np.testing.assert_allclose(alone, (middle - half, middle + half), atol=1e-5)
    # Ten tokens of each text that are right or wrong together tell no more than one.
    np.testing.assert_allclose(interval(np.repeat(right, 10), np.repeat(np.arange(40), 10)), alone)
    # Ten that are drawn one by one tell as much as ten texts, about.
    wide = np.diff(interval(rng.random(400) < 0.8, np.repeat(np.arange(40), 10)))
    assert 0.25 < float(wide[0] / np.diff(alone)[0]) < 0.6


@pytest.mark.parametrize("method", ["logistic", "ridge", "mean_difference"])
def test_what_is_in_the_texts_is_read_and_shuffled_labels_are_not(demo, method):
    probe = demo.train_probe(TEXTS, LABELS, 3, position="mean", method=method)
    found = probe.score
    assert probe.classes == ("error", "found") and str(probe.site) == "layers.3.resid_post"
    assert (found.n_train, found.n_test, found.n_test_groups) == (30, 10, 10)
    assert found.accuracy == found.auc == found.f1 == 1 and found.majority == 0.5
    assert 0.2 < found.shuffled < 0.8
    assert probe.predict(TEXTS) == LABELS
    assert probe.predict(TEXTS[0]) == LABELS[:1]
    assert probe.direction.shape == (128,)
    assert mx.linalg.norm(probe.direction).item() == pytest.approx(1, abs=1e-5)
    rows = rows_at(demo, TEXTS, [probe.site], "mean")[probe.site]
    assert probe.predict(rows) == probe.predict(mx.array(rows.astype(np.float32))) == LABELS
    vector = probe.steering_vector
    along = np.array(vector.project(mx.array(rows.astype(np.float32))))
    decisions = probe.decisions(rows)
    scale = np.linalg.norm(probe.weights)
    np.testing.assert_allclose(along * scale + probe.bias[0], decisions, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_control_learns_shuffled_labels_and_is_judged_on_shuffled_labels(demo, seed):
    probe = demo.train_probe(TEXTS, LABELS, 3, method="mean_difference", seed=seed)
    x = rows_at(demo, TEXTS, [probe.site], -1)[probe.site]
    y, texts, rng = (
        np.repeat([0, 1], len(NOUNS)),
        np.arange(len(TEXTS)),
        np.random.default_rng(seed),
    )
    test = np.isin(texts, held_out(y, texts, 0.25, rng))
    expected = []
    for _ in range(5):
        other = shuffled(y, texts, test, rng)
        means = [x[~test & (other == k)].mean(axis=0) for k in (0, 1)]
        distances = [np.square(x[test] - mean).sum(axis=1) for mean in means]
        expected.append(((distances[1] < distances[0]) == other[test]).mean())
    assert probe.score.shuffled == pytest.approx(np.mean(expected))
    assert probe.score.shuffled_max == max(expected)


def test_random_labels_are_read_at_chance(demo):
    rng = np.random.default_rng(1)
    texts = [f"The {noun} {i} is not found" for i in range(8) for noun in NOUNS]
    labels = rng.integers(0, 2, len(texts)).tolist()
    probe = demo.train_probe(texts, labels, 2, "mlp", method="ridge", l2=10.0)
    low, high = probe.score.interval
    assert low < 0.5 < high and 0.35 < probe.score.shuffled < 0.65


def test_a_direction_that_is_planted_in_the_activations_is_found(demo):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=128)
    direction /= np.linalg.norm(direction)
    texts = [f"The {noun} {i} is not found" for i in range(8) for noun in NOUNS]
    site, y = demo.site(3), rng.integers(0, 2, len(texts))
    x = rows_at(demo, texts, [site], -1)[site] + 6.0 * np.outer(2 * y - 1, direction)
    for method in ("logistic", "ridge"):
        made = fit(x[:120], y[:120], 2, method, 1.0)
        assert (made.classify(made.decide(x[120:])) == y[120:]).all()
    w = fit(x, y, 2, "mean_difference", 1.0).weights[0]
    assert w @ direction / np.linalg.norm(w) > 0.98


def test_tokens_have_the_labels_of_their_texts_or_their_own(demo):
    of_texts = demo.train_probe(TEXTS, LABELS, 2, position="each", method="ridge")
    n_special = sum(len(demo.encode(text)) for text in TEXTS) - of_texts.score.n_train
    assert of_texts.score.n_test == n_special - len(TEXTS)  # all tokens but the first of each text
    assert of_texts.score.n_test_groups == 10
    own = [[None if i == 0 else "e" in word for i, word in enumerate(demo.to_str_tokens(text))]
           for text in TEXTS]  # fmt: skip
    probe = demo.train_probe(TEXTS, own, "layers.0.resid_pre", position="each")
    assert probe.accuracy > 0.95 > probe.score.shuffled
    predicted = probe.predict(TEXTS[:2])
    assert [len(row) for row in predicted] == [len(row) for row in own[:2]]
    assert np.mean([a == b for row, said in zip(own, predicted, strict=False)
                    for a, b in zip(row[1:], said[1:], strict=True)]) > 0.95  # fmt: skip
    with pytest.raises(ValueError, match="text 1 must be one for each of its"):
        demo.train_probe(TEXTS, [own[0], own[1][:-1], *own[2:]], 0, position="each")


def test_more_than_two_classes(demo):
    texts = [*TEXTS, *(f"If {noun} then {noun}" for noun in NOUNS)]
    labels = [*LABELS, *["if"] * len(NOUNS)]
    probe = demo.train_probe(texts, labels, 3, position="mean")
    assert probe.classes == ("error", "found", "if") and probe.accuracy > 0.9
    assert probe.score.auc is None and probe.direction.shape == (3, 128)
    assert probe.decisions(np.zeros((4, 5, 128))).shape == (4, 5, 3)
    with pytest.raises(ValueError, match="one direction is of two classes"):
        probe.steering_vector  # noqa: B018


def test_the_last_real_token_is_read_where_texts_are_padded(demo):
    site = demo.site(2)
    texts = ["The list of names is returned by it", "if", "for x in"]
    rows = rows_at(demo, texts, [site], -1)[site]
    means = rows_at(demo, texts, [site], "mean")[site]
    second = rows_at(demo, [texts[0], texts[2]], [site], 1)[site]
    for i, text in enumerate(texts):
        alone = np.array(demo.run(text, capture=site)[site][0])
        np.testing.assert_allclose(rows[i], alone[-1], atol=1e-4)
        np.testing.assert_allclose(means[i], alone[1:].mean(axis=0), atol=1e-4)
        if i != 1:
            np.testing.assert_allclose(second[i // 2], alone[1], atol=1e-4)
    with pytest.raises(ValueError, match=r"position must be -2 to 1 in text 1, which has 2 tokens"):
        rows_at(demo, texts, [site], 2)
    with pytest.raises(ValueError, match="text 1 has special tokens only"):
        rows_at(demo, [[0, 5], [0]], [site], "mean")


def test_texts_are_split_whole_by_class_and_shuffled_whole():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    y = np.repeat(np.arange(40) % 4 == 0, 3).astype(int)
    held = held_out(y, groups, 0.25, rng)
    assert len(held) == 8 + 2 and (held % 4 == 0).sum() == 2
    test = np.isin(groups, held)
    other = shuffled(y, groups, test, rng)
    assert (other[::3] == other[1::3]).all() and (other != y).any()
    assert other[test].sum() == y[test].sum() and other.sum() == y.sum()
    own = rng.integers(0, 2, 120)
    other = shuffled(own, groups, test, rng)
    assert not (other[::3] == other[1::3]).all() and other[test].sum() == own[test].sum()


def test_groups_stay_on_one_side(demo):
    # Of two texts that are alike but for the end, and are read before it, one tells of the other.
    texts = [f"The {noun} {end}" for end in ("is not", "was not") for noun in NOUNS]
    labels, noun = ["is"] * len(NOUNS) + ["was"] * len(NOUNS), NOUNS * 2
    probe = demo.train_probe(texts, labels, 2, position=2, groups=noun)
    assert (probe.score.n_test, probe.score.n_test_groups) == (10, 5)
    assert probe.accuracy == 0.5  # each held-out noun is once right and once wrong
    assert "10 in 5 groups to test" in repr(probe)
    assert demo.train_probe(texts, labels, 2, position=2).accuracy != 0.5


def test_layers(demo):
    found = demo.probe_layers(TEXTS, LABELS, position="mean", method="ridge")
    assert list(found) == [0, 1, 2, 3, 4, 5] and len(found) == 6
    alone = demo.train_probe(TEXTS, LABELS, 2, position="mean", method="ridge")
    np.testing.assert_allclose(found[2].weights, alone.weights, atol=1e-6)
    assert found[2].score == alone.score
    assert found.best is found[0]
    rows = found.table.rows
    assert [row[0] for row in rows] == list("012345") and rows[0][1] == "1.000"
    figure = found.plot()
    assert figure.axes[0].get_xlabel() == "layer"
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [
        p.accuracy for p in found.values()
    ]
    some = demo.probe_layers(TEXTS, LABELS, [1, -1], "mlp", "mean", "mean_difference")
    assert list(some) == [1, 5] and str(some[5].site) == "layers.5.mlp"
    checked(found._repr_html_())
    json.dumps(found.to_dict())
    with pytest.raises(KeyError, match="no probe of layer 7; there are 0, 1"):
        found[7]
    with pytest.raises(ValueError, match="layers must have at least one"):
        demo.probe_layers(TEXTS, LABELS, [])


def test_a_probe_says_what_it_is(demo):
    probe = demo.train_probe(TEXTS, LABELS, 1, "attn", "mean")
    assert "held-out accuracy  1.000 [0.7" in repr(probe)
    assert "layers.1.attn" in checked(probe._repr_html_()).text
    assert json.loads(json.dumps(probe.to_dict()))["score"]["n_test"] == 10
    with pytest.raises(ValueError, match=r"x must have shape \[..., 128\], got \[4\]"):
        probe.decisions(np.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": NOUNS}, "groups must be as many as texts: 20 for 40 texts"),
        ({"method": "svm"}, "method must be one of"),
        ({"test_split": 0}, "test_split must be between 0 and 1, got 0"),
        ({"l2": 0}, "l2 must be a number above 0, or 0 for 'ridge', got 0"),
        ({"labels": LABELS[:-1]}, "39 for 40 texts"),
        ({"labels": ["one"] * 40}, "two classes or more, got"),
        ({"labels": [None, *LABELS[1:]]}, "no None"),
        ({"labels": [["a"]] * 40}, "are for position='each'"),
        ({"labels": ["rare", *LABELS[1:]]}, "no example of class 'rare' would be trained on"),
        ({"position": "last"}, "position must be a whole number or 'mean', got 'last'"),
        ({"position": True}, "position must be a whole number"),
        ({"layer": "layers.0.self_attn.rope"}, r"a site of shape \[B, S, d\]"),
        ({"layer": 9}, "no layer 9"),
        ({"texts": []}, "texts must have at least one"),
    ],
)
def test_bad_input_is_refused(demo, change, message):
    given = {"texts": TEXTS, "labels": LABELS, "layer": 2} | change
    with pytest.raises(ValueError, match=message):
        demo.train_probe(**given)
