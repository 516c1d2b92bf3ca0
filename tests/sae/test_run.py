import logging

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxterp.sae import ActivationDataset, Callback
from mlxterp.sae.callbacks import StopTraining
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dead_features import dead_features
from mlxterp.sae.objective import Objective
from mlxterp.sae.run import Run, TrainingError
from mlxterp.sae.trainer import Trainer, TrainingResult, drive, prepare
from tests.fakes import SITE, FakeSource
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
)


def batches_of(run: Run) -> list[mx.array]:
    plan = run.plan
    return [
        batch
        for epoch in range(plan.n_epochs)
        for batch in run.dataset.batches(
            plan.batch_size, epoch=epoch, seed=plan.seed, drop_last=True
        )
    ]


def test_steps_and_epochs_are_counted_by_whole_batches():
    training, _ = in_memory()
    assert len(training) == 297
    _, plan = prepare(training, config(batch_size=32, num_epochs=3))
    assert (plan.steps_per_epoch, plan.n_steps, plan.batch_size) == (9, 27, 32)
    _, small = prepare(training, config(batch_size=5000))
    assert (small.steps_per_epoch, small.batch_size) == (1, 297)


@pytest.mark.parametrize(
    ("wanted", "steps"), [(None, 1), (64, 1), (300, 5), (1, 1), (100_000, 1562)]
)
def test_the_dead_window_is_two_halves_of_whole_steps(wanted, steps):
    assert run_of(config(dead_window=wanted, num_epochs=4), in_memory()[0]).half_window == steps


def test_what_is_read_and_what_is_written_are_taken_from_the_normalised_batch():
    data = ActivationDataset.from_activations({"a": tokens(99, 2) + 5, "b": tokens(99, 3) * 7})
    columns, settings = data.columns, config()
    coder = SparseCoder(columns.only("b"), columns.only("a"), 20, k=3)
    sample, plan = prepare(data, settings)
    run = Run(settings, coder, data, None, plan, sample)
    batch = next(data.batches(32))
    x, y = run.builder.split(batch)
    whole = run.normalisation.apply(batch)
    assert mx.array_equal(x, whole[:, 2:]) and mx.array_equal(y, whole[:, :2])


def test_firing_is_counted_in_tokens_over_the_last_window():
    training, _ = in_memory()
    run = run_of(config(dead_window=128, num_epochs=1, log_every=100), training)
    fired = []
    for batch in batches_of(run):
        x = run.normalisation.apply(batch)
        params = run.state["params"]
        pre = np.array(x @ params["W_enc"].T + params["b_enc"])
        active = (pre >= np.sort(pre, axis=1)[:, -3, None]) & (pre > 0)
        fired.append(active.sum(axis=0))
        run.advance(batch)
        # A window of 128 tokens is two halves of two steps each.
        full, rest = divmod(len(fired), 2)
        if full:
            recent = np.sum(fired[2 * (full - 1) : 2 * full + rest], axis=0)
            counted = 64 + 32 * rest
            found = run.state["fired"] + run.state["fired_before"]
            np.testing.assert_allclose(np.array(found), recent)
            total = run.state["counted"] + run.state["counted_before"]
            assert total.item() == counted
            dead = recent < max(0.02 * counted, 0.5)
            np.testing.assert_array_equal(np.array(dead_features(run.state, 0.02)), dead)
            np.testing.assert_allclose(run.firing_rates, recent / counted, rtol=1e-5)
        else:
            assert not dead_features(run.state, 0.02).any().item()
    assert len(fired) == 9


def test_firing_rates_at_the_end_are_shares_of_the_last_window():
    settings = config(dead_window=2000, learning_rate=1e-9, dead_neuron_threshold=0)
    coder, result = fit(in_memory(3300), settings)
    shares = np.array((coder.encode(in_memory(3300)[0]._array()) > 0).mean(axis=0))
    np.testing.assert_allclose(result.firing_rates, shares, atol=0.03)
    assert result.firing_rates.sum() == pytest.approx(shares.sum(), rel=0.05)


def test_firing_rates_are_known_where_the_window_is_longer_than_the_run():
    _, result = fit(in_memory(), config(dead_window=10**6, learning_rate=1e-9))
    assert 2 < result.firing_rates.sum() <= 3


