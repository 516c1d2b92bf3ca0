import copy
import json
import pickle
import re
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.coder import Columns
from mlxterp.sae.features import search as module
from mlxterp.sae.features.analysis import encode_text
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.search import FoundFeature, find_feature_by_examples
from mlxterp.sae.sae import SAE
from tests.fakes import FIRST, SITE, FakeSource
from tests.sae.features import coders

OTHER_TEXT = "fdfdfa" * 40


class Letters(FakeSource):
    """Column i of an activation is the number given to the letter `abcdef`[i], else zero; that of
    the special token, and of `a` after it, is 9 everywhere."""

    def __init__(self, special=True, **values: float):
        super().__init__(width=6)
        table = np.zeros((97, 6), np.float32)
        for letter, value in values.items():
            table[FIRST + ord(letter) - ord(" "), "abcdef".index(letter)] = value
        table[0] = 9 if special else 0
        self.table = mx.array(table)

    def run(self, tokens, **options):
        longest = max(map(len, tokens))
        return super().run([[*row, *[0] * (longest - len(row))] for row in tokens], **options)


def one_to_one(function: str = "topk") -> SAE:
    columns = Columns((SITE,), (6,))
    coder = SAE(columns, columns, 6, function, k=6)
    coder.W_enc = coder.W_dec = mx.eye(6)
    return coder


def collected(coder, source, texts, context=16):
    return collect(coder, ActivationDataset.from_texts(source, texts, SITE, context_length=context))


ALL = Letters(a=1, b=1, c=1, d=1, e=1, f=1)


def test_what_is_common_to_the_examples_and_rare_elsewhere_is_found():
    coder = one_to_one()
    data = collected(coder, ALL, [OTHER_TEXT])
    found = find_feature_by_examples(coder, ALL, ["abf", "fbd", "dbe"], data=data)
    assert found == 1 and found.candidates[0].firing == 3
    assert {c.feature_id for c in found.candidates} == {0, 1, 3, 4, 5}  # c is in no example
    # In every other text, as in most examples: below what is in one example alone.
    ranked = [c.feature_id for c in found.candidates]
    assert ranked.index(4) < ranked.index(5) and ranked.index(4) < ranked.index(3)


