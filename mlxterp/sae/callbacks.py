"""What happens around the steps of a run: a progress bar, and whatever a user adds."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


class Callback:
    """Receives what a run reports; override what is wanted.

    A report is a plain dict: `step`, `tokens`, `loss`, `fvu`, `l0`, `dead` (share of the features),
    `learning_rate`, `tokens_per_second`, `skipped` (steps with a gradient that was not finite).
    """

    def on_train_begin(self, n_steps: int, batch_size: int, first_step: int) -> None:
        """Called once, before the first step; `first_step` is above 0 when a run is resumed."""

    def on_step_end(self, step: int) -> None:
        """Called after each step, before its report; the device may still be running it."""

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """Called every `log_every` steps with means over those steps."""

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """Called after each evaluation on held-out data."""

    def on_train_end(self) -> None:
        """Called once, also when the run fails."""


class ProgressBar(Callback):
    """One bar that counts tokens and shows loss, FVU, L0, dead features and the held-out FVU."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._batch_size = 0
        self._shown: dict[str, str] = {}

    def on_train_begin(self, n_steps: int, batch_size: int, first_step: int) -> None:
        self._batch_size = batch_size
        self._bar = tqdm(
            total=n_steps * batch_size,
            initial=first_step * batch_size,
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
