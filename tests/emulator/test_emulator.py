"""The emulator treats callers and workers as RunPod does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.server
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
from local_worker import FAKE, PhotoServer, fake_vector, is_alive, plain_env, signed

from heimdex_clip_worker.emulator.queue import MIB, InjectedFault, Job, JobQueue
from heimdex_clip_worker.emulator.server import Emulator, EmulatorServer

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

SDK = str(Path(__file__).parents[1] / "sdk_worker.py")
HTTP = requests.Session()
HTTP.trust_env = False


def as_caller(server: EmulatorServer, method: str, path: str, **options) -> requests.Response:
    """Send a caller's request."""
    options = {"headers": server.headers, "timeout": 20, **options}
    return HTTP.request(method, server.url + path, **options)


def as_worker(server: EmulatorServer, method: str, path: str, **options) -> requests.Response:
    """Send a worker's request."""
    return as_caller(server, method, path, headers={"Authorization": server.worker_key}, **options)


def take(server: EmulatorServer, pod: str = "pod-1") -> str:
    """Take a job as a worker; return its id."""
    response = as_worker(server, "GET", f"/job-take/{pod}")
    assert response.status_code == 200, response.text
    return response.json()["id"]


def reply(server: EmulatorServer, job_id: str, pod: str = "pod-1", **fields: object) -> int:
    """Reply to a job as a worker; return the HTTP status."""
    body = json.dumps(fields or {"output": {"fine": True}})
    return as_worker(server, "POST", f"/job-done/{pod}/{job_id}", data=body).status_code


def until(is_ready: Callable[[], bool], timeout_s: float, failure: str) -> None:
    """Wait until `is_ready()`; fail with `failure`."""
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        assert time.monotonic() < deadline, f"{failure}: not within {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


# --- access -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/status/x", "/health", "/job-take/pod-1", "/ping/pod-1"])
@pytest.mark.parametrize("key", [None, "", "Bearer ", "Bearer rpa_WRONG", "Bearer k\u00e9y"])
def test_a_wrong_key_is_refused(server, path, key):
    headers = {} if key is None else {"Authorization": key.encode()}
    assert as_caller(server, "GET", path, headers=headers).status_code == 401


def test_the_key_may_come_without_bearer_and_workers_have_another_key(server):
    bare = {"Authorization": server.api_key}
    assert as_caller(server, "GET", "/health", headers=bare).status_code == 200
    assert as_caller(server, "GET", "/ping/pod-1").status_code == 401
    assert as_worker(server, "GET", "/health").status_code == 401


def test_another_endpoint_is_404_and_another_host_is_403(server):
    elsewhere = server.base_url + "/another/health"
    assert HTTP.get(elsewhere, headers=server.headers, timeout=5).status_code == 404
    rebound = server.headers | {"Host": f"evil.example:{server.port}"}
    assert as_caller(server, "GET", "/health", headers=rebound).status_code == 403


def test_the_server_listens_on_loopback_only_and_reports_a_port_in_use(server):
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("127.0.0.2", server.port)) != 0
    with pytest.raises(ValueError, match=r"127\.0\.0\.1, not 0\.0\.0\.0"):
        EmulatorServer(host="0.0.0.0")
    with pytest.raises(OSError, match="in use"), EmulatorServer(port=server.port):
        pass


def test_without_aiohttp_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(RuntimeError, match=r"heimdex-clip-worker\[worker\]"), EmulatorServer():
        pass


# --- requests -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"input": NaN}', "NaN"),
        ("[1]", "not a JSON object"),
        ("{}", "no input"),
        ('{"input": {}, "webhook": "example.com"}', "webhook"),
        ('{"input": {}, "s3Config": "mine"}', "s3Config"),
        ('{"input": {}, "policy": 5}', "policy"),
        ('{"input": {}, "policy": {"ttl": 9999}}', "10000 to 604800000"),
        ('{"input": {}, "policy": {"executionTimeout": 604800001}}', "5000 to 604800000"),
        ('{"input": {}, "policy": {"ttl": true}}', "True"),
    ],
)
def test_a_malformed_request_is_400(server, body, words):
    response = as_caller(server, "POST", "/run", data=body)
    assert response.status_code == 400 and words in response.json()["error"], response.text
    assert not server.queue.jobs


