"""The local platform does to callers and workers what RunPod does, and leaves nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from local_worker import PhotoServer, plain_env
from test_production_loop import FAKE, fake_vector, signed

from heimdex_clip_worker import platform as module
from heimdex_clip_worker.jobs import jobs_for
from heimdex_clip_worker.platform import (
    MIB,
    Fault,
    Job,
    LocalPlatform,
    Platform,
    PlatformServer,
    accept,
)

SDK = str(Path(__file__).with_name("sdk_worker.py"))
HTTP = requests.Session()
HTTP.trust_env = False


def call(server: PlatformServer, method: str, path: str, **options: object) -> requests.Response:
    """Call as a caller does, or with other headers."""
    options = {"headers": server.headers, "timeout": 20, **options}
    return HTTP.request(method, server.url + path, **options)


def work(server: PlatformServer, method: str, path: str, **options: object) -> requests.Response:
    """Call as a worker does."""
    return call(server, method, path, headers={"Authorization": server.worker_key}, **options)


def take(server: PlatformServer, pod: str = "pod-1") -> str:
    """Be a worker that takes a job; return its id."""
    answer = work(server, "GET", f"/job-take/{pod}")
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def reply(server: PlatformServer, job_id: str, pod: str = "pod-1", **said: object) -> int:
    """Be a worker that replies to a job; return the status."""
    body = json.dumps(said or {"output": {"fine": True}})
    return work(server, "POST", f"/job-done/{pod}/{job_id}", data=body).status_code


def until(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `ready()`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[PlatformServer]:
    with PlatformServer() as server:
        yield server


# --- who may call -------------------------------------------------------------


@pytest.mark.parametrize("path", ["/status/x", "/health", "/job-take/pod-1", "/ping/pod-1"])
@pytest.mark.parametrize("key", [None, "", "Bearer ", "Bearer rpa_WRONG", "Bearer k\u00e9y"])
def test_a_wrong_key_is_refused(server, path, key):
    headers = {} if key is None else {"Authorization": key.encode()}
    assert call(server, "GET", path, headers=headers).status_code == 401


def test_the_key_may_come_bare_and_workers_have_another_one(server):
    bare = {"Authorization": server.api_key}
    assert call(server, "GET", "/health", headers=bare).status_code == 200
    assert call(server, "GET", "/ping/pod-1").status_code == 401
    assert work(server, "GET", "/health").status_code == 401


def test_another_endpoint_is_not_found_and_another_host_is_refused(server):
    elsewhere = server.base_url + "/another/health"
    assert HTTP.get(elsewhere, headers=server.headers, timeout=5).status_code == 404
    rebound = server.headers | {"Host": f"evil.example:{server.port}"}
    assert call(server, "GET", "/health", headers=rebound).status_code == 403


def test_it_listens_on_loopback_alone_and_says_when_it_cannot(server):
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("127.0.0.2", server.port)) != 0
    with pytest.raises(ValueError, match=r"127\.0\.0\.1, not 0\.0\.0\.0"):
        PlatformServer(host="0.0.0.0")
    with pytest.raises(OSError, match="in use"), PlatformServer(port=server.port):
        pass


def test_without_aiohttp_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(RuntimeError, match=r"heimdex-clip-worker\[worker\]"), PlatformServer():
        pass


# --- what may be asked --------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"input": NaN}', "NaN"),
        ("[1]", "not a JSON object"),
        ("{}", "no input"),
        ('{"input": {}, "webhook": "https://example.com"}', "webhook"),
        ('{"input": {}, "policy": 5}', "policy"),
        ('{"input": {}, "policy": {"ttl": 9999}}', "10000 to 604800000"),
        ('{"input": {}, "policy": {"executionTimeout": 604800001}}', "5000 to 604800000"),
        ('{"input": {}, "policy": {"ttl": true}}', "True"),
    ],
)
def test_a_request_of_the_wrong_form_is_400(server, body, what):
    answer = call(server, "POST", "/run", data=body)
    assert (answer.status_code, what in answer.json()["error"]) == (400, True), answer.text
    assert not server.platform.jobs


@pytest.mark.parametrize("wait", ["999", "300001", "soon", "-1", "1e4", ""])
def test_a_wait_outside_its_bounds_is_400(server, wait):
    answer = call(server, "POST", f"/runsync?wait={wait}", json={"input": {}})
    assert (answer.status_code, "1000 to 300000" in answer.text) == (400, True)


def test_ten_and_twenty_mebibytes_are_the_largest_requests(server):
    frame = len(b'{"input": ""}')
    for path, most in [("/run", 10 * MIB), ("/runsync?wait=1000", 20 * MIB)]:
        for size, status in [(most, 200), (most + 1, 400)]:
            body = b'{"input": "%s"}' % (b"x" * (size - frame))
            answer = call(server, "POST", path, data=body)
            assert answer.status_code == status, (path, size, answer.text[:100])
    assert answer.json() == {"error": "bad request: body: exceeded max body size of 20MiB"}
    chunks = iter([b"x" * MIB] * 11)  # no Content-Length
    assert call(server, "POST", "/run", data=chunks).status_code == 400


def test_a_job_nobody_knows_is_404(server):
    paths = [
        ("GET", "/status/no"),
        ("POST", "/cancel/no"),
        ("POST", "/retry/no"),
        ("GET", "/stream/no"),
    ]
    assert {call(server, *each).status_code for each in paths} == {404}
    assert reply(server, "no") == 404 and [*server.platform.strays] == [("pod-1", "no")]


# --- jobs and their ends ------------------------------------------------------


def test_runsync_comes_back_with_the_id_when_it_takes_too_long(server):
    start = time.monotonic()
    said = call(server, "POST", "/runsync?wait=1000", json={"input": {}}).json()
    assert said == {"id": said["id"], "status": "IN_QUEUE"} and said["id"].startswith("sync-")
    assert 1 <= time.monotonic() - start < 5
    assert take(server) == said["id"]
    assert server.status(said["id"])["status"] == "IN_PROGRESS"
    assert reply(server, said["id"]) == 200
    told = server.status(said["id"])
    assert told.keys() == {"id", "status", "delayTime", "executionTime", "workerId", "output"}
    assert (told["status"], told["output"], told["workerId"]) == (
        "COMPLETED",
        {"fine": True},
        "pod-1",
    )


def test_an_error_makes_a_job_failed_and_retry_queues_it_as_it_was(server):
    job = server.submit({"a": [1, "\ud800", {}]})
    given = work(server, "GET", "/job-take/pod-1").json()
    assert given == {"id": job, "input": {"a": [1, "\ud800", {}]}}
    reply(server, job, error="no", output={"code": "X"})
    said = server.status(job)
    assert (said["status"], said["error"], said["output"]) == ("FAILED", "no", {"code": "X"})
    assert call(server, "POST", f"/retry/{job}").json() == {"id": job, "status": "IN_QUEUE"}
    assert server.status(job) == {"id": job, "status": "IN_QUEUE"}
    assert work(server, "GET", "/job-take/pod-1").json() == given
    reply(server, job)
    assert server.status(job)["status"] == "COMPLETED"
    assert call(server, "POST", f"/retry/{job}").status_code == 400
    jobs = server.health()["jobs"]
    assert (jobs["failed"], jobs["completed"], jobs["retried"]) == (1, 1, 1)


def test_results_are_gone_when_their_time_is_over():
    with PlatformServer(keep_run_s=60, keep_runsync_s=0.3) as server:
        kept = server.submit({})
        gone = call(server, "POST", "/runsync?wait=1000", json={"input": {}}).json()["id"]
        assert [reply(server, take(server)) for _ in range(2)] == [200, 200]
        assert server.status(gone)["status"] == server.status(kept)["status"] == "COMPLETED"
        until(lambda: gone not in server.platform.jobs, 5, "the result is kept")
        assert call(server, "GET", f"/status/{gone}").status_code == 404
        assert server.status(kept)["status"] == "COMPLETED"


def test_a_ttl_deletes_a_job_whatever_it_does():
    with PlatformServer(min_ttl_s=0) as server:
        running = server.submit({}, policy={"ttl": 700})
        take(server)
        waiting = server.submit({}, policy={"ttl": 300})
        until(lambda: not server.platform.jobs, 5, "the jobs are kept")
        assert {
            call(server, "GET", f"/status/{job}").status_code for job in (running, waiting)
        } == {404}
        assert work(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [running]}
        assert work(server, "GET", "/job-take/pod-1").status_code == 204


def test_a_runsync_whose_job_is_deleted_is_404_at_once():
    with PlatformServer(ttl_s=0.3) as server:
        answer = call(server, "POST", "/runsync", json={"input": {}}, timeout=5)
        assert answer.status_code == 404


def test_a_job_that_runs_too_long_is_timed_out_and_stopped():
    with PlatformServer(min_execution_timeout_s=0) as server:
        job = server.submit({}, policy={"executionTimeout": 300})
        time.sleep(0.5)  # time in the queue does not count
        assert take(server) == job
        said = server.wait([job], 5)[0]
        assert (said["status"], said["error"]) == ("TIMED_OUT", "executionTimeout exceeded")
        assert work(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [job]}
        reply(server, job)
        assert server.status(job)["status"] == "TIMED_OUT"
        assert call(server, "POST", f"/retry/{job}").json()["status"] == "IN_QUEUE"


def test_a_cancelled_job_is_stopped_and_its_late_reply_changes_nothing(server):
    job = server.submit({})
    take(server)
    assert server.cancel(job)["status"] == "CANCELLED"
    assert work(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [job]}
    assert work(server, "GET", "/job-stop/pod-1").status_code == 204
    assert reply(server, job) == 200
    assert server.cancel(job)["status"] == "CANCELLED" and "output" not in server.status(job)


def test_purging_takes_the_waiting_jobs_and_no_other(server):
    running = server.submit({})
    take(server)
    waiting = [server.submit({}) for _ in range(3)]
    assert call(server, "POST", "/purge-queue").json() == {"removed": 3, "status": "completed"}
    assert {server.status(job)["status"] for job in waiting} == {"CANCELLED"}
    assert server.status(running)["status"] == "IN_PROGRESS"


def test_a_stream_is_fetched_piece_by_piece(server):
    job = server.submit({})
    take(server)
    for piece in "ab":
        path = f"/job-stream/pod-1/{job}"
        assert work(server, "POST", path, data=json.dumps({"output": piece})).status_code == 200
    whole = {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": "b"}]}
    assert call(server, "GET", f"/stream/{job}").json() == whole
    assert call(server, "GET", f"/stream/{job}").json()["stream"] == []


# --- limits of rate -----------------------------------------------------------


def test_rates_are_the_documented_ones(server):
    assert server.behaviour.rates["run"] == (1000, 200)
    purges = [call(server, "POST", "/purge-queue") for _ in range(3)]
    assert [answer.status_code for answer in purges] == [200, 200, 429]
    assert "Retry-After" not in purges[-1].headers


def test_a_rate_is_per_operation_and_over_in_its_window():
    rates = {"status": (2, 400)}
    with PlatformServer(rates=rates, rate_window_s=0.6, retry_after_s=1) as server:
        job = server.submit({})
        answers = [call(server, "GET", f"/status/{job}") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].headers["Retry-After"] == "1"
        assert call(server, "GET", "/health").status_code == 200
        time.sleep(0.7)
        assert call(server, "GET", f"/status/{job}").status_code == 200


def test_a_caller_that_hangs_up_frees_its_place():
    with PlatformServer(rates={"runsync": (1000, 1)}) as server:
        for _ in range(3):
            with pytest.raises(requests.Timeout):
                call(server, "POST", "/runsync", json={"input": {}}, timeout=0.3)
            time.sleep(0.2)
        assert len(server.platform.queue) == 3  # the jobs themselves go on
        waiting = threading.Thread(target=server.runsync, args=({}, 1), daemon=True)
        waiting.start()
        server.until(lambda state: len(state.queue) == 4, 5, "it does not wait")
        assert call(server, "POST", "/runsync", json={"input": {}}).status_code == 429
        waiting.join(5)


# --- faults -------------------------------------------------------------------


def test_faults_are_answered_once_and_in_order(server):
    server.behaviour.fail("run", 429, Fault(503, retry_after_s=7))
    server.behaviour.fail("caller", 500)
    answers = [call(server, "POST", "/run", json={"input": {}}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [429, 503, 500, 200]
    assert answers[1].headers["Retry-After"] == "7" and "Retry-After" not in answers[0].headers
    assert len(server.platform.jobs) == 1


def test_an_answer_can_be_late_lost_or_dropped_after_the_work(server):
    server.behaviour.fail("run", Fault(hang_s=0.5), Fault(drop=True), Fault(502, after=True))
    start = time.monotonic()
    assert call(server, "POST", "/run", json={"input": {}}).status_code == 200
    assert time.monotonic() - start >= 0.5
    with pytest.raises(requests.ConnectionError):
        call(server, "POST", "/run", json={"input": {}})
    assert call(server, "POST", "/run", json={"input": {}}).status_code == 502
    assert len(server.platform.jobs) == 2  # the late one, and the one whose answer was lost


def test_replies_can_be_changed_and_lost(server):
    jobs = [server.submit({}) for _ in range(3)]
    changes = iter([{"output": {"dim": 3}}, {}, None])
    server.behaviour.rewrite = lambda reply: next(changes)
    for _ in jobs:
        assert reply(server, take(server)) == 200
    said = [server.status(job) for job in jobs]
    assert said[0]["output"] == {"dim": 3}
    assert said[1]["status"] == "COMPLETED" and "output" not in said[1]
    assert said[2]["status"] == "IN_PROGRESS"


def test_a_queue_can_be_slow_or_stand_still():
    with PlatformServer(queue_delay_s=0.6, take_hold_s=0.2) as server:
        server.submit({})
        assert work(server, "GET", "/job-take/pod-1").status_code == 204
        time.sleep(0.5)
        assert work(server, "GET", "/job-take/pod-1").status_code == 200
        server.behaviour.queue_delay_s, server.behaviour.paused = 0, True
        server.submit({})
        assert work(server, "GET", "/job-take/pod-1").status_code == 204
        server.behaviour.paused = False
        assert work(server, "GET", "/job-take/pod-1").status_code == 200


# --- workers ------------------------------------------------------------------


def test_workers_are_counted_by_what_they_do(server):
    server.behaviour.take_hold_s = 0
    nobody = dict.fromkeys(
        ["idle", "initializing", "ready", "running", "throttled", "unhealthy"], 0
    )
    assert server.health()["workers"] == nobody
    work(server, "GET", "/ping/pod-1")
    assert server.health()["workers"] == nobody | {"initializing": 1}
    work(server, "GET", "/job-take/pod-1")
    assert server.health()["workers"] == nobody | {"idle": 1, "ready": 1}
    job = server.submit({})
    take(server)
    assert server.health()["workers"] == nobody | {"running": 1, "ready": 1}
    reply(server, job)
    work(server, "GET", "/ping/pod-2?status=unhealthy")
    assert server.health()["workers"] == nobody | {"idle": 1, "ready": 1, "unhealthy": 1}
    server.behaviour.throttled = 1
    server.submit({})
    assert work(server, "GET", "/job-take/pod-1").status_code == 204
    assert server.health()["workers"] == nobody | {"throttled": 1, "unhealthy": 1}


def test_a_silent_worker_loses_its_jobs_and_its_late_reply_still_counts():
    with PlatformServer(lost_after_s=1.0, take_hold_s=0.1) as server:
        jobs = [server.submit({"n": n}) for n in range(2)]
        assert [take(server), take(server)] == jobs
        later = server.submit({})
        until(lambda: len(server.platform.queue) == 3, 5, "the jobs are not put back")
        assert [*server.platform.queue] == [*jobs, later]
        assert server.health()["jobs"]["retried"] == 2
        assert reply(server, jobs[0], pod="pod-1", output="late") == 200
        assert [take(server, "pod-2")] == jobs[1:]
        assert [server.status(job)["status"] for job in jobs] == ["COMPLETED", "IN_PROGRESS"]
        assert reply(server, jobs[0], pod="pod-2", output="later") == 200
        assert server.status(jobs[0])["output"] == "late" and server.job(jobs[0]).replies == 2


def test_a_worker_that_pings_keeps_its_jobs():
    with PlatformServer(lost_after_s=1.0) as server:
        job = server.submit({})
        take(server)
        for _ in range(8):
            time.sleep(0.25)
            work(server, "GET", "/ping/pod-1")
        assert server.status(job)["status"] == "IN_PROGRESS"


def test_a_worker_that_hangs_up_in_job_take_gets_no_job(server):
    server.behaviour.take_hold_s = 10
    for pod in ("pod-1", "pod-2", "pod-3"):
        with pytest.raises(requests.Timeout):
            work(server, "GET", f"/job-take/{pod}", timeout=0.2)
    time.sleep(0.2)
    job = server.submit({})
    time.sleep(0.2)
    assert server.status(job)["status"] == "IN_QUEUE"
    assert take(server, "pod-4") == job


def test_a_result_too_large_is_refused_and_the_job_fails_in_the_end():
    with PlatformServer(max_run_bytes=1000, max_attempts=2) as server:
        job = server.submit({})
        for _ in range(2):
            assert take(server) == job
            assert reply(server, job, output="x" * 1000) == 400
        said = server.status(job)
        assert (said["status"], "over 1000 bytes" in said["error"]) == ("FAILED", True), said


def test_a_result_that_is_not_json_is_refused(server):
    job = server.submit({})
    take(server)
    for data in ('{"output": NaN}', "no", "[]"):
        assert work(server, "POST", f"/job-done/pod-1/{job}", data=data).status_code == 400
    assert server.status(job)["status"] == "IN_PROGRESS"


def test_a_batch_is_as_large_as_asked_and_a_wrong_size_is_400(server):
    jobs = [server.submit({}) for _ in range(5)]
    given = work(server, "GET", "/job-take-batch/pod-1?batch_size=3").json()
    assert [job["id"] for job in given] == jobs[:3]
    assert work(server, "GET", "/job-take-batch/pod-1?batch_size=-1").status_code == 400


def test_jobs_that_cannot_be_delivered_go_back(server):
    """A worker that resets its connection while the answer is being sent has no job."""
    job = server.submit("x" * (8 * MIB))
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lines = [
            f"GET /v2/{server.endpoint_id}/job-take/pod-1 HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            f"Authorization: {server.worker_key}",
        ]
        wire.sendall("\r\n".join([*lines, "", ""]).encode())
        wire.recv(100)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: server.job(job).status == "IN_QUEUE", 5, "the job is lost")
    assert take(server, "pod-2") == job


# --- memory -------------------------------------------------------------------


async def through(platform: Platform, jobs: int, output: object) -> None:
    """Put so many jobs through the queue."""
    worker = platform.heard("pod-1")
    for number in range(jobs):
        platform.enqueue(Job(f"{platform.calls['n']}", '{"a": 1}', False, 60, 60))
        platform.calls["n"] += 1
        for job in await jobs_for(platform, worker, 1):
            accept(platform, job, {"output": output}, "pod-1")
        if number % 100 == 0:
            worker.heard_at = time.monotonic()


def rss() -> int:  # bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_thousand_jobs_leave_nothing_behind():
    vector = "x" * 10_000
    with PlatformServer(keep_bytes=20 * MIB, keep_run_s=60) as server:
        server.call(through, server.platform, 4000, vector)  # fills what may be kept
        before, state = rss(), server.platform
        for _ in range(16):
            server.call(through, state, 1000, vector)
        assert state.counts["COMPLETED"] == 20_000
        assert state.kept_bytes <= 20 * MIB and len(state.jobs) == len(state.finished) < 3000
        assert rss() - before < 20 * MIB
        server.behaviour.keep_run_s = 0.01
        for job in list(state.finished.values()):
            server.call(state.unkeep, job)
            server.call(state.keep, job)
        until(lambda: not state.jobs, 10, "finished jobs are kept")
        assert (state.kept_bytes, len(state.finished), state.workers["pod-1"].jobs) == (0, 0, set())


# --- the SDK on both sides ----------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPlatform]:
    """Two workers of a few lines under the SDK's loop."""
    # At DEBUG, its default, the SDK's handler of SIGTERM prints before it does anything: a signal
    # that comes while another line is printed is lost ("reentrant call"). Our worker says INFO.
    env = plain_env(tmp_path_factory.mktemp("local"), RUNPOD_LOG_LEVEL="INFO")
    with LocalPlatform(
        workers=2,
        command=[sys.executable, SDK],
        env=env,
        inherit=False,
        pause_s=0.2,
        max_attempts=2,
    ) as local:
        local.wait_ready()
        yield local


