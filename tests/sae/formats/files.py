"""Small files of arrays, good and bad ones, and where the golden ones are."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[2] / "golden" / "formats"


def torch_file(path: Path, content: bytes, records: dict[str, bytes] | None = None) -> Path:
    """A zip file as `torch.save` writes it, with any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        for name, data in (records or {}).items():
            file.writestr(f"archive/data/{name}", data)
    return path


class Named:
    """What pickles as something of another module, called with arguments."""

    def __init__(self, name: str, *arguments):
        self.name, self.arguments = name, arguments


class Storage(str):
    """What pickles as a reference to a storage of torch."""


class Pickler(pickle._Pickler):  # the one in Python, whose steps can be changed
    """Writes what torch would, without torch."""

    def persistent_id(self, obj):
        return obj.arguments if isinstance(obj, Named) and obj.name == "persistent" else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named) and obj.name != "persistent":
            module, _, name = obj.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            if obj.arguments:
                super().save(obj.arguments[0])
                self.write(pickle.REDUCE)
            return None
        return super().save(obj, save_persistent_id)


def pickled(content, protocol: int = 2) -> bytes:
    """The pickle of dictionaries that hold `tensor`s and `Named` things."""
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def tensor(key: str, n: int, shape, strides, offset: int = 0, kind: str = "FloatStorage") -> Named:
    """A tensor over a storage of `n` numbers."""
    storage = Named("persistent", "storage", Named(f"torch.{kind}"), key, "cpu", n)
    return Named("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, False, None))


def floats(*shape: int) -> np.ndarray:
    """The same random numbers every time."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
