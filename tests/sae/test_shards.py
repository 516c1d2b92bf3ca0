import itertools

import numpy as np
import pytest
import safetensors

from mlxterp.sae.shards import DamagedShard, Part, ShardWriter, read_header, read_shard

PARTS = {
    "layers.0.mlp": Part("BF16", 3), "half": Part("F16", 5), "single": Part("F32", 2),
    "byte": Part("I8", 7), "word": Part("I32"), "positions": Part("I64"),
}  # fmt: skip
FEW = {"x": Part("F32", 2), "positions": Part("I64")}
NO_TENSORS = b'{"__metadata__": {"checksums": "[1]"}, "000000/x": %s, "000000/positions": %s}'
NUMBERS = {"n_tokens": 12, "n_outliers": 0}


def random_rows(n, parts=PARTS, seed=0):
    """Rows of any bits, those of NaN among them."""
    rng = np.random.default_rng(seed)
    rows = {}
    for name, part in parts.items():
        room = part.empty(n)
        rows[name] = np.frombuffer(rng.bytes(room.nbytes), room.dtype).reshape(room.shape)
    return rows


def write(path, rows, chunk_rows=4, parts=PARTS, portions=(3, 1, 8), numbers=NUMBERS):
    """A shard of the rows, handed over in portions of any size."""
    n = len(next(iter(rows.values())))
    writer = ShardWriter(path, parts, chunk_rows, n)
    start = 0
    for size in itertools.cycle(portions):
        if start >= n:
            break
        writer.add({name: array[start : start + size] for name, array in rows.items()})
        start += size
    writer.finish(numbers)
    return path


def bits(rows):
    return {name: (array.shape, array.tobytes()) for name, array in rows.items()}


def joined(chunks, parts):
    read = [chunk.read(parts, check=True) for chunk in chunks]
    return {name: np.concatenate([rows[name] for rows in read]) for name in parts}


@pytest.mark.parametrize(
    ("n", "chunk_rows", "sizes"),
    [
        (1, 4, [1]),
        (4, 4, [4]),
        (5, 4, [4, 1]),
        (8, 4, [4, 4]),
        (23, 7, [7, 7, 7, 2]),
        (3, 1, [1] * 3),
    ],
)
def test_rows_of_every_type_come_back_to_the_last_bit(tmp_path, n, chunk_rows, sizes):
    rows = random_rows(n)
    chunks, numbers = read_shard(write(tmp_path / "a.safetensors", rows, chunk_rows), PARTS)
    assert [chunk.n_rows for chunk in chunks] == sizes
    assert bits(joined(chunks, PARTS)) == bits(rows)
    assert numbers == NUMBERS


@pytest.mark.parametrize("portions", [(1,), (3, 1, 8), (23,), (0, 5)])
def test_how_rows_are_handed_over_does_not_change_the_file(tmp_path, portions):
    rows = random_rows(23)
    expected = write(tmp_path / "a", rows).read_bytes()
    assert write(tmp_path / "b", rows, portions=portions).read_bytes() == expected


def test_the_safetensors_library_reads_the_same_rows(tmp_path):
    rows = random_rows(10)
    path = write(tmp_path / "a.safetensors", rows)
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert len(found) == 3 * len(PARTS)
    for name, part in PARTS.items():
        tensors = [found[f"{number:06d}/{name}"] for number in range(3)]
        assert {tensor["dtype"] for tensor in tensors} == {part.dtype}
        shapes = [[n, part.width] if part.width else [n] for n in (4, 4, 2)]
        assert [tensor["shape"] for tensor in tensors] == shapes
        assert b"".join(tensor["data"] for tensor in tensors) == rows[name].tobytes()
    with safetensors.safe_open(str(path), framework="numpy") as file:
        assert file.metadata()["n_tokens"] == "12"


def test_a_shard_without_rows_is_a_shard(tmp_path):
    path = write(tmp_path / "a.safetensors", random_rows(0))
    assert read_shard(path, PARTS) == ([], NUMBERS)
    assert safetensors.deserialize(path.read_bytes()) == []


def test_the_header_has_room_for_many_small_chunks(tmp_path):
    parts = {f"layers.{i}.resid_post": Part("I8", 100_000) for i in (0, 10)}
    n, zeros = 60, np.zeros((1, 100_000), np.int8)
    writer = ShardWriter(tmp_path / "a", parts, 1, n)
    for _ in range(n):
        writer.add(dict.fromkeys(parts, zeros))
    writer.finish({"n_tokens": 10**12, "n_not_finite": 10**12, "n_outliers": 10**12})
    assert len(read_shard(tmp_path / "a", parts)[0]) == n

    rows = random_rows(1000, FEW)
    chunks, _ = read_shard(write(tmp_path / "b", rows, 1, FEW), FEW)
    assert bits(joined(chunks, FEW)) == bits(rows)


