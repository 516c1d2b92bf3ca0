import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxterp.sae import caching, store
from mlxterp.sae import corpus as corpus_module
from mlxterp.sae.caching import Cache
from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.shards import DamagedShard
from mlxterp.sae.shuffle import Span, spans_of
from mlxterp.sae.store import Layout, Store, find_store, is_store
from tests.fakes import SITE, FakeSource

PRECISIONS = ("bfloat16", "float16", "float32", "int8")
COLUMNS = Columns((SITE,), (6,))
TEXTS = ["".join(chr(ord("a") + (i * j) % 26) for j in range(3 + 7 * i % 19)) for i in range(1, 31)]


def shrink(patch) -> None:
    """Several shards, chunks and forwards for a few hundred tokens."""
    patch.setattr(corpus_module, "TOKENS_PER_FORWARD", 32)
    patch.setattr(caching, "SHARD_TOKENS", 64)
    patch.setattr(store, "MOST_CHUNK_ROWS", 10)


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


def cache_of(directory, source=None, texts=TEXTS, precision="float32", context=16, **options):
    source = source or FakeSource()
    corpus = Corpus.from_documents(
        source, texts, context, options.pop("max_tokens", None), options.pop("separate", False)
    )
    layout = Layout(options.pop("columns", COLUMNS), precision)
    given = {"outlier_norm": 1e6, "drop_outliers": False, **options}
    return Cache(source, corpus, layout, Path(directory), **given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    made = cache_of(tmp_path_factory.mktemp("store"))
    made.open()
    return made


@pytest.fixture
def opened(cache):
    return Store.open(cache.path)


def everything(opened):
    """All activations as float32, and their positions."""
    numbers = range(len(opened.chunks))
    parts = [opened.layout.decode(opened.read(i)).astype(mx.float32) for i in numbers]
    positions = np.concatenate([opened.positions(i) for i in numbers])
    return np.concatenate([np.array(part) for part in parts]), positions


# --- precision


def activations(n=200, width=7, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-3, 3, size=(n, 1))
    return (rng.normal(size=(n, width)) * scales).astype(np.float32)


TWO = Columns(("a", "b"), (4, 3))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_encoded_is_decoded(precision):
    layout, x = Layout(TWO, precision), activations()
    rows = layout.encode(mx.array(x))
    assert {name: (a.shape[1:], a.dtype) for name, a in rows.items()} == {
        name: (part.empty(0).shape[1:], part.empty(0).dtype) for name, part in layout.parts.items()
    }
    found = layout.decode(rows)
    assert found.shape == x.shape
    assert mx.array_equal(layout.decode(layout.encode(found)), found)
    if precision == "float32":
        np.testing.assert_array_equal(np.array(found), x)
    if precision == "float16":
        np.testing.assert_array_equal(np.array(found), x.astype(np.float16))
    if precision == "bfloat16":  # round to nearest, ties to even
        bits = x.view(np.uint32).astype(np.uint64)
        expected = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        joined = np.concatenate([rows["a"], rows["b"]], axis=1)
        np.testing.assert_array_equal(joined, expected.astype(np.uint16))


def test_an_int8_is_within_half_a_step_of_each_tokens_and_sites_own_scale():
    layout, x = Layout(TWO, "int8"), activations(2000)
    rows = layout.encode(mx.array(x))
    found = np.array(layout.decode(rows), np.float64)
    for name, columns in TWO.slices.items():
        part = x[:, columns].astype(np.float64)
        scale = np.abs(part).max(axis=1) / 127
        np.testing.assert_allclose(rows[f"{name}/scale"], scale, rtol=1e-6)
        error = np.abs(found[:, columns] - part)
        assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
        assert error.max(axis=1).mean() > 0.2 * scale.mean()
        assert (np.abs(rows[name]).max(axis=1) == 127).all()


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
def test_an_int8_of_shorter_floats_is_as_good(kind):
    x = mx.array(activations(seed=3)).astype(kind)
    layout = Layout(Columns(("a",), (7,)), "int8")
    found = np.array(layout.decode(layout.encode(x)), np.float64)
    exact = np.array(x.astype(mx.float32), np.float64)
    scale = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - exact) <= scale * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_stays_nothing_and_signs_and_extremes_stay(precision):
    layout = Layout(Columns(("a",), (3,)), precision)
    x = np.array([[0, 0, 0], [127, -127, 1], [-1, 0, 1], [0, -0.5, 0.25]], np.float32)
    found = np.array(layout.decode(layout.encode(mx.array(x))).astype(mx.float32))
    assert np.isfinite(found).all() and (found[:3] == x[:3]).all()
    np.testing.assert_allclose(found[3], x[3], atol=0.5 / 127)


