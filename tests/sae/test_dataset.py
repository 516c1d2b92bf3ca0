from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.shuffle import shuffle_buffer
from tests.fakes import BOS, EOS, FIRST, SITE, FakeSource

CONTEXT = 16
TINY_BUFFER = 4 * 6 * 128  # 128 activations of width 6


def random_texts(n=30, length=25, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefghijklmnop"), size=length)) for _ in range(n)]


def dataset(texts=None, **options) -> ActivationDataset:
    options = {"context_length": CONTEXT, **options}
    return ActivationDataset.from_texts(FakeSource(), texts or random_texts(), SITE, **options)


def token_ids(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0].tolist()]


def letters(texts) -> Counter:
    return Counter(FIRST + ord(character) - ord(" ") for text in texts for character in text)


@pytest.mark.parametrize("buffer_bytes", [1 << 30, TINY_BUFFER], ids=["in memory", "streaming"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_of_the_text_comes_once_and_nothing_else(shuffle, buffer_bytes):
    texts = random_texts()
    data = dataset(texts, shuffle=shuffle, buffer_bytes=buffer_bytes)
    assert data.in_memory == (buffer_bytes > 10**6)
    for epoch in range(2):
        found = token_ids(data.batches(32, epoch=epoch))
        assert Counter(found) == letters(texts)
        assert not {BOS, EOS} & set(found)
    assert len(data) == data.n_tokens == sum(map(len, texts))


@pytest.mark.parametrize("buffer_bytes", [1 << 30, TINY_BUFFER], ids=["in memory", "streaming"])
def test_a_pass_is_given_by_seed_and_epoch(buffer_bytes):
    first, second = (dataset(buffer_bytes=buffer_bytes) for _ in range(2))
    order = token_ids(first.batches(32, epoch=1, seed=5))
    assert token_ids(second.batches(32, epoch=1, seed=5)) == order
    assert token_ids(first.batches(32, epoch=1, seed=5)) == order
    assert token_ids(first.batches(32, epoch=2, seed=5)) != order
    assert token_ids(first.batches(32, epoch=1, seed=6)) != order


@pytest.mark.parametrize("buffer_bytes", [1 << 30, TINY_BUFFER], ids=["in memory", "streaming"])
@pytest.mark.parametrize("start", [0, 1, 7, 23, 24, 100])
def test_start_leaves_out_exactly_the_first_batches(start, buffer_bytes):
    data = dataset(buffer_bytes=buffer_bytes)
    batches = [token_ids([b]) for b in data.batches(32, epoch=3)]
    assert len(batches) == 24 and len(batches[-1]) == 750 - 23 * 32
    assert [token_ids([b]) for b in data.batches(32, epoch=3, start=start)] == batches[start:]


def test_drop_last_leaves_out_the_smaller_batch():
    data = dataset()
    assert {len(b) for b in data.batches(32, drop_last=True)} == {32}
    assert sum(1 for _ in data.batches(32, drop_last=True)) == 23


@pytest.mark.parametrize("buffer_bytes", [1 << 30, TINY_BUFFER], ids=["in memory", "streaming"])
def test_without_shuffling_the_text_keeps_its_order(buffer_bytes):
    texts = random_texts()
    found = token_ids(dataset(texts, shuffle=False, buffer_bytes=buffer_bytes).batches(32))
    assert found == [FIRST + ord(c) - ord(" ") for c in "".join(texts)]


def test_documents_per_batch_is_near_the_ideal_when_shuffled_and_low_when_not():
    texts = random_texts(n=200, length=30)
    # 64 tokens drawn from 200 documents of equal length: 200 * (1 - (1 - 1/200)^64) are distinct.
    ideal = 200 * (1 - (1 - 1 / 200) ** 64)
    assert dataset(texts).documents_per_batch(64) == pytest.approx(ideal, rel=0.05)
    assert dataset(texts, shuffle=False).documents_per_batch(64) < 5
    streamed = dataset(texts, buffer_bytes=4 * 6 * 1024)
    assert not streamed.in_memory and streamed.documents_per_batch(64) > 0.6 * ideal


def test_documents_per_batch_says_what_the_batches_hold():
    # Each document is one letter, so the letters of a batch are its documents.
    texts = [chr(ord("0") + i) * 20 for i in range(60)]
    for options in ({}, {"shuffle": False}, {"buffer_bytes": TINY_BUFFER}):
        data = dataset(texts, **options)
        counted = np.mean([len(set(token_ids([b]))) for b in data.batches(64, drop_last=True)])
        assert data.documents_per_batch(64, n_batches=100) == pytest.approx(counted, rel=0.15)


def test_shuffle_buffer_emits_every_row_and_mixes_distant_ones():
    rows = [mx.arange(i, i + 10)[:, None].astype(mx.float32) for i in range(0, 1000, 10)]
    out = token_ids(shuffle_buffer(iter(rows), 400, 32, np.random.default_rng(0)))
    assert sorted(out) == list(range(1000))
    first = np.array(out[:32])
    assert first.max() - first.min() > 250
    assert np.corrcoef(np.arange(1000), out)[0, 1] < 0.95


def test_activations_in_memory_are_computed_once():
    source = FakeSource()
    data = ActivationDataset.from_texts(source, random_texts(), SITE, context_length=CONTEXT)
    assert source.passes == 0
    for epoch in range(3):
        token_ids(data.batches(32, epoch=epoch))
    assert source.passes == 2  # one of them a sample, which says what an outlier is


def test_split_has_no_document_on_both_sides():
    texts = [chr(ord("0") + i) * 20 for i in range(60)]
    parts = [Counter(token_ids(part.batches(32))) for part in dataset(texts).split(0.1, seed=2)]
    assert not set(parts[0]) & set(parts[1])
    assert parts[0] + parts[1] == letters(texts)
    assert set(parts[1].values()) == {20} and len(parts[1]) == 6


def test_a_single_document_is_cut():
    training, held_out = dataset(["abcdefghij" * 10]).split(0.2)
    assert (len(training), len(held_out)) == (80, 20)


def test_arrays_are_split_at_random_by_token():
    array = np.arange(100, dtype=np.float32)[:, None]
    training, held_out = ActivationDataset.from_activations(array).split(0.1, seed=0)
    parts = token_ids(training.batches(8)), token_ids(held_out.batches(8))
    assert len(parts[1]) == 10 and sorted(parts[0] + parts[1]) == list(range(100))
    assert max(parts[1]) - min(parts[1]) > 20


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"validation must be in \(0, 1\), got {share}"):
        dataset().split(share)


def test_one_token_cannot_be_split():
    with pytest.raises(ValueError, match="1 token and no part to hold out.*validation_split=0"):
        ActivationDataset.from_activations(np.ones((1, 3), np.float32)).split(0.5)


def test_max_samples_bounds_the_tokens():
    assert len(dataset(max_samples=100)) == 100
    with pytest.raises(ValueError, match="max_samples must be >= 1, got 0"):
        dataset(max_samples=0)


def test_texts_shorter_than_a_context_are_packed_together():
    data = dataset(["ab", "c", "def"])
    assert Counter(token_ids(data.batches(4))) == letters(["abcdef"])
    assert data.info(batch_size=6).documents_per_batch == 3


@pytest.mark.parametrize("length", [1, 0, 65])
def test_a_context_beyond_the_model_is_refused_with_the_limit(length):
    with pytest.raises(ValueError, match=rf">= 2 and at most the model's 64, got {length}"):
        dataset(context_length=length)


def test_the_default_context_is_what_the_model_takes():
    assert dataset(context_length=None).corpus.context == 64
    unlimited = FakeSource(context_length=None)
    data = ActivationDataset.from_texts(unlimited, ["abc"], SITE)
    assert data.corpus.context == 256
    with pytest.raises(ValueError, match=">= 2, got 1"):
        ActivationDataset.from_texts(unlimited, ["abc"], SITE, context_length=1)


def test_a_site_that_does_not_exist_is_an_error(model):
    with pytest.raises(ValueError, match="no site"):
        ActivationDataset.from_texts(FakeSource(), ["abc"], 3)
    with pytest.raises(ValueError, match="layers.99.mlp"):
        ActivationDataset.from_texts(model, ["abc"], 99)
    with pytest.raises(ValueError, match="nearest existing: layers.2.mlp"):
        ActivationDataset.from_texts(model, ["abc"], 2, "mpl")


def test_a_site_may_be_named_whole_or_by_layer_and_component(model):
    for layer, component in ((2, None), (2, "mlp"), ("layers.2.mlp", None)):
        data = ActivationDataset.from_texts(model, ["some text"], layer, component)
        assert data.columns.names == ("layers.2.mlp",) and data.columns.width == 128


def test_several_sites_lie_side_by_side(model):
    sites = ["layers.1.mlp", "layers.4.attn"]
    data = ActivationDataset.from_texts(model, ["some text to read"], sites, shuffle=False)
    (batch,) = data.batches(100)
    one = ActivationDataset.from_texts(model, ["some text to read"], sites[1], shuffle=False)
    (alone,) = one.batches(100)
    assert batch.shape == (len(data), 256)
    np.testing.assert_allclose(np.array(batch[:, 128:]), np.array(alone), atol=1e-5)


def test_rows_of_an_array_that_are_not_finite_are_left_out_and_counted():
    array = np.arange(20, dtype=np.float32).reshape(10, 2)
    array[3, 1], array[7, 0] = np.nan, np.inf
    with pytest.warns(UserWarning, match="2 of 10 activations are not finite and were left out"):
        data = ActivationDataset.from_activations(array)
    assert data.n_skipped == 2 and len(data) == 8
    assert sorted(token_ids(data.batches(4))) == [0, 2, 4, 8, 10, 12, 16, 18]
    training, held_out = data.split(0.25)
    assert training.n_skipped == 2 and held_out.n_skipped == 0


@pytest.mark.parametrize("buffer_bytes", [1 << 30, TINY_BUFFER], ids=["in memory", "streaming"])
def test_tokens_of_a_text_that_are_not_finite_are_left_out_and_counted(buffer_bytes):
    texts = random_texts()
    data = ActivationDataset.from_texts(
        FakeSource(not_finite="ab"), texts, SITE, context_length=CONTEXT, buffer_bytes=buffer_bytes
    )
    bad = sum(text.count("a") + text.count("b") for text in texts)
    with pytest.warns(UserWarning, match=f"{bad} of 750 activations are not finite"):
        found = token_ids(data.batches(32))
    assert data.n_skipped == bad
    assert Counter(found) == letters("".join(texts).replace("a", "").replace("b", ""))


@pytest.mark.parametrize("buffer_bytes", [1 << 30, 96], ids=["in memory", "streaming"])
def test_no_finite_activation_at_all_is_an_error(buffer_bytes):
    with pytest.raises(ValueError, match="None of the 10 activations is finite"):
        ActivationDataset.from_activations(np.full((10, 2), np.nan, np.float32))
    data = ActivationDataset.from_texts(
        FakeSource(not_finite="a"), ["a" * 10], SITE, buffer_bytes=buffer_bytes
    )
    with pytest.raises(ValueError, match="None of the 10 activations is finite"):
        list(data.batches(4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4), np.float32), r"both above 0; got \(0, 4\)"),
        (np.zeros((4, 0), np.float32), r"both above 0; got \(4, 0\)"),
        (np.zeros(4, np.float32), r"shape \[n_tokens, width\].*got \(4,\)"),
        (np.zeros((2, 3, 4), np.float32), r"got \(2, 3, 4\)"),
        (np.zeros((3, 4), np.int32), "must be floating point, got mlx.core.int32"),
    ],
)
def test_unusable_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        ActivationDataset.from_activations(array)


def test_arrays_of_several_sites_must_agree_in_length():
    a, b = np.ones((5, 2), np.float32), np.ones((6, 3), np.float32)
    with pytest.raises(ValueError):
        ActivationDataset.from_activations({"a": a, "b": b})
    data = ActivationDataset.from_activations({"a": a, "b": b[:5]})
    assert (data.columns.names, data.columns.widths) == (("a", "b"), (2, 3))


def test_a_batch_needs_a_token():
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        list(dataset().batches(0))


def test_info_and_repr_say_what_there_is():
    info = dataset().info(batch_size=64)
    assert (info.n_tokens, info.n_documents, info.context, info.width) == (750, 30, CONTEXT, 6)
    assert info.n_bytes == 750 * 6 * 4 and info.where == "kept in memory" and info.sites == (SITE,)
    assert repr(dataset()) == "ActivationDataset(750 tokens of layers.0.mlp, width 6)"
    arrays = ActivationDataset.from_activations(np.ones((5, 2), np.float16))
    assert arrays.info().documents_per_batch is None and arrays.n_bytes == 20
