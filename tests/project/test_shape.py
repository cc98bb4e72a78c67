"""The shape of the package: whole classes, few public names, chapters that explain."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "heimdex_clip_worker"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_]*.ipynb"))
NOT_WRITTEN = {"__init__.py", "_modidx.py"}  # from notebooks
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in NOT_WRITTEN)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
MOST_PUBLIC_NAMES = 300
MOST_LINES = 40  # of a function
# Two constants are not the same thing because both are limits, or of one unit.
WORDS_OF_ANY_CONSTANT = {"", "max", "min", "bytes", "chars", "rows", "s"}
EQUAL_BY_CHANCE = {  # seconds to connect: to the platform, and to a server of images
    ("remote.endpoint._CONNECT_S", "serving.download._CONNECT_TIMEOUT_S"),
}
# Each command's module has these two; the command table names them.
COMMAND_FUNCTIONS = {"add_arguments", "run", "main", "log"}


def name_of(path: Path) -> str:
    """Return the dotted name of a module within the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def public_names(tree: ast.Module) -> list[str]:
    """Return a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def bare_pairs(path: Path) -> list[str]:
    """Return the ids of exported cells that directly follow another one."""
    pairs, last = [], False
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if re.search(r"^\s*#\s*\|\s*(default_exp|hide)\b", source, re.MULTILINE):
            continue
        exported = cell["cell_type"] == "code" and bool(
            re.search(r"^\s*#\s*\|\s*(export|exports|exporti)\b", source, re.MULTILINE)
        )
        if exported and last:
            pairs.append(cell["id"])
        last = exported
    return pairs


def test_public_names_are_few() -> None:
    names = [name for tree in TREES.values() for name in public_names(tree)]
    assert len(names) < MOST_PUBLIC_NAMES


def test_a_public_name_has_one_meaning() -> None:
    counts = Counter(
        name
        for tree in TREES.values()
        for name in public_names(tree)
        if name not in COMMAND_FUNCTIONS
    )
    assert [name for name, count in counts.items() if count > 1] == []


def lonely_bases(trees: Iterable[ast.Module]) -> list[str]:
    """List the classes of the package whose only user is one subclass."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    written = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    written += Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
    bases = Counter(
        ast.unparse(base).rpartition(".")[2]
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    )
    return [name for name, n in bases.items() if name in own and n == 1 == written[name]]


def test_a_base_class_has_two_users() -> None:
    assert lonely_bases(TREES.values()) == []


@pytest.mark.parametrize(
    ("use", "lonely"), [("", ["Base"]), ("Base()", []), ("class Two(Base): ...", [])]
)
def test_a_base_class_with_one_subclass_and_no_other_user_is_found(use, lonely) -> None:
    assert lonely_bases([ast.parse(f"class Base: ...\nclass One(Base): ...\n{use}")]) == lonely


def constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a module's literals that are worth a name."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) == "__all__":
            continue
        target, value = node.targets[0], node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = [*zip(target.elts, value.elts, strict=True)]
        for name, literal in pairs:
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(literal)
                if value > 1 if isinstance(value, (int, float)) else len(value) > 3:
                    yield ast.unparse(name), value


def written_twice(trees: Mapping[str, ast.Module]) -> list[tuple[str, str]]:
    """List pairs of constants in two modules that have one value and a word in common."""
    known = [
        (module, name, value, {*name.lower().split("_")} - WORDS_OF_ANY_CONSTANT)
        for module, tree in trees.items()
        for name, value in constants(tree)
    ]
    return [
        (f"{module}.{name}", f"{other}.{second}")
        for (module, name, value, words), (other, second, same, more) in combinations(known, 2)
        if module != other and value == same and words & more
    ]


def test_no_constant_is_written_twice() -> None:
    pairs = written_twice({name_of(path): tree for path, tree in TREES.items()})
    assert set(pairs) - EQUAL_BY_CHANCE == set()


def test_a_constant_that_is_written_twice_is_found() -> None:
    one, other = "MAX_URL, _X = 4_096, 7", "_URL_CHARS = 4096\n_X = 8\n_MAX_ROWS = 4096"
    trees = {"one": ast.parse(one), "other": ast.parse(other)}
    assert written_twice(trees) == [("one.MAX_URL", "other._URL_CHARS")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_function_fits_a_screen(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, functions)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in nodes}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_something_stands_between_two_exported_cells(path: Path) -> None:
    assert bare_pairs(path) == []
