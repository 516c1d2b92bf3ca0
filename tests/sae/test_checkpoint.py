import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxterp.sae import SAE, load_sae
from mlxterp.sae.base import FORMAT_VERSION, BaseSAE
from mlxterp.sae.checkpoint import UPGRADES
from mlxterp.sae.coder import Columns
from mlxterp.sae.metadata import Metadata, Statistics
from tests.sae import kinds

VERSIONS = Path(__file__).parents[1] / "golden" / "versions"
FILES = {
    "config.json", "encoder.safetensors", "decoder.safetensors", "encoder_bias.safetensors",
    "statistics.json", "metadata.json",
}  # fmt: skip
ARRAYS = [
    ("encoder.safetensors", "W_enc", "sae"), ("decoder.safetensors", "W_dec", "sae"),
    ("decoder.safetensors", "b_dec", "sae"), ("encoder_bias.safetensors", "b_enc", "sae"),
    ("decoder.safetensors", "W_skip", "skip transcoder"),
    ("decoder.safetensors", "site_scale", "crosscoder"),
    ("encoder.safetensors", "W_enc", "cross-layer transcoder"),
    ("decoder.safetensors", "W_dec", "cross-layer transcoder"),
]  # fmt: skip
JSON_KEYS = [
    ("config.json", key)
    for key in (
        "format_version", "kind", "reads", "writes", "n_features", "activation_function",
        "token_norm",
    )
] + [
    ("metadata.json", "model"), ("metadata.json", "config"), ("statistics.json", "firing_rates"),
    ("statistics.json", "training"), ("statistics.json", "validation"),
]  # fmt: skip


def example(seed: int = 0, name: str = "topk", kind: str = "sae") -> BaseSAE:
    coder = kinds.make(kind, name)
    rng = np.random.default_rng(seed)
    for arrays in coder.array_files().values():
        for part, array in arrays.items():
            coder.set_array(part, mx.array(rng.normal(size=array.shape).astype(np.float32)))
    coder.metadata = Metadata(model={"name": "fake"}, config={"k": 4}, library_version="0")
    coder.statistics = Statistics(({"step": 1, "fvu": 0.5},), (), rng.random(30).round(3))
    return coder


def inputs(width: int = 6) -> mx.array:
    return mx.array(np.random.default_rng(9).normal(size=(50, width)).astype(np.float32))


@pytest.fixture
def saved(tmp_path) -> Path:
    return example().save(tmp_path / "sae.mlx")


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_saved_coder_has_the_documented_files(saved):
    assert {path.name for path in saved.iterdir()} == FILES


def test_codes_are_the_same_bit_for_bit_after_loading(saved):
    loaded = load_sae(saved)
    assert type(loaded) is SAE and repr(loaded) == repr(example())
    assert mx.array_equal(loaded.encode(inputs()), example().encode(inputs()))
    assert mx.array_equal(loaded(inputs()), example()(inputs()))


OPTIONS = {
    "topk": {"k": 4}, "batch_topk": {"k": 4}, "abs_topk": {"k": 4}, "jumprelu": {}, "relu": {},
    "gated": {},
}  # fmt: skip
OWN = [("batch_topk", "threshold"), ("jumprelu", "threshold"), ("gated", "offset"),
       ("gated", "log_gain")]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_and_activation_function_comes_back_with_its_options_and_arrays(
    kind, name, tmp_path
):
    original = example(name=name, kind=kind)
    saved = original.save(tmp_path / "sae.mlx")
    assert {path.name for path in saved.iterdir()} == FILES
    config = json.loads((saved / "config.json").read_text())
    assert config["activation_function"] == {"activation_function": name, **OPTIONS[name]}
    assert (config["kind"], config["skip"]) == (type(original).kind, "skip" in kind)
    assert [site["site"] for site in config["reads"]] == list(original.reads.names)
    assert [site["width"] for site in config["writes"]] == list(original.writes.widths)
    loaded = load_sae(saved)
    assert type(loaded) is type(original) and loaded.to_config() == original.to_config()
    assert repr(loaded) == repr(original)
    ours, theirs = (dict(tree_flatten(coder.parameters())) for coder in (original, loaded))
    assert set(ours) == set(theirs) and ("W_skip" in ours) == ("skip" in kind)
    assert all(mx.array_equal(theirs[array], ours[array]) for array in ours)
    x = inputs(original.d_in)
    z = original.encode(x)
    assert (z != 0).any().item() and mx.array_equal(loaded.encode(x), z)
    assert mx.array_equal(loaded(x), original(x))
    assert mx.array_equal(loaded.decoder_norms(), original.decoder_norms())


