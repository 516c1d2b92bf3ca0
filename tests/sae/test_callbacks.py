import math
import warnings

import numpy as np
import pytest

from mlxterp.sae.callbacks import (
    Advice,
    Callback,
    EarlyStopping,
    ProgressBar,
    RunInfo,
    StopTraining,
)
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.sae import SAETrainer
from tests.sae import kinds
from tests.sae.synthetic import planted

CONFIG = SAEConfig(
    expansion_factor=4, k=3, batch_size=32, num_epochs=2, log_every=4, resample_dead_every=0
)
SETTINGS = {
    "auxiliary_coefficient": 0.03125, "k": 4, "learning_rate": 0.008, "expansion_factor": 32,
    "num_epochs": 2,
}  # fmt: skip


class Record(Callback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, run):
        self.events.append(("begin", run))

    def on_step_end(self, step):
        self.events.append(("step", step))

    def on_train_loss_report(self, info):
        self.events.append(("report", info))

    def on_val_loss_report(self, info):
        self.events.append(("validation", info))

    def on_checkpoint(self, path):
        self.events.append(("checkpoint", path))

    def on_train_end(self):
        self.events.append(("end",))

    def of(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def data() -> np.ndarray:
    return planted(200, n_features=16, width=8, active=2)[1]


def info(n_steps=1000, first_step=0, n_features=400, **changes) -> RunInfo:
    return RunInfo(
        n_steps=n_steps, batch_size=1000, first_step=first_step, d_in=8, d_out=8,
        n_features=n_features, config={**SETTINGS, **changes},
    )  # fmt: skip


def report(step, **changes):
    usual = {"step": step, "tokens": 1000 * step, "fvu": 0.2, "l0": 4.0, "dead": 0.01}
    return {**usual, "loss": 0.1, "skipped": 0, "skipped_tokens": 0, **changes}


def advice(reports=(), validation=(), **run) -> list[str]:
    """What a run with these reports makes `Advice` say."""
    callback = Advice()
    callback.on_train_begin(info(**run))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in reports:
            callback.on_train_loss_report(one)
        for one in validation:
            callback.on_val_loss_report(one)
        callback.on_train_end()
    return [str(warning.message) for warning in caught]


def every(value_of, key, step=20, n_steps=1000):
    """Reports all along a run in which one figure is a function of the share that is done."""
    return [report(s, **{key: value_of(s / n_steps)}) for s in range(step, n_steps + 1, step)]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_events_come_in_order_and_hold_what_is_promised(kind):
    record = Record()
    config = CONFIG.replace(validation_split=0.1, **kinds.settings(kind))
    coder = kinds.fit(kind, kinds.activations(200), config, callbacks=[record])
    # 180 tokens to train on make 5 steps in each epoch.
    run = record.events[0][1]
    assert (run.n_steps, run.batch_size, run.first_step) == (10, 32, 0)
    sizes = (coder.d_in, coder.d_out, coder.n_features)
    assert (run.d_in, run.d_out, run.n_features) == sizes and coder.n_features >= 24
    assert run.config == config.to_dict() and run.checkpoint_dir is None
    assert record.of("step") == list(range(1, 11)) and record.events[-1] == ("end",)
    assert {4, 8} <= {one["step"] for one in record.of("report")}
    assert set(record.of("report")[0]) >= {
        "step", "tokens", "loss", "fvu", "l0", "dead", "learning_rate", "tokens_per_second",
        "skipped", "skipped_tokens",
    }  # fmt: skip
    held_out = record.of("validation")[-1]
    assert (held_out["step"], held_out["tokens"], held_out["n_tokens"]) == (10, 320, 20)
    assert {"fvu", "l0", "dead"} <= set(held_out)
    where = [event[0] for event in record.events].index("report")
    assert record.events[where - 1] == ("step", record.of("report")[0]["step"])


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_end_is_reported_when_a_run_fails(kind):
    class Fail(Record):
        def on_step_end(self, step):
            raise RuntimeError("enough")

    record = Fail()
    with pytest.raises(RuntimeError, match="enough"):
        config = CONFIG.replace(**kinds.settings(kind))
        kinds.fit(kind, kinds.activations(), config, callbacks=[record])
    assert [event[0] for event in record.events] == ["begin", "end"]


def test_a_resumed_run_says_where_it_starts(tmp_path):
    SAETrainer(CONFIG, tmp_path).fit(data())
    record = Record()
    SAETrainer(CONFIG, tmp_path, [record]).fit(data(), resume=True)
    assert record.of("begin")[0].first_step == 10 and record.of("step") == []
    assert record.of("begin")[0].checkpoint_dir == tmp_path


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_checkpoint_is_reported_once_it_is_there(kind, tmp_path):
    class Look(Record):
        def on_checkpoint(self, path):
            assert (path / "run.json").is_file()
            super().on_checkpoint(path)

    record = Look()
    config = CONFIG.replace(checkpoint_every=4, **kinds.settings(kind))
    kinds.fit(kind, kinds.activations(200), config, tmp_path, [record])
    assert [path.name[-2:] for path in record.of("checkpoint")] == ["04", "08", "10"]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_run_that_is_stopped_is_complete_and_every_callback_hears_of_it(kind, tmp_path):
    class Stop(Callback):
        def on_val_loss_report(self, info):
            raise StopTraining("enough")

    record = Record()
    config, rows = CONFIG.replace(validation_split=0.1, **kinds.settings(kind)), kinds.activations()
    coder = kinds.fit(kind, rows, config, tmp_path, callbacks=[Stop(), record])
    stopped_at = record.of("step")[-1]
    assert stopped_at < 10 and len(record.of("validation")) == 1
    assert record.events[-1] == ("end",) and record.of("checkpoint")
    assert coder.statistics.validation[-1]["step"] == stopped_at
    assert coder.encode(kinds.of_sites(rows)).shape == (200, coder.n_features)


def test_the_progress_bar_counts_tokens_and_shows_the_figures(capsys):
    bar = ProgressBar()
    SAETrainer(CONFIG.replace(validation_split=0.1), callbacks=[bar]).fit(data())
    assert bar._bar.n == bar._bar.total == 320
    shown = capsys.readouterr().err
    for word in ("training", "tok", "loss=", "FVU=", "L0=", "dead=", "held-out FVU="):
        assert word in shown


def test_the_plain_callback_and_an_unused_bar_do_nothing(capsys):
    SAETrainer(CONFIG, callbacks=[Callback()]).fit(data())
    bar = ProgressBar()
    bar.on_step_end(1)
    bar.on_train_end()
    assert capsys.readouterr() == ("", "")


def test_an_end_that_fails_does_not_keep_the_others_from_theirs():
    class FailAtTheEnd(Callback):
        def on_train_end(self):
            raise RuntimeError("not yet")

    record = Record()
    with pytest.raises(RuntimeError, match="not yet"):
        SAETrainer(CONFIG, callbacks=[FailAtTheEnd(), record]).fit(data())
    assert record.events[-1] == ("end",)


def stops_at(values, **settings) -> int | None:
    """Which of the validation reports ends the run."""
    stopping = EarlyStopping(**settings)
    stopping.on_train_begin(info())
    for i, value in enumerate(values):
        try:
            stopping.on_val_loss_report({"fvu": value, "step": i})
        except StopTraining:
            return i
    return None


def test_patience_counts_reports_in_a_row_without_a_better_value():
    assert stops_at([5, 4, 4, 5, 3, 3, 3, 3], patience=3) == 7
    assert stops_at([5, 4, 4, 5, 3, 3, 3], patience=3) is None
    assert stops_at([1, 2, 3, 3], patience=1, mode="max") == 3
    assert stops_at([3, 2, 1], patience=1, mode="max") == 1


def test_a_gain_must_be_above_the_smallest_one():
    assert stops_at([1.0, 0.95, 0.85], patience=1, min_delta=0.1) == 1
    assert stops_at([1.0, 0.85, 0.7], patience=1, min_delta=0.1) is None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_better(mode):
    assert stops_at([math.nan] * 3, patience=3, mode=mode) == 2
    assert stops_at([1.0, math.nan, 1.0], patience=2, mode=mode) == 2


def test_early_stopping_starts_anew_with_each_run():
    stopping = EarlyStopping(patience=1)
    for _ in range(2):
        stopping.on_train_begin(info())
        stopping.on_val_loss_report({"fvu": 1.0})
    with pytest.raises(StopTraining, match="fvu has not been better than 1 for 1 validation"):
        stopping.on_val_loss_report({"fvu": 1.0})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"patience": 1.5}, "patience must be a whole number >= 1, got 1.5"),
        ({"min_delta": -1}, "min_delta must be a number >= 0, got -1"),
        ({"min_delta": math.nan}, "min_delta must be a number >= 0, got nan"),
        ({"mode": "low"}, "mode must be 'min' or 'max', got 'low'"),
    ],
)
def test_settings_of_early_stopping_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**settings)