def test_an_activation_that_float16_cannot_hold_is_an_error():
    layout = Layout(Columns(("a",), (3,)), "float16")
    with pytest.raises(ValueError, match="65,504.*take 'bfloat16'"):
        layout.encode(mx.array([[1e5, 0.0, -1e6]]))


def test_row_sizes_are_what_is_on_the_disk():
    sizes = {precision: Layout(TWO, precision).row_bytes for precision in PRECISIONS}
    assert sizes == {"bfloat16": 14, "float16": 14, "float32": 28, "int8": 7 + 2 * 4}


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="precision must be one of .*'int8'.*, got 'int4'"):
        Layout(COLUMNS, "int4")  # pyright: ignore[reportArgumentType]


# --- reading


def test_chunks_are_of_a_size_and_in_order(opened, cache):
    sizes = [chunk.n_rows for chunk in opened.chunks]
    assert (
        max(sizes) == 10 and len({chunk.path for chunk in opened.chunks}) == len(cache.shards) > 3
    )
    assert opened.ends == np.cumsum(sizes).tolist() and opened.n_tokens == cache.corpus.n_tokens
    assert opened.columns == COLUMNS


def test_the_corpus_comes_back_equal(opened, cache):
    found, given = opened.corpus, cache.corpus
    np.testing.assert_array_equal(found.tokens, given.tokens)
    np.testing.assert_array_equal(found.owners, given.owners)
    assert found.fingerprint == given.fingerprint
    for name in ("bos_id", "special", "separate", "context", "n_tokens", "n_documents"):
        assert getattr(found, name) == getattr(given, name)


def test_positions_and_documents_are_those_of_the_rows(opened, cache):
    rows, positions = everything(opened)
    assert positions.tolist() == np.flatnonzero(cache.corpus.documents() >= 0).tolist()
    assert rows[:, 0].tolist() == cache.corpus.tokens.reshape(-1)[positions].tolist()
    documents = np.concatenate([opened.documents(i) for i in range(len(opened.chunks))])
    assert documents.tolist() == cache.corpus.owners.reshape(-1)[positions].tolist()
    assert [opened.position(row) for row in range(opened.n_tokens)] == positions.tolist()
    assert opened.position(opened.n_tokens) == cache.corpus.tokens.size


@pytest.mark.parametrize("rows", [range(0, 10), range(3, 7), range(5, 66), range(0, 10**6)])
def test_spans_are_read_side_by_side(opened, rows):
    rows = range(rows.start, min(rows.stop, opened.n_tokens))
    for _ in range(2):  # with and without checksums
        found = opened.read_spans(spans_of(opened.ends, rows))
        np.testing.assert_array_equal(found[SITE], everything(opened)[0][rows.start : rows.stop])
    backwards = opened.read_spans([Span(3, 2, 5), Span(0, 0, 10)])
    expected = np.concatenate([opened.read(3)[SITE][2:5], opened.read(0)[SITE]])
    np.testing.assert_array_equal(backwards[SITE], expected)


def test_a_document_starts_where_its_first_row_is(opened):
    documents = np.concatenate([opened.documents(i) for i in range(len(opened.chunks))])
    starts = 1 + np.flatnonzero(np.diff(documents))
    for row in range(opened.n_tokens):
        start = opened.document_start(row)
        assert start in starts and abs(start - row) == np.abs(starts - row).min()


def test_a_document_that_is_very_long_is_cut_where_one_likes(tmp_path):
    opened = cache_of(tmp_path, texts=["ab", "x" * 600, "cd"]).open()
    assert opened.document_start(300) == 300
    assert opened.document_start(20) == 2 and opened.document_start(590) == 602


# --- what is wrong


@pytest.fixture
def copy(tmp_path):
    """A store of its own, to be damaged."""
    made = cache_of(tmp_path)
    made.open()
    return made.path


def edit_index(path, **changes):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps({**index, **changes}))


def test_an_unfinished_store_says_how_to_finish_it(copy):
    edit_index(copy, shards={})
    with pytest.raises(ValueError, match=f"^{copy} is not finished: harvest into it again"):
        Store.open(copy)


def test_a_later_format_version_is_refused_with_both_versions(copy):
    edit_index(copy, format_version=7)
    with pytest.raises(ValueError, match="has format version 7; .* reads 1. Update mlxterp"):
        Store.open(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not valid JSON"), ("[]", "must hold an object"), ('{"format_version": 1}', "no key")],
)
def test_a_damaged_index_is_named(copy, text, message):
    (copy / "index.json").write_text(text)
    with pytest.raises(ValueError, match=f"{copy / 'index.json'}.*{message}"):
        Store.open(copy)


