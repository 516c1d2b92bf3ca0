"""Features for Neuronpedia, and its explanations as labels."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from mlxterp.sae.coder import Columns
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.logit_effects import logit_effects
from mlxterp.sae.formats.neuronpedia import N_BINS, Listing, write_features
from mlxterp.sae.formats.neuronpedia_labels import read_labels
from mlxterp.sae.labels.labels import FeatureLabels, Label
from mlxterp.sae.sae import SAE

LISTING = Listing("demo", "res-16k", "a-release", "user1", "Somebody", url="https://example.org")
# The columns of the tables that the files go into; others are left out when they are imported.
COLUMNS = {
    "features": """modelId layer index maxActApprox creatorId frac_nonzero
        freq_hist_data_bar_heights freq_hist_data_bar_values
        logits_hist_data_bar_heights logits_hist_data_bar_values
        neuron_alignment_indices neuron_alignment_l1 neuron_alignment_values
        correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson
        decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName topkCosSimIndices
        topkCosSimValues vector hasVector""",
    "activations": """id modelId layer index creatorId tokens maxValue minValue values
        maxValueTokenIndex dfaValues lossValues qualifyingTokenIndex binContains binMin binMax""",
    "explanations": """id modelId layer index authorId description typeName explanationModelName
        notes""",
}


@pytest.fixture(scope="module")
def data(sae, model, texts):
    site = sae.reads.names[0]
    dataset = ActivationDataset.from_texts(model, texts[:8], [site], context_length=32)
    return collect(sae, dataset)


@pytest.fixture(scope="module")
def features(data):
    """The three that fire most, one that fires and one that does not."""
    by_rate = np.argsort(-data.firing_counts)
    return [*by_rate[:3].tolist(), int(by_rate[40]), int(data.dead[0])]


def lines(path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def test_the_files_have_the_columns_of_the_tables(data, features, tmp_path):
    labels = FeatureLabels(data.n_features)
    labels.set(features[1], "a label")
    path = write_features(data, LISTING, tmp_path, features=features, labels=labels)
    layer = data.coder.reads.names[0].split(".")[1]
    assert path == tmp_path / "demo" / f"{layer}-res-16k"
    assert sorted(file.name for file in path.iterdir()) == [
        "activations", "explanations", "features", "model.jsonl", "release.jsonl", "source.jsonl",
        "sourceset.jsonl",
    ]  # fmt: skip
    found = {name: lines(path / name / "batch-0.jsonl.gz") for name in COLUMNS}
    for name, rows in found.items():
        assert all(row.keys() == set(COLUMNS[name].split()) for row in rows), name
        assert {row["layer"] for row in rows} == {path.name}
        assert {row["modelId"] for row in rows} == {"demo"}
        assert all(isinstance(row["index"], str) for row in rows)
    assert [int(row["index"]) for row in found["features"]] == sorted(features)
    (explanation,) = found["explanations"]
    assert explanation["index"] == str(features[1]) and explanation["description"] == "a label"
    ids = [row["id"] for row in found["activations"]]
    assert len(set(ids)) == len(ids) and all(len(one) == 25 for one in ids)
    (source,), (of_set,) = (lines(path / f"{name}.jsonl") for name in ("source", "sourceset"))
    assert source["id"] == path.name and source["setName"] == of_set["name"] == "res-16k"
    assert source["num_prompts"] == data.n_contexts
    assert lines(path / "release.jsonl")[0]["name"] == of_set["releaseName"] == "a-release"
    assert lines(path / "model.jsonl")[0]["id"] == "demo"


def test_the_numbers_are_those_that_were_collected(data, features, tmp_path):
    path = write_features(data, LISTING, tmp_path, features=features)
    examples = lines(path / "activations" / "batch-0.jsonl.gz")
    for row in lines(path / "features" / "batch-0.jsonl.gz"):
        i = int(row["index"])
        assert row["frac_nonzero"] == pytest.approx(data.firing_rates[i])
        assert row["maxActApprox"] == pytest.approx(data.maxima[i], rel=1e-3)
        assert sum(row["freq_hist_data_bar_heights"]) == len(data.codes.of(i)[1])
        assert len(row["freq_hist_data_bar_values"]) == (N_BINS if data.firing_counts[i] else 0)
        effects = logit_effects(data.coder, data.source, i)
        for side, pairs in (("pos", effects.top), ("neg", effects.bottom)):
            assert row[f"{side}_str"] == [token for token, _ in pairs]
            np.testing.assert_allclose(row[f"{side}_values"], [x for _, x in pairs], rtol=1e-3)
        assert sum(row["logits_hist_data_bar_heights"]) == data.source.vocab_size
        own = [one for one in examples if one["index"] == row["index"]]
        top = [one for one in own if one["binContains"] == -1]
        assert len(top) == len(data.positions(i, 20))
        assert (len(own) > 0) == (data.firing_counts[i] > 0)
        for one in own:
            assert len(one["tokens"]) == len(one["values"])
            assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"] == max(one["values"])
            at_peak = one["values"][one["qualifyingTokenIndex"]]
            if one["binContains"] >= 0:
                assert one["binMin"] * 0.999 <= at_peak <= one["binMax"] * 1.001
        shares = {one["binMin"]: one["binContains"] for one in own if one["binContains"] >= 0}
        assert sum(shares.values()) <= 1.001
        if top:
            assert top[0]["maxValue"] == pytest.approx(row["maxActApprox"], rel=1e-3)


def test_the_same_files_are_written_again(data, features, tmp_path):
    first = write_features(data, LISTING, tmp_path, features=features[:2])
    kept = {name: (first / name / "batch-0.jsonl.gz").read_bytes() for name in list(COLUMNS)[:2]}
    again = write_features(data, LISTING, tmp_path, features=features[:2])
    assert again == first
    assert all((again / name / "batch-0.jsonl.gz").read_bytes() == kept[name] for name in kept)
    assert [file.name for file in first.parent.iterdir()] == [first.name]


def test_several_batches_and_all_that_fired(data, tmp_path, monkeypatch):
    from mlxterp.sae.formats import neuronpedia

    monkeypatch.setattr(neuronpedia, "PER_BATCH", 100)
    path = write_features(data, LISTING, tmp_path)
    fired = np.flatnonzero(data.firing_counts)
    files = sorted((path / "features").iterdir())
    assert len(files) == -(-len(fired) // 100) > 1
    assert sorted(int(r["index"]) for f in files for r in lines(f)) == fired.tolist()


def test_what_cannot_be_written(data, features, tmp_path):
    (tmp_path / "demo" / f"{data.coder.reads.names[0].split('.')[1]}-res-16k").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no source\.jsonl; it is not overwritten"):
        write_features(data, LISTING, tmp_path, features=features)
    with pytest.raises(ValueError, match="language model is needed"):
        write_features(replace(data, source=None), LISTING, tmp_path / "a", features=features)
    with pytest.raises(ValueError, match="feature_id must be in"):
        write_features(data, LISTING, tmp_path / "b", features=[10**6])
    outside = SAE(Columns(("model.norm",), (128,)), Columns(("model.norm",), (128,)), 9, k=2)
    with pytest.raises(ValueError, match="features of one layer in a source"):
        write_features(replace(data, coder=outside), LISTING, tmp_path / "c", features=[1])
    for change in ({"model": "../x"}, {"source_set": ""}, {"release": "a b"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be letters"):
            replace(LISTING, **change)
    with pytest.raises(ValueError, match="creator_id and creator"):
        replace(LISTING, creator_id="")


ROW = {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "typeName": "oai_token-act-pair",
       "explanationModelName": "gpt-4o-mini", "embedding": [0.1] * 256}  # fmt: skip


def batch(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(ROW | row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_explanations_become_labels(tmp_path):
    batch(tmp_path / "explanations" / "batch-0.jsonl.gz", [
        {"index": "3", "description": " French\n words "},
        {"index": 5, "description": "capitals", "explanationModelName": None},
    ])  # fmt: skip
    batch(tmp_path / "explanations" / "batch-10.jsonl.gz", [{"index": "3", "description": "later"}])
    batch(tmp_path / "explanations" / "batch-9.jsonl", [{"index": "3", "description": "between"}])
    batch(tmp_path / "explanations-claude" / "batch-0.jsonl.gz", [
        {"index": "3", "description": "of another", "explanationModelName": "claude"},
    ])  # fmt: skip
    labels = FeatureLabels(10, tmp_path / "labels.json")
    labels.set(5, "mine")
    assert read_labels(tmp_path, labels) is labels
    assert labels[5].text == "mine"
    assert {label.source: label.text for label in labels.of(3)} == {
        "neuronpedia: gpt-4o-mini, oai_token-act-pair": "later",
        "neuronpedia: claude, oai_token-act-pair": "of another",
    }
    assert labels.of(5)[1] == Label(
        "capitals", "neuronpedia: oai_token-act-pair",
        {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k"},
    )  # fmt: skip
    assert dict(FeatureLabels.load(tmp_path / "labels.json", 10)) == dict(labels)


def test_a_list_of_the_api_and_single_files(tmp_path):
    file = tmp_path / "layer_3.json"
    file.write_text(json.dumps([ROW | {"index": "1", "description": "one"}]))
    assert read_labels(file, FeatureLabels(10)).texts == {1: "one"}
    file = batch(tmp_path / "batch-0.jsonl.gz", [{"index": "2", "description": "two"}])
    assert read_labels(file, FeatureLabels(10)).texts == {2: "two"}


def test_labels_come_back(data, features, tmp_path):
    labels = FeatureLabels(data.n_features)
    for i in features:
        labels.set(i, f"number {i}")
    path = write_features(data, LISTING, tmp_path, features=features, labels=labels)
    found = read_labels(path, FeatureLabels(data.n_features))
    assert found.texts == labels.texts
    assert {label.source for i in found for label in found.of(i)} == {"neuronpedia: unknown"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": "10", "description": "x"}, r"entry 2: 'index' must be below 10, got '10'"),
        ({"index": "-1", "description": "x"}, "'index' must be below 10"),
        ({"index": 1.5, "description": "x"}, "'index' must be below 10"),
        ({"index": True, "description": "x"}, "'index' must be below 10"),
        ({"index": "1"}, "an object with a 'description'"),
        ({"index": "1", "description": " "}, "must have 1 to 10,000 characters"),
        ({"index": "1", "description": "x" * 10_001}, "must have 1 to 10,000 characters"),
    ],
)
def test_what_is_no_explanation(row, message, tmp_path):
    file = batch(tmp_path / "batch-0.jsonl", [{"index": "1", "description": "fine"}, row])
    labels = FeatureLabels(10)
    with pytest.raises(ValueError, match=message):
        read_labels(file, labels)
    assert not labels


def test_damaged_files(tmp_path, monkeypatch):
    whole = batch(tmp_path / "batch-0.jsonl.gz", [{"index": "1", "description": "x"}]).read_bytes()
    labels = FeatureLabels(10)
    for name, content, message in (
        ("batch-0.jsonl.gz", whole[:-20], "cannot be read"),
        ("batch-0.jsonl.gz", b"not zipped", "cannot be read"),
        ("batch-0.jsonl.gz", gzip.compress(b"[" * 100_000), "cannot be read"),
        ("batch-0.jsonl.gz", gzip.compress(b" " * (1 << 21)), "a line of more than 1,048,576"),
        ("batch-0.jsonl", b"\xff\xfe\n", "cannot be read"),
        ("a.json", b"{}", "it holds no list"),
        ("a.txt", b"", r"ends in \.jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / name, labels)
    many = batch(tmp_path / "b" / "batch-0.jsonl.gz", [{"index": 1, "description": "x"}] * 1_001)
    with pytest.raises(ValueError, match="more than 100 for each feature"):
        read_labels(many, labels)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files of explanations"):
        read_labels(tmp_path / "empty", labels)
    with pytest.raises(FileNotFoundError):
        read_labels(tmp_path / "nothing", labels)
    assert not labels
