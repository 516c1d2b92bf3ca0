"""Coders on the Hub, as they are named in commands."""

import pytest

from mlxterp.cli.main import main
from mlxterp.sae import load_sae
from tests.sae.test_hub import coder


@pytest.fixture
def saved(tmp_path):
    return str(coder().save(tmp_path / "sae.mlx"))


def test_a_coder_is_pushed_and_used_by_its_name(saved, hub, capsys):
    options = ["--private", "--subfolder", "a", "--revision", "next", "--license", "mit"]
    assert main(["push", saved, "user/x", *options, "--commit-message", "First"]) == 0
    repository = hub.repositories["user/x"]
    commit = repository.branches["next"]
    assert capsys.readouterr().out == f"{hub.url}/user/x/commit/{commit}\n"
    assert repository.private and repository.messages[-1] == "First"
    assert b"license: mit" in repository.commits[commit]["a/README.md"]
    where = ["--revision", "next", "--subfolder", "a"]
    assert main(["analyze", "user/x", *where, "--text", "Paris", "--top-k", "1"]) == 0
    assert "'P'" in capsys.readouterr().out
    assert main(["push", saved, "user/y", "--no-card"]) == 0
    assert "README.md" not in hub.repositories["user/y"].files
    assert load_sae("user/y").n_features == load_sae(saved).n_features


def test_what_is_wrong_is_said_in_one_line(saved, hub, capsys):
    assert main(["push", saved]) == 1
    assert "Give the directory of a coder, and user/name" in capsys.readouterr().err
    assert main(["push", saved, "org/x"]) == 1
    found = capsys.readouterr().err
    assert found.startswith("mlxterp push: Your token may not do this with org/x")
    assert found.count("\n") == 1
    assert main(["eval", "user/none", "--data", "demo"]) == 1
    assert "shows no repository user/none" in capsys.readouterr().err
