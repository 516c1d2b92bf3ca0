"""What a pass counts is what a direct count of dense codes gives."""

import mlx.core as mx
import numpy as np
import pytest

import mlxterp.sae.features.collection as collection
from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.features.collection import collect, fingerprint
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.transcoder import Transcoder
from tests.fakes import SITE, FakeSource, counts_passes
from tests.sae.letters import Letters, one_to_one

LATER = ("layers.1.mlp_in", "layers.1.mlp_out")
WIDTHS = dict.fromkeys(LATER, 6)
SITES = {
    "sae": (SAE, (SITE,), (SITE,)),
    "transcoder": (Transcoder, (SITE,), LATER[:1]),
    "crosscoder": (Crosscoder, (SITE, LATER[0]), (SITE, LATER[0])),
    "cross-layer transcoder": (CrossLayerTranscoder, (SITE, LATER[0]), LATER),
}
TEXTS = ["the quick brown fox", "jumps over", "a lazy dog, twice: THE QUICK BROWN FOX", "", "x"] * 9


def random_coder(kind: str = "sae", name: str = "topk", n_features: int = 40) -> SparseCoder:
    of_kind, reads, writes = SITES[kind]
    made = of_kind(_columns(reads), _columns(writes), n_features, name, k=4)
    made.W_enc = mx.random.normal(made.W_enc.shape, key=mx.random.key(1))
    made.b_enc = mx.random.normal(made.b_enc.shape, key=mx.random.key(2))
    if name == "batch_topk":
        made.activation_function.threshold = mx.full(made.activation_function.threshold.shape, 3.0)
    return made


def _columns(names: tuple[str, ...]) -> Columns:
    return Columns(names, (6,) * len(names))


def source() -> FakeSource:
    made = FakeSource(further=WIDTHS)
    made.table[:, 0] = made.table[:, 0] / 50
    return made


def dataset_of(coder: SparseCoder, texts=TEXTS, context_length: int = 12) -> ActivationDataset:
    sites = list(coder.reads.union(coder.writes).names)
    return ActivationDataset.from_texts(source(), texts, sites, context_length=context_length)


