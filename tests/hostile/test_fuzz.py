"""The suite's short fuzz run, and every input that failed once."""

from __future__ import annotations

import subprocess
import sys

import fuzz
import pytest

pytestmark = [pytest.mark.model, pytest.mark.process]

COUNT = 15_000
KEPT = sorted(fuzz.REGRESSIONS.glob("*.bin"))


@pytest.mark.timeout(300)
def test_mutated_images_end_in_an_image_or_a_declared_code():
    command = [sys.executable, fuzz.__file__, "--count", str(COUNT), "--processes", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = [int(word.partition("=")[2]) for word in run.stdout.split() if "=" in word]
    assert sum(counts) == COUNT


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_an_input_that_failed_once_does_not_fail_again(path):
    assert not fuzz.outcome(path.read_bytes()).startswith("BAD")
