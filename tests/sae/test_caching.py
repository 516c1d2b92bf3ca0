"""Harvesting to disk: what was taken before an interruption is kept, and nothing is taken twice."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import caching, files, shards
from mlxterp.sae.coder import Columns
from mlxterp.sae.harvest import harvest
from mlxterp.sae.shards import DamagedShard, ShardWriter
from mlxterp.sae.store import Store
from tests.fakes import SITE, FakeSource, counts_passes
from tests.sae.test_harvest import Tall, ids
from tests.sae.test_parallel import ROOT, launch
from tests.sae.test_store import PRECISIONS, cache_of, damage, everything, shrink


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)
    for module in (caching, files, shards):  # only a power cut would show it
        monkeypatch.setattr(module, "sync", lambda path: None)


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("0*.safetensors"))}


def versions(path: Path) -> dict[str, tuple[int, int]]:
    """Which file it is that has a name: one that is made again is another."""
    found = {file.name: file.stat() for file in path.glob("0*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files of a harvest that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return contents(cache_of(tmp_path_factory.mktemp("reference")).open().path)


def live(cache):
    """The same, straight from the model."""
    found = list(
        harvest(cache.source, cache.corpus, cache.layout.columns, np.arange(len(cache.corpus)))
    )
    activations = np.concatenate([np.array(part.activations) for part in found])
    return activations, np.concatenate([part.positions for part in found])


# --- what is kept


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("separate", [False, True])
def test_tokens_are_those_of_a_live_harvest_in_order(tmp_path, precision, separate):
    cache = cache_of(tmp_path, precision=precision, separate=separate)
    rows, positions = everything(cache.open())
    expected, where = live(cache)
    np.testing.assert_array_equal(positions, where)
    assert len(rows) == cache.corpus.n_tokens
    step = np.abs(expected).max(axis=1, keepdims=True)
    relative = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.501 / 127}[precision]
    assert (np.abs(rows - expected) <= relative * step).all()
    assert (rows == expected).all() == (precision == "float32")


@counts_passes
def test_memory_does_not_grow_though_other_numbers_of_positions_count(tmp_path):
    sizes, columns = [], Columns((SITE,), (1024,))
    source = Watched(
        lambda: sizes.append(mx.get_active_memory() + mx.get_cache_memory()), width=1024
    )
    texts = ["a" * (1 + i // 8) for i in range(120)]  # from 2 to 30 positions in a forward
    mx.clear_cache()
    cache_of(tmp_path, source, texts, columns=columns, separate=True).open()
    assert len(sizes) == 62 and max(sizes[31:]) <= max(sizes[:31]) + 4096


def test_several_sites_are_kept_side_by_side(tmp_path):
    class TwoSites(FakeSource):
        def site(self, layer, component=None):
            return layer

        def run(self, tokens, **options):
            hidden = super().run(tokens, **{**options, "capture": [SITE]})[SITE]
            return {"a": hidden, "b": 2 * hidden[..., :3]}

    cache = cache_of(tmp_path, TwoSites(), columns=Columns(("a", "b"), (6, 3)))
    rows, _ = everything(cache.open())
    np.testing.assert_array_equal(rows, live(cache)[0])
    np.testing.assert_array_equal(rows[:, 6:], 2 * rows[:, :3])


@counts_passes
def test_opening_again_harvests_nothing(tmp_path):
    cache = cache_of(tmp_path)
    n_forwards = -(-len(cache.corpus) // 2)
    first = cache.open()
    # Two more: the limits of the norm are measured, and the time that it will take.
    assert cache.source.passes == n_forwards + 2
    again = cache_of(tmp_path)
    assert again.open().path == first.path == again.path
    assert again.source.passes == 0
    Store.open(cache.path)
    assert [*tmp_path.iterdir()] == [cache.path]
    assert {name for name in contents(cache.path) if not name.startswith("0")} == {
        "index.json", "corpus.safetensors",
    }  # fmt: skip


def test_the_same_harvest_gives_the_same_bytes(tmp_path, reference):
    assert contents(cache_of(tmp_path).open().path) == reference


def test_everything_that_matters_has_a_directory_of_its_own(tmp_path):
    class Other(FakeSource):
        fingerprint = "beef"

    class Renamed(FakeSource):
        name = "elsewhere/fake"

    plain = cache_of(tmp_path)
    paths = [
        cache.path
        for cache in (
            plain,
            cache_of(tmp_path, Other()),
            cache_of(tmp_path, columns=Columns(("layers.1.mlp",), (6,))),
            cache_of(tmp_path, columns=Columns((SITE,), (7,))),
            cache_of(tmp_path, texts=["another"]),
            cache_of(tmp_path, context=15),
            cache_of(tmp_path, separate=True),
            cache_of(tmp_path, max_tokens=50),
            *(cache_of(tmp_path, precision=p) for p in PRECISIONS if p != "float32"),
            cache_of(tmp_path, outlier_norm=5.0),
            cache_of(tmp_path, drop_outliers=True),
        )
    ]
    assert len(set(paths)) == len(paths)
    assert cache_of(tmp_path).path == cache_of(tmp_path, Renamed()).path == plain.path
    assert plain.path.name.startswith("layers.0.mlp-")


# --- what is cut off


class Interrupted(FakeSource):
    """Fails at a forward pass."""

    def __init__(self, at, error=RuntimeError, **options):
        super().__init__(**options)
        self.at, self.error = at, error

    def run(self, *args, **options):
        if self.passes == self.at:
            raise self.error("cut off")
        return super().run(*args, **options)


@counts_passes
def test_a_harvest_cut_off_at_any_forward_goes_on_where_it_was(tmp_path, reference):
    at, most = 0, 0
    while True:
        directory, error = tmp_path / str(at), (RuntimeError, KeyboardInterrupt)[at % 2]
        cut_off = cache_of(directory, Interrupted(at, error))
        n_shards = len(cut_off.shards)
        try:
            cut_off.open()
        except error:
            pass
        else:
            break
        kept = versions(cut_off.path)
        most = max(most, len(kept))
        with pytest.raises(ValueError, match="is not finished|no activations"):
            Store.open(cut_off.path)
        again = cache_of(directory)
        again.open()
        assert contents(again.path) == reference
        assert {
            name: version for name, version in versions(again.path).items() if name in kept
        } == kept
        contexts = sum(len(again.shards[name]) for name in again.shards if name not in kept)
        assert again.source.passes <= -(-contexts // 2) + 2
        assert again.source.passes >= -(-contexts // 2)
        at += 1
    assert at == -(-len(cut_off.corpus) // 2) + 2 and most >= n_shards - 2


@counts_passes
def test_what_all_forwards_were_made_for_is_kept_though_it_was_still_being_written(
    tmp_path, monkeypatch
):
    """Two shards, and the first forward of a third."""
    writing = threading.Event()
    add = ShardWriter.add

    def slow(self, rows):
        writing.wait(0.2)
        add(self, rows)

    monkeypatch.setattr(ShardWriter, "add", slow)
    cache = cache_of(tmp_path, Interrupted(2 + 4))
    with pytest.raises(RuntimeError, match="cut off"):
        cache.open()
    assert [*shard_bytes(cache.path)] == ["000000.safetensors", "000001.safetensors"]
    assert not [*cache.path.glob("*.unfinished")]


KILLED = """
import os, signal, sys
import pytest
from tests.sae.test_caching import Interrupted, cache_of, shrink

