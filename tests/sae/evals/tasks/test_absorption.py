import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.tasks.absorption import absorbed, absorption, absorption_of, standing_for
from mlxterp.sae.evals.tasks.builtin_sets import builtin_sets
from mlxterp.sae.evals.tasks.words import read_words, vocabulary_words
from tests.sae.evals.tasks.planted import coder_of
from tests.sae.kinds import make

LETTERS, ABSORBERS, EACH = 3, 12, 240  # words of each letter
SHARE = 0.3  # of the words of the first letter that are absorbed


def planted(absorbing=True):
    """Words of three letters. Some words of the first have a second direction, one of twelve: the
    letter's feature is silent there, and a feature of its own writes the letter as well."""
    rng = np.random.default_rng(0)
    n, width = LETTERS * EACH, LETTERS + ABSORBERS + 12
    letters = np.repeat(np.arange(LETTERS), EACH)
    special = np.full(n, -1)
    chosen = rng.permutation(EACH)[: int(SHARE * EACH)]
    special[chosen] = np.arange(len(chosen)) % ABSORBERS
    x = 0.01 * rng.normal(size=(n, width))
    x[np.arange(n), letters] += 1
    x[special >= 0, LETTERS + special[special >= 0]] += 1
    axes = np.eye(width)[: LETTERS + ABSORBERS]
    encoder, decoder = axes.copy(), axes.copy()
    if absorbing:
        encoder[0, LETTERS : LETTERS + ABSORBERS] = -3
        decoder[LETTERS:, 0] = 1
    # Far above what noise reaches.
    coder = coder_of(encoder, decoder, np.full(len(axes), -0.5))
    names = np.array(["a", "b", "c"])[letters]
    return coder, mx.array(x.astype(np.float32)), names, special >= 0


def test_the_planted_absorption_is_found_in_its_letter_alone():
    coder, x, letters, is_absorbed = planted()
    found = absorption_of(coder, x, letters, np.arange(len(letters)), seeds=4)
    full = found.details["a"]["full absorption"].score
    assert full.value == pytest.approx(SHARE, abs=0.06)
    assert found.details["a"]["absorption fraction"].score.value == pytest.approx(full.value)
    assert found.details["a"]["features for a letter"].score.value == 1
    for letter in "bc":
        assert found.details[letter]["full absorption"].values == (0.0,) * 4
        assert found.details[letter]["absorption fraction"].values == (0.0,) * 4
        assert found.details[letter]["F1 of the letter's features"].score.value == 1
    assert found["full absorption"].score.value == pytest.approx(full.value / 3)
    assert found["F1 of the probe"].score.value > 0.98
    assert is_absorbed.mean() * LETTERS == pytest.approx(SHARE, abs=0.01)


def test_without_absorbers_there_is_none():
    coder, x, letters, _ = planted(absorbing=False)
    found = absorption_of(coder, x, letters, np.arange(len(letters)), seeds=2)
    assert found["full absorption"].values == (0.0, 0.0)
    assert found["absorption fraction"].values == (0.0, 0.0)


def test_what_all_words_have_in_common_does_not_count():
    coder, x, letters, _ = planted()
    found = absorption_of(coder, x, letters, np.arange(len(letters)), seeds=2)
    offset = np.random.default_rng(1).normal(size=coder.d_in).astype(np.float32)
    coder.b_dec = mx.array(offset)
    coder.b_enc = coder.b_enc - coder.W_enc @ coder.b_dec
    moved = absorption_of(coder, x + offset, letters, np.arange(len(letters)), seeds=2)
    for name in ("full absorption", "absorption fraction"):
        assert moved[name].values == pytest.approx(found[name].values, abs=1e-6)


def test_an_absorber_must_point_along_the_probe():
    """The largest share is that of a feature that is large and nearly orthogonal to the probe."""
    p, z = np.array([1.0, 0.0]), np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    y, every = np.arange(8) < 4, np.arange(8)
    for slope, expected in ((0.02, 0.0), (0.03, 1.0)):
        rows = np.array([[1.0, 0.0], [100 * slope, 100.0]])
        hits = np.array([4])
        found = absorbed(z, rows, p, np.array([1.0]), y, every, every, hits)
        assert found.full == expected and found.splits == 1
        assert found.fraction == 0  # which asks for a cosine of .1


