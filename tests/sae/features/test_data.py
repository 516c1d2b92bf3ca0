from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp.sae import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from tests.fakes import SITE, FakeSource
from tests.sae.features.test_collection import dataset_of, dense_codes, random_coder, same
from tests.sae.letters import Letters, Words, one_to_one


def data_of(source: FakeSource, texts, context_length: int = 6, **options) -> FeatureData:
    dataset = ActivationDataset.from_texts(source, texts, SITE, context_length=context_length)
    return collect(one_to_one(), dataset, **options)


def test_top_examples_are_the_strongest_one_of_each_context():
    # Each context holds one text: `a` is in three of them, `b` in two, `c` has no value.
    data = data_of(Letters(a=3, b=2), ["axbxc", "aaaaa", "ccccc", "cabba"], n_examples=3)
    assert data.top_values[0].tolist() == [3, 3, 3]
    assert sorted(p // 6 for p in data.top_positions[0]) == [0, 1, 3]
    assert data.top_values[1].tolist() == [2, 2, 0]
    assert [e.token for e in data.examples(0)] == ["a"] * 3
    assert [e.token for e in data.examples(1)] == ["b"] * 2
    assert data.examples(2) == () and len(data.examples(0, n=2)) == 2


def test_intervals_are_evenly_spaced_and_hold_their_values(sae):
    data = sae.collect(verbose=False)
    dense = int(np.argmax(data.firing_counts))
    found = data.intervals(dense, 5, 3)
    edges = np.array([(interval.high, interval.low) for interval in found])
    np.testing.assert_allclose(edges[:, 0] - edges[:, 1], data.maxima[dense] / 5, rtol=1e-5)
    assert edges[0, 0] == data.maxima[dense] and edges[-1, 1] == 0
    for interval in found:
        assert len(interval.examples) == 3
        assert len({example.position // data.corpus.context for example in interval.examples}) == 3
        for example in interval.examples:
            assert interval.low * 0.999 <= example.value <= interval.high * 1.001
    assert sum(interval.share for interval in found) == pytest.approx(1)
    _, values = data.codes.of(dense)
    low, high = edges[2, 1], edges[2, 0]
    assert found[2].share == pytest.approx(((values > low) & (values <= high)).mean(), abs=1e-3)
    assert f"{found[2].low:.2f} to {found[2].high:.2f}: " in repr(found[2])
    flat = data.examples(dense, 5, "intervals")
    values = [example.value for example in flat]
    assert len(values) == 5 and values == sorted(values, reverse=True)


def test_random_examples_are_anywhere_and_the_same_each_time(sae):
    data = sae.collect(verbose=False)
    feature = int(np.argmax(data.firing_counts))
    drawn = data.examples(feature, 20, "random")
    assert drawn == data.examples(feature, 20, "random")
    assert len({example.position // data.corpus.context for example in drawn}) == 20
    mean = np.mean([example.value for example in drawn])
    assert 0.5 * data.means[feature] < mean < 2 * data.means[feature]
    assert mean < np.mean([example.value for example in data.examples(feature, 20)])


def test_the_values_of_examples_are_the_same_computed_again(sae):
    data = sae.collect(verbose=False)
    few = collect(sae, sae._training_data, max_kept=300)  # whose contexts are mostly not kept
    assert len(few.codes.contexts) < 0.1 * len(data.codes.contexts)
    for feature in range(0, sae.n_features, 37):
        for ours, again in zip(data.examples(feature), few.examples(feature), strict=True):
            assert ours.tokens == again.tokens and ours.peak == again.peak
            np.testing.assert_allclose(ours.values, again.values, rtol=5e-3, atol=5e-3)
            assert ours.value == pytest.approx(data.top_values[feature, 0], rel=0.9)


def test_silent_positions_have_no_value_near():
    coder = random_coder()
    dataset = dataset_of(coder, ["".join("the quick brown fox")] * 40, context_length=24)
    data, z = collect(coder, dataset), dense_codes(coder, dataset)
    rare = int(np.argsort(data.firing_counts)[np.searchsorted(np.sort(data.firing_counts), 1)])
    found = data.silent(rare, 8, before=2, after=1)
    assert len(found) == 8 and len(set(found // 24)) == 8
    for position in found:
        around = np.arange(position - 2, position + 2)
        assert not np.nan_to_num(z[around[(around >= 0) & (around < len(z))], rare]).any()
    assert not np.array_equal(found, data.silent(rare, 8, seed=1, before=2, after=1))
    always = data_of(Letters(a=1), ["aaaa"])
    assert len(always.silent(0)) == 0


def test_features_that_fire_together_are_ranked():
    # Both letters of a token pair cannot be one token: features 0 and 1 read the same letter.
    coder = one_to_one()
    coder.W_enc = mx.array(np.eye(6)[[0, 0, 2, 3, 4, 5]].astype(np.float32))
    dataset = ActivationDataset.from_texts(Letters(a=3, c=1), ["acac", "aaaa"], SITE)
    data = collect(coder, dataset)
    (other,) = data.co_active(0)
    assert (other.feature_id, other.count, other.score) == (1, 6, 1.0)
    assert data.co_active(2) == ()
    np.testing.assert_array_equal(data.co_activation([0, 1, 2]), [[6, 6, 0], [6, 6, 0], [0, 0, 2]])
    (by_count,) = data.co_active(0, by="count")
    assert by_count.score == 6


def test_the_clearest_features_peak_on_one_word_each():
    texts = ["xaax", "xbx", "xcx", "xabcx"]
    dataset = ActivationDataset.from_texts(Words(a=3, b=2, c=5), texts, SITE, context_length=6)
    coder = one_to_one()
    # Feature 3 follows the first word as well, more weakly; features 4 and 5 follow none.
    coder.W_enc = mx.array(np.eye(6, dtype=np.float32) + 0.5 * np.outer(np.eye(6)[3], np.eye(6)[0]))
    data = collect(coder, dataset)
    assert data.clearest(5, n_examples=2) == [2, 0, 1]
    assert data.clearest(1, n_examples=2) == [2]
    parts = data_of(Letters(a=3, b=2, c=5), texts)
    assert parts.clearest(5, n_examples=2) == []


def test_clear_features_of_the_bundled_model_have_examples(sae):
    data, words = sae.collect(verbose=False), []
    for feature in data.clearest(3):
        shown = data.examples(feature, 5)
        assert len(shown) == 5
        words.append(Counter(e.token.strip().lower() for e in shown).most_common(1)[0][0])
    assert len(set(words)) == 3 and all(word.isalpha() for word in words)


def test_what_is_saved_comes_back(tmp_path):
    coder = random_coder()
    data = collect(coder, dataset_of(coder), max_kept=1_000)
    loaded = FeatureData.load(data.save(tmp_path / "features"), coder, data.source)
    assert same(loaded, data) and loaded.settings == data.settings
    assert repr(loaded) == repr(data) and "codes of" in repr(data)
    for feature in (0, 7, 39):
        assert loaded.examples(feature, 3) == data.examples(feature, 3)
        assert loaded.examples(feature, 3, "random") == data.examples(feature, 3, "random")
        assert loaded.co_active(feature) == data.co_active(feature)
    assert loaded.to_dict() == data.to_dict()
    assert loaded.to_dict()["firing_counts"] == data.firing_counts.tolist()


def test_damaged_files_are_named(tmp_path):
    coder = random_coder()
    path = collect(coder, dataset_of(coder)).save(tmp_path / "features")
    with pytest.raises(ValueError, match="40 features, not 6"):
        FeatureData.load(path, one_to_one())
    whole = (path / "collection.json").read_text()
    for broken, message in (
        (whole.replace('"format_version": 1', '"format_version": 9'), "format_version 9"),
        (whole.replace('"n_tokens"', '"tokens"'), "does not describe a collection"),
        (whole.replace('"scale"', '"factor"'), "does not describe a collection"),
        (whole[:50], "not valid JSON"),
    ):
        (path / "collection.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            FeatureData.load(path, coder)
    (path / "collection.json").write_text(whole)
    for name in ("codes", "statistics", "examples", "corpus"):
        file = path / f"{name}.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name}.safetensors is damaged or cut short"):
            FeatureData.load(path, coder)
        file.write_bytes(content)


def test_examples_without_a_model_ask_for_it():
    data = data_of(Letters(a=3), ["abab"])
    without = FeatureData(**{**vars(data), "source": None})
    with pytest.raises(ValueError, match=r"sae\.bind\(model\)"):
        without.examples(0)
    assert without.co_active(0) == () and without.maxima[0] == 3


def test_unknown_features_and_kinds_are_refused():
    data = data_of(Letters(a=3), ["abab"])
    for call in (data.examples, data.intervals, data.silent, data.co_active):
        with pytest.raises(ValueError, match=r"feature_id must be in \[0, 5\], got 6"):
            call(6)
    with pytest.raises(ValueError, match="kind must be 'top', 'random' or 'intervals', got 'bad'"):
        data.examples(0, kind="bad")


def test_firing_rates_are_drawn():
    data = data_of(Letters(a=3, b=1), ["abab", "acca"])
    figure = data.plot()
    assert isinstance(figure, Figure) and figure.axes[0].get_title() == "4 of 6 never fire"
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == 2