@pytest.mark.parametrize(("name", "array"), OWN)
def test_an_array_of_the_activation_function_that_is_missing_or_misshapen_is_named(
    name, array, tmp_path
):
    file = example(name=name).save(tmp_path / "sae.mlx") / "encoder.safetensors"
    arrays = mx.load(str(file))
    mx.save_safetensors(str(file), {**arrays, array: mx.zeros((7, 3))})
    with pytest.raises(ValueError, match=rf"encoder.safetensors: '{array}' must have shape"):
        load_sae(file.parent)
    del arrays[array]
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(ValueError, match=f"encoder.safetensors has no key '{array}'"):
        load_sae(file.parent)


def test_codes_of_every_kind_are_the_same_bit_for_bit_in_another_process(tmp_path):
    script = """
import sys, pathlib, mlxterp, numpy as np, mlx.core as mx
from mlxterp.sae import load_sae
for path in pathlib.Path(sys.argv[1]).glob("*.mlx"):
    coder = load_sae(path)
    x = np.random.default_rng(9).normal(size=(50, coder.d_in)).astype(np.float32)
    np.savez(path.with_suffix(".npz"), z=coder.encode(mx.array(x)), y=coder(mx.array(x)))
"""
    coders = {kind: example(kind=kind) for kind in kinds.KINDS}
    for kind, coder in coders.items():
        coder.save(tmp_path / f"{kind}.mlx")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, cwd=root)
    for kind, coder in coders.items():
        x = inputs(coder.d_in)
        with np.load(tmp_path / f"{kind}.npz") as found:
            np.testing.assert_array_equal(found["z"], np.array(coder.encode(x)))
            np.testing.assert_array_equal(found["y"], np.array(coder(x)))


def test_origin_and_statistics_come_back(saved):
    loaded, original = load_sae(str(saved)), example()
    assert loaded.metadata == original.metadata
    assert loaded.statistics.training == original.statistics.training
    np.testing.assert_allclose(loaded.statistics.firing_rates, original.statistics.firing_rates)


def test_dead_features_are_listed_in_the_statistics():
    rates = Statistics(firing_rates=np.array([0.1, 0.0, 0.25, 0.0]))
    assert rates.to_dict()["dead_features"] == [1, 3]


def test_saving_over_an_older_coder_replaces_it(saved):
    example(seed=1).save(saved)
    assert mx.array_equal(load_sae(saved).W_enc, example(seed=1).W_enc)


def test_saving_over_another_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is not overwritten"):
        example().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_language_model_is_not_taken_for_an_older_coder(tmp_path):
    files = {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="it is not overwritten"):
        example().save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_crash_while_saving_leaves_the_old_coder(saved, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(mx, "save_safetensors", crash)
        example(seed=1).save(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["sae.mlx"]
    assert mx.array_equal(load_sae(saved).W_enc, example().W_enc)


def test_nothing_at_a_path_is_an_error_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved coder at .*nowhere"):
        load_sae(tmp_path / "nowhere")


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        load_sae(saved)


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("kept", [0, 11, -3])
def test_a_truncated_file_is_named(saved, file, kept):
    (saved / file).write_bytes((saved / file).read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file} is (damaged|not valid)"):
        load_sae(saved)


@pytest.mark.parametrize(("file", "key"), JSON_KEYS)
def test_a_missing_key_is_named_with_its_file(saved, file, key):
    change_json(saved / file, lambda content: content.pop(key))
    with pytest.raises(ValueError, match=f"{file} has no key '{key}'"):
        load_sae(saved)


@pytest.mark.parametrize(("file", "key", "kind"), ARRAYS)
def test_a_missing_or_misshapen_array_is_named_with_its_file(file, key, kind, tmp_path):
    saved = example(kind=kind).save(tmp_path / "sae.mlx")
    arrays = mx.load(str(saved / file))
    wrong = {**arrays, key: mx.zeros((7, 3))}
    mx.save_safetensors(str(saved / file), wrong)
    with pytest.raises(ValueError, match=rf"{file}: '{key}' must have shape .*, got \(7, 3\)"):
        load_sae(saved)
    del wrong[key]
    mx.save_safetensors(str(saved / file), wrong or {"other": mx.zeros((1,))})
    with pytest.raises(ValueError, match=f"{file} has no key '{key}'"):
        load_sae(saved)


def test_integers_in_place_of_weights_are_refused(saved):
    mx.save_safetensors(str(saved / "encoder.safetensors"), {"W_enc": mx.zeros((30, 6), mx.int32)})
    with pytest.raises(ValueError, match="encoder.safetensors: 'W_enc' has type I32"):
        load_sae(saved)


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.0])
def test_a_version_that_is_none_is_refused(saved, version):
    change_json(saved / "config.json", lambda content: content.update(format_version=version))
    with pytest.raises(ValueError, match=f"'format_version' must be .* >= 1, got {version!r}"):
        load_sae(saved)


