"""Other libraries for training SAEs, driven through their own trainers, for our benchmarks.

SAELens, sparsify and dictionary_learning are no dependency of mlxterp; PyTorch and they are
imported where they are used. `steps` gives training steps to be timed, `train` trained coders to be
measured.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIBRARIES = {
    "saelens": ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka"),
    "dictionary_learning": ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka"),
    "sparsify": ("topk",),
}
STEERED = {("dictionary_learning", "jumprelu")} | {
    (library, name)
    for library, names in LIBRARIES.items()
    for name in names
    if name in ("topk", "batchtopk", "matryoshka")
}
COEFFICIENTS = {
    ("saelens", "standard"): (2.0, 5.0, 8.0, 12.0),
    ("saelens", "gated"): (2.0, 5.0, 10.0, 20.0),
    ("saelens", "jumprelu"): (1.0, 2.0, 5.0, 10.0),
    ("dictionary_learning", "standard"): (0.1, 0.2, 0.3, 0.45),
    ("dictionary_learning", "gated"): (0.1, 0.2, 0.4, 0.8),
}
"""What trades error for sparsity where no L0 can be asked for, so that an L0 of about 8 to 64
results on the bundled model; SAELens recommends 5 for the first and third, and the published suite
of dictionary_learning has 0.012 to 0.08, which here leaves 80 and more active."""
MATRYOSHKA_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
FEWEST_STEPS = 2000

# Imported at the top of modules that are needed, never used by what runs here.
UNUSED = ("wandb", "datasets", "nnsight", "zstandard")


class _Placeholder:
    """Stands for anything that a module that is not installed would hold."""

    def __init__(self, *arguments: Any, **options: Any): ...


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for each package of `UNUSED` that is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        def anything(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Placeholder

        module = types.ModuleType(spec.name)
        vars(module)["__getattr__"] = anything
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


@contextlib.contextmanager
def _importing(device: str) -> Iterator[None]:
    """Their imports work without packages that they do not need here."""
    if device == "cpu":  # sparsify would pick its Triton kernels, which need a GPU
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    import torch
    import transformers  # noqa: F401  before the empty modules, since it looks for `datasets`

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' where PyTorch finds no GPU, got 'cuda'.")
    finder = _Unused()
    sys.meta_path.append(finder)
    try:
        with _silent():
            yield
    finally:
        sys.meta_path.remove(finder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class Shape(NamedTuple):
    """Tokens per step, width, features, active features."""

    batch: int
    d: int
    features: int
    k: int


Step = Callable[[], None]


def steps(shape: Shape, activations: np.ndarray, device: str = "cpu") -> dict[str, Step]:
    """One training step of each library by name, on a fixed batch `[batch, d]`.

    None has dead features to revive: within their windows nothing is dead, as in our step.
    """
    import torch

    source = _forever(torch.from_numpy(activations).to(device))
    made = {}
    for precision in ("fp32",) if device == "cpu" else ("fp32", "tf32", "bf16"):
        name = "SAELens" if device == "cpu" else f"SAELens {precision}"
        made[name] = saelens_step(shape, source, device, precision=precision)
        made[f"{name}, rescaling"] = saelens_step(
            shape, source, device, precision=precision, rescale=True
        )
        if precision != "bf16":  # torch.sparse.mm has no bfloat16
            made[f"{name}, sparse"] = saelens_step(
                shape, source, device, precision=precision, sparse=True
            )
    made["sparsify"] = sparsify_step(shape, source, device)
    made["sparsify, no renorm"] = sparsify_step(shape, source, device, renorm=False)
    made["dictionary_learning"] = dictionary_learning_step(shape, source, device)
    return made


def _forever(batch: Any) -> Iterator[Any]:
    while True:
        yield batch


def saelens_step(
    shape: Shape,
    source: Iterator[Any],
    device: str,
    *,
    sparse: bool = False,
    rescale: bool = False,
    precision: str = "fp32",
) -> Step:
    """`SAETrainer.step` of a TopK SAE and what its `fit` does around it."""
    with _importing(device):
        import torch
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
    config = TopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.features, k=shape.k, device=device,
        use_sparse_activations=sparse, rescale_acts_by_decoder_norm=rescale,
    )  # fmt: skip
    training = SAETrainerConfig(
        total_training_samples=10**12, train_batch_size_samples=shape.batch, device=device,
        lr_end=3e-5, autocast=precision == "bf16",
    )  # fmt: skip
    trainer = SAETrainer(training, TopKTrainingSAE(config), source)

    def step() -> None:
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        trainer.maybe_reset_sparsity()
        trainer.step(next(source))
        trainer.n_training_steps += 1

    return step


def sparsify_step(shape: Shape, source: Iterator[Any], device: str, *, renorm: bool = True) -> Step:
    """The step inside sparsify's `Trainer.fit` with Adam, which is no function of its own there.

    The lines of `step` stand for the ones of its hook and loop; everything that computes is theirs.
    Without `renorm` the decoder is neither normalised nor its gradient projected.
    """
    with _importing(device):
        import torch
        from sparsify import SparseCoder, SparseCoderConfig
        from transformers import get_linear_schedule_with_warmup
    config = SparseCoderConfig(num_latents=shape.features, k=shape.k, normalize_decoder=renorm)
    coder = SparseCoder(shape.d, config, device, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (shape.features / 2**14) ** 0.5)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1000, 10**6)
    since_fired = torch.zeros(shape.features, device=device, dtype=torch.long)
    fired = torch.zeros(shape.features, device=device, dtype=torch.bool)

    def step() -> None:
        torch.set_float32_matmul_precision("high")
        x = next(source)
        if renorm:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        if renorm:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[fired] = 0
            fired.zero_()

    return step


def dictionary_learning_step(shape: Shape, source: Iterator[Any], device: str) -> Step:
    """`TopKTrainer.update`."""
    with _importing(device):
        import torch
        from dictionary_learning.trainers import TopKTrainer
    trainer = TopKTrainer(
        steps=10**9, activation_dim=shape.d, dict_size=shape.features, k=shape.k, layer=0,
        lm_name="", device=device,
    )  # fmt: skip
    done = 0

    def step() -> None:
        nonlocal done
        torch.set_float32_matmul_precision("highest")
        trainer.update(done, next(source))
        done += 1

    return step


@dataclass
class Trained:
    """A coder as its library would save and load it, on raw activations.

    `arrays` are the library's: `W_enc`, `W_dec` `[n_features, d]`, `b_enc` (gated: others),
    `b_dec`; most subtract `b_dec` from the input. `encode` and `decode` are its own functions.
    """

    library: str
    architecture: str
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    device: str
    _encode: Callable[[Any], Any]
    _decode: Callable[[Any], Any]

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The code `[n, n_features]` of activations `[n, d]`."""
        return self._apply(self._encode, x)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """The reconstruction `[n, d]` of a code."""
        return self._apply(self._decode, z)

    def _apply(self, function: Callable[[Any], Any], array: np.ndarray) -> np.ndarray:
        import torch

        # Sparsify's trainer lowers the precision of products for the whole process.
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            given = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device)
            return function(given).float().cpu().numpy()