def test_an_unknown_metric_is_an_error_that_lists_the_others():
    stopping = EarlyStopping("fvuu")
    stopping.on_train_begin(info())
    with pytest.raises(ValueError, match=r"metric must be one of \['fvu', 'l0'\], got 'fvuu'"):
        stopping.on_val_loss_report({"fvu": 1.0, "l0": 2.0})


def test_early_stopping_says_when_a_whole_run_had_nothing_to_judge_by():
    with pytest.warns(UserWarning, match="no validation report.*validation_split"):
        SAETrainer(CONFIG.replace(validation_split=0), callbacks=[EarlyStopping()]).fit(data())


def test_a_good_run_needs_no_advice():
    falling = [
        report(s, fvu=1.5 * math.exp(-s / 100) + 0.1 * (1 + (s // 20) % 2 / 10), dead=0.3 / s)
        for s in range(20, 1001, 20)
    ]
    held_out = every(lambda done: 0.2 + math.exp(-5 * done), "fvu", step=100)
    assert advice(falling, held_out, activation_function="jumprelu", target_l0=5) == []


def test_dead_features_are_mentioned_once_with_what_to_do():
    said = advice(every(lambda done: 0.41, "dead"), every(lambda done: 0.5, "dead"))
    assert said == [
        "41 % of features are dead after 500,000 tokens: raise auxiliary_coefficient (now 0.03125) "
        "or k (now 4), lower learning_rate (now 0.008), or use fewer features: expansion_factor "
        "(now 32)."
    ]


def test_dead_features_of_the_first_half_and_few_of_them_are_no_trouble():
    assert advice(every(lambda done: 0.9 if done < 0.5 else 0.1, "dead")) == []


def test_features_that_seem_dead_in_a_short_window_are_not_judged():
    # A window of 50,000 tokens with L0 4: an average one of 10,000 features fires 20 times.
    half = every(lambda done: 0.5, "dead")
    assert len(advice(half, n_features=10_000)) == 1 and advice(half, n_features=10_001) == []
    assert len(advice(half, n_features=10_001, dead_window=60_000)) == 1
    assert advice(every(lambda done: 0.49, "dead"), n_features=10_000) == []


@pytest.mark.parametrize("l0", [3.0, 7.0])
def test_an_l0_far_from_the_wanted_one_is_mentioned_at_the_end_of_the_run(l0):
    late = every(lambda done: l0 if done > 0.9 else 4.5, "l0")
    said = advice(late, activation_function="jumprelu", target_l0=4.6)
    assert len(said) == 1 and "target_l0 (now 4.6)" in said[0] and "num_epochs (now 2)" in said[0]
    assert said[0].startswith(f"L0 is {l0:g} where 4.6 is wanted after 920,000 tokens: ")
    early = every(lambda done: l0 if done < 0.9 else 4.5, "l0")
    assert advice(early, activation_function="jumprelu", target_l0=4.6) == []


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"activation_function": "topk"}, None),
        ({"activation_function": "abs_topk"}, None),
        ({}, None),
        ({"activation_function": "batch_topk"}, 4),
        ({"activation_function": "relu", "lambda_sparse": 0.1}, None),
        ({"activation_function": "relu", "lambda_sparse": 0.0, "target_l0": None}, 4),
        ({"activation_function": "relu", "lambda_sparse": 0.1, "target_l0": 30}, 30),
    ],
)
def test_an_l0_is_only_wanted_where_it_is_neither_fixed_nor_free(settings, wanted):
    said = advice([], [report(1000, l0=100.0)], **settings)
    assert [f"where {wanted} is wanted" in text for text in said] == [True] * (wanted is not None)


