import itertools
import json
import signal

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, Callback, SAEConfig, TranscoderTrainer
from mlxterp.sae.callbacks import StopTraining
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.run import Run
from mlxterp.sae.trainer import Trainer, train_together
from tests.sae import kinds
from tests.sae.runs import (
    EVENTFUL,
    Interrupt,
    assert_same,
    coder_for,
    config,
    differences,
    fit,
    in_memory,
    run_of,
    streaming,
    tokens,
    without_times,
)
from tests.sae.synthetic import planted, recovery

SHORT = {"batch_size": 16, "dead_window": 32, "log_every": 3, "checkpoint_every": 4}
RESUMABLE = config(**{**EVENTFUL, **SHORT, "num_epochs": 1, "validate_every": 4})

# All that adds to the state of a run, or changes the step within it.
VARIANTS = {
    "topk": {},
    "batch_topk": {"activation_function": "batch_topk"},
    "abs_topk": {"activation_function": "abs_topk"},
    "jumprelu": {"activation_function": "jumprelu"},
    "relu": {"activation_function": "relu", "decoder_unit_norm": False},
    "gated": {"activation_function": "gated"},
    "annealed": {"k_anneal_steps": 12, "lr_schedule": "cosine", "warmup_steps": 1},
    "nested and tied": {"matryoshka_prefixes": (0.25, 0.5), "tied_weights": True},
    "other start": {"bias_init": "geometric_median", "normalize_activations": False},
}
# The kind of coder, or none for one that reads and writes all there is, and the settings.
RUNS = {name: ("", options) for name, options in VARIANTS.items()} | {
    f"{kind}, {name}": (kind, {"activation_function": name, **kinds.settings(kind)})
    for kind, name in kinds.PAIRS
    if kind != "sae"
}
RUNS |= {
    "least squares": ("skip transcoder", {"skip": True, "skip_init": "least_squares"}),
    "weighted sites": ("crosscoder", {"component_weights": (1.0, 3.0), "decoder_unit_norm": False}),
}
STREAMED = [name for name, (kind, _) in RUNS.items() if not kind or "batch_topk" in name]


def short(kind: str = "") -> tuple[ActivationDataset, ActivationDataset]:
    return in_memory(240, kind=kind)


