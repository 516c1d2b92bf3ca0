"""Runs on activations of which some are not finite: these are left out, said, and change nothing
else."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, SAETrainer
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.evals.fidelity import fidelity
from tests.fakes import SITE, FakeSource
from tests.sae import kinds
from tests.sae.runs import config, differences, tokens, without_times

STREAMING = 64 * 4 * 8  # bytes, those of 64 rows
CONFIG = config(num_epochs=6, log_every=4, checkpoint_every=0, validation_split=0)
PLAIN, BROKEN = "abcdefgh ", "#"


class Broken(FakeSource):
    """Activations with NaN or infinity in one column at every `#`."""

    def __init__(self, value):
        super().__init__(width=8)
        table = np.array(self.table)
        table[self._ids(BROKEN), 3] = value
        self.table = mx.array(table)


def texts() -> list[str]:
    """About 1,000 characters, of which 2 of 100 are broken."""
    rng = np.random.default_rng(0)
    shares = [0.98 / len(PLAIN)] * len(PLAIN) + [0.02]
    return ["".join(rng.choice(list(PLAIN + BROKEN), size=50, p=shares)) for _ in range(20)]


def from_texts(source, written, buffer_bytes=1 << 30) -> ActivationDataset:
    return ActivationDataset.from_texts(
        source, written, SITE, context_length=16, buffer_bytes=buffer_bytes
    )


def fit(data, directory: Path | None = None, **options) -> BaseSAE:
    return SAETrainer(CONFIG.replace(**options), directory).fit(data)


def assert_warned(warned, n: int, total: int) -> None:
    """Once, as the data are found, and once more by the advice that runs give."""
    messages = [str(warning.message) for warning in warned]
    assert messages[0] == f"{n} of {total} activations are not finite and were left out."
    assert len(messages) == 2
    assert messages[1].startswith(f"{100 * n / total:.1f} % of the activations are not finite")


def assert_reported(sae: BaseSAE, directory: Path, n: int) -> None:
    assert sae.metadata.data["skipped_tokens"] == n
    assert sae.statistics.training[-1]["skipped_tokens"] == n
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    logged = [line["skipped_tokens"] for line in lines if "skipped_tokens" in line]
    assert logged and logged[-1] == n
    # No step was lost to them.
    assert sae.statistics.training[-1]["skipped"] == 0


def assert_same(found: BaseSAE, expected: BaseSAE) -> None:
    assert not differences(found, expected)
    reports = [without_times(sae.statistics.training) for sae in (found, expected)]
    for report in (*reports[0], *reports[1]):
        report.pop("skipped_tokens")
    assert reports[0] == reports[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_of_an_array_that_are_not_finite_are_as_if_they_were_not_there(value, tmp_path):
    clean = tokens(990)
    rows = np.sort(np.random.default_rng(1).choice(len(clean), size=10, replace=False))
    broken = np.insert(clean, rows, clean[rows], axis=0)
    places = rows + np.arange(10)
    broken[places, np.arange(10) % 8] = value
    with pytest.warns(UserWarning) as warned:
        found = fit(broken, tmp_path)
    assert_warned(warned, 10, 1000)
    assert_reported(found, tmp_path, 10)
    assert_same(found, fit(clean))


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "sae"])
def test_rows_that_are_not_finite_at_one_of_several_sites_are_as_if_they_were_not_there(
    kind, tmp_path
):
    clean = np.array(kinds.activations(256))
    broken = np.insert(clean, [30, 100, 200], clean[:3], axis=0)
    read, written = (kinds.SITES.slices[names[-1]].start for names in kinds.KINDS[kind][1:3])
    # One row at a site that is read, one at a site that is written, one at both.
    for row, column in ((30, read), (101, written), (202, read), (202, written)):
        broken[row, column] = np.nan
    settings = CONFIG.replace(num_epochs=2, **kinds.settings(kind))
    with pytest.warns(UserWarning) as warned:
        found = kinds.fit(kind, mx.array(broken), settings, tmp_path)
    assert_warned(warned, 3, 259)
    assert_reported(found, tmp_path, 3)
    assert_same(found, kinds.fit(kind, mx.array(clean), settings))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_of_a_model_that_are_not_finite_are_as_if_they_were_not_there(value, tmp_path):
    written = texts()
    n_bad, n = "".join(written).count(BROKEN), len("".join(written))
    with pytest.warns(UserWarning) as warned:
        found = fit(from_texts(Broken(value), written), tmp_path)
    assert_warned(warned, n_bad, n)
    assert_reported(found, tmp_path, n_bad)
    # A token of the stand-in knows nothing of those around it.
    clean = [text.replace(BROKEN, "") for text in written]
    assert_same(found, fit(from_texts(FakeSource(width=8), clean)))


def test_streamed_tokens_that_are_not_finite_leave_a_coder_as_good(tmp_path):
    written = texts()
    n_bad, n = "".join(written).count(BROKEN), len("".join(written))
    data = from_texts(Broken(np.nan), written, STREAMING)
    assert not data.in_memory
    with pytest.warns(UserWarning) as warned:
        found = fit(data, tmp_path)
    assert_warned(warned, n_bad, n)
    assert_reported(found, tmp_path, n_bad)
    clean = from_texts(FakeSource(width=8), [text.replace(BROKEN, "") for text in written])
    expected = fit(clean)
    ours, theirs = fidelity(found, clean).fvu, fidelity(expected, clean).fvu
    assert ours == pytest.approx(theirs, rel=0.25) and theirs < 0.5
