import io
import json
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.formats import archives, tensors
from mlxterp.sae.formats.tensors import check_finite, open_tensors
from tests.sae.formats.files import floats, pickled, tensor, torch_file

TYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: (rng.normal(size=(3, 4)) * 3).astype(name) for name in TYPES}
    made["columns"] = np.asfortranarray(floats(3, 4))
    made["big_endian"] = floats(3, 4).astype(">f4")
    made |= {"scalar": np.array(7), "row": floats(5), "empty": np.zeros((0, 3), np.float32)}
    return made


def same(found: mx.array, expected: np.ndarray) -> bool:
    return found.dtype == mx.float32 and np.array_equal(
        np.array(found), expected.astype(np.float32)
    )


@pytest.fixture(params=["stored", "compressed"])
def npz(request, tmp_path) -> Path:
    save = np.savez if request.param == "stored" else np.savez_compressed
    save(tmp_path / "a.npz", **arrays())
    return tmp_path / "a.npz"


def safetensors(path: Path, entries: dict, data: bytes = b"") -> Path:
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_arrays_of_numpy_are_read(npz):
    with open_tensors(npz) as file:
        assert file.names == list(arrays())
        for name, expected in arrays().items():
            assert file.has(name) and file.shape(name) == expected.shape
            assert same(file.read(name, expected.shape), expected)
        assert file.dtype("float16") == "float16"
        assert file.value("scalar") == 7 and isinstance(file.value("scalar"), int)


@pytest.mark.parametrize("name", ["float32", "columns", "big_endian"])
@pytest.mark.parametrize("index", [1, slice(1, 3), (slice(None), 2), (slice(0, 3, 2), slice(1, 3))])
def test_a_part_is_that_of_the_whole(npz, name, index):
    with open_tensors(npz) as file:
        assert same(file.read_part(name, index), arrays()[name][index])
        with pytest.raises(ValueError, match="out of bounds"):
            file.read_part(name, 3)


def test_safetensors_are_read(tmp_path):
    given = {k: v for k, v in arrays().items() if k not in ("big_endian", "columns", "float64")}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {k: mx.array(v) for k, v in given.items()})
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert {*file.names} == {*given}
        for name, expected in given.items():
            assert same(file.read(name), expected)
        assert same(file.read_part("float32", slice(1, 2)), given["float32"][1:2])


def test_every_bfloat16_is_read_exactly(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.astype(np.uint32) << 16
    finite = np.isfinite(values.view(np.float32))
    array = mx.array(bits[finite]).view(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": array, "b": array[5]})
    with open_tensors(tmp_path / "a.safetensors") as file:
        found = np.array(file.read("a"))
        np.testing.assert_array_equal(found.view(np.uint32), values[finite])
        assert file.value("b") == found[5]


def test_double_precision_beyond_float32_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([1.0, 1e300]), b=np.array(1e300))
    with open_tensors(tmp_path / "a.npz") as file:
        with pytest.raises(ValueError, match="a.npz: 'a' holds numbers that are not finite"):
            file.read("a")
        assert file.value("b") == 1e300


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, suffix, value):
    path, array = tmp_path / f"a.{suffix}", floats(6, 5)
    array[4, 3] = value
    if suffix == "npz":
        np.savez(path, bad=array, one=np.float32(value))
    elif suffix == "pt":
        content = {"bad": tensor("0", 30, (6, 5), (5, 1)), "one": tensor("0", 30, (), (), 23)}
        torch_file(path, pickled(content), {"0": array.tobytes()})
    else:
        mx.save_safetensors(str(path), {"bad": mx.array(array), "one": mx.array(value)})
    with open_tensors(path) as file:
        with pytest.raises(ValueError, match=f"a.{suffix}: 'bad' holds numbers that are not"):
            file.read("bad")
        with pytest.raises(ValueError, match="not finite"):
            file.read_part("bad", 4)
        assert same(file.read_part("bad", slice(0, 4)), array[:4])
        with pytest.raises(ValueError, match=f"a.{suffix}: 'one'"):
            file.value("one")


