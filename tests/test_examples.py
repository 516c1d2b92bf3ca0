"""Every example runs on the bundled model, with less text than it takes by itself."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 80  # lines
SLOW = ("circuits", "crosscoder", "diffing", "evaluation", "labels", "steering", "transcoder")
OPTIONS = {
    "circuits": ["--documents", "4", "--n-tokens", "2"],
    "crosscoder": ["--tokens", "2000"],
    "diffing": ["--tokens", "2000"],
    "distributed": ["--tokens", "2000"],
    "evaluation": ["--tokens", "2000", "--unseen", "4"],
    "harvest": ["--tokens", "2000"],
    "labels": ["--tokens", "4000"],
    "quickstart": ["--tokens", "4000"],
    "steering": ["--tokens", "2000"],
    "sweep": ["--tokens", "2000"],
    "transcoder": ["--tokens", "2000"],
}
FOUND = sorted(EXAMPLES.glob("*.py"))

of_example = pytest.mark.parametrize("path", FOUND, ids=[path.stem for path in FOUND])


@of_example
def test_an_example_is_short_and_takes_another_model(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert path.stem == "distributed" or any('"--model"' in line for line in lines)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
        for path in FOUND
    ],
)
@pytest.mark.filterwarnings("ignore:.* after .* tokens:UserWarning")  # advice of a short run
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *OPTIONS[path.stem]])
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2
