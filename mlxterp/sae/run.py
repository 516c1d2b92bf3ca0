"""One coder in training: everything that changes from step to step, and how it is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxterp.sae.activation_functions import NOT_TRAINED
from mlxterp.sae.callbacks import Callback, RunInfo, StopTraining
from mlxterp.sae.coder import SparseCoder, check_sized
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.dead_features import (
    dead_features,
    firing_rates,
    half_window,
    next_half,
    resample,
    rows_to_revive,
)
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.initialization import Normalisation, balanced_norms, fold, initial_params
from mlxterp.sae.objective import Objective
from mlxterp.sae.parallel import UNDIVIDED, Undivided
from mlxterp.sae.run_state import read_checkpoint, save_checkpoint
from mlxterp.sae.schedules import active_features, learning_rate, sparsity_share
from mlxterp.sae.step import State, Step, StepBuilder, initial_state, zero_sums

logger = logging.getLogger("mlxterp")

MAX_SKIPPED_IN_A_ROW = 10
VALIDATION_TOKENS = 100_000
VALIDATIONS = 10
LARGE = 1 << 23  # entries of a matrix


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class Plan:
    """How a dataset is gone through: the same for all runs that share it."""

    batch_size: int
    steps_per_epoch: int
    n_epochs: int
    seed: int

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.n_epochs * self.steps_per_epoch


class Run:
    """The training of one coder, in place, one step at a time.

    Between two calls of `advance` the run is consistent, and can be saved and taken up again.
    """

    def __init__(
        self,
        config: SAEConfig,
        coder: SparseCoder,
        dataset: ActivationDataset,
        validation: ActivationDataset | None,
        plan: Plan,
        sample: mx.array,
        callbacks: Sequence[Callback] = (),
        directory: Path | None = None,
        name: str = "",
        division: Undivided = UNDIVIDED,
    ):
        check_sized(coder, "Training")
        if coder.activation_name in NOT_TRAINED:
            raise ValueError(f"Coders with {coder.activation_name} are used, not trained.")
        self.config, self.coder, self.plan = config, coder, plan
        self.dataset, self.validation = dataset, validation
        self.callbacks = tuple(callbacks) if division.is_first else ()
        self.directory, self.name, self.division = directory, name, division
        columns = dataset.columns
        self.normalisation = Normalisation.measure(
            sample, columns, config.normalize_activations, balanced_norms(coder)
        )
        params = initial_params(coder, self.normalisation, columns, config, sample)
        self.state = division.shard(initial_state(params, coder, config))
        mx.eval(self.state)
        self.builder = StepBuilder(
            coder, columns, self.normalisation, config, plan.n_steps, division
        )
        self.steps: dict[tuple[int, int], Step] = {}
        self.half_window = half_window(config.dead_window, plan.n_steps, plan.batch_size)
        self.rng = np.random.default_rng(config.seed)
        self.training: list[dict[str, Any]] = []
        self.validated: list[dict[str, Any]] = []
        self.n_dead = 0
        self.step = 0
        self.ended = False
        self.all_stop = False  # every process of the run is asked to, at the same step
        self.between_steps = True
        self.skipped_in_a_row = 0
        self.saved = (0, False)  # step and whether ended; before the first there is nothing to save
        self.seconds = 0.0
        self.started = self.last_read = time.perf_counter()

    # What happens to it

    def begin(self) -> None:
        """Start the clock and tell the callbacks."""
        config, n_steps = self.config, self.plan.n_steps
        if config.warmup_steps > n_steps // 10:
            logger.warning("Warm-up is capped at %d steps, a tenth of the run.", n_steps // 10)
        self.started = self.last_read = time.perf_counter()
        info = RunInfo(
            n_steps,
            self.plan.batch_size,
            self.step,
            self.coder.d_in,
            self.coder.d_out,
            self.coder.n_features,
            config.to_dict(),
            self.directory,
            self.name,
            len(self.coder.blocks),
        )
        self._notify("on_train_begin", info)

    def advance(self, batch: mx.array) -> None:
        """One step on a batch `[batch_size, width]`, and what is due after it."""
        self.between_steps = False
        rate = learning_rate(self.step, self.plan.n_steps, self.config)
        share = sparsity_share(self.step, self.plan.n_steps, self.config)
        self.state = self._step()(self.state, batch, mx.array(rate), mx.array(share))
        mx.async_eval(self.state)
        self.step += 1
        if self.step % self.half_window == 0:
            self.state = next_half(self.state)
            self.n_dead = self._count_dead()
        self._resample(batch)
        # All reports are made before the first callback, which may interrupt, hears of one.
        events: list[tuple[str, Any]] = [("on_step_end", self.step)]
        if self.step % self.config.log_every == 0:
            events += self._read()
        if self.step % self._validation_interval == 0 and self.step < self.plan.n_steps:
            events += self._validate()
        self.between_steps = True
        for event, argument in events:
            self._notify(event, argument)
        self._check_progress()
        if self._is_due(self.config.checkpoint_every) and self.step < self.plan.n_steps:
            self.save()

    def skip_to(self, step: int) -> None:
        """Go on as if the steps up to this one had been made, for which there were no batches."""
        self.step = max(self.step, step)

    def finish(self) -> None:
        """Read what is left to be read, measure the result, fold it into the coder and save."""
        if not self.ended:
            self.skip_to(self.plan.n_steps)
        events = self._read()
        if not self.validated or self.validated[-1]["step"] != self.step:
            events += self._validate()
        for event, argument in events:
            self._notify(event, argument)
        self._check_progress()
        self._fold()
        self.save()

    def _notify(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            try:
                getattr(callback, event)(*arguments)
            except StopTraining as reason:
                logger.info("The run ends at step %d: %s", self.step, reason)
                self.ended = True

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # Its parts

    def _step(self) -> Step:
        """The step for the present number of active and of dead features."""
        n = self.coder.n_features
        k = active_features(self.step, self.plan.n_steps, self.coder.d_in, n, self.config)
        n_revived = rows_to_revive(self.n_dead, n) if self.config.auxiliary_coefficient else 0
        if (k, n_revived) not in self.steps:
            step = self.builder.make(k, n_revived, lean=self._is_lean)
            self.steps[k, n_revived] = step if self._is_lean else mx.compile(step)
        return self.steps[k, n_revived]

    @property
    def _is_lean(self) -> bool:
        # On the CPU MLX compiles for half a minute and hardly gains anything; on a GPU a large step
        # compiled as a whole holds every array twice.
        return mx.default_device() == mx.Device(mx.cpu) or self.coder.W_dec.size >= LARGE

    def _count_dead(self) -> int:
        n = dead_features(self.state, self.config.dead_neuron_threshold).sum()
        total: Any = self.division.sum_over_features(n).item()
        return int(total)

    def _resample(self, batch: mx.array) -> None:
        """Give features that are dead a new start; not in the last two windows of the run."""
        steps_left = self.plan.n_steps - self.step
        if self._is_due(self.config.resample_dead_every) and steps_left > 4 * self.half_window:
            x, y = self.builder.split(batch)
            objective = Objective(self.coder, self.config, self.config.k, division=self.division)
            y_hat = objective.reconstruct(self.state["params"], x)
            state, threshold = self._whole_state(), self.config.dead_neuron_threshold
            self.state = self.division.shard(resample(state, x, y, y_hat, threshold, self.rng))

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """Read the metric sums and make a report of their means, unless every step was skipped."""
        sums = {name: total.item() for name, total in self.state["sums"].items()}
        self.state = {**self.state, "sums": zero_sums()}
        self.n_dead = self._count_dead()
        self.skipped_in_a_row = int(self.state["skipped_in_a_row"].item())
        if sums["n"] == 0:
            return []
        now = time.perf_counter()
        report = {
            "step": self.step,
            "tokens": self.step * self.plan.batch_size,
            "loss": sums["loss"] / sums["n"],
            "fvu": sums["error"] / max(sums["energy"], 1e-30),
            "l0": sums["l0"] / sums["n"],
            "dead": self.n_dead / self.coder.n_features,
            "learning_rate": learning_rate(self.step - 1, self.plan.n_steps, self.config),
            "tokens_per_second": sums["n"] * self.plan.batch_size / (now - self.last_read),
            "skipped": int(self.state["skipped"].item()),
            "skipped_tokens": self.dataset.n_skipped,
        }
        if self.config.penalty is not None:
            report["sparsity_coefficient"] = float(np.exp(self.state["log_coefficient"].item()))
        self.training.append(report)
        self.last_read = now
        return [("on_train_loss_report", report)]

    def _check_progress(self) -> None:
        n = self.skipped_in_a_row
        if n >= min(MAX_SKIPPED_IN_A_ROW, self.plan.n_steps):
            raise TrainingError(
                f"At step {self.step} the last {n} steps had a loss or gradient that is not "
                "finite. Lower learning_rate, or look at the activations."
            )

    @property
    def _validation_interval(self) -> int:
        return self.config.validate_every or max(1, self.plan.n_steps // VALIDATIONS)

    def _validate(self) -> list[tuple[str, dict[str, Any]]]:
        """Measure the coder, as it would be if the run ended now, on held-out data."""
        if self.validation is None:
            return []
        self._fold()
        measured = fidelity(self.coder, self.validation, max_tokens=VALIDATION_TOKENS)
        report = {"step": self.step, "tokens": self.step * self.plan.batch_size}
        dead = self.n_dead / self.coder.n_features
        self.validated.append({**report, **measured.to_dict(), "dead": dead})
        self.last_read = time.perf_counter()
        return [("on_val_loss_report", self.validated[-1])]

    def _fold(self) -> None:
        fold(
            self.division.gather(self.state["params"]),
            self.state["averaged"],
            self.normalisation,
            self.dataset.columns,
            self.coder,
        )

    # Its results

    @property
    def firing_rates(self) -> np.ndarray:
        """The share of the last window's tokens on which each feature fired, `[n_features]`."""
        return firing_rates(self._whole_state())

    @property
    def elapsed(self) -> float:
        """Seconds in training, those before an interruption included."""
        return self.seconds + time.perf_counter() - self.started

    # How it is kept

    def _whole_state(self) -> State:
        """The state, with all features."""
        return self.division.gather(self.state)

    def _sites(self) -> dict[str, list[str]]:
        return {"reads": list(self.coder.reads.names), "writes": list(self.coder.writes.names)}

    def _arrays(self) -> dict[str, mx.array]:
        return {**dict(tree_flatten(self._whole_state())), "data_mean": self.normalisation.mean}

    def save(self) -> None:
        """Write everything that the rest of the run depends on, if there is a place for it."""
        if self.directory is None or self.step == 0 or not self.between_steps:
            return
        if self.saved == (self.step, self.ended):
            return
        arrays = self._arrays()
        # What is gathered must be asked for by all, in one order.
        mx.eval(arrays)
        run = {
            "step": self.step,
            "n_steps": self.plan.n_steps,
            "n_dead": self.n_dead,
            "ended": self.ended,
            "seconds": self.elapsed,
            "random_state": self.rng.bit_generator.state,
            "training": self.training,
            "validation": self.validated,
            "config": self.config.to_dict(),
            "sites": self._sites(),
        }
        self.saved = (self.step, self.ended)
        if not self.division.is_first:
            return
        path = save_checkpoint(self.directory, self.step, run, arrays, self.config.checkpoints_kept)
        self._notify("on_checkpoint", path)

    def restore(self, saved: Path) -> None:
        """Take over the state written by `save`; raises `ValueError` where it is of another run."""
        shapes = {name: tuple(array.shape) for name, array in self._arrays().items()}
        run, arrays = read_checkpoint(saved, shapes)
        theirs, ours = run["config"], self.config.to_dict()
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        if changed:
            raise ValueError(f"{saved} was written with another config; different: {changed}.")
        if (wrote := run.get("sites")) not in (None, self._sites()):
            raise ValueError(f"{saved} was written by a coder between other sites: {wrote}.")
        same_mean = mx.array_equal(arrays.pop("data_mean"), self.normalisation.mean).item()
        if not same_mean or run["n_steps"] != self.plan.n_steps:
            raise ValueError(f"{saved} was written in a run on other data.")
        # Parts without arrays are not in the file.
        saved_state = self.division.shard(tree_unflatten(list(arrays.items())))
        self.state = {**self.state, **saved_state}
        self.step, self.n_dead, self.seconds = run["step"], run["n_dead"], run["seconds"]
        self.ended = run["ended"]
        self.rng.bit_generator.state = run["random_state"]
        self.training, self.validated = run["training"], run["validation"]
        self.saved = (self.step, self.ended)