def test_finiteness_is_checked_part_by_part(monkeypatch):
    monkeypatch.setattr(tensors, "AT_ONCE", 7)
    for i in range(20):
        with pytest.raises(ValueError, match="here holds"):
            check_finite(mx.where(mx.arange(20) == i, mx.nan, 1.0).reshape(4, 5), "here")
    check_finite(mx.ones((4, 5)), "here")


def test_a_missing_or_misshapen_array_is_named(npz):
    with open_tensors(npz) as file:
        with pytest.raises(ValueError, match=r"a.npz: 'row' must have shape \(6,\), got \(5,\)"):
            file.read("row", (6,))
        with pytest.raises(ValueError, match="a.npz has no key 'W_enc'; it holds .*'row'"):
            file.read("W_enc")
        with pytest.raises(ValueError, match=r"'row' must be one number, got shape \(5,\)"):
            file.value("row")


def test_a_wrong_file_name_or_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*a.npz"):
        open_tensors(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="ends in .safetensors, .npz, .pt, .pth, got .*a.h5"):
        open_tensors(tmp_path / "a.h5")
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "b.pt")


@pytest.mark.parametrize("kind", ["objects", "records", "text", "complex", "dates"])
def test_arrays_that_are_no_plain_numbers_are_refused_when_asked_for(tmp_path, kind):
    odd = {
        "objects": np.array([{}, 1], dtype=object),
        "records": np.zeros(3, [("a", "f4"), ("b", "i4")]),
        "text": np.array(["a", "b"]),
        "complex": np.zeros(3, np.complex64),
        "dates": np.zeros(3, "datetime64[s]"),
    }[kind]
    np.savez(tmp_path / "a.npz", odd=odd, good=floats(3))
    with open_tensors(tmp_path / "a.npz") as file:
        assert same(file.read("good"), floats(3))
        with pytest.raises(ValueError, match="a.npz: 'odd' has type .*, which is not read"):
            file.read("odd")


@pytest.mark.parametrize("kind", ["F8_E4M3", "U16", "U32", "U64"])
def test_other_types_of_safetensors_are_refused_when_asked_for(tmp_path, kind):
    n = {"F8_E4M3": 1, "U16": 2, "U32": 4, "U64": 8}[kind]
    entry = {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * n]}
    path = safetensors(tmp_path / "a.safetensors", {"a": entry}, bytes(2 * n))
    with open_tensors(path) as file, pytest.raises(ValueError, match=f"'a' has type {kind}"):
        file.read("a")


def test_headers_of_safetensors_are_checked_against_the_file(tmp_path):
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    path = tmp_path / "a.safetensors"
    for change in (
        {"shape": [10**12, 10**12]}, {"shape": [2, 3]}, {"shape": [-2, -2]}, {"shape": [2**64]},
        {"data_offsets": [0, 10**12]}, {"data_offsets": [16, 0]}, {"data_offsets": [8, 24]},
        {"dtype": "F99"}, {"shape": "many"},
    ):  # fmt: skip
        safetensors(path, {"a": good | change}, bytes(16))
        with pytest.raises(ValueError, match="a.safetensors is damaged or cut short"):
            open_tensors(path)
    for content in (b"", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 9) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or cut short"):
            open_tensors(path)
    deep = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(ValueError, match="damaged or cut short"):
        open_tensors(path)