class Batches:
    """The same rows in the same order for every library: a new permutation in each pass."""

    def __init__(self, activations: Any, batch_size: int, n_tokens: int, seed: int):
        self.activations = activations
        self.batch_size = batch_size
        self.seed = seed
        self.per_pass = len(activations) // batch_size
        self.n_steps = n_tokens // batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.n_steps

    def rows(self, step: int) -> Any:
        """Which tokens the batch of a step holds."""
        import torch

        number, within = divmod(step, self.per_pass)
        if self._order[0] != number:
            rng = np.random.default_rng((self.seed, number))
            self._order = (number, rng.permutation(len(self.activations)))
        chosen = self._order[1][within * self.batch_size : (within + 1) * self.batch_size]
        return torch.from_numpy(chosen)

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.n_steps):
            rows = self.rows(step).to(self.activations.device)
            yield self.activations[rows]  # a copy: dictionary_learning divides it in place


def recipe(
    library: str, architecture: str, n_features: int, n_tokens: int, scaled: bool = True
) -> dict[str, Any]:
    """Settings of a run over `n_tokens`: what the library has or recommends (see RECIPES).

    Where `scaled`, batches shrink so that there are `FEWEST_STEPS` steps, warm-ups to a tenth of
    the run and windows for dead features to a twentieth: the defaults are made for runs of 10^8
    tokens and more, and some could not even start on fewer.
    """
    settings = dict(RECIPES[library])
    if library == "dictionary_learning" and architecture in ("topk", "batchtopk", "matryoshka"):
        settings["lr"] = 2e-4 / (n_features / 2**14) ** 0.5
    if library == "sparsify":
        settings["lr"] = settings.pop("signum_lr") / (n_features / 2**14) ** 0.5
    if scaled:
        largest = max(256, n_tokens // FEWEST_STEPS)
        settings["batch_size"] = min(settings["batch_size"], 2 ** int(np.log2(largest)))
    n_steps = n_tokens // settings["batch_size"]
    if "dead_window_steps" in settings:
        settings["coefficient_warmup_steps"] = (
            n_steps if architecture == "jumprelu" else n_steps // 20
        )
    if scaled:
        limits = {"warmup_steps": n_steps // 10, "sparsity_warmup_steps": n_steps // 10,
                  "threshold_start_step": n_steps // 10,
                  "threshold_window_steps": n_steps // 20, "dead_window_steps": n_steps // 20,
                  "dead_window_tokens": n_tokens // 20}  # fmt: skip
        for name, limit in limits.items():
            if name in settings:
                settings[name] = min(settings[name], max(1, limit))
    return settings


RECIPES: dict[str, dict[str, Any]] = {
    # Version 6.54: config.py and the training guide (4096 tokens, inputs scaled to mean norm
    # sqrt(d), rate constant and down to zero over the last fifth, L1 warmed up over a twentieth,
    # JumpReLU's coefficient over the whole run).
    "saelens": {"batch_size": 4096, "lr": 3e-4, "decay_share": 0.2, "dead_window_steps": 1000},
    # Version 0.1.0: trainers/*.py, and the configuration of the published suite of SAEs
    # (dictionary_learning_demo): 2048 tokens, rate 3e-4 where the trainer does not choose one,
    # decay over the last fifth, inputs scaled to mean squared norm 1.
    "dictionary_learning": {
        "batch_size": 2048,
        "lr": 3e-4,
        "warmup_steps": 1000,
        "sparsity_warmup_steps": 5000,
        "decay_share": 0.2,
        "threshold_start_step": 1000,
        "threshold_window_steps": 1000,
        "dead_window_tokens": 10_000_000,
    },  # fmt: skip
    # Version 1.3.3: config.py and trainer.py; no scaling of inputs, no auxiliary loss.
    "sparsify": {
        "batch_size": 65_536,
        "optimizer": "signum",
        "signum_lr": 5e-3,
        "warmup_steps": 1000,
        "auxk_alpha": 0.0,
        "dead_window_tokens": 10_000_000,
    },  # fmt: skip
}
# The training guide's recipe for the tanh penalty.
SAELENS_JUMPRELU = {
    "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_init_threshold": 0.1,
    "jumprelu_bandwidth": 2.0, "pre_act_loss_coefficient": 3e-6,
}  # fmt: skip


def train(
    library: str,
    architecture: str,
    activations: np.ndarray,
    n_features: int,
    *,
    k: int | None = None,
    coefficient: float | None = None,
    n_tokens: int,
    device: str = "cpu",
    seed: int = 0,
    rate_factor: float = 1.0,
    scaled: bool = True,
    **overrides: Any,
) -> Trained:
    """A coder that `library` trained on `n_tokens` rows of `activations` `[n, d]`, float32.

    Sparsity is asked for by `k` where the architecture takes one (see `STEERED`), otherwise by
    `coefficient`. `overrides` replace settings of `recipe`; `rate_factor` multiplies its learning
    rate.
    """
    if architecture not in LIBRARIES.get(library, ()):
        raise ValueError(f"architecture must be one of {LIBRARIES}, got {library} {architecture}.")
    asked, name = (k, "k") if (library, architecture) in STEERED else (coefficient, "coefficient")
    if asked is None:
        raise ValueError(f"{name} must be given for {library} {architecture}, got None.")
    settings = recipe(library, architecture, n_features, n_tokens, scaled)
    if library == "sparsify" and overrides.get("optimizer") == "adam":
        settings["lr"] = 2e-4 / (n_features / 2**14) ** 0.5
    settings |= overrides
    settings["lr"] *= rate_factor
    import torch

    torch.manual_seed(seed)
    given = torch.from_numpy(np.ascontiguousarray(activations, np.float32)).to(device)
    batches = Batches(given, settings["batch_size"], n_tokens, seed)
    return TRAINERS[library](architecture, batches, n_features, asked, settings, device)


def _train_saelens(
    architecture: str, batches: Batches, n_features: int, asked: float, settings: dict, device: str
) -> Trained:
    with _importing(device):
        import torch
        from sae_lens import saes
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
    d, n_steps, lr = batches.activations.shape[1], len(batches), settings["lr"]
    name, options = {
        "topk": ("TopK", {"k": asked}),
        "batchtopk": ("BatchTopK", {"k": asked}),
        "matryoshka": ("MatryoshkaBatchTopK",
                       {"k": asked, "matryoshka_widths": matryoshka_prefixes(n_features)}),
        "standard": ("Standard", {"l1_coefficient": asked}),
        "gated": ("Gated", {"l1_coefficient": asked}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": asked, **SAELENS_JUMPRELU}),
    }[architecture]  # fmt: skip
    for coefficient in ("l1", "l0"):
        if f"{coefficient}_coefficient" in options:
            options[f"{coefficient}_warm_up_steps"] = settings["coefficient_warmup_steps"]
    config = getattr(saes, f"{name}TrainingSAEConfig")(
        d_in=d, d_sae=n_features, device=device,
        normalize_activations="expected_average_only_in", **options,
    )  # fmt: skip
    training = SAETrainerConfig(
        total_training_samples=n_steps * batches.batch_size,
        train_batch_size_samples=batches.batch_size, device=device, lr=lr, lr_end=lr / 10,
        lr_decay_steps=int(settings["decay_share"] * n_steps),
        dead_feature_window=settings["dead_window_steps"],
    )  # fmt: skip
    trainer = SAETrainer(training, getattr(saes, f"{name}TrainingSAE")(config), iter(batches))
    with _silent(), tempfile.TemporaryDirectory() as directory:
        torch.set_float32_matmul_precision("highest")
        # `fit` would take the batches for this from the ones to train on.
        trainer.activation_scaler.estimate_scaling_factor(d, iter(batches), min(1000, n_steps))
        trainer.fit().save_inference_model(directory)
        coder = saes.SAE.load_from_disk(directory, device=device)
    arrays = _arrays(coder)
    arrays["W_enc"] = arrays["W_enc"].T
    return Trained("saelens", architecture, settings, arrays, device, coder.encode, coder.decode)


def _train_dictionary_learning(
    architecture: str, batches: Batches, n_features: int, asked: float, settings: dict, device: str
) -> Trained:
    with _importing(device):
        import torch
        from dictionary_learning import trainers
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.training import trainSAE
    warmup = {"sparsity_warmup_steps": settings["sparsity_warmup_steps"]}
    threshold = {"threshold_start_step": settings["threshold_start_step"],
                 "threshold_beta": 1 - 1 / settings["threshold_window_steps"]}  # fmt: skip
    trainer, options = {
        "topk": (trainers.TopKTrainer, {"k": asked, **threshold}),
        "batchtopk": (trainers.BatchTopKTrainer, {"k": asked, **threshold}),
        "matryoshka": (MatryoshkaBatchTopKTrainer,
                       {"k": asked, "group_fractions": MATRYOSHKA_SHARES, **threshold}),
        "standard": (trainers.StandardTrainer, {"l1_penalty": asked, **warmup}),
        "gated": (trainers.GatedSAETrainer, {"l1_penalty": asked, **warmup}),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": asked, **warmup}),
    }[architecture]  # fmt: skip
    made = []

    def make(**given: Any) -> Any:
        made.append(trainer(**given))
        made[0].dead_feature_threshold = settings["dead_window_tokens"]  # fixed in their __init__
        return made[0]

    n_steps = len(batches)
    config = {
        "trainer": make, "steps": n_steps, "activation_dim": batches.activations.shape[1],
        "dict_size": n_features, "layer": 0, "lm_name": "", "device": device,
        "lr": settings["lr"], "warmup_steps": settings["warmup_steps"], "seed": batches.seed,
        "decay_start": int((1 - settings["decay_share"]) * n_steps), **options,
    }  # fmt: skip
    with _silent():
        torch.set_float32_matmul_precision("highest")
        trainSAE(batches, [config], n_steps, normalize_activations=True, device=device)
    coder = made[0].ae  # trainSAE scaled its biases back to raw activations
    found = _arrays(coder)
    # Their linear layers keep [n_features, d] and [d, n_features], their parameters the transposes.
    turned = "W_enc" if "W_enc" in found else "decoder.weight"
    found[turned] = found[turned].T
    theirs = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec",
              "bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate"}  # fmt: skip
    arrays = {theirs.get(name, name): array for name, array in found.items()}
    return Trained(
        "dictionary_learning", architecture, settings, arrays, device, coder.encode, coder.decode
    )


def _train_sparsify(
    architecture: str, batches: Batches, n_features: int, asked: float, settings: dict, device: str
) -> Trained:
    with _importing(device):
        import torch
        from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
    k = int(asked)
    with _silent(), tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(
            SparseCoderConfig(num_latents=n_features, k=k), batch_size=1,
            optimizer=settings["optimizer"], lr=settings["lr"],
            lr_warmup_steps=settings["warmup_steps"], auxk_alpha=settings["auxk_alpha"],
            dead_feature_threshold=settings["dead_window_tokens"], hookpoints=["layer"],
            init_seeds=[batches.seed], log_to_wandb=False, save_every=10**9, save_dir=directory,
        )  # fmt: skip
        rows: Any = [{"input_ids": batches.rows(step)} for step in range(len(batches))]
        Trainer(config, rows, _replay(batches.activations)).fit()
        coder = SparseCoder.load_from_disk(Path(directory, "unnamed", "layer"), device=device)

    def encode(x: Any) -> Any:
        values, indices, _ = coder.encode(x)
        return torch.zeros(len(x), n_features, device=device).scatter_(-1, indices, values)

    def decode(z: Any) -> Any:
        values, indices = z.topk(k, dim=-1)  # theirs takes these
        return coder.decode(values, indices)

    theirs = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    arrays = {theirs.get(name, name): array for name, array in _arrays(coder).items()}
    return Trained("sparsify", architecture, settings, arrays, device, encode, decode)


def _replay(activations: Any) -> Any:
    """A "language model" for sparsify's trainer whose one layer gives cached activations: its
    tokens are their row numbers."""
    import torch

    class Replay(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Identity()
            self.device = activations.device
            self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

        @property
        def base_model(self) -> Any:
            return self

        def forward(self, input_ids: Any) -> Any:
            return self.layer(activations[input_ids])

    return Replay()


def matryoshka_prefixes(n_features: int) -> list[int]:
    """Numbers of features of the nested dictionaries, the same for everyone."""
    ends = np.cumsum([int(share * n_features) for share in MATRYOSHKA_SHARES[:-1]])
    return [*(int(end) for end in ends), n_features]


def _arrays(coder: Any) -> dict[str, np.ndarray]:
    state = coder.state_dict()
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in state.items()}


TRAINERS = {
    "saelens": _train_saelens,
    "dictionary_learning": _train_dictionary_learning,
    "sparsify": _train_sparsify,
}
