import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import files
from mlxterp.sae.files import read_arrays, read_json, recover, verify, write_directory

SHAPES = {"a": (2, 3), "b": (4,)}
WHOLE = ["x", "x/arrays.safetensors", "x/config.json"]


def contents(value: float = 1.0) -> dict:
    arrays = {"a": mx.full((2, 3), value), "b": mx.zeros((4,))}
    return {"config.json": {"value": value}, "arrays.safetensors": arrays}


def listing(path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_a_directory_is_written_with_its_parents_and_read_back(tmp_path):
    path = write_directory(tmp_path / "deep" / "x.mlx", contents(2.5), "config.json")
    assert read_json(path / "config.json") == {"value": 2.5}
    arrays = read_arrays(path / "arrays.safetensors", SHAPES)
    assert arrays["a"].tolist() == [[2.5] * 3] * 2 and set(arrays) == {"a", "b"}
    assert listing(tmp_path / "deep") == ["x.mlx", "x.mlx/arrays.safetensors", "x.mlx/config.json"]


def test_an_older_directory_is_replaced_whole(tmp_path):
    path = write_directory(tmp_path / "x", {**contents(1.0), "old.json": {}}, "config.json")
    write_directory(path, contents(2.0), "config.json")
    assert listing(tmp_path) == ["x", "x/arrays.safetensors", "x/config.json"]
    assert read_json(path / "config.json") == {"value": 2.0}


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    write_directory(tmp_path / "x", contents(), "config.json")
    assert listing(tmp_path / "x") == ["arrays.safetensors", "config.json"]


def test_what_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="exists and holds no config.json"):
            write_directory(tmp_path / name, contents(), "config.json")
    assert listing(tmp_path) == ["file", "thesis", "thesis/chapter.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_one_and_no_traces(tmp_path, monkeypatch, error):
    path = write_directory(tmp_path / "x", contents(1.0), "config.json")

    def fail(*arguments):
        raise error("disk full")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(error):
        write_directory(path, contents(2.0), "config.json")
    assert read_json(path / "config.json") == {"value": 1.0}
    assert listing(tmp_path) == WHOLE


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_replacing_brings_the_old_one_back(tmp_path, monkeypatch, error):
    path = write_directory(tmp_path / "x", contents(1.0), "config.json")
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            assert not path.exists()
            raise error("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="disk gone"):
        write_directory(path, contents(2.0), "config.json")
    assert read_json(path / "config.json") == {"value": 1.0}
    assert listing(tmp_path) == WHOLE


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Writing beyond this size fails, after a short write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_an_error_with_the_bytes_and_leaves_the_old_one(tmp_path):
    path = write_directory(tmp_path / "x", contents(1.0), "config.json")
    large = {"config.json": {}, "arrays.safetensors": {"a": mx.ones((100_000,))}}
    message = r"x could not be written \(.*\): it needs 400,003 bytes, [\d,]+ are free"
    with largest_file(50_000), pytest.raises(OSError, match=message) as raised:
        write_directory(path, large, "config.json")
    assert raised.value.errno == raised.value.__cause__.errno
    assert read_json(path / "config.json") == {"value": 1.0}
    assert listing(tmp_path) == WHOLE


KILLED_ANYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from mlxterp.sae.files import read_json, recover, write_directory

def write(value):
    write_directory(path, {"a.json": {"value": value}, "b.json": {"value": value}}, "b.json")

def killed_at(n):
    left = [n]
    def hook(event, arguments):
        if event.startswith(("os.", "open", "fcntl.", "shutil.", "tempfile.")):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write(2)
    os._exit(0)

for n in range(1, 1000):
    path = Path(sys.argv[1]) / str(n) / "x"
    write(1)
    process = os.fork() or killed_at(n)
    status = os.waitpid(process, 0)[1]
    missing = not path.exists()
    recover(path.parent, path.name)
    values = [read_json(path / name)["value"] for name in ("a.json", "b.json")]
    left = [str(p) for p in path.parent.rglob("*") if path not in (p, *p.parents)]
    print(json.dumps([values, missing, left]))
    if status == 0:
        break
"""


def test_a_process_killed_at_any_call_leaves_the_old_or_the_new_directory_whole(tmp_path):
    command = [sys.executable, "-c", KILLED_ANYWHERE, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert all(values in ([1, 1], [2, 2]) for values, _, _ in results)
    assert [values[0] for values, _, _ in results] == sorted(v[0] for v, _, _ in results)
    assert {values[0] for values, _, _ in results[:-1]} == {1, 2}
    # Between two renames only `recover` finds the old one; the test must have been there.
    assert any(missing for _, missing, _ in results)
    for _, _, left in results:  # at most the directory that nothing had been put into yet
        assert len(left) <= 1 and not any(name.endswith(".unfinished") for name in left)
    assert results[-1][2] == []


def killed(tmp_path, name: str) -> Path:
    """What a killed process leaves that had begun to replace a directory."""
    scratch = tmp_path / f".{name}.abcd1234.unfinished"
    write_directory(scratch / "old", contents(1.0), "config.json")
    (scratch / "new").mkdir()
    (scratch / "new" / "arrays.safetensors").write_bytes(b"half of")
    return scratch


def test_what_a_killed_process_left_goes_with_the_next_save_of_the_same_name(tmp_path):
    killed(tmp_path, "x")
    other = killed(tmp_path, "x.y")
    write_directory(tmp_path / "x", contents(2.0), "config.json")
    assert sorted(os.listdir(tmp_path)) == [other.name, "x"]
    recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["x", "x.y"]
    assert read_json(tmp_path / "x" / "config.json") == {"value": 2.0}
    assert read_json(tmp_path / "x.y" / "config.json") == {"value": 1.0}


def test_a_directory_that_a_living_process_works_in_is_left_alone(tmp_path, monkeypatch):
    write, listings = files.write_file, []

    def look(path, content):
        recover(tmp_path)
        listings.append(listing(tmp_path))
        return write(path, content)

    monkeypatch.setattr(files, "write_file", look)
    write_directory(tmp_path / "x", contents(), "config.json")
    assert [len(names) for names in listings] == [2, 3] and listing(tmp_path) == WHOLE


def test_without_locks_nothing_is_removed_that_may_be_in_use(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    scratch = killed(tmp_path, "x")
    write_directory(tmp_path / "x", contents(), "config.json")
    assert sorted(os.listdir(tmp_path)) == [scratch.name, "x"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    sync, calls = files.sync, []

    def note(path):
        calls.append((path.name, (tmp_path / "x").exists()))
        sync(path)

    monkeypatch.setattr(files, "sync", note)
    write_directory(tmp_path / "x", contents(), "config.json")
    assert calls == [
        ("config.json", False), ("arrays.safetensors", False), ("new", False), (tmp_path.name, True)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "arrays.safetensors", files.CHECKSUMS_FILE])
def test_damage_is_found_in_every_file_and_named(tmp_path, name):
    path = write_directory(tmp_path / "x", contents(), "config.json", checksums=True)
    required = ("config.json", "arrays.safetensors")
    verify(path, required)
    file = path / name
    whole = file.read_bytes()
    for place in (len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged|not valid JSON|no key"):
            verify(path, required)
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{name} is (damaged|not valid JSON)"):
        verify(path, required)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        verify(path, required)


def test_a_list_of_checksums_must_name_all_files(tmp_path):
    path = write_directory(tmp_path / "x", {"config.json": {}}, "config.json", checksums=True)
    with pytest.raises(ValueError, match="checksums.json has no key 'arrays.safetensors'"):
        verify(path, ("config.json", "arrays.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold an object, not list"),
        ("{}", "has no key 'value'"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_json_that_is_not_as_expected_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json {message}"):
        read_json(path, ("value",))
    path.unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        read_json(path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_array_file_is_named(tmp_path, kept):
    path = tmp_path / "arrays.safetensors"
    mx.save_safetensors(str(path), contents()["arrays.safetensors"])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="arrays.safetensors is damaged or cut short"):
        read_arrays(path, SHAPES)


def test_arrays_are_checked_by_name_shape_and_type(tmp_path):
    path = tmp_path / "arrays.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 3)), "b": mx.zeros((5,))})
    with pytest.raises(ValueError, match=r"'b' must have shape \(4,\), got \(5,\)"):
        read_arrays(path, SHAPES)
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 3)), "c": mx.zeros((4,))})
    with pytest.raises(ValueError, match=r"no key 'b'; it holds \['a', 'c'\]"):
        read_arrays(path, SHAPES)
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 3)), "b": mx.zeros((4,), mx.uint8)})
    with pytest.raises(ValueError, match="'b' has type U8"):
        read_arrays(path, SHAPES)
    path.unlink()
    with pytest.raises(ValueError, match="arrays.safetensors is missing"):
        read_arrays(path, SHAPES)


def test_a_header_that_claims_more_than_there_is_is_damage(tmp_path):
    path = tmp_path / "arrays.safetensors"
    header = {"a": {"dtype": "F32", "shape": [10**9, 10**3], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    path.write_bytes(np.uint64(len(text)).tobytes() + text + bytes(16))
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_arrays(path, {"a": (10**9, 10**3)})
