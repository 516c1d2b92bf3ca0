"""What a dashboard of many features costs: to build, to keep, to open and to save.

    python benchmarks/dashboard.py [--features N] [--tokens N]

Text is the demonstration's, the coder has random directions and an L0 of about 32. Printed are the
time and the growth of the process's peak memory of the pass that collects and of the bundle, the
bytes of it on disk, the time from opening it to an answer for a feature, and those of further
answers, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collecting import python_texts, random_sae

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset
from mlxterp.sae.dashboard.build import build_bundle
from mlxterp.sae.dashboard.dashboard import Dashboard, open_dashboard
from mlxterp.sae.features.collection import collect


def peak() -> float:
    """The peak memory of the process so far, in MiB."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def timed(name: str, function: Callable[[], Any]) -> Any:
    """What a function returns; prints how long it took, and by how much the peak memory grew."""
    before, started, busy = peak(), time.perf_counter(), time.process_time()
    found = function()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    print(
        f"{name}: {seconds:.1f} s ({busy:.1f} s of processor time), "
        f"peak memory +{peak() - before:,.0f} MiB to {peak():,.0f} MiB",
        flush=True,
    )
    return found


def answer(url: str) -> tuple[float, bytes]:
    """Milliseconds of a request, and what it got."""
    started = time.perf_counter()
    with urllib.request.urlopen(url) as response:
        content = response.read()
    return 1000 * (time.perf_counter() - started), content


def answers(dashboard: Dashboard, n_features: int) -> None:
    """Print the times of what a page asks for."""
    for path in ("", "api/meta", "api/table", "api/strings", "api/labels"):
        milliseconds, content = answer(dashboard.url + path)
        print(f"GET /{path}: {milliseconds:.1f} ms, {len(content):,} bytes")
    found = [
        answer(f"{dashboard.url}api/features/{i}")
        for i in range(0, n_features, max(1, n_features // 200))
    ]
    times, size = [t for t, _ in found], statistics.mean(len(content) for _, content in found)
    assert all("examples" in json.loads(content) for _, content in found)
    print(
        f"GET /api/features/...: median {statistics.median(times):.1f} ms, "
        f"slowest of {len(times)} {max(times):.1f} ms, {size:,.0f} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=200_000)
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    dataset = ActivationDataset.from_texts(
        model, python_texts(), 2, "residual", context_length=128, max_samples=arguments.tokens
    )
    sae = random_sae(dataset, arguments.features, "batch_topk")
    data = timed("collect", lambda: collect(sae, dataset))
    print(data)
    data.co_active(0)  # makes the index of codes by feature, which the data hold from then on
    bundle = timed("bundle", lambda: build_bundle(data))
    print(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        path = timed("save", lambda: bundle.save(Path(scratch) / "features.mlxdash"))
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"on disk: {size:,} bytes, {size / arguments.features:,.0f} for each feature")
        started = time.perf_counter()
        with open_dashboard(path).start(port=0) as dashboard:
            answer(f"{dashboard.url}api/features/0")
            print(f"from the path to the first feature: {time.perf_counter() - started:.2f} s")
            answers(dashboard, arguments.features)
            page = timed("one file", lambda: dashboard.save(Path(scratch) / "features.html"))
            print(f"one file: {page.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
