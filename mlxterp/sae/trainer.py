"""The training loop, the same for every kind of coder: it knows no text and no language model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae import memory
from mlxterp.sae.callbacks import Advice, Callback, StopTraining
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.demand import Training
from mlxterp.sae.interrupts import Requests, stop_requests
from mlxterp.sae.loggers import JSONLLogger
from mlxterp.sae.metadata import training_facts
from mlxterp.sae.parallel import Parallel, divide, first_before_others
from mlxterp.sae.run import Plan, Run, TrainingError
from mlxterp.sae.run_state import last_checkpoint
from mlxterp.sae.visualization import fragment, plot_training

logger = logging.getLogger("mlxterp")

SAMPLE_TOKENS = 65_536
LOG_FILE = "log.jsonl"
STOPS = (None, "SIGINT", "SIGTERM")
SHARED = ("batch_size", "num_epochs", "seed")

__all__ = ["Trainer", "TrainingError", "TrainingResult", "train_together"]


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind besides the coder: the reports, in order, and the final figures."""

    training: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]
    firing_rates: np.ndarray
    n_tokens: int
    seconds: float

    @classmethod
    def of(cls, run: Run) -> TrainingResult:
        """The result of a run."""
        n_tokens = run.step * run.plan.batch_size
        reports = tuple(run.training), tuple(run.validated)
        return cls(*reports, run.firing_rates, n_tokens, run.elapsed)

    def plot(self, axes: Any = None) -> Any:
        """A matplotlib figure of loss, FVU, L0 and dead features; see
        `visualization.plot_training`."""
        return plot_training(self.training, self.validation, axes)

    def __repr__(self) -> str:
        figures = f"tokens={self.n_tokens:,}, seconds={self.seconds:.0f}"
        for last in (self.validation or self.training)[-1:]:
            dead = f"{100 * last['dead']:.1f}%"
            figures += f", fvu={last['fvu']:.4f}, l0={last['l0']:.1f}, dead={dead}"
        return f"TrainingResult({figures})"

    def _repr_html_(self) -> str:
        facts = training_facts(self.training, self.validation)
        facts.append(("time", f"{self.seconds:,.0f} seconds"))
        return fragment("facts.html", title="TrainingResult", facts=facts)


class Trainer:
    """Trains one coder on one dataset, in place.

    With a `checkpoint_dir` the whole state of the run is written there every
    `config.checkpoint_every` steps, at the end, and when the run is interrupted (Ctrl-C, SIGTERM)
    or cannot go on; beside it a log, `log.jsonl`.

    In a program that `mlx.launch` runs as several processes, `parallel` divides the work among
    them: by tokens, `"data"`, or by features, `"features"`. All end with the same coder; the first
    alone writes files and has callbacks.
    """

    def __init__(
        self,
        config: SAEConfig,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        parallel: Parallel | None = None,
    ):
        self.config = config
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.callbacks = tuple(callbacks)
        self.parallel: Parallel | None = parallel

    def fit(
        self,
        coder: SparseCoder,
        dataset: ActivationDataset,
        validation: ActivationDataset | None = None,
        resume: bool = False,
    ) -> TrainingResult:
        """Train on every batch of every epoch and fold the normalisation into the coder.

        With `resume` the run goes on from its last checkpoint, if there is one, to the result that
        it would have had. Raises `ValueError` for a checkpoint of other data or another config, for
        a directory that holds checkpoints where `resume` is not set, and
        `TrainingError` where several steps in a row have a loss or gradient that is not finite;
        such steps never change the parameters.
        """
        with first_before_others(self.parallel):
            saved = find_checkpoint(self.checkpoint_dir, resume)
        check_memory([(coder, self.config)], dataset, validation)
        sample, plan = prepare(dataset, self.config)
        division = divide(self.parallel, coder, plan.batch_size)
        run = Run(self.config, coder, dataset, validation, plan, sample,
                  with_usual(self.callbacks, self.checkpoint_dir), self.checkpoint_dir,
                  division=division)  # fmt: skip
        del sample
        if saved is not None:
            run.restore(saved)
        drive([run], dataset, plan)
        return TrainingResult.of(run)


