"""The demo as a newcomer runs it: a process, a vector, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CACHE = Path(__file__).parent.parent / ".cache" / "demo"


def start_demo(*flags: str) -> subprocess.Popen[str]:
    """Start the demo with a hub that refuses connections, so that it cannot have real weights."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(CACHE / "no-hub")}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "heimdex_clip_worker.demo", "--cache", str(CACHE), *flags],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def finished():
    """Run the demo to its end; return its status, output and seconds."""
    start = time.monotonic()
    demo = start_demo()
    output, _ = demo.communicate(timeout=110)
    return demo.returncode, output, time.monotonic() - start


def test_prints_a_vector_of_512_numbers_and_norm_1(finished):
    status, output, _ = finished
    assert status == 0, output
    assert re.search(r"^dim +512$", output, re.M)
    assert re.search(r"^norm +1\.000000 \(normalized\)$", output, re.M)


def test_says_plainly_that_the_weights_are_not_the_real_ones(finished):
    _, output, _ = finished
    assert "THE REAL WEIGHTS CANNOT BE HAD" in output
    assert re.search(r"^model +ViT-B-32, weights seeded$", output, re.M)
    assert "weights openai" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaves_no_process_behind_when_stopped(number):
    demo = start_demo()
    for line in demo.stdout:
        if "Loading" in line:
            break
    children = psutil.Process(demo.pid).children(recursive=True)
    assert children
    demo.send_signal(number)
    demo.communicate(timeout=30)
    assert demo.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_missing_photograph_is_one_line():
    demo = start_demo("--photo", "nowhere.jpg")
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert output.splitlines()[-1] == "[ERROR] The demo failed: there is no file nowhere.jpg"
