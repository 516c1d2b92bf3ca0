import pytest

from mlxterp.sae import load_sae
from tests.sae.formats import golden

FORMAT = "goodfire"
GOODFIRE = "Llama-3.1-8B-Instruct-SAE-l19.pth"
DEEPSEEK = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (GOODFIRE, "meta-llama/Llama-3.1-8B-Instruct"),
        (DEEPSEEK, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_codes_and_reconstructions_are_those_of_the_judge(name, model):
    sae = golden.load(FORMAT, name)
    golden.agrees(sae, FORMAT, name)
    assert sae.site == "layers.19.resid_post" and sae.metadata.model == {"name": model}


def test_one_of_the_golden_files_is_stored_in_bfloat16():
    with golden.open_tensors(golden.ROOT / FORMAT / DEEPSEEK) as file:
        assert {file.dtype(name) for name in file.names} == {"bfloat16"}


def test_under_another_name_the_site_has_to_be_given(tmp_path):
    file = golden.copy(FORMAT, GOODFIRE, tmp_path).rename(tmp_path / "mine.pth")
    with pytest.raises(
        ValueError, match="mine.pth does not say .* give site='layers.19.resid_post'"
    ):
        load_sae(file)
    sae = load_sae(file, site="layers.3.resid_post")
    assert sae.site == "layers.3.resid_post" and sae.metadata.model == {}


def test_two_linear_layers_without_such_a_name_are_not_recognised_but_can_be_named(tmp_path):
    file = golden.copy(FORMAT, DEEPSEEK, tmp_path).rename(tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="looks like none of the formats"):
        load_sae(file)
    golden.agrees(load_sae(file, site="layers.3.mlp", format=FORMAT), FORMAT, DEEPSEEK)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"decoder_linear__weight": lambda W: W.T}, r"must have shape \(8, 32\), got \(32, 8\)"),
        ({"encoder_linear__weight": lambda W: W[0]}, "'encoder_linear.weight' must be a matrix"),
        ({"encoder_linear__bias": lambda b: b[1:]}, r"must have shape \(32,\), got \(31,\)"),
        ({"decoder_linear__bias": golden.with_nan}, "not finite"),
        ({"decoder_linear__bias": None}, "looks like none of the formats"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message, tmp_path):
    file = golden.copy(FORMAT, GOODFIRE, tmp_path)
    golden.change_arrays(file, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(file)
