"""Render nbs/index.ipynb, executed, into README.md.

Markdown cells go in as they are, code cells as python fences and what they print as text fences.
Flags, on a cell's first lines: `#| hide` drops the cell before anything runs; `#| echo: false`
drops the code and lets its output in as raw markdown (tables made from the code);
`#| output: false` keeps the code and drops the output.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- Written from nbs/index.ipynb by `make readme`; do not edit. -->"
FLAG = re.compile(r"^#\|\s*(.+?)\s*$")


def flags(cell: Any) -> set[str]:
    """Return the flags on the first lines of `cell`."""
    found = set()
    for line in cell.source.splitlines():
        match = FLAG.match(line)
        if not match:
            break
        found.add(match[1])
    return found


def output_text(cell: Any) -> str:
    """Return what `cell` printed, displayed and ended with, without standard error."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("display_data", "execute_result"):
            parts.append(output.data.get("text/markdown", output.data.get("text/plain", "")) + "\n")
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(parts)).strip("\n")


def render_cell(cell: Any) -> list[str]:
    """Return the blocks of markdown that stand for an executed `cell`."""
    if cell.cell_type == "markdown":
        return [cell.source.strip()]
    found, text = flags(cell), output_text(cell)
    if "echo: false" in found:
        return [text]
    code = "\n".join(cell.source.splitlines()[len(found) :]).strip("\n")
    blocks = [f"```python\n{code}\n```"]
    if text and "output: false" not in found:
        blocks.append(f"```text\n{text}\n```")
    return blocks


def render(path: Path = INDEX) -> str:
    """Execute the notebook at `path` and return it as markdown."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "hide" not in flags(cell)]
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.resources = {"metadata": {"path": str(path.parent)}}
    client.extra_arguments = ["--log-level=ERROR"]  # no warning that it speaks over loopback
    client.execute()
    blocks = [block for cell in notebook.cells for block in render_cell(cell) if block]
    return "\n\n".join([NOTE, *blocks]) + "\n"


if __name__ == "__main__":
    if not INDEX.exists():
        sys.exit(f"{INDEX} is missing")
    README.write_text(render(), encoding="utf-8")
    print(f"wrote {README.name}")
