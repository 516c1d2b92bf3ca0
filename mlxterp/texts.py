"""Text that every Python installation has, for demonstrations without a network."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}


def python_sources() -> list[tuple[str, str]]:
    """The path in the standard library, and the text, of each of its modules, by path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        (str(path.relative_to(library)), path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts)
    ]


def python_texts(seed: int = 0) -> list[str]:
    """The reference manual's topics and the standard library's sources, in random order."""
    texts = [*topics.values(), *(text for _, text in python_sources())]
    random.Random(seed).shuffle(texts)
    return texts
