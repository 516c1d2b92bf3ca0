import logging

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, Callback, SAEConfig, TrainingError
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.config import SAEConfig as Config
from mlxterp.sae.step import dead_features
from mlxterp.sae.trainer import Trainer, TrainingResult, _Run, learning_rate
from tests.fakes import SITE, FakeSource
from tests.sae.synthetic import planted, recovery

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec")


def config(**options) -> SAEConfig:
    defaults = {
        "expansion_factor": 4, "k": 3, "learning_rate": 3e-3, "batch_size": 32, "num_epochs": 2,
        "log_every": 3, "checkpoint_every": 5, "resample_dead_every": 0, "dead_window": 128,
        "dead_neuron_threshold": 0.02,
    }  # fmt: skip
    return SAEConfig(**{**defaults, **options})


def tokens(n=330, width=8, seed=0) -> np.ndarray:
    return planted(n, n_features=16, width=width, active=2, seed=seed)[1]


def in_memory(n=330, seed=0) -> tuple[ActivationDataset, ActivationDataset]:
    return ActivationDataset.from_activations(tokens(n, seed=seed)).split(0.1)


def streaming() -> tuple[ActivationDataset, ActivationDataset]:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), size=17)) for _ in range(20)]
    dataset = ActivationDataset.from_texts(
        FakeSource(width=8), texts, SITE, context_length=16, buffer_bytes=64 * 4 * 8
    )
    assert not dataset.in_memory
    return dataset.split(0.1)


def coder_for(dataset: ActivationDataset, settings: Config) -> SparseCoder:
    columns = dataset.columns
    return SparseCoder(columns, columns, settings.n_features(columns.width), k=settings.k)


def fit(data, settings, directory=None, callbacks=(), resume=False):
    training, validation = data
    coder = coder_for(training, settings)
    result = Trainer(settings, directory, callbacks).fit(coder, training, validation, resume)
    return coder, result


def same_arrays(a: SparseCoder, b: SparseCoder) -> bool:
    return all(mx.array_equal(a[name], b[name]).item() for name in ARRAYS)


def without_times(reports) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in reports]


