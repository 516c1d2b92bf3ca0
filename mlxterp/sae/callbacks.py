"""What happens around the steps of a run: a progress bar, advice, and whatever a user adds."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

FIXED_L0 = ("topk", "abs_topk")
MANY_DEAD = 0.1
FIRINGS_TO_JUDGE = 10
STEPS_TO_JUDGE = 100
MUCH_LEFT_OUT = 0.01
L0_FACTOR = 1.5
FVU_RISE = 1.25
HELD_OUT_RISE = 1.1
SAME_L0 = 1.05


class StopTraining(Exception):
    """Raised by a callback to end a run as if it were complete: the coder is kept and saved."""


@dataclass(frozen=True)
class RunInfo:
    """What a run tells its callbacks before the first step."""

    n_steps: int
    """Steps of the whole run."""
    batch_size: int
    """Tokens per step."""
    first_step: int
    """Steps that were done before; above 0 when a run is resumed."""
    d_in: int
    d_out: int
    n_features: int
    config: dict[str, Any]
    """The settings, as plain values."""
    checkpoint_dir: Path | None = None
    name: str = ""
    n_blocks: int = 1
    """Parts of the coder that have `k` or `target_l0` active features each."""


class Callback:
    """Receives what a run reports; override what is wanted.

    A report is a plain dict. Of training, with means since the one before: `step`, `tokens`,
    `loss`, `fvu`, `l0`, `dead` (share of the features), `learning_rate`, `tokens_per_second`,
    `sparsity_coefficient` (where there is a penalty), and, counted from the start of the run,
    `skipped` (steps with a loss or gradient that was not finite) and `skipped_tokens` (rows that
    were not finite and were left out). Of validation: `step`, `tokens`, `fvu`, `l0`, `dead`,
    `n_tokens`. More may be added.

    Any method may raise `StopTraining`.
    """

    def on_train_begin(self, run: RunInfo) -> None:
        """Called once, before the first step."""

    def on_step_end(self, step: int) -> None:
        """Called after each step, before its report; the device may still be running it."""

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """Called every `log_every` steps with means over those steps."""

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """Called after each evaluation on held-out data."""

    def on_checkpoint(self, path: Path) -> None:
        """Called after each checkpoint, with its directory."""

    def on_train_end(self) -> None:
        """Called once, also when the run fails."""


class ProgressBar(Callback):
    """One bar that counts tokens and shows loss, FVU, L0, dead features and the held-out FVU."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._batch_size = 0
        self._shown: dict[str, str] = {}

    def on_train_begin(self, run: RunInfo) -> None:
        self._batch_size = run.batch_size
        self._shown = {}
        self._bar = tqdm(
            total=run.n_steps * run.batch_size,
            initial=run.first_step * run.batch_size,
            desc="training",
            unit="tok",
            unit_scale=True,
        )

    def on_step_end(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._batch_size)

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self._shown |= {
            "loss": f"{info['loss']:.4f}",
            "FVU": f"{info['fvu']:.4f}",
            "L0": f"{info['l0']:.1f}",
            "dead": f"{100 * info['dead']:.1f}%",
        }
        self._show()

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self._shown["held-out FVU"] = f"{info['fvu']:.4f}"
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self) -> None:
        if self._bar is not None:
            self._bar.close()


class EarlyStopping(Callback):
    """Stops a run when `patience` validation reports in a row bring no better `metric`.

    Better is below (`mode="min"`) or above (`mode="max"`) the best value so far by more than
    `min_delta`. NaN is never better, so that it counts towards `patience`. A run that is resumed
    counts anew. Raises `ValueError` where a report does not hold the metric.
    """

    def __init__(
        self,
        metric: str = "fvu",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
    ):
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a whole number >= 1, got {patience!r}.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be a number >= 0, got {min_delta!r}.")
        self.metric, self.patience, self.min_delta, self.mode = metric, patience, min_delta, mode
        self._start(n_steps=0)

    def _start(self, n_steps: int) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf
        self._without_gain, self._reports, self._n_steps, self._step = 0, 0, n_steps, 0

    def on_train_begin(self, run: RunInfo) -> None:
        self._start(run.n_steps)

    def on_step_end(self, step: int) -> None:
        self._step = step

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        if self.metric not in info:
            raise ValueError(f"metric must be one of {sorted(info)}, got {self.metric!r}.")
        value, self._reports = info[self.metric], self._reports + 1
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self._without_gain = value, 0
            return
        self._without_gain += 1
        if self._without_gain >= self.patience:
            raise StopTraining(
                f"{self.metric} has not been better than {self.best:.4g} for {self.patience} "
                "validation reports."
            )

    def on_train_end(self) -> None:
        if self._n_steps and self._step >= self._n_steps and not self._reports:
            warnings.warn(
                "EarlyStopping saw no validation report: hold out data with validation_split.",
                stacklevel=2,
            )


def _means(values: list[tuple[float, float]]) -> tuple[float, float]:
    fvu, l0 = (sum(column) / len(column) for column in zip(*values, strict=True))
    return fvu, l0


def _lowest(measured: list[tuple[float, float]], l0: float) -> float:
    """The lowest FVU of those `(FVU, L0)` that had no more active features than now."""
    return min((fvu for fvu, then in measured if then <= SAME_L0 * l0), default=math.inf)


