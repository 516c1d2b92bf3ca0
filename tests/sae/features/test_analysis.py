import copy
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.features.analysis import (
    analyze_text,
    check_feature,
    collect_examples,
    logit_effects,
)
from mlxterp.sae.model_pair import ModelPair
from tests.fakes import FIRST, SITE, FakeSource

TEXT = "The for statement iterates over the elements of a sequence."


def codes_by_hand(sae, model, tokens) -> np.ndarray:
    captured = model.run(mx.array(tokens), capture=[sae.site], stop=True)
    x = np.array(captured[sae.site], np.float64)
    W_enc, b_enc = np.array(sae.W_enc, np.float64), np.array(sae.b_enc, np.float64)
    pre = x @ W_enc.T + b_enc
    return np.where(pre >= np.sort(pre, axis=-1)[..., -sae.k, None], np.maximum(pre, 0), 0)


class Letters(FakeSource):
    """Column i of an activation is the number given to the letter `abcdef`[i], else zero."""

    def __init__(self, **values: float):
        super().__init__(width=6)
        table = np.zeros((97, 6), np.float32)
        for letter, value in values.items():
            table[FIRST + ord(letter) - ord(" "), "abcdef".index(letter)] = value
        self.table = mx.array(table)


def one_to_one(k: int = 6) -> SAE:
    columns = Columns((SITE,), (6,))
    coder = SAE(columns, columns, 6, k=k)
    coder.W_enc = coder.W_dec = mx.eye(6)
    return coder


def test_analysis_lists_the_features_of_each_token(sae, model):
    analysis = sae.analyze_text(TEXT, top_k=4)
    ids = model.encode(TEXT)
    codes = codes_by_hand(sae, model, [ids])[0]
    assert analysis.tokens == tuple(model.to_str_tokens(ids))
    assert analysis.by_token[0] == ()  # the first token is special
    for row, listed in list(zip(codes, analysis.by_token, strict=True))[1:]:
        expected = np.argsort(-row)[:4]
        assert [i for i, _ in listed] == [i for i in expected.tolist() if row[i] > 0]
        assert [v for _, v in listed] == pytest.approx(row[expected][row[expected] > 0], rel=1e-3)


def test_top_features_have_the_largest_values_in_the_text(sae, model):
    codes = codes_by_hand(sae, model, [model.encode(TEXT)])[0, 1:]
    found = sae.find_top_features(text=TEXT, top_k=5)
    expected = np.argsort(-codes.max(axis=0))[:5].tolist()
    assert [feature.feature_id for feature in found] == expected
    for feature in found:
        column = codes[:, feature.feature_id]
        assert feature.value == pytest.approx(column.max(), rel=1e-3)
        assert feature.position == column.argmax() + 1
        assert feature.token == model.to_str_tokens(model.encode(TEXT))[feature.position]
        assert f"feature {feature.feature_id}: " in repr(feature)


def test_an_analysis_can_be_read_and_saved(sae):
    analysis = sae.analyze_text(text=TEXT)
    assert len(repr(analysis).splitlines()) == 1 + len(analysis.tokens)
    plain = analysis.to_dict()
    assert plain["tokens"] == list(analysis.tokens) and len(plain["top"]) == 10
    assert set(plain["top"][0]) == {"feature_id", "value", "position", "token"}


def test_top_k_beyond_the_number_of_features_lists_all_that_are_active():
    analysis = analyze_text(one_to_one(), Letters(a=3, b=2), "abc", top_k=100)
    assert [(f.feature_id, f.value, f.token) for f in analysis.top] == [(0, 3, "a"), (1, 2, "b")]
    assert analysis.by_token == ((), ((0, 3.0),), ((1, 2.0),), ())


def test_an_empty_text_is_an_error(sae):
    with pytest.raises(ValueError, match="text must not be empty"):
        sae.analyze_text("")


def test_a_coder_without_a_model_asks_for_one():
    with pytest.raises(ValueError, match=r"pass model=\.\.\., .* or load the coder"):
        one_to_one().analyze_text("abc")
    assert one_to_one().analyze_text("abc", model=Letters(a=1)).top[0].feature_id == 0


