"""`heimdex-clip demo` as a newcomer runs it: one vector, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "demo"


def start_demo(*flags: str) -> subprocess.Popen[str]:
    """Start the demo with a model hub that refuses connections, so there are no real weights."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(CACHE / "no-hub")}
    command = [sys.executable, "-u", "-m", "heimdex_clip_worker.cli.main", "demo"]
    return subprocess.Popen(
        [*command, "--cache", str(CACHE), *flags], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished():
    """Run the demo to its end; return its exit status and its output."""
    demo = start_demo()
    output, _ = demo.communicate(timeout=110)
    return demo.returncode, output


def test_it_prints_a_vector_with_512_numbers_and_norm_1(finished):
    status, output = finished
    assert status == 0, output
    assert re.search(r"^dim +512$", output, re.M)
    assert re.search(r"^norm +1\.000000 \(normalized\)$", output, re.M)


def test_it_says_that_the_weights_are_not_the_real_ones(finished):
    _, output = finished
    assert "THE REAL WEIGHTS CANNOT BE HAD" in output
    assert re.search(r"^model +ViT-B-32, weights seeded$", output, re.M)
    assert "weights openai" not in output


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_no_process_behind_when_stopped(number):
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


def test_a_missing_photograph_is_reported_in_one_line():
    demo = start_demo("--photo", "nowhere.jpg")
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert output.splitlines()[-1] == "[ERROR] The demo failed: there is no file nowhere.jpg"