def train_together(
    coders: Mapping[str, tuple[SparseCoder, SAEConfig]],
    dataset: ActivationDataset,
    validation: ActivationDataset | None = None,
    checkpoint_dir: str | Path | None = None,
    callbacks: Mapping[str, Sequence[Callback]] | None = None,
    resume: bool = False,
    parallel: Parallel | None = None,
) -> dict[str, TrainingResult]:
    """Train several coders, in place, on one stream of activations.

    Each sees every batch, and reads and writes its own sites of the dataset's. They may differ in
    everything but `batch_size`, `num_epochs` and `seed`, which order the data; raises `ValueError`
    where these differ. Checkpoints go to a directory of each name in `checkpoint_dir`. A coder has
    the result that it would have alone, except where a callback's side effects say otherwise.
    """
    configs = {name: config for name, (_, config) in coders.items()}
    for field in SHARED:
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"{field} must be the same for coders trained together, got {values}.")
    if not configs:
        raise ValueError("There is no coder to train.")
    directories = {
        name: None if checkpoint_dir is None else Path(checkpoint_dir) / name for name in coders
    }
    with first_before_others(parallel):
        saved = {name: find_checkpoint(path, resume) for name, path in directories.items()}
    check_memory(list(coders.values()), dataset, validation)
    sample, plan = prepare(dataset, next(iter(configs.values())))
    runs = []
    for name, (coder, config) in coders.items():
        own = with_usual((callbacks or {}).get(name, ()), directories[name])
        division = divide(parallel, coder, plan.batch_size)
        run = Run(
            config, coder, dataset, validation, plan, sample, own, directories[name], name, division
        )
        if (path := saved[name]) is not None:
            run.restore(path)
        runs.append(run)
    del sample
    drive(runs, dataset, plan)
    return {run.name: TrainingResult.of(run) for run in runs}


def find_checkpoint(directory: Path | None, resume: bool) -> Path | None:
    """The checkpoint to go on from; raises `ValueError` where `resume` says otherwise."""
    if directory is None:
        if resume:
            raise ValueError("resume=True needs a checkpoint_dir.")
        return None
    saved = last_checkpoint(directory)
    if saved is not None and not resume:
        raise ValueError(
            f"{directory} holds {saved.name} of an earlier run: pass resume=True to go on with "
            "it, or another checkpoint_dir."
        )
    return saved


def with_usual(callbacks: Sequence[Callback], directory: Path | None) -> tuple[Callback, ...]:
    """The callbacks, advice, and a log where there is a directory for it."""
    log = () if directory is None else (JSONLLogger(directory / LOG_FILE),)
    return (*log, Advice(), *callbacks)


def check_memory(
    coders: Sequence[tuple[SparseCoder, SAEConfig]],
    dataset: ActivationDataset,
    validation: ActivationDataset | None,
) -> None:
    """Warns where the device has hardly enough memory; raises `MemoryError` where it has not."""
    data = [part for part in (dataset, validation) if part is not None]
    training = Training(
        tuple(coders),
        batch_size=min(max(config.batch_size for _, config in coders), len(dataset)),
        width=dataset.columns.width,
        training_tokens=len(dataset),
        validation_tokens=0 if validation is None else len(validation),
        dataset_bytes=sum(part.bytes_to_come for part in data),
    )
    memory.check(training.needed(), smaller=training.smaller)


