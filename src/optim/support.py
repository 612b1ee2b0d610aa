"""The table of what each method supports, in README.md beside this file. `python -m optim.support` writes it anew."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from optim.native.backend import has_kernels
from optim.registry import CAPABILITIES, get_info, list_optimizers

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- python -m optim.support -->", "<!-- end -->"
KERNELS = "C kernels (CPU; float32, float64; one sigma per tensor)"


def answers(name: str) -> dict[str, bool]:
    """Return what a method supports, by the description of the capability."""
    info = get_info(name)
    return {KERNELS: has_kernels(info)} | {text: info.supports[key] for key, text in CAPABILITIES.items()}


def table() -> str:
    """Return the table in Markdown. Methods that support the same share a column."""
    columns: dict[tuple[bool, ...], list[str]] = defaultdict(list)
    for name in list_optimizers():
        columns[tuple(answers(name).values())].append(f"`{name}`")
    rows = [["", *(", ".join(names) for names in columns.values())], ["---"] * (len(columns) + 1)]
    texts = (KERNELS, *CAPABILITIES.values())
    rows += [[text, *("yes" if column[number] else "no" for column in columns)] for number, text in enumerate(texts)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(text: str) -> str:
    """Return the text of the README with the table as it should be."""
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
