"""Small training runs, and what it takes to interrupt and compare them."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxterp.sae import ActivationDataset, Callback, SAEConfig
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.run import Run
from mlxterp.sae.trainer import Trainer, TrainingResult, prepare
from tests.fakes import SITE, FakeSource
from tests.sae import kinds
from tests.sae.synthetic import planted

# Features that die, are revived by the auxiliary loss and resampled: all that a run has to restore.
EVENTFUL = {
    "resample_dead_every": 4, "dead_neuron_threshold": 0.05, "auxiliary_coefficient": 0.2,
}  # fmt: skip


def config(**options) -> SAEConfig:
    defaults = {
        "expansion_factor": 4, "k": 3, "learning_rate": 3e-3, "batch_size": 32, "num_epochs": 2,
        "log_every": 3, "checkpoint_every": 5, "resample_dead_every": 0, "dead_window": 128,
        "dead_neuron_threshold": 0.02, "validate_every": 9, "warmup_steps": 0,
    }  # fmt: skip
    return SAEConfig(**{**defaults, **options})


def tokens(n=330, width=8, seed=0) -> np.ndarray:
    return planted(n, n_features=16, width=width, active=2, seed=seed)[1]


def in_memory(n=330, seed=0, kind="") -> tuple[ActivationDataset, ActivationDataset]:
    """Of the sites that a coder of a kind is between, or of one site."""
    if kind:
        return kinds.dataset(n, seed).split(0.1)
    return ActivationDataset.from_activations(tokens(n, seed=seed)).split(0.1)


def streaming(kind="") -> tuple[ActivationDataset, ActivationDataset]:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), size=17)) for _ in range(14)]
    sites = dict(zip(kinds.SITES.names, kinds.SITES.widths, strict=True)) if kind else {SITE: 8}
    source = FakeSource(width=8, further=sites)
    dataset = ActivationDataset.from_texts(
        source, texts, list(sites), context_length=16, buffer_bytes=64 * 4 * sum(sites.values())
    )
    assert not dataset.in_memory
    return dataset.split(0.1)


def coder_for(dataset: ActivationDataset, settings: SAEConfig, kind: str = "") -> SparseCoder:
    """A coder of a kind, or one of all sites of a dataset."""
    if kind:
        return kinds.untrained(kind, settings)
    columns, name = dataset.columns, settings.activation_function
    n_features = settings.n_features(columns.width)
    return SparseCoder(columns, columns, n_features, activation_function=name, k=settings.k)


def run_of(
    settings: SAEConfig, dataset: ActivationDataset, validation=None, kind="", **options
) -> Run:
    """A run before its first step."""
    sample, plan = prepare(dataset, settings)
    coder = coder_for(dataset, settings, kind)
    return Run(settings, coder, dataset, validation, plan, sample, **options)


def fit(
    data, settings, directory=None, callbacks=(), resume=False, kind=""
) -> tuple[SparseCoder, TrainingResult]:
    training, validation = data
    coder = coder_for(training, settings, kind)
    result = Trainer(settings, directory, callbacks).fit(coder, training, validation, resume)
    return coder, result


def differences(a: SparseCoder, b: SparseCoder) -> list[str]:
    """The arrays, those of the activation function included, that differ in any bit."""
    ours, theirs = (dict(tree_flatten(coder.parameters())) for coder in (a, b))
    assert set(ours) == set(theirs) and "W_dec" in ours
    return [name for name in ours if not mx.array_equal(ours[name], theirs[name])]


def without_times(reports) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in reports]


def assert_same(found, expected) -> None:
    """Coders and results of two fits are the same to the last bit."""
    assert not differences(found[0], expected[0])
    assert without_times(found[1].training) == without_times(expected[1].training)
    assert found[1].validation == expected[1].validation
    np.testing.assert_array_equal(found[1].firing_rates, expected[1].firing_rates)


class Interrupt(Callback):
    """Raises at one event, from step `at` on."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt, event="step"):
        self.at, self.error, self.event, self.step = at, error, event, 0

    def _maybe(self, event: str, step: int) -> None:
        if event == self.event and step >= self.at:
            raise self.error(f"at step {step}")

    def on_train_begin(self, run):
        self._maybe("begin", run.first_step)

    def on_step_end(self, step):
        self.step = step
        self._maybe("step", step)

    def on_train_loss_report(self, info):
        self._maybe("report", info["step"])

    def on_val_loss_report(self, info):
        self._maybe("validation", info["step"])

    def on_checkpoint(self, path):
        self._maybe("checkpoint", self.step)