def test_two_workers_share_the_jobs_and_are_ready(local):
    jobs = [local.submit({"echo": n, "sleep": 0.3}) for n in range(30)]
    states = local.wait(jobs, 30)
    assert [said["output"]["echo"] for said in states] == list(range(30))
    assert {said["workerId"] for said in states} == {"pod-1", "pod-2"}
    workers = local.health()["workers"]
    assert (workers["ready"], workers["unhealthy"], workers["initializing"]) == (2, 0, 0)


def test_the_sdks_own_client_is_content(local):
    import runpod

    runpod.endpoint_url_base, runpod.api_key = local.base_url, local.api_key
    endpoint = runpod.Endpoint(local.endpoint_id)
    assert endpoint.run_sync({"input": {"echo": "a"}}, timeout=20)["echo"] == "a"
    run = endpoint.run({"input": {"echo": "b"}})
    assert run.output(timeout=20)["echo"] == "b" and run.status() == "COMPLETED"
    doomed = endpoint.run({"input": {"sleep": 30}})
    assert doomed.cancel()["status"] == "CANCELLED"
    assert endpoint.purge_queue() == {"removed": 0, "status": "completed"}
    assert endpoint.health()["workers"]["ready"] == 2


def test_a_worker_killed_in_mid_job_is_started_again_and_its_job_done(local):
    before = local.health()["jobs"]["retried"]
    job = local.submit({"echo": "again", "sleep": 1.5})
    local.until(lambda state: state.jobs[job].status == "IN_PROGRESS", 10, "the job is not taken")
    local.kill(pod := local.job(job).worker)
    local.until(lambda state: state.workers[pod].unhealthy, 5, "the worker looks healthy")
    said = local.wait([job], 30)[0]
    assert (said["status"], said["output"]["echo"]) == ("COMPLETED", "again")
    assert local.health()["jobs"]["retried"] == before + 1
    local.until(lambda state: state.workers[pod].polls, 30, "the worker does not come back")
    assert local.health()["workers"]["unhealthy"] == 0


