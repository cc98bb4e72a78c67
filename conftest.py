"""Make every code cell that is not exported a test, so that one pytest runs everything.

A cell is named by its id (`nbs/02_auth.ipynb::refuses-a-stale-timestamp`). A notebook runs in one
shell, top to bottom and each cell once, in the notebook's folder; choosing one cell (`-k`, a node
id) runs the ones above it first. Cells that call `nbdev_export` never run. Notebooks named `_*` are
not run, and those named `2*` have tests of their own.

What a file needs beyond Python is declared in it: `pytestmark` in a test module, a line
`#| needs: model server` in the first code cell of a notebook. A file that `-m` excludes as a whole
is not imported, so that `make check` runs where torch is not installed.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _pytest.assertion.rewrite import rewrite_asserts
from _pytest.mark.expression import Expression

# Tests run side by side. OpenMP's threads would spin while they wait, each on a CPU that another
# test needs: a third more time. It reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

FLAGS = {
    "gpu": "needs a GPU; run with --gpu",
    "weights": "needs the real checkpoint; run with --weights",
    "live": "needs the internet; run with --live",
}
# Of two processes that take file after file, none shall have a long one left at the end.
LONGEST = {"test_smoke.py", "test_explore.py", "test_client.py", "test_production_loop.py"}
LONGEST |= {"test_ray.py"}
EXPORTS = {"default_exp", "export", "exporti", "exports"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option per flag, for what is skipped unless asked for."""
    for flag, reason in FLAGS.items():
        about = f"also run what {reason.split(';')[0]}"
        parser.addoption(f"--{flag}", action="store_true", help=about)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what carries a flag that was not asked for, and start with the longest files."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        for flag, reason in FLAGS.items():
            if item.get_closest_marker(flag) and not config.getoption(f"--{flag}"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore a file whose declared needs do not match the marker expression of `-m`.

    A flag of one of its tests counts too: `-m gpu` does not ignore a file that also needs torch.
    """
    expression = config.option.markexpr
    if not expression or collection_path.suffix not in (".py", ".ipynb"):
        return None
    needs = declared_needs(collection_path)
    text = collection_path.read_text(encoding="utf-8") if needs else ""
    needs |= {flag for flag in FLAGS if re.search(rf"(#\|\s*|\bmark\.){flag}\b", text)}
    return needs and not Expression.compile(expression).evaluate(lambda name, **_: name in needs)


def declared_needs(path: Path) -> set[str]:
    """Read the markers that a test module or notebook declares for all its tests."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next((cell["source"] for cell in cells if cell["cell_type"] == "code"), [])
        match = re.search(r"^#\|\s*needs:\s*(.+)$", "".join(first), re.MULTILINE)
        return set(match[1].split()) if match else set()
    text = path.read_text(encoding="utf-8")
    match = re.search(r"^pytestmark = .+?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"pytest\.mark\.(\w+)(?!\w*\()", match[0])) if match else set()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> NotebookFile | None:
    """Collect the notebooks of nbs/."""
    if file_path.suffix != ".ipynb" or file_path.name.startswith(("_", "2")):
        return None
    return NotebookFile.from_parent(parent, path=file_path)


@dataclass
class Cell:
    """A code cell, and how it went."""

    id: str
    source: str
    directives: set[str] = field(default_factory=set)
    done: bool = False
    error: BaseException | None = None

    @property
    def exported(self) -> bool:
        """Whether the cell defines the module rather than testing it."""
        return bool(self.directives & EXPORTS)

    @property
    def runs(self) -> bool:
        """Whether the cell may run here at all."""
        return "nbdev_export(" not in self.source and "eval: false" not in self.directives


def read_cells(path: Path) -> list[Cell]:
    """Return the code cells of the notebook at `path` that hold anything."""
    cells = []
    for raw in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(raw["source"])
        if raw["cell_type"] == "code" and source.strip():
            found = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", source, flags=re.MULTILINE)
            words = {line if ":" in line else line.split()[0] for line in found}
            name = raw.get("id", f"cell-{len(cells)}")
            cells.append(Cell(id=name, source=source, directives=words))
    return cells


class NotebookFile(pytest.File):
    """A notebook: its cells, and the shell they share while its tests run."""

    def collect(self) -> Iterator[CellItem]:
        self.cells = read_cells(self.path)
        self.shell: Shell | None = None
        for need in sorted(declared_needs(self.path)):
            self.add_marker(need)
        for cell in self.cells:
            if cell.runs and not cell.exported:
                item = CellItem.from_parent(self, name=cell.id, cell=cell)
                for flag in sorted(cell.directives & set(FLAGS)):
                    item.add_marker(getattr(pytest.mark, flag))
                yield item

    def run_to(self, last: Cell) -> None:
        """Run `last` and what is above it, unless it has run already; raise its failure."""
        self.shell = self.shell or Shell(self.path)
        skipped = {flag for flag in FLAGS if not self.config.getoption(f"--{flag}")}
        for cell in self.cells:
            if cell.runs and not cell.done and not cell.directives & skipped:
                cell.done = True
                cell.error = self.shell.run(cell)
            if cell is last:
                break
            if cell.error and cell.id not in self.reported:
                self.reported.add(cell.id)
                raise CellFailed(cell) from cell.error
            if cell.error:
                pytest.skip(f"an earlier cell failed: {cell.id}")
        if last.error:
            self.reported.add(last.id)
            raise CellFailed(last) from last.error

    def setup(self) -> None:
        """Start with nothing run."""
        self.reported: set[str] = set()

    def teardown(self) -> None:
        """Free the shell, and with it whatever the cells had made."""
        if self.shell:
            self.shell.close()
        self.shell = None
        for cell in self.cells:
            cell.done, cell.error = False, None


class CellFailed(Exception):
    """A cell raised; its exception is the cause."""

    def __init__(self, cell: Cell):
        super().__init__(cell.id)
        self.cell = cell


class CellItem(pytest.Item):
    """A cell that is a test."""

    def __init__(self, *, cell: Cell, **kwargs: Any):
        super().__init__(**kwargs)
        self.cell = cell

    def runtest(self) -> None:
        notebook = self.parent
        assert isinstance(notebook, NotebookFile)
        try:
            notebook.run_to(self.cell)
        except CellFailed as failed:
            if isinstance(failed.__cause__, pytest.skip.Exception):
                raise failed.__cause__ from None
            raise

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Show the failure as seen from the notebook, without the machinery that ran it."""
        failed = excinfo.value
        if not isinstance(failed, CellFailed):
            return str(super().repr_failure(excinfo, style))
        error = failed.__cause__
        assert error is not None
        trace = error.__traceback__
        while trace and "::" not in trace.tb_frame.f_code.co_filename:
            trace = trace.tb_next
        first = traceback.format_exception_only(type(error), error)[-1].splitlines()[0]
        text = "".join(traceback.format_exception(type(error), error, trace))
        where = f"In {self.parent.name}, cell {failed.cell.id}:"
        return f"{first}\n\n{text}\n{where}\n\n{numbered(failed.cell, trace)}"

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.parent.name}/{self.path.name}::{self.name}"


def numbered(cell: Cell, trace: Any) -> str:
    """Return the source of `cell` with line numbers, and a mark where `trace` enters it."""
    at = trace.tb_lineno if trace else 0
    lines = enumerate(cell.source.splitlines(), 1)
    return "\n".join(f"{'>' if number == at else ' '} {number:3} {line}" for number, line in lines)


class ExplainAsserts(ast.NodeTransformer):
    """Let a failing `assert` in a cell show its values, as pytest does for test modules."""

    def __init__(self, shell: Shell):
        self.shell = shell

    def visit_Module(self, node: ast.Module) -> ast.Module:
        if any(isinstance(part, ast.Assert) for part in ast.walk(node)):
            rewrite_asserts(node, self.shell.source.encode(), self.shell.names[-1])
            for part in ast.walk(node):  # else line 1 is taken, before the start of the cell's code
                if getattr(part, "lineno", 0) and not getattr(part, "end_lineno", 0):
                    part.end_lineno = part.lineno
        return node


class Shell:
    """IPython's shell, as nbdev uses it: top-level await works, and what is displayed is kept."""

    def __init__(self, path: Path):
        from execnb.shell import CaptureShell

        self.path = path
        self.before = (Path.cwd(), list(sys.path), sys.modules.get("__main__"), sys.displayhook)
        self.names: list[str] = []
        os.environ.setdefault("MPLBACKEND", "agg")
        self.shell = CaptureShell(path, mpl_format="png")
        self.shell.showtraceback = self.shell.showsyntaxerror = lambda *args, **kwargs: None
        self.shell.compile.get_code_name = lambda *args: self.names[-1]
        self.shell.ast_transformers.append(ExplainAsserts(self))

    def run(self, cell: Cell) -> BaseException | None:
        """Run `cell` in the notebook's folder and return what it raised."""
        self.source = cell.source
        self.names.append(f"{self.path.parent.name}/{self.path.name}::{cell.id}")
        before = Path.cwd()
        os.chdir(self.path.parent)
        try:
            done = self.shell.run_cell(cell.source, stdout=False, stderr=False, cell_id=cell.id)
        finally:
            os.chdir(before)
        return done.exception

    def close(self) -> None:
        """Forget everything the cells defined, and put back what the shell had changed."""
        cwd, path, main, hook = self.before
        self.shell.reset(new_session=False)
        self.shell.restore_sys_module_state()
        os.chdir(cwd)
        sys.path[:], sys.displayhook = path, hook
        if main is not None:
            sys.modules["__main__"] = main
        for name in self.names:
            linecache.cache.pop(name, None)