def by_hand(z, rows, p, totals, y, train, test, hits):
    """The definitions, word by word."""
    main, _ = standing_for(z, y, train, test)
    full, fractions = [], []
    for word, total in zip(hits, totals, strict=True):
        a = [z[word, i] * (rows[i] @ p) for i in range(len(rows))]
        cosine = [rows[i] @ p / np.linalg.norm(rows[i]) for i in range(len(rows))]
        top = int(np.argmax(a))
        silent = all(z[word, i] == 0 for i in main)
        full.append(silent and total > 0 and cosine[top] >= 0.025 and a[top] >= 0.4 * total)
        of_main = sum(a[i] for i in main)
        others = sorted((a[i] for i in range(len(rows)) if i not in main and cosine[i] >= 0.1),
                        reverse=True)[:3]  # fmt: skip
        of_others = sum(max(0, value) for value in others)
        of_others = of_others if of_others >= max(0.4 * total, 1e-30) else 0
        if total <= of_main or total <= 0 or of_others == 0:
            fractions.append(0.0)
        elif of_main <= 0:
            fractions.append(1.0)
        else:
            missing = min(of_others, total - of_main)
            fractions.append(missing / (missing + of_main))
    return np.mean(full), np.mean(fractions)


@pytest.mark.parametrize("seed", range(4))
def test_both_scores_are_those_of_the_definitions(seed):
    rng = np.random.default_rng(seed)
    n, n_features, width = 120, 12, 6
    rows, p = rng.normal(size=(n_features, width)), rng.normal(size=width)
    p /= np.linalg.norm(p)
    z = np.maximum(rng.normal(size=(n, n_features)), 0) * (rng.random((n, n_features)) < 0.5)
    y = rng.random(n) < 0.4
    z[y, 0] += 0.5 * (rng.random(y.sum()) < 0.6)
    order = rng.permutation(n)
    train, test = order[:60], order[60:]
    hits = test[y[test]]
    totals = z[hits] @ rows @ p + 0.3 * rng.normal(size=len(hits))
    found = absorbed(z, rows, p, totals, y, train, test, hits)
    full, fraction = by_hand(z, rows, p, totals, y, train, test, hits)
    assert found.full == pytest.approx(full) and found.fraction == pytest.approx(fraction)
    assert 0 < found.fraction < 1


def test_a_model_that_does_not_know_the_letters_is_refused():
    coder, x, letters, _ = planted()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"above 0.6 for 0 of 3, and half are needed"):
        absorption_of(coder, x, rng.permutation(letters), np.arange(len(letters)), seeds=1)


def test_weak_and_rare_letters_are_left_out_with_the_reason():
    coder, x, letters, _ = planted()
    letters = letters.astype("<U5")
    letters[-10:] = "few"
    letters[np.flatnonzero(letters == "c")[::4]] = "c or"  # which nothing tells from c
    found = absorption_of(coder, x, letters, np.arange(len(letters)), seeds=1)
    assert set(found.details) == {"a", "b", "c"}
    assert "too few are tested" in found.left_out["few"]
    assert "the probe's F1 is" in found.left_out["c or"]


def test_spellings_of_one_word_are_on_one_side():
    from mlxterp.sae.evals.tasks.absorption import _parts

    groups = np.repeat(np.arange(100), 2)
    train, test = _parts(groups, 0)
    assert not set(groups[train]) & set(groups[test]) and len(test) == 50


def test_words_are_read_at_their_own_token(demo, sae):
    words = vocabulary_words(demo)
    assert len(words) > 1000 and all(w.isalpha() for w in words)
    found = read_words(demo, sae.reads, ["the", "The", "self", "not one token at all"])
    assert found.words == ("the", "the", "self") and found.letters.tolist() == ["t", "t", "s"]
    assert found.groups[0] == found.groups[1] != found.groups[2]
    assert found.activations.shape == (3, 128)
    with pytest.raises(ValueError, match="none is"):
        read_words(demo, sae.reads, ["Xyzzyplugh"])


def test_the_bundled_model_does_not_know_letters_but_kinds_of_tokens(demo, sae):
    with pytest.raises(ValueError, match="hardly knows these labels"):
        absorption(sae, demo, seeds=1, max_words=600)
    (kind,) = builtin_sets(["kind"], n_texts=60)
    found = absorption(sae, demo, kind, seeds=1, max_words=800)
    assert {"keyword", "name"} <= set(found.details)
    assert found["F1 of the probe"].score.value > 0.6
    assert "random features" in found["absorption fraction"].controls


def test_coders_that_do_not_write_what_they_read_are_refused(demo):
    with pytest.raises(ValueError, match="Absorption needs a coder that writes what it reads"):
        absorption(make("transcoder"), demo)
    (prose,) = builtin_sets(["prose"], n_texts=20)
    with pytest.raises(ValueError, match="labels of tokens"):
        absorption(make("sae"), demo, prose)
