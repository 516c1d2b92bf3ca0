"""Runs that are killed and taken up again, in processes of their own."""

import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

RUN = """
import signal, sys
import numpy as np
from mlxterp.sae import SAEConfig
from mlxterp.sae.callbacks import Callback
from tests.sae import kinds

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what shells start with "&"

class Steps(Callback):
    def on_step_end(self, step, *_):
        print(step, flush=True)

directory, result, kind = sys.argv[1:]
config = SAEConfig(
    expansion_factor=4, k=4, batch_size=50, num_epochs=5, learning_rate=1e-2, warmup_steps=10,
    dead_neuron_threshold=0.05, dead_window=500, resample_dead_every=40, log_every=7,
    checkpoint_every=3,
).replace(**kinds.settings(kind))
coder = kinds.fit(kind, kinds.activations(2000), config, directory, [Steps()], resume=True)
names = ("W_enc", "b_enc", "W_dec", "b_dec")
np.savez(result, **{name: np.array(coder[name]) for name in names})
"""
N_STEPS = 5 * 38
KILLS = {"sae": 5, "cross-layer transcoder": 4}
CHECKPOINT_EVERY = 3


@contextlib.contextmanager
def running(directory: Path, kind: str = "sae") -> Iterator[subprocess.Popen]:
    """A process that trains, or goes on to train, and prints every step."""
    paths = str(directory / "run"), str(directory / "result.npz")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *paths, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def steps(process: subprocess.Popen, n: int | None = None) -> list[int]:
    """The next `n` steps that it prints, or all until it ends."""
    assert process.stdout is not None
    if n is None:
        return [int(line) for line in process.stdout]
    return [int(process.stdout.readline()) for _ in range(n)]


def result(process: subprocess.Popen, directory: Path) -> dict[str, bytes]:
    """The arrays that a run ends with that is left alone."""
    assert steps(process)[-1] == N_STEPS and process.wait() == 0
    with np.load(directory / "result.npz") as arrays:
        return {name: arrays[name].tobytes() for name in arrays}


@pytest.mark.parametrize("kind", KILLS)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(kind, tmp_path):
    rng = random.Random(0)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    first, last = [], []
    with running(undisturbed, kind) as reference:
        for _ in range(KILLS[kind]):
            with running(tmp_path, kind) as process:
                seen = steps(process, 1)
                started = time.perf_counter()
                seen += steps(process, rng.randint(3, 8))
                # And a part of the next steps, so that some kills come while a step is saved.
                time.sleep(3 * rng.random() * (time.perf_counter() - started) / len(seen))
                process.kill()
                seen += steps(process)
                assert process.wait() == -signal.SIGKILL
            first.append(seen[0])
            last.append(seen[-1])
        assert not (tmp_path / "result.npz").exists() and last[-1] < N_STEPS
        # Every one went on from the last checkpoint before the kill.
        again = [step - next_one for step, next_one in zip(last, first[1:], strict=False)]
        assert first[0] == 1 and max(again) <= CHECKPOINT_EVERY
        with running(tmp_path, kind) as process:
            assert result(process, tmp_path) == result(reference, undisturbed)
    assert not list((tmp_path / "run").glob(".*.unfinished"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_the_step_it_is_at(tmp_path, number):
    with running(tmp_path) as process:
        steps(process, 7)
        process.send_signal(number)
        last = steps(process)[-1:] or [7]
        assert process.stderr is not None
        errors = process.stderr.read()
        if number == signal.SIGTERM:
            assert process.wait() == 143 and "Traceback" not in errors
        else:  # after a KeyboardInterrupt Python ends itself by the signal
            assert process.wait() == -number and "KeyboardInterrupt" in errors
    saved = sorted((tmp_path / "run").glob("step_*"))
    assert [int(re.sub(r"\D", "", saved[-1].name))] == last and last[0] < N_STEPS
