"""Keep notebooks free of whatever running them leaves behind: outputs, counts, stray metadata."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def cleaned(text: str) -> str:
    """Return the notebook `text` as it is committed."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags")  # papermill finds its parameters by one
        cell["metadata"] = {"tags": tags} if tags else {}
        cell.pop("attachments", None)
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    tidy: dict[str, Any] = {"cells": notebook["cells"], "metadata": {"kernelspec": KERNEL}}
    tidy.update(nbformat=4, nbformat_minor=5)
    return json.dumps(tidy, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(folder: Path) -> None:
    """Clean every notebook of `folder` in place."""
    for path in sorted(folder.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if (clean := cleaned(text)) != text:
            path.write_text(clean, encoding="utf-8")
            print(f"cleaned {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
