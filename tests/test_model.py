"""Loading models and what they tell of themselves."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxterp import loading
from mlxterp.loading import DEMO, fingerprint
from mlxterp.model import InterpretableModel
from tests.pages import checked
from tests.tiny_models import build


@pytest.fixture(scope="module")
def demo():
    return InterpretableModel.demo()


def test_the_demo_model(demo):
    assert (demo.name, demo.model_type, demo.n_layers, demo.d_model) == ("demo", "llama", 6, 128)
    assert (demo.vocab_size, demo.context_length) == (4096, 512)
    assert demo.special_token_ids == {0, 1, 2}
    assert {x.dtype for _, x in tree_flatten(demo.parameters())} == {mx.float32}
    assert repr(demo) == "InterpretableModel(\n  model=demo,\n  layers=6,\n  tokenizer=✓\n)"
    page = checked(demo._repr_html_())
    facts = {row[0]: row[1] for row in page.cells if len(row) == 2}
    assert facts["layers"] == "6, of width 128" and facts["vocabulary"] == "4,096 tokens"
    assert facts["weights"] == "6.8 MB, float32" and "InterpretableModel: demo" in page.text
    assert ["layers.*.attn_in", "0-5", "[B, S, 128] float32"] in page.cells


def test_a_local_directory(demo):
    model = InterpretableModel(str(DEMO))
    assert model.name == str(DEMO)
    assert model.fingerprint == demo.fingerprint
    if mx.default_device() == mx.Device(mx.cpu):
        assert model.model.model.norm.weight.dtype == mx.float32
    half = InterpretableModel(str(DEMO), dtype=mx.bfloat16)
    assert half.model.model.norm.weight.dtype == mx.bfloat16
    assert half.fingerprint == demo.fingerprint


def test_a_module_is_wrapped_as_it_is():
    module = build("llama")
    model = InterpretableModel(module)
    assert model.model is module
    assert model.tokenizer is None
    assert (model.name, model.model_type) == ("llama", "llama")
    assert model.context_length == 128
    assert [name for name, _ in model.named_modules()][0] == ""
    assert model.parameters().keys() == module.parameters().keys()
    module.freeze()
    assert tree_flatten(model.trainable_parameters()) == []
    x = mx.array([[1, 2]])
    assert mx.array_equal(model(x), module(x))
    assert "✗" in repr(model)


def test_half_precision_modules_keep_their_type_unless_asked():
    module = build("llama")
    module.set_dtype(mx.bfloat16)
    assert InterpretableModel(module).model.model.norm.weight.dtype == mx.bfloat16
    assert InterpretableModel(module, dtype=mx.float32).model.model.norm.weight.dtype == mx.float32


def test_a_fingerprint_changes_with_any_weight():
    model = build("llama_quantized")
    names = dict(tree_flatten(model.parameters()))
    found = {fingerprint(model)}
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        array = np.array(names[name])
        array.reshape(-1)[-1] += 1
        model.update(tree_unflatten([(name, mx.array(array))]))
        found.add(fingerprint(model))
    array = np.array(names["model.norm.weight"])
    array[:2] = [3, 2]
    for order in (array, array[[1, 0, *range(2, len(array))]]):
        model.update(tree_unflatten([("model.norm.weight", mx.array(order))]))
        found.add(fingerprint(model))
    assert len(found) == 5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.uint32])
def test_checksums_are_those_of_numpy(dtype, monkeypatch):
    monkeypatch.setattr(loading, "_CHECKED_AT_ONCE", 1000)
    array = (mx.random.uniform(shape=(50, 50), key=mx.random.key(0)) * 2**31).astype(dtype)
    bits = array if dtype == mx.uint32 else array.astype(mx.bfloat16).view(mx.uint16)
    bits = np.array(bits).reshape(-1).astype(object)
    parts = [bits[i : i + 1000] for i in range(0, 2500, 1000)]
    expected = [sum(int(b) * (2 * i + 1) for i, b in enumerate(part)) % 2**32 for part in parts]
    assert loading._checksums(array) == expected


def test_fingerprints_tell_models_apart():
    one, same, other = (InterpretableModel(build("llama", seed=s)) for s in (0, 0, 1))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 16
    assert int(one.fingerprint, 16) >= 0
    assert InterpretableModel(build("llama_quantized")).fingerprint != one.fingerprint


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"no model directory at '\./nowhere'"):
        InterpretableModel("./nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        InterpretableModel(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(
        ValueError, match=r"(?s)could not load.*Tried.*mlx_lm\.load.*local directory"
    ):
        InterpretableModel(str(tmp_path))


def test_a_hub_name_that_cannot_be_loaded_says_what_was_tried(monkeypatch):
    import huggingface_hub
    import mlx_lm.utils

    def missing(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(mlx_lm.utils, "snapshot_download", missing)
    with pytest.raises(
        ValueError, match=r"(?s)'no-body/no-model'.*LocalEntryNotFoundError: not there"
    ):
        InterpretableModel("no-body/no-model")


def test_a_directory_without_a_tokenizer_loads_without_one(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    model = InterpretableModel(str(tmp_path))
    assert model.tokenizer is None
    assert model.run([1, 2]).output.shape == (1, 2, 4096)


def test_the_import_is_light():
    code = "import mlxterp, sys; print({'mlx_lm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unembed_checks_the_width(demo):
    with pytest.raises(ValueError, match="hidden must have width 128, not 64"):
        demo.unembed(mx.zeros((2, 64)))


def test_a_wrapped_model_can_be_trained_while_traced():
    model = InterpretableModel(build("llama"))
    x = mx.array([[1, 2, 3]])
    with model.trace(x):
        step = nn.value_and_grad(model.model, lambda m: m(x).square().mean())
        _, gradients = step(model.model)
    assert len(tree_flatten(gradients)) == len(tree_flatten(model.parameters()))


class Floats(nn.Module):
    """A model that is no language model."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4) for _ in range(3)]

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x


@pytest.mark.parametrize("make", [np.ones, mx.ones])
def test_a_model_of_floats(make):
    model = InterpretableModel(Floats())
    assert model.run(make((2, 4)), capture="layers.1")["layers.1"].shape == (2, 4)


def test_a_model_of_floats_asks_for_an_example():
    with pytest.raises(ValueError) as caught:
        InterpretableModel(Floats()).sites()
    assert (
        "run a model of other inputs than tokens on an example first" in caught.value.__notes__[0]
    )


@pytest.mark.parametrize("wrong", [None, (1, 2)])
def test_a_model_must_be_a_module_or_a_name(wrong):
    with pytest.raises(TypeError, match="model must be a name, a path or an MLX module, not"):
        InterpretableModel(wrong)