def npy(shape: str, data: bytes, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(path: Path, members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "shape", ["(10, 10)", "(1000000000000000, 1000000000000000)", "(3,)", "()", "(0, 4)"]
)
def test_a_shape_that_does_not_fit_the_size_is_refused(tmp_path, shape, compression):
    path = archive(tmp_path / "a.npz", {"a.npy": npy(shape, bytes(16))}, compression)
    with pytest.raises(ValueError, match="a.npz: 'a.npy' of shape .* has 8[0-9]|9[0-9]|1.. bytes"):
        open_tensors(path)


@pytest.mark.parametrize(
    "member",
    [
        b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00\x10\x00", b"nothing", b"\x93NUMPY\x01\x00\xff\xff{}",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    ],
)  # fmt: skip
def test_a_member_that_is_no_array_is_refused(tmp_path, member):
    with pytest.raises(ValueError, match="a.npz: 'a.npy'"):
        open_tensors(archive(tmp_path / "a.npz", {"a.npy": member}))


@pytest.mark.parametrize("shape", ["__import__('os').system('false')", "(" * 3000, "-" * 9000])
def test_a_header_is_never_evaluated(tmp_path, shape):
    path = archive(tmp_path / "a.npz", {"a.npy": npy(shape, b"")})
    with open_tensors(path) as file, pytest.raises(ValueError, match="which is not read"):
        file.read("a")


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_FINE", 1000)
    bomb = npy("(250000,)", bytes(1_000_000))
    with pytest.raises(ValueError, match="'a.npy' would grow from .* to 1,000,0.. bytes"):
        open_tensors(archive(tmp_path / "a.npz", {"a.npy": bomb}, zipfile.ZIP_DEFLATED))
    fine = npy("(1000,)", floats(1000).tobytes())
    with open_tensors(archive(tmp_path / "b.npz", {"a.npy": fine}, zipfile.ZIP_DEFLATED)) as file:
        assert same(file.read("a"), floats(1000))


def test_a_size_that_a_zip_file_only_claims_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", {"a.npy": npy("(4,)", bytes(16))}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02") + 24  # the size in the central directory
    header = npy("(40000000,)", b"")
    size = len(header) + 160_000_000
    path.write_bytes(content[:at] + struct.pack("<I", size) + content[at + 4 :])
    with pytest.raises(ValueError, match="would grow|has 160,000"):
        open_tensors(path)


def test_a_name_may_be_there_once_only(tmp_path):
    duplicate = pytest.warns(UserWarning, match="Duplicate")
    with duplicate, zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", npy("(4,)", bytes(16)))
        file.writestr("a.npy", npy("(4,)", bytes(16)))
    with pytest.raises(ValueError, match="holds 'a.npy' twice"):
        open_tensors(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_what_is_no_zip_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for content in (b"", b"PK", b"PK\x03\x04" + bytes(30), bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.{suffix} is no zip file"):
            open_tensors(path)


def test_a_torch_file_must_be_as_torch_writes_it(tmp_path):
    values = floats(4)
    content = pickled({"a": tensor("0", 4, (4,), (1,))})
    path = archive(tmp_path / "a.pt", {"b/data.pkl": content, "c/data.pkl": content})
    with pytest.raises(ValueError, match="a.pt is no file of torch.save: it has 2 data.pkl"):
        open_tensors(path)
    members = {"b/data.pkl": content, "b/data/0": values.tobytes()}
    with pytest.raises(ValueError, match="the storage '0' is compressed"):
        open_tensors(archive(path, members, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="no record of the storage '0'"):
        open_tensors(archive(path, {"b/data.pkl": content}))
    with pytest.raises(ValueError, match="storage '0' of 4 float32 has 15 bytes"):
        open_tensors(archive(path, members | {"b/data/0": bytes(15)}))
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        open_tensors(archive(path, {"b/data.pkl": pickled([1])}))
    with pytest.raises(ValueError, match="has 5,000,"):
        open_tensors(archive(path, {"b/data.pkl": bytes(5_000_000)}))


def test_big_endian_storages_are_read(tmp_path):
    content = pickled({"a": tensor("0", 4, (2, 2), (1, 2))})
    members = {
        "b/data.pkl": content, "b/byteorder": b"big", "b/data/0": floats(4).astype(">f4").tobytes(),
    }  # fmt: skip
    with open_tensors(archive(tmp_path / "a.pt", members)) as file:
        assert same(file.read("a"), floats(4).reshape(2, 2).T)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=floats(1000))
    with open_tensors(path) as file:
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ValueError, match="a.npz: 'a' is cut short"):
            file.read("a")


def test_a_large_array_is_copied_once(tmp_path):
    n = 8_000_000
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones((n,))})
    with open_tensors(tmp_path / "a.safetensors") as file:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        assert file.read("a").shape == (n,)
        assert mx.get_peak_memory() - before < 1.5 * 4 * n
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        file.read_part("a", slice(0, 1000))
        assert mx.get_peak_memory() - before < 100_000


def test_a_header_of_numpy_2_and_of_version_2_is_read(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array(file, floats(3, 2), version=(2, 0))
    with open_tensors(archive(tmp_path / "a.npz", {"a.npy": file.getvalue()})) as found:
        assert same(found.read("a"), floats(3, 2))
