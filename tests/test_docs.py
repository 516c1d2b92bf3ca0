"""Every Python block of the README and of the pages runs, on the bundled model."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import mlxterp
import mlxterp.analysis
import mlxterp.sae
import mlxterp.visualization

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs" / "api.md", ROOT / "docs" / "sae" / "api.md")
NOT_RUN = "<!-- not run: needs the network -->"
EXACT = "<!-- exact -->"
HUB_NAME = re.compile(r"""["'][\w-]+/[\w.-]+["']""")


@dataclass(frozen=True)
class Block:
    """A fenced block: `before` is the line above its fence, `line` the first line inside it."""

    language: str
    before: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a fence must start its line and be closed."""
    found, inside, before = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is None and line.startswith("```"):
            inside = (line.removeprefix("```").strip(), before, number + 1, [])
        elif inside is not None and line == "```":
            *where, lines = inside
            found.append(Block(*where, "\n".join(lines)))
            inside = None
        elif inside is not None:
            inside[3].append(line)
        else:
            assert "```" not in line, f"{page}:{number}: an indented fence would not be run"
        before = line
    assert inside is None, f"{page}: the block of line {inside[2]} is not closed"
    return found


def run(page: Path, namespace: dict, capture) -> None:
    """Run the blocks of a page in order; output marked as exact must be what the last one printed.

    Blocks are compiled at their own lines, so that a traceback shows where in the page they are.
    """
    printed = ""
    for block in blocks(page):
        if block.language == "python" and block.before != NOT_RUN:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)
            printed = capture.readouterr().out
        elif block.before == EXACT:
            assert printed.strip() == block.text.strip(), f"{page}:{block.line}"


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.exists() and any(block.language == "python" for block in blocks(page))
]


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(page, {"__name__": "__main__"}, capsys)


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_only_blocks_that_need_the_network_are_left_out(page):
    left_out = [block for block in blocks(page) if block.before == NOT_RUN]
    assert page.read_text(encoding="utf-8").count("<!-- not run") == len(left_out)
    for block in left_out:
        assert block.language == "python"
        assert HUB_NAME.search(block.text), f"{page}:{block.line} names no model on the Hub"


@pytest.mark.parametrize(
    "package",
    [mlxterp, mlxterp.analysis, mlxterp.sae, mlxterp.visualization],
    ids=lambda package: package.__name__,
)
def test_the_api_pages_have_every_public_name(package):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in API)
    shown = re.findall(r"^(?:::: [\w.]+\.| +- )(\w+)$", pages, flags=re.MULTILINE)
    assert set(package.__all__) <= set(shown)


def test_there_are_pages_with_blocks():
    assert {"index.md", "tracing.md", "quickstart.md"} <= {page.name for page in PAGES}


def test_a_block_that_fails_fails_its_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(page, {}, capsys)
    assert error.traceback[-1].lineno + 1 == 7


def test_output_marked_as_exact_must_be_what_was_printed(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint(1)\n```\n\n{EXACT}\n```text\n2\n```\n")
    with pytest.raises(AssertionError):
        run(page, {}, capsys)
