"""Files with random damage are read or refused, and nothing else happens.

The default run has 4,000 files of arrays, 5,600 pickles and 250 folders of whole formats; `-m slow`
has 100,000, 100,000 and 10,000 more.
"""

import copy
import json
import pickle
import random
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import load_sae
from mlxterp.sae.formats.pickles import read_pickle
from mlxterp.sae.formats.reading import recognised
from mlxterp.sae.formats.tensors import open_tensors
from tests.sae.formats.files import GOLDEN, floats, pickled, tensor, torch_file

SECONDS = 5.0  # for one file, on a slow machine
MEBIBYTES = 400
HOSTILE = [b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"PK\x01\x02", b"(", b"."]
NUMBERS = [b"0", b"-1", b"1", b"99999999", b"9" * 19, b"9" * 400, b"1e308", b"NaN", b'"8"', b"null"]


def golden_coders() -> list[Path]:
    """Folders and files of all formats that are recognised, and not those within one another."""
    found = [path for path in sorted(GOLDEN.rglob("*")) if recognised(path) is not None]
    return [path for path in found if not {*path.parents} & {*found}]


CODERS = golden_coders()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1) if content else 0
        match rng.randrange(7):
            case 0 if content:  # a bit
                at %= len(content)
                content = (
                    content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
                )
            case 1:  # the end
                content = content[:at]
            case 2:  # something in place of something
                piece = rng.choice(HOSTILE)
                content = content[:at] + piece + content[at + len(piece) :]
            case 3:  # something more
                content = content[:at] + rng.choice(HOSTILE) + content[at:]
            case 4:  # something less
                content = content[:at] + content[at + rng.randrange(1, 20) :]
            case 5:  # a part again
                content = content[:at] + content[max(0, at - 30) :]
            case _:  # a number in a header
                found = [*re.finditer(rb"\d+", content)]
                if found:
                    number = rng.choice(found)
                    content = (
                        content[: number.start()] + rng.choice(NUMBERS) + content[number.end() :]
                    )
    return content


def originals(place: Path) -> dict[str, bytes]:
    """Small files of every kind."""
    arrays = {"W_enc": floats(4, 3), "b": floats(3).astype(np.float16), "k": np.array(4)}
    np.savez(place / "stored.npz", **arrays)
    np.savez_compressed(place / "compressed.npz", **arrays)
    given = {name: mx.array(array) for name, array in arrays.items()}
    given["h"] = mx.array(floats(3)).astype(mx.bfloat16)
    mx.save_safetensors(str(place / "a.safetensors"), given)
    content = {"W": tensor("0", 12, (4, 3), (3, 1)), "T": tensor("0", 12, (3, 4), (1, 3)), "k": 4}
    torch_file(place / "written.pt", pickled(content), {"0": floats(4, 3).tobytes()})
    shutil.copy(GOLDEN / "tensors" / "protocol_4.pt", place / "torch.pt")
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def read_all(path: Path) -> bool:
    """Whether all that a file holds can be read; raises what is not allowed to happen."""
    try:
        with open_tensors(path) as file:
            for name in file.names:
                assert file.read(name).size <= 10_000
        return True
    except ValueError as error:
        assert str(path) in str(error)
        return False


def timed(items: Iterator) -> None:
    """Every step takes a moment, and all together little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for item in items:
        now = time.perf_counter()
        assert now - start < SECONDS, item
        start = now
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1 << 20 if sys.platform == "darwin" else 1 << 10) < MEBIBYTES


def files_of_arrays(place: Path, n: int, seed: int) -> Iterator[bytes]:
    (place / "good").mkdir()
    rng, read, good = random.Random(seed), 0, originals(place / "good")
    for i in range(n):
        name = rng.choice([*good])
        content = damaged(good[name], rng)
        path = place / name
        path.write_bytes(content)
        read += read_all(path)
        yield content
        if i % 1000 == 999:
            assert 0 < read < i  # some changes do no harm
    assert all(read_all(place / "good" / name) for name in good)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_of_arrays_are_read_or_refused(tmp_path, seed):
    timed(files_of_arrays(tmp_path, 2000, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_damaged_files_of_arrays_are_read_or_refused(tmp_path, seed):
    timed(files_of_arrays(tmp_path, 10_000, seed))


OPCODES = b"(.0125FIJKLMNPQRSTUVX]abcdeghijlopqrstu}" + bytes(range(0x80, 0x99))


def hostile_pickles(n: int, seed: int) -> Iterator[bytes]:
    """Damaged pickles of tensors, random instructions, and mixtures of both."""
    rng = random.Random(seed)
    content = {"a": tensor("0", 12, (4, 3), (3, 1)), "b": [1, 2.5, ("x", None)], "c": {"d": True}}
    good = [pickled(content, protocol) for protocol in (2, 4)]
    bad = pickle.dumps({"a": print, "b": getattr}, 2)
    for _ in range(n):
        match rng.randrange(3):
            case 0:
                data = damaged(rng.choice(good), rng)
            case 1:
                data = bytes(rng.choices(OPCODES, k=rng.randrange(1, 60))) + b"."
            case _:
                at, piece = rng.randrange(len(good[0])), rng.choice([bad, *good])
                data = good[0][:at] + piece[rng.randrange(len(piece)) :] + good[0][at:]
        try:
            found = read_pickle(data, lambda key: 48)
        except ValueError:
            pass
        else:
            assert not callable(found)
        yield data


def test_hostile_pickles_are_read_or_refused():
    timed(hostile_pickles(5600, 0))


@pytest.mark.slow
def test_many_hostile_pickles_are_read_or_refused():
    timed(hostile_pickles(100_000, 1))


VALUES = [None, [], {}, "x", "", -1, 0, 2.5, True, 10**400, float("nan"), [1], ["a"], {"a": [2]}, 7]


def other_values(content: bytes, rng: random.Random) -> bytes:
    """JSON with one to three of its values replaced by others, or taken out."""
    root = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = root
        while isinstance(node, dict) and node:
            key = rng.choice([*node])
            if isinstance(node[key], dict) and rng.random() < 0.8:
                node = node[key]
                continue
            node[key] = copy.deepcopy(rng.choice(VALUES))
            if rng.random() < 0.2:
                del node[key]
            break
    return json.dumps(root).encode()


def copied(source: Path, place: Path) -> Path:
    """A coder in folders of the same names, some of which say the site, and the files beside it."""
    folder = place / source.parent.relative_to(GOLDEN)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.parent.iterdir():
        if path == source and path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and path.name != "expected.npz":
            shutil.copy(path, folder)
    return folder / source.name


def damaged_folders(place: Path, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng, loaded = random.Random(seed), 0
    for _ in range(n):
        path = copied(rng.choice(CODERS), place)
        files = sorted(file for file in path.parent.rglob("*") if file.is_file())
        file = rng.choice(files)
        change = other_values if file.suffix == ".json" and rng.random() < 0.6 else damaged
        content = change(file.read_bytes(), rng)
        file.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                load_sae(path)
            loaded += 1
        except ValueError as error:
            assert str(place) in str(error)
        yield str(file), content
    assert 0 < loaded < n


def test_damaged_folders_are_loaded_or_refused(tmp_path):
    timed(damaged_folders(tmp_path, 250, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_folders_are_loaded_or_refused(tmp_path, seed):
    timed(damaged_folders(tmp_path, 2000, seed))
