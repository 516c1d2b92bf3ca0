import copy
import io
import re

import mlx.core as mx
import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp import InterpretableModel
from mlxterp.notebook import visible
from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.features import analysis as module
from mlxterp.sae.features.analysis import analyze_text
from mlxterp.sae.features.attribution import direct_effects, total_effects
from mlxterp.sae.model_pair import ModelPair
from tests.fakes import FIRST, SITE, FakeSource
from tests.pages import checked
from tests.sae.features import coders
from tests.sae.features.coders import of_sites

TEXT = "The for statement iterates over the elements of a sequence."
SHORT = "class Node(object)"
TEXTS = ["aab", "b", "abc", "cc"]
# Tags, an emoji of two characters, letters written from the right, marks that turn the direction of
# writing, controls, and characters that the tokenizer splits into bytes.
NASTY = "<script>alert('x')</script> 👍🏽 שלום \u202eabc\u202c \x07\x1b[2J\r\n &amp; 漢字 $x_1^2$"


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

    def run(self, tokens, **options):
        longest = max(map(len, tokens))
        return super().run([[*row, *[0] * (longest - len(row))] for row in tokens], **options)


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
    assert isinstance(analysis.plot(), Figure)
    assert len(repr(analysis).splitlines()) == 1 + len(analysis.tokens)
    plain = analysis.to_dict()
    assert plain["tokens"] == list(analysis.tokens) and len(plain["top"]) == 10
    assert plain["top"][0]["score"] == plain["top"][0]["value"] == analysis.top[0].value
    assert len(plain["top"][0]["scores"]) == len(analysis.tokens)
    assert plain["targets"] == [] and plain["rank_by"] == "activation"


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


def test_codes_are_those_of_each_token_and_none_of_special_ones(sae, model):
    codes = sae.encode_text(model, TEXT)
    expected = codes_by_hand(sae, model, [model.encode(TEXT)])[0]
    assert not np.array(codes)[0].any() and expected[0].any()
    np.testing.assert_allclose(np.array(codes)[1:], expected[1:], rtol=2e-3, atol=2e-3)
    for again in (
        sae.encode_text(TEXT),
        sae.encode_text(text=TEXT),
        sae.encode_text(model=model, text=TEXT),
    ):
        assert mx.array_equal(again, codes)
    bare = SAE(sae.reads, sae.writes, sae.n_features, k=8)
    bare.update(sae.parameters())
    assert mx.array_equal(bare.encode_text(model, TEXT), codes)
    with pytest.raises(ValueError, match=r"pass model="):
        bare.encode_text(TEXT)


def test_texts_of_unequal_length_have_the_codes_that_each_has_alone(sae, model, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 40)
    texts = ["def f", TEXT, "x", TEXT + TEXT, SHORT]
    found = sae.encode_text(model, texts)
    assert [len(codes) for codes in found] == [len(model.encode(text)) for text in texts]
    for codes, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(
            np.array(codes), np.array(sae.encode_text(text)), rtol=2e-3, atol=2e-3
        )


def test_features_are_ranked_by_size_where_values_may_be_negative():
    coder = SAE(Columns((SITE,), (6,)), Columns((SITE,), (6,)), 6, "abs_topk", k=6)
    coder.W_enc = coder.W_dec = mx.eye(6)
    analysis = analyze_text(coder, Letters(a=3, b=-4), "ab")
    assert [(f.feature_id, f.value) for f in analysis.top] == [(1, -4), (0, 3)]
    assert analysis.by_token[1:] == (((0, 3.0),), ((1, -4.0),))


def test_several_texts_are_ranked_over_all_of_them():
    found = analyze_text(one_to_one(), Letters(a=3, b=2, c=5), TEXTS)
    assert [analysis.tokens[1:] for analysis in found] == [tuple(text) for text in TEXTS]
    assert found[2] == found.texts[2] and len(found) == 4
    best = [(f.feature_id, f.score, f.n_texts, f.token) for f in found.top]
    assert best == [(2, 5, 2, "c"), (0, 3, 2, "a"), (1, 2, 3, "b")]
    assert [f.feature_id for f in found.shared] == [1, 2, 0]
    assert (found.top[0].text, found.top[0].position) == (2, 3)
    for n, text in enumerate(TEXTS):
        alone = analyze_text(one_to_one(), Letters(a=3, b=2, c=5), text)
        assert found[n].by_token == alone.by_token
    plain = found.to_dict()
    assert len(plain["texts"]) == 4 and plain["shared"][0]["n_texts"] == 3
    assert "  3 of 4, largest in text 0: feature 1: 2.000 at 3 'b'" in repr(found)
    html = found._repr_html_()
    assert html.count("<details>") == 4 and html.count("<div") == html.count("</div>")


