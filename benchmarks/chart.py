"""Draw the figure of docs/benchmarks.md from what RESULTS.md holds: tokens per second of a step."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "images" / "benchmarks.png"
WIDTH_2048 = "batch 2048, d 2048, 32768 features, k 100"
ROW = re.compile(r"^  (\S.*?)  +[\d.]+ +[\d.]+ +(\d+) ", re.M)


def rates(text: str) -> dict[str, int]:
    """Tokens per second by library, of one table."""
    return {name: int(rate) for name, rate in ROW.findall(text)}


def main() -> None:
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    training = text[text.index("## training.py") :]
    tables = training.split(WIDTH_2048)[1:3]
    titles = ("two x86-64 cores, one thread each", "NVIDIA H200")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, table, title in zip(figure.subplots(1, 2), tables, titles, strict=True):
        found = rates(table[: table.index("```")])
        names = sorted(found, key=lambda name: found[name])
        colours = ["#0072b2" if name.startswith("mlxterp") else "0.7" for name in names]
        ax.barh(names, [found[name] for name in names], color=colours)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("tokens per second", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, dpi=120)


if __name__ == "__main__":
    main()
