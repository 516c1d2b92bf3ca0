"""The training loop, the same for every kind of coder: it knows no text and no language model."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxterp.sae.callbacks import Callback
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals import fidelity
from mlxterp.sae.run_state import last_checkpoint, read_checkpoint, save_checkpoint
from mlxterp.sae.step import (
    Normalisation,
    Step,
    dead_features,
    initial_params,
    initial_state,
    make_step,
    prepare,
    resample,
    zero_sums,
)

logger = logging.getLogger("mlxterp")

MAX_DEAD_WINDOW = 10_000_000
MAX_SKIPPED_IN_A_ROW = 10
SAMPLE_TOKENS = 65_536
VALIDATION_TOKENS = 100_000
COMPILED_ON_CPU_FROM = 5000


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind besides the coder: the reports, in order, and the final figures."""

    training: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]
    firing_rates: np.ndarray
    n_tokens: int
    seconds: float

    def __repr__(self) -> str:
        figures = f"tokens={self.n_tokens:,}, seconds={self.seconds:.0f}"
        for last in (self.validation or self.training)[-1:]:
            dead = f"{100 * last['dead']:.1f}%"
            figures += f", fvu={last['fvu']:.4f}, l0={last['l0']:.1f}, dead={dead}"
        return f"TrainingResult({figures})"