def prepare(dataset: ActivationDataset, config: SAEConfig) -> tuple[mx.array, Plan]:
    """A sample `[n_tokens, width]` of the data, and how the data are gone through."""
    # The sample first, because it finds the tokens that are left out of data kept in memory.
    batches, size = [], 0
    for batch in dataset.batches(config.batch_size, seed=config.seed):
        batches.append(batch)
        size += len(batch)
        if size >= SAMPLE_TOKENS:
            break
    batch_size = min(config.batch_size, len(dataset))
    plan = Plan(batch_size, len(dataset) // batch_size, config.num_epochs, config.seed)
    return mx.concatenate(batches), plan


def drive(runs: Sequence[Run], dataset: ActivationDataset, plan: Plan) -> None:
    """Give every batch to all runs until they end; whatever stops them, save them first."""
    _check_same_start(runs)
    with contextlib.ExitStack() as ends:  # each is called, also when another one fails
        for run in runs:
            for callback in run.callbacks:
                ends.callback(_end, callback)
        try:
            with stop_requests() as requests:
                for run in runs:
                    run.begin()
                _steps(runs, dataset, plan, requests)
                for run in runs:
                    run.finish()
        except BaseException as error:
            for run in runs:
                _rescue(run, error)
            raise


def _end(callback: Callback) -> None:
    with contextlib.suppress(StopTraining):  # which there is no more to do about
        callback.on_train_end()


def _check_same_start(runs: Sequence[Run]) -> None:
    steps = [run.step for run in runs]
    bounds = [*steps, *(-step for step in steps)]
    if runs[0].division.maxima(bounds) != bounds:
        raise ValueError(
            f"The processes start from different steps, this one from {steps}: checkpoint_dir must "
            "be one that all of them can read."
        )


def _steps(runs: Sequence[Run], dataset: ActivationDataset, plan: Plan, requests: Requests) -> None:
    step = min(run.step for run in runs)
    divided = runs[0].division.size > 1
    interval = min(run.config.log_every for run in runs) if divided else 1
    going = _agree(runs, requests)
    while step < plan.n_steps and going:
        epoch, start = divmod(step, plan.steps_per_epoch)
        for batch in _ahead(
            dataset.batches(
                plan.batch_size, epoch=epoch, seed=plan.seed, start=start, drop_last=True
            )
        ):
            for run in going:
                if run.step == step:
                    run.advance(batch)
            step += 1
            if step % interval == 0:
                going = _agree(runs, requests)
            if not going:
                return
        # Tokens that had to be left out can end an epoch a few batches early.
        step = (epoch + 1) * plan.steps_per_epoch
        going = _agree(runs, requests)
        for run in going:
            run.skip_to(step)


def _agree(runs: Sequence[Run], requests: Requests) -> list[Run]:
    """The runs that go on, the same in all processes; raises what a signal to one of them asks."""
    ended = [int(run.ended) for run in runs]
    stop, *ended = runs[0].division.maxima([STOPS.index(requests.pending), *ended])
    for run, flag in zip(runs, ended, strict=True):
        run.ended, run.all_stop = bool(flag), bool(stop)
    if stop:
        requests.pending = STOPS[stop]
        requests.raise_if_pending()
    return [run for run in runs if not run.ended]


def _ahead(batches: Iterator[mx.array]) -> Iterator[mx.array]:
    """The same batches, each begun while the one before it is in use."""
    previous = None
    for batch in batches:
        mx.async_eval(batch)
        if previous is not None:
            yield previous
        previous = batch
    if previous is not None:
        yield previous


def _rescue(run: Run, reason: BaseException) -> None:
    """Save a run that is being stopped; the reason for that must not be lost in another error."""
    together = run.all_stop or isinstance(reason, TrainingError)
    if run.division.divides_features and not together:
        logger.error("Step %d of the run is not saved: one process ends alone.", run.step)
        return
    try:
        run.save()
        if together:
            # A launcher ends the first process, which may still be writing, when another one ends.
            run.division.maxima([0])
    except (OSError, RuntimeError) as error:  # a full disk; a process that is gone
        logger.error("Step %d of the run could not be saved: %s", run.step, error)
