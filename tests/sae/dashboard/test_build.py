"""What a bundle says of a feature is what the library's other functions say of it."""

from dataclasses import replace

import numpy as np
import pytest

from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.dashboard.build import build_bundle
from mlxterp.sae.dashboard.passages import Amounts
from mlxterp.sae.dashboard.sides import sides_of
from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.features.connections import reads
from mlxterp.sae.features.display import visible
from mlxterp.sae.features.logit_effects import logit_effects
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.metadata import Statistics
from mlxterp.sae.similarity.map import feature_map
from mlxterp.sae.similarity.nearest import nearest
from tests.sae.dashboard.bundles import collected
from tests.sae.features.coders import KINDS
from tests.sae.letters import Letters, one_to_one

AMOUNTS = Amounts(n_top=3, n_intervals=4, n_each=2, n_random=3)


@pytest.fixture(scope="module")
def data(model):
    return collected(model)


@pytest.fixture(scope="module")
def bundle(data):
    return build_bundle(data, amounts=AMOUNTS)


def same_examples(shown, expected, scale):
    assert len(shown) == len(expected)
    for here, there in zip(shown, expected, strict=True):
        assert here["tokens"] == [visible(token) for token in there.tokens]
        # What is kept is in half precision, and what is shown has four digits.
        np.testing.assert_allclose(here["values"], there.values, rtol=2e-3, atol=1e-6 * scale)
        assert (here["peak"], here["document"]) == (there.peak, there.document)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_of_the_data(kind, model):
    data = collected(model, kind)
    bundle = build_bundle(data, amounts=AMOUNTS, map_method=None)
    for i in range(data.n_features):
        feature = bundle.feature(i)
        scale = data.codes.scale
        same_examples(feature["examples"], data.examples(i, 3), scale)
        same_examples(feature["random"], data.examples(i, 3, "random"), scale)
        intervals = data.intervals(i, 4, 2) if data.firing_counts[i] else ()
        for here, there in zip(feature["intervals"], intervals, strict=True):
            same_examples(here["examples"], there.examples, scale)
            bounds = [here[name] for name in ("low", "high", "share")]
            np.testing.assert_allclose(bounds, [there.low, there.high, there.share], rtol=1e-3)