def test_labels_are_shown_beside_their_features():
    labels = {0: "the letter a", 5: "never"}
    analysis = analyze_text(one_to_one(), Letters(a=3, b=2), "ab", labels=labels)
    assert [f.label for f in analysis.top] == ["the letter a", None]
    assert repr(analysis).endswith("\n         0  the letter a")
    assert "the letter a" in analysis._repr_html_() and "never" not in analysis._repr_html_()


def test_a_text_on_which_nothing_fires_says_so():
    analysis = analyze_text(one_to_one(), Letters(), "abc")
    assert analysis.top == () and analysis.by_token == ((),) * 4
    assert "No feature is active" in analysis._repr_html_()
    assert isinstance(analysis.plot(), Figure)


@pytest.mark.parametrize("kind", coders.KINDS)
def test_total_effects_are_finite_differences_of_the_forward_pass(model, kind):
    made, ids = coders.make(kind), model.encode(SHORT)
    target, last = 42, len(ids) - 2
    slopes, targets = total_effects(made, model, ids, target, last)
    assert targets == [target] * len(ids)
    slopes = np.array(slopes)
    assert slopes.shape == (len(ids), made.n_features)
    assert not slopes[-1].any()  # what comes later changes nothing
    for position, feature in ((1, 4), (2, 30), (last, 4), (last, 25)):
        change = coders.by_differences(made, model, ids, feature, position)[last]
        expected = change[target] - change.mean()
        assert slopes[position, feature] == pytest.approx(expected, rel=0.01, abs=2e-3)


@pytest.mark.parametrize("kind", coders.KINDS)
def test_direct_effects_are_finite_differences_past_the_layers(model, kind):
    made, ids = coders.make(kind), model.encode(SHORT)
    slopes, targets = direct_effects(made, model, ids)
    predicted = np.array(model.run(mx.array([ids])).output[0]).argmax(axis=-1)
    assert targets == predicted.tolist()
    for position, feature in ((1, 4), (3, 30), (len(ids) - 1, 25)):
        change = coders.past_the_layers(made, model, ids, feature, position)[position]
        expected = change[targets[position]] - change.mean()
        assert float(slopes[position, feature]) == pytest.approx(expected, rel=0.01, abs=2e-3)


def test_after_the_last_layer_both_effects_are_the_same(model):
    last = (f"layers.{model.n_layers - 1}.resid_post",)
    made, ids = of_sites(last, last), model.encode(SHORT)
    total, _ = total_effects(made, model, ids)
    direct, _ = direct_effects(made, model, ids)
    np.testing.assert_allclose(np.array(total[-1]), np.array(direct[-1]), rtol=1e-3, atol=1e-5)
    assert not np.array(total[:-1]).any()


@pytest.mark.parametrize("kind", coders.KINDS)
@pytest.mark.parametrize("rank_by", ["logit_effect", "attribution"])
def test_scores_are_values_times_effects(model, kind, rank_by):
    made, ids = coders.make(kind), model.encode(SHORT)
    values = np.array(module.encode_text(made, model, SHORT))
    effects = direct_effects if rank_by == "logit_effect" else total_effects
    slopes, targets = effects(made, model, ids, " x")
    expected = values * np.array(slopes)
    analysis = analyze_text(made, model, SHORT, top_k=5, rank_by=rank_by, target=" x")
    assert set(analysis.targets) == {" x"} and len(set(targets)) == 1
    assert (analysis.position is None) == (rank_by == "logit_effect")
    for row, listed in zip(expected, analysis.by_token, strict=True):
        order = [i for i in np.argsort(-np.abs(row))[:5].tolist() if row[i]]
        assert [i for i, _ in listed] == order
        assert [score for _, score in listed] == pytest.approx(row[order], rel=1e-3)
    top = analysis.top[0]
    assert abs(top.score) == pytest.approx(np.abs(expected).max(), rel=1e-3)
    assert top.value == pytest.approx(values[top.position, top.feature_id], rel=1e-3)
    assert top.scores == pytest.approx(expected[:, top.feature_id], rel=1e-3, abs=1e-6)