class Killed(Interrupted):
    def run(self, *args, **options):
        if self.passes == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(*args, **options)

shrink(pytest.MonkeyPatch())
cache_of(sys.argv[1], Killed(int(sys.argv[2]))).open()
"""


@counts_passes
def test_a_harvest_that_was_killed_goes_on_where_it_was(tmp_path, reference):
    command = [sys.executable, "-c", KILLED, str(tmp_path), "13"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    cache = cache_of(tmp_path)
    kept = versions(cache.path)
    assert 2 <= len(kept) <= 5
    cache.open()
    assert contents(cache.path) == reference
    assert {name: version for name, version in versions(cache.path).items() if name in kept} == kept
    missing = sum(len(cache.shards[name]) for name in cache.shards if name not in kept)
    assert cache.source.passes == -(-missing // 2) + 1


# --- what is damaged


@counts_passes
@pytest.mark.parametrize("kind", ["missing", "cut", "header"])
@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(
    tmp_path, reference, caplog, kind, number
):
    first = cache_of(tmp_path)
    first.open()
    before = versions(first.path)
    name = [*before][number] if number else sorted(before)[0]
    damage(first.path / name, kind)
    again = cache_of(tmp_path)
    with caplog.at_level(logging.WARNING, "mlxterp"):
        again.open()
    assert contents(again.path) == reference
    after = versions(again.path)
    assert {n for n in after if after[n] != before[n]} == {name}
    assert again.source.passes == -(-len(again.shards[name]) // 2) + 1
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (kind != "missing")
    assert all(str(first.path / name) in text and "harvested again" in text for text in warned)


def test_changed_data_are_named_and_made_again(tmp_path, reference, caplog):
    cache = cache_of(tmp_path)
    cache.open()
    before, name = versions(cache.path), "000003.safetensors"
    damage(cache.path / name, "data")
    opened = cache.open()  # looks at no data
    with pytest.raises(DamagedShard) as caught:
        opened.verify()
    assert caught.value.path == cache.path / name
    with caplog.at_level(logging.WARNING, "mlxterp"):
        cache.remake(caught.value.path).verify()
    assert contents(cache.path) == reference
    after = versions(cache.path)
    assert {n for n in after if after[n] != before[n]} == {name}
    assert str(cache.path / name) in caplog.text


def test_a_damaged_index_is_made_again_without_a_harvest(tmp_path, reference):
    cache = cache_of(tmp_path)
    cache.open()
    before, passes = versions(cache.path), cache.source.passes
    for text in ("", "{}", (cache.path / "index.json").read_text()[:-40]):
        (cache.path / "index.json").write_text(text)
        cache.open()
        assert contents(cache.path) == reference and versions(cache.path) == before
        passes += 1  # for the limits of the norm
        assert cache.source.passes == passes


def test_a_corpus_that_is_missing_is_made_again(tmp_path, reference):
    cache = cache_of(tmp_path)
    cache.open()
    cache.remake(cache.path / "corpus.safetensors")
    assert contents(cache.path) == reference


def test_a_changed_corpus_is_written_again_before_anything_is_harvested_from_it(
    tmp_path, reference
):
    first = cache_of(tmp_path)
    first.open()
    damage(first.path / "corpus.safetensors", "data")
    (first.path / "000001.safetensors").unlink()
    with pytest.raises(DamagedShard, match="corpus.safetensors was damaged while it was in use"):
        first.open()
    cache = cache_of(tmp_path)
    cache.open()
    assert contents(cache.path) == reference


def test_a_corpus_that_is_on_the_disk_leaves_memory(tmp_path):
    cache, during = cache_of(tmp_path), []
    given = weakref.ref(cache.corpus)
    cache.source = Watched(lambda: during.append(given() is None))
    cache.open()
    # The limits of the norm and the time that it will take are measured with what is in memory.
    assert during[:2] == [False] * 2 and len(during) > 4 and all(during[2:])
    assert cache.corpus.fingerprint == cache_of(tmp_path).corpus.fingerprint


class Watched(FakeSource):
    """Calls a function before each forward pass."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def run(self, tokens, **options):
        self.function()
        return super().run(tokens, **options)


