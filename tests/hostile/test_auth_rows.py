"""Run the catalogue's rows for authentication against `auth.verify`, one test for each row."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from heimdex_clip_worker.auth import Keyring, verify
from heimdex_clip_worker.errors import AuthFailed


def sibling(name: str) -> ModuleType:
    """Import a module from this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


rows_auth = sibling("rows_auth")
KIT = rows_auth.Kit(now=1_764_000_000)
KEYRING = Keyring(
    KIT.v1_secret,
    KIT.keys,
    audience=KIT.audience,
    window_s=KIT.window_s,
    max_lifetime_s=KIT.max_lifetime_s,
)


@pytest.mark.parametrize("row", rows_auth.ROWS, ids=lambda row: row.id)
def test_row(row):
    job = row.build(KIT)
    start = time.thread_time()
    try:
        verify(job, keyring=KEYRING, now=KIT.now + 0.25)
        code, detail = "OK", ""
    except AuthFailed as error:
        code, detail = error.code, error.detail
        assert str(error) == "Authentication failed"
    seconds = time.thread_time() - start

    assert code == row.code, detail
    assert seconds < 0.05, f"{seconds * 1000:.1f} ms of CPU"  # at most a few on a quiet machine
    assert not re.search(r"[0-9a-f]{32}|token|hostile-rows", detail), detail


def test_the_ids_of_rows_are_unique():
    ids = [row.id for row in rows_auth.ROWS]
    assert len(set(ids)) == len(ids)


def test_rows_can_be_posted():
    for row in rows_auth.ROWS:
        text = json.dumps(row.build(KIT))
        assert json.dumps(json.loads(text)) == text, row.id
