"""Workers of the emulator start and stop as jobs come: real processes under the SDK's loop."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from local_worker import is_alive, plain_env

from heimdex_clip_worker.emulator.server import Emulator

pytestmark = [pytest.mark.process, pytest.mark.server]

SDK = str(Path(__file__).parents[1] / "sdk_worker.py")
STARTING_S = 60  # a worker on a busy machine


def emulator(home: Path, **options: object) -> Emulator:
    """Make an emulator of up to three small workers under the SDK's loop."""
    env = plain_env(home, RUNPOD_LOG_LEVEL="INFO")
    defaults = {"workers": 3, "take_hold_s": 0.2, "pause_s": 0.1}
    return Emulator(command=[sys.executable, SDK], env=env, **{**defaults, **options})


def test_an_endpoint_scales_to_zero_and_back_with_a_cold_start(tmp_path):
    scaling = {"scaler": "QUEUE_DELAY", "scaler_value": 60, "idle_timeout_s": 0.5}
    with emulator(tmp_path, cold_start_s=0.7, **scaling) as server:
        none = {"idle": 3, "initializing": 0, "ready": 0, "running": 0}
        assert server.health()["workers"].items() >= none.items() and not server.processes
        pids = []
        for _ in range(2):
            result = server.runsync({"echo": 1}, wait_s=STARTING_S)
            assert (result["status"], result["workerId"]) == ("COMPLETED", "pod-1"), result
            assert result["delayTime"] >= 700
            pids.append(result["output"]["pid"])
            server.until(lambda queue: queue.workers["pod-1"].stopped, 10, "it goes on")
            server.until(lambda _, pid=pids[-1]: not is_alive(pid), 15, "its process goes on")
            assert server.health()["workers"].items() >= none.items()
    assert pids[0] != pids[1]


def test_flash_boot_keeps_the_process_which_gets_400_while_it_is_stopped(tmp_path):
    scaling = {"scaler": "QUEUE_DELAY", "scaler_value": 60, "idle_timeout_s": 0.3}
    with emulator(tmp_path, flashboot=True, cold_start_s=0.1, **scaling) as server:
        first = server.runsync({"echo": 1}, wait_s=STARTING_S)
        server.until(lambda queue: queue.workers["pod-1"].stopped, 10, "it goes on")
        takes = server.queue.calls["job-take"]
        server.until(lambda queue: queue.calls["job-take"] > takes + 2, 10, "it asks no more")
        assert server.health()["workers"]["ready"] == 0
        second = server.runsync({"echo": 2}, wait_s=STARTING_S)
        assert first["output"]["pid"] == second["output"]["pid"]
        assert server.processes["pod-1"].starts == 1 and len(server.processes) == 1


def test_workers_follow_the_number_of_jobs_which_one_of_them_has_taken(tmp_path):
    """The delay of the queue would not: nothing waits there."""
    with emulator(tmp_path, scaler="REQUEST_COUNT", scaler_value=3, workers_min=1) as server:
        server.wait_ready(STARTING_S)
        jobs = [server.submit({"echo": n, "sleep": 3}) for n in range(7)]
        server.until(lambda queue: len(queue.workers["pod-1"].jobs) == 7, 10, "they are taken")
        server.until(lambda queue: len(server.processes) == 3, 10, "three workers start")
        assert {result["status"] for result in server.wait(jobs, 30)} == {"COMPLETED"}
        stopped = lambda queue: [w.stopped for w in queue.workers.values()].count(True)  # noqa: E731
        server.until(lambda queue: stopped(queue) == 2, STARTING_S, "two workers stop")


@pytest.mark.parametrize("stops", [False, True], ids=["the-job-alone", "the-worker-with-it"])
def test_an_execution_timeout_stops_the_job_or_the_worker(tmp_path, stops):
    options = {"workers": 1, "min_execution_timeout_s": 0, "timeout_stops_worker": stops}
    with emulator(tmp_path, **options) as server:
        server.wait_ready(STARTING_S)
        pid = server.runsync({"echo": 0})["output"]["pid"]
        other = server.submit({"echo": 1, "sleep": 2})
        late = server.submit({"sleep": 60}, policy={"executionTimeout": 1000})
        results = server.wait([late, other], STARTING_S)
        assert [result["status"] for result in results] == ["TIMED_OUT", "COMPLETED"]
        assert (results[1]["output"]["pid"] != pid) is stops
        assert server.health()["jobs"]["retried"] == int(stops)
        assert is_alive(pid) is not stops


def test_a_worker_that_is_scaled_down_while_it_starts_again_leaves_nothing(tmp_path):
    scaling = {"scaler": "QUEUE_DELAY", "cold_start_s": 30.0}
    start = time.monotonic()
    with emulator(tmp_path, **scaling) as server:
        server.submit({"echo": 1})
        server.until(lambda queue: not queue.workers["pod-1"].stopped, 10, "it is started")
    assert time.monotonic() - start < 10 and not server.processes


def test_an_unknown_scaler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="QUEUE_DELAY or REQUEST_COUNT"):
        emulator(tmp_path, scaler="CPU")