def test_a_job_that_kills_workers_fails_in_the_end(local):
    said = local.wait([local.submit({"exit": 7})], 60)[0]
    assert (said["status"], "2 workers" in said["error"]) == ("FAILED", True), said
    assert any("ended with status 7" in line for w in local.workers.values() for line in w.lines)
    assert local.runsync({"echo": 1}, wait_s=60)["output"]["echo"] == 1


def test_a_worker_that_asks_for_it_is_started_anew(local):
    local.until(lambda state: all(w.polls for w in state.workers.values()), 30, "workers are down")
    said = local.runsync({"refresh": True}, wait_s=60)
    pod, pid = said["workerId"], said["output"]["pid"]
    until(lambda: not alive(pid), 15, "the old process goes on")
    local.until(lambda state: state.workers[pod].polls, 30, "no new process")
    assert not local.platform.workers[pod].unhealthy


def alive(pid: int) -> bool:
    """Tell whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_crash_loop_is_unhealthy_and_slows_down(tmp_path):
    crash = [sys.executable, "-c", "raise SystemExit('the weights are missing')"]
    with LocalPlatform(command=crash, env=plain_env(tmp_path), inherit=False, pause_s=0.3) as local:
        with pytest.raises(RuntimeError, match="the weights are missing"):
            local.wait_ready(20)
        assert local.health()["workers"]["unhealthy"] == 1
        time.sleep(2.5)
        assert local.workers["pod-1"].starts <= 5
        assert local.health()["workers"] | {"unhealthy": 1, "ready": 0} == local.health()["workers"]


def test_the_real_handler_answers_through_it(tmp_path):
    env = plain_env(tmp_path)
    with (
        PhotoServer() as photos,
        LocalPlatform(command=[sys.executable, FAKE], env=env, inherit=False) as local,
    ):
        local.wait_ready()
        said = local.runsync(signed(photos.photo("coffee.jpg"), request_id="scene-1"))
    assert (said["status"], said["output"]["request_id"]) == ("COMPLETED", "scene-1"), said
    assert said["output"]["embedding"][:5] == pytest.approx(fake_vector("coffee.jpg"), abs=1e-5)


# --- nothing is left behind ---------------------------------------------------

QUIET = "import os, time; os.fork(); os.write(1, b'pid %d\\n' % os.getpid()); time.sleep(600)"
OWNER = f"""
import sys, time
from heimdex_clip_worker.platform import LocalPlatform
command = [sys.executable, "-c", {QUIET!r}]
with LocalPlatform(command=command, echo=lambda line: print(line, flush=True)):
    time.sleep(600)
