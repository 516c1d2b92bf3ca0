"""A bundle comes back from disk as it was, and what is damaged is refused with the file's name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from mlxterp.sae.dashboard.build import build_bundle, compared
from mlxterp.sae.dashboard.bundle import Bundle
from mlxterp.sae.dashboard.reading import open_bundle
from mlxterp.sae.similarity.matching import match
from tests.sae.circuits.examples import over_dataset
from tests.sae.dashboard.bundles import collected


@pytest.fixture(scope="module")
def bundle(model) -> Bundle:
    data, other = collected(model), collected(model, n_features=30)
    beside = compared("<i>other</i>", match(data.coder, other.coder), build_bundle(other))
    made = build_bundle(data, circuits={"one": over_dataset()}, comparisons=[beside])
    made.labels.set(3, "</script> \u2028")
    return made


@pytest.fixture
def path(bundle, tmp_path):
    return bundle.save(tmp_path / "features.mlxdash")


def test_a_bundle_comes_back_as_it_was(bundle, path):
    found = open_bundle(path)
    assert found.meta() == bundle.meta() and found.strings == bundle.strings
    assert found.table_bytes() == bundle.table_bytes()
    assert [found.feature(i) for i in range(40)] == [bundle.feature(i) for i in range(40)]
    assert found.label_entries() == bundle.label_entries()
    assert found.circuits == bundle.circuits
    ours, theirs = found.comparisons[0], bundle.comparisons[0]
    assert ours.to_dict() == theirs.to_dict() and ours.table_bytes() == theirs.table_bytes()
    assert ours.bundle.feature(7) == theirs.bundle.feature(7)


def test_labels_of_an_opened_bundle_are_written_to_it(path):
    open_bundle(path).labels.set(5, "new")
    assert open_bundle(path).label_entries()["5"]["text"] == "new"


def test_the_answers_are_plain_values(bundle):
    for content in (bundle.meta(), bundle.feature(3), bundle.together([1, 2]), *bundle.circuits):
        assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_the_table_says_which_features_have_more(bundle):
    table = load(bundle.table_bytes([1, 5]))
    assert np.flatnonzero(table["included"]).tolist() == [1, 5]
    assert load(bundle.table_bytes())["included"].all()
    assert bundle.meta(2)["features"] == {"n": 40, "included": 2}
    np.testing.assert_array_equal(table["maxima"], bundle.table["maxima"])


@pytest.mark.parametrize("feature_id", [-1, 40])
def test_there_is_no_feature_beyond_the_last(bundle, feature_id):
    with pytest.raises(IndexError, match="39"):
        bundle.feature(feature_id)


def test_a_matching_names_both_coders(bundle):
    comparison = bundle.comparisons[0]
    assert comparison.to_dict()["n_features"] == 30 and comparison.name == "<i>other</i>"
    partners = comparison.arrays["partners"]
    assert partners.max() < 30 and (partners < 0).sum() == 10


def test_features_of_a_circuit_that_are_the_coders_own_are_named(model):
    circuit = over_dataset()
    data = collected(model)
    own = data.coder.reads.names[0]
    nodes = build_bundle(data, circuits=[circuit]).circuits[0]["nodes"]
    assert len(nodes) == len(circuit.nodes) and all("feature" in node for node in nodes)
    for node in nodes:
        here = node["kind"] == "feature" and node["site"] == own
        assert node["feature"] == (node["index"] if here else None)
    moved = replace(
        circuit,
        nodes=tuple(
            replace(n, site=own) if n.site == circuit.levels[0] else n for n in circuit.nodes
        ),
        levels=(own, *circuit.levels[1:]),
    )
    nodes = build_bundle(data, circuits=[moved]).circuits[0]["nodes"]
    found = [n["feature"] for n in nodes if n["kind"] == "feature" and n["site"] == own]
    assert (
        found and all(i is None or 0 <= i < 40 for i in found) and any(i is not None for i in found)
    )


@pytest.mark.parametrize(
    "name", ["dashboard.json", "strings.json", "table.safetensors", "labels.json",
             "examples.safetensors", "side_0.safetensors", "circuit_0.json",
             "other_0/dashboard.json", "other_0/matching.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_a_file_that_is_missing_or_damaged_is_named(path, name, harm):
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises(ValueError, match=name.rpartition("/")[2].partition(".")[0]):
        open_bundle(path)


@pytest.mark.parametrize(
    ("file", "array", "value"),
    [
        ("examples.safetensors", "firsts", 10**6),
        ("examples.safetensors", "tokens", 10**6),
        ("examples.safetensors", "starts", 10**6),
        ("examples.safetensors", "n_values", 200),
        ("examples.safetensors", "value_tokens", 250),
        ("examples.safetensors", "peaks", 250),
        ("features.safetensors", "similar", 40),
        ("features.safetensors", "together", 10**6),
        ("table.safetensors", "peaks", 10**6),
        ("side_0.safetensors", "top", 10**6),
        ("other_0/matching.safetensors", "partners", 30),
    ],
)
def test_arrays_that_point_beyond_what_there_is_are_refused(path, file, array, value):
    held = load_file(path / file)
    changed = held[array].copy()
    changed.reshape(-1)[1] = value
    save_file({**held, array: changed}, path / file)
    with pytest.raises(ValueError, match="there"):
        open_bundle(path)


def test_examples_beyond_the_last_are_refused(path):
    file = path / "examples.safetensors"
    held = load_file(file)
    starts = held["starts"].copy()
    starts[-1] += 1
    save_file({**held, "starts": starts}, file)
    with pytest.raises(ValueError, match="there"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"scale": "x"}, "describe"),
        ({"n_circuits": -1}, "describe"),
        ({"sizes": {}}, "describe"),
        ({"sides": 3}, "describe"),
        ({"coder": {"n_features": 2**40}}, "describe"),
        ({"coder": {"n_features": 41}}, "shape"),
    ],
)
def test_facts_that_cannot_be_are_refused(path, change, message):
    file = path / "dashboard.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_bundle(path)


def test_another_directory_is_not_overwritten(bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not overwritten"):
        bundle.save(tmp_path)
    path = bundle.save(tmp_path / "features.mlxdash")
    assert bundle.save(path) == path
    shutil.rmtree(path)