@pytest.mark.parametrize(
    "wait",
    [
        "999", "300001", "soon", "-1", "1e4", "", "0", "9" * 5000, "-" + "9" * 5000, "NaN", "inf",
        "1000.5", "2_000", "%D9%A2%D9%A0%D9%A0%D9%A0", "%C2%B2000", "%FF", "%00",
    ],
    ids=lambda wait: wait[:9],
)  # fmt: skip
def test_a_wait_outside_its_bounds_is_400(server, wait, caplog):
    response = as_caller(server, "POST", f"/runsync?wait={wait}", json={"input": {}})
    assert response.status_code == 400 and "1000 to 300000" in response.text
    assert not caplog.records


@pytest.mark.parametrize("size", ["9" * 5000, "-1", "NaN", "", "1.5", "%D9%A2", "%C2%B2"])
def test_a_batch_size_that_is_no_number_is_400(server, size, caplog):
    url = f"{server.url}/job-take-batch/pod-1?batch_size={size}"
    key = {"Authorization": f"Bearer {server.worker_key}"}
    with requests.Session() as http:
        http.trust_env = False
        response = http.get(url, headers=key, timeout=5)
    assert response.status_code == 400 and "is no number" in response.text and not caplog.records


@pytest.mark.parametrize("ttl", ["9" * 4000, "9" * 5000, "1e999", "-1e999", "-1", '"10000"'])
def test_a_time_to_live_that_is_no_number_is_400(server, ttl, caplog):
    body = f'{{"input": {{}}, "policy": {{"ttl": {ttl}}}}}'
    response = as_caller(server, "POST", "/run", data=body)
    assert response.status_code == 400 and not caplog.records and not server.queue.jobs


def test_the_largest_requests_are_10_and_20_mib(server):
    frame = len(b'{"input": ""}')
    for path, most in [("/run", 10 * MIB), ("/runsync?wait=1000", 20 * MIB)]:
        for size, status in [(most, 200), (most + 1, 400)]:
            body = b'{"input": "%s"}' % (b"x" * (size - frame))
            response = as_caller(server, "POST", path, data=body)
            assert response.status_code == status, (path, size, response.text[:100])
    assert response.json() == {"error": "bad request: body: exceeded max body size of 20MiB"}
    chunks = iter([b"x" * MIB] * 11)  # no Content-Length
    assert as_caller(server, "POST", "/run", data=chunks).status_code == 400


def test_an_unknown_job_is_404(server):
    paths = [
        ("GET", "/status/no"),
        ("POST", "/cancel/no"),
        ("POST", "/retry/no"),
        ("GET", "/stream/no"),
    ]
    assert {as_caller(server, *each).status_code for each in paths} == {404}
    assert reply(server, "no") == 404 and [*server.queue.strays] == [("pod-1", "no")]


# --- jobs ---------------------------------------------------------------------


def test_runsync_returns_the_id_when_the_job_takes_too_long(server):
    start = time.monotonic()
    first = as_caller(server, "POST", "/runsync?wait=1000", json={"input": {}}).json()
    assert first == {"id": first["id"], "status": "IN_QUEUE"} and first["id"].startswith("sync-")
    assert 1 <= time.monotonic() - start < 5
    assert take(server) == first["id"]
    assert server.status(first["id"])["status"] == "IN_PROGRESS"
    assert reply(server, first["id"]) == 200
    last = server.status(first["id"])
    assert last.keys() == {"id", "status", "delayTime", "executionTime", "workerId", "output"}
    assert (last["status"], last["output"]) == ("COMPLETED", {"fine": True})
    assert last["workerId"] == "pod-1"


