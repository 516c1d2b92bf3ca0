import contextlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from mlxterp.sae.formats.pickles import MAX_BYTES, flatten, read_pickle
from mlxterp.sae.formats.tensors import open_tensors
from mlxterp.sae.formats.torch_objects import Storage, Tensor
from tests.sae.formats.files import GOLDEN, Named, floats, pickled, tensor, torch_file

TENSORS = GOLDEN / "tensors"


def sizes(key: str) -> int | None:
    return {"0": 80, "1": 6}.get(key)


def read(content, protocol=2):
    return read_pickle(pickled(content, protocol), sizes)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back(protocol):
    content = {
        "whole": [0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**70, -(2**70)],
        "real": [0.5, -1e300],
        "texts": ["", "Größe", "x" * 300],
        "constants": (None, True, False),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "again": [[1, {}]] * 2,
        7: {"nested": {"deep": []}},
    }
    assert read(content, protocol) == content


def test_an_ordered_dictionary_comes_back_without_its_attributes():
    content = OrderedDict(a=1, b=2)
    content._metadata = {"version": 1}  # pyright: ignore
    for protocol in (2, 4):
        assert read_pickle(pickle.dumps(content, protocol), sizes) == {"a": 1, "b": 2}


def test_a_tensor_is_a_view_of_a_storage():
    made = read({"a": tensor("0", 20, (3, 2), (5, 1), 4), "b": tensor("0", 20, (), ())})
    storage = Storage("float32", "0", 20)
    assert made == {"a": Tensor(storage, 4, (3, 2), (5, 1)), "b": Tensor(storage, 0, (), ())}


def test_a_parameter_is_its_tensor():
    inner = tensor("0", 20, (2,), (1,))
    made = read({"a": Named("torch._utils._rebuild_parameter", (inner, True, OrderedDict()))})
    assert made["a"].shape == (2,)


