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