def test_attribution_tells_what_ablating_a_feature_does(sae, model):
    """To first order, for the features that matter most at the last token."""
    ids = model.encode(SHORT)
    analysis = sae.analyze_text(SHORT, rank_by="attribution", top_k=5)
    (target,) = set(analysis.targets)
    chosen = int(model.run(mx.array([ids])).output[0, -1].argmax())
    assert target == model.to_str_tokens([chosen])[0]

    def centred(edit) -> float:
        logits = model.run(mx.array([ids]), edit=edit).output[0, -1]
        return float(logits[chosen] - logits.mean())

    for feature in analysis.top:
        edit = sae.steering_edit(
            {feature.feature_id: 0.9}, mode="scale", positions=[feature.position]
        )
        change = centred(edit) - centred(None)
        assert change == pytest.approx(-0.1 * feature.score, rel=0.1, abs=2e-3)


def test_the_target_and_what_it_follows_are_told(sae, model):
    attributed = sae.analyze_text(SHORT, rank_by="attribution", target=" self", position=2)
    assert attributed.position == 2
    after = attributed.tokens[2]
    title = f"features (effect on the logit of ' self' after {after!r})"
    assert repr(attributed).splitlines()[0].endswith(title)
    negative = sae.analyze_text(
        SHORT, rank_by="attribution", target=" self", position=2 - len(attributed.tokens)
    )
    assert negative == attributed
    direct = sae.analyze_text(SHORT, rank_by="logit_effect")
    predicted = np.array(model.run(mx.array([model.encode(SHORT)])).output[0]).argmax(axis=-1)
    assert direct.targets == tuple(model.to_str_tokens(predicted.tolist()))
    assert repr(direct.targets[-1]) in repr(direct).splitlines()[-1]
    assert "effect +" in direct._repr_html_() or "effect -" in direct._repr_html_()
    assert repr(direct.top[0]).startswith(f"feature {direct.top[0].feature_id}: ")
    assert ", value " in repr(direct.top[0])


@pytest.mark.parametrize("rank_by", ["logit_effect", "attribution"])
def test_of_two_models_one_site_is_to_be_named(model, pair, rank_by):
    sites = pair.sites_of("layers.2.resid_post")
    made = of_sites(sites, sites)
    with pytest.raises(ValueError, match=r"site="):
        analyze_text(made, pair, SHORT, rank_by=rank_by)
    analysis = analyze_text(made, pair, SHORT, rank_by=rank_by, target=7, site=sites[1])
    ids, tuned = model.encode(SHORT), pair.models["tuned"]
    alone = of_sites(("layers.2.resid_post",), ("layers.2.resid_post",))
    alone.W_dec = made.W_dec[:, 128:]
    effects = direct_effects if rank_by == "logit_effect" else total_effects
    slopes = np.array(effects(alone, tuned, ids, 7)[0])
    values = np.array(module.encode_text(made, pair, SHORT))
    assert abs(analysis.top[0].score) == pytest.approx(np.abs(values * slopes).max(), rel=1e-3)


def test_direct_effects_need_rows_of_the_streams_width(model):
    columns = Columns(("layers.2.mlp.gate_proj",), (384,))
    made = coders.filled(SAE(columns, columns, 9, k=2))
    with pytest.raises(ValueError, match="use rank_by='attribution'"):
        analyze_text(made, model, SHORT, rank_by="logit_effect")
    assert analyze_text(made, model, SHORT, rank_by="attribution").top


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_by": "size"}, "rank_by must be one of .*, got 'size'"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"target": " x"}, "target is for rank_by='logit_effect' or 'attribution'"),
        ({"rank_by": "attribution", "target": "a longer text"}, r"target must be one token, and"),
        ({"rank_by": "attribution", "target": ""}, r"'' is 0: \[\]"),
        ({"rank_by": "attribution", "target": 4096}, r"target must be in \[0, 4095\], got 4096"),
        ({"rank_by": "attribution", "position": 99}, r"position must be in \[-\d, \d\], got 99"),
        ({"rank_by": "attribution", "site": "layers.9.mlp"}, r"The sites \['layers.9.mlp'\] are"),
    ],
)
def test_bad_arguments_are_errors(sae, options, message):
    with pytest.raises(ValueError, match=message):
        sae.analyze_text(SHORT, **options)


