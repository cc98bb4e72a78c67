"""The soak's short version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).with_name("soak.py")


def test_mixed_requests_leave_nothing_behind():
    command = [sys.executable, str(SOAK), "--count", "1500", "--steps", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stdout + run.stderr
