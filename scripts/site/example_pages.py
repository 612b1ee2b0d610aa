"""The scripts of examples/ as pages: their cells, which ``# %%`` separates, as text and code."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def scripts() -> Sequence[Path]:
    """The examples."""
    return sorted(EXAMPLES.glob("*.py"))


def markdown(script: Path) -> str:
    """One example as a page: its docstring, then cells of text (``# %% [markdown]``) and of code (``# %%``).

    Args:
        script: the file.
    """
    text = script.read_text(encoding="utf-8")
    title, _, rest = (ast.get_docstring(ast.parse(text)) or script.stem).partition("\n")
    parts = [f"# {title.rstrip('.')}\n\n{rest.strip()}\n\n", f"The file is `examples/{script.name}`.\n\n"]
    body = text.split('"""', 2)[2]
    for cell in re.split(r"^# %%", body, flags=re.MULTILINE):
        kind, _, lines = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", lines, flags=re.MULTILINE).strip() + "\n\n")
        elif lines.strip():
            parts.append(f"```python\n{lines.strip()}\n```\n\n")
    return "".join(parts)