def test_some_parts_are_read_alone_and_into_arrays_that_are_given(tmp_path):
    rows = random_rows(6)
    chunks, _ = read_shard(write(tmp_path / "a", rows), PARTS)
    some = {name: PARTS[name] for name in ("byte", "positions")}
    assert bits(chunks[1].read(some)) == bits({name: rows[name][4:] for name in some})
    room = {name: part.empty(9) for name, part in some.items()}
    chunks[0].read(some, {name: array[2:6] for name, array in room.items()})
    for name in some:
        assert room[name][2:6].tobytes() == rows[name][:4].tobytes()


def test_a_shard_appears_with_finish_and_not_before(tmp_path):
    path = tmp_path / "a.safetensors"
    writer = ShardWriter(path, PARTS, 2, 10)
    writer.add(random_rows(10))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors.unfinished"]
    writer.finish({})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_aborted_shard_leaves_nothing_and_keeps_an_older_one(tmp_path):
    path = write(tmp_path / "a.safetensors", random_rows(3))
    before = path.read_bytes()
    writer = ShardWriter(path, PARTS, 2, 10)
    writer.add(random_rows(5))
    writer.abort()
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before


def test_more_rows_than_were_announced_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a", FEW, 1, 1)
    writer.add(random_rows(200, FEW))
    with pytest.raises(ValueError, match="holds more rows than it was made for"):
        writer.finish({})
    writer.abort()
    assert not [*tmp_path.iterdir()]


# --- damage


def fails(path, reason):
    return pytest.raises(DamagedShard, match=f"^{path} {reason}")


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with fails(path, "is missing") as caught:
        read_shard(path, PARTS)
    assert caught.value.path == path and isinstance(caught.value, ValueError)
    chunks, _ = read_shard(write(path, random_rows(5)), PARTS)
    path.unlink()
    with fails(path, "is missing"):
        chunks[0].read(PARTS)


def test_a_file_cut_short_anywhere_is_named(tmp_path):
    path = write(tmp_path / "a.safetensors", random_rows(9, FEW), parts=FEW)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with fails(path, "is cut short"):
            read_shard(path, FEW)
    path.write_bytes(whole + b"\0")
    with fails(path, "is cut short: it has"):
        read_shard(path, FEW)


def test_a_file_that_becomes_shorter_after_it_was_opened_is_named(tmp_path):
    path = write(tmp_path / "a.safetensors", random_rows(9, FEW), parts=FEW)
    chunks, _ = read_shard(path, FEW)
    path.write_bytes(path.read_bytes()[:-1])
    chunks[0].read(FEW, check=True)
    with fails(path, "is cut short"):
        chunks[-1].read(FEW)


def test_any_byte_of_the_data_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.safetensors", random_rows(9, FEW), parts=FEW)
    whole = path.read_bytes()
    _, start, size = read_header(path)
    assert size - start == 9 * (2 * 4 + 8)
    for place in range(start, size, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        chunks, _ = read_shard(path, FEW)
        with fails(path, "is damaged: a checksum is wrong"):
            joined(chunks, FEW)


def test_a_damaged_header_never_gives_other_rows(tmp_path):
    rows = random_rows(9, FEW)
    path = write(tmp_path / "a.safetensors", rows, parts=FEW)
    whole, expected = path.read_bytes(), bits(rows)
    end = 8 + len(whole[8 : read_header(path)[1]].rstrip())
    unnoticed = 0
    for place, bit in itertools.product(range(0, end, 2), (0, 4)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            chunks, numbers = read_shard(path, FEW)
            found = bits(joined(chunks, FEW))
        except DamagedShard as error:
            assert error.path == path
        else:  # what is noted for others may have changed
            assert found == expected
            unnoticed += numbers == NUMBERS
    assert unnoticed < 0.1 * end  # where tensors end, as far as the next one says it again


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{}", b"\xff", b"{", b"null", b'{"__metadata__": {"checksums": "["}}',
        b'{"__metadata__": {"checksums": "[1]"}}', b'{"__metadata__": {"checksums": "1"}}',
        b'{"__metadata__": 3}',
        NO_TENSORS % (b"1", b"1"), NO_TENSORS % (b"{}", b"{}"),
        NO_TENSORS % (b'{"shape": []}', b'{"shape": []}'),
    ],
)  # fmt: skip
def test_what_is_no_header_of_a_shard_is_damage(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with fails(path, "has a damaged header"):
        read_shard(path, FEW)


@pytest.mark.parametrize("part", [Part("F16", 2), Part("F32", 3), Part("F32"), Part("I32", 2)])
def test_parts_of_another_type_or_width_are_damage(tmp_path, part):
    path = write(tmp_path / "a.safetensors", random_rows(5, FEW), parts=FEW)
    with fails(path, "has a tensor that is not"):
        read_shard(path, {**FEW, "x": part})
    with fails(path, "has a damaged header: KeyError"):
        read_shard(path, {**FEW, "y": part})


def test_a_directory_in_place_of_a_file_is_damage(tmp_path):
    chunks, _ = read_shard(write(tmp_path / "a", random_rows(5)), PARTS)
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with fails(tmp_path / "a", "cannot be read"):
        chunks[0].read(PARTS)