def test_a_later_version_asks_for_an_upgrade(saved):
    later = FORMAT_VERSION + 1
    change_json(saved / "config.json", lambda content: content.update(format_version=later))
    with pytest.raises(ValueError, match=f"format_version {later}, which a newer mlxterp wrote"):
        load_sae(saved)


def test_every_version_has_an_upgrade_to_the_next():
    assert len(UPGRADES) == FORMAT_VERSION - 1


@pytest.mark.parametrize("name", ["sae", "jumprelu", "transcoder", "crosscoder"])
@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_coders_of_older_versions_do_what_they_did(version, name, tmp_path):
    place = VERSIONS / f"version_{version}"
    expected = np.load(place / "expected.npz")
    coder = load_sae(place / name)
    x = mx.array(expected["x"][:, : coder.d_in])
    np.testing.assert_allclose(np.array(coder.encode(x)), expected[f"{name}.z"], atol=1e-6)
    np.testing.assert_allclose(np.array(coder(x)), expected[f"{name}.y"], atol=1e-5)
    assert coder.metadata.model == {"name": "a/model"} and coder.metadata.source == {}
    assert coder.token_norm == "none"
    again = load_sae(coder.save(tmp_path / "again.mlx"))
    assert again.to_config()["format_version"] == FORMAT_VERSION
    assert mx.array_equal(again.W_enc, coder.W_enc)


def test_a_norm_of_tokens_and_a_source_are_saved(tmp_path):
    columns = Columns(("layers.0.mlp",), (6,))
    coder = SAE(columns, columns, 8, "relu", token_norm="layer_norm")
    coder.metadata = Metadata(source={"format": "openai", "l0": 3})
    again = load_sae(coder.save(tmp_path / "sae.mlx"))
    assert again.token_norm == "layer_norm" and again.metadata.source == coder.metadata.source
    assert "layer_norm" in again._repr_html_() and "openai" in again._repr_html_()
    change_json(tmp_path / "sae.mlx" / "config.json", lambda c: c.update(token_norm="batch_norm"))
    with pytest.raises(ValueError, match="config.json does not describe a coder: token_norm must"):
        load_sae(tmp_path / "sae.mlx")


def test_a_saved_coder_says_itself_where_it_belongs(saved):
    with pytest.raises(
        ValueError, match="says itself which sites it is of; got site='layers.1.mlp"
    ):
        load_sae(saved, site="layers.1.mlp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "quilt"}, r"'kind' must be one of \['cross_.*\], got 'quilt'"),
        ({"kind": ["sae"]}, "config.json"),
        ({"n_features": 2}, r"k must be in \[1, n_features = 2\]"),
        ({"n_features": "many"}, "does not describe a coder"),
        ({"n_features": 10**30}, "does not describe a coder"),
        ({"reads": [{"site": "layers.0.mlp", "width": 0}]}, "widths must be >= 1"),
        ({"reads": []}, "widths must be >= 1"),
        ({"reads": "layers.0.mlp"}, "does not describe a coder"),
        ({"reads": [{"width": 6}]}, "does not describe a coder: 'site'"),
        ({"writes": [{"site": "elsewhere", "width": 6}]}, "writes the one site that it reads"),
        ({"activation_function": {"activation_function": "sigmoid", "k": 4}}, "got 'sigmoid'"),
        ({"activation_function": {"activation_function": "topk", "k": 0}}, "got 0"),
        ({"activation_function": {"activation_function": "topk", "k": 2.5}}, "k must be"),
        ({"activation_function": {"name": "topk"}}, "does not describe a coder"),
        ({"activation_function": "topk"}, "does not describe a coder"),
    ],
)
def test_a_config_that_describes_no_coder_is_named(saved, change, message):
    change_json(saved / "config.json", lambda content: content.update(change))
    with pytest.raises(ValueError, match=message) as error:
        load_sae(saved)
    assert "config.json" in str(error.value)


