"""The short fuzz of the suite, and every input that ever failed, for ever."""

from __future__ import annotations

import subprocess
import sys

import fuzz
import pytest

COUNT = 30_000
KEPT = sorted(fuzz.REGRESSIONS.glob("*.bin"))


def test_mutated_images_end_in_a_picture_or_a_declared_code():
    command = [sys.executable, fuzz.__file__, "--count", str(COUNT), "--processes", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = [int(word.partition("=")[2]) for word in run.stdout.split() if "=" in word]
    assert sum(counts) == COUNT


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_once_failed(path):
    assert not fuzz.outcome(path.read_bytes()).startswith("BAD")
