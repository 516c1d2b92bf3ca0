"""The example notebooks run, and are committed with what they show."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NAMES = [
    "01_first_sae",
    "02_features_and_steering",
    "03_transcoders_and_crosscoders",
    "04_circuits",
]
LARGEST = 400_000  # bytes of a notebook
SECONDS = 300  # for a cell, on a busy machine
# Of a statement that leads a line and leaves nothing to show.
SILENT = re.compile(r"[\w.,()\[\]{}: ]+ [-+*/]?= |(import|from|for|with|def|del|assert) ")
PATHS = re.compile(r"/(home|root|tmp|usr|Users|work|private|opt|var)/|[A-Z]:\\|site-packages")
WARNINGS = re.compile(r"Warning\b|\[WARNING|Traceback")
SLOW = ("02_features_and_steering", "03_transcoders_and_crosscoders", "04_circuits")
BAR = re.compile(r"\d+%\|")  # of tqdm

of_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])

run = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
        for path in NOTEBOOKS
    ],
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows(source: str) -> bool:
    """Whether a cell prints, or ends with a value that a notebook shows."""
    lines = [line for line in source.splitlines() if line.strip()]
    last = [line for line in lines if line[0] not in " )]}"][-1]
    return "print(" in source or SILENT.match(last) is None


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """What the outputs of a cell say, but for images."""
    found = []
    for output in cell.outputs:
        found.append(output.get("text", ""))
        data = output.get("data", {}).items()
        found += [str(value) for kind, value in data if kind != "image/png"]
    return found


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """What nobody wants to see in a notebook: errors, warnings, bars, cells without output."""
    found = []
    for cell in code_cells(notebook):
        kinds = [output.output_type for output in cell.outputs]
        if "error" in kinds:
            found.append(f"error: {cell.source}")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"written to stderr: {cell.source}")
        if any(WARNINGS.search(text) or BAR.search(text) for text in texts(cell)):
            found.append(f"warning or progress bar: {cell.source}")
        if shows(cell.source) != bool(kinds):
            found.append(f"output without a reason, or none: {cell.source}")
    return found


def test_there_are_the_four_notebooks():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@run
def test_a_notebook_runs_and_shows_nothing_that_is_not_asked_for(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "settings"))
    (tmp_path / "place").mkdir()
    notebook = read(path)
    place = {"metadata": {"path": str(tmp_path / "place")}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place).execute()
    assert not complaints(notebook)


@of_notebook
def test_a_committed_notebook_has_its_output(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert not complaints(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == [*range(1, len(counts) + 1)], "not run from top to bottom"


@of_notebook
def test_a_committed_notebook_shows_figures_and_html(path):
    kinds = [
        kind for cell in code_cells(read(path)) for o in cell.outputs for kind in o.get("data", {})
    ]
    assert kinds.count("image/png") >= 2
    assert kinds.count("text/html") >= 2


@of_notebook
def test_a_committed_notebook_tells_nothing_of_a_machine(path):
    assert path.stat().st_size < LARGEST
    notebook = read(path)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        for text in (cell.source, *(texts(cell) if cell.cell_type == "code" else ())):
            assert not PATHS.search(text), text


@of_notebook
def test_a_committed_notebook_explains_itself_and_is_short(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    sources = [cell.source.splitlines() for cell in code_cells(notebook)]
    assert max(map(len, sources)) <= 20
    assert max(len(line) for lines in sources for line in lines) <= 100


@of_notebook
def test_links_between_notebooks_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)]+)\)", cell.source):
                assert (path.parent / target).is_file(), target


@of_notebook
def test_images_are_images(path):
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                assert base64.b64decode(png).startswith(b"\x89PNG")


def test_what_a_cell_shows():
    shown = ["sae", "x = 1\nx", "print(1)", "f(\n    1,\n)", "{1: 2}", "f(a=1)", "f(x).plot(n=2)"]
    silent = ["x = 1", "import os", "a, b = f(\n    1\n)", "x[0] = 8 * y", "x.y += 1"]
    assert all(map(shows, shown))
    assert not any(map(shows, silent))


def test_complaints_are_found():
    new = nbformat.v4
    outputs = {
        "an error": new.new_output("error", ename="E", evalue="", traceback=[]),
        "stderr": new.new_output("stream", name="stderr", text="note"),
        "a warning": new.new_output("stream", text="x.py:3: UserWarning: no"),
        "a bar": new.new_output("stream", text="collecting:  50%|####    | 1/2"),
    }
    for name, output in outputs.items():
        cell = new.new_code_cell("x", outputs=[output])
        assert len(complaints(new.new_notebook(cells=[cell]))) == 1, name
    assert complaints(new.new_notebook(cells=[new.new_code_cell("x")]))
    unasked = new.new_code_cell("x = 1", outputs=[new.new_output("stream", text="1")])
    assert complaints(new.new_notebook(cells=[unasked]))