ONE, TWO = [{"site": "a", "width": 6}], [{"site": "a", "width": 6}, {"site": "b", "width": 6}]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sae", {"skip": True}, "skip is for transcoders only"),
        ("crosscoder", {"skip": True}, "skip is for transcoders only"),
        ("transcoder", {"reads": TWO}, "reads one site and writes another"),
        ("transcoder", {"reads": ONE, "writes": ONE}, "reads one site and writes another"),
        ("crosscoder", {"reads": ONE, "writes": ONE}, "writes the several sites that it reads"),
        ("crosscoder", {"writes": TWO}, "writes the several sites that it reads"),
        ("cross-layer transcoder", {"reads": ONE}, "of each of two or more layers"),
        ("cross-layer transcoder", {"reads": [*ONE, {"site": "b", "width": 5}]}, "have one width"),
        ("cross-layer transcoder", {"skip": True}, "skip is for transcoders"),
    ],
)
def test_a_config_that_describes_no_coder_of_its_kind_is_named(kind, change, message, tmp_path):
    saved = example(kind=kind).save(tmp_path / "coder.mlx")
    change_json(saved / "config.json", lambda content: content.update(change))
    with pytest.raises(ValueError, match=message) as error:
        load_sae(saved)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("statistics.json", {"firing_rates": ["a"]}),
        ("statistics.json", {"firing_rates": [0.5] * 7}),
        ("statistics.json", {"training": 3}),
        ("metadata.json", {"model": "demo"}),
    ],
)
def test_values_that_do_not_fit_are_named_by_file(saved, file, change):
    change_json(saved / file, lambda content: content.update(change))
    with pytest.raises(ValueError, match=file):
        load_sae(saved)


def test_k_may_be_written_as_a_float(saved):
    config = json.loads((saved / "config.json").read_text())
    config["activation_function"]["k"] = float(config["activation_function"]["k"])
    (saved / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(
        load_sae(saved).encode(mx.ones((2, 6))), example().encode(mx.ones((2, 6)))
    )


def test_what_was_collected_is_saved_with_the_coder(sae, model, tmp_path):
    copy = load_sae(sae.save(tmp_path / "coder.mlx"))
    copy.bind(model)
    assert copy.features is None or len(copy.features.firing_counts) == copy.n_features
    texts = list(topics.values())[40:44]
    data = copy.collect(texts, verbose=False)
    again = load_sae(tmp_path / "coder.mlx")
    assert again.features is not None and again.features.n_tokens == data.n_tokens
    np.testing.assert_array_equal(again.features.firing_counts, data.firing_counts)
    with pytest.raises(ValueError, match="bind"):
        again.features.examples(0)
    again.bind(model)
    strong = int(np.argmax(data.firing_counts))
    assert again.features.examples(strong) == data.examples(strong)
    moved = load_sae(again.save(tmp_path / "moved.mlx"))
    assert moved.features is not None and moved.features.settings == data.settings


def test_a_coder_that_was_not_saved_keeps_what_it_collected_until_it_is(model, tmp_path):
    columns = Columns(("layers.2.resid_post",), (128,))
    made = SAE(columns, columns, 40, k=3)
    made.W_enc = mx.random.normal((40, 128), key=mx.random.key(0))
    assert made.features is None
    data = made.collect(list(topics.values())[:2], model=model, verbose=False)
    assert made.features is data
    assert load_sae(made.save(tmp_path / "new.mlx")).features.n_tokens == data.n_tokens
    # Another coder at the same place does not inherit them.
    assert load_sae(SAE(columns, columns, 40, k=3).save(tmp_path / "new.mlx")).features is None


def test_labels_are_saved_with_the_coder_and_stay_when_it_is_saved_again(tmp_path):
    path, coder = tmp_path / "coder.mlx", example()
    coder.labels.set(0, "numbers")
    assert coder.labels.path is None
    coder.save(path)
    coder.labels.set(1, "names")
    loaded = load_sae(path)
    assert loaded.labels.texts == coder.labels.texts == {0: "numbers", 1: "names"}
    load_sae(path).save(path)
    coder.save(path)
    assert load_sae(path).labels.texts == {0: "numbers", 1: "names"}
    moved = load_sae(loaded.save(tmp_path / "moved.mlx"))
    loaded.labels.set(1, "new names")
    assert moved.labels[1].text == "new names"
    assert load_sae(path).labels[1].text == "names"
    # Another coder at the same place does not inherit them.
    assert not load_sae(example().save(path)).labels


def test_damaged_labels_are_named_and_not_replaced(tmp_path):
    coder = example()
    coder.labels.set(0, "numbers")
    path = coder.save(tmp_path / "coder.mlx")
    (path / "labels.json").write_text("{")
    for call in (lambda loaded: loaded.labels, lambda loaded: loaded.save(path)):
        with pytest.raises(ValueError, match="labels.json is not valid JSON"):
            call(load_sae(path))
    assert (path / "labels.json").read_text() == "{"