def share_dead(coefficient: float, start, kind: str = "", factor: float = 2) -> float:
    """At the end of a run with this auxiliary loss; `start` is what is taken off the biases."""
    settings = config(
        expansion_factor=factor, learning_rate=1e-2, auxiliary_coefficient=coefficient,
        num_epochs=12, batch_size=64, dead_window=640, dead_neuron_threshold=0.01,
        **kinds.settings(kind),
    )  # fmt: skip
    data = kinds.dataset(1000) if kind else ActivationDataset.from_activations(tokens(1000))
    run = run_of(settings, data, kind=kind)
    params = run.state["params"]
    params["b_enc"] = params["b_enc"] - start(run)
    drive([run], data, run.plan)
    return float((run.firing_rates < 0.01).mean())


def test_the_auxiliary_loss_revives_dead_features():
    def half(run):
        """Half of as many features as the data has start where few tokens are."""
        return mx.arange(16) < 8

    assert share_dead(0.5, half) < 0.1 < share_dead(0.0, half)


@pytest.mark.parametrize("kind", ["crosscoder", "cross-layer transcoder"])
def test_the_auxiliary_loss_revives_dead_features_of_several_sites(kind):
    def half(run):
        """Every other feature starts with a value on one of 100 tokens."""
        x, _ = run.builder.split(next(run.dataset.batches(1000)))
        codes = Objective(run.coder, run.config, 3).codes(run.state["params"], x)
        pre = np.concatenate([np.array(code.pre) for code in codes], axis=1)
        return mx.array(np.quantile(pre, 0.99, axis=0) * (np.arange(pre.shape[1]) % 2 == 0))

    assert share_dead(0.5, half, kind, 3) < 0.8 * share_dead(0.0, half, kind, 3)


def test_resampling_happens_on_its_steps_but_not_in_the_last_two_windows(monkeypatch):
    steps = []
    training, _ = in_memory()
    run = run_of(config(resample_dead_every=2, dead_window=128, num_epochs=2), training)

    def record(state, *arguments):
        steps.append(run.step)
        return state

    monkeypatch.setattr("mlxterp.sae.run.resample", record)
    drive([run], training, run.plan)
    # 18 steps of 32 tokens; after step 10 no more than 2 * 128 tokens are left.
    assert steps == [2, 4, 6, 8]


def test_fewer_features_than_half_the_width_with_an_auxiliary_loss():
    data = ActivationDataset.from_activations(tokens(400, width=64))
    settings = config(expansion_factor=0.3, k=2, dead_neuron_threshold=0.9, num_epochs=3)
    coder, result = fit((data, None), settings)
    assert coder.n_features == 19 and result.training[-1]["dead"] > 0.5
    assert all(np.isfinite(report["loss"]) for report in result.training)


def test_reports_say_what_happened():
    _, result = fit(in_memory(), config(log_every=3, warmup_steps=0))
    assert [r["step"] for r in result.training] == [3, 6, 9, 12, 15, 18]
    assert [r["tokens"] for r in result.training] == [96 * i for i in range(1, 7)]
    assert [r["step"] for r in result.validation] == [9, 18]
    last = result.training[-1]
    assert 0 < last["fvu"] < 1 and 1 < last["l0"] <= 3 and last["skipped"] == 0
    assert last["learning_rate"] == pytest.approx(3e-3 * 1 / 3)
    assert "sparsity_coefficient" not in last
    assert "fvu=" in repr(result) and "tokens=576" in repr(result)


@pytest.mark.parametrize(
    ("every", "steps"), [(5, [5, 10, 15, 18]), (18, [18]), (100, [18]), (None, list(range(1, 19)))]
)
def test_held_out_data_are_measured_when_asked_and_at_the_end(every, steps):
    _, result = fit(in_memory(), config(validate_every=every))
    assert [report["step"] for report in result.validation] == steps


def test_the_usual_interval_between_validations_is_a_tenth_of_the_run():
    _, result = fit(in_memory(), config(validate_every=None, num_epochs=5))
    assert [report["step"] for report in result.validation] == [*range(4, 45, 4), 45]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_validation_measures_the_coder_as_it_would_be_without_disturbing_the_run(kind):
    settings, data = config(**kinds.settings(kind)), in_memory(kind=kind)
    often, seldom = (
        fit(data, settings.replace(validate_every=n), kind=kind) for n in (1, 100)
    )  # fmt: skip
    assert not differences(often[0], seldom[0])
    assert often[1].validation[-1] == seldom[1].validation[-1]


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_a_penalised_run_reports_its_coefficient_and_raises_it_where_l0_is_too_high(name):
    settings = config(activation_function=name, sparsity_warmup_steps=0)
    _, result = fit(in_memory(), settings)
    found = [report["sparsity_coefficient"] for report in result.training]
    assert result.training[0]["l0"] > 6 and found == sorted(found) and found[0] < found[-1]


