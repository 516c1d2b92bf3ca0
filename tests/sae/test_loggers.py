import json
import math
import sys
from types import ModuleType

import numpy as np
import pytest

from mlxterp.sae.callbacks import Callback, RunInfo
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from mlxterp.sae.sae import SAETrainer
from tests.sae.synthetic import planted


class FakeRun:
    """A run of wandb or trackio; it refuses what they do not have."""

    def __init__(self, init):
        self.init, self.metrics, self.logged, self.exit_code = init, {}, [], "open"

    def define_metric(self, name, step_metric=None, *, hidden=None):
        self.metrics[name] = step_metric

    def log(self, data, step=None):
        assert self.exit_code == "open"
        self.logged.append((step, data))

    def finish(self, exit_code=None):
        self.exit_code = exit_code


class FakeWriter:
    """`tensorboardX.SummaryWriter`."""

    def __init__(self, logdir=None, purge_step=None, flush_secs=120, filename_suffix=""):
        self.init = {"logdir": logdir, "purge_step": purge_step, "suffix": filename_suffix}
        self.texts, self.logged, self.closed = {}, [], False

    def add_text(self, tag, text_string, global_step=None):
        self.texts[tag] = (text_string, global_step)

    def add_scalar(self, tag, scalar_value, global_step=None):
        assert not self.closed
        self.logged.append((tag, scalar_value, global_step))

    def close(self):
        self.closed = True


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for the packages; the runs that were started, in order."""
    started = []

    def start(make):
        def start_one(*arguments, **settings):
            started.append(make(*arguments, **settings))
            return started[-1]

        return start_one

    for name in ("wandb", "trackio"):
        package = ModuleType(name)
        package.init = start(lambda project, **init: FakeRun({"project": project, **init}))
        monkeypatch.setitem(sys.modules, name, package)
    package = ModuleType("tensorboardX")
    package.SummaryWriter = start(FakeWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    return started


def run_info(first_step=0, name="probe", n_steps=6):
    return RunInfo(
        n_steps=n_steps, batch_size=4, first_step=first_step, d_in=8, d_out=8, n_features=32,
        config={"k": 4, "dead_window": None}, name=name,
    )  # fmt: skip


def drive(logger: Callback, first=0, last=6, error=None):
    """The events of a run of six steps, of which `first` were done before; checkpoints every 2."""
    try:
        logger.on_train_begin(run_info(first))
        for step in range(first + 1, last + 1):
            logger.on_step_end(step)
            logger.on_train_loss_report({"step": step, "tokens": 4 * step, "loss": 1 / step})
            if step % 3 == 0:
                logger.on_val_loss_report({"step": step, "tokens": 4 * step, "fvu": 0.5})
            if step % 2 == 0:
                logger.on_checkpoint(f"step_{step}")
        if error is not None:
            raise error
    finally:
        logger.on_train_end()


def fail(logger, **settings):
    with pytest.raises(RuntimeError, match="boom"):
        drive(logger, error=RuntimeError("boom"), **settings)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(path) -> list[tuple]:
    return [(line["event"], line["step"]) for line in read(path)]


WHOLE = [
    ("begin", 0), ("train", 1), ("train", 2), ("checkpoint", 2), ("train", 3), ("validation", 3),
    ("train", 4), ("checkpoint", 4), ("train", 5), ("train", 6), ("validation", 6),
    ("checkpoint", 6), ("end", 6),
]  # fmt: skip


def test_a_log_holds_every_event_with_its_step(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    drive(JSONLLogger(path))
    assert events(path) == WHOLE
    lines = read(path)
    assert lines[0] == {
        "event": "begin", "step": 0, "k": 4, "dead_window": None, "n_steps": 6, "batch_size": 4,
        "d_in": 8, "d_out": 8, "n_features": 32, "name": "probe",
    }  # fmt: skip
    assert lines[1] == {"event": "train", "step": 1, "tokens": 4, "loss": 1.0}
    assert lines[3]["path"] == "step_2" and lines[-1]["error"] is None
    assert [file.name for file in path.parent.iterdir()] == ["run.jsonl"]


def test_every_line_is_there_at_once(tmp_path):
    logger = JSONLLogger(tmp_path / "run.jsonl")
    logger.on_train_begin(run_info())
    logger.on_train_loss_report({"step": 1})
    assert events(logger.path) == [("begin", 0), ("train", 1)]


def test_values_that_json_does_not_know_are_written_as_what_is_nearest(tmp_path):
    logger = JSONLLogger(tmp_path / "run.jsonl")
    logger.on_train_begin(run_info())
    odd = {
        "step": 1, "nan": math.nan, "inf": -math.inf, "f32": np.float32(0.5), "i": np.int64(3),
        "f32_nan": np.float32("nan"), "sites": {"layers.1.mlp": [math.inf, 1]}, "path": tmp_path,
        "yes": True,
    }  # fmt: skip
    logger.on_train_loss_report(odd)
    text = logger.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read(logger.path)[1] == {
        "event": "train", "step": 1, "nan": None, "inf": None, "f32": 0.5, "i": 3, "f32_nan": None,
        "sites": {"layers.1.mlp": [None, 1]}, "path": str(tmp_path), "yes": True,
    }  # fmt: skip


def test_a_resumed_run_goes_on_with_its_log_without_the_steps_done_again(tmp_path):
    path = tmp_path / "run.jsonl"
    fail(JSONLLogger(path), last=5)
    assert read(path)[-1] == {"event": "end", "step": 5, "error": "RuntimeError: boom"}
    drive(JSONLLogger(path), first=4)
    assert events(path) == [*WHOLE[:8], ("begin", 4), *WHOLE[8:]]
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_line_cut_off_by_a_kill_is_dropped_and_so_is_one_that_is_damaged(tmp_path):
    path = tmp_path / "run.jsonl"
    drive(JSONLLogger(path), last=4)
    lines = path.read_bytes().splitlines(keepends=True)
    cut = [*lines[:2], b"\xff\xfe{\n", b"[1]\n", *lines[2:5], b'{"event": "train", "step": 4, "lo']
    path.write_bytes(b"".join(cut))
    drive(JSONLLogger(path), first=4)
    assert events(path) == [*WHOLE[:5], ("begin", 4), *WHOLE[8:]]


def test_a_last_line_without_its_end_is_not_believed(tmp_path):
    path = tmp_path / "run.jsonl"
    drive(JSONLLogger(path), last=1)
    with path.open("a") as file:
        file.write('{"event": "train", "step": 1}')  # a number may go on
    drive(JSONLLogger(path), first=5)
    assert events(path) == [("begin", 0), ("train", 1), ("end", 1), ("begin", 5), *WHOLE[9:]]


def test_a_run_from_its_first_step_begins_the_log_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        drive(JSONLLogger(path))
    assert events(path) == WHOLE


def test_a_file_that_is_cut_off_in_its_first_line_is_begun_anew(tmp_path):
    for head in (b"", b'{"eve', b'{"event": "begin", "step": 0, "k'):
        path = tmp_path / "run.jsonl"
        path.write_bytes(head)
        drive(JSONLLogger(path))
        assert events(path) == WHOLE


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("content", [b'{"text": "precious"}\n', b"\x00\x01", b'{"event": "train"}'])
def test_a_file_that_is_no_log_is_neither_overwritten_nor_written_to(tmp_path, content, first):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"texts.jsonl exists and is not the log of a run"):
        drive(JSONLLogger(path), first=first)
    assert path.read_bytes() == content


def test_a_log_that_cannot_be_written_anew_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    drive(JSONLLogger(path))
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        drive(JSONLLogger(path), first=2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_an_error_around_a_run_is_not_its_own(tmp_path, services):
    logger = WandbLogger("p")
    try:
        raise KeyError("an earlier one")
    except KeyError:
        drive(JSONLLogger(tmp_path / "run.jsonl"))
        drive(logger)
    assert read(tmp_path / "run.jsonl")[-1]["error"] is None
    assert services[0].exit_code == 0


def test_real_runs_are_logged_interrupted_and_resumed(tmp_path):
    class Interrupt(Callback):
        def on_val_loss_report(self, info):
            if info["step"] == 8:
                raise KeyboardInterrupt

    config = SAEConfig(
        expansion_factor=4, k=3, batch_size=32, num_epochs=2, log_every=3, resample_dead_every=0,
        validation_split=0.1, validate_every=4,
    )  # fmt: skip
    path, array = tmp_path / "own.jsonl", planted(200, n_features=16, width=8, active=2)[1]
    logger = JSONLLogger(path)
    with pytest.raises(KeyboardInterrupt):
        SAETrainer(config, tmp_path / "run", [logger, Interrupt()]).fit(array)
    assert read(path)[-1] == {"event": "end", "step": 8, "error": "KeyboardInterrupt: "}
    sae = SAETrainer(config, tmp_path / "run", [logger]).fit(array, resume=True)
    for kind in ("training", "validation"):
        event = "train" if kind == "training" else kind
        logged = [line for line in read(path) if line.pop("event") == event]
        assert logged == list(getattr(sae.statistics, kind)) and logged
    assert read(path)[-1] == {"event": "end", "step": 10, "error": None}


def test_tensorboard_gets_every_number_under_train_and_validation(services, tmp_path):
    logger = TensorBoardLogger(tmp_path / "tb")
    logger.on_train_begin(run_info())
    logger.on_train_loss_report({"step": 2, "loss": np.float32(0.5), "n": 3, "note": "text"})
    logger.on_val_loss_report({"step": 2, "fvu": 0.25, "sites": {"layers.1.mlp": 0.5}})
    logger.on_train_end()
    (writer,) = services
    assert writer.init == {"logdir": str(tmp_path / "tb"), "purge_step": None, "suffix": ".0"}
    assert writer.logged == [
        ("train/loss", 0.5, 2), ("train/n", 3, 2), ("validation/fvu", 0.25, 2),
        ("validation/sites/layers.1.mlp", 0.5, 2),
    ]  # fmt: skip
    text, step = writer.texts["config"]
    config = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert config["k"] == 4 and config["n_features"] == 32 and step == 0 and writer.closed


def test_tensorboard_hides_what_a_resumed_run_does_again(services):
    drive(TensorBoardLogger("tb"), first=4)
    assert services[0].init["purge_step"] == 5
    assert [step for tag, _, step in services[0].logged if tag == "train/loss"] == [5, 6]


def test_wandb_gets_an_axis_of_steps_the_config_and_the_end(services):
    drive(WandbLogger("project", tags=["a"], config={"mine": 1}), first=4)
    (run,) = services
    assert run.init["project"] == "project" and run.init["tags"] == ["a"]
    assert run.init["name"] == "probe" and run.metrics["train/*"] == "step"
    assert run.metrics["validation/*"] == "step" and "step" in run.metrics
    assert run.init["config"]["mine"] == 1 and run.init["config"]["k"] == 4
    assert run.logged == [
        (None, {"step": 5, "train/tokens": 20, "train/loss": 0.2}),
        (None, {"step": 6, "train/tokens": 24, "train/loss": 1 / 6}),
        (None, {"step": 6, "validation/tokens": 24, "validation/fvu": 0.5}),
    ]
    assert run.exit_code == 0


def test_the_config_that_a_service_gets_is_the_same_when_the_run_is_resumed(services):
    drive(WandbLogger("p"))
    drive(WandbLogger("p"), first=4)
    assert services[0].init["config"] == services[1].init["config"]


def test_a_run_that_fails_is_finished_as_failed(services):
    fail(WandbLogger("project"))
    fail(TrackioLogger("project"))
    fail(TensorBoardLogger("tb"))
    wandb, trackio, tensorboard = services
    assert wandb.exit_code == 1 and trackio.exit_code is None and tensorboard.closed


def test_trackio_resumes_the_run_of_the_same_name(services):
    drive(TrackioLogger("project"), last=2)
    drive(TrackioLogger("project", name="mine"), first=5)
    first, second = services
    assert (first.init["name"], first.init["resume"]) == ("probe", "never")
    assert (second.init["name"], second.init["resume"]) == ("mine", "allow")
    assert first.init["config"]["k"] == 4 and first.exit_code is None
    assert second.logged[0] == (6, {"train/tokens": 24, "train/loss": 1 / 6})


@pytest.mark.parametrize("kind", [WandbLogger, TrackioLogger])
def test_a_run_without_a_name_is_named_by_the_service(services, kind):
    logger = kind("project")
    logger.on_train_begin(run_info(name=""))
    assert services[0].init["name"] is None


@pytest.mark.parametrize("kind", [WandbLogger, TrackioLogger, TensorBoardLogger])
def test_an_end_without_a_beginning_does_nothing(services, kind):
    kind("there").on_train_end()
    assert services == []


@pytest.mark.parametrize(
    "kind, package, extra",
    [
        (WandbLogger, "wandb", "wandb"),
        (TrackioLogger, "trackio", "trackio"),
        (TensorBoardLogger, "tensorboardX", "tensorboard"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, kind, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package} is missing: pip install 'mlxterp\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        kind("there")
