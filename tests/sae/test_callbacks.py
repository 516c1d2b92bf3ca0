import numpy as np
import pytest

from mlxterp.sae import Callback, ProgressBar, SAEConfig, SAETrainer
from tests.sae.synthetic import planted

CONFIG = SAEConfig(
    expansion_factor=4, k=3, batch_size=32, num_epochs=2, log_every=4, resample_dead_every=0
)


class Record(Callback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, n_steps, batch_size, first_step):
        self.events.append(("begin", n_steps, batch_size, first_step))

    def on_step_end(self, step):
        self.events.append(("step", step))

    def on_train_loss_report(self, info):
        self.events.append(("report", info))

    def on_val_loss_report(self, info):
        self.events.append(("validation", info))

    def on_train_end(self):
        self.events.append(("end",))


def data() -> np.ndarray:
    return planted(200, n_features=16, width=8, active=2)[1]


def test_events_come_in_order_and_hold_what_is_promised():
    record = Record()
    SAETrainer(CONFIG.replace(validation_split=0.1), callbacks=[record]).fit(data())
    # 180 tokens to train on make 5 steps in each epoch.
    kinds = [event[0] for event in record.events]
    assert record.events[0] == ("begin", 10, 32, 0)
    first = ["step"] * 4 + ["report", "step", "report", "validation"]
    second = ["step"] * 3 + ["report", "step", "step", "report", "validation"]
    assert kinds == ["begin", *first, *second, "end"]
    assert [event[1] for event in record.events if event[0] == "step"] == list(range(1, 11))
    report = next(event[1] for event in record.events if event[0] == "report")
    assert set(report) == {
        "step", "tokens", "loss", "fvu", "l0", "dead", "learning_rate", "tokens_per_second",
        "skipped",
    }  # fmt: skip
    held_out = next(event[1] for event in record.events if event[0] == "validation")
    assert held_out["n_tokens"] == 20 and held_out["step"] == 5 and held_out["tokens"] == 160


def test_the_end_is_reported_when_a_run_fails():
    class Fail(Record):
        def on_step_end(self, step):
            raise RuntimeError("enough")

    record = Fail()
    with pytest.raises(RuntimeError, match="enough"):
        SAETrainer(CONFIG, callbacks=[record]).fit(data())
    assert [event[0] for event in record.events] == ["begin", "end"]


def test_a_resumed_run_says_where_it_starts(tmp_path):
    SAETrainer(CONFIG, tmp_path).fit(data())
    record = Record()
    SAETrainer(CONFIG, tmp_path, [record]).fit(data(), resume=True)
    assert record.events == [("begin", 10, 32, 10), ("end",)]


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