def test_an_error_fails_a_job_and_retry_queues_it_unchanged(server):
    job = server.submit({"a": [1, "\ud800", {}]})
    taken = as_worker(server, "GET", "/job-take/pod-1").json()
    assert taken == {"id": job, "input": {"a": [1, "\ud800", {}]}}
    reply(server, job, error="no", output={"code": "X"})
    failed = server.status(job)
    assert (failed["status"], failed["error"]) == ("FAILED", "no")
    assert failed["output"] == {"code": "X"}
    assert as_caller(server, "POST", f"/retry/{job}").json() == {"id": job, "status": "IN_QUEUE"}
    assert server.status(job) == {"id": job, "status": "IN_QUEUE"}
    assert as_worker(server, "GET", "/job-take/pod-1").json() == taken
    reply(server, job)
    assert server.status(job)["status"] == "COMPLETED"
    assert as_caller(server, "POST", f"/retry/{job}").status_code == 400
    jobs = server.health()["jobs"]
    assert (jobs["failed"], jobs["completed"], jobs["retried"]) == (1, 1, 1)


def test_results_are_deleted_after_their_retention():
    with EmulatorServer(keep_run_s=60, keep_runsync_s=0.3) as server:
        kept = server.submit({})
        gone = as_caller(server, "POST", "/runsync?wait=1000", json={"input": {}}).json()["id"]
        assert [reply(server, take(server)) for _ in range(2)] == [200, 200]
        assert server.status(gone)["status"] == server.status(kept)["status"] == "COMPLETED"
        until(lambda: gone not in server.queue.jobs, 5, "the result is still there")
        assert as_caller(server, "GET", f"/status/{gone}").status_code == 404
        assert server.status(kept)["status"] == "COMPLETED"


def test_a_ttl_deletes_a_job_in_the_queue_or_in_progress():
    with EmulatorServer(min_ttl_s=0) as server:
        running = server.submit({}, policy={"ttl": 700})
        take(server)
        waiting = server.submit({}, policy={"ttl": 300})
        until(lambda: not server.queue.jobs, 5, "the jobs are still there")
        for job in (running, waiting):
            assert as_caller(server, "GET", f"/status/{job}").status_code == 404
        assert as_worker(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [running]}
        assert as_worker(server, "GET", "/job-take/pod-1").status_code == 204


def test_a_runsync_whose_job_is_deleted_is_404_at_once():
    with EmulatorServer(ttl_s=0.3) as server:
        response = as_caller(server, "POST", "/runsync", json={"input": {}}, timeout=5)
        assert response.status_code == 404


def test_a_job_that_runs_too_long_is_timed_out_and_stopped():
    with EmulatorServer(min_execution_timeout_s=0) as server:
        job = server.submit({}, policy={"executionTimeout": 300})
        time.sleep(0.5)  # time in the queue does not count
        assert take(server) == job
        (result,) = server.wait([job], 5)
        assert (result["status"], result["error"]) == ("TIMED_OUT", "executionTimeout exceeded")
        assert as_worker(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [job]}
        reply(server, job)
        assert server.status(job)["status"] == "TIMED_OUT"
        assert as_caller(server, "POST", f"/retry/{job}").json()["status"] == "IN_QUEUE"


def test_a_cancelled_job_is_stopped_and_its_late_reply_changes_nothing(server):
    job = server.submit({})
    take(server)
    assert server.cancel(job)["status"] == "CANCELLED"
    assert as_worker(server, "GET", "/job-stop/pod-1").json() == {"jobsToStop": [job]}
    assert as_worker(server, "GET", "/job-stop/pod-1").status_code == 204
    assert reply(server, job) == 200
    assert server.cancel(job)["status"] == "CANCELLED" and "output" not in server.status(job)


def test_purge_queue_cancels_waiting_jobs_only(server):
    running = server.submit({})
    take(server)
    waiting = [server.submit({}) for _ in range(3)]
    assert as_caller(server, "POST", "/purge-queue").json() == {"removed": 3, "status": "completed"}
    assert {server.status(job)["status"] for job in waiting} == {"CANCELLED"}
    assert server.status(running)["status"] == "IN_PROGRESS"