def test_another_format_version_has_a_directory_of_its_own(tmp_path, monkeypatch):
    paths = []
    for version in (1, 2):
        monkeypatch.setattr(caching, "FORMAT_VERSION", version)
        paths.append(cache_of(tmp_path).path)
    assert paths[0] != paths[1]


# --- where there is no room


@counts_passes
def test_a_disk_that_is_too_small_is_named_before_anything_is_lost(
    tmp_path, monkeypatch, reference
):
    cut_off = cache_of(tmp_path, Interrupted(10))
    with pytest.raises(RuntimeError):
        cut_off.open()
    kept = versions(cut_off.path)
    assert kept
    cache = cache_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(
            OSError, match=r"needs [\d,]+ bytes for [\d,]+ tokens, and 1,000 are free"
        ) as caught:
            cache.open()
    assert caught.value.errno == errno.ENOSPC and str(cache.path) in str(caught.value)
    n_bytes, n_tokens = (
        int(text.replace(",", ""))
        for text in re.findall(r"needs ([\d,]+) bytes for ([\d,]+)", str(caught.value))[0]
    )
    assert n_bytes == n_tokens * (6 * 4 + 8)  # float32 and a position
    missing = [c for name, c in cache.shards.items() if name not in kept]
    exact = (cache.corpus.documents(np.concatenate(missing)) >= 0).sum()
    assert n_tokens == pytest.approx(exact, abs=64)  # to a shard
    assert versions(cache.path) == kept
    cache.open()
    assert contents(cache.path) == reference


