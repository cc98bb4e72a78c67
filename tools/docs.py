"""Build the documentation site, or serve it: `make docs`, `make docs ARGS=--build`.

The pages of docs/ and the chapters of nbs/ are gathered in .cache/site/pages, and mkdocs makes the
site from there. Chapters are executed, with seeded weights and without a network; a cell that fails
ends the build. An execution is kept until the notebook or the package changes. What cannot run here
(a GPU, the real weights, a live endpoint) shows the output stored in the notebook, with a label.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".cache" / "site"
PAGES, RUNS = SITE / "pages", SITE / "runs"
FLAGS = {"gpu": "a GPU", "weights": "the real weights", "live": "a live endpoint"}
FLAG = re.compile(r"^\s*#\s*\|\s*(\S+)(.*)$", re.MULTILINE)
SUITES = ("20_smoke_test", "21_explore")  # run whole by tests of their own
KERNELS = 2  # notebooks at once
TIMEOUT_S = 120  # a cell


def chapters() -> list[Path]:
    """List the notebooks that the site has as chapters, in reading order."""
    names = sorted((ROOT / "nbs").glob("*.ipynb"))
    return [path for path in names if not path.name.startswith(("_", "index"))]


def directives(source: str) -> dict[str, str]:
    """Read the `#| name value` lines of a cell."""
    return {match[1]: match[2].strip() for match in FLAG.finditer(source)}


def without_directives(source: str) -> str:
    """Remove the `#| name value` lines of a cell."""
    return re.sub(r"^\s*#\s*\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")


def label(text: str) -> dict[str, Any]:
    """Make a Markdown cell that says why a cell was not executed."""
    return nbformat.v4.new_markdown_cell(f"*{text}*")


def prepare(notebook: Any, executed: bool) -> list[Any]:
    """List the cells to show: without hidden ones and directives, with labels."""
    cells = []
    for cell in notebook.cells:
        found = directives(cell.source) if cell.cell_type == "code" else {}
        if "hide" in found or "default_exp" in found or "nbdev_export(" in cell.source:
            continue
        if cell.cell_type == "code":
            cell.source = without_directives(cell.source)
        cells.append(cell)
        needs = next((words for flag, words in FLAGS.items() if flag in found), None)
        if needs:
            cell.metadata["skip"] = True
            kept = " The output is that of the newest verified run." if cell.outputs else ""
            cells.append(label(f"This cell needs {needs}: it did not run for this page.{kept}"))
    if not executed:
        cells.insert(1, label("The outputs below are those of the newest verified run."))
    shown = [cell for cell in cells if cell.source.strip()]
    return [cell for cell in shown if not cell.source.startswith("## Export -")]


def state(path: Path) -> str:
    """Hash a notebook and the package: what an execution depends on."""
    digest = hashlib.sha256(path.read_bytes())
    for module in sorted((ROOT / "heimdex_clip_worker").rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


def run_cells(notebook: Any, name: str) -> None:
    """Execute a notebook's cells in a fresh kernel; end the program if one fails."""
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3")
    client.resources = {"metadata": {"path": str(ROOT / "nbs")}}
    client.extra_arguments = ["--log-level=ERROR"]
    client.skip_cells_with_tag = "skip"
    for cell in notebook.cells:
        if cell.metadata.pop("skip", False):
            cell.metadata["tags"] = ["skip"]
    try:
        client.execute()
    except Exception as error:
        raise SystemExit(f"{name}: a cell failed\n{error}") from None


def execute(path: Path) -> None:
    """Put a chapter among the pages, executed; a run of the same code is used again."""
    kept = RUNS / f"{path.stem}-{state(path)}.ipynb"
    start = time.monotonic()
    if not kept.exists():
        notebook = nbformat.read(path, as_version=4)
        runs = path.stem not in SUITES
        notebook.cells = prepare(notebook, executed=runs)
        if runs:
            run_cells(notebook, path.name)
        for old in RUNS.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        nbformat.write(notebook, kept)
    print(f"  {path.name}: {time.monotonic() - start:.1f} s", flush=True)
    shutil.copy(kept, PAGES / "chapters" / path.name)


def gather(only: list[str]) -> None:
    """Collect the pages: docs/, the benchmark's page with its plots, and the chapters."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    shutil.copytree(ROOT / "benchmarks" / "results", PAGES / "benchmarks" / "results")
    shutil.copy(ROOT / "benchmarks" / "README.md", PAGES / "benchmarks" / "index.md")
    (PAGES / "chapters").mkdir()
    RUNS.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    paths = [path for path in chapters() if not only or path.stem in only]
    with ThreadPoolExecutor(KERNELS) as pool:
        list(pool.map(execute, paths))


def main() -> None:
    """Gather the pages; build the site, or serve it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="build strictly into _site and end")
    parser.add_argument("--only", nargs="*", default=[], metavar="CHAPTER", help="these chapters")
    parser.add_argument("--site", default=str(ROOT / "_site"), help="the folder to build into")
    parser.add_argument("--address", default="127.0.0.1:8001", help="where to serve the site")
    args = parser.parse_args()
    gather(args.only)
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # its successor cannot show notebooks yet
    mkdocs = [sys.executable, "-m", "mkdocs"]
    if args.build:
        strict = [] if args.only else ["--strict"]  # links to the other chapters lead nowhere
        command = [*mkdocs, "build", "--quiet", "--site-dir", args.site, *strict]
    else:
        command = [*mkdocs, "serve", "--dev-addr", args.address]
    try:
        sys.exit(subprocess.run(command, cwd=ROOT).returncode)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