def test_examples_are_the_strongest_positions_one_of_each_context():
    texts = ["axbxc", "aaaaa", "ccccc", "cabba"]
    dataset = ActivationDataset.from_texts(Letters(a=3, b=2), texts, SITE, context_length=6)
    examples = collect_examples(one_to_one(), dataset, n=3)
    # Each context holds one text: `a` is in three of them, `b` in two, `c` has no value.
    assert examples.values[0].tolist() == [3, 3, 3]
    assert sorted(p // 6 for p in examples.positions[0]) == [0, 1, 3]
    assert examples.values[1].tolist() == [2, 2, 0]
    assert not examples.values[2:].any()
    assert [e.token for e in examples.of(0)] == ["a"] * 3
    assert [e.token for e in examples.of(1)] == ["b"] * 2
    assert examples.of(2) == ()


def test_an_example_shows_its_own_document_and_marks_the_peak():
    texts = ["zzzz", "xyaxa", "aa"]
    dataset = ActivationDataset.from_texts(Letters(a=3), texts, SITE, context_length=16)
    (example,) = collect_examples(one_to_one(), dataset, n=2).of(0)
    assert "".join(example.tokens) in ("xyaxa", "aa")
    assert (example.token, example.value) == ("a", 3.0)
    assert example.values == tuple(3.0 * (token == "a") for token in example.tokens)
    assert "«a»" in repr(example)


def test_the_window_is_cut_at_its_ends():
    text = "0123456789" * 2 + "a" + "0123456789" * 2
    dataset = ActivationDataset.from_texts(Letters(a=3), [text], SITE, context_length=64)
    (example,) = collect_examples(one_to_one(), dataset, n=1).of(0, window=4)
    assert "".join(example.tokens) == "6789a01" and example.peak == 4


def test_examples_are_the_same_when_encoded_again_by_hand(sae, model, texts):
    dataset = ActivationDataset.from_texts(
        model, texts[:6], "layers.2.resid_post", context_length=64
    )
    examples = sae.top_examples(dataset=dataset, n=4)
    tokens, documents = dataset.corpus.tokens, dataset.corpus.documents()
    codes = codes_by_hand(sae, model, tokens)
    codes[documents < 0] = 0
    strongest = -np.sort(-codes.max(axis=1), axis=0)[:4].T
    np.testing.assert_allclose(examples.values, strongest, rtol=2e-3, atol=2e-3)
    flat = codes.reshape(-1, sae.n_features)
    for feature in range(0, sae.n_features, 17):
        at = examples.positions[feature][examples.values[feature] > 0]
        np.testing.assert_allclose(
            flat[at, feature], examples.values[feature][: len(at)], rtol=2e-3, atol=2e-3
        )
        assert len(set(at // 64)) == len(at)


def test_examples_of_the_session_are_remembered(sae, monkeypatch):
    five = sae.top_examples(n=5)
    monkeypatch.setattr("mlxterp.sae.features.analysis.collect_examples", None)
    three = sae.top_examples(n=3)
    assert np.array_equal(three.values, five.values[:, :3])
    assert three.of(7) == five.of(7)[:3]


class Words(Letters):
    """Each token is a word of its own, such as ` aa`."""

    def to_str_tokens(self, input):
        return [f" {piece * 2}" for piece in super().to_str_tokens(input)]


def examples_of(source: FakeSource):
    texts = ["xaax", "xbx", "xcx", "xabcx"]
    dataset = ActivationDataset.from_texts(source, texts, SITE, context_length=6)
    coder = one_to_one()
    # Feature 3 follows the first word as well, more weakly; features 4 and 5 follow none.
    coder.W_enc = mx.array(np.eye(6, dtype=np.float32) + 0.5 * np.outer(np.eye(6)[3], np.eye(6)[0]))
    return collect_examples(coder, dataset, n=2)


def test_the_clearest_features_peak_on_one_word_each():
    examples = examples_of(Words(a=3, b=2, c=5))
    assert examples.clearest(5) == [2, 0, 1]
    assert examples.clearest(1) == [2]


def test_parts_of_words_are_not_clear():
    assert examples_of(Letters(a=3, b=2, c=5)).clearest(5) == []


def test_clear_features_of_the_bundled_model_have_examples(sae):
    examples = sae.top_examples(n=5)
    words = []
    for feature in examples.clearest(3):
        shown = examples.of(feature)
        assert len(shown) == 5
        words.append(Counter(e.token.strip().lower() for e in shown).most_common(1)[0][0])
    assert len(set(words)) == 3 and all(word.isalpha() for word in words)


def test_examples_need_text():
    arrays = ActivationDataset.from_activations(np.ones((5, 6), np.float32))
    with pytest.raises(ValueError, match="dataset made from texts"):
        collect_examples(one_to_one(), arrays)


def test_logit_effects_are_those_of_the_models_own_norm_and_embedding(sae, model):
    feature = 7
    row = np.array(sae.W_dec[feature], np.float64)
    norm = model.model.model.norm
    normed = row / np.sqrt(np.mean(row**2) + norm.eps) * np.array(norm.weight, np.float64)
    logits = np.array(model.model.model.embed_tokens.weight, np.float64) @ normed
    effects = logit_effects(sae, model, feature, top_k=6)
    order = np.argsort(-logits)
    for found, expected in ((effects.top, order[:6]), (effects.bottom, order[::-1][:6])):
        assert [value for _, value in found] == pytest.approx(logits[expected], rel=1e-3)
        assert [token for token, _ in found] == model.to_str_tokens(expected.tolist())


@pytest.mark.parametrize("feature", [-1, 6, 10**6, 1.5])
def test_an_unknown_feature_is_an_error_with_the_range(feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 5\], got {feature}"):
        check_feature(one_to_one(), feature)


def test_feature_ids_of_numpy_are_taken():
    assert check_feature(one_to_one(), np.int64(5)) == 5


def test_a_coder_in_half_precision_is_analysed():
    coder = one_to_one()
    coder.set_dtype(mx.bfloat16)
    assert analyze_text(coder, Letters(a=3), "abc").top[0].value == 3


def test_what_is_no_text_is_an_error(sae):
    with pytest.raises(ValueError, match="text must be one string, got list"):
        sae.analyze_text(["a", "b"])


def of_sites(reads, writes, n_features: int = 40) -> SparseCoder:
    made = SparseCoder(
        *(Columns(names, (128,) * len(names)) for names in (reads, writes)), n_features, k=4
    )
    for i, name in enumerate(("W_enc", "b_enc", "W_dec")):
        made[name] = mx.random.normal(made[name].shape, key=mx.random.key(i))
    return made


def joined(source, sites, tokens) -> mx.array:
    done = source.run(tokens, capture=list(sites))
    return mx.concatenate([done[site] for site in sites], axis=-1)


@pytest.fixture(scope="module")
def pair(model) -> ModelPair:
    other = copy.deepcopy(model.model)
    other.layers[1].mlp.down_proj.weight = -other.layers[1].mlp.down_proj.weight
    return ModelPair([model, InterpretableModel(other, model.tokenizer)])


def test_codes_of_several_sites_and_of_two_models_are_analysed(model, pair):
    ids = model.encode(TEXT)
    for source, sites in (
        (model, ("layers.1.mlp_out", "layers.3.resid_post")),
        (pair, pair.sites_of("layers.2.resid_post")),
    ):
        made = of_sites(sites, sites)
        codes = np.array(made.encode(joined(source, sites, mx.array([ids]))))[0]
        found = analyze_text(made, source, TEXT, top_k=3)
        for row, listed in list(zip(codes, found.by_token, strict=True))[1:]:
            assert [i for i, _ in listed] == [i for i in np.argsort(-row)[:3].tolist() if row[i]]


def test_examples_of_two_models_are_found(pair, texts):
    sites = pair.sites_of("layers.2.resid_post")
    made = of_sites(sites, sites)
    dataset = ActivationDataset.from_texts(pair, texts[:3], list(sites), context_length=64)
    examples = collect_examples(made, dataset, n=2)
    tokens, counts = mx.array(dataset.corpus.tokens), dataset.corpus.documents() >= 0
    codes = np.array(made.encode(joined(pair, sites, tokens))) * counts[..., None]
    np.testing.assert_allclose(examples.values[:, 0], codes.max(axis=(0, 1)), rtol=1e-3, atol=1e-3)
    (example, *_) = examples.of(5)
    assert example.value == pytest.approx(examples.values[5, 0], rel=1e-3)


def test_a_transcoders_logit_effects_are_of_what_it_writes(model):
    made = of_sites(("layers.1.mlp_in",), ("layers.4.mlp_out",))
    logits = np.array(model.unembed(made.W_dec[6][None])[0])
    found = logit_effects(made, model, 6, top_k=3)
    assert [value for _, value in found.top] == pytest.approx(np.sort(logits)[::-1][:3], rel=1e-5)


def test_logit_effects_of_several_sites_are_of_their_sum_or_of_one(model):
    sites = ("layers.1.mlp_out", "layers.4.mlp_out")
    made = of_sites(sites, sites)
    row = made.W_dec[6]
    for site, part in ((None, row[:128] + row[128:]), (sites[0], row[:128]), (sites[1], row[128:])):
        logits = np.array(model.unembed(part[None])[0])
        found = logit_effects(made, model, 6, top_k=3, site=site)
        expected = np.sort(logits)[::-1][:3]
        assert [value for _, value in found.top] == pytest.approx(expected, rel=1e-4)


def test_logit_effects_of_two_models_need_a_site(pair):
    sites = pair.sites_of("layers.2.resid_post")
    made = of_sites(sites, sites)
    with pytest.raises(ValueError, match=r"writes base:layers.2.resid_post .*: name one of its"):
        logit_effects(made, pair, 6)
    tuned = pair.models["tuned"]
    logits = np.array(tuned.unembed(made.W_dec[6, 128:][None])[0])
    found = logit_effects(made, pair, 6, top_k=1, site=sites[1])
    assert found.top[0][1] == pytest.approx(logits.max(), rel=1e-5)
