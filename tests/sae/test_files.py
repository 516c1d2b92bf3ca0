import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.files import read_arrays, read_json, write_directory

SHAPES = {"a": (2, 3), "b": (4,)}


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
    assert listing(tmp_path) == ["x", "x/arrays.safetensors", "x/config.json"]


def test_a_failure_while_replacing_brings_the_old_one_back(tmp_path, monkeypatch):
    path = write_directory(tmp_path / "x", contents(1.0), "config.json")
    rename, calls = type(path).rename, []

    def fail_at_the_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail_at_the_second)
    with pytest.raises(OSError, match="disk gone"):
        write_directory(path, contents(2.0), "config.json")
    assert read_json(path / "config.json") == {"value": 1.0}
    assert listing(tmp_path) == ["x", "x/arrays.safetensors", "x/config.json"]


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
