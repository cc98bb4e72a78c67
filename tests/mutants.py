"""Change exported code at random places and list the changes that no test notices.

Run by hand: `python tests/mutants.py --seed 14 --count 160`. docs/mutants.md explains it and holds
the last result.

Every change is one small edit of one expression or statement (see `KINDS`). Changes are spread
over all modules in proportion to their number of places, by a seeded generator. Each is made in a
copy of the repository under a temporary directory, in the module and in the notebook it comes
from, because a notebook's cells run its own code. The tests of that module run against the copy
and stop at the first failure. A failure counts only if the same test passes without the change.
Tests that compare with generated files are left out (`GENERATED`): they ask for the file to be
generated again, which says nothing about the change. So are changes of what only people read:
messages, help, annotations, docstrings.

Why not a library: mutmut 3 and cosmic-ray are well kept, but both change the package alone. Here
half of the tests are notebook cells that run after the notebook's own copy of the code, which
such a change would not reach. Neither draws a seeded sample across modules, and cosmic-ray edits
the checkout in place; neither drops arguments, calls and branches. What is left of them would be
the list of operators, about 100 lines.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "heimdex_clip_worker"
KINDS = [
    "comparison", "constant", "boolean", "argument", "branch", "return", "key", "default",
    "arithmetic", "call",
]  # fmt: skip

# Beside a module's own notebook; cheap ones first. Modules that are missing here use their room's.
H, S, CLI = "tests/hostile/test_", "tests/serving/test_", "tests/cli/test_"
TESTS = {
    "errors": [f"{H}payload_rows.py", f"{H}fault_rows.py", "nbs/10_client.ipynb"],
    "_retry": ["nbs/09_endpoint.ipynb", "nbs/11c_storage.ipynb", "tests/test_client.py"],
    "settings": [f"{CLI}deploy.py", "nbs/06_handler.ipynb"],
    "auth": [f"{H}auth_rows.py", "tests/test_auth.py", f"{H}payload_rows.py"],
    "contract": [f"{H}payload_rows.py", f"{H}many_rows.py", "nbs/06_handler.ipynb",
                 "nbs/10_client.ipynb"],
    "client": ["nbs/10a_local.ipynb", "tests/test_client.py", "nbs/11d_backfill.ipynb"],
    "handler": [f"{H}payload_rows.py", f"{H}fault_rows.py", f"{H}many_rows.py",
                f"{H}selftest_rows.py", "nbs/10a_local.ipynb", f"{S}production_loop.py"],
    "remote": ["nbs/10_client.ipynb", "tests/test_client.py", "tests/remote/test_local_server.py"],
    "backfill.run": ["nbs/13h_backfill.ipynb", "tests/backfill/test_backfill.py"],
    "backfill.postgres": ["tests/backfill/test_table.py", "nbs/11d_backfill.ipynb",
                          "nbs/13h_backfill.ipynb", "tests/backfill/test_backfill.py"],
    "backfill.supabase": ["tests/backfill/test_storage_standin.py"],
    "backfill": ["nbs/11d_backfill.ipynb", "nbs/13h_backfill.ipynb",
                 "tests/backfill/test_backfill.py"],
    "emulator.scaling": ["tests/emulator/test_scaling.py"],
    "emulator": ["tests/emulator/test_emulator.py", "nbs/10_client.ipynb", "tests/test_client.py"],
    "explore": ["nbs/16_pictures.ipynb", "tests/project/test_explore.py"],
    "cli.deploy": [f"{CLI}deploy.py"],
    "cli.demo": [f"{CLI}demo.py"],
    "cli.platform": [f"{CLI}platform.py"],
    "cli.backfill": ["tests/backfill/test_backfill.py"],
    "cli.main": [f"{CLI}deploy.py", f"{CLI}cli.py -k help or usage or abbreviated or command"],
    "cli.sign": [f"{CLI}cli.py -k sign or curl or body or usage"],
    "cli.vectors": ["nbs/13e_search.ipynb", f"{CLI}cli.py -k embedded or search or vectors"],
    "cli.search": [f"{CLI}cli.py -k search or match or vectors"],
    "cli.console": [f"{CLI}cli.py -k usage or bar or reader or unreachable"],
    "cli.health": [f"{CLI}cli.py -k ready_endpoint or without_workers"],
    "cli.worker": [f"{CLI}cli.py -k worker_says"],
    "cli.embed": [f"{CLI}cli.py -k urls or file or folder or match or ctrl"],
    "cli.verify": [f"{CLI}cli.py -k weights or check or published"],
    "serving.download": [f"{H}network_rows.py", f"{S}download.py", f"{H}oracles.py"],
    "serving.avif": [f"{H}image_rows.py", f"{S}decode.py"],
    "serving.decode": [f"{H}image_rows.py", f"{S}decode.py"],
    "serving.budget": [f"{H}many_rows.py", "nbs/05c_pipeline.ipynb"],
    "serving.batcher": [f"{H}fault_rows.py", "nbs/05c_pipeline.ipynb"],
    "serving.connection": [f"{H}poison_rows.py", f"{H}network_rows.py", f"{S}download.py"],
    "serving.pool": [f"{H}poison_rows.py", f"{S}download.py", f"{H}network_rows.py"],
    "serving.loop": [f"{S}download.py", "nbs/03_download.ipynb"],
    "serving.png": [f"{H}image_rows.py", f"{S}decode.py"],
    "serving.selftest": [f"{H}selftest_rows.py", f"{H}payload_rows.py"],
    "serving.intake": [f"{S}intake.py"],
    "serving.watchdog": [f"{S}watchdog.py", f"{H}fault_rows.py"],
    "serving.process": [f"{S}host.py", f"{S}production_loop.py", "nbs/13k_worker.ipynb"],
    "serving": [f"{H}fault_rows.py", f"{H}many_rows.py", "nbs/06_handler.ipynb"],
    "model.photos": ["tests/model/test_preprocess.py"],
    "model.preprocess": ["tests/model/test_preprocess.py", f"{S}decode.py", f"{H}image_rows.py"],
    "model.tower": ["tests/model/test_tower.py", "tests/model/test_embed.py"],
    "model.golden": ["tests/model/test_manifest.py", f"{H}selftest_rows.py",
                     "tests/model/test_embed.py", "tests/model/test_bake.py"],
    "model.artifact": ["tests/model/test_manifest.py", "tests/model/test_embed.py",
                       "tests/model/test_bake.py"],
    "model": ["tests/model/test_embed.py", "tests/model/test_tower.py", f"{S}decode.py",
              f"{H}fault_rows.py"],
}  # fmt: skip

# The rooms whose tests take longest come last: what is known when a run is stopped is most.
ORDER = ["errors", "_retry", "auth", "contract", "settings", "cli.sign", "cli.vectors",
         "cli.console", "cli.health", "cli.worker", "backfill.rows", "backfill.files",
         "backfill.parquet", "backfill.supabase", "cli.deploy", "serving.download", "serving.avif",
         "serving", "handler", "client", "remote", "cli", "backfill", "emulator",
         "model", "explore"]  # fmt: skip

# A server that has imported the large libraries, and is forked for each run of tests.
PROCESSES = multiprocessing.get_context("forkserver")
LARGE = ["torch", "torchvision", "open_clip", "PIL.Image", "aiohttp", "requests", "execnb.shell",
         "matplotlib.pyplot", "hypothesis", "_hypothesis_pytestplugin", "pytest"]  # fmt: skip

GENERATED = "tests/project"  # where the tests are that ask for a file to be generated again

SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not",
    "is not": "is", "in": "not in", "not in": "in", "and": "or", "or": "and", "+": "-", "-": "+",
    "*": "//", "/": "*", "//": "*", "%": "*", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
}  # fmt: skip
OPERATOR = re.compile(r"is\s+not|not\s+in|\b(?:is|in|and|or)\b|<<|>>|//|[<>=!]=|[-<>+*/%&|]")


class Change(NamedTuple):
    """One edit: the bytes `begin` to `end` of a module become `new`."""

    kind: str
    begin: int
    end: int
    new: str


class Mutant(NamedTuple):
    """A change of a module, found again by its id although lines have moved."""

    id: str
    module: str
    line: int
    change: Change
    old: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) or "nothing" for text in (self.old, self.change.new))
        return f"{self.id} {self.module}:{self.line} {self.change.kind}: `{old}` -> `{new}`"


class Finder:
    """Find the places of one module where something can be changed."""

    def __init__(self, text: str):
        self.data = text.encode()
        lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.tree = ast.parse(text)
        self.defaults: set[ast.AST] = set()
        self.keys: set[ast.AST] = set()
        self.flags: set[ast.AST] = set()  # returns of functions that return a bool
        self.skip: set[ast.AST] = set()
        for node in ast.walk(self.tree):
            self._note(node)

    def _note(self, node: ast.AST) -> None:
        """Note what a node's parts are: a default, a key, or nothing to change."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.skip.update(node.decorator_list, [node.returns] if node.returns else [])
            self.defaults.update(d for d in [*node.args.defaults, *node.args.kw_defaults] if d)
            if node.returns and ast.unparse(node.returns) == "bool":
                self.flags.update(n for n in ast.walk(node) if isinstance(n, ast.Return))
        elif isinstance(node, ast.ClassDef):
            self.skip.update(node.decorator_list)
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.value]
            self.defaults.update(n.value for n in fields)
        elif isinstance(node, ast.Dict):
            self.keys.update(key for key in node.keys if key)
        elif isinstance(node, ast.Subscript):
            self.keys.add(node.slice)
        elif isinstance(node, ast.Compare):
            self.keys.update([node.left, *node.comparators])
        elif isinstance(node, (ast.Set, ast.Tuple, ast.List)):
            self.keys.update(node.elts)
        elif isinstance(node, ast.Call):
            first = [node.func.attr] if isinstance(node.func, ast.Attribute) else []
            if first and first[0] in ("get", "pop", "setdefault"):
                self.keys.update(node.args[:1])
        if isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation:
            self.skip.add(node.annotation)
        if isinstance(node, ast.JoinedStr):
            self.skip.add(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            self.skip.add(node)

    def at(self, line: int, column: int) -> int:
        """Return the offset in bytes of a position in the syntax tree."""
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node begins and ends, in bytes."""
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        """Return a node's source."""
        begin, end = self.span(node)
        return self.data[begin:end].decode()

    def swap(self, kind: str, left: ast.AST, right: ast.AST) -> Iterator[Change]:
        """Change the operator between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        found = OPERATOR.search(self.data[begin:end].decode("latin-1"))
        if found:
            new = SWAPS[" ".join(found[0].split())]
            yield Change(kind, begin + found.start(), begin + found.end(), new)

    def put(self, kind: str, node: ast.AST, new: str) -> Iterator[Change]:
        """Replace a node."""
        yield Change(kind, *self.span(node), new)

    def find(self, node: ast.AST) -> Iterator[Change]:
        """Yield what can be changed at `node` and below it."""
        if node in self.skip:
            return
        yield from self.here(node)
        for child in ast.iter_child_nodes(node):
            yield from self.find(child)

    def here(self, node: ast.AST) -> Iterator[Change]:
        """Yield what can be changed at `node` itself."""
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, right in zip(operands, operands[1:], strict=False):
                yield from self.swap("comparison", left, right)
        elif isinstance(node, ast.BoolOp):
            yield from self.swap("boolean", *node.values[:2])
        elif isinstance(node, ast.BinOp):
            yield from self.swap("arithmetic", node.left, node.right)
        elif isinstance(node, ast.AugAssign):
            yield from self.swap("arithmetic", node.target, node.value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield from self.put("boolean", node, f"({self.text(node.operand)})")
        elif isinstance(node, ast.Constant):
            yield from self.constant(node)
        elif isinstance(node, ast.Call):
            yield from self.arguments(node)
        else:
            yield from self.statement(node)

    def constant(self, node: ast.Constant) -> Iterator[Change]:
        """Change a literal: a number, a truth value, or text that is a key or a default."""
        value, default = node.value, node in self.defaults
        if isinstance(value, bool):
            yield from self.put("default" if default else "boolean", node, str(not value))
        elif isinstance(value, (int, float)):
            yield from self.put("default" if default else "constant", node, repr(value + 1))
        elif isinstance(value, (str, bytes)) and (default or node in self.keys):
            word = isinstance(value, bytes) or " " not in value
            if value and word and len(value) <= 40:
                more = b"X" if isinstance(value, bytes) else "X"
                yield from self.put("default" if default else "key", node, repr(value + more))

    def arguments(self, node: ast.Call) -> Iterator[Change]:
        """Drop each argument that is given by name."""
        given = [*node.args, *node.keywords]
        for i, keyword in enumerate(given):
            if not isinstance(keyword, ast.keyword) or keyword.arg in (None, "help"):
                continue
            begin, end = self.span(keyword)
            if i:
                begin = self.span(given[i - 1])[1]
            elif len(given) > 1:
                end = self.span(given[1])[0]
            yield Change("argument", begin, end, "")

    def statement(self, node: ast.AST) -> Iterator[Change]:
        """Negate a condition, remove a branch or a call, or change what is returned."""
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            if not isinstance(node.test, ast.Constant):
                yield from self.put("boolean", node.test, f"not ({self.text(node.test)})")
                yield from self.put("branch", node.test, str(bool(node.orelse)))
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield from self.put("branch", test, "True")
        elif isinstance(node, ast.ExceptHandler) and node.type:
            yield from self.put("branch", node.type, "()")
        elif isinstance(node, ast.Return) and node.value:
            flag = node in self.flags
            new = f"return not ({self.text(node.value)})" if flag else "return None"
            yield from self.put("return", node, new)
        elif isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)):
            yield from self.put("call", node, "pass")


def apply(data: bytes, change: Change) -> str:
    """Return a module's text with one change."""
    return (data[: change.begin] + change.new.encode() + data[change.end :]).decode()


def paths() -> dict[str, Path]:
    """Return the exported modules by their name within the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "_modidx.py")
    }


@cache
def mutants_of(module: str) -> list[Mutant]:
    """List all mutants of a module; the id tells the cell, the edit and its number in the cell."""
    text = paths()[module].read_text(encoding="utf-8")
    lines, finder, counts, found = text.splitlines(), Finder(text), defaultdict(int), []
    for change in finder.find(finder.tree):
        line = finder.data[: change.begin].count(b"\n") + 1
        old = finder.data[change.begin : change.end].decode()
        key = (cell_of(lines, line)[0], change.kind, old, change.new)
        counts[key] += 1
        digest = hashlib.sha256(repr((module, *key, counts[key])).encode()).hexdigest()[:8]
        found.append(Mutant(digest, module, line, change, old))
    return found


def is_valid(mutant: Mutant) -> bool:
    """True if the change leaves valid Python and makes another program."""
    data = paths()[mutant.module].read_bytes()
    try:
        tree = ast.parse(apply(data, mutant.change))
    except SyntaxError:
        return False
    return ast.dump(tree) != ast.dump(ast.parse(data))


def cell_of(lines: list[str], line: int) -> tuple[str, int]:
    """Return the header of the cell that holds a line, and the line the header is on."""
    for number in range(line, 0, -1):
        if lines[number - 1].startswith("# %% "):
            return lines[number - 1], number
    return "", 0


def sample(seed: int, count: int, only: list[str]) -> list[Mutant]:
    """Draw `count` mutants: modules in proportion to their places, kinds of change in turn."""
    rng = random.Random(seed)
    every = {m: mutants_of(m) for m in paths() if not only or any(part in m for part in only)}
    total = sum(map(len, every.values()))
    shares = {m: count * len(found) / total for m, found in every.items() if found}
    number = {m: max(1, int(share)) for m, share in shares.items()}
    for m in sorted(shares, key=lambda m: shares[m] % 1, reverse=True):
        number[m] += sum(number.values()) < count
    chosen = []
    for module, found in every.items():
        by_kind = {kind: [m for m in found if m.change.kind == kind] for kind in KINDS}
        while number.get(module, 0) and any(by_kind.values()):
            kind = rng.choice([k for k, left in by_kind.items() if left])
            mutant = by_kind[kind].pop(rng.randrange(len(by_kind[kind])))
            if is_valid(mutant):
                chosen.append(mutant)
                number[module] -= 1
    return sorted(chosen, key=lambda m: place_in_order(m.module))


def place_in_order(module: str) -> int:
    """Return when a module's turn comes."""
    return ORDER.index(module if module in ORDER else module.partition(".")[0])


def tests_of(module: str) -> list[str]:
    """List a module's notebook and the tests of its room."""
    first = paths()[module].read_text(encoding="utf-8")
    notebook = "nbs/" + re.search(r"nbs/(\S+\.ipynb)", first)[1]
    more = TESTS.get(module) or TESTS[module.partition(".")[0]]
    return [notebook, *(test for test in more if test != notebook)]


class Copy:
    """A copy of the repository, in which one mutant after the other is made and taken back."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="m")).resolve()
        self.folder.chmod(0o755)  # PostgreSQL runs as another user
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in names.strip("\0").split("\0"):
            if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to((ROOT / ".venv").resolve())
        self.folder.joinpath("home").mkdir()
        kept = (ROOT / ".cache" / "seeded-hub").resolve()
        if kept.is_dir():
            shutil.copytree(kept, self.folder / ".cache" / kept.name, symlinks=True)
        self.files = {path: path.read_bytes() for path in self._own_files()}

    def _own_files(self) -> list[Path]:
        """List the files, without bytecode, the environment and the cache."""
        every = self.folder.rglob("*")
        skip = {"__pycache__", ".venv", ".cache"}
        return [p for p in every if p.is_file() and not skip & {*p.relative_to(self.folder).parts}]

    def restore(self) -> None:
        """Put back what a mutant or its tests have changed, and remove what they left."""
        shutil.rmtree(self.folder / "t", ignore_errors=True)
        (self.folder / "t").mkdir()
        for path in self._own_files():
            if path not in self.files:
                path.unlink()
        for path, data in self.files.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
                # Bytecode is chosen by seconds and size, which two mutants may share.
                for bytecode in path.parent.glob(f"__pycache__/{path.stem}.*"):
                    bytecode.unlink()

    def _run(self, arguments: list[str], limit_s: float) -> Any:
        """Run pytest to its end or for `limit_s`, and end whatever it leaves; return it."""
        run = PROCESSES.Process(target=run_tests, args=(self.folder, arguments))
        run.start()
        run.join(limit_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # its own group: see `run_tests`
        run.join()
        end_all(str(self.folder))
        return run

    def first_failure(self, tests: list[str], limit_s: float) -> str:
        """Run `tests`, a file at a time; return the first that fails, "" if none does."""
        for test in tests:
            run = self._run(["-x", *test.split(" ", 2)], limit_s)
            if run.exitcode == -signal.SIGKILL:
                return f"{test}: more than {limit_s:.0f} s"
            if run.exitcode:
                text = (self.folder / "output").read_text(errors="replace")
                failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", text, re.MULTILINE)
                return failed[1] if failed else f"{test}: status {run.exitcode}, {text[-300:]!r}"
        return ""

    def failures(self, tests: list[str], limit_s: float) -> set[str]:
        """Run `tests` without any change; return those that fail."""
        self.restore()
        self._run(tests, limit_s)
        text = (self.folder / "output").read_text(errors="replace")
        return set(re.findall(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", text, re.MULTILINE))

    def close(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)


def make(mutant: Mutant, folder: Path) -> None:
    """Make the change in a copy: in the module, and in the cell that it is exported from."""
    path = folder / paths()[mutant.module].relative_to(ROOT)
    data = path.read_bytes()
    header, top = cell_of(data.decode().splitlines(), mutant.line)
    path.write_text(apply(data, mutant.change), encoding="utf-8")
    name, cell_id = re.match(r"# %% \S*nbs/(\S+) #(\S+)", header).groups()
    book = folder / "nbs" / name
    notebook = json.loads(book.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if c.get("id") == cell_id)
    source = "".join(cell["source"])
    begin = sum(map(len, data.splitlines(keepends=True)[:top]))
    before = data[begin : mutant.change.begin].decode()
    tail = data[mutant.change.begin :].decode().partition("\n")[0]
    # Imports are written differently in the module, so the place is found by what surrounds it.
    context = before[-200:].splitlines(keepends=True)[-4:]
    for skipped in range(len(context) + 1):
        near = "".join(context[skipped:])
        if source.count(near + tail) == 1:
            break
    else:
        raise ValueError(f"not found in {name}: {mutant}")
    at = source.index(near + tail) + len(near)
    size = len(mutant.old)
    assert source[at : at + size] == mutant.old, mutant
    source = source[:at] + mutant.change.new + source[at + size :]
    cell["source"] = source.splitlines(keepends=True)
    book.write_text(json.dumps(notebook), encoding="utf-8")


def end_all(folder: str) -> None:
    """End the processes that a copy's tests left behind: its path is in their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if folder.encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


def run_tests(folder: Path, tests: list[str]) -> None:
    """Run pytest in a copy, in a process of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "PYTHONPATH": str(folder), "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "t"), "FUZZ_EXAMPLES": "50",
    }  # fmt: skip
    tempfile.tempdir = None
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p) not in (ROOT, ROOT / "tests"))]
    import pytest

    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:warnings", "--timeout", "100"]
    sys.exit(int(pytest.main([*options, *tests])))


class Results:
    """What became of each mutant, kept in a file of JSON lines if there is a path."""

    def __init__(self, path: Path | None, tests: list[str]):
        self.path, self.tests = path, tests  # tests: to run instead of the module's
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.by_id = {entry["id"]: entry for entry in map(json.loads, lines)}

    def tests_left(self, mutant: Mutant) -> list[str]:
        """List the files of tests that have not seen this mutant; none if one has noticed it."""
        entry = self.by_id.get(mutant.id, {"by": "", "tried": 0})
        tests = self.tests or tests_of(mutant.module)
        return [] if entry["by"] else tests[entry["tried"] :]

    def add(self, mutant: Mutant, by: str, tried: int) -> None:
        """Note that `tried` files of tests have run, and which test noticed the mutant if any."""
        tried += self.by_id.get(mutant.id, {"tried": 0})["tried"]
        entry = {"id": mutant.id, "mutant": str(mutant), "by": by, "tried": tried}
        self.by_id[mutant.id] = entry
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def try_all(mutants: list[Mutant], copy: Copy, results: Results, limit_s: float) -> None:
    """Run each module's own notebook, and then the other tests for what that did not notice."""
    for first in (True, False):
        for mutant in mutants:
            tests = results.tests_left(mutant)
            if first:
                tests = tests[:1] if mutant.id not in results.by_id else []
            if tests:
                copy.restore()
                make(mutant, copy.folder)
                by = copy.first_failure(tests, limit_s)
                results.add(mutant, by, len(tests))
                print(mutant, "|", by or f"not noticed by {', '.join(tests)}", flush=True)


def main() -> None:
    """Try the chosen mutants, print each result, and end with the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--count", type=int, default=160, help="number of changes (160)")
    parser.add_argument("--only", action="append", default=[], help="modules whose name has this")
    parser.add_argument("--id", action="append", default=[], help="this mutant, whatever the seed")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one file of tests")
    parser.add_argument("--tests", action="append", default=[], help="run this instead: FILE -k X")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--results", type=Path, help="JSON lines: added to, what it has is kept")
    args = parser.parse_args()
    chosen = [m for name in paths() for m in mutants_of(name) if m.id in args.id]
    chosen = chosen or sample(args.seed, args.count, args.only)
    if args.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    PROCESSES.set_forkserver_preload(LARGE)
    copy, results = Copy(), Results(args.results, args.tests)
    try:
        try_all(chosen, copy, results, args.limit)
        by = [results.by_id[mutant.id]["by"] for mutant in chosen]
        tests = sorted({test for test in by if test and ": " not in test})
        broken = copy.failures(tests, 60 * args.limit) if tests else set()
    finally:
        copy.close()
    print("These fail without a change too and show nothing:", *(sorted(broken) or ["none"]))
    unnoticed = sum(not test or test in broken for test in by)
    print(f"{len(chosen)} changes, {unnoticed} not noticed")


if __name__ == "__main__":
    main()
