"""The command that turns coders of one format into those of another."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.cli.main import main
from mlxterp.sae import load_sae
from tests.sae.formats.files import GOLDEN

SAELENS, SPARSIFY = GOLDEN / "saelens", GOLDEN / "sparsify"


def same(first, second) -> bool:
    x = mx.array(np.load(SAELENS / "expected.npz")["x"])
    return bool(mx.allclose(first(x), second(x), atol=1e-5))


def test_a_coder_of_another_library_becomes_one_of_ours(tmp_path, capsys):
    target = tmp_path / "sae.mlx"
    assert main(["convert", str(SAELENS / "jumprelu"), str(target)]) == 0
    shown = capsys.readouterr().out
    assert f"saved at {target}" in shown and "jumprelu" in shown
    assert (target / "config.json").is_file()
    coder = load_sae(target)
    assert coder.metadata.source["format"] == "saelens"
    assert same(coder, load_sae(SAELENS / "jumprelu"))


def test_ours_becomes_one_of_another_library_and_one_of_theirs_of_a_third(tmp_path):
    ours, theirs = tmp_path / "ours.mlx", tmp_path / "theirs"
    assert main(["convert", str(SPARSIFY / "layers.3"), str(ours)]) == 0
    assert main(["convert", str(ours), str(theirs), "--format", "saelens"]) == 0
    assert json.loads((theirs / "cfg.json").read_text())["architecture"] == "topk"
    assert same(load_sae(theirs), load_sae(SPARSIFY / "layers.3"))
    direct = tmp_path / "direct"
    arguments = ["convert", str(SAELENS / "topk"), str(direct), "--format", "sparsify"]
    assert main([*arguments, "--site", "layers.7.mlp"]) == 0
    assert load_sae(direct).reads.names == ("layers.7.mlp",)
    assert same(load_sae(direct), load_sae(SAELENS / "topk"))


def test_the_format_of_the_source_can_be_named(tmp_path, capsys):
    target = str(tmp_path / "sae.mlx")
    source = ["convert", str(SAELENS / "topk"), target, "--source-format"]
    assert main([*source, "sparsify"]) == 1
    assert "saelens/topk" in capsys.readouterr().err
    assert main([*source, "saelens"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source, --target must be given"),
        (["nowhere"], "--target must be given"),
        (["{place}/nowhere", "{place}/out"], "There is no saved coder at"),
        (["{place}", "{place}/out"], "looks like none of the formats"),
        ([str(SAELENS / "refused_temporal"), "{place}/out"], "architecture temporal"),
        ([str(SAELENS / "standard"), "{place}/out", "--format", "sparsify"], "topk and groupmax"),
    ],
)
def test_what_cannot_be_converted_says_why(arguments, message, tmp_path, capsys):
    arguments = [text.format(place=tmp_path) for text in arguments]
    assert main(["convert", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mlxterp convert: ") and message in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_lists_those_that_are_known(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--format", "keras"])
    assert "saelens" in capsys.readouterr().err