"""


def group_of(pid: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(pid) and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_even_when_the_platform_is_killed(tmp_path):
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(
        command, env=plain_env(tmp_path), stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            lines = (re.fullmatch(r"pod-1 \| pid (\d+)\n", line) for line in owner.stdout)
            pids = [int(next(filter(None, lines))[1]) for _ in range(2)]
            group = os.getpgid(pids[0])
            assert len(group_of(group)) == 3  # the guard, the worker and its child
        finally:
            owner.kill()
        try:
            until(lambda: not group_of(group), 10, "processes are left behind")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


COMMAND = """
import argparse, sys
from heimdex_clip_worker.platform import add_arguments, run
parser = argparse.ArgumentParser("heimdex-clip platform")
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_command_prints_what_a_caller_needs_and_ends_cleanly(tmp_path, number, code):
    args = [sys.executable, "-c", COMMAND, "--env", "LOG_LEVEL=DEBUG", "--", sys.executable, SDK]
    env = {k: v for k, v in plain_env(tmp_path).items() if k != "EMBEDDING_HMAC_SECRET"}
    with subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            exports = {}
            for line in process.stdout:
                if found := re.fullmatch(r"export (\w+)=(\S+)\n", line):
                    exports[found[1]] = found[2]
                if "Ctrl-C" in line:
                    break
            url = f"{exports['RUNPOD_BASE_URL']}/{exports['RUNPOD_CLIP_ENDPOINT_ID']}"
            key = {"Authorization": f"Bearer {exports['RUNPOD_API_KEY']}"}
            call = {"headers": key, "timeout": 60, "json": {"input": {"echo": "hi"}}}
            said = HTTP.post(f"{url}/runsync?wait=50000", **call).json()
            assert said["output"]["echo"] == "hi" and len(exports["EMBEDDING_HMAC_SECRET"]) == 64
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(15) == code
        finally:
            process.kill()
    assert "pod-1 | " in rest and not alive(said["output"]["pid"])


