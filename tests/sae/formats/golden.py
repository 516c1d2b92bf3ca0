"""The golden files of foreign formats, and copies of them with something wrong."""

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxterp.sae import load_sae
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.formats.tensors import open_tensors
from mlxterp.sae.formats.torch_writing import torch_file

ROOT = Path(__file__).parents[2] / "golden" / "formats"
TOLERANCE = 1e-5


def expected(format: str, case: str) -> dict[str, np.ndarray]:
    """Inputs `x`, codes `z` and reconstructions `y` of a case."""
    with np.load(ROOT / format / "expected.npz") as file:
        return {name: file[f"{case}/{name}"] for name in ("x", "z", "y")}


def agrees(coder: BaseSAE, format: str, case: str) -> None:
    """Codes and reconstructions are those of the original, and the same features are active."""
    wanted = expected(format, case)
    x = mx.array(wanted["x"])
    for name, found in (("z", coder.encode(x)), ("y", coder(x))):
        bound = TOLERANCE * max(1.0, np.abs(wanted[name]).max())
        np.testing.assert_allclose(np.array(found), wanted[name], rtol=0, atol=bound)
    assert np.array_equal(np.array(coder.encode(x)) != 0, wanted["z"] != 0)


def load(format: str, path: str) -> BaseSAE:
    """The coder in a golden file, recognised without a word of its format."""
    coder = load_sae(ROOT / format / path)
    assert coder.metadata.source["format"] == format
    return coder


def n_at_threshold(coder: BaseSAE, x: np.ndarray) -> int:
    """How many features have exactly their threshold on the first input, and are inactive."""
    pre = np.array(coder.pre_activations(mx.array(x[:1])))[0]
    met = pre == np.array(coder.activation_function.arrays["threshold"])
    assert not np.array(coder.encode(mx.array(x[:1])))[0][met].any()
    return int(met.sum())


def copy(format: str, path: str, folder: Path) -> Path:
    """A copy of a golden file or folder that may be changed, at the same path under `folder`."""
    source, target = ROOT / format / path, folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return target


def change_json(file: Path, **values) -> None:
    """Replace entries of a configuration, or of the object in it that is `trainer`; `None` removes
    one."""
    content = json.loads(file.read_text())
    inner = content.get("trainer", content)
    inner.update(values)
    for key in [key for key, value in values.items() if value is None]:
        del inner[key]
    file.write_text(json.dumps(content))


def change_arrays(file: Path, **change: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Replace arrays of a file; `None` removes one. Dots in names are written as `__`."""
    with open_tensors(file) as tensors:
        arrays = {name: np.array(tensors.read(name)) for name in tensors.names}
    for key, function in change.items():
        name = key.replace("__", ".")
        array = arrays.pop(name)
        if function is not None:
            arrays[name] = np.asarray(function(array), np.float32)
    write_arrays(file, arrays)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A file of arrays, by the end of its name."""
    if file.suffix == ".npz":
        np.savez(file, **arrays)
    elif file.suffix == ".safetensors":
        mx.save_safetensors(str(file), {key: mx.array(value) for key, value in arrays.items()})
    else:
        whole = {"k"}
        kept = {k: v.astype(np.int32) if k in whole else v for k, v in arrays.items()}
        file.write_bytes(torch_file(kept))


def change_pickle(file: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a file of torch."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert old in members[name]
    members[name] = members[name].replace(old, new)
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def with_nan(array: np.ndarray) -> np.ndarray:
    """The array with one NaN."""
    array = np.array(array, order="C")
    array.reshape(-1)[3] = np.nan
    return array
