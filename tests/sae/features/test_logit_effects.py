import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.coder import Columns
from mlxterp.sae.features import logit_effects as module
from mlxterp.sae.features.attribution import total_effects
from mlxterp.sae.features.logit_effects import (
    LogitEffects,
    logit_directions,
    logit_effects,
    writes_stream,
)
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.sae import SAE
from tests.sae.features import coders
from tests.sae.features.coders import of_sites

TEXTS = ["class Node(object):", "def f"]
TWO_SITES = ("layers.1.mlp_out", "layers.4.mlp_out")
PAIR_SITE = "layers.2.resid_post"


@pytest.fixture(scope="module")
def pair(model) -> ModelPair:
    other = copy.deepcopy(model.model)
    other.layers[1].mlp.down_proj.weight = -other.layers[1].mlp.down_proj.weight
    return ModelPair([model, InterpretableModel(other, model.tokenizer)])


def positions_of(model, ids) -> list[int]:
    return [p for p, i in enumerate(ids) if i not in model.special_token_ids]


def all_of(effects: LogitEffects) -> np.ndarray:
    return np.array([value for _, value in effects.top])


def test_they_are_those_of_the_models_own_norm_and_embedding(sae, model):
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


def test_many_at_once_are_those_of_each(sae, model, monkeypatch):
    monkeypatch.setattr(module, "FEATURES_PER_PASS", 3)
    ids = [5, 500, 7, 0, 8, 33, 9]
    found = sae.logit_effects(np.array(ids), top_k=4)
    assert list(found) == ids
    for i in ids:
        alone = sae.logit_effects(i, top_k=4)
        assert [t for t, _ in found[i].top] == [t for t, _ in alone.top]
        assert all_of(found[i]) == pytest.approx(all_of(alone), rel=1e-5)
    assert sae.logit_effects([]) == {}


def test_a_transcoders_are_of_what_it_writes(model):
    made = of_sites(("layers.1.mlp_in",), ("layers.4.mlp_out",))
    logits = np.array(model.unembed(made.W_dec[6][None])[0])
    found = logit_effects(made, model, 6, top_k=3)
    assert all_of(found) == pytest.approx(np.sort(logits)[::-1][:3], rel=1e-5)


def test_those_of_several_sites_are_of_their_sum_or_of_one(model):
    made = of_sites(TWO_SITES, TWO_SITES)
    row = made.W_dec[6]
    parts = ((None, row[:128] + row[128:]), (TWO_SITES[0], row[:128]), (TWO_SITES[1], row[128:]))
    for site, part in parts:
        logits = np.array(model.unembed(part[None])[0])
        found = logit_effects(made, model, 6, top_k=3, site=site)
        assert all_of(found) == pytest.approx(np.sort(logits)[::-1][:3], rel=1e-4)


def test_directions_are_of_features_and_of_sums_of_them(model):
    made = coders.make("cross-layer transcoder")
    rows = [made.direction(i) for i in (3, 30)]
    rows.append(2 * rows[0] - 0.5 * rows[1])
    summed = mx.stack([row[:128] + row[128:] for row in rows])
    found = logit_directions(made, model, [3, 30, {3: 2.0, 30: -0.5}])
    np.testing.assert_allclose(found, np.array(model.unembed(summed)), rtol=1e-4, atol=1e-4)
    one = logit_directions(made, model, [3], sites="layers.3.mlp_out")
    np.testing.assert_allclose(one[0], np.array(model.unembed(rows[0][128:])), rtol=1e-4, atol=1e-4)


def test_those_of_two_models_need_a_site(pair):
    sites = pair.sites_of(PAIR_SITE)
    made = of_sites(sites, sites)
    for texts in (None, "def f"):
        with pytest.raises(ValueError, match=r"writes base:layers.2.resid_post .*: name one of"):
            logit_effects(made, pair, 6, texts=texts)
    tuned = pair.models["tuned"]
    logits = np.array(tuned.unembed(made.W_dec[6, 128:][None])[0])
    found = logit_effects(made, pair, 6, top_k=1, site=sites[1])
    assert found.top[0][1] == pytest.approx(logits.max(), rel=1e-5)


def test_at_real_positions_those_of_two_models_are_of_the_sites_own(pair):
    sites = pair.sites_of(PAIR_SITE)
    made, tuned = of_sites(sites, sites), pair.models["tuned"]
    ids = tuned.encode(TEXTS[1])
    alone = of_sites((PAIR_SITE,), (PAIR_SITE,))
    alone.W_dec = made.W_dec[:, 128:]
    expected = np.mean(
        [coders.by_differences(alone, tuned, ids, 6, p)[p] for p in positions_of(tuned, ids)],
        axis=0,
    )
    found = logit_effects(made, pair, 6, top_k=5, site=sites[1], texts=TEXTS[1])
    assert all_of(found) == pytest.approx(np.sort(expected)[::-1][:5], rel=1e-2)