def learning_rate(step: int, n_steps: int, config: SAEConfig) -> float:
    """The rate at a 0-based step: linear warm-up, then the schedule of the config."""
    warmup = min(config.warmup_steps, n_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "cosine":
        done = (step - warmup) / max(1, n_steps - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_schedule == "linear":
        return config.learning_rate * min(1.0, (n_steps - step) / max(1, n_steps // 5))
    return config.learning_rate


def _auxiliary_k(n_dead: int, d_out: int) -> int:
    """Dead features used per token: all of them up to `d_out / 2`, rounded up to a power of 8 so
    that few different steps are compiled."""
    if n_dead == 0:
        return 0
    return min(8 ** math.ceil(math.log(max(n_dead, 8), 8) - 1e-9), max(1, d_out // 2))


class Trainer:
    """Trains one coder on one dataset, in place.

    With a `checkpoint_dir` the whole state of the run is written there every
    `config.checkpoint_every` steps, at the end, and when the run is interrupted or cannot go on;
    the last two are kept.
    """

    def __init__(
        self,
        config: SAEConfig,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.config = config
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.callbacks = tuple(callbacks)

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
        directory = self.checkpoint_dir
        if resume and directory is None:
            raise ValueError("resume=True needs a checkpoint_dir.")
        saved = None if directory is None else last_checkpoint(directory)
        if saved is not None and not resume:
            raise ValueError(
                f"{directory} holds {saved.name} of an earlier run: pass resume=True to go on with "
                "it, or another checkpoint_dir."
            )
        run = _Run(self.config, coder, dataset, validation, self.callbacks)
        if saved is not None:
            run.restore(saved)
        try:
            run.execute(directory)
        except (KeyboardInterrupt, TrainingError):
            if directory is not None:
                run.save(directory)
            raise
        finally:
            with contextlib.ExitStack() as ends:  # each is called, also when another one fails
                for callback in reversed(self.callbacks):
                    ends.callback(callback.on_train_end)
        return run.result()


class _Run:
    """The state of one call of `Trainer.fit`."""

    def __init__(
        self,
        config: SAEConfig,
        coder: SparseCoder,
        dataset: ActivationDataset,
        validation: ActivationDataset | None,
        callbacks: Sequence[Callback],
    ):
        self.config, self.coder = config, coder
        self.dataset, self.validation = dataset, validation
        self.callbacks = callbacks
        # First of all, because it finds the tokens that are left out of data kept in memory.
        sample = self._sample()
        self.batch_size = min(config.batch_size, len(dataset))
        self.steps_per_epoch = len(dataset) // self.batch_size
        self.n_steps = config.num_epochs * self.steps_per_epoch
        self.window = self._window()
        columns = dataset.columns
        self.normalisation = Normalisation.measure(sample, columns, config.normalize_activations)
        self.state = initial_state(
            initial_params(coder, self.normalisation, columns, config.tied_weights, config.seed)
        )
        self.rng = np.random.default_rng(config.seed)
        self.compiled: dict[int, Step] = {}
        self.training: list[dict[str, Any]] = []
        self.validated: list[dict[str, Any]] = []
        self.n_dead = 0
        self.step = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def notify(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _window(self) -> int:
        wanted = self.config.dead_window
        if wanted is None:
            wanted = min(self.n_steps * self.batch_size // 20, MAX_DEAD_WINDOW)
        # Two halves of whole steps: firing is counted in one while the other one is remembered.
        return 2 * max(1, round(wanted / 2 / self.batch_size)) * self.batch_size

    def _sample(self) -> mx.array:
        batches, size = [], 0
        for batch in self.dataset.batches(self.config.batch_size, seed=self.config.seed):
            batches.append(batch)
            size += len(batch)
            if size >= SAMPLE_TOKENS:
                break
        return mx.concatenate(batches)

    def execute(self, directory: Path | None) -> None:
        if directory is not None:
            self._note()
        if self.config.warmup_steps > self.n_steps // 10:
            logger.warning("Warm-up is capped at %d steps, a tenth of the run.", self.n_steps // 10)
        self.notify("on_train_begin", self.n_steps, self.batch_size, self.step)
        self.started = self.last_read = time.perf_counter()
        while self.step < self.n_steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            for batch in self.dataset.batches(
                self.batch_size, epoch=epoch, seed=self.config.seed, start=start, drop_last=True
            ):
                self._one_step(batch)
                if self.step % self.steps_per_epoch:
                    self._complete(directory)
            # Tokens that had to be left out can end an epoch a few batches early.
            self.step = (epoch + 1) * self.steps_per_epoch
            self._read()
            self._validate()
            self._complete(directory)
        self._fold()
        if directory is not None:
            self.save(directory)

    def _one_step(self, batch: mx.array) -> None:
        rate = learning_rate(self.step, self.n_steps, self.config)
        self.state = self._step()(self.state, batch, mx.array(rate))
        mx.async_eval(self.state)
        self.step += 1
        self.notify("on_step_end", self.step)
        if self.step % (self.window // 2 // self.batch_size) == 0:
            self._rotate_window()
        self._resample(batch)
        if self.step % self.config.log_every == 0:
            self._read()

    def _step(self) -> Step:
        """The step for the present number of dead features."""
        k = min(_auxiliary_k(self.n_dead, self.coder.d_out), self.coder.n_features)
        k = k if self.config.auxiliary_coefficient else 0
        if k not in self.compiled:
            step = make_step(self.coder, self.dataset.columns, self.normalisation, self.config, k)
            on_cpu = mx.default_device() == mx.Device(mx.cpu)
            # On the CPU compiling takes half a minute: short runs are faster without.
            worth_it = not on_cpu or self.n_steps >= COMPILED_ON_CPU_FROM
            self.compiled[k] = mx.compile(step) if worth_it else step
        return self.compiled[k]

    def _rotate_window(self) -> None:
        for name in ("fired", "counted"):
            self.state[f"{name}_before"] = self.state[name]
            self.state[name] = mx.zeros_like(self.state[name])
        self.n_dead = self._count_dead()

    def _count_dead(self) -> int:
        n: Any = dead_features(self.state, self.config.dead_neuron_threshold).sum().item()
        return int(n)

    def _resample(self, batch: mx.array) -> None:
        """Give features that are dead a new start; not in the last two windows of the run."""
        every = self.config.resample_dead_every
        tokens_left = (self.n_steps - self.step) * self.batch_size
        if every and self.step % every == 0 and tokens_left > 2 * self.window:
            x, y = prepare(batch, self.dataset.columns, self.normalisation, self.coder)
            threshold = self.config.dead_neuron_threshold
            self.state = resample(self.state, x, y, self.coder, threshold, self.rng)

    def _read(self) -> None:
        """Read the metric sums, report their means, and stop a run that makes no progress."""
        sums = {name: total.item() for name, total in self.state["sums"].items()}
        self.state["sums"] = zero_sums()
        self.n_dead = self._count_dead()
        skipped = int(self.state["skipped_in_a_row"].item())
        if skipped >= min(MAX_SKIPPED_IN_A_ROW, self.n_steps):
            raise TrainingError(
                f"At step {self.step} the last {skipped} steps had a loss or gradient that is not "
                "finite. Lower learning_rate, or look at the activations."
            )
        if sums["n"] == 0:
            return
        now = time.perf_counter()
        self.training.append(
            {
                "step": self.step,
                "tokens": self.step * self.batch_size,
                "loss": sums["loss"] / sums["n"],
                "fvu": sums["error"] / max(sums["energy"], 1e-30),
                "l0": sums["l0"] / sums["n"],
                "dead": self.n_dead / self.coder.n_features,
                "learning_rate": learning_rate(self.step - 1, self.n_steps, self.config),
                "tokens_per_second": sums["n"] * self.batch_size / (now - self.last_read),
                "skipped": int(self.state["skipped"].item()),
            }
        )
        self.last_read = now
        self.notify("on_train_loss_report", self.training[-1])

    def _validate(self) -> None:
        """Measure the coder, as it would be if the run ended now, on held-out data."""
        if self.validation is not None:
            self._fold()
            measured = fidelity(self.coder, self.validation, max_tokens=VALIDATION_TOKENS)
            report = {"step": self.step, "tokens": self.step * self.batch_size}
            dead = self.n_dead / self.coder.n_features
            self.validated.append({**report, **measured.to_dict(), "dead": dead})
            self.notify("on_val_loss_report", self.validated[-1])
            self.last_read = time.perf_counter()

    def _fold(self) -> None:
        self.normalisation.fold(self.state["params"], self.dataset.columns, self.coder)

    def result(self) -> TrainingResult:
        before = self.state["fired_before"]
        if self.state["counted_before"].item() == 0:
            before = mx.zeros_like(before)
        fired = self.state["fired"] + before
        counted = self.state["counted"] + self.state["counted_before"]
        rates = mx.where(mx.isfinite(fired), fired / mx.maximum(counted, 1), 0)
        return TrainingResult(
            tuple(self.training),
            tuple(self.validated),
            np.array(rates),
            self.step * self.batch_size,
            self.seconds + time.perf_counter() - self.started,
        )

    def _complete(self, directory: Path | None) -> None:
        """Note the state between two steps, and save it if due; for runs with checkpoints only."""
        if directory is None:
            return
        self._note()
        every = self.config.checkpoint_every
        if every and self.step % every == 0 and self.step < self.n_steps:
            self.save(directory)

    def _note(self) -> None:
        """Note the state between two steps, to which an interrupted step goes back."""
        self.completed = (
            dict(self.state),
            {
                "step": self.step,
                "n_steps": self.n_steps,
                "n_dead": self.n_dead,
                "seconds": self.seconds + time.perf_counter() - self.started,
                "random_state": self.rng.bit_generator.state,
                "training": list(self.training),
                "validation": list(self.validated),
            },
        )

    def save(self, directory: Path) -> None:
        """Write everything that the rest of the run depends on, as of the last complete step."""
        state, run = self.completed
        arrays = {**dict(tree_flatten(state)), "data_mean": self.normalisation.mean}
        save_checkpoint(directory, run["step"], {**run, "config": self.config.to_dict()}, arrays)

    def restore(self, saved: Path) -> None:
        """Take over the state written by `save`; raises `ValueError` where it is of another run."""
        mean = {"data_mean": self.normalisation.mean}
        shapes = {
            name: tuple(array.shape) for name, array in [*tree_flatten(self.state), *mean.items()]
        }
        run, arrays = read_checkpoint(saved, shapes)
        theirs, ours = run["config"], self.config.to_dict()
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        if changed:
            raise ValueError(f"{saved} was written with another config; different: {changed}.")
        same_mean = mx.array_equal(arrays.pop("data_mean"), self.normalisation.mean).item()
        if not same_mean or run["n_steps"] != self.n_steps:
            raise ValueError(f"{saved} was written in a run on other data.")
        self.state = tree_unflatten(list(arrays.items()))
        self.step, self.n_dead, self.seconds = run["step"], run["n_dead"], run["seconds"]
        self.rng.bit_generator.state = run["random_state"]
        self.training, self.validated = run["training"], run["validation"]
