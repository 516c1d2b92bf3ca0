import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.evals.tasks.labelled import LabelledSet, read_examples
from tests.fakes import FIRST, SITE, FakeSource

COLUMNS = Columns((SITE,), (6,))


def characters(examples) -> str:
    """The characters of single tokens, of which column 0 holds the ids."""
    return "".join(chr(ord(" ") + int(i) - FIRST) for i in np.array(examples.activations[:, 0]))


def test_tokens_get_the_class_of_their_span():
    texts = ["ab12cd", "x9 y8"]
    spans = [[(0, 2, "letter"), (2, 4, "digit")], [(0, 1, "letter"), (1, 2, "digit")]]
    found = read_examples(LabelledSet.of("s", texts, spans), FakeSource(), COLUMNS)
    assert found.classes == ("digit", "letter")
    assert characters(found) == "ab12x9"
    assert [found.classes[i] for i in found.labels] == ["letter"] * 2 + ["digit"] * 2 + [
        "letter", "digit",
    ]  # fmt: skip
    assert found.groups.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.targets == (1,)


def test_a_token_of_several_characters_goes_by_its_first_visible_one(model):
    text = "def name(self):  # a remark\n"
    at = text.index("#")
    labelled = LabelledSet.of("s", [text], [[(0, at, False), (at, len(text), True)]])
    columns = Columns(("layers.0.resid_post",), (128,))
    found = read_examples(labelled, model, columns)
    tokens = model.to_str_tokens(text)
    own = np.array(model.run(text, capture=columns.names)[columns.names[0]])[0]
    for row, label in zip(np.array(found.activations), found.labels, strict=True):
        (where,) = np.flatnonzero(np.abs(own - row).max(axis=1) < 1e-4)
        before = "".join(tokens[1:where])
        first = len(before) + len(tokens[where]) - len(tokens[where].lstrip())
        assert label == (first >= at)
    assert len(found) == sum(bool(token.strip()) for token in tokens[1:])


def test_texts_are_averaged_over_their_tokens_without_special_ones():
    source = FakeSource()
    labelled = LabelledSet.of("s", ["abc", "zz", "q"], ["a", "b", "c"])
    found = read_examples(labelled, source, COLUMNS)
    assert found.targets == (0, 1, 2) and len(found.owners) == 6
    table = np.array(source.table)
    expected = [table[np.array(source._ids(text))].mean(axis=0) for text in labelled.texts]
    np.testing.assert_allclose(found.raw(), expected, rtol=1e-6)
    coder = SAE(COLUMNS, COLUMNS, 8, "relu", k=None)
    coder.W_enc = mx.random.normal((8, 6), key=mx.random.key(0))
    codes = [
        np.maximum(table[np.array(source._ids(text))] @ np.array(coder.W_enc).T, 0).mean(axis=0)
        for text in labelled.texts
    ]
    np.testing.assert_allclose(found.codes(coder), codes, rtol=1e-4)


def test_long_texts_are_averaged_over_blocks(monkeypatch):
    labelled = LabelledSet.of("s", ["abcdefgh" * 3, "mnop" * 5], [False, True])
    whole = read_examples(labelled, FakeSource(), COLUMNS).raw()
    monkeypatch.setattr("mlxterp.sae.evals.tasks.labelled.TOKENS_AT_ONCE", 7)
    np.testing.assert_allclose(
        read_examples(labelled, FakeSource(), COLUMNS).raw(), whole, rtol=1e-5
    )


def test_as_many_of_each_class_are_taken_where_there_are_enough():
    text = "a" * 40 + "1" * 10
    labelled = LabelledSet.of("s", [text], [[(0, 40, "a"), (40, 50, "b")]])
    found = read_examples(labelled, FakeSource(), COLUMNS, max_examples=16)
    assert sorted(characters(found)) == ["1"] * 8 + ["a"] * 8
    assert len(read_examples(labelled, FakeSource(), COLUMNS, max_examples=30)) == 30
    assert np.bincount(
        read_examples(labelled, FakeSource(), COLUMNS, max_examples=30).labels
    ).tolist() == [20, 10]


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="got 1 texts, 2 labels"):
        LabelledSet.of("s", ["a"], [True, False])
    with pytest.raises(ValueError, match="two classes or more, got \\[True\\]"):
        LabelledSet.of("s", ["a", "b"], [True, True])
    with pytest.raises(ValueError, match="not empty"):
        LabelledSet.of("s", ["a", ""], [True, False])
    with pytest.raises(ValueError, match="or spans for each"):
        LabelledSet.of("s", ["a", "b"], [True, [(0, 1, False)]])


def test_tokens_that_are_not_the_text_are_refused():
    class Lossy(FakeSource):
        def to_str_tokens(self, input):
            return [token.upper() for token in super().to_str_tokens(input)]

    labelled = LabelledSet.of("s", ["ab"], [[(0, 1, 1), (1, 2, 2)]])
    with pytest.raises(ValueError, match="Tokens must add up to the text"):
        read_examples(labelled, Lossy(), COLUMNS)
    assert "tokens of 1 texts" in repr(labelled)
