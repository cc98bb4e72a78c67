"""The list of guards follows the code: each entry finds its line, once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "remove_guards", Path(__file__).with_name("remove_guards.py")
)
remove_guards = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = remove_guards
SPEC.loader.exec_module(remove_guards)


@pytest.mark.parametrize("guard", remove_guards.GUARDS, ids=lambda g: f"{g.module}: {g.name}")
def test_a_guard_is_marked_once_in_its_module(guard):
    text = (remove_guards.PACKAGE / remove_guards.FILES[guard.module]).read_text("utf-8")
    assert remove_guards.text_without(guard) != text


def test_each_comment_has_its_entry():
    listed = {guard.name for guard in remove_guards.GUARDS}
    modules = remove_guards.PACKAGE.rglob("*.py")
    found = {name for path in modules for name in remove_guards.marked(path.read_text("utf-8"))}
    assert found == listed


def test_the_table_in_the_notebook_is_the_list():
    listed = [(guard.module, guard.name) for guard in remove_guards.GUARDS]
    assert len(set(listed)) == len(listed)
    assert list(remove_guards.known()) == listed


def test_the_tests_in_the_table_exist():
    def is_there(test: str) -> bool:
        path, _, name = test.partition("::")
        text = (remove_guards.ROOT / "tests" / path).read_text(encoding="utf-8")
        return f"def {name.partition('[')[0]}(" in text

    assert [test for test in remove_guards.known().values() if not is_there(test)] == []
