"""Clean notebooks of what a run leaves behind: outputs, counts, stray metadata.

A notebook whose metadata says `showcase` keeps its outputs, without what belongs to one machine or
one run: paths, ports, ids, counts, and widgets, which need a kernel.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
IMAGES = ("image/png", "image/jpeg")
# Of one machine or run: what is found, and what is written instead.
STRAY = [
    (re.compile(r"(?<![\w:/.<>])/(?:[\w.@+-]+/)+(?=[\w.@+-])"), ""),  # folders of a path
    (re.compile(r"\b(127\.0\.0\.1|localhost|0\.0\.0\.0):\d+"), r"\1:PORT"),
    (re.compile(r" at 0x[0-9a-f]{6,}"), ""),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "ID"),
]  # fmt: skip


def scrubbed(text: str | list[str]) -> list[str]:
    """Take out of a text what belongs to one machine or run; return its lines."""
    text = "".join(text)
    text = re.sub(r"[^\n]*\r(?!\n)", "", text)  # of a line that was overwritten, the last state
    for pattern, instead in STRAY:
        text = pattern.sub(instead, text)
    return text.splitlines(keepends=True)


def kept(output: dict[str, Any]) -> dict[str, Any] | None:
    """Reduce an output to what a page shows without a kernel; None if that is nothing."""
    if output["output_type"] == "stream":
        if output["name"] != "stdout":
            return None
        return {"output_type": "stream", "name": "stdout", "text": scrubbed(output["text"])}
    if output["output_type"] == "error":
        return output
    data: dict[str, Any] = output["data"]
    image = next((kind for kind in IMAGES if kind in data), None)
    shown: dict[str, Any] = {}
    if image:
        shown[image] = "".join(data[image]).replace("\n", "")
    for kind in ("text/plain", "text/html", "text/markdown", "image/svg+xml"):
        if kind in data and not (image and kind != "text/plain"):
            shown[kind] = scrubbed(data[kind])
    facts = {kind: value for kind, value in output.get("metadata", {}).items() if kind == image}
    return {"output_type": "display_data", "data": shown, "metadata": facts} if shown else None


def cleaned(text: str) -> str:
    """Clean the text of a notebook, as it is committed."""
    notebook = json.loads(text)
    showcase = notebook["metadata"].get("showcase")
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags")  # papermill finds its parameters by a tag
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden")
        cell["metadata"] = {"tags": tags} if tags else {}
        cell["metadata"] |= {"jupyter": {"source_hidden": True}} if hidden else {}
        cell.pop("attachments", None)
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            outputs = cell.get("outputs", []) if showcase else []
            outputs = [output for output in map(kept, outputs) if output]
            cell.update(outputs=outputs, execution_count=None)
    metadata = {"kernelspec": KERNEL} | ({"showcase": showcase} if showcase else {})
    tidy: dict[str, Any] = {"cells": notebook["cells"], "metadata": metadata}
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