class FullDisk:
    """Writes to shards fail from one on, for some of them."""

    def __init__(self, monkeypatch, first, n):
        self.count, self.first, self.n = 0, first, n
        self.write = ShardWriter._write
        monkeypatch.setattr(ShardWriter, "_write", lambda writer, n: self(writer, n))

    def __call__(self, writer, n_rows):
        self.count += 1
        if self.first <= self.count < self.first + self.n:
            writer._file.write(b"part of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.write(writer, n_rows)


def full_disk_at(directory, first, n, reference):
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(patch, first, n)
        cache = cache_of(directory)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            cache.open()
    assert disk.count >= first
    kept = shard_bytes(cache.path)
    assert kept == {name: reference[name] for name in kept}, "a shard that is not whole"
    with pytest.raises(ValueError, match="is not finished"):
        Store.open(cache.path)
    assert not [*cache.path.glob("*.unfinished")], "an unfinished file takes up room"
    cache.open()
    assert contents(cache.path) == reference


@pytest.mark.parametrize("n", [1, 10**9])
def test_a_disk_that_is_full_at_any_write_loses_no_finished_shard(tmp_path, reference, n):
    n_writes = len(Store.open(cache_of(tmp_path).open().path).chunks)
    assert n_writes > 30
    for first in (1, 2, 6, 7, 15, n_writes - 1, n_writes):
        full_disk_at(tmp_path / str(first), first, n, reference)


# --- what is left out


def test_tokens_that_are_not_finite_are_counted_and_left_out(tmp_path):
    cache = cache_of(tmp_path, FakeSource(not_finite="ab"))
    opened = cache.open()
    rows, positions = everything(opened)
    tokens = cache.corpus.tokens[cache.corpus.documents() >= 0]
    bad = np.isin(tokens, ids("ab"))
    assert opened.n_skipped == bad.sum() > 10 and opened.n_outliers == 0
    assert rows[:, 0].tolist() == tokens[~bad].tolist() and np.isfinite(rows).all()
    assert cache.corpus.tokens.reshape(-1)[positions].tolist() == tokens[~bad].tolist()


def test_a_shard_may_be_without_tokens(tmp_path):
    texts = ["c" * 60, "a" * 200, "d" * 60]
    cache = cache_of(tmp_path, FakeSource(not_finite="a"), texts)
    rows, _ = everything(cache.open())
    assert rows[:, 0].tolist() == ids("c" * 60 + "d" * 60)
    opened = cache_of(tmp_path, FakeSource(not_finite="a"), texts).open()
    assert 0 in [shard["n_tokens"] for shard in opened.index["shards"].values()]
    assert opened.n_skipped == 200


@pytest.mark.parametrize("drop", [False, True])
def test_outliers_are_counted_and_dropped_on_request(tmp_path, drop):
    texts = ["abcde~fghij" * 5, "kl~mnop" * 9]
    cache = cache_of(tmp_path, Tall(), texts, outlier_norm=10.0, drop_outliers=drop)
    opened = cache.open()
    kept = "".join(texts).replace("~", "" if drop else "~")
    _, positions = everything(opened)
    assert cache.corpus.tokens.reshape(-1)[positions].tolist() == ids(kept)
    assert opened.n_outliers == 14 and opened.n_skipped == 0
    # The limit was 10 times the median norm.
    table = np.linalg.norm(np.array(cache.source.table, np.float64), axis=1)
    (limit,) = opened.index["norm_limits"]["limits"]
    assert limit == pytest.approx(10 * np.quantile(table[ids("".join(texts))], 0.5), rel=0.05)


def test_float16_need_not_hold_what_is_dropped(tmp_path):
    cache = cache_of(tmp_path, Tall(1e6), ["ab~cd"], "float16", outlier_norm=10.0)
    with pytest.raises(ValueError, match="65,504"):
        cache.open()
    cache.drop_outliers = True
    del cache.identity
    assert cache.open().n_tokens == 4


def test_limits_are_those_of_the_first_harvest_when_it_is_taken_up_again(tmp_path):
    texts = ["abcde~fghij" * 5, "kl~mnop" * 9]
    given = {"outlier_norm": 10.0, "drop_outliers": True}
    whole = contents(cache_of(tmp_path / "whole", Tall(), texts, **given).open().path)
    cache = cache_of(tmp_path / "cut", Tall(), texts, **given)
    cache.open()
    (cache.path / "000001.safetensors").unlink()
    cache_of(tmp_path / "cut", Tall(), texts, **given).open()
    assert contents(cache.path) == whole


def test_no_finite_activation_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        cache_of(tmp_path, FakeSource(not_finite="a"), ["a" * 10]).open()


# --- what is said


def test_the_plan_is_logged_before_the_harvest(tmp_path, caplog):
    cache = cache_of(tmp_path)
    with caplog.at_level(logging.INFO, "mlxterp"):
        cache.open()
    (record,) = caplog.records
    text = record.getMessage()
    assert re.fullmatch(
        r"[\d,]+ tokens to harvest: 0\.0 GB of [\d,.]+ GB that are free, about 1 min", text
    )
    assert text.startswith(f"{cache.corpus.n_tokens:,} tokens")


def test_progress_is_shown_where_it_is_wanted_and_only_there(tmp_path, capsys):
    cache_of(tmp_path / "a").open()
    assert capsys.readouterr() == ("", "")
    cache_of(tmp_path / "b", verbose=True).open()
    shown = capsys.readouterr()
    assert not shown.out and "tokens to harvest" in shown.err and "harvesting" in shown.err


# --- several processes


def harvest_own_part(directory: Path) -> None:
    """What each of several processes does."""
    mx.set_default_device(mx.Device(mx.cpu))
    shrink(pytest.MonkeyPatch())
    rank = mx.distributed.init().rank()
    made = set()
    finish = ShardWriter.finish

    def noted(self, metadata):
        made.add(self.path.name)
        finish(self, metadata)

    ShardWriter.finish = noted
    cache = cache_of(directory / "cache")
    rows, positions = everything(cache.open())
    found = {"made": sorted(made), "sum": float(rows.sum()), "positions": positions.tolist()}
    passes = cache.source.passes
    cache.open()
    found["passes again"] = cache.source.passes - passes
    (directory / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_harvest_shards_of_their_own_into_one_cache(tmp_path, reference):
    _, output = launch("harvest_own_part", tmp_path, 60, "test_caching")
    assert (tmp_path / "0.json").exists() and (tmp_path / "1.json").exists(), output
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    names = sorted(name for name in reference if name.startswith("0"))
    assert [part["made"] for part in found] == [names[::2], names[1::2]]
    assert found[0]["positions"] == found[1]["positions"] and found[0]["sum"] == found[1]["sum"]
    assert [part["passes again"] for part in found] == [0, 0]
    cache = cache_of(tmp_path / "cache")
    assert contents(cache.path) == reference
