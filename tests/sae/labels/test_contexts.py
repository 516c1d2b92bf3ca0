import numpy as np
import pytest

from mlxterp.sae.features.collection import collect
from mlxterp.sae.labels.contexts import Contexts, Split
from mlxterp.sae.labels.prompts import AFTER, BEFORE
from tests.sae.labels.planted import planted, random_texts


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    data = planted()
    return Contexts(data, Split.of(data.corpus))


def test_half_of_the_tokens_are_for_scores(contexts):
    corpus = contexts.data.corpus
    sizes = corpus.document_sizes
    assert sizes[contexts.split.scored].sum() == pytest.approx(sizes.sum() / 2, rel=0.05)


def test_copies_of_a_document_stay_together():
    texts = random_texts(12)
    data = planted([*texts, *texts, *texts])
    scored = Split.of(data.corpus).scored.reshape(3, 12)
    assert (scored == scored[0]).all() and 0 < scored[0].sum() < 12


def test_the_split_is_of_the_content_and_not_of_the_order():
    texts = random_texts(10)
    one, other = Split.of(planted(texts).corpus), Split.of(planted(texts[::-1]).corpus)
    assert one.digest == other.digest and (one.scored == other.scored[::-1]).all()
    assert Split.of(planted(random_texts(10, seed=1)).corpus).digest != one.digest
    assert Split.of(planted(texts[:9]).corpus).digest != one.digest


@pytest.mark.parametrize("texts", [["abcabc" * 30], ["abcabc" * 30] * 4])
def test_one_document_cannot_be_split(texts):
    with pytest.raises(ValueError, match="at least 2 different documents"):
        Split.of(planted(texts).corpus)


def documents_of(contexts, monkeypatch, choose) -> set[int]:
    """The documents of the examples that are read for a choice."""
    seen: set[int] = set()
    read = type(contexts.data).example

    def noted(data, *args):
        example = read(data, *args)
        seen.add(example.document)
        return example

    monkeypatch.setattr(type(contexts.data), "example", noted)
    choose()
    return seen


def test_labels_and_scores_are_of_different_documents(contexts, monkeypatch):
    scored = set(np.flatnonzero(contexts.split.scored).tolist())
    assert scored
    seen = documents_of(contexts, monkeypatch, lambda: contexts.for_label(0, 40))
    assert len(seen) > 10 and not seen & scored
    for choose in (contexts.for_detection, contexts.for_fuzzing):
        seen = documents_of(contexts, monkeypatch, lambda choose=choose: choose(0, 40))
        assert len(seen) > 10 and seen <= scored


def test_labels_are_made_from_the_strongest_and_from_all_intervals(sae):
    data = collect(sae, sae._training_data)
    contexts = Contexts(data, Split.of(data.corpus))
    feature = int(np.argsort(data.firing_rates)[-40])
    values = np.abs([example.value for example in contexts.for_label(feature, 20)])
    assert len(values) == 20 and (np.diff(values[:10]) <= 0).all()
    assert values[:10].min() >= values[10:].max()
    strongest = np.abs([e.value for e in contexts.for_label(feature, 60)])[:20]
    assert values[10:].min() < 0.8 * strongest.min()
    positions = [example.position for example in contexts.for_label(feature, 20)]
    assert len({position // data.corpus.context for position in positions}) == 20


def test_half_of_the_contexts_for_detection_hold_the_feature(contexts):
    for feature, letter in enumerate("abcdef"):
        items = contexts.for_detection(feature, 20)
        assert [letter in item.text for item in items] == [item.is_right for item in items]
        assert sum(item.is_right for item in items) == 10 and len(items) == 20
        assert len({item.text for item in items}) == 20 and "«" not in items[0].text


def test_silent_contexts_are_checked_to_be_silent(sae):
    data = collect(sae, sae._training_data)
    contexts = Contexts(data, Split.of(data.corpus))
    for feature in np.argsort(data.firing_rates)[[-200, -50]].tolist():
        firing = data.codes.positions[data.codes.of(feature)[0]]
        tokens = data.corpus.tokens.reshape(-1)
        silent = contexts._silent(feature, 10, tokens[firing])
        assert len(silent) == 10 and contexts.split.scored[data.documents(silent)].all()
        for position in silent:
            assert not ((firing >= position - BEFORE) & (firing <= position + AFTER)).any()
        assert len(set(silent // data.corpus.context)) == 10


def test_half_of_the_silent_contexts_have_a_token_on_which_the_feature_fires_elsewhere():
    # Every `x` stands alone, and `a` fires as feature 0 does on it in no other context.
    data = planted()
    contexts = Contexts(data, Split.of(data.corpus))
    x = data.corpus.tokens.reshape(-1)[contexts._scored_positions]
    often = np.bincount(x).argmax()
    silent = contexts._silent(0, 10, np.array([often]))
    hard = data.corpus.tokens.reshape(-1)[silent] == often
    assert hard.sum() == 5


def test_marks_for_fuzzing_are_right_in_every_second_context(contexts):
    for feature, letter in enumerate("abcdef"):
        items = contexts.for_fuzzing(feature, 20)
        assert len(items) == 20 and sum(item.is_right for item in items) == 10
        for item in items:
            n = item.text.count("«")
            assert item.text.replace("«", "").replace("»", "").count(letter) >= 1
            right = item.text.count(f"«{letter}»")
            whole = item.text.count(letter)
            assert (right == whole == n) if item.is_right else (right == 0 and n == whole)
        assert not any("« »" in item.text for item in items)


def test_contexts_are_the_same_each_time(contexts):
    assert contexts.for_detection(1, 20) == contexts.for_detection(1, 20)
    assert contexts.for_fuzzing(1, 20) == contexts.for_fuzzing(1, 20)
    assert contexts.for_label(1, 20) == contexts.for_label(1, 20)


def test_features_without_silence_or_firing_have_no_contexts():
    always = planted(["aaaaaa" * 20, "aaaaa" * 20], a=1)
    contexts = Contexts(always, Split.of(always.corpus))
    assert contexts.for_detection(0, 20) == () and contexts.for_fuzzing(0, 20) == ()
    assert contexts.for_label(1, 20) == () and contexts.for_detection(1, 20) == ()