def test_names_of_types_and_devices_stay_names():
    content = {"a": Named("torch.float32"), "b": Named("torch.device", ("cpu",))}
    assert flatten(read(content)) == {"a": "torch.float32", "b": "cpu"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("2", 20, (2,), (1,)), "no record of the storage '2'"),
        (("0", 21, (2,), (1,)), "storage '0' of 21 float32 has 80 bytes"),
        (("0", -20, (2,), (1,)), "storage '0' of -20 float32"),
        (("0", 20, (21,), (1,)), r"shape \(21,\) is larger than its storage of 20"),
        (("0", 20, (20,), (1,), 1), "larger than its storage"),
        (("0", 20, (10, 10), (0, 1)), "larger than its storage"),
        (("0", 20, (3, 3), (9, 1)), "larger than its storage"),
        (("0", 20, (10**18,), (0,)), "larger than its storage"),
        (("0", 20, (10**30,), (0,)), "strides"),
        (("0", 20, (2,), (-1,)), "strides"),
        (("0", 20, (-2,), (1,)), "strides"),
        (("0", 20, (2,), (1, 1)), "strides"),
        (("0", 20, (2.0,), (1,)), "strides"),
        (("0", 20, ("2",), (1,)), "strides"),
        (("0", 20, [2], (1,)), "made of something else"),
        (("0", 20, (2,), (1,), 0, "ComplexFloatStorage"), "ComplexFloatStorage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read({"a": tensor(*given)})


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.getattr", "builtins.__import__",
        "torch.load", "torch.nn.Linear", "collections.defaultdict", "collections.OrderedDict.x",
        "torch._utils._rebuild_tensor", "subprocess.Popen", "numpy.core.multiarray._reconstruct",
        "torch.storage._load_from_bytes", "torch.jit._script", "", "x" * 100_000,
    ],
)  # fmt: skip
def test_every_other_name_is_refused_by_name(name):
    with pytest.raises(ValueError, match="it names '") as error:
        read({"a": Named(name)})
    assert name[:100] in str(error.value) and len(str(error.value)) < 600


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    import os
    import subprocess

    shell = f"touch {marker}"
    text = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Calls(os.system, shell),
        "eval": Calls(eval, f"[{text}]"),
        "exec": Calls(exec, text),
        "call": Calls(subprocess.call, ["touch", str(marker)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "nested": {"a": [({"b": Calls(os.system, shell)},)]},
        "state": Calls(OrderedDict, Calls(exec, text)),
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", ["system", "eval", "exec", "call", "getattr", "nested", "state"])
def test_a_malicious_file_runs_no_code(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    content = pickle.dumps({"weights": 1, "bad": attacks(marker)[name]}, protocol)
    path = torch_file(tmp_path / "bad.pt", content)
    with pytest.raises(ValueError, match="not one of tensors and numbers"):
        open_tensors(path)
    assert not marker.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(content)  # what it would have done
    assert marker.exists() or name == "getattr"  # which gets hold of a function only


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"\x80\x02.", b"\x80\x02}", b"\x80\x02(.", b"\x80\x02)\x81.", b"}b.",
        b"}K\x01b\x85R.",
        b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"\x80\x02}u.", b"]a.", b"}s.",
        b"}(K\x01u.", b"}(]K\x01u.", b"h\x00.", b"q\x00.", b"j\xff\xff\xff\xff.", b"R.", b"Q.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.", b"\x93.", b"}}\x93.",
        b"I" + b"9" * 10_000 + b"\n.", b"L" + b"9" * 10_000 + b"L\n.", b"Vx\\ud800\n.", b"t.",
        b"2.",
        b"ccollections\nOrderedDict\n)R}b", b"ccollections\nOrderedDict\nK\x01R.", b"\x82\x01.",
    ],
)  # fmt: skip
def test_a_damaged_pickle_is_refused(content):
    with pytest.raises(ValueError):
        read_pickle(content, sizes)


def test_a_mark_far_up_takes_no_memory():
    made = read_pickle(b"\x80\x02}r\xff\xff\xff\x7f.", sizes)  # remembered as 2 ** 31 - 1
    assert made == {}


def test_a_long_pickle_is_refused():
    with pytest.raises(ValueError, match="at most"):
        read_pickle(pickle.dumps({"a": "x" * MAX_BYTES}), sizes)


def test_entries_go_by_their_path():
    assert flatten({"a": {"b": [1, {2: (3, 4)}]}, "c": None}) == {
        "a.b.0": 1, "a.b.1.2": (3, 4), "c": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="two of its entries have the name 'a.b'"):
        flatten({"a": {"b": 1}, "a.b": 2})


def test_dictionaries_in_circles_and_large_families_are_refused():
    circle: dict = {}
    circle["a"] = circle
    family: list = []
    for _ in range(60):
        family = [family] * 10
    for content in (circle, family, {"a": [1] * 200_000}):
        with pytest.raises(ValueError, match="more than 100,000 entries"):
            flatten(content)


def test_types_and_layouts_of_torch_are_read():
    expected = np.load(TENSORS / "expected.npz")
    with open_tensors(TENSORS / "types.pt") as file:
        assert {*file.names} == {*expected, "nested.a", "nested.list.0"}
        for name in expected:
            np.testing.assert_array_equal(np.array(file.read(name)), expected[name])
        assert file.value("k") == 2**40 + 1
        assert file.value("text") == "Größe"
        assert file.values == {
            "nested.list.1": 5, "number": 3, "half": 2.5, "text": "Größe", "pair": (1, 2),
            "nothing": None, "type": "torch.float32", "device": "cpu", "size": (10, 8),
        }  # fmt: skip
    with open_tensors(TENSORS / "protocol_4.pt") as file:
        assert file.names == ["weight", "bias"] and file.shape("weight") == (4, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("legacy", "torch before 1.6.*torch.save"),
        ("module", "torch.nn.modules.linear.Linear.*state_dict"),
        ("bare", "holds a Tensor, not a dictionary"),
        ("expanded", "larger than its storage"),
        ("complex", "ComplexFloatStorage"),
    ],
)
def test_what_torch_writes_and_is_not_read_says_why(name, message):
    with pytest.raises(ValueError, match=message) as error:
        open_tensors(TENSORS / f"{name}.pt")
    assert f"{name}.pt" in str(error.value)


def test_our_writer_of_pickles_is_read_as_torch_is(tmp_path):
    values = floats(4, 5)
    content = pickled({"a": tensor("0", 20, (5, 4), (1, 5)), "n": 3})
    path = torch_file(tmp_path / "a.pt", content, {"0": values.tobytes()})
    with open_tensors(path) as file:
        np.testing.assert_array_equal(np.array(file.read("a")), values.T)
        assert file.value("n") == 3
