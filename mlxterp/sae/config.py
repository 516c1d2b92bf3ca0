"""Every setting of a training run: one name, one meaning, defaults written once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np

from mlxterp.sae.activation_functions import ACTIVATION_FUNCTIONS
from mlxterp.sites import canonical_component

RECOMMENDED_TRAINING_TOKENS = 3_000_000
RECOMMENDED_STEPS = 3_000
RECOMMENDED_RATE = 6e-3  # for 2,048 features and batches of 1,024

ActivationName = Literal["topk", "batch_topk", "abs_topk", "jumprelu", "relu", "gated"]
Penalty = Literal["l1", "l0", "tanh", "quadratic"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
BiasInit = Literal["mean", "geometric_median"]
SkipInit = Literal["zero", "least_squares"]
Precision = Literal["float32", "bfloat16"]
CHOICES = {
    "activation_function": ActivationName,
    "lr_schedule": LearningRateSchedule,
    "bias_init": BiasInit,
    "skip_init": SkipInit,
    "precision": Precision,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Settings of a coder and of its training; frozen, checked when made.

    `SAEConfig()` holds the documented defaults. The recipe that `config=None` stands for is chosen
    by `SAEConfig.recommended` from the width of the site and the amount of data.
    """

    expansion_factor: float = 16
    """Features per input dimension: `n_features = round(expansion_factor * d_in)`."""
    activation_function: ActivationName = "topk"
    """What makes the code sparse: a fixed number of active features on each token (`topk`, and
    `abs_topk` with signs) or on average (`batch_topk`), or a penalty (`jumprelu`, `relu`, `gated`).
    The modules in `mlxterp.sae.activation_functions` say how each works."""
    k: int = 100
    """Features that may be active on one token; for those with a penalty, the mean number that the
    run steers to, unless `target_l0` or `lambda_sparse` says otherwise."""
    learning_rate: float = 1e-4
    """Peak learning rate of Adam."""
    batch_size: int = 256
    """Tokens per step."""
    num_epochs: int = 10
    """Passes over the training tokens."""
    lambda_sparse: float = 0.0
    """Coefficient of the sparsity penalty that is added to the loss. With a penalised activation
    function and 0 it is found by the run, so that `target_l0` is met."""
    sparsity_penalty: Penalty | None = None
    """`l1`, `l0` (a count with a straight-through gradient), `tanh` (a soft count), or `quadratic`
    (the squared relative distance of the count from `target_l0`). `None`: for `jumprelu`, which
    alone has the last two, `quadratic` or, with a `lambda_sparse`, `l0`; otherwise `l1`."""
    target_l0: float | None = None
    """The mean number of active features to which the penalty's coefficient is steered; `None`:
    `k`, or no steering where `lambda_sparse` is above 0."""
    sparsity_warmup_steps: int = 1000
    """Steps over which the penalty is raised from nothing, at most a tenth of the run."""
    k_anneal_steps: int = 0
    """Steps over which `topk` and its kin come down to `k`, in stages, from as many active features
    as the input has dimensions; at most half of the run."""
    matryoshka_prefixes: tuple[float, ...] = ()
    """Shares of the features, ascending, such as `(1/16, 1/4)`, each of which must reconstruct by
    itself as well; empty: only all of them together (arXiv 2503.17547)."""
    bandwidth: float = 0.5
    """Width of the kernel that estimates the gradient of JumpReLU's thresholds, in units of the
    normalised activations (mean squared norm = width)."""
    initial_threshold: float | None = None
    """JumpReLU's thresholds at the start, in the same units; `None`: such that the first code has
    the L0 that is wanted."""
    normalize_activations: bool = True
    """Train on activations that are centred and scaled to a mean squared norm equal to their width;
    the saved coder has this folded into its arrays and works on raw activations."""
    tied_weights: bool = False
    """Use the decoder's rows as the encoder's rows."""
    decoder_unit_norm: bool = True
    """Keep decoder rows at norm 1, and remove from their gradient what points along them. Otherwise
    penalties are weighted by the norms, and those are folded into the code at the end where the
    activation function permits it."""
    bias_init: BiasInit = "mean"
    """Where the decoder's bias starts: the mean of the data or, less moved by outliers, their
    geometric median."""
    skip: bool = False
    """Of transcoders: what is read also goes to the target through one matrix, so that the features
    need to explain only what is not linear (arXiv 2501.18823)."""
    skip_init: SkipInit = "zero"
    """Where that matrix starts: `zero`, or what is best without any feature, `least_squares`."""
    component_weights: Mapping[str, float] | Sequence[float] | None = None
    """Of coders that write several sites: how much the error at each counts, by the name of the
    site, its component or its model, or in the order of the sites; `None`: all alike. Only the
    proportions count."""
    scale_init: bool = True
    """Scale the encoder at the start so that the first code reconstructs as well as it can."""
    precision: Precision = "float32"
    """Type of the products in a step; parameters and optimiser stay float32. `bfloat16` is for
    GPUs: MLX's CPU back-end is slow with it."""
    dead_neuron_threshold: float = 1e-6
    """Firing rate, as a fraction of the tokens in the window, below which a feature is dead."""
    dead_window: int | None = None
    """Tokens over which firing is counted; `None`: a twentieth of the run, 10 million at most."""
    auxiliary_coefficient: float = 1 / 32
    """Weight of the auxiliary loss by which dead features learn the residual (arXiv 2406.04093)."""
    resample_dead_every: int = 10_000
    """Steps between resamplings of features that are still dead; 0: never."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    lr_schedule: LearningRateSchedule = "linear"
    """After warm-up: `constant`; `linear` (constant, then down to zero over the last fifth of the
    run); `cosine` (down to zero over the whole run)."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    checkpoint_every: int = 5000
    """Steps between checkpoints, where the trainer has a directory for them; 0: only at the end."""
    checkpoints_kept: int = 2
    """How many of the newest checkpoints are kept."""
    validation_split: float = 0.05
    """Share of the data held out, by document, and never trained on."""
    validate_every: int | None = None
    """Steps between two measurements on the held-out data; `None`: a tenth of the run. The last
    one is always at the end."""
    log_every: int = 100
    """Steps between two readings of the metrics."""
    seed: int = 42
    """Seed of the initial values, of the order of the data and of resampling."""
    normalize_input: InitVar[bool | None] = None
    """Another spelling of `normalize_activations`."""

    def __post_init__(self, normalize_input: bool | None) -> None:
        if normalize_input is not None:
            object.__setattr__(self, "normalize_activations", normalize_input)
        if isinstance(self.matryoshka_prefixes, list):  # as JSON has it
            object.__setattr__(self, "matryoshka_prefixes", tuple(self.matryoshka_prefixes))
        for field in ("expansion_factor", "learning_rate", "bandwidth"):
            self._check(field, "a number above 0", lambda x: _is_number(x) and x > 0)
        allowed = "None or a number above 0"
        self._check("initial_threshold", allowed, lambda x: x is None or (_is_number(x) and x > 0))
        for field in ("lambda_sparse", "auxiliary_coefficient", "gradient_clip"):
            self._check(field, "a number >= 0", lambda x: _is_number(x) and x >= 0)
        for field in ("validation_split", "dead_neuron_threshold"):
            self._check(field, "in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
        for field in ("k", "batch_size", "num_epochs", "log_every", "checkpoints_kept"):
            self._check(field, "a whole number >= 1", lambda x: _is_whole(x) and x >= 1)
        for field in ("resample_dead_every", "warmup_steps", "sparsity_warmup_steps",
                      "k_anneal_steps", "checkpoint_every", "seed"):  # fmt: skip
            self._check(field, "a whole number >= 0", lambda x: _is_whole(x) and x >= 0)
        for field in ("dead_window", "validate_every"):
            allowed = "None or a whole number >= 1"
            self._check(field, allowed, lambda x: x is None or (_is_whole(x) and x >= 1))
        for field, kind in CHOICES.items():
            choices = get_args(kind)
            self._check(field, f"one of {choices}", lambda x, among=choices: x in among)
        prefixes = self.matryoshka_prefixes
        inside = isinstance(prefixes, tuple) and all(_is_number(x) and 0 < x < 1 for x in prefixes)
        ascending = inside and list(prefixes) == sorted(set(prefixes))
        self._check("matryoshka_prefixes", "ascending shares in (0, 1)", lambda _: ascending)
        self._check_component_weights()
        self._check_penalty()

    def _check_component_weights(self) -> None:
        weights = self.component_weights
        if isinstance(weights, (list, np.ndarray)):
            object.__setattr__(self, "component_weights", tuple(weights))
        elif isinstance(weights, Mapping):
            object.__setattr__(self, "component_weights", dict(weights))
        allowed = "None, or numbers >= 0 that are not all 0, by site or in their order"

        def holds(given: Any) -> bool:
            values = given.values() if isinstance(given, Mapping) else given
            right = isinstance(given, (Mapping, tuple)) and all(map(_is_number, values))
            return given is None or (right and min(values, default=-1) >= 0 < max(values))

        self._check("component_weights", allowed, holds)

    def weights_of(self, sites: tuple[str, ...]) -> tuple[float, ...] | None:
        """The `component_weights` of sites by their names; `None` where there are none.

        Raises `ValueError` where they do not fit the sites.
        """
        given = self.component_weights
        if given is None:
            return None
        found: list[float] = []
        if isinstance(given, Mapping):
            known, used = {canonical_component(name): w for name, w in given.items()}, set()
            for site in sites:
                model, _, rest = site.rpartition(":")
                keys = [site, rest, rest.rpartition(".")[2], model]
                matching = [key for key in keys if key in known]
                used |= set(matching[:1])
                found += [known[key] for key in matching[:1]]
            fits = used == set(known)
        else:
            found, fits = list(given), True
        if not fits or len(found) != len(sites):
            raise ValueError(
                f"component_weights must hold one weight for each of {list(sites)}, got {given!r}."
            )
        return tuple(found)

    def _check_penalty(self) -> None:
        function = ACTIVATION_FUNCTIONS[self.activation_function]
        self._check(
            "target_l0",
            "None or a number above 0, and None for functions whose L0 is k",
            lambda x: x is None or (not function.selects and _is_number(x) and x > 0),
        )
        self._check(
            "sparsity_penalty",
            f"None or one of {function.penalties} for {self.activation_function!r}",
            lambda x: x is None or x in function.penalties,
        )

    @property
    def penalty(self) -> Penalty | None:
        """The sparsity penalty in use; `None` where there is none."""
        function: Any = ACTIVATION_FUNCTIONS[self.activation_function]
        if function.selects and not self.lambda_sparse:
            return None
        if self.sparsity_penalty is None and self.lambda_sparse and "l0" in function.penalties:
            return "l0"
        return self.sparsity_penalty or function.penalties[0]

    @property
    def wanted_l0(self) -> float:
        """The mean number of active features that the run aims at."""
        return self.k if self.target_l0 is None else self.target_l0

    @property
    def steers_l0(self) -> bool:
        """Whether the penalty's coefficient follows the number of active features."""
        if self.penalty is None or self.penalty == "quadratic":
            return False
        return self.target_l0 is not None or not self.lambda_sparse

    def _check(self, field: str, allowed: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, field)
        if not holds(value):
            raise ValueError(f"{field} must be {allowed}, got {value!r}.")

    def n_features(self, d_in: int) -> int:
        """The number of features for inputs of width `d_in`.

        Raises `ValueError` where `k` exceeds it.
        """
        n = round(self.expansion_factor * d_in)
        field = "k" if self.target_l0 is None else "target_l0"
        selects = ACTIVATION_FUNCTIONS[self.activation_function].selects
        if self.wanted_l0 > n and (selects or not self.lambda_sparse or self.target_l0):
            raise ValueError(
                f"{field} must be at most the number of features, {n} "
                f"(expansion_factor {self.expansion_factor} x width {d_in}), got {self.wanted_l0}."
            )
        return n

    @classmethod
    def recommended(cls, d_in: int, n_tokens: int, **settings: Any) -> SAEConfig:
        """The recipe for a site of width `d_in` and `n_tokens` tokens of data.

        From the sweeps in `benchmarks/RESULTS.md`, measured at width 128: BatchTopK, which
        reconstructs better than TopK at the same L0; the number of passes; a batch size that makes
        about 3,000 steps; a learning rate that falls with the square root of the number of
        features (as in arXiv 2406.04093) and of small batches; and an auxiliary loss that is strong
        enough to revive features in a short run, and begins with those that fire a few times in the
        window. `settings` take the place of the recipe's, and the rest is chosen to go with them.
        """
        passes = min(20, max(1, round(RECOMMENDED_TRAINING_TOKENS / max(1, n_tokens))))
        chosen = {"num_epochs": passes, "expansion_factor": cls.expansion_factor, **settings}
        seen = chosen["num_epochs"] * n_tokens
        batch_size = 1 << round(math.log2(max(seen / RECOMMENDED_STEPS, 1)))
        chosen = {"batch_size": min(max(batch_size, 256), 4096), **chosen}
        share = min(1.0, chosen["batch_size"] / 1024)
        rate = RECOMMENDED_RATE * math.sqrt(2048 / (chosen["expansion_factor"] * d_in) * share)
        usual = {
            "activation_function": "batch_topk",
            "k": min(max(d_in // 8, min(8, d_in)), 64),
            "learning_rate": float(f"{min(rate, 8e-3):.2g}"),
            "auxiliary_coefficient": 1 / 4,
            "dead_neuron_threshold": float(f"{min(max(1e-6, 120 / max(1, seen)), 1e-4):.1g}"),
            "resample_dead_every": 0,
            "warmup_steps": min(100, seen // chosen["batch_size"] // 20),
        }
        return cls(**{**usual, **chosen})

    def replace(self, **changes: Any) -> Self:
        """A copy with other values for some fields."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        values = asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `ValueError` for a name that is not a field."""
        known = {field.name for field in fields(cls)} | {"normalize_input"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown settings {unknown}; known are {sorted(known)}.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(SAEConfig):
    """Settings of a transcoder: those of an SAE, with other defaults."""

    expansion_factor: float = 8
    k: int = 50
    learning_rate: float = 5e-5
    num_epochs: int = 15


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(SAEConfig):
    """Settings of a crosscoder: those of an SAE, with other defaults.

    `expansion_factor` counts features per dimension of one site. Features are selected, and
    penalised, by their values times the norms of their decoder rows, summed over the sites.
    """

    expansion_factor: float = 24
    k: int = 150
    batch_size: int = 128
    num_epochs: int = 12


@dataclass(frozen=True, kw_only=True)
class CrossLayerConfig(TranscoderConfig):
    """Settings of a cross-layer transcoder: those of a transcoder, for every layer.

    `expansion_factor` and `k` count features of one layer. Decoder rows are free, and weigh in
    selections and penalties as those of crosscoders do.
    """

    decoder_unit_norm: bool = False
    resample_dead_every: int = 0