def test_scores_are_those_of_the_formula():
    source = Letters(a=3, b=2, c=1, d=4, e=1, f=2)
    coder, text = one_to_one(), "aabbbc fdfdf aba cde fed " * 2
    data = collected(coder, source, [text], context=len(text) + 1)
    examples, length = ["aab", "dbe"], 3
    found = find_feature_by_examples(coder, source, examples, data=data)

    def code(text):
        return np.array(encode_text(coder, source, text), np.float64)[1:]

    whole = code(text)
    starts = np.linspace(0, len(text) - length, len(text) // length).astype(int)
    windows = np.stack([whole[s : s + length].max(axis=0) for s in starts])
    values = np.stack([code(example).max(axis=0) for example in examples])
    scores = (values - windows.mean(axis=0)).mean(axis=0) / whole.max(axis=0)
    expected = [i for i in np.argsort(-scores) if values[:, i].any()]
    assert [c.feature_id for c in found.candidates] == expected
    for c in found.candidates:
        assert c.score == pytest.approx(scores[c.feature_id], abs=1e-6)
        assert c.mean == values[:, c.feature_id].mean()
        assert c.maximum == whole.max(axis=0)[c.feature_id]
        assert c.background == pytest.approx((windows > 0).mean(axis=0)[c.feature_id])
        assert c.counter is None and c.n_examples == 2
    assert found.score == found.candidates[0].score


def test_examples_of_other_lengths_are_compared_with_stretches_as_long():
    coder = one_to_one()
    data = collected(coder, ALL, ["addddddd" * 40])
    (short,) = find_feature_by_examples(coder, ALL, ["a"], data=data).candidates
    (long,) = find_feature_by_examples(coder, ALL, ["aaaaaaaa"], data=data).candidates
    assert short.background == pytest.approx(1 / 8, abs=0.02) and short.score > 0.8
    assert long.background == pytest.approx(1, abs=0.03) and long.score < 0.05


def test_of_a_pair_the_second_part_alone_counts():
    coder = one_to_one()
    data = collected(coder, ALL, [OTHER_TEXT])
    whole = find_feature_by_examples(coder, ALL, ["cb", "ccb"], data=data)
    assert {c.feature_id for c in whole.candidates} == {1, 2}
    part = find_feature_by_examples(coder, ALL, [("c", "b"), ("cc", "b")], data=data)
    assert [c.feature_id for c in part.candidates] == [1]
    later = find_feature_by_examples(coder, ALL, [("b", "cc")], data=data)
    assert [c.feature_id for c in later.candidates] == [2]


def test_a_token_that_is_partly_in_the_part_counts(sae, model):
    text, ids = "import posixpath", model.encode("import posixpath")
    tokens = model.to_str_tokens(ids)
    inside = module._within(model, ids, len(text) - len("import p"))
    ends = np.cumsum([len(token) if i else 0 for i, token in enumerate(tokens)])
    assert ends[-1] == len(text)
    assert inside.tolist() == [bool(i) and end > len("import p") for i, end in enumerate(ends)]
    assert module._within(model, ids, len(text)).tolist() == [False, *[True] * (len(ids) - 1)]
    # The bytes of a character are several tokens, which count together.
    emoji = model.encode("a 👍")
    assert module._within(model, emoji, 1).tolist() == [False] * 3 + [True] * 3


def test_counter_examples_take_the_place_of_other_text_or_go_with_it():
    coder = one_to_one()
    examples, counter = ["abd", "bad"], ["ad", "ae"]
    alone = find_feature_by_examples(coder, ALL, examples, counter)
    assert [c.feature_id for c in alone.candidates] == [1, 3, 0]
    scores = [(c.score, c.counter, c.background) for c in alone.candidates]
    assert scores == [(1, 0, None), (0.5, 0.5, None), (0, 1, None)]
    data = collected(coder, ALL, ["d" * 64 + "b" * 64])
    both = find_feature_by_examples(coder, ALL, examples, counter, data=data)
    by_id = {c.feature_id: c for c in both.candidates}
    # d and b are in one half of the text, b in no counter-example; a in all of them.
    assert by_id[1].score == pytest.approx(0.5, abs=0.03)
    assert by_id[3].score == pytest.approx(0.5, abs=0.03) and by_id[3].counter == 0.5
    assert by_id[0].score == 0 and by_id[0].background == 0


def test_special_tokens_are_never_counted():
    coder = one_to_one()
    data = collected(coder, ALL, [OTHER_TEXT])
    found = find_feature_by_examples(coder, ALL, ["b"], ["d"], data=data)
    assert [(c.feature_id, c.maximum) for c in found.candidates] == [(1, 1)]


def test_negative_values_count_by_size():
    source, coder = Letters(a=-3, b=1, c=1), one_to_one("abs_topk")
    found = find_feature_by_examples(coder, source, ["ab", "ac"], ["bc"])
    assert found == 0 and (found.candidates[0].mean, found.score) == (3, 1)


def test_many_examples_of_unequal_length_are_as_one_by_one(monkeypatch):
    coder, texts = one_to_one(), ["a", "abcdef", "ff", "eda"]
    together = find_feature_by_examples(coder, ALL, texts, ["c"])
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 1)
    alone = find_feature_by_examples(coder, ALL, texts, ["c"])
    assert together.to_dict() == alone.to_dict()


def test_few_windows_of_a_long_text_are_enough(monkeypatch):
    coder = one_to_one()
    data = collected(coder, ALL, [OTHER_TEXT, "c" * 100])
    for length in (1, 4, 10_000):
        means, rates = module._windows(data.codes, length)
        assert means.shape == rates.shape == (6,) and (rates <= 1).all()
    assert rates.tolist() == [1, 0, 1, 1, 0, 1]  # a stretch longer than the text is all of it
    monkeypatch.setattr(module, "WINDOWS", 10)
    assert module._windows(data.codes, 4)[1] * 10 % 1 == pytest.approx(0)


@pytest.mark.parametrize("kind", coders.KINDS)
def test_coders_of_every_kind_find_the_feature_that_fires_most(kind, model):
    coder = coders.make(kind)
    examples = ["import os", ("import ", "sys"), "👍 שלום"]
    found = find_feature_by_examples(coder, model, examples, ["The house."], top_k=4)
    assert len(found.candidates) <= 4
    scores = [c.score for c in found.candidates]
    assert scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1
    assert coder.direction(found).shape == (coder.d_out,)