def test_values_of_contexts_that_were_not_kept_are_computed_again(model, data):
    few = collected(model, max_kept=len(data.codes.values) // 3)
    assert len(few.codes.contexts) < few.n_contexts
    bundle = build_bundle(few, amounts=AMOUNTS, map_method=None)
    for i in range(few.n_features):
        same_examples(bundle.feature(i)["examples"], data.examples(i, 3), data.codes.scale)


def test_statistics_are_those_of_the_data(data, bundle):
    np.testing.assert_allclose(bundle.table["firing_rates"], data.firing_rates, rtol=1e-6)
    np.testing.assert_allclose(bundle.table["means"], data.means, rtol=1e-6)
    np.testing.assert_array_equal(bundle.table["maxima"], data.maxima)
    for i in range(data.n_features):
        feature = bundle.feature(i)
        assert feature["histogram"] == data.histogram[i].tolist()
        assert feature["firing_count"] == data.firing_counts[i]
    np.testing.assert_allclose(bundle.facts["bin_edges"], data.bin_edges)


def test_neighbours_and_co_activations_are_those_of_the_library(data, bundle):
    for i in range(0, data.n_features, 7):
        feature = bundle.feature(i)
        near = nearest(data.coder, i, top_k=10).found
        assert [one["id"] for one in feature["similar"]] == [one.feature_id for one in near]
        cosines = [one["cosine"] for one in feature["similar"]]
        np.testing.assert_allclose(cosines, [one.cosine for one in near], atol=1e-3)
        together = data.co_active(i, 10)
        found = [(one["id"], one["count"]) for one in feature["co_active"]]
        assert found == [(one.feature_id, one.count) for one in together]
        scores = [one["score"] for one in feature["co_active"]]
        np.testing.assert_allclose(scores, [one.score for one in together], rtol=1e-3)


def test_co_occurrences_are_known_for_pairs_that_are_listed(data, bundle):
    chosen = [3, 1, 4, *(one.feature_id for one in data.co_active(3, 2))]
    found = bundle.together(chosen)
    exact = data.co_activation(chosen)
    counts = np.array(found["counts"], float)  # None is NaN
    known = ~np.isnan(counts)
    np.testing.assert_array_equal(counts[known], exact[known])
    assert 5 + 4 <= known.sum() < 25 and not found["exact"]


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder", "cross-layer transcoder"])
def test_tokens_are_those_that_features_write_and_read(kind, model):
    data = collected(model, kind)
    bundle = build_bundle(data, amounts=AMOUNTS)
    sides = bundle.facts["sides"]
    expected = ["writes"] + (["reads"] if "transcoder" in kind else [])
    assert [side["direction"] for side in sides] == expected
    for i in (0, 17, 39):
        for side, shown in zip(sides, bundle.feature(i)["sides"], strict=True):
            found = (
                logit_effects(data.coder, model, i)
                if side["direction"] == "writes"
                else reads(data.coder, i, model)
            )
            for end in ("top", "bottom"):
                pairs = getattr(found, end)
                assert [text for text, _ in shown[end]] == [visible(text) for text, _ in pairs]
                values = [value for _, value in shown[end]]
                np.testing.assert_allclose(values, [value for _, value in pairs], rtol=1e-3)


def test_a_coder_of_several_sites_has_their_norms(model):
    data = collected(model, "crosscoder")
    bundle = build_bundle(data)
    assert isinstance(data.coder, Crosscoder)
    assert bundle.facts["norm_sites"] == list(data.coder.writes.names)
    norms = np.array(data.coder.decoder_norms())
    np.testing.assert_allclose(bundle.feature(5)["norms"], norms[5], rtol=1e-3)
    assert build_bundle(collected(model)).feature(5)["norms"] is None


def test_a_coder_whose_rows_are_no_streams_has_no_tokens():
    source, coder = Letters(a=1.0), one_to_one()
    assert [side.direction for side in sides_of(coder, source)] == ["writes"]
    source.d_model = 7
    assert sides_of(coder, source) == ()


def test_a_feature_that_never_fires_has_nothing(model):
    data = collected(model, n_features=400)
    silent = int(np.flatnonzero(data.firing_counts == 0)[0])
    feature = build_bundle(data).feature(silent)
    empty = [feature[name] for name in ("examples", "intervals", "random", "co_active")]
    assert empty == [[], [], [], []] and feature["maximum"] == 0


def test_the_table_names_the_commonest_peaks_and_the_tokens_made_likelier(data, bundle):
    for i in np.flatnonzero(data.firing_counts >= 5)[:10].tolist():
        marked = [visible(example.token) for example in data.examples(i, 3)]
        shown = [bundle.strings[j] for j in bundle.table["peaks"][i] if j >= 0]
        assert shown[0] in marked and marked.count(shown[0]) == max(map(marked.count, marked))
        assert set(shown) <= set(marked)
        promoted = [bundle.strings[j] for j in bundle.table["promotes"][i]]
        assert promoted == [text for text, _ in bundle.feature(i)["sides"][0]["top"][:3]]


def test_the_map_is_that_of_the_library(data, bundle):
    np.testing.assert_allclose(bundle.table["map"], feature_map(data.coder).points, rtol=1e-6)
    assert (
        bundle.facts["map"]["method"] == "pca" and "display only" in bundle.facts["map"]["caption"]
    )
    assert "map" not in build_bundle(data, map_method=None).table


def test_what_was_measured_is_said_and_long_curves_are_thinned_out(data):
    reports = tuple({"step": i, "tokens": 10 * i, "loss": float("nan")} for i in range(1000))
    measured = (
        Fidelity(0.25, 8.0, 100, np.array([0.5, 0.0])),
        LossRecovered(1.0, 1.5, 3.0, 100),
    )
    made = build_bundle(data, statistics=Statistics(reports, reports[:3]), measured=measured)
    curves = made.facts["training"]
    assert len(curves) == 400 and (curves[0]["step"], curves[-1]["step"]) == (0, 999)
    assert curves[0]["loss"] is None and len(made.facts["validation"]) == 3
    assert made.facts["numbers"]["fidelity"]["dead"] == 0.5
    assert made.facts["numbers"]["loss"]["recovered"] == 0.75
    assert build_bundle(data).facts["numbers"] == {"fidelity": None, "loss": None}


def test_labels_are_held_and_not_copied(data):
    labels = FeatureLabels(data.n_features)
    made = build_bundle(data, labels)
    labels.set(4, "<b>\u202e")
    assert made.label_entries() == {
        "4": {"text": "<b>\\u202e", "source": "user", "scores": {}, "others": []}
    }


def test_data_without_a_model_are_refused(model):
    with pytest.raises(ValueError, match="language model"):
        build_bundle(replace(collected(model), source=None))


@pytest.mark.parametrize("name", ["n_top", "before", "n_random"])
def test_amounts_have_bounds(name):
    with pytest.raises(ValueError, match=name):
        Amounts(**{name: 0})
    with pytest.raises(ValueError, match=name):
        Amounts(**{name: 201})


def test_a_feature_takes_less_than_two_kilobytes(model):
    made = build_bundle(collected(model, n_features=400), map_method=None)
    assert made.nbytes / made.n_features < 2000
