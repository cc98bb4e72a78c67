"""The suite's short soak run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import beside
import pytest

pytestmark = [pytest.mark.model, pytest.mark.process]

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.parametrize("name", ["one-byte-chunks", "key-updates", "twenty-jobs-of-slow-servers"])
def test_a_photograph_beside_a_hostile_job(name):
    """`make soak` measures all kinds for longer."""
    results = asyncio.run(beside.measure_all({name: beside.KINDS[name]}, seconds=0.5))
    if results[name].verdict == "busy":
        pytest.skip("machine too busy, nothing shown")
    assert results[name].verdict == "ok"


def times(alone: list[float], beside_it: list[float], load: float = 1.0) -> beside.Round:
    return beside.Round(alone, beside_it, [load])


QUICK, LATE = times([0.01, 0.02], [0.02, 0.9]), times([0.01, 0.02], [0.02, 1.2])
UNSTABLE = times([0.01, 0.01, 0.4], [0.02])


@pytest.mark.parametrize(
    ("rounds", "verdict", "status"),
    [
        ([QUICK, QUICK, QUICK], "ok", 0),
        ([QUICK, LATE, LATE], "LATE", 1),
        ([QUICK, LATE, QUICK], "busy", 2),  # once of three times: measure again
        ([QUICK, UNSTABLE, QUICK], "busy", 2),
        ([LATE, UNSTABLE, LATE], "busy", 2),
        ([times([0.01], [2.9], load=3.0)] * 3, "busy", 2),  # others took the CPUs
        ([times([0.01], [3.1], load=3.0)] * 3, "LATE", 1),
        ([times([0.01], [0.9], load=3.0)] * 3, "ok", 0),
    ],
)
def test_the_limit_is_the_same_on_a_busy_machine(rounds, verdict, status):
    result = beside.Result(rounds)
    assert (result.verdict, beside.exit_status({"a kind": result})) == (verdict, status)


@pytest.mark.parametrize("how", [(), ("--processes",)], ids=["threads", "processes"])
def test_mixed_requests_leak_nothing(how):
    command = [sys.executable, str(SOAK), "--count", "1500", "--steps", "3", "--beside", "0", *how]
    run = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stdout + run.stderr
