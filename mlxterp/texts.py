"""Text that every Python installation has, for demonstrations without a network."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}


def python_texts(seed: int = 0) -> list[str]:
    """The reference manual's topics and the standard library's sources, in random order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts)
    )
    texts = [*topics.values(), *sources]
    random.Random(seed).shuffle(texts)
    return texts
