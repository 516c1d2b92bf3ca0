"""Push and pull with the Hub's own client, against a stand-in for the Hub's HTTP API."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants, file_download

from mlxterp.sae import SAE, load_sae
from mlxterp.sae import hub as on_hub
from mlxterp.sae.coder import Columns
from mlxterp.sae.metadata import Metadata, Statistics

FILES = {
    "README.md", "config.json", "encoder.safetensors", "decoder.safetensors",
    "encoder_bias.safetensors", "metadata.json", "statistics.json",
}  # fmt: skip
CODER = FILES - {"README.md"}
NAME = "user/demo-sae"


def coder(seed: int = 0, n_features: int = 40) -> SAE:
    columns = Columns(("layers.2.resid_post",), (128,))
    made = SAE(columns, columns, n_features, k=3)
    made.W_enc = mx.random.normal((n_features, 128), key=mx.random.key(seed))
    made.W_dec = mx.random.normal((n_features, 128), key=mx.random.key(seed + 1))
    made.metadata = Metadata(model={"name": "demo", "n_layers": 6}, library_version="0")
    return made


def same(one: SAE, other: SAE) -> bool:
    x = mx.random.normal((5, 128), key=mx.random.key(9))
    return mx.array_equal(one.encode(x), other.encode(x)) and mx.array_equal(one(x), other(x))


def fetched(hub) -> set[str]:
    """The files that were asked for, by their names."""
    found = [re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", asked) for asked in hub.asked]
    return {match[1] for match in found if match}


@pytest.fixture
def anonymous(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_coder_that_was_pushed_is_loaded_by_its_name(hub):
    original = coder()
    original.labels.set(3, "numbers")
    url = original.push_to_hub(NAME)
    found = hub.repositories[NAME]
    assert url == f"{hub.url}/{NAME}/commit/{found.branches['main']}"
    assert set(found.files) == {*FILES, "labels.json", ".gitattributes"}
    assert found.messages[1:] == ["A coder of layers.2.resid_post (width 128)"]
    assert original.path is None and original.labels.path is None
    hub.asked.clear()
    loaded = load_sae(NAME)
    assert type(loaded) is SAE and same(loaded, original)
    assert loaded.metadata == original.metadata and loaded.labels.texts == {3: "numbers"}
    assert fetched(hub) == {*CODER, "labels.json"}


def test_a_model_loads_and_binds_a_coder_of_the_hub(hub, model):
    coder().push_to_hub(NAME, subfolder="layers/2", revision="next")
    loaded = model.load_sae(NAME, revision="next", subfolder="layers/2")
    assert same(loaded, coder()) and loaded.known_model() is model
    with pytest.warns(UserWarning, match="user/other is not compatible: .*layers.99"):
        odd = Columns(("layers.99.mlp",), (128,))
        SAE(odd, odd, 8, k=2).push_to_hub("user/other")
        model.load_sae("user/other")


def test_what_is_in_the_cache_is_not_fetched_again(hub):
    coder().push_to_hub(NAME)
    place = on_hub.pull(NAME)
    hub.asked.clear()
    assert on_hub.pull(NAME) == place and not fetched(hub)
    assert Path(constants.HF_HUB_CACHE) in place.parents


def test_a_pulled_coder_changes_nothing_in_the_cache(hub, model, tmp_path):
    coder().push_to_hub(NAME)
    loaded = load_sae(NAME)
    before = sorted(on_hub.pull(NAME).rglob("*"))
    loaded.labels.set(1, "names")
    loaded.collect(list(topics.values())[:2], model=model, verbose=False)
    assert sorted(on_hub.pull(NAME).rglob("*")) == before
    assert loaded.path is None and not load_sae(NAME).labels
    saved = load_sae(loaded.save(tmp_path / "own.mlx"))
    assert saved.labels.texts == {1: "names"} and saved.features is not None


def test_what_was_collected_goes_and_comes_only_where_it_is_asked_for(hub, model):
    made = coder()
    data = made.collect(list(topics.values())[:2], model=model, verbose=False)
    made.push_to_hub("user/without")
    assert not [name for name in hub.repositories["user/without"].files if "/" in name]
    made.push_to_hub(NAME, features=True)
    place = on_hub.pull(NAME)
    assert not (place / "features").exists() and load_sae(NAME).features is None
    place = on_hub.pull(NAME, features=True)
    np.testing.assert_array_equal(load_sae(place).features.firing_counts, data.firing_counts)
    assert load_sae(NAME).features is not None  # as it is in the cache now


def test_every_revision_has_its_own_coder(hub):
    coder(1).push_to_hub(NAME)
    first = hub.repositories[NAME].branches["main"]
    coder(2).push_to_hub(NAME, commit_message="Better")
    coder(3).push_to_hub(NAME, revision="wide")
    assert hub.repositories[NAME].messages[2] == "Better"
    hub.repositories[NAME].tags["v1"] = first
    for revision, seed in ((None, 2), ("main", 2), (first, 1), ("v1", 1), ("wide", 3)):
        assert same(load_sae(NAME, revision=revision), coder(seed)), revision
    with pytest.raises(ValueError, match=r"no revision 'narrow'; there are \['main', 'wide', 'v1'"):
        load_sae(NAME, revision="narrow")


def test_of_several_coders_one_must_be_named(hub):
    for layer in (2, 10, 9):
        coder(layer).push_to_hub(NAME, subfolder=f"layer_{layer}/mlp")
    assert same(load_sae(NAME, subfolder="layer_9/mlp/"), coder(9))
    assert same(load_sae(NAME, subfolder="layer_10"), coder(10))  # the only one in it
    there = (
        "such as subfolder='layer_2/mlp'. There are 'layer_2/mlp', 'layer_9/mlp', 'layer_10/mlp'."
    )
    with pytest.raises(ValueError, match=f"holds 3 coders: name one of them, {there}"):
        load_sae(NAME)
    with pytest.raises(ValueError, match="no coder in subfolder='layer_3/mlp'; the nearest of"):
        load_sae(NAME, subfolder="layer_3/mlp")
    coder(5).push_to_hub(NAME)  # at the top, beside the others
    assert same(load_sae(NAME), coder(5)) and same(load_sae(NAME, subfolder="layer_2"), coder(2))


def test_only_the_files_of_one_coder_of_hundreds_are_fetched(hub, tmp_path):
    saved = coder().save(tmp_path / "sae.mlx")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.add(
        "org/many",
        {f"layer_{i}/width_1k/{name}": data for i in range(300) for name, data in files.items()}
        | {"README.md": b"", "layer_7/width_1k/features/codes.safetensors": b"large"},
    )
    assert same(load_sae("org/many", subfolder="layer_7"), coder())
    assert fetched(hub) == {f"layer_7/width_1k/{name}" for name in CODER}
    with pytest.raises(ValueError, match="holds 300 coders.*'layer_7/width_1k' and 292 more"):
        load_sae("org/many")
    assert len(fetched(hub)) == len(CODER)


def test_a_push_replaces_an_older_coder_whole_and_leaves_other_files(hub, model):
    older = coder(1)
    older.labels.set(0, "old")
    older.collect(list(topics.values())[:1], model=model, verbose=False)
    older.push_to_hub(NAME, features=True)
    repository = hub.repositories[NAME]
    repository.commit({**repository.files, "notes.txt": b"mine", "other/labels.json": b"{}"})
    coder(2).push_to_hub(NAME)
    kept = {*FILES, ".gitattributes", "notes.txt", "other/labels.json"}
    assert set(repository.files) == kept and same(load_sae(NAME), coder(2))
    repository.commit({**repository.files, "README.md": b"my own words"})
    coder(3).push_to_hub(NAME, card=False)
    assert repository.files["README.md"] == b"my own words" and same(load_sae(NAME), coder(3))


def test_missing_and_private_repositories_are_told_apart_as_far_as_the_hub_does(hub, monkeypatch):
    coder().push_to_hub(NAME, private=True)
    assert hub.repositories[NAME].private and same(load_sae(NAME), coder())
    with pytest.raises(FileNotFoundError, match="no repository user/none to the account of your"):
        load_sae("user/none")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(FileNotFoundError, match="if it is of somebody else, it may be private"):
        load_sae(NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="not logged in: .*`hf auth login`") as error:
        load_sae(NAME)
    assert str(error.value).startswith(f"There is no saved coder at {NAME}, and as a name on the")
    assert on_hub.pull(NAME, token="hf_owner").is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(PermissionError, match="does not accept your token"):
        load_sae(NAME)


@pytest.mark.parametrize("token", ["hf_reader", None])
def test_a_gated_repository_says_where_to_ask_for_access(hub, monkeypatch, token):
    coder().push_to_hub(NAME)
    hub.repositories[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(PermissionError, match=f"is gated: accept .* at {hub.url}/{NAME}"):
        load_sae(NAME)


def test_only_those_who_may_write_can_push(hub, monkeypatch):
    with pytest.raises(PermissionError, match="may not do this with org/sae"):
        coder().push_to_hub("org/sae")
    coder(1).push_to_hub(NAME)
    hub.read_only.add("user")
    with pytest.raises(PermissionError, match=r"may not do this with user/demo-sae \(You don't"):
        coder(2).push_to_hub(NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="Only who is logged in can push. `hf auth login`"):
        coder(2).push_to_hub(NAME)
    assert len(hub.repositories[NAME].commits) == 2 and list(hub.repositories) == [NAME]


def test_an_upload_that_fails_in_the_middle_leaves_no_commit(hub):
    hub.storage_is_closed = True
    with pytest.raises(PermissionError, match=r"may not do this with .* \(the storage is closed\)"):
        coder().push_to_hub(NAME)
    assert hub.repositories[NAME].files.keys() == {".gitattributes"}


def test_nothing_private_goes_to_a_public_repository(hub):
    coder(1).push_to_hub(NAME, private=False)
    commits = len(hub.repositories[NAME].commits)
    with pytest.raises(ValueError, match="user/demo-sae is public.* Nothing was uploaded"):
        coder(2).push_to_hub(NAME, private=True)
    assert len(hub.repositories[NAME].commits) == commits


def test_offline_the_copy_in_the_cache_serves(hub, offline):
    coder(1).push_to_hub(NAME)
    coder(2).push_to_hub("user/two", subfolder="a")
    first = hub.repositories[NAME].branches["main"]
    coder(3).push_to_hub(NAME, subfolder="other", revision="main")  # is not fetched below
    first, before = hub.repositories[NAME].branches["main"], first
    load_sae(NAME), load_sae(NAME, revision=before), load_sae("user/two", subfolder="a")
    offline()
    hub.asked.clear()
    assert same(load_sae(NAME), coder(1)) and same(load_sae("user/two"), coder(2))
    assert same(load_sae(NAME, revision=before), coder(1))
    assert not hub.asked and not (on_hub.pull(NAME, first) / "other").exists()
    for name, revision in (("user/none", None), (NAME, "next")):
        with pytest.raises(ConnectionError, match=f"{name}.* not in the cache.*HF_HUB_OFFLINE=0"):
            load_sae(name, revision=revision)
    with pytest.raises(ConnectionError, match=r"Nothing was committed: .*\(HF_HUB_OFFLINE is set"):
        coder().push_to_hub(NAME)


@pytest.mark.parametrize("subfolder", [None, "a/b"])
def test_a_copy_that_is_not_whole_is_not_taken_for_one(hub, offline, subfolder):
    coder().push_to_hub(NAME, subfolder=subfolder)
    (on_hub.pull(NAME) / "decoder.safetensors").unlink()
    offline()
    with pytest.raises(ConnectionError, match="not in the cache, at least not whole"):
        load_sae(NAME)


def test_without_a_network_the_copy_serves_with_a_warning(hub):
    coder().push_to_hub(NAME)
    load_sae(NAME)
    hub.status = 503
    with pytest.warns(UserWarning, match="user/demo-sae is from the cache") as caught:
        assert same(load_sae(NAME), coder())
    with pytest.raises(ConnectionError, match="cannot be reached.*out of order"):
        load_sae("user/other")
    hub.status = 429
    with pytest.raises(OSError, match="too many requests"):
        load_sae(NAME)
    hub.close()
    with pytest.warns(UserWarning, match="cannot be reached"):
        assert same(load_sae(NAME), coder())
    with pytest.raises(ConnectionError, match="cannot be reached.*try again with a network"):
        load_sae("user/other")
    with pytest.raises(ConnectionError, match="Nothing was committed: .* cannot be reached"):
        coder().push_to_hub(NAME)
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch, caplog):
    original = coder(n_features=200)
    original.push_to_hub(NAME)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cut_after = 40_000
    assert same(load_sae(NAME), original)
    assert hub.cuts == 4 and "Trying to resume" in caplog.text
    assert sorted(set(hub.ranges)) == ["bytes=40000-", "bytes=80000-"]


def test_of_a_pull_that_was_cut_off_whole_files_are_kept(hub, monkeypatch):
    original = coder(n_features=200)
    original.push_to_hub(NAME)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cut_after = 40_000  # less than a piece, so that nothing arrives of the large files
    with pytest.raises(ConnectionError, match="broke off.* Files that arrived are kept"):
        load_sae(NAME)
    hub.cut_after = None
    hub.asked.clear()
    assert same(load_sae(NAME), original)
    assert fetched(hub) <= {"encoder.safetensors", "decoder.safetensors"}


def test_a_full_disk_is_named(hub, monkeypatch):
    coder().push_to_hub(NAME)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match="No space is left for .* bytes are free at .*cache") as error:
        load_sae(NAME)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["sae", "user/sae/more", "user/", "../sae", "us er/sae", 3])
def test_what_is_no_name_is_refused_before_anything_is_asked(hub, name):
    for call in (on_hub.pull, coder().push_to_hub):
        with pytest.raises(ValueError, match="A repository on the Hub is 'user/name', got"):
            call(name)
    assert not hub.asked


@pytest.mark.parametrize("subfolder", ["../up", "a//b", ".", "a/\n"])
def test_a_subfolder_that_leads_elsewhere_is_refused(hub, subfolder):
    with pytest.raises(ValueError, match="subfolder must be names"):
        coder().push_to_hub(NAME, subfolder=subfolder)
    assert not hub.asked


def test_paths_are_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coder(4).save("user/demo-sae")
    assert same(load_sae("user/demo-sae"), coder(4))
    for path in ("runs/sae.mlx", Path("user/none"), "./user/none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="There is no saved coder at"):
            load_sae(path)
    with pytest.raises(ValueError, match="revision and subfolder are of names on the Hub"):
        load_sae("user/demo-sae", revision="main")
    assert not hub.asked
    with pytest.raises(FileNotFoundError, match="no saved coder at runs/sae, and as a name"):
        load_sae("runs/sae")


def test_no_language_model_is_fetched_for_a_coder(hub):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    hub.add("org/llama", files)
    with pytest.raises(ValueError, match="org/llama holds a language model"):
        load_sae("org/llama")
    hub.add("org/empty")
    with pytest.raises(ValueError, match="org/empty holds no coder"):
        load_sae("org/empty")
    assert not fetched(hub)


def test_no_directory_of_this_machine_is_uploaded(hub, tmp_path):
    made = coder()
    made.metadata = replace(made.metadata, model={"name": str(tmp_path / "llama"), "n_layers": 6})
    made.statistics = Statistics(({"step": 1, "tokens": 10, "loss": 1.0},), (), np.ones(40) / 4)
    made.push_to_hub(NAME)
    files = hub.repositories[NAME].files
    assert json.loads(files["metadata.json"])["model"] == {"name": "llama", "n_layers": 6}
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert files["training.png"].startswith(b"\x89PNG") and b"(training.png)" in files["README.md"]
    assert made.metadata.model["name"] == str(tmp_path / "llama")


def test_the_environment_variables_of_the_client_count(hub, tmp_path):
    coder().push_to_hub(NAME, private=True)
    script = "import sys; from mlxterp.sae import load_sae; print(load_sae(sys.argv[1]))"
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[2]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, NAME]
        env = {**known, **more}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)

    assert run(HF_TOKEN="hf_owner").stdout.startswith("SAE(layers.2.resid_post")
    hub.close()
    assert run(HF_HUB_OFFLINE="1").stdout.startswith("SAE(layers.2.resid_post")
