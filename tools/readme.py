"""Render nbs/index.ipynb, executed, into README.md.

Markdown cells are copied. Code cells become python fences, and their output text fences. These
flags may stand on the first lines of a cell: `#| hide` drops the cell;
`#| echo: false` drops the code and copies its output as markdown, for tables made from the code;
`#| output: false` keeps the code and drops the output.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import showcase

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- Written from nbs/index.ipynb by `make readme`; do not edit. -->"
FLAG = re.compile(r"^#\|\s*(.+?)\s*$")


def flags(cell: Any) -> set[str]:
    """Read the flags on the first lines of `cell`."""
    names = set()
    for line in cell.source.splitlines():
        match = FLAG.match(line)
        if not match:
            break
        names.add(match[1])
    return names


def output_text(cell: Any) -> str:
    """Collect what `cell` printed, displayed and ended with, without stderr."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("display_data", "execute_result"):
            parts.append(output.data.get("text/markdown", output.data.get("text/plain", "")) + "\n")
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(parts)).strip("\n")


def render_cell(cell: Any) -> list[str]:
    """Render an executed `cell` as blocks of markdown."""
    if cell.cell_type == "markdown":
        return [cell.source.strip()]
    names, text = flags(cell), output_text(cell)
    if "echo: false" in names:
        return [text]
    code = "\n".join(cell.source.splitlines()[len(names) :]).strip("\n")
    blocks = [f"```python\n{code}\n```"]
    if text and "output: false" not in names:
        blocks.append(f"```text\n{text}\n```")
    return blocks


def render(executed: dict[str, Any]) -> str:
    """Render an executed notebook as markdown."""
    import nbformat

    cells = nbformat.reads(json.dumps(executed), as_version=4).cells
    shown = [cell for cell in cells if "hide" not in flags(cell)]
    blocks = [block for cell in shown for block in render_cell(cell) if block]
    text = "\n\n".join([NOTE, *blocks]) + "\n"
    return text.replace("](../", "](")  # links lead from nbs/, and from the README's folder


if __name__ == "__main__":
    if not INDEX.exists():
        sys.exit(f"{INDEX} is missing")
    README.write_text(render(showcase.execute(INDEX.stem)), encoding="utf-8")
    print(f"wrote {README.name}")
