"""One training step: gradients, clipping, Adam, decoder norm, firing counts, and the steering of
sparsity. No Python value is read in it; metrics are added up until somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxterp.sae import gpu_kernels
from mlxterp.sae.activation_functions import TopK
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dead_features import dead_features, initial_counts
from mlxterp.sae.initialization import Normalisation
from mlxterp.sae.losses import squared_error
from mlxterp.sae.objective import Objective
from mlxterp.sae.optimizer import Arrays, adam, initial_moments, with_norm
from mlxterp.sae.parallel import UNDIVIDED, Undivided

State = dict[str, Any]
Step = Callable[[State, mx.array, mx.array, mx.array], State]

# Of the controller: the first coefficient as a share of what an active value is worth; how strongly
# it answers at once to log(L0 / wanted L0), and how fast its logarithm follows, per step and per
# run; how many steps the L0 is averaged over. Chosen by runs of 600 to 6,000 steps.
FIRST_SHARE = {"l1": 0.01, "tanh": 0.1, "l0": 0.02}
PROPORTIONAL, INTEGRAL, INTEGRAL_OF_RUN, AVERAGED_STEPS = 0.5, 0.03, 20.0, 10


def initial_state(params: dict[str, mx.array], coder: SparseCoder, config: SAEConfig) -> State:
    """Parameters, moments, counters, metric sums, and the state of what is averaged or steered."""
    return {
        "params": params,
        **initial_moments(params),
        **initial_counts(coder.n_features),
        "averaged": coder.activation_function.averaged(),
        "log_coefficient": mx.array(_first_coefficient(coder, config)).log(),
        "mean_l0": mx.array(_wanted_l0(coder, config)),
        "skipped": mx.array(0.0),
        "skipped_in_a_row": mx.array(0.0),
        "sums": zero_sums(),
    }


def zero_sums() -> dict[str, mx.array]:
    """Metric sums over no step."""
    return {name: mx.array(0.0) for name in ("loss", "error", "energy", "l0", "n")}


def _wanted_l0(coder: SparseCoder, config: SAEConfig) -> float:
    """The number of active features that the run steers to, those of all blocks together."""
    return float(config.wanted_l0 * len(coder.blocks))


def _first_coefficient(coder: SparseCoder, config: SAEConfig) -> float:
    """Where the coefficient is steered from: well below what a value of typical size is worth.

    With a mean squared norm of d and L0 of l, a feature of value sqrt(d / l) lowers the error by
    about 1 / l.
    """
    if config.lambda_sparse:
        return config.lambda_sparse
    if config.penalty in (None, "quadratic"):
        return 1.0
    wanted = _wanted_l0(coder, config)
    value = (wanted / coder.d_out) ** 0.5 if config.penalty == "l1" else 1
    return FIRST_SHARE[config.penalty] / wanted * value


@dataclass(frozen=True)
class StepBuilder:
    """Makes the functions `step(state, batch [n, width], learning rate, sparsity share) -> state`.

    One for every `k` and every number of dead features that the auxiliary loss looks at.
    """

    coder: SparseCoder
    columns: Columns
    normalisation: Normalisation
    config: SAEConfig
    n_steps: int
    division: Undivided = UNDIVIDED

    def split(self, batch: mx.array) -> tuple[mx.array, mx.array]:
        """What the coder reads and what it shall write, normalised, from a batch `[n, width]`."""
        data = self.normalisation.apply(batch)
        reads, writes = self.coder.reads.names, self.coder.writes.names
        return self.columns.take(data, reads), self.columns.take(data, writes)

    def make(self, k: int, n_revived: int, lean: bool = False) -> Step:
        """The step as one function without side effects, to be compiled or not.

        With `lean` it is done in several evaluations, which needs less memory, and takes arrays out
        of the state that it is given.
        """
        differentiate, take_norm = self._differentiate(k, n_revived), self._with_norm
        count = self._count
        if lean and mx.default_device() != mx.Device(mx.cpu):
            differentiate, take_norm = mx.compile(differentiate), mx.compile(take_norm)
            count = mx.compile(count)
        # Only the kernels of GPUs leave everything as it is where the norm is not finite.
        waits = lean and not gpu_kernels.available()

        def step(state: State, batch: mx.array, rate: mx.array, share: mx.array) -> State:
            found, gradients = differentiate(state, batch, share)
            if waits:
                mx.eval(found, gradients)
            gradients, norm = take_norm(gradients, state["params"])
            if waits:
                mx.eval(gradients, norm)
                if not mx.isfinite(norm).item():
                    return {**state, **_skips(state, mx.array(False))}
            counted = count(state, found, norm, float(len(batch)))
            params, moments = adam(
                state["params"], state, gradients, norm, rate,
                self.config.gradient_clip, self.config.decoder_unit_norm, lean=lean,
            )  # fmt: skip
            return {**state, "params": params, **moments, **counted}

        return step

    def _differentiate(
        self, k: int, n_revived: int
    ) -> Callable[[State, mx.array, mx.array], tuple[Arrays, Arrays]]:
        """The function `(state, batch, share) -> (what was found, gradients)`."""
        objective = Objective(self.coder, self.config, k, n_revived, self.division)
        origin = self.columns.take(self.normalisation.origin, self.coder.writes.names)

        def differentiate(state: State, batch: mx.array, share: mx.array):
            x, y = self.split(batch)
            dead = dead_features(state, self.config.dead_neuron_threshold)
            coefficient = self._coefficient(state, share)
            (loss, found), gradients = mx.value_and_grad(objective)(
                state["params"], x, y, dead, coefficient
            )
            return {**found, "loss": loss, "energy": squared_error(y, origin)}, gradients

        return differentiate

    def _with_norm(self, gradients: Arrays, params: Arrays) -> tuple[Arrays, mx.array]:
        return with_norm(gradients, params, self.config.decoder_unit_norm, self.division)

    def _count(self, state: State, found: Arrays, norm: mx.array, n_tokens: float) -> State:
        """What a step changes but for parameters and moments: nothing if `norm` is not finite."""
        good = mx.isfinite(norm)
        changed = _where(good, self._counted(state, found, n_tokens), state)
        return {**changed, **_skips(state, good)}

    def _counted(self, state: State, found: Arrays, n_tokens: float) -> State:
        """What a step adds to counts, sums and averages, and how it steers."""
        read = {**found, "n": mx.array(1.0)}
        function = self.coder.activation_function
        averaged = {}
        if isinstance(function, TopK):
            averaged = {"averaged": function.average(state["averaged"], found["smallest"])}
        return {
            "fired": state["fired"] + found["firings"],
            "counted": state["counted"] + n_tokens,
            "sums": {name: total + read[name] for name, total in state["sums"].items()},
            **averaged,
            **self._steer(state, found["l0"]),
        }

    def _coefficient(self, state: State, share: mx.array) -> mx.array:
        """The penalty's coefficient in this step; `share` comes from the warm-up."""
        log = state["log_coefficient"]
        if self.config.steers_l0:
            log = log + PROPORTIONAL * self._log_excess(state["mean_l0"])
        return share * mx.exp(log)

    def _steer(self, state: State, l0: mx.array) -> dict[str, mx.array]:
        if not self.config.steers_l0:
            return {}
        mean = state["mean_l0"] + (l0 - state["mean_l0"]) / AVERAGED_STEPS
        rate = min(INTEGRAL, INTEGRAL_OF_RUN / self.n_steps)
        change = rate * mx.clip(self._log_excess(mean), -1, 1)
        return {"mean_l0": mean, "log_coefficient": state["log_coefficient"] + change}

    def _log_excess(self, l0: mx.array) -> mx.array:
        return mx.log(mx.maximum(l0, 1e-3) / _wanted_l0(self.coder, self.config))


def _skips(state: State, good: mx.array) -> State:
    skipped = mx.where(good, 0.0, 1.0)
    return {
        "skipped": state["skipped"] + skipped,
        "skipped_in_a_row": (state["skipped_in_a_row"] + 1) * skipped,
    }


def _where(condition: mx.array, new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """For every entry of `new`, that one or the one in `old`."""
    return {
        name: _where(condition, value, old[name])
        if isinstance(value, dict)
        else mx.where(condition, value, old[name])
        for name, value in new.items()
    }