def test_a_secret_that_is_there_is_not_shown(server):
    lines = module.lines_for_callers(server, None)
    assert "export EMBEDDING" not in lines and f"RUNPOD_API_KEY={server.api_key}" in lines


@pytest.mark.parametrize("args", [["--env", "x"], ["--workers", "-1"], ["--port", "70000"]])
def test_wrong_usage_is_status_2(args, capsys):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args(args)) == 2
    assert "[ERROR]" in capsys.readouterr().err


def test_its_help_has_an_example(capsys):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert "heimdex-clip platform --workers 2" in parser.format_help()


def test_many_callers_at_once_each_get_their_own_answer(server):
    """Forty callers wait while one worker answers in another order."""
    said: dict[int, dict] = {}

    def ask(n: int) -> None:
        said[n] = server.runsync({"n": n}, wait_s=20)

    callers = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
    for caller in callers:
        caller.start()
    server.until(lambda state: len(state.queue) == 40, 10, "the jobs do not arrive")
    given = work(server, "GET", "/job-take-batch/pod-1?batch_size=40").json()
    for job in reversed(given):
        reply(server, job["id"], output={"n": job["input"]["n"]})
    for caller in callers:
        caller.join(10)
    assert {n: answer["output"]["n"] for n, answer in said.items()} == {n: n for n in range(40)}