@pytest.mark.parametrize("kind", coders.KINDS)
@pytest.mark.parametrize("path", ["total", "direct"])
def test_at_real_positions_they_are_finite_differences_of_the_forward_pass(
    model, kind, path, monkeypatch
):
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 20)  # several passes for the first text
    made, features = coders.make(kind), [4, 25]
    derivative = coders.by_differences if path == "total" else coders.past_the_layers
    found = logit_effects(made, model, features, top_k=4096, texts=TEXTS, path=path)
    rows = [(ids, positions_of(model, ids)) for ids in model.encode_batch(TEXTS)]
    for feature in features:
        slopes = [derivative(made, model, ids, feature, p)[p] for ids, at in rows for p in at]
        expected = np.mean(slopes, axis=0)
        effects = found[feature]
        assert effects.n_tokens == len(slopes) and effects.path == path
        scale = np.abs(expected).max()
        np.testing.assert_allclose(all_of(effects), np.sort(expected)[::-1], atol=0.01 * scale)
        order = np.argsort(-expected)
        assert effects.top[0][0] == model.to_str_tokens([int(order[0])])[0]


def test_of_one_site_among_several_only_that_is_changed(model):
    made, site = coders.make("crosscoder"), "layers.3.resid_post"
    ids = model.encode(TEXTS[1])
    slopes = [
        coders.by_differences(made, model, ids, 9, p, [site])[p] for p in positions_of(model, ids)
    ]
    expected = np.sort(np.mean(slopes, axis=0))[::-1]
    found = logit_effects(made, model, 9, top_k=5, site=site, texts=TEXTS[1])
    assert all_of(found) == pytest.approx(expected[:5], rel=1e-2)


@pytest.mark.parametrize("change", ["quantised", "bfloat16"])
def test_models_that_are_not_float32_agree_with_their_own_gradients(model, change):
    """Of the one token that counts: forward mode here, and backward mode there."""
    inner = copy.deepcopy(model.model)
    if change == "quantised":
        nn.quantize(inner, 64, 8)
    else:
        inner.set_dtype(mx.bfloat16)
    source = InterpretableModel(inner, model.tokenizer)
    made, ids = coders.make("sae"), model.encode("def")
    assert len(positions_of(model, ids)) == 1
    effects = logit_effects(made, source, 3, top_k=4096, texts="def")
    slopes, (target, *_) = total_effects(made, source, ids)
    named = dict(effects.top)
    centred = named[source.to_str_tokens([target])[0]] - all_of(effects).mean()
    tolerance = 1e-3 if change == "quantised" else 0.05
    assert float(slopes[-1, 3]) == pytest.approx(centred, rel=tolerance, abs=tolerance)


def test_rows_before_an_output_projection_are_no_directions_of_the_stream(model):
    columns = Columns(("layers.2.attn_z",), (model.width("layers.2.attn_z"),))
    assert columns.width == model.d_model
    made = coders.filled(SAE(columns, columns, 9, k=2))
    assert not writes_stream(made, model)
    with pytest.raises(ValueError, match=r"writes layers\.2\.attn_z .*output projection follows"):
        logit_effects(made, model, 3)


def test_rows_of_another_width_have_effects_through_the_model_alone(model):
    columns = Columns(("layers.2.mlp.gate_proj",), (384,))
    made = coders.filled(SAE(columns, columns, 9, k=2))
    assert not writes_stream(made, model)
    for options in ({}, {"texts": "def f", "path": "direct"}):
        with pytest.raises(ValueError, match=r"only rows of the width of the .* stream, 128, can"):
            logit_effects(made, model, 3, **options)
    ids = model.encode("def f")
    slopes = [coders.by_differences(made, model, ids, 3, p)[p] for p in positions_of(model, ids)]
    found = logit_effects(made, model, 3, top_k=3, texts="def f")
    assert all_of(found) == pytest.approx(np.sort(np.mean(slopes, axis=0))[::-1][:3], rel=1e-2)


def test_effects_can_be_read_and_saved(sae):
    effects = LogitEffects((("<b>\u202e", 1.5),), (("\n", -0.25), ("x", -0.1)))
    assert repr(effects) == "raises  '<b>\\u202e' (1.50)\nlowers  '\\n' (-0.25)  'x' (-0.10)"
    html = effects._repr_html_()
    assert "&lt;b&gt;\\u202e" in html and "⏎" in html and "<b>" not in html
    assert effects.to_dict()["top"] == (("<b>\u202e", 1.5),)
    at = sae.logit_effects(3, texts="def f", path="direct")
    assert repr(at).startswith("direct effect on the logits, mean of 2 tokens\nraises  ")


def test_bad_arguments_are_errors(sae):
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 511\], got 512"):
        sae.logit_effects([3, 512])
    with pytest.raises(ValueError, match="path must be one of .*'total', 'direct'.*, got 'all'"):
        sae.logit_effects(3, texts="def f", path="all")
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        sae.logit_effects(3, top_k=0)
    with pytest.raises(ValueError, match="at least one token that is not special"):
        sae.logit_effects(3, texts=[])
    with pytest.raises(ValueError, match="at least one token that is not special"):
        sae.logit_effects(3, texts="")