def damage(path, kind):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "header":
        path.write_bytes(data[:9] + b"\xff" + data[10:])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("kind", ["missing", "cut", "header"])
def test_a_shard_that_is_not_whole_is_named_at_once(copy, kind):
    shard = copy / "000002.safetensors"
    damage(shard, kind)
    with pytest.raises(DamagedShard, match=f"^{shard} ") as caught:
        Store.open(copy)
    assert caught.value.path == shard


def test_a_shard_of_another_store_is_named(copy, tmp_path):
    other = cache_of(tmp_path / "other", texts=[text.upper() for text in TEXTS[::-1]])
    other.open()
    shard = copy / "000001.safetensors"
    shard.write_bytes((other.path / "000001.safetensors").read_bytes())
    with pytest.raises(DamagedShard, match=f"^{shard} is not the one of the index"):
        Store.open(copy)


def test_changed_data_is_found_when_it_is_read_first(copy):
    shard = copy / "000002.safetensors"
    damage(shard, "data")
    opened = Store.open(copy)
    numbers = [i for i, chunk in enumerate(opened.chunks) if chunk.path == shard]
    for i in range(len(opened.chunks)):
        if i != numbers[-1]:
            opened.read(i)
    room = {SITE: np.empty((opened.chunks[numbers[-1]].n_rows, 6), np.float32)}
    for into in (None, room):
        with pytest.raises(DamagedShard, match=f"^{shard} is damaged: a checksum is wrong"):
            opened.read(numbers[-1], into)


def test_verify_reads_everything_again(copy):
    opened = Store.open(copy)
    opened.verify()
    damage(copy / "000000.safetensors", "data")
    with pytest.raises(DamagedShard, match="000000.safetensors is damaged"):
        opened.verify()


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_corpus_that_is_not_whole_is_named(copy, kind):
    damage(copy / "corpus.safetensors", kind)
    with pytest.raises(DamagedShard, match=f"^{copy / 'corpus.safetensors'} "):
        Store.open(copy).corpus


def test_a_directory_of_one_store_stands_for_it(cache, tmp_path):
    assert find_store(cache.path) == find_store(cache.cache_dir) == cache.path
    assert is_store(cache.path) and is_store(cache.cache_dir) and not is_store(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no activations"):
        Store.open(tmp_path)
    paths = [cache_of(tmp_path, texts=texts).open().path for texts in (TEXTS[:3], TEXTS[3:6])]
    with pytest.raises(ValueError, match="several sets of activations; open one of") as caught:
        Store.open(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


# --- arrays of others


def test_arrays_in_a_directory_are_read_in_the_order_of_names(tmp_path):
    x = activations(57, 5)
    np.save(tmp_path / "a.npy", x[:23])
    save_file({"second": x[30:], "first": x[23:30]}, tmp_path / "b.safetensors")
    (tmp_path / "notes.txt").write_text("nothing")
    opened = Store.of_directory(tmp_path, "here")
    assert opened.columns == Columns(("here",), (5,)) and opened.n_tokens == 57
    assert opened.corpus is None and opened.document_start(9) == 9 and opened.n_skipped == 0
    found = opened.read_spans(spans_of(opened.ends, range(57)))["here"]
    expected = np.concatenate([x[:23], x[23:30], x[30:]])
    np.testing.assert_array_equal(found, expected)
    np.save(tmp_path / "c.npy", x.astype(np.float16))
    with pytest.raises(ValueError, match="all be .*of one width and one of the types"):
        Store.of_directory(tmp_path, "here")


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_arrays_keep_their_type(tmp_path, precision):
    x = mx.array(activations(13, 5)).astype(getattr(mx, precision))
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": x})
    opened = Store.of_directory(tmp_path, "here")
    found = opened.layout.decode(opened.read_spans(spans_of(opened.ends, range(13))))
    assert found.dtype == x.dtype and mx.array_equal(found, x)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3)), "float64"),
        (np.zeros((4, 3), np.int8), "int8"),
        (np.zeros(4, np.float32), "F32"),
        (np.zeros((4, 3, 2), np.float32), "F32"),
        (np.zeros((4, 3), np.float32).T, "must be in C order"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        Store.of_directory(tmp_path, "here")


def test_a_directory_without_arrays_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no .npy or .safetensors files"):
        Store.of_directory(tmp_path, "here")


def test_an_array_cut_short_is_named(tmp_path):
    save_file({"x": activations(20, 5)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-1])
    opened = Store.of_directory(tmp_path, "here")
    with pytest.raises(DamagedShard, match="a.safetensors is cut short"):
        opened.read(len(opened.chunks) - 1)
