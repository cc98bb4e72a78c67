"""The documents are true and whole: generated parts, links, examples, and the site itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
README_LINES = 200  # a front door, not the house


def slug(heading: str) -> str:
    """Make the anchor of a heading, as code hosts and the site do."""
    text = re.sub(r"[`*]|\]\(.*?\)|\[", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def outside_fences(text: str) -> str:
    """Remove the fenced blocks of a page."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Collect the anchors of a page's headings."""
    text = outside_fences(path.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.model  # the worker's code is imported for its signatures
@pytest.mark.parametrize("path", DOCS, ids=IDS[1:])
def test_generated_parts_are_what_the_code_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == reference.fill(text), "run `make export`"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = outside_fences(path.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        missing = not file.exists() and not is_made_by_the_site(file)
        if missing or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def is_made_by_the_site(file: Path) -> bool:
    """True if a page links to a chapter or the benchmark, which only the site has beside it."""
    if file.parent.resolve() == ROOT / "docs" / "chapters":
        return (ROOT / "nbs" / file.name).exists()
    return file.resolve() == ROOT / "docs" / "benchmarks" / "index.md"


def test_the_site_lists_every_page_and_chapter() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in DOCS]
    chapters = [p.name for p in (ROOT / "nbs").glob("[!_]*.ipynb") if p.name != "index.ipynb"]
    wanted = [*pages, *(f"chapters/{name}" for name in chapters)]
    assert [page for page in wanted if f": {page}\n" not in nav] == []


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_javascript_signer_agrees_with_the_test_vectors() -> None:
    run = ["node", "docs/examples/sign.mjs", "test_vectors.json"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "18 of 18 test vectors agree\n"), done.stderr


@pytest.mark.process
@pytest.mark.model
def test_the_site_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "tools/docs.py", "--build", "--only", "05_budget"]
    command += ["--site", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "chapters" / "05_budget.html").read_text(encoding="utf-8")
    assert "A budget and its waiters" in page and "nbdev_export" not in page
    words = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("budget" in entry["location"] for entry in words["docs"])


@pytest.mark.model
@pytest.mark.process
def test_a_cell_that_fails_ends_the_build(tmp_path: Path) -> None:
    import nbformat

    import docs

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        docs.run_cells(notebook, "a chapter")
