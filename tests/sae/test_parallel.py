"""Several processes train the coder that one of them would have trained."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import mlxterp
from mlxterp.sae import ActivationDataset, Callback, SAEConfig, StopTraining
from mlxterp.sae.kernels import Pairs
from mlxterp.sae.parallel import ByFeatures, ByPairs, ByTokens, Undivided, divide
from mlxterp.sae.run import Run
from mlxterp.sae.trainer import Trainer, _check_same_start, prepare
from tests.sae import kinds
from tests.sae.runs import coder_for, config, differences, run_of, tokens

import mlx.core as mx  # isort: skip

ROOT = Path(mlxterp.__file__).parents[1]
MODES = ("data", "features")
REVIVED = {
    "dead_window": 96, "dead_neuron_threshold": 0.05, "auxiliary_coefficient": 0.5,
}  # fmt: skip
NESTED = {"matryoshka_prefixes": (1 / 16, 1 / 4, 0.6)}
CASES = {
    "topk, auxiliary loss, clipping": {**REVIVED, "gradient_clip": 0.05},
    "topk, matryoshka, tied": {**NESTED, "tied_weights": True},
    "abs_topk, l1 with norms": {
        "activation_function": "abs_topk", "lambda_sparse": 0.01, "decoder_unit_norm": False,
    },
    "batch_topk, matryoshka": {"activation_function": "batch_topk", **NESTED},
    "jumprelu, quadratic, auxiliary loss": {
        "activation_function": "jumprelu", "target_l0": 5.0, **REVIVED,
    },
    "relu to an L0, matryoshka, auxiliary loss": {
        "activation_function": "relu", "target_l0": 5.0, "decoder_unit_norm": False, **NESTED,
        **REVIVED, "dead_neuron_threshold": 0.5,
    },
    "gated": {"activation_function": "gated"},
    "transcoder, batch_topk, auxiliary loss": {
        "kind": "transcoder", "activation_function": "batch_topk", **REVIVED,
    },
    "skip transcoder, topk, clipping": {"kind": "skip transcoder", "gradient_clip": 0.05},
    "skip transcoder, relu": {"kind": "skip transcoder", "activation_function": "relu"},
    "crosscoder, batch_topk, auxiliary loss": {
        "kind": "crosscoder", "activation_function": "batch_topk",
        "component_weights": (1.0, 3.0), **REVIVED,
    },
    "crosscoder, relu to an L0": {
        "kind": "crosscoder", "activation_function": "relu", "target_l0": 5.0,
    },
    "cross-layer transcoder, batch_topk, auxiliary loss": {
        "kind": "cross-layer transcoder", "activation_function": "batch_topk", **REVIVED,
    },
    "cross-layer transcoder, relu to an L0": {
        "kind": "cross-layer transcoder", "activation_function": "relu", "target_l0": 5.0,
    },
}  # fmt: skip
# The features of a cross-layer transcoder cannot be divided.
DIVIDED = [
    (mode, name) for mode in MODES for name in CASES if mode == "data" or "cross-layer" not in name
]
STEPS = (1, 3, 6)
OVERFLOWS = 4  # the step with a batch beyond float32
RESUMED = {
    "log_every": 4, "checkpoint_every": 7, "resample_dead_every": 3, "dead_neuron_threshold": 0.05,
}  # fmt: skip


def settings(**options) -> SAEConfig:
    """Many features for the number of values, and an odd share of tokens in a half window."""
    defaults = {"expansion_factor": 8, "learning_rate": 1e-4, "log_every": 3, "num_epochs": 1}
    return config(**{**defaults, **options})


# What the processes do


def data_for(kind: str) -> ActivationDataset:
    return kinds.dataset(480) if kind else ActivationDataset.from_activations(tokens(480))


def states(options: dict, parallel) -> list[dict[str, mx.array]]:
    """All that a run knows before its first step and after `STEPS`, one of which is skipped."""
    kind = options.get("kind", "")
    options = {name: value for name, value in options.items() if name != "kind"}
    own, dataset = settings(**kinds.settings(kind), **options), data_for(kind)
    sample, plan = prepare(dataset, own)
    coder = coder_for(dataset, own, kind)
    division = divide(parallel, coder, plan.batch_size)
    run = Run(own, coder, dataset, None, plan, sample, division=division)
    found = [_named(division.gather(run.state))]
    for step, batch in enumerate(dataset.batches(plan.batch_size, seed=own.seed), 1):
        run.advance(batch * (1e30 if step == OVERFLOWS else 1))
        if step in STEPS:
            found.append(_named(division.gather(run.state)))
    return found


def _named(state) -> dict[str, mx.array]:
    named = {f"{part}.{name}": array for part in ("params", "m", "v", "averaged", "sums")
             for name, array in state[part].items()}  # fmt: skip
    named |= {name: array for name, array in state.items() if isinstance(array, mx.array)}
    mx.eval(named)
    return named


def distance(a: mx.array, b: mx.array) -> float:
    """The largest difference relative to the largest entry; infinities must be the same."""
    finite = mx.isfinite(a)
    if not mx.array_equal(finite, mx.isfinite(b)):
        return float("inf")
    a, b = mx.where(finite, a, 0), mx.where(finite, b, 0)
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(a).max(), 1e-30))


def compare(name: str) -> dict[str, list[dict[str, float]]]:
    """How far each mode is from one process after `STEPS`."""
    options, found = CASES[name], {}
    alone = states(options, None)[1:]
    for mode in [mode for mode, of in DIVIDED if of == name]:
        found[mode] = []
        for one, several in zip(alone, states(options, mode)[1:], strict=True):
            distances = {name: distance(one[name], several[name]) for name in one}
            params = [array for name, array in several.items() if name.startswith("params")]
            on_all = [mx.distributed.all_gather(array[None]) for array in params]
            distances["between processes"] = max(distance(*array) for array in on_all)
            found[mode].append(distances)
    return found


class At(Callback):
    """Does something at a step."""

    def __init__(self, step, action):
        self.step, self.action, self.last = step, action, 0

    def on_step_end(self, step):
        self.last = step
        if step == self.step:
            self.action()


def stop_training():
    raise StopTraining("enough")


def fit(directory: Path, parallel, callbacks=(), resume=False):
    """A coder, and how many tokens it was trained on, or the status that the run ended with."""
    own, dataset = settings(**RESUMED), ActivationDataset.from_activations(tokens(480))
    coder = coder_for(dataset, own)
    try:
        trainer = Trainer(own, directory, callbacks, parallel)
        result = trainer.fit(coder, *dataset.split(0.1), resume=resume)
    except SystemExit as error:
        return coder, error.code
    return coder, result.n_tokens


def interrupt_and_resume(directory: Path, parallel: str) -> dict[str, object]:
    whole, _ = fit(directory / "whole", parallel)
    _, stopped = fit(directory / "stopped", parallel, [At(5, stop_training)])
    terminate = At(9, lambda: signal.raise_signal(signal.SIGTERM))
    _, status = fit(directory / "terminated", parallel, [terminate])
    resumed, n_tokens = fit(directory / "terminated", parallel, resume=True)
    return {
        "stopped": stopped,
        "status": status,
        "tokens": n_tokens,
        "heard": terminate.last,
        "changed by the interruption": differences(whole, resumed),
    }


def refusal() -> str:
    """What is said to who wants to divide the features of a cross-layer transcoder."""
    kind = "cross-layer transcoder"
    own, dataset = settings(**kinds.settings(kind)), data_for(kind)
    try:
        Trainer(own, parallel="features").fit(coder_for(dataset, own, kind), dataset)
    except ValueError as error:
        return str(error)
    return "nothing"


def work(directory: Path) -> None:
    """Everything that takes several processes; each writes what it found."""
    mx.set_default_device(mx.Device(mx.cpu))
    rank = mx.distributed.init().rank()
    found = {
        "compared": {name: compare(name) for name in CASES},
        "refused": refusal(),
        "interrupted": {mode: interrupt_and_resume(directory / mode, mode) for mode in MODES},
    }
    (directory / f"found_{rank}.json").write_text(json.dumps(found))


def fail(directory: Path) -> None:
    """The last process ends in the middle of a run."""
    own, dataset = settings(), ActivationDataset.from_activations(tokens(480))
    sample, plan = prepare(dataset, own)
    coder = coder_for(dataset, own)
    division = divide("data", coder, plan.batch_size)
    run = Run(own, coder, dataset, None, plan, sample, division=division)
    for step, batch in enumerate(dataset.batches(plan.batch_size)):
        if step == 4 and not division.is_first:
            os._exit(7)
        run.advance(batch)
        mx.eval(run.state)


# Starting them


def free_port() -> int:
    """The first of two ports that nobody listens on."""
    while True:
        with socket.socket() as a, socket.socket() as b, contextlib.suppress(OSError):
            a.bind(("127.0.0.1", 0))
            port = a.getsockname()[1]
            b.bind(("127.0.0.1", port + 1))
            return port


def launch(
    function: str, directory: Path, timeout: float, module: str = "test_parallel"
) -> tuple[int, str]:
    """Run a function of a test module in two processes; its exit status, and what was printed."""
    launcher = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    code = f"import sys, pathlib; from tests.sae import {module} as here; "
    code += f"here.{function}(pathlib.Path(sys.argv[1]))"
    command = [
        *(sys.executable, launcher, "-n", 2, "--backend", "ring", "--starting-port", free_port()),
        *("--env", f"PYTHONPATH={ROOT}", "--", sys.executable, "-c", code, directory),
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode, output


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    _, output = launch("work", directory, timeout=120)
    files = [directory / f"found_{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), output
    return directory, [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(("mode", "name"), DIVIDED)
def test_two_processes_train_as_one(found, mode, name):
    for of_rank in found[1]:
        for distances in of_rank["compared"][name][mode]:
            assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("mode", MODES)
def test_all_processes_hold_the_same_coder_to_the_last_bit(found, mode):
    compared = found[1][0]["compared"]
    for name in [name for by, name in DIVIDED if by == mode]:
        distances = compared[name][mode]
        assert [at_step["between processes"] for at_step in distances] == [0, 0, 0], name


def test_the_features_of_a_cross_layer_transcoder_are_not_divided(found):
    for of_rank in found[1]:
        assert 'this one has 2. Use parallel="data"' in of_rank["refused"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_compared_is_eventful(name):
    """Parameters move, a step is skipped, and features are revived where that is compared."""
    start, *_, state = states(CASES[name], None)
    assert state["skipped"].item() == 1 and state["t"].item() == STEPS[-1] - 1
    moved = {n: distance(start[n], a) for n, a in state.items() if n.startswith("params")}
    assert min(moved.values()) > 1e-5, moved
    assert ("params.W_skip" in moved) == ("skip" in name)
    if "dead_window" in CASES[name]:
        threshold = CASES[name]["dead_neuron_threshold"]
        rates = (state["fired"] + state["fired_before"]) / (
            state["counted"] + state["counted_before"]
        )
        assert 0 < (rates < threshold).sum().item() < len(rates)


@pytest.mark.parametrize("mode", MODES)
def test_a_callback_of_the_first_process_ends_the_run_in_all(found, mode):
    for of_rank in found[1]:  # at the next step at which they speak of it
        assert of_rank["interrupted"][mode]["stopped"] == 8 * 32


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_process_stops_all_and_the_run_can_be_resumed(found, mode):
    directory, ranks = found
    for of_rank in ranks:
        interrupted = of_rank["interrupted"][mode]
        assert interrupted["status"] == 143
        assert interrupted["changed by the interruption"] == []
        assert interrupted["tokens"] == 13 * 32
    assert [r["interrupted"][mode]["heard"] for r in ranks] == [12, 0]
    steps = [json.loads(line).get("step") for line in
             (directory / mode / "whole" / "log.jsonl").read_text().splitlines()]  # fmt: skip
    steps = [step for step in steps if step is not None]
    assert steps == sorted(steps)  # written by one process


def test_the_others_end_when_a_process_dies(tmp_path):
    _, output = launch("fail", tmp_path, timeout=60)
    assert "exited with code 7" in output, output


# In this process alone


class Group:
    def __init__(self, rank=0, size=3):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def coder(name="topk", factor=3):
    dataset = ActivationDataset.from_activations(tokens(40))
    return coder_for(dataset, settings(activation_function=name, expansion_factor=factor))


@pytest.mark.parametrize(
    ("parallel", "name", "kind"),
    [
        ("data", "topk", ByPairs),
        ("data", "abs_topk", ByPairs),
        ("data", "batch_topk", ByPairs),
        ("data", "jumprelu", ByTokens),
        ("data", "gated", ByTokens),
        ("features", "topk", ByFeatures),
        ("features", "relu", ByFeatures),
        (None, "relu", Undivided),
    ],
)
def test_the_mode_and_the_activation_function_say_what_is_divided(
    monkeypatch, parallel, name, kind
):
    monkeypatch.setattr(mx.distributed, "init", Group)
    assert type(divide(parallel, coder(name), 33)) is kind


@pytest.mark.parametrize("parallel", [*MODES, None])
def test_one_process_divides_nothing(parallel):
    assert type(divide(parallel, coder(), 33)) is Undivided


def test_what_cannot_be_divided_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", Group)
    with pytest.raises(ValueError, match="batch_size must be a multiple of .* 3, got 32"):
        divide("data", coder(), 32)
    with pytest.raises(ValueError, match="n_features must be a multiple of .* 3, got 32"):
        divide("features", coder(factor=4), 33)


def test_a_mode_that_does_not_exist_is_refused():
    dataset = ActivationDataset.from_activations(tokens(40))
    trainer = Trainer(settings(), parallel="tokens")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="parallel must be None or one of .* got 'tokens'"):
        trainer.fit(coder(), dataset)


class Behind(Undivided):
    """Another process is at step 5."""

    def maxima(self, numbers):
        return [max(own, other) for own, other in zip(numbers, (5, -5), strict=True)]


@pytest.mark.parametrize(("step", "refused"), [(0, True), (5, False), (9, True)])
def test_processes_that_resume_from_different_steps_are_refused(step, refused):
    dataset = ActivationDataset.from_activations(tokens(96))
    run = run_of(settings(), dataset, division=Behind())
    run.step = step
    expected = pytest.raises(ValueError, match=f"this one from \\[{step}\\]")
    with expected if refused else contextlib.nullcontext():
        _check_same_start([run])


class Together(ByFeatures):
    """One process of several, which knows what the others would send."""

    def __init__(self, rank, of_all):
        super().__init__(Group(rank, len(of_all)))
        self.of_all = of_all

    def _joined(self, array):
        return mx.abs(mx.stack(self.of_all))


def kept(of_all, k):
    return [np.array(Together(r, of_all).largest(a, k)) for r, a in enumerate(of_all)]


def test_the_largest_over_all_processes_are_kept():
    values = mx.random.normal((3, 5, 4), key=mx.random.key(0))
    found = np.concatenate(kept(list(values), 6), axis=1)
    everything = np.concatenate(np.array(values), axis=1)
    smallest = np.sort(np.abs(everything), axis=1)[:, -6:].min(axis=1, keepdims=True)
    np.testing.assert_array_equal(found, np.where(np.abs(everything) >= smallest, everything, 0))


def test_of_equal_values_no_more_than_wanted_are_kept():
    found = kept([mx.ones((2, 4))] * 3, 5)
    assert sum(part.sum(axis=1) for part in found).tolist() == [5, 5]


def test_values_at_pairs_of_a_batch_compete_as_one():
    values = [mx.array([5.0, 1.0, 4.0, 0.5]), mx.array([3.0, 2.0, 0.1, 6.0])]
    pairs = Pairs(mx.array([0, 0, 1, 1]), mx.array([0, 1, 0, 1]), 2, 2, None)
    found = [
        Together(r, [v.reshape(1, -1) for v in values]).selected(values[r], pairs, 2).tolist()
        for r in range(2)
    ]
    assert found == [[5, 0, 4, 0], [3, 0, 0, 6]]


def test_the_bounds_of_nested_groups_are_counted_from_the_own_features():
    bounds = [ByFeatures(Group(rank, 3)).own_bounds((2, 5, 9), 12) for rank in range(3)]
    assert bounds == [(2, 4, 4), (0, 1, 4), (0, 0, 1)]


def test_a_state_is_divided_by_features_and_only_there():
    state = {
        "params": {"W_dec": mx.arange(6).reshape(6, 1), "b_dec": mx.arange(6)},
        "t": mx.array(1.0),
    }
    own = ByFeatures(Group(1, 3)).shard(state)
    assert own["params"]["W_dec"].tolist() == [[2], [3]]
    assert own["params"]["b_dec"].tolist() == list(range(6)) and own["t"].item() == 1
