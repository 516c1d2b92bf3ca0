"""Datasets that are read from a disk; those in memory and computed again are in test_dataset.py."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, ActivationDataset, SAEConfig, SAETrainer, caching, store
from tests.fakes import FIRST, SITE, FakeSource
from tests.sae.runs import Interrupt

CONTEXT, BATCH = 16, 32
BUFFER = 3000  # of activations of 12 bytes: groups of 125


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(store, "MOST_CHUNK_ROWS", 20)
    monkeypatch.setattr(caching, "SHARD_TOKENS", 160)


def texts(n=40, length=25) -> list[str]:
    """Each of one letter, so that a token's activation tells its document."""
    return [chr(ord("0") + i) * length for i in range(n)]


def on_disk(directory, source=None, **options) -> ActivationDataset:
    options = {"context_length": CONTEXT, "buffer_bytes": BUFFER, "cache_dir": directory, **options}
    return ActivationDataset.from_texts(source or FakeSource(), texts(), SITE, **options)


def ids(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0].tolist()]


WHOLE = Counter(FIRST + ord(c) - ord(" ") for text in texts() for c in text)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_token_comes_once_in_every_pass(tmp_path, shuffle, precision):
    data = on_disk(tmp_path, shuffle=shuffle, precision=precision)
    assert not data.in_memory and len(data) == 1000
    passes = [ids(data.batches(BATCH, epoch=epoch)) for epoch in range(2)]
    assert all(Counter(found) == WHOLE for found in passes)
    assert (passes[0] == passes[1]) == (not shuffle)
    assert ids(data.batches(BATCH)) == passes[0]
    if not shuffle:
        assert passes[0] == [i for i in WHOLE for _ in range(25)]


def test_in_memory_it_is_the_same_data(tmp_path):
    small, large = on_disk(tmp_path), on_disk(tmp_path, buffer_bytes=1 << 20)
    assert large.in_memory and Counter(ids(large.batches(BATCH))) == WHOLE
    assert next(large.batches(8)).dtype == next(small.batches(8)).dtype == mx.bfloat16


@pytest.mark.parametrize("start", [0, 1, 3, 4, 17, 31, 40])
def test_start_leaves_out_exactly_the_first_batches(tmp_path, start):
    data = on_disk(tmp_path)
    whole = [ids([batch]) for batch in data.batches(BATCH, epoch=3)]
    assert [ids([b]) for b in data.batches(BATCH, epoch=3, start=start)] == whole[start:]


def test_parts_have_no_document_in_common_and_keep_their_text(tmp_path):
    parts = on_disk(tmp_path).split(0.2)
    found = [Counter(ids(part.batches(BATCH))) for part in parts]
    assert not set(found[0]) & set(found[1]) and found[0] + found[1] == WHOLE
    assert len(parts[1]) == 200 and set(found[1].values()) == {25}
    for part, counted in zip(parts, found, strict=True):
        tokens = part.corpus.tokens[part.corpus.documents() >= 0]
        assert Counter(tokens.tolist()) == counted
        assert part.corpus.n_documents == len(counted) == part.info().n_documents


def test_documents_are_in_random_order_unless_asked_otherwise(tmp_path):
    held_out = on_disk(tmp_path).split(0.2)[1]
    assert sorted(set(ids(held_out.batches(BATCH)))) != [*WHOLE][-8:]
    in_order = on_disk(tmp_path, shuffle=False).split(0.2)[1]
    assert sorted(set(ids(in_order.batches(BATCH)))) == [*WHOLE][-8:]


def test_info_says_how_well_batches_mix(tmp_path):
    shuffled, in_order = (on_disk(tmp_path, shuffle=s).info(BATCH) for s in (True, False))
    counted = [len(set(ids([b]))) for b in on_disk(tmp_path).batches(BATCH)]
    assert shuffled.documents_per_batch == pytest.approx(np.mean(counted), rel=0.4)
    assert in_order.documents_per_batch < 3 < shuffled.documents_per_batch
    assert in_order.mixing < 0.2 and "read from the disk" in repr(in_order)


