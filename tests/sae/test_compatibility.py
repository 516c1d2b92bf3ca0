"""What is said where a coder and a model do not fit, or may not."""

from dataclasses import replace

import pytest
from mlx import nn

from mlxterp import InterpretableModel
from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.compatibility import Compatibility, compatibility
from mlxterp.sae.fitting import _facts
from mlxterp.sae.metadata import Metadata
from tests.fakes import SITE, FakeSource


@pytest.fixture(scope="module")
def quantised() -> InterpretableModel:
    base = InterpretableModel.demo()
    nn.quantize(base.model, group_size=64, bits=4)
    made = InterpretableModel(base.model, base.tokenizer)
    made.name = "mlx-community/demo-4bit"
    return made


def coder(site: str = "layers.2.resid_post", width: int = 128, **facts) -> SAE:
    columns = Columns((site,), (width,))
    made = SAE(columns, columns, 8, k=2)
    made.metadata = Metadata(model=facts)
    return made


def test_a_model_knows_the_type_of_its_weights_and_their_quantisation(demo, quantised):
    assert demo.precision == {"dtype": "float32", "quantization": None}
    form = "affine, 4 bits in groups of 64"
    assert quantised.precision == {"dtype": "float32", "quantization": form}
    assert _facts(quantised)["quantization"] == form and _facts(demo)["dtype"] == "float32"
    assert "quantization" not in _facts(FakeSource())


def test_a_coder_of_the_model_is_compatible(demo):
    made = coder(**_facts(demo))
    assert made.is_compatible(demo) and repr(made.is_compatible(demo)) == "compatible"


def test_weights_that_differ_by_quantisation_are_said_to(demo, quantised):
    for trained, here, then, now in (
        (demo, quantised, "not quantised", "quantised (affine, 4 bits in groups of 64)"),
        (quantised, demo, "quantised (affine, 4 bits in groups of 64)", "not quantised"),
    ):
        fits = coder(**_facts(trained)).is_compatible(here)
        assert not fits and fits.reasons == (
            f"going by the names the weights are of the same model ({trained.name}), but they were "
            f"{then} in training and are {now} here, which changes codes: sae.evaluate(model=..., "
            "dataset=...) says how well the coder does",
        )


def test_other_weights_that_are_quantised_too_are_both(demo, quantised):
    facts = _facts(quantised) | {"name": "org/another"}
    (reason,) = coder(**facts).is_compatible(demo).reasons
    assert reason == (
        "it was trained on other weights (org/another), and they were quantised (affine, 4 bits in "
        "groups of 64) in training and are not quantised here"
    )
    del facts["quantization"]  # as before it was recorded
    (reason,) = coder(**facts).is_compatible(demo).reasons
    assert reason == "it was trained on other weights (org/another)"


def test_width_layers_and_site_are_reasons(demo):
    fits = coder(width=64, **_facts(demo) | {"n_layers": 16}).is_compatible(demo, 3, "mlp")
    assert fits.reasons == (
        "layers.2.resid_post has width 128 in the model, 64 in the coder",
        "the model has layers: 6, the one that it was trained on: 16",
        "it is of layers.2.resid_post, not of layers.3.mlp",
    )


@pytest.mark.parametrize(
    ("trained", "here", "same"),
    [
        ("google/gemma-2-2b", "mlx-community/gemma-2-2b-4bit", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("meta-llama/Llama-3.1-8B", "mlx-community/Meta-Llama-3.1-8B-bf16", True),
        ("Llama-3.2-1B-Instruct", "mlx-community/Llama-3.2-1B-Instruct-mxfp4-mlx", True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", False),
        ("gpt2-small", "openai-community/gpt2", True),
        ("Qwen/Qwen3-8B", "mlx-community/Qwen3-8B-4bit-DWQ", True),
        ("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-70m", False),
        ("llama", "/data/models/llama/", True),
        ("llama", "/data/models/mistral", False),
    ],
)
def test_where_only_the_name_is_known_names_are_compared(trained, here, same):
    source = FakeSource()
    source.name = here
    fits = coder(SITE, 6, name=trained).is_compatible(source)
    assert fits and bool(fits.doubts) is not same
    if not same:
        assert repr(fits).startswith(f"compatible, but it knows its model by name only ({trained})")


def test_a_coder_that_knows_only_a_name_is_warned_of_quantised_weights(quantised):
    fits = coder(name="org/demo").is_compatible(quantised)
    assert fits and fits.doubts == (
        "the model is quantised (affine, 4 bits in groups of 64), and the coder does not say that "
        "it was trained on such weights: sae.evaluate(model=..., dataset=...) says how well the "
        "coder does",
    )
    assert coder().is_compatible(quantised) == Compatibility(())


def test_loading_warns_of_reasons_and_of_doubts(demo, quantised, tmp_path):
    path = coder(**_facts(demo)).save(tmp_path / "sae.mlx")
    assert demo.load_sae(path).known_model() is demo
    with pytest.warns(UserWarning, match="sae.mlx is not compatible: going by the names"):
        quantised.load_sae(path)
    path = coder(name="org/another").save(tmp_path / "other.mlx")
    with pytest.warns(UserWarning, match="other.mlx is compatible, but it knows its model by name"):
        demo.load_sae(path)


def test_doubts_stand_beside_reasons(demo):
    made = coder("layers.9.mlp", name="org/another")
    fits = compatibility(made, replace(made.metadata), demo)
    assert not fits and len(fits.reasons) == len(fits.doubts) == 1
    assert repr(fits).startswith("not compatible: ") and "org/another" in repr(fits)