def test_training_lowers_the_held_out_error_and_folds_the_normalisation():
    data = tokens(2000)
    dataset = ActivationDataset.from_activations(3 * data + 7)
    settings = config(num_epochs=8, validate_every=14, log_every=100, dead_neuron_threshold=0)
    coder, result = fit(dataset.split(0.1), settings)
    first, last = result.validation[0], result.validation[-1]
    assert last["fvu"] < 0.5 * first["fvu"] and last["fvu"] < 0.25
    x = 3 * data.astype(np.float64) + 7
    error = x - np.array(coder(mx.array(x.astype(np.float32))), np.float64)
    fvu = (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert fvu == pytest.approx(last["fvu"], rel=0.1)
    assert result.n_tokens == 8 * (1800 // 32) * 32


@pytest.mark.filterwarnings("ignore:.*features are dead")
def test_more_features_than_dimensions_are_recovered():
    features, x = planted(15_000)
    dataset = ActivationDataset.from_activations(x)
    settings = config(expansion_factor=4, k=4, batch_size=256, num_epochs=12, dead_window=20_000)
    settings = settings.replace(log_every=100, dead_neuron_threshold=0)
    coder, _ = fit((dataset, None), settings)
    assert recovery(features, coder.W_dec) > 0.95
    chance = run_of(settings, dataset).state["params"]["W_dec"]
    assert recovery(features, chance) < 0.6


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_coder_and_another_seed_another(name):
    kind, options = RUNS[name]
    a, b, c = (
        fit(short(kind), RESUMABLE.replace(**options, seed=n), kind=kind)[0] for n in (1, 1, 2)
    )
    assert not differences(a, b)
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(differences(a, c))


# Resuming


@pytest.mark.parametrize(
    ("data", "kind"),
    [(streaming, ""), *((short, kind) for kind in kinds.KINDS if kind != "transcoder")],
)
def test_a_run_interrupted_at_any_step_resumes_to_the_same_result(data, kind, tmp_path):
    settings = RESUMABLE.replace(**kinds.settings(kind))
    expected = fit(data(kind), settings, tmp_path / "whole", kind=kind)
    n_steps = expected[1].n_tokens // 16
    assert n_steps >= 13 and max(report["dead"] for report in expected[1].training) > 0
    for step in range(1, n_steps + 1):
        directory = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            fit(data(kind), settings, directory, [Interrupt(step)], kind=kind)
        assert max(directory.glob("step_*")).name == f"step_{step:08d}"
        assert_same(fit(data(kind), settings, directory, resume=True, kind=kind), expected)


@pytest.mark.parametrize(
    ("data", "name"), [*((short, name) for name in RUNS), *((streaming, n) for n in STREAMED)]
)
def test_every_kind_of_run_resumes_to_the_same_result(data, name, tmp_path):
    kind, options = RUNS[name]
    settings = RESUMABLE.replace(**options)
    expected = fit(data(kind), settings, kind=kind)
    for step in (6, 9):
        with pytest.raises(KeyboardInterrupt):
            fit(data(kind), settings, tmp_path, [Interrupt(step)], resume=True, kind=kind)
    assert_same(fit(data(kind), settings, tmp_path, resume=True, kind=kind), expected)


@pytest.mark.parametrize("kind", ["", "transcoder", "crosscoder"])
def test_a_resampled_run_that_is_resumed_was_resampled(kind, monkeypatch):
    # Otherwise the tests above would not notice a random state that is lost.
    from mlxterp.sae.dead_features import resample

    n_new = []

    def count(state, *arguments):
        new = resample(state, *arguments)
        n_new.append(int((new["fired"] == mx.inf).sum().item()))
        return new

    monkeypatch.setattr("mlxterp.sae.run.resample", count)
    fit(short(kind), RESUMABLE, kind=kind)
    assert len(n_new) == 2 and all(n_new)


EVENTS = ["step", "report", "validation", "checkpoint"]


@pytest.mark.parametrize(("event", "at"), [("begin", 0), *itertools.product(EVENTS, [0, 6, 8, 13])])
def test_a_run_that_fails_anywhere_resumes_from_its_last_checkpoint(event, at, tmp_path):
    expected = fit(short(), RESUMABLE)
    for error in (RuntimeError, KeyboardInterrupt):
        directory = tmp_path / error.__name__
        with pytest.raises(error):
            fit(short(), RESUMABLE, directory, [Interrupt(at, error, event)])
        assert_same(fit(short(), RESUMABLE, directory, resume=True), expected)


def test_an_interrupt_in_the_middle_of_a_step_loses_that_step_only(tmp_path, monkeypatch):
    expected = fit(short(), RESUMABLE)
    resample = Run._resample

    def interrupted(run, batch):
        resample(run, batch)
        if run.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_resample", interrupted)
        fit(short(), RESUMABLE, tmp_path)
    # A step that was cut in two is not saved: the last checkpoint counts.
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000004"]
    assert_same(fit(short(), RESUMABLE, tmp_path, resume=True), expected)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.parametrize("step", [1, 7, 13])
def test_a_signal_ends_the_run_after_its_step_and_it_resumes(number, error, step, tmp_path):
    class Signal(Callback):
        def on_step_end(self, done):
            if done == step:
                signal.raise_signal(number)

    expected = fit(short(), RESUMABLE)
    before = signal.getsignal(number)
    with pytest.raises(error) as raised:
        fit(short(), RESUMABLE, tmp_path, [Signal()])
    assert signal.getsignal(number) is before
    if error is SystemExit:
        assert raised.value.code == 143
    assert max(tmp_path.glob("step_*")).name == f"step_{step:08d}"
    assert_same(fit(short(), RESUMABLE, tmp_path, resume=True), expected)


def test_a_finished_run_resumes_to_the_finished_coder(tmp_path):
    expected = fit(in_memory(), RESUMABLE, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*/*")}
    assert_same(fit(in_memory(), RESUMABLE, tmp_path, resume=True), expected)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*/*")}


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    expected = fit(in_memory(), RESUMABLE)
    assert_same(fit(in_memory(), RESUMABLE, tmp_path / "new", resume=True), expected)


@pytest.mark.parametrize(("every", "kept"), [(4, 1), (3, 10), (0, 2)])
def test_checkpoints_are_written_when_asked_for_and_at_the_end(every, kept, tmp_path):
    settings = RESUMABLE.replace(checkpoint_every=every, checkpoints_kept=kept)
    fit(short(), settings, tmp_path)
    steps = [int(path.name[5:]) for path in sorted(tmp_path.glob("step_*"))]
    due = list(range(every, 13, every)) if every else []
    assert steps == [*due, 13][-kept:]


def test_resuming_needs_a_directory():
    with pytest.raises(ValueError, match="resume=True needs a checkpoint_dir"):
        fit(in_memory(), RESUMABLE, resume=True)


def test_a_new_run_does_not_touch_the_checkpoints_of_an_old_one(tmp_path):
    fit(short(), RESUMABLE, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    log = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="step_00000013 of an earlier run: pass resume=True"):
        fit(short(), RESUMABLE, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3, "seed": 7}, r"\['learning_rate', 'seed'\]"),
        ({"matryoshka_prefixes": (0.5,)}, r"\['matryoshka_prefixes'\]"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_and_names_the_difference(
    changes, named, tmp_path
):
    fit(short(), RESUMABLE, tmp_path)
    with pytest.raises(ValueError, match=f"another config; different: {named}"):
        fit(short(), RESUMABLE.replace(**changes), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "relu", "gated"])
def test_a_checkpoint_of_another_activation_function_is_refused(name, tmp_path):
    fit(short(), RESUMABLE, tmp_path)
    other = RESUMABLE.replace(activation_function=name)
    with pytest.raises(ValueError, match=r"step_00000013"):
        fit(short(), other, tmp_path, resume=True)


def test_a_run_between_other_sites_is_not_taken_up(tmp_path):
    rows = kinds.of_sites(kinds.activations(200))
    data, settings = {"a": rows["in.0"], "b": rows["in.1"]}, config(num_epochs=1)
    TranscoderTrainer(settings, tmp_path).fit(data)
    with pytest.raises(ValueError, match=r"between other sites: .*'reads': \['a'\]"):
        TranscoderTrainer(settings, tmp_path).fit(data, resume=True, reads="b", writes="a")


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    fit(in_memory(), RESUMABLE, tmp_path)
    with pytest.raises(ValueError, match="in a run on other data"):
        fit(in_memory(seed=1), RESUMABLE, tmp_path, resume=True)


def test_a_checkpoint_of_less_data_with_the_same_beginning_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.trainer.SAMPLE_TOKENS", 64)
    less, more = (
        (ActivationDataset.from_activations(tokens(600)[:n], shuffle=False), None)
        for n in (300, 600)
    )
    fit(less, RESUMABLE, tmp_path)
    with pytest.raises(ValueError, match="in a run on other data"):
        fit(more, RESUMABLE, tmp_path, resume=True)


@pytest.mark.parametrize("file", ["run.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(file, tmp_path):
    expected = fit(short(), RESUMABLE, tmp_path)
    damaged = tmp_path / "step_00000013" / file
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="Checkpoint step_00000013 is not used"):
        found = fit(short(), RESUMABLE, tmp_path, resume=True)
    assert_same(found, expected)


# Several at once

GRID = {
    **{f"k{k}": {"k": k} for k in (2, 5)},
    "wide": {"expansion_factor": 8, "learning_rate": 1e-3, "log_every": 2, "checkpoint_every": 3},
    **{name: {"activation_function": name} for name in ("batch_topk", "jumprelu", "gated")},
    "relu": VARIANTS["relu"],
    "nested": VARIANTS["nested and tied"],
}
GRID = {name: RESUMABLE.replace(**options) for name, options in GRID.items()}


def together(data, configs: dict[str, SAEConfig], *arguments, only=None, kind_of=None, **options):
    """`{name: (coder, result)}`; `only` names the sites of coders that have but one, `kind_of` the
    kinds of coders."""
    training, validation = data
    coders = {}
    for name, settings in configs.items():
        coder = coder_for(training, settings, (kind_of or {}).get(name, ""))
        if only:
            columns = training.columns.only(only[name])
            n_features = settings.n_features(columns.width)
            coder = SparseCoder(columns, columns, n_features, k=settings.k)
        coders[name] = (coder, settings)
    results = train_together(coders, training, validation, *arguments, **options)
    assert list(results) == list(configs)
    return {name: (coders[name][0], results[name]) for name in configs}


@pytest.mark.parametrize("data", [short, streaming])
def test_coders_of_all_kinds_trained_together_are_those_trained_alone(data):
    configs = {kind: RESUMABLE.replace(**kinds.settings(kind)) for kind in kinds.KINDS}
    found = together(data("all"), configs, kind_of={kind: kind for kind in configs})
    for kind, settings in configs.items():
        assert_same(found[kind], fit(data(kind), settings, kind=kind))


@pytest.mark.parametrize("data", [short, streaming])
def test_coders_trained_together_are_those_trained_alone(data):
    found = together(data(), GRID)
    for name, settings in GRID.items():
        assert_same(found[name], fit(data(), settings))


def test_sites_trained_together_are_those_trained_alone():
    arrays = {"a": tokens(240, 8) + 3, "b": 5 * tokens(240, 6, seed=1)}

    def data(*names):
        return ActivationDataset.from_activations({n: arrays[n] for n in names}).split(0.1)

    found = together(data("a", "b"), dict.fromkeys("ab", RESUMABLE), only={"a": "a", "b": "b"})
    for name in "ab":
        alone = fit(data(name), RESUMABLE)
        assert_same(found[name], alone)
        assert found[name][1].validation[-1]["fvu"] < 0.9


def test_coders_interrupted_together_resume_to_the_same_results(tmp_path):
    configs = {name: GRID[name] for name in ("k2", "wide", "jumprelu")}
    expected = together(short(), configs)
    with pytest.raises(KeyboardInterrupt):
        together(short(), configs, tmp_path, callbacks={"wide": [Interrupt(7)]})
    # They are interrupted one after another: `wide` after its step 7, `jumprelu` before that.
    steps = {name: max((tmp_path / name).glob("step_*")).name[-2:] for name in configs}
    assert steps == {"k2": "07", "wide": "07", "jumprelu": "06"}
    found = together(short(), configs, tmp_path, resume=True)
    for name in configs:
        assert_same(found[name], expected[name])
        assert json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["name"]


@pytest.mark.parametrize("name", ["k2", "wide"])
@pytest.mark.parametrize(("event", "at"), [("begin", 0), *((event, 5) for event in EVENTS)])
def test_a_failure_of_one_coder_saves_the_others(event, at, name, tmp_path):
    configs = {name: GRID[name] for name in ("k2", "wide")}
    expected = together(short(), configs)
    fail = Interrupt(at, RuntimeError, event)
    with pytest.raises(RuntimeError):
        together(short(), configs, tmp_path, callbacks={name: [fail]})
    saved = [bool(list((tmp_path / name).glob("step_*"))) for name in configs]
    assert saved == 2 * [event != "begin"]
    found = together(short(), configs, tmp_path, resume=True)
    for name in configs:
        assert_same(found[name], expected[name])


def test_a_coder_with_an_earlier_checkpoint_catches_up(tmp_path):
    configs = {name: GRID[name] for name in ("k2", "batch_topk", "gated")}
    expected = together(short(), configs)
    # One is done, one half way, one has not begun.
    fit(short(), configs["k2"], tmp_path / "k2")
    with pytest.raises(KeyboardInterrupt):
        fit(short(), configs["gated"], tmp_path / "gated", [Interrupt(6)])
    found = together(short(), configs, tmp_path, resume=True)
    for name in configs:
        assert_same(found[name], expected[name])


def test_a_coder_that_is_stopped_does_not_stop_the_others():
    class Stop(Callback):
        def on_step_end(self, step):
            if step == 5:
                raise StopTraining

    configs = {name: GRID[name] for name in ("k2", "gated")}
    found = together(short(), configs, callbacks={"k2": [Stop()]})
    assert found["k2"][1].n_tokens == 5 * 16
    assert_same(found["gated"], fit(short(), configs["gated"]))
    assert_same(found["k2"], fit(short(), configs["k2"], callbacks=[Stop()]))
    both = together(short(), configs, callbacks={"k2": [Stop()], "gated": [Stop()]})
    assert both["gated"][1].n_tokens == 5 * 16


def test_each_coder_has_its_own_callbacks_name_and_directory(tmp_path):
    begun = []

    class Note(Callback):
        def on_train_begin(self, run):
            begun.append((run.name, run.checkpoint_dir, run.n_features))

    configs = {name: GRID[name] for name in ("k2", "wide")}
    together(short(), configs, tmp_path, callbacks={"wide": [Note()]})
    assert begun == [("wide", tmp_path / "wide", 64)]
    assert {path.name for path in tmp_path.iterdir()} == {"k2", "wide"}


@pytest.mark.parametrize(("field", "value"), [("batch_size", 8), ("num_epochs", 2), ("seed", 3)])
def test_coders_trained_together_share_what_orders_the_data(field, value):
    configs = {"a": RESUMABLE, "b": RESUMABLE.replace(**{field: value})}
    ours = getattr(RESUMABLE, field)
    with pytest.raises(ValueError) as error:
        together(short(), configs)
    assert str(error.value).startswith(f"{field} must be the same for coders trained together")
    assert f"{{'a': {ours}, 'b': {value}}}" in str(error.value)


def test_no_coder_at_all_is_an_error():
    with pytest.raises(ValueError, match="no coder to train"):
        together(short(), {})


def test_a_directory_with_the_checkpoints_of_one_of_them_is_refused(tmp_path):
    fit(short(), GRID["k2"], tmp_path / "k2")
    configs = {name: GRID[name] for name in ("wide", "k2")}
    with pytest.raises(ValueError, match="k2 holds step_00000013 of an earlier run"):
        together(short(), configs, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"k2"}


def test_the_trainer_of_one_coder_gives_its_own_callbacks_only():
    # A trainer may be used again: what a run adds to the callbacks is not kept.
    trainer = Trainer(RESUMABLE)
    for _ in range(2):
        training, validation = short()
        trainer.fit(coder_for(training, RESUMABLE), training, validation)
        assert trainer.callbacks == ()


def test_reports_of_a_resumed_run_go_on(tmp_path):
    whole = fit(short(), RESUMABLE)[1].training
    with pytest.raises(KeyboardInterrupt):
        fit(short(), RESUMABLE, tmp_path, [Interrupt(7)])
    resumed = fit(short(), RESUMABLE, tmp_path, resume=True)[1].training
    assert [r["step"] for r in resumed] == [3, 6, 9, 12, 13]
    assert without_times(resumed) == without_times(whole)