def spoil(path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("buffer_bytes", [BUFFER, 1 << 20])
def test_a_shard_that_is_damaged_is_made_again_in_the_middle_of_a_pass(tmp_path, buffer_bytes):
    expected = ids(on_disk(tmp_path, buffer_bytes=buffer_bytes).batches(BATCH))
    data = on_disk(tmp_path, buffer_bytes=buffer_bytes)
    shards = sorted(tmp_path.glob("*/0*.safetensors"))
    before = [shard.read_bytes() for shard in shards]
    spoil(shards[3])
    assert ids(data.batches(BATCH)) == expected
    assert [shard.read_bytes() for shard in shards] == before


def test_without_the_text_a_damaged_shard_is_named(tmp_path):
    on_disk(tmp_path)
    spoil(sorted(tmp_path.glob("*/0*.safetensors"))[2])
    opened = ActivationDataset.open(tmp_path, buffer_bytes=BUFFER)
    with pytest.raises(ValueError, match=r"000002\.safetensors is damaged.*from_texts"):
        ids(opened.batches(BATCH))


def test_open_takes_the_model_that_the_activations_are_from_and_no_other(tmp_path):
    on_disk(tmp_path)
    opened = ActivationDataset.open(tmp_path, FakeSource())
    assert Counter(ids(opened.batches(BATCH))) == WHOLE and opened.corpus.n_documents == 40

    class Another(FakeSource):
        fingerprint = "another"

    with pytest.raises(ValueError, match="activations of fake, not of the model given"):
        ActivationDataset.open(tmp_path, Another())


def test_a_directory_of_arrays_is_read_in_the_order_of_names(tmp_path):
    rows = np.arange(300, dtype=np.float32).reshape(100, 3)
    np.save(tmp_path / "a.npy", rows[:70])
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"x": mx.array(rows[70:])})
    data = ActivationDataset.from_activations(tmp_path, site=SITE, shuffle=False)
    assert (len(data), data.columns.names, data.columns.width) == (100, (SITE,), 3)
    for data.buffer_bytes in (1 << 20, 600):
        found = np.concatenate([np.array(batch) for batch in data.batches(32)])
        np.testing.assert_array_equal(found, rows)
    np.save(tmp_path / "c.npy", rows.astype(np.float16))
    with pytest.raises(ValueError, match="of one width and one of the types"):
        ActivationDataset.from_activations(tmp_path)


CONFIG = SAEConfig(
    k=2, expansion_factor=4, batch_size=BATCH, num_epochs=2, learning_rate=1e-2, log_every=5,
    checkpoint_every=7, resample_dead_every=0, validation_split=0.1,
)  # fmt: skip


def arrays(sae: SAE) -> list[np.ndarray]:
    return [np.array(array) for array in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]


def test_a_run_from_the_disk_goes_on_in_the_middle_of_an_epoch_to_the_same_result(tmp_path):
    data = on_disk(tmp_path / "cache")
    expected = SAETrainer(CONFIG, tmp_path / "whole").fit(data)

    with pytest.raises(KeyboardInterrupt):
        SAETrainer(CONFIG, tmp_path / "cut", callbacks=[Interrupt(12)]).fit(data)
    found = SAETrainer(CONFIG, tmp_path / "cut").fit(on_disk(tmp_path / "cache"), resume=True)
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_takes_the_path_of_activations(tmp_path):
    source = FakeSource()
    on_disk(tmp_path, source)
    passes = source.passes
    sae = SAETrainer.train(source, SITE, dataset=str(tmp_path), config=CONFIG, verbose=False)
    assert source.passes == passes and sae.metadata.data["documents"] == 40


def test_a_list_of_token_ids_and_an_array_of_contexts(tmp_path):
    rows = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    for tokens in (rows, mx.array(rows), rows.tolist()):
        data = ActivationDataset.from_tokens(FakeSource(bos=False), tokens, SITE, shuffle=False)
        assert ids(data.batches(3)) == rows.reshape(-1).tolist()
    assert ActivationDataset.from_tokens(FakeSource(), rows, SITE).corpus.context == 4
    with pytest.raises(ValueError, match=r"must have shape \[n, length\]"):
        ActivationDataset.from_tokens(FakeSource(), rows[0], SITE)


@pytest.mark.parametrize("buffer_bytes", [BUFFER, 1 << 20], ids=["disk", "memory"])
@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16, mx.float32])
def test_rows_of_files_that_are_not_finite_are_counted_with_one_warning(
    tmp_path, kind, buffer_bytes
):
    array = np.arange(4000, dtype=np.float32).reshape(1000, 4) % 1000
    array[3, 1], array[3, 2], array[700, 0] = np.nan, np.inf, -np.inf
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.array(array).astype(kind)})
    data = ActivationDataset.from_activations(tmp_path)
    data.buffer_bytes = buffer_bytes
    with pytest.warns(UserWarning, match=f"{tmp_path} holds activations that are not f") as caught:
        for epoch in range(2):
            assert sum(map(len, data.batches(BATCH, epoch=epoch))) == len(data) == 1000
    assert len(caught) == 1 and data.n_skipped == data.info().n_skipped == 2


@pytest.mark.parametrize(
    "option", [{"context_length": 8}, {"max_samples": 9}, {"separate_documents": True}]
)
def test_options_that_do_nothing_for_a_corpus_are_refused(option):
    corpus = ActivationDataset.from_texts(FakeSource(), texts(), SITE).corpus
    same = ActivationDataset.from_texts(FakeSource(), corpus, SITE, shuffle=False)
    assert same.corpus is corpus
    with pytest.raises(ValueError, match="must be left out for a corpus"):
        ActivationDataset.from_texts(FakeSource(), corpus, SITE, **option)


def test_a_curated_dataset_holds_what_was_chosen_and_says_what_was_not(tmp_path):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
    given = [" ".join(rng.choice(words, 40)) for _ in range(12)]
    options = {"max_samples": 600, "diversity_metric": "kmeans", "context_length": CONTEXT}
    for more in ({}, {"cache_dir": tmp_path}):
        data = ActivationDataset.curate(FakeSource(), [given[0], *given], SITE, **options, **more)
        assert data.report.documents_dropped["exact_duplicate"] == 1
        assert len(data) == data.report.tokens_kept == 600 == len(ids(data.batches(BATCH)))
        assert data.corpus.bos_id == 0
