"""Where the reports of a run go: a file of JSON lines, TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from mlxterp.sae.callbacks import Callback, RunInfo

FIRST_LINE = b'{"event": "begin"'


def settings(run: RunInfo) -> dict[str, Any]:
    """The config of a run and its sizes."""
    # Nothing that changes when the run is resumed: services refuse a config that does.
    sizes = ("n_steps", "batch_size", "d_in", "d_out", "n_features")
    return {**run.config, **{name: getattr(run, name) for name in sizes}, "name": run.name}


def numbers(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Every number of a report as `prefix/key`, also of mappings inside it; without the step."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}/{key}")
        elif isinstance(value, Real) and key != "step":
            found[f"{prefix}/{key}"] = value if isinstance(value, int) else float(value)
    return found


class JSONLLogger(Callback):
    """Writes one JSON object per line: `{"event": "train", "step": 100, "loss": 0.1, ...}`.

    The events are `begin` (settings and sizes), `train`, `validation`, `checkpoint` and `end`
    (with the error that ended the run, or null). Numbers that are not finite become null.

    A run from its first step begins the file anew. A run that is resumed goes on with it: lines of
    steps that are done again, and a line that was cut off, are taken out. Raises `ValueError` where
    the file is not such a log.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._writes, self._step = False, 0

    def on_train_begin(self, run: RunInfo) -> None:
        kept = _lines_to_keep(self.path, run.first_step)
        _replace(self.path, b"".join(kept) if run.first_step else b"")
        self._writes, self._step, self._around = True, run.first_step, sys.exception()
        self._write("begin", {"step": run.first_step, **settings(run)})

    def on_step_end(self, step: int) -> None:
        self._step = step

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self._write("train", info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self._write("validation", info)

    def on_checkpoint(self, path: Path) -> None:
        self._write("checkpoint", {"step": self._step, "path": str(path)})

    def on_train_end(self) -> None:
        if self._writes:
            self._write("end", {"step": self._step, "error": _error(self._around)})
            self._writes = False

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, **_plain(content)}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _plain(value: Any) -> Any:
    """The value in what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _lines_to_keep(path: Path, last_step: int) -> list[bytes]:
    """The complete lines of an earlier log, up to a step; raises `ValueError` for another file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not FIRST_LINE.startswith(lines[0][: len(FIRST_LINE)]):
        raise ValueError(f"{path} exists and is not the log of a run; it is not overwritten.")
    return [line for line in lines if _step(line) <= last_step]


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(new, 0o644)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def _error(around: BaseException | None) -> str | None:
    """The error that is ending the run; not one that was being handled `around` the run."""
    error = sys.exception()
    return None if error is None or error is around else f"{type(error).__name__}: {error}"


class MetricLogger(Callback):
    """Sends every number of a report as `train/...` or `validation/...`, with its step.

    Subclasses say how to open a run, log numbers and close it.
    """

    _is_open = False

    def on_train_begin(self, run: RunInfo) -> None:
        self._around = sys.exception()
        self._open(run)
        self._is_open = True

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self._log(numbers(info, "train"), info["step"])

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self._log(numbers(info, "validation"), info["step"])

    def on_train_end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._close(failed=_error(self._around) is not None)

    def _open(self, run: RunInfo) -> None:
        raise NotImplementedError

    def _log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _close(self, failed: bool) -> None:
        raise NotImplementedError


class TensorBoardLogger(MetricLogger):
    """Writes event files for TensorBoard with `tensorboardX`, which needs neither torch nor
    tensorflow. A run that is resumed in the same directory hides the steps that it does again.

    Raises `ImportError` where tensorboardX is missing.
    """

    def __init__(self, log_dir: str | Path):
        self.log_dir = str(log_dir)
        self._package = _required("tensorboardX", "tensorboard")

    def _open(self, run: RunInfo) -> None:
        first = run.first_step
        self._writer = self._package.SummaryWriter(
            logdir=self.log_dir,
            purge_step=first + 1 if first else None,
            flush_secs=10,
            # Files are named by the second: a quick resumption must not write into the same one.
            filename_suffix=f".{first}",
        )
        config = json.dumps(_plain(settings(run)), indent=1)
        self._writer.add_text("config", f"```json\n{config}\n```", first)

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _close(self, failed: bool) -> None:
        self._writer.close()


class WandbLogger(MetricLogger):
    """Sends a run to Weights & Biases; `init` goes to `wandb.init`.

    To go on with a run after an interruption give it an id: `id="run1", resume="allow"`.
    Raises `ImportError` where wandb is missing.
    """

    def __init__(self, project: str, **init: Any):
        self.project, self.init = project, init
        self._package = _required("wandb", "wandb")

    def _open(self, run: RunInfo) -> None:
        init = {"name": run.name or None, **self.init}
        init["config"] = {**_plain(settings(run)), **init.get("config", {})}
        self._run = self._package.init(project=self.project, **init)
        # An axis of our own: wandb's drops what a resumed run does again.
        self._run.define_metric("step", hidden=True)
        for part in ("train/*", "validation/*"):
            self._run.define_metric(part, step_metric="step")

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TrackioLogger(MetricLogger):
    """Sends a run to Trackio, by default a database on this machine; `init` goes to `trackio.init`.

    A run that is resumed goes on with the Trackio run of the same name. Raises `ImportError` where
    trackio is missing.
    """

    def __init__(self, project: str, **init: Any):
        self.project, self.init = project, init
        self._package = _required("trackio", "trackio")

    def _open(self, run: RunInfo) -> None:
        resume = "allow" if run.first_step else "never"
        init = {"name": run.name or None, "resume": resume, **self.init}
        init["config"] = {**_plain(settings(run)), **init.get("config", {})}
        self._run = self._package.init(project=self.project, **init)

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def _close(self, failed: bool) -> None:
        self._run.finish()


def _required(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: pip install 'mlxterp[{extra}]'") from error
