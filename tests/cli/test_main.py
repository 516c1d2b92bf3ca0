"""The commands, as they are typed."""

import json
import re
import subprocess
import sys
from functools import partial
from pydoc_data.topics import topics
from urllib.request import urlopen

import pytest

from mlxterp import InterpretableModel
from mlxterp.cli.main import main, make_parser
from mlxterp.sae import SAEConfig, load_sae
from mlxterp.sae.dashboard.dashboard import Dashboard
from mlxterp.sae.evals.tasks.builtin_sets import builtin_sets
from mlxterp.version import __version__

QUICK = ["--model", "demo", "--num-epochs", "1", "--k", "8", "--expansion-factor", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(list(topics.values())[:8]):
        (path / f"{i}.txt").write_text(text[:1500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def coder(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("coder") / "sae.mlx"
    sites = ["--layer", "2", "--component", "residual"]
    done = main(["train", *QUICK, *sites, "--data", str(corpus), "--save-path", str(path)])
    assert done == 0
    return path


def test_training_makes_a_coder_with_the_settings_that_were_given(coder):
    sae = load_sae(coder)
    assert sae.site == "layers.2.resid_post"
    assert (sae.n_features, sae.k) == (256, 8)
    assert sae.metadata.config["num_epochs"] == 1
    assert sae.metadata.config["activation_function"] == "batch_topk"  # the recipe's


@pytest.mark.parametrize(
    ("options", "reads", "writes"),
    [
        (["--kind", "transcoder", "--layer", "1", "--component", "mlp_in", "--to-component",
          "mlp_out"], ["1.mlp_in"], ["1.mlp_out"]),
        (["--kind", "transcoder", "--layer", "1", "--component", "mlp", "--to-layer", "2"],
         ["1.mlp"], ["2.mlp"]),
        (["--kind", "crosscoder", "--layer", "3", "--component", "attn", "mlp"],
         ["3.attn", "3.mlp"], ["3.attn", "3.mlp"]),
        (["--kind", "crosscoder", "--layer", "1", "3", "--component", "residual"],
         ["1.resid_post", "3.resid_post"], ["1.resid_post", "3.resid_post"]),
        (["--kind", "cross_layer_transcoder", "--layer", "1", "2"],
         ["1.mlp_in", "2.mlp_in"], ["1.mlp_out", "2.mlp_out"]),
    ],
    ids=["over an MLP", "between layers", "components", "layers", "cross-layer"],
)  # fmt: skip
def test_every_kind_is_trained_at_its_sites(options, reads, writes, corpus, tmp_path, capsys):
    path = tmp_path / "coder.mlx"
    arguments = [*QUICK, *options, "--data", str(corpus), "--max-samples", "1500"]
    assert main(["train", *arguments, "--save-path", str(path)]) == 0
    coder = load_sae(path)
    assert list(coder.reads.names) == [f"layers.{name}" for name in reads]
    assert list(coder.writes.names) == [f"layers.{name}" for name in writes]
    assert f"saved at {path}" in capsys.readouterr().out


def test_a_file_holds_flags_and_those_that_are_given_go_before_it(corpus, tmp_path, capsys):
    file, path = tmp_path / "run.yaml", tmp_path / "sae.mlx"
    file.write_text(
        f"model: demo\nlayer: 1\ncomponent: mlp\ndata: {corpus}\nnum-epochs: 1\nk: 4\n"
        f"expansion_factor: 2\nmatryoshka_prefixes: [0.25, 0.5]\ntied_weights: true\n"
        f"learning_rate: 1e-3\nsave_path: {path}\n"
    )
    assert main(["train", "-c", str(file), "--k", "6", "--max-samples", "1500"]) == 0
    config = load_sae(path).metadata.config
    assert (config["k"], config["learning_rate"], config["tied_weights"]) == (6, 1e-3, True)
    assert config["matryoshka_prefixes"] == [0.25, 0.5]
    assert "explained variance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", r"unknown names \['colour'\]; known are .*'learning_rate'"),
        ("k: many", "k must be a int, got 'many'"),
        ("kind: autoencoder", "kind must be one of .*'sae'.* got 'autoencoder'"),
        ("tied_weights: 3", "tied_weights must be true or false, got 3"),
        ("- a\n- b", "must hold values by their names, got list"),
        ("a: [", "is not YAML"),
        ("model: demo", "--layer, --data must be given"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "1", "2"], "--layer of a sae must be one, got [1, 2]."),
        (["--layer", "9"], "layers.9"),
        (["--layer", "1", "--to-layer", "2"], "are for transcoders, not for a sae"),
        (["--layer", "1", "--k", "0"], "k must be a whole number >= 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_an_error(arguments, message, corpus, capsys):
    assert main(["train", "--model", "demo", "--data", str(corpus), *arguments]) == 1
    found = capsys.readouterr().err
    assert found.startswith("mlxterp train: ") and message in found
    assert "Traceback" not in found


def test_a_coder_is_measured(coder, corpus, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["eval", str(coder), "--data", str(corpus), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert f"{figures['fidelity']['fvu']['value']:.4f}" in shown and "loss recovered" in shown
    clean, ablations = figures["loss"]["clean"], figures["loss"]["ablations"]
    assert clean["value"] < ablations["mean"]["loss"]["value"]


def test_tasks_take_the_place_of_the_report(coder, tmp_path, capsys, monkeypatch):
    few = partial(builtin_sets, n_texts=40)
    monkeypatch.setattr("mlxterp.sae.evals.tasks.perturbation.builtin_sets", few)
    file = tmp_path / "tasks.json"
    arguments = ["--tasks", "perturbation", "autointerp", "--json", str(file)]
    assert main(["eval", str(coder), *arguments, "--schema", "saebench"]) == 0
    assert list(json.loads(file.read_text())) == ["tpp"]
    shown = capsys.readouterr().out
    assert "TPP, n = 2" in shown and "left out, autointerp: This coder remembers no data" in shown
    assert main(["eval", str(coder), "--tasks", "perturbation", "--schema", "saelens",
                 "--json", str(file)]) == 1  # fmt: skip


def test_an_evaluation_is_written_in_the_shape_of_another_library(coder, corpus, tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--json", str(file), "--schema", "saelens", "--max-tokens", "300"]
    assert main(["eval", str(coder), "--data", str(corpus), *arguments]) == 0
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert 0 < metrics["token_stats"]["total_tokens_eval_sparsity_variance"] <= 300


def test_features_and_texts_are_shown(coder, corpus, capsys):
    assert main(["analyze", str(coder), "--text", "class Node:", "--top-k", "2"]) == 0
    assert "' N'" in capsys.readouterr().out
    assert main(["analyze", str(coder)]) == 1
    assert "--data must be given" in capsys.readouterr().err
    assert main(["analyze", str(coder), "--data", str(corpus), "--feature", "3", "5"]) == 0
    shown = capsys.readouterr().out
    assert "Feature 3" in shown and "Feature 5" in shown
    assert main(["analyze", str(coder), "--label"]) == 0
    assert "Labels of" in capsys.readouterr().out


def test_what_was_harvested_can_be_trained_on(corpus, tmp_path, capsys):
    cache = tmp_path / "cache"
    common = ["--model", "demo", "--layer", "2", "--component", "residual"]
    done = main(["harvest", *common, "--data", str(corpus), "--cache-dir", str(cache)])
    assert done == 0 and "tokens of layers.2.resid_post" in capsys.readouterr().out
    assert main(["train", *QUICK, *common[2:], "--data", str(cache)]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the run is a short one
def test_the_demonstration_runs(capsys):
    assert main(["demo", "--tokens", "20000"]) == 0
    shown = capsys.readouterr().out
    assert "Fidelity" in shown and "After 'The function returns'" in shown


def test_every_setting_has_a_flag_with_a_text():
    _, commands = make_parser()
    actions = {action.dest: action for action in commands["train"]._actions}
    settings = set(SAEConfig().to_dict()) - {"component_weights"}
    assert settings <= set(actions)
    assert all(actions[name].help for name in settings)


def test_a_coder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "none.mlx"), "--data", "demo"]) == 1
    assert "There is no saved coder at" in capsys.readouterr().err


def test_it_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "mlxterp", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"mlxterp {__version__}"


def test_a_dashboard_is_written_or_served_until_it_is_interrupted(
    coder, corpus, tmp_path, monkeypatch, capsys
):
    page, bundle = tmp_path / "features.html", tmp_path / "features.mlxdash"
    data = ["--data", str(corpus), "--save", str(page)]
    assert main(["dashboard", str(coder), *data]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    InterpretableModel.demo().load_sae(coder).dashboard(port=None).save_bundle(bundle)
    served = []
    monkeypatch.setattr(Dashboard, "wait", lambda self: served.append(urlopen(self.url).status))
    for path in (coder, bundle):
        assert main(["dashboard", str(path), "--port", "0"]) == 0
    assert served == [200, 200]
    assert "at http://127.0.0.1:" in capsys.readouterr().out
    assert main(["dashboard", str(bundle), "--model", "demo"]) == 1
    assert "--model would go with a coder" in capsys.readouterr().err
    assert main(["dashboard"]) == 1
    assert "a coder or of a dashboard's bundle" in capsys.readouterr().err
