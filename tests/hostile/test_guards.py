"""The list of guards is kept with the code: each entry finds its line, once."""

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
def test_a_guard_is_where_the_list_says(guard, tmp_path):
    remove_guards.without(guard, tmp_path)


def test_the_table_in_the_notebook_is_the_list():
    listed = [(guard.module, guard.name) for guard in remove_guards.GUARDS]
    assert len(set(listed)) == len(listed)
    assert list(remove_guards.known()) == listed


def test_the_tests_in_the_table_are_there():
    def is_there(test: str) -> bool:
        path, _, name = test.partition("::")
        text = (remove_guards.ROOT / "tests" / path).read_text(encoding="utf-8")
        return f"def {name.partition('[')[0]}(" in text

    assert [test for test in remove_guards.known().values() if not is_there(test)] == []