def test_an_fvu_that_stays_above_one_or_rises_is_mentioned():
    (above,) = advice(every(lambda done: 1.2, "fvu"))
    assert above.startswith("FVU is 1.2, worse than that of the mean activation, after 600,000 tok")
    assert "learning_rate (now 0.008)" in above
    (rising,) = advice(every(lambda done: 0.2 if done <= 0.7 else 0.3, "fvu"))
    assert rising.startswith("FVU has risen from 0.2 to 0.3 after 800,000 tokens: lower learning_r")


def test_noise_in_fvu_is_not_taken_for_a_rise():
    rng = np.random.default_rng(0)
    noisy = every(lambda done: 0.2 * rng.uniform(0.5, 1.5), "fvu", step=5)
    assert advice(noisy) == []


def test_a_held_out_fvu_that_rises_calls_for_more_data():
    said = advice([], every(lambda done: 0.2 if done <= 0.6 else 0.25, "fvu", step=100))
    assert said == [
        "The held-out FVU has risen from 0.2 to 0.25 after 700,000 tokens: use more data, or fewer "
        "passes over it (num_epochs (now 2))."
    ]


def test_skipped_steps_and_rows_are_mentioned_above_one_percent():
    # Of an epoch, which here is half of the million tokens.
    assert advice([report(1000, skipped=10, skipped_tokens=5_000)]) == []
    assert advice([report(100, skipped=0, skipped_tokens=5_000)]) == []
    steps, rows = advice([report(1000, skipped=11, skipped_tokens=10_204)])
    assert steps.startswith("11 of 1000 steps had a loss or gradient that is not finite")
    assert rows.startswith("2.0 % of the activations are not finite and were left out after 1,000")


def test_fvu_that_rises_because_l0_comes_down_is_no_trouble():
    falling = [report(s, fvu=0.1 + s / 5000, l0=300 - s / 4) for s in range(100, 1001, 100)]
    assert advice(falling, [{**r, "n_tokens": 10} for r in falling]) == []
    level = [{**r, "l0": 50.0} for r in falling]
    said = advice(level, [{**r, "n_tokens": 10} for r in level])
    assert ["FVU has risen" in said[0], "held-out FVU has risen" in said[1]] == [True, True]


def test_a_run_of_few_steps_is_not_judged():
    bad = {"fvu": 3.0, "l0": 100.0, "skipped": 5}
    run = {"activation_function": "relu", "target_l0": 4, "n_steps": 99}
    assert advice([report(s, **bad) for s in (33, 66, 99)], [report(99, **bad)], **run) == []


def test_reports_with_nan_or_without_keys_bring_no_advice_and_no_error():
    nothing = {"step": 1000, "tokens": 10**6}
    nan = dict.fromkeys(("fvu", "l0", "dead"), math.nan)
    run = {"activation_function": "relu", "target_l0": 4}
    assert advice([nothing, {**nothing, **nan}], [nothing, {**nothing, **nan}], **run) == []