def test_an_unknown_target_lists_the_tokens_that_it_would_be(sae, model):
    parts = [i for i in model.encode("a longer text") if i not in model.special_token_ids]
    with pytest.raises(ValueError, match=re.escape(f"{model.to_str_tokens(parts)}")):
        sae.analyze_text(SHORT, rank_by="attribution", target="a longer text")


@pytest.mark.parametrize("rank_by", ["activation", "logit_effect", "attribution"])
def test_nasty_text_is_shown_safely(sae, rank_by):
    labels = dict.fromkeys(range(sae.n_features), "<img onerror=x> \u202eback\n")
    analysis = sae.analyze_text(NASTY, rank_by=rank_by, labels=labels, top_k=3)
    assert "".join(analysis.tokens[1:]) == NASTY  # no character is lost or shown twice
    assert all(line.isprintable() for line in repr(analysis).splitlines())
    assert len(repr(analysis).splitlines()) == 1 + len(analysis.tokens) + 3
    html = analysis._repr_html_()
    assert visible(NASTY) in checked(html).text
    for bad in ("<script", "<img", "\u202e", "\x07", "\x1b", "\ufffd", "</script"):
        assert bad not in html
    for good in ("&lt;", "שלום"[0], "漢", "字", "👍", r"\u202e", "␇", "&amp;"):
        assert good in html
    assert html.count("<bdi") == html.count("</bdi>") and html.count("<div") == html.count("</div>")
    assert all(f.token for f in analysis.top)


def test_tokens_that_look_like_formulas_are_plotted_as_they_are():
    figure = analyze_text(one_to_one(), Letters(a=3, b=2), "a$_b$^").plot()
    figure.savefig(io.BytesIO(), format="svg")
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == ["<s>", "a", "$", "_", "b", "$", "^"]


def test_a_character_of_several_tokens_is_one_column(sae):
    analysis = sae.analyze_text("a 👍", top_k=3)
    ax = analysis.plot().axes[0]
    shown = [token for token in analysis.tokens if token]
    assert len(shown) < len(analysis.tokens)
    values = ax.get_images()[0].get_array()
    assert len(ax.get_xticklabels()) == len(shown) == values.shape[1]
    assert values.max(axis=1).tolist() == pytest.approx([f.value for f in analysis.top])


def test_html_shades_tokens_by_size_and_sign():
    coder = SAE(Columns((SITE,), (6,)), Columns((SITE,), (6,)), 6, "abs_topk", k=6)
    coder.W_enc = coder.W_dec = mx.eye(6)
    html = analyze_text(coder, Letters(a=2, b=-4), "abz")._repr_html_()
    first = checked(html).parts[:4]
    assert [share for _, share, _ in first] == [0.0, 0.5, 1.0, 0.0]
    assert [names - {"strong"} for *_, names in first] == [set(), {"more"}, {"less"}, set()]


def test_a_coder_in_half_precision_is_analysed():
    coder = one_to_one()
    coder.set_dtype(mx.bfloat16)
    assert analyze_text(coder, Letters(a=3), "abc").top[0].value == 3


def test_what_is_no_text_is_an_error(sae):
    with pytest.raises(ValueError, match="text must be a text or several, got int"):
        sae.analyze_text(["a", 3])
    with pytest.raises(ValueError, match="at least one, got none"):
        sae.encode_text([])


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
        done = source.run(mx.array([ids]), capture=list(sites), stop=True)
        codes = np.array(made.encode(mx.concatenate([done[site] for site in sites], axis=-1)))[0]
        found = analyze_text(made, source, TEXT, top_k=3)
        for row, listed in list(zip(codes, found.by_token, strict=True))[1:]:
            assert [i for i, _ in listed] == [i for i in np.argsort(-row)[:3].tolist() if row[i]]
