import logging
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, load_sae
from mlxterp.sae.checkpoint import build
from mlxterp.sae.coder import Columns
from mlxterp.sae.formats import writing
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.reading import FORMATS, known_formats, read_foreign, recognised
from mlxterp.sae.metadata import Metadata
from tests.sae.formats.files import GOLDEN, floats

COLUMNS = Columns(("layers.0.mlp",), (6,))
SAELENS = GOLDEN / "saelens" / "topk"


def parts(**changes) -> Parts:
    arrays = {
        "W_enc": mx.array(floats(8, 6)), "b_enc": mx.zeros((8,)), "W_dec": mx.array(floats(8, 6)),
        "b_dec": mx.zeros((6,)),
    }  # fmt: skip
    given = Parts("sae", COLUMNS, COLUMNS, "relu", arrays, metadata=Metadata(source={"l0": 3}))
    return replace(given, **changes)


def with_arrays(**arrays: mx.array | None) -> Parts:
    found = {name: a for name, a in ({**parts().arrays} | arrays).items() if a is not None}
    return parts(arrays=found)


def test_a_coder_is_built_of_its_parts():
    rates = np.linspace(0, 1, 8)
    coder = build(parts(token_norm="rescale", firing_rates=rates))
    assert type(coder) is SAE and coder.token_norm == "rescale"
    assert mx.array_equal(coder.W_enc, mx.array(floats(8, 6)))
    np.testing.assert_array_equal(coder.statistics.firing_rates, rates)
    assert coder.metadata.source == {"l0": 3}


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "batch_topk"])
def test_parts_of_a_coder_make_it_again(kind):
    coder = SAE(COLUMNS, COLUMNS, 8, kind, 3)
    coder.W_enc, coder.W_dec = mx.array(floats(8, 6)), mx.array(floats(8, 6))
    again = build(Parts.of(coder, "sae", coder.metadata, np.zeros(0)))
    x = mx.array(floats(20, 6))
    assert mx.array_equal(again(x), coder(x)) and again.k == coder.k


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (parts(kind="quilt"), "kind must be one of .* got 'quilt'"),
        (with_arrays(b_enc=None), "'b_enc' must be there"),
        (with_arrays(b_enc=mx.zeros((8, 1))), "'b_enc' must be there"),
        (with_arrays(W_dec=None), r"arrays are missing, \['W_dec'\], or unknown, \[\]"),
        (with_arrays(threshold=mx.zeros((8,))), r"missing, \[\], or unknown, \['threshold'\]"),
        (with_arrays(W_enc=mx.zeros((6, 8))), r"'W_enc' must have shape \(8, 6\), got \(6, 8\)"),
        (with_arrays(b_dec=mx.array([0, 0, 0, 0, 0, mx.inf])), "'b_dec' holds numbers that are"),
        (with_arrays(W_skip=mx.zeros((6, 6))), "skip is for transcoders"),
        (parts(activation_function="sine"), "activation_function must be one of"),
        (
            parts(activation_function="topk", options={"k": 9}),
            r"k must be in \[1, n_features = 8\]",
        ),
        (parts(token_norm="group"), "token_norm must be one of"),
        (parts(writes=Columns(("layers.1.mlp",), (6,))), "writes the one site that it reads"),
        (parts(firing_rates=np.zeros(7)), r"firing rates must be 8 shares in \[0, 1\] or none"),
        (parts(firing_rates=np.full(8, 1.5)), "firing rates must be"),
        (parts(firing_rates=np.full(8, np.nan)), "firing rates must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(wrong)


def test_the_format_is_recognised_and_said(caplog):
    with caplog.at_level(logging.INFO, "mlxterp"):
        coder = load_sae(SAELENS)
    assert f"{SAELENS} is read as saelens" in caplog.text
    assert coder.metadata.source["format"] == "saelens"
    assert "saelens" in coder._repr_html_()
    assert coder.path is None  # what is collected is not written into a folder of another library


def test_a_foreign_coder_is_saved_as_one_of_ours(tmp_path):
    coder = load_sae(SAELENS)
    again = load_sae(coder.save(tmp_path / "a.mlx"))
    assert again.metadata == coder.metadata
    x = mx.array(floats(20, 8))
    assert mx.array_equal(again(x), coder(x))


def test_what_is_not_recognised_lists_what_is_known(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "weights.npz"):
        with pytest.raises(ValueError, match="looks like none of the formats .*'saelens'") as error:
            load_sae(path)
        assert str(known_formats()) in str(error.value)
    with pytest.raises(ValueError, match=r"format must be one of \[.*'saelens'.*\], got 'keras'"):
        load_sae(SAELENS, format="keras")
    with pytest.raises(ValueError, match="cfg.json is missing"):
        load_sae(tmp_path, format="saelens")


def test_names_of_formats_are_different_and_those_that_write_also_read():
    names = [module.NAME for module in FORMATS]
    assert len({*names}) == len(names)
    assert {module.NAME for module in writing.FORMATS} <= {*names}
    with pytest.raises(ValueError, match=r"format must be one of \[.*\], got 'keras'"):
        SAE(COLUMNS, COLUMNS, 8, "relu").export("keras", "nowhere")


def golden() -> list[Path]:
    marks = {"expected.npz", "inputs.npz"}
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and path.name not in marks]
    return sorted({path.parent for path in files if path.parent != GOLDEN} | {*files})


def test_every_golden_file_is_recognised_by_its_own_format_first():
    folders = {path.name for path in GOLDEN.iterdir()} & {*known_formats()}
    seen = set()
    for path in golden():
        folder, found = path.relative_to(GOLDEN).parts[0], recognised(path)
        if found is not None and folder in folders:
            assert folder == found.NAME, path
            seen.add(folder)
    assert {"saelens", "sparsify"} <= folders == seen


def test_nothing_recognises_our_own_coders_or_a_model(tmp_path):
    ours = SAE(COLUMNS, COLUMNS, 8, "relu").save(tmp_path / "a.mlx")
    for path in (ours, *ours.iterdir()):
        assert recognised(path) is None, path
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    mx.save_safetensors(str(model / "model.safetensors"), {"model.norm.weight": mx.ones((8,))})
    assert recognised(model) is None


def test_reading_by_name_needs_no_recognition(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_foreign(SAELENS, site="layers.9.mlp", format="saelens")
    assert found.reads.names == ("layers.9.mlp",)