class Advice(Callback):
    """Warns, once for each kind of trouble, and says what to do; a good run is silent.

    It waits until the figures can be believed: half of the run for dead features and FVU, nine
    tenths for L0, and runs of less than a hundred steps are not judged. FVU is compared between
    tenths of the run, so that noise is not taken for a rise, and only where L0 has not come down,
    which raises it.
    """

    def on_train_begin(self, run: RunInfo) -> None:
        self._run, self._since = run, run.first_step
        self._given: set[str] = set()
        self._tenths: dict[int, list[tuple[float, float]]] = {}
        self._held_out: list[tuple[float, float]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        since, self._since = self._since, info["step"]
        self._look_at_dead(info)
        self._look_at_l0(info, since)
        self._look_at_fvu(info, since)
        self._look_at_left_out(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self._look_at_dead(info)
        self._look_at_l0(info, info["step"])
        self._look_at_held_out_fvu(info)

    def _look_at_dead(self, info: dict[str, Any]) -> None:
        dead = info.get("dead", 0.0)
        tokens = self._run.n_steps * self._run.batch_size
        window = self._run.config.get("dead_window") or tokens / 20
        firings = window * info.get("l0", 0.0) / self._run.n_features
        # The fewer firings of an average feature a window holds, the more rare ones seem dead.
        can_tell = firings * dead >= FIRINGS_TO_JUDGE
        if dead > MANY_DEAD and can_tell and self._is_past(0.5, info["step"]):
            self._warn(
                "dead",
                f"{100 * dead:.0f} % of features are dead",
                info,
                f"raise {self._now('auxiliary_coefficient')} or {self._now(self._l0_setting())}, "
                f"lower {self._now('learning_rate')}, or use fewer features: "
                f"{self._now('expansion_factor')}",
            )

    def _look_at_l0(self, info: dict[str, Any], since: int) -> None:
        wanted, l0 = self._wanted_l0(), info.get("l0", math.nan)
        far = wanted is not None and (l0 > L0_FACTOR * wanted or l0 * L0_FACTOR < wanted)
        if far and self._is_past(0.9, since):
            self._warn(
                "L0",
                f"L0 is {l0:.3g} where {wanted:g} is wanted",
                info,
                f"train longer ({self._now('num_epochs')}), change {self._now('learning_rate')}, "
                f"or set {self._now(self._l0_setting())} nearer to it",
            )

    def _look_at_fvu(self, info: dict[str, Any], since: int) -> None:
        """Look at the mean of a tenth of the run once it is complete."""
        tenth = 10 * since // self._run.n_steps
        if math.isfinite(fvu := info.get("fvu", math.nan)):
            self._tenths.setdefault(tenth, []).append((fvu, info.get("l0", 0.0)))
        complete = 10 * info["step"] >= (tenth + 1) * self._run.n_steps
        if tenth not in self._tenths or not (complete and self._is_past(0.5, since)):
            return
        means = {t: _means(values) for t, values in self._tenths.items()}
        mean, lowest = means[tenth][0], _lowest(list(means.values()), means[tenth][1])
        if mean > 1 or mean > FVU_RISE * lowest:
            what = f"FVU has risen from {lowest:.3g} to {mean:.3g}"
            if mean > 1:
                what = f"FVU is {mean:.3g}, worse than that of the mean activation,"
            remedy = f"lower {self._now('learning_rate')}, or look at the activations"
            self._warn("FVU", what, info, remedy)

    def _look_at_held_out_fvu(self, info: dict[str, Any]) -> None:
        fvu, l0 = info.get("fvu", math.nan), info.get("l0", 0.0)
        lowest = _lowest(self._held_out, l0)
        if self._is_past(0.5, info["step"]) and fvu > HELD_OUT_RISE * lowest:
            self._warn(
                "held-out FVU",
                f"The held-out FVU has risen from {lowest:.3g} to {fvu:.3g}",
                info,
                f"use more data, or fewer passes over it ({self._now('num_epochs')})",
            )
        self._held_out.append((fvu, l0))

    def _look_at_left_out(self, info: dict[str, Any]) -> None:
        skipped, rows = info.get("skipped", 0), info.get("skipped_tokens", 0)
        if skipped > MUCH_LEFT_OUT * info["step"] and self._is_past(0, info["step"]):
            self._warn(
                "skipped",
                f"{skipped} of {info['step']} steps had a loss or gradient that is not finite and "
                "were skipped",
                info,
                f"lower {self._now('learning_rate')}, or look at the activations",
            )
        epoch = self._run.n_steps * self._run.batch_size / self._run.config.get("num_epochs", 1)
        if rows > MUCH_LEFT_OUT * (epoch + rows):
            self._warn(
                "rows",
                f"{100 * rows / (epoch + rows):.1f} % of the activations are not finite and were "
                "left out",
                info,
                "run the model in float32, or train on another site",
            )

    def _is_past(self, share: float, step: int) -> bool:
        return step >= max(share * self._run.n_steps, STEPS_TO_JUDGE)

    def _l0_setting(self) -> str:
        return "target_l0" if self._run.config.get("target_l0") else "k"

    def _wanted_l0(self) -> float | None:
        """The L0 that the run is steered to; `None` where it is fixed by k, or free."""
        config = self._run.config
        if config.get("activation_function", "topk") in FIXED_L0:
            return None
        steered = None if config.get("lambda_sparse") else config.get("k")
        wanted = config.get("target_l0") or steered
        return None if wanted is None else wanted * self._run.n_blocks

    def _now(self, setting: str) -> str:
        return f"{setting} (now {self._run.config.get(setting)})"

    def _warn(self, kind: str, what: str, info: dict[str, Any], remedy: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            warnings.warn(f"{what} after {info['tokens']:,} tokens: {remedy}.", stacklevel=2)