def dense_codes(coder: SparseCoder, dataset: ActivationDataset) -> np.ndarray:
    """The codes `[n_contexts * context, n_features]`, NaN at positions that do not count."""
    tokens = mx.array(dataset.corpus.tokens)
    captured = dataset.source.run(tokens, capture=coder.reads.names)
    z = np.array(coder.encode({name: captured[name] for name in coder.reads.names}))
    z[dataset.corpus.documents() < 0] = np.nan
    return z.reshape(-1, coder.n_features)


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu", "abs_topk"])
def test_statistics_are_those_of_a_direct_count(kind, name, monkeypatch):
    monkeypatch.setattr(collection, "BATCH_ENTRIES", 40 * 17)  # several batches of a forward pass
    coder = random_coder(kind, name)
    dataset = dataset_of(coder)
    data, z = collect(coder, dataset), dense_codes(coder, dataset)
    z = z[~np.isnan(z[:, 0])]
    assert data.n_tokens == len(z) == len(dataset)
    np.testing.assert_array_equal(data.firing_counts, (z != 0).sum(axis=0))
    np.testing.assert_allclose(data.sums, z.sum(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(data.maxima, np.abs(z).max(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(data.dead, np.flatnonzero((z == 0).all(axis=0)))
    np.testing.assert_array_equal(data.dense(0.3), np.flatnonzero((z != 0).mean(axis=0) > 0.3))
    means = np.where(z != 0, z, 0).sum(axis=0) / np.maximum(1, (z != 0).sum(axis=0))
    np.testing.assert_allclose(data.means, means, rtol=1e-5, atol=1e-6)
    for feature in range(coder.n_features):
        sizes = np.abs(z[:, feature][z[:, feature] != 0])
        expected, _ = np.histogram(sizes, data.bin_edges.astype(np.float32))
        np.testing.assert_array_equal(data.histogram[feature], expected)


@pytest.mark.parametrize("waiting", [1, 50, 1 << 20])
def test_top_examples_are_the_largest_values_one_of_each_context(waiting, monkeypatch):
    monkeypatch.setattr(collection, "WAITING", waiting)
    monkeypatch.setattr(collection, "BATCH_ENTRIES", 40 * 17)
    coder = random_coder(name="abs_topk")
    dataset = dataset_of(coder)
    data, z = collect(coder, dataset, n_examples=5), dense_codes(coder, dataset)
    for feature in range(coder.n_features):
        of_contexts = np.nan_to_num(z[:, feature]).reshape(-1, 12)
        peaks = np.abs(of_contexts).max(axis=1)
        expected = -np.sort(-peaks)[:5]
        np.testing.assert_allclose(np.abs(data.top_values[feature]), expected, rtol=1e-6)
        at = data.top_positions[feature]
        assert (at[expected > 0] >= 0).all() and (at[expected == 0] == -1).all()
        at = at[at >= 0]
        assert len(set(at // 12)) == len(at)
        np.testing.assert_allclose(z[at, feature], data.top_values[feature][: len(at)], rtol=1e-6)


def test_the_codes_of_all_contexts_are_kept():
    coder = random_coder()
    dataset = dataset_of(coder)
    codes, z = collect(coder, dataset).codes, dense_codes(coder, dataset)
    np.testing.assert_array_equal(codes.positions, np.flatnonzero(~np.isnan(z[:, 0])))
    np.testing.assert_array_equal(codes.contexts, np.arange(len(dataset.corpus)))
    z = z[codes.positions]
    found = np.zeros_like(z)
    for feature in range(coder.n_features):
        rows, values = codes.of(feature)
        found[rows, feature] = values
    np.testing.assert_allclose(found, z, rtol=1e-3)
    assert ((found != 0) == (z != 0)).all()


def test_beyond_a_number_of_values_whole_contexts_are_kept_at_random():
    coder = random_coder()
    dataset = dataset_of(coder)
    data = collect(coder, dataset, max_kept=1_000)
    codes, whole = data.codes, collect(coder, dataset).codes
    assert 300 < len(codes.values) <= 1_000 < len(whole.values)
    kept = np.isin(whole.positions // 12, codes.contexts)
    np.testing.assert_array_equal(codes.positions, whole.positions[kept])
    assert codes.contexts[-1] > len(dataset.corpus) / 2  # not the first ones
    assert data.firing_counts.sum() == len(whole.values)  # all are counted
    other = collect(coder, dataset, max_kept=1_000, seed=1).codes
    assert not np.array_equal(other.contexts, codes.contexts)


def test_a_bounded_pass_takes_contexts_from_all_of_the_dataset():
    coder = random_coder()
    dataset = dataset_of(coder)
    data = collect(coder, dataset, max_tokens=60)
    assert len(data.corpus) == 5 and 30 < data.n_tokens <= 60
    np.testing.assert_array_equal(data.corpus.tokens[-1], dataset.corpus.tokens[-1])
    assert collect(coder, dataset, max_tokens=10**9).n_tokens == len(dataset)


def test_activations_that_are_not_finite_are_left_out():
    fake = FakeSource(not_finite="q")
    dataset = ActivationDataset.from_texts(fake, ["aqua", "bbbb"], SITE, context_length=8)
    data = collect(random_coder(name="relu"), dataset)
    assert data.n_tokens == 7 and np.isfinite(data.sums).all()


def test_a_coder_that_never_fires_is_collected_too():
    coder = one_to_one()
    dataset = ActivationDataset.from_texts(Letters(), ["abc"], SITE)
    data = collect(coder, dataset)
    assert (data.n_tokens, len(data.dead)) == (3, 6)
    assert data.examples(0) == () and data.co_active(0) == ()
    assert [interval.examples for interval in data.intervals(0, 2)] == [(), ()]


def same(a: FeatureData, b: FeatureData) -> bool:
    names = ("firing_counts", "sums", "maxima", "histogram", "top_values", "top_positions")
    of_codes = ("contexts", "positions", "starts", "features", "values")
    return all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y, group in ((a, b, names), (a.codes, b.codes, of_codes))
        for name in group
    )


@counts_passes
def test_a_pass_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    coder = random_coder()
    # Two contexts of 2,048 tokens go through the model at once, of about nine.
    texts = ["".join(TEXTS) * 30]
    dataset = dataset_of(coder, texts, context_length=64)
    whole = collect(coder, dataset, max_kept=9_000)
    monkeypatch.setattr(collection, "SECONDS_BETWEEN_SAVES", 0.0)
    saves, save = [], FeatureData.save

    def save_and_break(self, path):
        saves.append(save(self, path))
        if len(saves) == 3:
            raise KeyboardInterrupt
        return saves[-1]

    with monkeypatch.context() as patched:
        patched.setattr(FeatureData, "save", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            collect(coder, dataset, max_kept=9_000, path=tmp_path / "features")
    assert not (tmp_path / "features").exists()
    passes = dataset.source.passes
    resumed = collect(coder, dataset, max_kept=9_000, path=tmp_path / "features")
    assert dataset.source.passes - passes == -(-len(dataset.corpus) // 64) - 3
    assert same(resumed, whole) and len(whole.codes.contexts) < len(dataset.corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


@counts_passes
def test_what_is_there_is_not_collected_again(tmp_path):
    coder = random_coder()
    dataset = dataset_of(coder)
    first = collect(coder, dataset, path=tmp_path / "features")
    passes = dataset.source.passes
    assert same(collect(coder, dataset, path=tmp_path / "features"), first)
    assert dataset.source.passes == passes
    coder.b_enc = coder.b_enc + 1  # another coder
    assert not same(collect(coder, dataset, path=tmp_path / "features"), first)
    other = dataset_of(coder, TEXTS[:7])
    assert collect(coder, other, path=tmp_path / "features").n_tokens == len(other)


def test_a_coder_is_told_by_all_of_its_arrays():
    coder = random_coder(name="batch_topk")
    before = {fingerprint(coder)}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = coder[name] + 1e-3
        before.add(fingerprint(coder))
    coder.activation_function.threshold = mx.array(2.5)
    before.add(fingerprint(coder))
    assert len(before) == 6


@pytest.mark.parametrize(
    "options", [{"n_examples": 0}, {"max_kept": 0}, {"max_tokens": 0}], ids=lambda o: next(iter(o))
)
def test_numbers_below_one_are_refused(options):
    coder = random_coder()
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        collect(coder, dataset_of(coder), **options)


def test_collecting_needs_text():
    arrays = ActivationDataset.from_activations(np.ones((5, 6), np.float32))
    with pytest.raises(ValueError, match="needs texts and a language model"):
        collect(one_to_one(), arrays)