def test_a_stream_is_returned_piece_by_piece(server):
    job = server.submit({})
    take(server)
    for piece in "ab":
        path, data = f"/job-stream/pod-1/{job}", json.dumps({"output": piece})
        assert as_worker(server, "POST", path, data=data).status_code == 200
    whole = {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": "b"}]}
    assert as_caller(server, "GET", f"/stream/{job}").json() == whole
    assert as_caller(server, "GET", f"/stream/{job}").json()["stream"] == []


class Hook(http.server.ThreadingHTTPServer):
    """A server for webhooks, which answers the first call with 500."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HookRequest)
        self.bodies: list[dict] = []


class _HookRequest(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self.send_response(500 if len(self.server.bodies) == 1 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_the_end_of_a_job_is_posted_to_its_webhook_until_that_responds_with_200():
    with Hook() as hook, EmulatorServer(webhook_pause_s=0.05) as server:
        threading.Thread(target=hook.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{hook.server_port}/done?scene=1"
        job = server.submit({}, webhook=url)
        take(server)
        reply(server, job, output={"fine": True})
        until(lambda: len(hook.bodies) == 2, 10, "the webhook is called twice")
        time.sleep(0.3)
        assert hook.bodies == [server.status(job)] * 2
        hook.shutdown()


def test_a_webhook_beyond_this_machine_is_accepted_and_not_called(server, caplog):
    for url in ("https://example.com/done", "http://169.254.169.254/", "http://[::1/"):
        job = server.submit({}, webhook=url)
        take(server)
        assert reply(server, job) == 200 and server.status(job)["status"] == "COMPLETED"
        until(lambda job=job: f"the webhook of {job}" in caplog.text, 5, "nothing is logged")
    assert "example.com" not in caplog.text


def test_a_worker_gets_webhook_and_s3_config_and_no_caller_sees_them(server):
    extras = {"webhook": "https://example.com/a", "s3Config": {"accessSecret": 'a "secret"'}}
    job = server.submit({"a": 1}, **extras)
    path = "/job-take-batch/pod-1?batch_size=2"
    assert as_worker(server, "GET", path).json() == [{"id": job, "input": {"a": 1}, **extras}]
    assert "secret" not in json.dumps(server.status(job))


# --- rate limits --------------------------------------------------------------


def test_rates_are_the_documented_ones(server):
    assert server.behaviour.rates["run"] == (1000, 200)
    purges = [as_caller(server, "POST", "/purge-queue") for _ in range(3)]
    assert [response.status_code for response in purges] == [200, 200, 429]
    assert "Retry-After" not in purges[-1].headers


def test_a_rate_limit_is_per_operation_and_ends_with_its_window():
    rates = {"status": (2, 400)}
    with EmulatorServer(rates=rates, rate_window_s=0.6, retry_after_s=1) as server:
        job = server.submit({})
        responses = [as_caller(server, "GET", f"/status/{job}") for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 200, 429]
        assert responses[-1].headers["Retry-After"] == "1"
        assert as_caller(server, "GET", "/health").status_code == 200
        time.sleep(0.7)
        assert as_caller(server, "GET", f"/status/{job}").status_code == 200


def test_a_caller_that_hangs_up_no_longer_counts_against_the_rate():
    with EmulatorServer(rates={"runsync": (1000, 1)}) as server:
        for _ in range(3):
            with pytest.raises(requests.Timeout):
                as_caller(server, "POST", "/runsync", json={"input": {}}, timeout=0.3)
            time.sleep(0.2)
        assert len(server.queue.waiting) == 3  # the jobs themselves go on
        waiting = threading.Thread(target=server.runsync, args=({}, 1), daemon=True)
        waiting.start()
        server.until(lambda queue: len(queue.waiting) == 4, 5, "the call does not wait")
        assert as_caller(server, "POST", "/runsync", json={"input": {}}).status_code == 429
        waiting.join(5)


# --- faults -------------------------------------------------------------------


def test_each_injected_fault_happens_once_and_in_order(server):
    server.behaviour.fail("run", 429, InjectedFault(503, retry_after_s=7))
    server.behaviour.fail("caller", 500)
    responses = [as_caller(server, "POST", "/run", json={"input": {}}) for _ in range(4)]
    assert [response.status_code for response in responses] == [429, 503, 500, 200]
    assert "Retry-After" not in responses[0].headers
    assert responses[1].headers["Retry-After"] == "7"
    assert len(server.queue.jobs) == 1


def test_a_response_can_be_late_dropped_or_lost_after_the_work(server):
    slow, dropped = InjectedFault(hang_s=0.5), InjectedFault(drop=True)
    server.behaviour.fail("run", slow, dropped, InjectedFault(502, after=True))
    start = time.monotonic()
    assert as_caller(server, "POST", "/run", json={"input": {}}).status_code == 200
    assert time.monotonic() - start >= 0.5
    with pytest.raises(requests.ConnectionError):
        as_caller(server, "POST", "/run", json={"input": {}})
    assert as_caller(server, "POST", "/run", json={"input": {}}).status_code == 502
    assert len(server.queue.jobs) == 2  # the late one, and the one whose response was lost


def test_replies_can_be_changed_and_lost(server):
    jobs = [server.submit({}) for _ in range(3)]
    changes = iter([{"output": {"dim": 3}}, {}, None])
    server.behaviour.rewrite = lambda reply: next(changes)
    for _ in jobs:
        assert reply(server, take(server)) == 200
    changed, empty, lost = (server.status(job) for job in jobs)
    assert changed["output"] == {"dim": 3}
    assert empty["status"] == "COMPLETED" and "output" not in empty
    assert lost["status"] == "IN_PROGRESS"


def test_a_queue_can_be_slow_or_paused():
    with EmulatorServer(queue_delay_s=0.6, take_hold_s=0.2) as server:
        server.submit({})
        assert as_worker(server, "GET", "/job-take/pod-1").status_code == 204
        time.sleep(0.5)
        assert as_worker(server, "GET", "/job-take/pod-1").status_code == 200
        server.behaviour.queue_delay_s, server.behaviour.paused = 0, True
        server.submit({})
        assert as_worker(server, "GET", "/job-take/pod-1").status_code == 204
        server.behaviour.paused = False
        assert as_worker(server, "GET", "/job-take/pod-1").status_code == 200


# --- workers ------------------------------------------------------------------


def test_health_counts_workers_by_state(server):
    server.behaviour.take_hold_s = 0
    states = ["idle", "initializing", "ready", "running", "throttled", "unhealthy"]
    none = dict.fromkeys(states, 0)
    assert server.health()["workers"] == none
    as_worker(server, "GET", "/ping/pod-1")
    assert server.health()["workers"] == none | {"initializing": 1}
    as_worker(server, "GET", "/job-take/pod-1")
    assert server.health()["workers"] == none | {"idle": 1, "ready": 1}
    job = server.submit({})
    take(server)
    assert server.health()["workers"] == none | {"running": 1, "ready": 1}
    reply(server, job)
    as_worker(server, "GET", "/ping/pod-2?status=unhealthy")
    assert server.health()["workers"] == none | {"idle": 1, "ready": 1, "unhealthy": 1}
    server.behaviour.throttled = 1
    server.submit({})
    assert as_worker(server, "GET", "/job-take/pod-1").status_code == 204
    assert server.health()["workers"] == none | {"throttled": 1, "unhealthy": 1}


def test_a_silent_worker_loses_its_jobs_and_its_late_reply_is_accepted():
    with EmulatorServer(lost_after_s=1.0, take_hold_s=0.1) as server:
        jobs = [server.submit({"n": n}) for n in range(2)]
        assert [take(server), take(server)] == jobs
        later = server.submit({})
        until(lambda: len(server.queue.waiting) == 3, 5, "the jobs are not queued again")
        assert [*server.queue.waiting] == [*jobs, later]
        assert server.health()["jobs"]["retried"] == 2
        assert reply(server, jobs[0], pod="pod-1", output="late") == 200
        assert [take(server, "pod-2")] == jobs[1:]
        assert [server.status(job)["status"] for job in jobs] == ["COMPLETED", "IN_PROGRESS"]
        assert reply(server, jobs[0], pod="pod-2", output="later") == 200
        assert server.status(jobs[0])["output"] == "late" and server.job(jobs[0]).replies == 2


def test_a_worker_that_is_scaled_down_may_be_silent():
    with EmulatorServer(lost_after_s=0.2, take_hold_s=0) as server:
        server.call(server.queue.supervise, "pod-1")
        as_worker(server, "GET", "/job-take/pod-1")
        server.queue.workers["pod-1"].stopped = True
        time.sleep(0.8)
        workers = server.health()["workers"]
        assert (workers["idle"], workers["ready"], workers["unhealthy"]) == (1, 0, 0)


def test_a_worker_that_pings_keeps_its_jobs():
    with EmulatorServer(lost_after_s=1.0) as server:
        job = server.submit({})
        take(server)
        for _ in range(8):
            time.sleep(0.25)
            as_worker(server, "GET", "/ping/pod-1")
        assert server.status(job)["status"] == "IN_PROGRESS"


def test_a_worker_that_hangs_up_in_job_take_gets_no_job(server):
    server.behaviour.take_hold_s = 10
    for pod in ("pod-1", "pod-2", "pod-3"):
        with pytest.raises(requests.Timeout):
            as_worker(server, "GET", f"/job-take/{pod}", timeout=0.2)
    time.sleep(0.2)
    job = server.submit({})
    time.sleep(0.2)
    assert server.status(job)["status"] == "IN_QUEUE"
    assert take(server, "pod-4") == job


def test_a_result_that_is_too_large_is_refused_and_fails_its_job_in_the_end():
    with EmulatorServer(max_run_bytes=1000, max_attempts=2) as server:
        job = server.submit({})
        for _ in range(2):
            assert take(server) == job
            assert reply(server, job, output="x" * 1000) == 400
        result = server.status(job)
        assert result["status"] == "FAILED" and "over 1000 bytes" in result["error"], result


def test_a_result_that_is_not_json_is_refused(server):
    job = server.submit({})
    take(server)
    for data in ('{"output": NaN}', "no", "[]"):
        assert as_worker(server, "POST", f"/job-done/pod-1/{job}", data=data).status_code == 400
    assert server.status(job)["status"] == "IN_PROGRESS"


def test_a_batch_has_the_requested_size_and_a_wrong_size_is_400(server):
    jobs = [server.submit({}) for _ in range(5)]
    taken = as_worker(server, "GET", "/job-take-batch/pod-1?batch_size=3").json()
    assert [job["id"] for job in taken] == jobs[:3]
    assert as_worker(server, "GET", "/job-take-batch/pod-1?batch_size=-1").status_code == 400


def test_a_job_whose_delivery_fails_is_queued_again(server):
    """The worker resets its connection while the response is being sent."""
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


async def complete_jobs(queue: JobQueue, count: int, output: object) -> None:
    """Put `count` jobs through the queue."""
    for _ in range(count):
        queue.enqueue(Job(f"{queue.calls['n']}", '{"a": 1}', False, 60, 60))
        queue.calls["n"] += 1
        for job in await queue.take(queue.touch("pod-1"), 1):
            queue.accept(job, {"output": output}, "pod-1")


def rss() -> int:  # bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_thousand_jobs_leak_no_memory():
    vector = "x" * 10_000
    with EmulatorServer(keep_bytes=20 * MIB, keep_run_s=60) as server:
        queue = server.queue
        server.call(complete_jobs, queue, 4000, vector)  # fills the 20 MiB of finished jobs
        before = rss()
        for _ in range(16):
            server.call(complete_jobs, queue, 1000, vector)
        assert queue.counts["COMPLETED"] == 20_000
        assert queue.finished_bytes <= 20 * MIB and len(queue.jobs) == len(queue.finished) < 3000
        assert rss() - before < 20 * MIB
        server.behaviour.keep_run_s = 0.01
        for job in list(queue.finished.values()):
            server.call(queue.keep, job)
        until(lambda: not queue.jobs, 10, "finished jobs are still there")
        assert (queue.finished_bytes, len(queue.finished)) == (0, 0)
        assert queue.workers["pod-1"].jobs == set()


# --- with the SDK: workers and client -----------------------------------------


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Run two small workers under the SDK's loop."""
    # At DEBUG, its default level, the SDK's SIGTERM handler prints before it does anything else.
    # A signal that arrives while another line is being printed is then lost ("reentrant call").
    env = plain_env(tmp_path_factory.mktemp("emulator"), RUNPOD_LOG_LEVEL="INFO")
    options = {"command": [sys.executable, SDK], "env": env, "pause_s": 0.2, "max_attempts": 2}
    with Emulator(workers=2, **options) as emulator:
        emulator.wait_ready()
        yield emulator


def test_two_workers_share_the_jobs_and_are_ready(emulator):
    jobs = [emulator.submit({"echo": n, "sleep": 0.3}) for n in range(30)]
    results = emulator.wait(jobs, 30)
    assert [result["output"]["echo"] for result in results] == list(range(30))
    assert {result["workerId"] for result in results} == {"pod-1", "pod-2"}
    workers = emulator.health()["workers"]
    assert (workers["ready"], workers["unhealthy"], workers["initializing"]) == (2, 0, 0)


def test_the_sdks_own_client_works_with_the_emulator(emulator):
    import runpod

    runpod.endpoint_url_base, runpod.api_key = emulator.base_url, emulator.api_key
    endpoint = runpod.Endpoint(emulator.endpoint_id)
    assert endpoint.run_sync({"input": {"echo": "a"}}, timeout=20)["echo"] == "a"
    run = endpoint.run({"input": {"echo": "b"}})
    assert run.output(timeout=20)["echo"] == "b" and run.status() == "COMPLETED"
    cancelled = endpoint.run({"input": {"sleep": 30}})
    assert cancelled.cancel()["status"] == "CANCELLED"
    assert endpoint.purge_queue() == {"removed": 0, "status": "completed"}
    assert endpoint.health()["workers"]["ready"] == 2


def test_a_worker_killed_in_mid_job_is_restarted_and_its_job_is_done(emulator):
    before = emulator.health()["jobs"]["retried"]
    job = emulator.submit({"echo": "again", "sleep": 1.5})
    emulator.until(lambda queue: queue.jobs[job].status == "IN_PROGRESS", 10, "no worker took it")
    emulator.kill(pod := emulator.job(job).worker)
    emulator.until(lambda queue: queue.workers[pod].unhealthy, 5, "the worker looks healthy")
    (result,) = emulator.wait([job], 30)
    assert (result["status"], result["output"]["echo"]) == ("COMPLETED", "again")
    assert emulator.health()["jobs"]["retried"] == before + 1
    emulator.until(lambda queue: queue.workers[pod].polls, 30, "the worker is not restarted")
    assert emulator.health()["workers"]["unhealthy"] == 0


def test_a_job_that_kills_workers_fails_in_the_end(emulator):
    (result,) = emulator.wait([emulator.submit({"exit": 7})], 60)
    assert result["status"] == "FAILED" and "2 workers" in result["error"], result
    lines = [line for process in emulator.processes.values() for line in process.lines]
    assert any("ended with status 7" in line for line in lines)
    assert emulator.runsync({"echo": 1}, wait_s=60)["output"]["echo"] == 1


def test_a_worker_that_asks_for_a_refresh_is_restarted(emulator):
    polls = lambda queue: all(worker.polls for worker in queue.workers.values())  # noqa: E731
    emulator.until(polls, 30, "workers are down")
    result = emulator.runsync({"refresh": True}, wait_s=60)
    pod, pid = result["workerId"], result["output"]["pid"]
    until(lambda: not is_alive(pid), 15, "the old process goes on")
    emulator.until(lambda queue: queue.workers[pod].polls, 30, "no new process")
    assert not emulator.queue.workers[pod].unhealthy


def test_a_worker_that_was_started_by_hand_may_ask_for_a_refresh_or_be_too_slow():
    with Emulator(env={}, workers=0, timeout_stops_worker=True, min_execution_timeout_s=0) as one:
        done, slow = one.submit({}), one.submit({}, policy={"executionTimeout": 200})
        assert take(one) == done
        assert reply(one, done, output={}, stopPod=True) == 200
        assert one.status(done)["status"] == "COMPLETED"
        assert take(one) == slow
        one.wait([slow], 5)
        one.until(lambda queue: "pod-1" not in queue.workers, 5, "it is not lost")


def test_a_crash_loop_is_unhealthy_and_slows_down(tmp_path):
    crash = [sys.executable, "-c", "raise SystemExit('the weights are missing')"]
    with Emulator(command=crash, env=plain_env(tmp_path), pause_s=0.3) as emulator:
        with pytest.raises(RuntimeError, match="the weights are missing"):
            emulator.wait_ready(20)
        assert emulator.health()["workers"]["unhealthy"] == 1
        time.sleep(2.5)
        assert emulator.processes["pod-1"].starts <= 5
        workers = emulator.health()["workers"]
        assert (workers["unhealthy"], workers["ready"]) == (1, 0)


def test_the_real_handler_answers_under_the_emulator(tmp_path):
    command, env = [sys.executable, FAKE], plain_env(tmp_path)
    with PhotoServer() as photos, Emulator(command=command, env=env) as emulator:
        emulator.wait_ready()
        result = emulator.runsync(signed(photos.photo("coffee.jpg"), request_id="scene-1"))
    output = result["output"]
    assert (result["status"], output["request_id"]) == ("COMPLETED", "scene-1"), result
    assert output["embedding"][:5] == pytest.approx(fake_vector("coffee.jpg"), abs=1e-5)


# --- nothing is left behind ---------------------------------------------------

QUIET = "import os, time; os.fork(); os.write(1, b'pid %d\\n' % os.getpid()); time.sleep(600)"
OWNER = f"""
import os, sys, time
from heimdex_clip_worker.emulator.server import Emulator
command = [sys.executable, "-c", {QUIET!r}]
with Emulator(command=command, env=os.environ, echo=lambda line: print(line, flush=True)):
    time.sleep(600)
"""


def processes_of(group: int) -> list[int]:
    """List the processes of a process group, zombies excluded."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(group) and fields[0] != "Z":
            pids.append(int(folder.name))
    return pids


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_even_when_the_emulator_is_killed(tmp_path):
    command, env = [sys.executable, "-c", OWNER], plain_env(tmp_path)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as owner:
        try:
            lines = (re.fullmatch(r"pod-1 \| pid (\d+)\n", line) for line in owner.stdout)
            pids = [int(next(filter(None, lines))[1]) for _ in range(2)]
            group = os.getpgid(pids[0])
            assert len(processes_of(group)) == 3  # the watchdog, the worker and its child
        finally:
            owner.kill()
        try:
            until(lambda: not processes_of(group), 10, "processes are left behind")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


# --- many callers -------------------------------------------------------------


def test_forty_concurrent_callers_each_get_their_own_result(server):
    """One worker replies to forty jobs in another order than theirs."""
    results: dict[int, dict] = {}

    def run(n: int) -> None:
        results[n] = server.runsync({"n": n}, wait_s=20)

    callers = [threading.Thread(target=run, args=(n,)) for n in range(40)]
    for caller in callers:
        caller.start()
    server.until(lambda queue: len(queue.waiting) == 40, 10, "the jobs do not arrive")
    taken = as_worker(server, "GET", "/job-take-batch/pod-1?batch_size=40").json()
    for job in reversed(taken):
        reply(server, job["id"], output={"n": job["input"]["n"]})
    for caller in callers:
        caller.join(10)
    assert {n: result["output"]["n"] for n, result in results.items()} == {n: n for n in range(40)}