def test_the_result_is_the_number_of_the_best_feature(sae, model):
    found = find_feature_by_examples(sae, model, ["import os", "import sys"], ["The house"])
    best = found.candidates[0].feature_id
    assert isinstance(found, FoundFeature) and found == best and hash(found) == hash(best)
    assert json.loads(json.dumps({"feature": found})) == {"feature": best}
    assert mx.array_equal(sae.W_dec[found], sae.W_dec[best])
    assert mx.array_equal(sae.steer(mx.zeros(128), found), sae.steer(mx.zeros(128), best))
    assert f"{found} {found:6d}" == f"{best} {best:6d}"
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again == best and again.candidates == found.candidates
    assert found.to_dict()["candidates"][0]["feature_id"] == best
    json.dumps(found.to_dict())


def test_the_ranking_can_be_read():
    coder = one_to_one()
    found = find_feature_by_examples(coder, ALL, ["ab", "bd"], ["d"], top_k=2)
    assert repr(found).splitlines() == [
        "Feature 1 fits 2 examples best",
        "  feature   score  fires in  mean  maximum  in counter-examples",
        "  1        +1.000         2  1.00     1.00                 0.0%",
        "  0        +0.500         1  0.50     1.00                 0.0%",
    ]
    assert "Feature 1 fits" in found._repr_html_() and "in other text" not in repr(found)


def test_the_method_compares_with_what_was_collected(sae):
    examples = [("import ", "os"), ("from ", "sys")]
    found = sae.find_feature_by_examples(examples)
    assert found.candidates[0].background is not None and found.candidates[0].counter is None
    expected = find_feature_by_examples(sae, sae._source, examples, data=sae.features)
    assert found.candidates == expected.candidates
    both = sae.find_feature_by_examples(examples, ["import this"], top_k=3)
    assert both.candidates[0].counter is not None and len(both.candidates) <= 3


@pytest.mark.parametrize("name", ["examples", "counter_examples"])
@pytest.mark.parametrize("wrong", [[""], [("a", "")], [3], [("a", "b", "c")], [("a", 1)]])
def test_what_is_no_example_is_an_error(name, wrong):
    texts = {"examples": ["a"], "counter_examples": ["b"]} | {name: wrong}
    with pytest.raises(ValueError, match=rf"^{name} must be texts, or pairs \(before, part\)"):
        find_feature_by_examples(one_to_one(), ALL, **texts)


def test_what_cannot_be_answered_is_an_error():
    coder = one_to_one()
    with pytest.raises(ValueError, match="nothing to compare the examples with"):
        find_feature_by_examples(coder, ALL, ["a"])
    with pytest.raises(ValueError, match="examples must hold at least one text"):
        find_feature_by_examples(coder, ALL, [], ["b"])
    with pytest.raises(ValueError, match="No feature is active in any of the examples"):
        find_feature_by_examples(coder, ALL, ["xyz"], ["b"])
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        find_feature_by_examples(coder, ALL, ["a"], ["b"], top_k=0)
    data = collected(one_to_one(), ALL, [OTHER_TEXT])
    columns = Columns((SITE,), (6,))
    with pytest.raises(ValueError, match="data must be of a coder with 9 features, got 6"):
        find_feature_by_examples(SAE(columns, columns, 9, k=2), ALL, ["a"], data=data)


@pytest.mark.parametrize(
    ("examples", "pattern"),
    [
        ([("the version ", "3.7"), ("at most ", "128"), ("in PEP ", "492")], r"\d"),
        ([("the method ", "__len__"), ("it calls ", "__enter__"), ("see ", "__add__")], "_"),
    ],
    ids=["numbers", "names with two underscores"],
)
def test_what_is_found_has_the_property_in_other_text(sae, model, examples, pattern):
    found = sae.find_feature_by_examples(examples)
    others = [text[:2000] for text in list(topics.values())[40:70]]
    dataset = ActivationDataset.from_texts(model, others, sae.site)
    data = collect(sae, dataset, n_examples=10)

    def hits(feature):
        return sum(bool(re.search(pattern, e.token)) for e in data.examples(feature))

    assert hits(found) >= 9
    assert np.mean([hits(feature) for feature in range(0, 512, 10)]) < 2