def test_a_coefficient_that_is_given_stays():
    settings = config(activation_function="relu", lambda_sparse=0.01)
    _, result = fit(in_memory(), settings)
    for report in result.training:
        assert report["sparsity_coefficient"] == pytest.approx(0.01)


def test_a_stronger_penalty_leaves_fewer_features_active():
    l0 = [
        fit(in_memory(), config(activation_function="relu", lambda_sparse=value))[1].training[-1][
            "l0"
        ]
        for value in (1e-4, 0.3)
    ]
    assert l0[1] < 0.9 * l0[0]


def test_k_is_annealed_in_the_reports_and_reached():
    settings = config(k=2, k_anneal_steps=9, log_every=1, learning_rate=1e-6)
    _, result = fit(in_memory(), settings)
    l0 = [report["l0"] for report in result.training]
    assert l0[0] > 3 and l0[:9] == sorted(l0[:9], reverse=True) and max(l0[9:]) <= 2


def test_a_report_counts_the_features_that_are_dead_at_that_step():
    settings = config(dead_window=320, dead_neuron_threshold=0.05, log_every=1)
    training, _ = in_memory()
    run = run_of(settings, training)
    expected = []

    class Count(Callback):
        def on_step_end(self, step):
            expected.append(dead_features(run.state, 0.05).sum().item() / 32)

    run.callbacks = (Count(),)
    drive([run], training, run.plan)
    assert [r["dead"] for r in run.training] == expected and len(set(expected)) > 2


def test_a_result_without_reports_can_be_shown():
    assert repr(TrainingResult((), (), np.zeros(3), 0, 0.0)).startswith("TrainingResult(tokens=0")


def test_a_cap_on_warm_up_is_mentioned(caplog):
    with caplog.at_level(logging.INFO, logger="mlxterp"):
        fit(in_memory(), config(warmup_steps=1000))
    assert "capped at 1 steps, a tenth of the run" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mlxterp"):
        fit(in_memory(), config(warmup_steps=1))
    assert not caplog.text


# Values that are not finite


def poisoned(dataset: ActivationDataset, bad: set[int]) -> ActivationDataset:
    """The same dataset with NaN in some batches, by their order of arrival."""
    count = iter(range(10**6))
    batches = dataset.batches

    def poisoned_batches(batch_size=256, **options):
        for batch in batches(batch_size, **options):
            serving = "drop_last" in options
            yield batch * mx.nan if serving and next(count) in bad else batch

    dataset.batches = poisoned_batches
    return dataset


@pytest.mark.parametrize(("kind", "name"), kinds.PAIRS)
def test_batches_that_are_not_finite_are_skipped_and_counted(kind, name):
    training, _ = in_memory(kind=kind)
    settings = config(activation_function=name, **kinds.settings(kind))
    coder, result = fit((poisoned(training, {2, 5, 6}), None), settings, kind=kind)
    assert result.training[-1]["skipped"] == 3
    arrays = [array for _, array in tree_flatten(coder.parameters())]
    assert all(mx.isfinite(array).all().item() for array in arrays)
    assert all(np.isfinite(report["loss"]) for report in result.training)


def test_many_batches_in_a_row_that_are_not_finite_stop_the_run_at_its_last_good_state(tmp_path):
    training, _ = in_memory()
    ended = []

    class End(Callback):
        def on_train_end(self):
            ended.append(True)

    settings = config(checkpoint_every=2)
    with pytest.raises(TrainingError, match=r"At step 1[2-5] the last 10 steps.*learning_rate"):
        fit((poisoned(training, set(range(2, 100))), None), settings, tmp_path, callbacks=[End()])
    assert ended == [True]
    saved = max(tmp_path.glob("step_*"))
    assert saved.name >= "step_00000011"
    # The weights are those of the last step that was good.
    good = run_of(settings, in_memory()[0])
    for batch in batches_of(good)[:2]:
        good.advance(batch)
    arrays = mx.load(str(saved / "state.safetensors"))
    for name, array in good.state["params"].items():
        assert mx.array_equal(arrays[f"params.{name}"], array)


def test_a_short_run_in_which_every_step_is_bad_is_an_error():
    training, _ = in_memory()
    with pytest.raises(TrainingError, match="At step 3 the last 3 steps"):
        fit((poisoned(training, set(range(99))), None), config(batch_size=99, num_epochs=1))


def test_data_that_does_not_vary_is_refused():
    constant = ActivationDataset.from_activations(np.ones((100, 8), np.float32))
    with pytest.raises(ValueError, match="the same on every token"):
        fit((constant, None), config())