class Interrupt(Callback):
    """Raises at one event; `at` is a step."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt, event="step"):
        self.at, self.error, self.event = at, error, event

    def _maybe(self, event: str, step: int) -> None:
        if event == self.event and step >= self.at:
            raise self.error(f"at step {step}")

    def on_step_end(self, step):
        self._maybe("step", step)

    def on_train_loss_report(self, info):
        self._maybe("report", info["step"])

    def on_val_loss_report(self, info):
        self._maybe("validation", info["step"])


def test_training_lowers_the_held_out_error_and_folds_the_normalisation():
    data = tokens(4000)
    dataset = ActivationDataset.from_activations(3 * data + 7)
    coder, result = fit(dataset.split(0.1), config(num_epochs=6))
    first, last = result.validation[0], result.validation[-1]
    assert last["fvu"] < 0.5 * first["fvu"] and last["fvu"] < 0.25
    x = 3 * data.astype(np.float64) + 7
    error = x - np.array(coder(mx.array(x.astype(np.float32))), np.float64)
    fvu = (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert fvu == pytest.approx(last["fvu"], rel=0.1)
    assert result.n_tokens == 6 * (3600 // 32) * 32


def test_more_features_than_dimensions_are_recovered():
    features, x = planted(15_000)
    dataset = ActivationDataset.from_activations(x)
    settings = config(expansion_factor=4, k=4, batch_size=256, num_epochs=12, dead_window=20_000)
    coder, _ = fit((dataset, None), settings)
    assert recovery(features, coder.W_dec) > 0.95
    chance = _Run(settings, coder, dataset, None, ()).state["params"]["W_dec"]
    assert recovery(features, chance) < 0.6


def test_the_same_seed_gives_the_same_coder_and_another_seed_another():
    a, b, c = (fit(in_memory(), config(seed=seed))[0] for seed in (1, 1, 2))
    assert same_arrays(a, b) and not same_arrays(a, c)


def test_learning_rate_of_each_schedule_by_hand():
    linear = SAEConfig(learning_rate=1.0, warmup_steps=4, lr_schedule="linear")
    rates = [learning_rate(step, 100, linear) for step in range(100)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[79:82] == [1.0, 1.0, 0.95] and rates[99] == 0.05
    constant = linear.replace(lr_schedule="constant")
    assert [learning_rate(step, 100, constant) for step in (0, 4, 99)] == [0.25, 1.0, 1.0]
    cosine = linear.replace(lr_schedule="cosine", warmup_steps=0)
    expected = [0.5 * (1 + np.cos(np.pi * step / 100)) for step in range(100)]
    assert [learning_rate(step, 100, cosine) for step in range(100)] == pytest.approx(expected)


def test_warm_up_is_capped_at_a_tenth_of_the_run_and_the_run_says_so(caplog):
    capped = SAEConfig(learning_rate=1.0, warmup_steps=1000, lr_schedule="constant")
    rates = [learning_rate(step, 50, capped) for step in range(50)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert learning_rate(0, 5, capped) == 1.0
    with caplog.at_level(logging.INFO, logger="mlxterp"):
        fit(in_memory(), config(warmup_steps=1000))
    assert "capped at 1 steps, a tenth of the run" in caplog.text


def test_steps_and_epochs_are_counted_by_whole_batches():
    training, _ = in_memory()
    assert len(training) == 297
    run = _Run(
        config(batch_size=32, num_epochs=3), coder_for(training, config()), training, None, ()
    )
    assert (run.steps_per_epoch, run.n_steps, run.batch_size) == (9, 27, 32)
    small = _Run(config(batch_size=5000), coder_for(training, config()), training, None, ())
    assert (small.steps_per_epoch, small.batch_size) == (1, 297)


@pytest.mark.parametrize(
    ("wanted", "window"), [(None, 64), (64, 64), (300, 320), (1, 64), (100_000, 99_968)]
)
def test_the_dead_window_is_two_halves_of_whole_steps(wanted, window):
    training, _ = in_memory()
    settings = config(dead_window=wanted, num_epochs=4)
    run = _Run(settings, coder_for(training, settings), training, None, ())
    assert run.window == window


def test_firing_is_counted_in_tokens_over_the_last_window():
    settings = config(dead_window=128, num_epochs=1, log_every=100)
    training, _ = in_memory()
    coder = coder_for(training, settings)
    run = _Run(settings, coder, training, None, ())
    fired = []
    for batch in training.batches(32, epoch=0, seed=settings.seed, drop_last=True):
        x = (batch - run.normalisation.centre) * run.normalisation.scale
        params = run.state["params"]
        pre = np.array(x @ params["W_enc"].T + params["b_enc"])
        active = (pre >= np.sort(pre, axis=1)[:, -3, None]) & (pre > 0)
        fired.append(active.sum(axis=0))
        run._one_step(batch)
        # A window of 128 tokens is two halves of two steps each.
        step = len(fired)
        full, rest = divmod(step, 2)
        if full:
            recent = np.sum(fired[2 * (full - 1) : 2 * full + rest], axis=0)
            counted = 64 + 32 * rest
            found = run.state["fired"] + run.state["fired_before"]
            np.testing.assert_allclose(np.array(found), recent)
            total = run.state["counted"] + run.state["counted_before"]
            assert total.item() == counted
            dead = recent < max(0.02 * counted, 0.5)
            np.testing.assert_array_equal(np.array(dead_features(run.state, 0.02)), dead)
        else:
            assert not dead_features(run.state, 0.02).any().item()
    assert step == 9


def test_firing_rates_at_the_end_are_shares_of_the_last_window():
    coder, result = fit(in_memory(3300), config(dead_window=2000, learning_rate=1e-9))
    data = in_memory(3300)[0]._array()
    shares = np.array((coder.encode(data) > 0).mean(axis=0))
    np.testing.assert_allclose(result.firing_rates, shares, atol=0.03)
    assert result.firing_rates.sum() == pytest.approx(shares.sum(), rel=0.05)


def test_firing_rates_are_known_where_the_window_is_longer_than_the_run():
    _, result = fit(in_memory(), config(dead_window=10**6, learning_rate=1e-9))
    assert 2 < result.firing_rates.sum() <= 3


def test_the_auxiliary_loss_revives_dead_features():
    # Half of as many features as the data has start where few tokens are.
    class Bury(Callback):
        def on_train_begin(self, n_steps, batch_size, first_step):
            params = self.run.state["params"]
            params["b_enc"] = params["b_enc"] - (mx.arange(16) < 8)

    def share_dead(coefficient: float) -> float:
        settings = config(
            expansion_factor=2, learning_rate=1e-2, auxiliary_coefficient=coefficient,
            num_epochs=15, dead_window=640, dead_neuron_threshold=0.01,
        )  # fmt: skip
        data = ActivationDataset.from_activations(tokens(1000))
        coder, bury = coder_for(data, settings), Bury()
        bury.run = _Run(settings, coder, data, None, (bury,))
        bury.run.execute(None)
        return float((bury.run.result().firing_rates < 0.01).mean())

    assert share_dead(0.5) < 0.1 < share_dead(0.0)


def test_resampling_happens_on_its_steps_but_not_in_the_last_two_windows(monkeypatch):
    steps = []
    run = None

    def record(state, *arguments):
        steps.append(run.step)
        return state

    monkeypatch.setattr("mlxterp.sae.trainer.resample", record)
    settings = config(resample_dead_every=2, dead_window=128, num_epochs=2)
    training, _ = in_memory()
    run = _Run(settings, coder_for(training, settings), training, None, ())
    run.execute(None)
    # 18 steps of 32 tokens; after step 10 no more than 2 * 128 tokens are left.
    assert steps == [2, 4, 6, 8]


def test_fewer_features_than_half_the_width_with_an_auxiliary_loss():
    data = ActivationDataset.from_activations(tokens(400, width=64))
    settings = config(expansion_factor=0.3, k=2, dead_neuron_threshold=0.9, num_epochs=3)
    coder, result = fit((data, None), settings)
    assert coder.n_features == 19 and result.training[-1]["dead"] > 0.5
    assert all(np.isfinite(report["loss"]) for report in result.training)


def test_reports_say_what_happened():
    _, result = fit(in_memory(), config(log_every=3))
    assert [r["step"] for r in result.training] == [3, 6, 9, 12, 15, 18]
    assert [r["tokens"] for r in result.training] == [96 * i for i in range(1, 7)]
    assert [r["step"] for r in result.validation] == [9, 18]
    last = result.training[-1]
    assert 0 < last["fvu"] < 1 and 1 < last["l0"] <= 3 and last["skipped"] == 0
    assert last["learning_rate"] == pytest.approx(3e-3 * 1 / 3)
    assert "fvu=" in repr(result) and "tokens=576" in repr(result)


def test_a_report_counts_the_features_that_are_dead_at_that_step():
    settings = config(dead_window=320, dead_neuron_threshold=0.05, log_every=1)
    training, _ = in_memory()
    run = _Run(settings, coder_for(training, settings), training, None, ())
    expected = []

    class Count(Callback):
        def on_step_end(self, step):
            expected.append(dead_features(run.state, 0.05).sum().item() / 32)

    run.callbacks = (Count(),)
    run.execute(None)
    # At the steps where a new half window begins, the report is of the new one.
    ours = [dead for step, dead in enumerate(expected, 1) if step % 5]
    reported = [r["dead"] for r in run.training if r["step"] % 5]
    assert reported == ours and len(set(ours)) > 2


def test_a_result_without_reports_can_be_shown():
    assert repr(TrainingResult((), (), np.zeros(3), 0, 0.0)).startswith("TrainingResult(tokens=0")


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


def test_batches_that_are_not_finite_are_skipped_and_counted():
    training, _ = in_memory()
    coder, result = fit((poisoned(training, {2, 5, 6}), None), config())
    assert result.training[-1]["skipped"] == 3
    assert all(mx.isfinite(coder[name]).all().item() for name in ARRAYS)
    assert all(np.isfinite(report["loss"]) for report in result.training)


def test_many_batches_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    training, _ = in_memory()
    ended = []

    class End(Callback):
        def on_train_end(self):
            ended.append(True)

    with pytest.raises(TrainingError, match=r"At step 1[2-5] the last 10 steps.*learning_rate"):
        fit((poisoned(training, set(range(2, 100))), None), config(), tmp_path, callbacks=[End()])
    assert ended == [True]
    saved = max(tmp_path.glob("step_*"))
    assert saved.name >= "step_00000011"
    assert np.isfinite(np.array(mx.load(str(saved / "state.safetensors"))["params.W_dec"])).all()


RESUMABLE = config(resample_dead_every=4, dead_neuron_threshold=0.05, auxiliary_coefficient=0.2)


@pytest.mark.parametrize("data", [in_memory, streaming])
def test_a_run_interrupted_at_any_step_resumes_to_the_same_result(data, tmp_path):
    expected, whole = fit(data(), RESUMABLE, tmp_path / "whole")
    n_steps = whole.n_tokens // 32
    assert n_steps >= 16 and max(report["dead"] for report in whole.training) > 0
    for step in range(1, n_steps + 1):
        directory = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            fit(data(), RESUMABLE, directory, [Interrupt(step)])
        resumed, result = fit(data(), RESUMABLE, directory, resume=True)
        assert same_arrays(resumed, expected), f"interrupted at step {step}"
        assert without_times(result.training) == without_times(whole.training)
        assert result.validation == whole.validation
        np.testing.assert_array_equal(result.firing_rates, whole.firing_rates)


@pytest.mark.parametrize("event", ["step", "report", "validation"])
@pytest.mark.parametrize("at", [6, 9, 18])
def test_a_run_that_fails_anywhere_resumes_from_its_last_checkpoint(event, at, tmp_path):
    expected, whole = fit(in_memory(), RESUMABLE)
    for error in (RuntimeError, KeyboardInterrupt):
        directory = tmp_path / error.__name__
        with pytest.raises(error):
            fit(in_memory(), RESUMABLE, directory, [Interrupt(at, error, event)])
        resumed, result = fit(in_memory(), RESUMABLE, directory, resume=True)
        assert same_arrays(resumed, expected)
        assert without_times(result.training) == without_times(whole.training)
        assert result.validation == whole.validation


def test_an_interrupt_in_the_middle_of_a_step_loses_that_step_only(tmp_path, monkeypatch):
    expected, _ = fit(in_memory(), RESUMABLE)
    rotate = _Run._rotate_window

    def interrupted(run):
        rotate(run)
        if run.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "_rotate_window", interrupted)
        fit(in_memory(), RESUMABLE, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000007"]
    assert same_arrays(fit(in_memory(), RESUMABLE, tmp_path, resume=True)[0], expected)


def test_a_finished_run_resumes_to_the_finished_coder(tmp_path):
    expected, whole = fit(in_memory(), RESUMABLE, tmp_path)
    again, result = fit(in_memory(), RESUMABLE, tmp_path, resume=True)
    assert same_arrays(again, expected)
    assert result.validation == whole.validation
    np.testing.assert_array_equal(result.firing_rates, whole.firing_rates)


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    expected, _ = fit(in_memory(), RESUMABLE)
    assert same_arrays(fit(in_memory(), RESUMABLE, tmp_path / "new", resume=True)[0], expected)


def test_resuming_needs_a_directory():
    with pytest.raises(ValueError, match="resume=True needs a checkpoint_dir"):
        fit(in_memory(), RESUMABLE, resume=True)


def test_a_new_run_does_not_touch_the_checkpoints_of_an_old_one(tmp_path):
    fit(in_memory(), RESUMABLE, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="step_00000018 of an earlier run: pass resume=True"):
        fit(in_memory(), RESUMABLE, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_config_is_refused_and_names_the_difference(tmp_path):
    fit(in_memory(), RESUMABLE, tmp_path)
    other = RESUMABLE.replace(learning_rate=1e-3, seed=7)
    with pytest.raises(ValueError, match=r"another config; different: \['learning_rate', 'seed'\]"):
        fit(in_memory(), other, tmp_path, resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    fit(in_memory(), RESUMABLE, tmp_path)
    with pytest.raises(ValueError, match="in a run on other data"):
        fit(in_memory(seed=1), RESUMABLE, tmp_path, resume=True)


def test_a_checkpoint_of_less_data_with_the_same_beginning_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.trainer.SAMPLE_TOKENS", 64)
    short, long = (
        (ActivationDataset.from_activations(tokens(600)[:n], shuffle=False), None)
        for n in (300, 600)
    )
    fit(short, RESUMABLE, tmp_path)
    with pytest.raises(ValueError, match="in a run on other data"):
        fit(long, RESUMABLE, tmp_path, resume=True)


@pytest.mark.parametrize("file", ["run.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(file, tmp_path):
    fit(in_memory(), RESUMABLE, tmp_path)
    damaged = tmp_path / "step_00000018" / file
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"step_00000018/{file}"):
        fit(in_memory(), RESUMABLE, tmp_path, resume=True)


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
    assert all(mx.isfinite(coder[name]).all().item() for name in ARRAYS)
    assert any("80 of 640 activations are not finite" in str(w.message) for w in recwarn)