def test_tokens_left_out_of_a_streamed_epoch_shorten_it(recwarn):
    texts = ["abcdefgh" * 4] * 20
    source = FakeSource(width=8, not_finite="h")
    dataset = ActivationDataset.from_texts(
        source, texts, SITE, context_length=16, buffer_bytes=64 * 4 * 8
    )
    coder, result = fit((dataset, None), config(num_epochs=3))
    assert len(dataset) == 640 and dataset.n_skipped == 80
    assert all(mx.isfinite(coder[name]).all().item() for name in ("W_enc", "W_dec"))
    assert any("80 of 640 activations are not finite" in str(w.message) for w in recwarn)


# A run that is stopped


class Stop(Callback):
    """Stops at an event, from step `at` on."""

    def __init__(self, event: str, at: int):
        self.interrupt = Interrupt(at, StopTraining, event)
        for name in ("on_train_begin", "on_step_end", "on_train_loss_report",
                     "on_val_loss_report", "on_checkpoint"):  # fmt: skip
            setattr(self, name, getattr(self.interrupt, name))


@pytest.mark.parametrize(
    ("event", "at", "stopped_at"),
    [("begin", 0, 0), ("step", 7, 7), ("report", 7, 9), ("validation", 7, 9),
     ("checkpoint", 7, 10), ("step", 18, 18)],
)  # fmt: skip
def test_a_callback_ends_a_run_as_if_it_were_complete(event, at, stopped_at, tmp_path):
    training, validation = in_memory()
    coder, result = fit((training, validation), config(), tmp_path, [Stop(event, at)])
    assert result.n_tokens == 32 * stopped_at
    assert result.validation[-1]["step"] == stopped_at
    if stopped_at:
        assert result.training[-1]["step"] == stopped_at
    # Where there was no step there is nothing to save.
    saved = max((path.name for path in tmp_path.glob("step_*")), default="step_00000000")
    assert saved == f"step_{stopped_at:08d}"
    # It is the coder of the last step, folded.
    run = run_of(config(), training)
    for batch in batches_of(run)[:stopped_at]:
        run.advance(batch)
    run._fold()
    assert not differences(coder, run.coder)


@pytest.mark.parametrize(("event", "at"), [("step", 9), ("checkpoint", 7)])
def test_a_run_that_was_stopped_stays_so_where_it_is_resumed(event, at, tmp_path):
    expected = fit(in_memory(), config(), tmp_path, [Stop(event, at)])
    found = fit(in_memory(), config(), tmp_path, resume=True)
    assert not differences(found[0], expected[0])
    assert found[1].n_tokens == expected[1].n_tokens > 0


def test_stopping_is_mentioned_with_step_and_reason(caplog):
    with caplog.at_level(logging.INFO, logger="mlxterp"):
        fit(in_memory(), config(), callbacks=[Stop("step", 7)])
    assert "The run ends at step 7: at step 7" in caplog.text


@pytest.mark.parametrize("event", ["begin", "step", "report", "validation"])
def test_every_callback_hears_of_the_end_whatever_fails(event):
    ended = []

    class End(Callback):
        def on_train_end(self):
            ended.append(True)

    with pytest.raises(ZeroDivisionError):
        fit(in_memory(), config(), None, [End(), Interrupt(0, ZeroDivisionError, event), End()])
    assert ended == [True, True]


def test_a_log_is_written_where_there_is_a_directory_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(in_memory(), config())
    assert not list(tmp_path.iterdir())
    fit(in_memory(), config(), tmp_path / "run")
    assert '"event": "end"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_disk_that_is_full_does_not_hide_why_the_run_ended(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("mlxterp.sae.run.save_checkpoint", full)
    with pytest.raises(KeyboardInterrupt):
        fit(in_memory(), config(checkpoint_every=0), tmp_path, [Interrupt(4)])
    assert "Step 4 of the run could not be saved: No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        fit(in_memory(), config(), tmp_path / "other")


@pytest.mark.parametrize(
    ("data", "kind"), [(streaming, ""), *((in_memory, kind) for kind in kinds.KINDS)]
)
def test_a_run_may_be_driven_step_by_step(data, kind):
    training, validation = data(kind=kind)
    settings = config(**{**EVENTFUL, **kinds.settings(kind)})
    run = run_of(settings, training, validation, kind)
    run.begin()
    for batch in batches_of(run):
        run.advance(batch)
    run.finish()
    coder = coder_for(training, settings, kind)
    result = Trainer(settings).fit(coder, training, validation)
    assert_same((run.coder, TrainingResult.of(run)), (coder, result))
