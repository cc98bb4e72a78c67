"""A loopback stand-in for RunPod: it behaves to workers and to callers as the platform does.

Workers talk to job-take, job-take-batch, job-done, job-stop and ping, so the SDK's production loop
runs against it unchanged; callers talk to run, runsync, status, cancel, purge-queue and health.
`Behaviour` bends it for a test, `Platform` holds the jobs, `application` speaks HTTP, and
`PlatformServer` runs it all in a thread on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import requests
from aiohttp import web

ENDPOINT = "standin"
WORKER = "pod-standin"
WORKER_KEY = "rpa_STANDIN_WORKER_KEY_0123456789"
FINAL = {"COMPLETED", "FAILED", "CANCELLED"}


@dataclass
class Behaviour:
    """How the platform behaves; a test may change any of it while workers run."""

    take_hold_s: float = 0.5  # an empty job-take is held open this long, then answered with 204
    stop_hold_s: float = 1.0  # the same for job-stop
    max_batch: int = 1000  # most jobs in one job-take-batch
    reply_delay_s: float = 0.0  # every answer to a worker comes this much later
    take_faults: deque[int] = field(
        default_factory=deque
    )  # statuses for the next takes: 429, 500 ...
    done_faults: deque[int] = field(default_factory=deque)  # the same for the next job-done posts


@dataclass
class Job:
    """One job from submission to its end; times are `time.monotonic()` seconds."""

    id: str
    input: Any
    status: str = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    worker: str | None = None
    queued_at: float = field(default_factory=time.monotonic)
    taken_at: float | None = None
    done_at: float | None = None
    replies: list[dict] = field(default_factory=list)  # every body accepted by job-done, in order

    def public(self) -> dict:
        """Return what `/status` says of this job."""
        said: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.taken_at is not None:
            said |= {"delayTime": _ms(self.queued_at, self.taken_at), "workerId": self.worker}
        if self.taken_at is not None and self.done_at is not None:
            said["executionTime"] = _ms(self.taken_at, self.done_at)
        if self.output is not None:
            said["output"] = self.output
        if self.error is not None:
            said["error"] = self.error
        return said


def _ms(start: float, end: float) -> int:
    return round((end - start) * 1000)


class Platform:
    """The queue and its jobs. Everything here runs on one event loop."""

    def __init__(self, behaviour: Behaviour):
        self.behaviour = behaviour
        self.jobs: dict[str, Job] = {}
        self.queue: deque[Job] = deque()
        self.pings: list[dict[str, str]] = []
        self.calls: Counter[str] = Counter()
        self.strays: list[tuple[str, str]] = []  # job-done posts for jobs nobody submitted
        self._stops: dict[str, set[str]] = {}  # worker -> ids of jobs that it is to stop
        self._changed = asyncio.Condition()
        self._ids = itertools.count(1)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `ready()`; return False when `timeout_s` seconds pass first."""
        async with self._changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
        return ready()

    # --- callers --------------------------------------------------------------

    async def submit(self, job_input: Any) -> Job:
        job = Job(id=f"job-{next(self._ids)}-u1", input=job_input)
        self.jobs[job.id] = job
        self.queue.append(job)
        await self._notify()
        return job

    async def finished(self, job: Job, timeout_s: float) -> bool:
        return await self._until(lambda: job.status in FINAL, timeout_s)

    async def cancel(self, job: Job) -> None:
        if job.status in FINAL:
            return
        if job.status == "IN_QUEUE":
            self.queue.remove(job)
        else:
            self._stops.setdefault(str(job.worker), set()).add(job.id)
        job.status, job.done_at = "CANCELLED", time.monotonic()
        await self._notify()

    async def purge(self) -> int:
        waiting = list(self.queue)
        for job in waiting:
            await self.cancel(job)
        return len(waiting)

    def health(self) -> dict:
        states = Counter(job.status for job in self.jobs.values())
        busy = {job.worker for job in self.jobs.values() if job.status == "IN_PROGRESS"}
        ready = int(self.calls["job-take"] > 0)
        return {
            "jobs": {
                "completed": states["COMPLETED"],
                "failed": states["FAILED"],
                "inProgress": states["IN_PROGRESS"],
                "inQueue": states["IN_QUEUE"],
                "retried": 0,
            },
            "workers": {
                "idle": max(ready - len(busy), 0),
                "running": len(busy),
                "ready": ready,
                "throttled": 0,
                "initializing": 1 - ready,
                "unhealthy": int(any(ping.get("status") == "unhealthy" for ping in self.pings)),
            },
        }

    # --- workers --------------------------------------------------------------

    async def take(self, worker: str, limit: int, gone: Callable[[], bool]) -> list[Job]:
        """Hand out up to `limit` jobs, waiting for the first; none to a worker that has hung up."""
        await self._until(lambda: bool(self.queue), self.behaviour.take_hold_s)
        if gone():
            return []
        taken = [
            self.queue.popleft()
            for _ in range(min(limit, self.behaviour.max_batch, len(self.queue)))
        ]
        for job in taken:
            job.status, job.worker, job.taken_at = "IN_PROGRESS", worker, time.monotonic()
        if taken:
            await self._notify()
        return taken

    async def done(self, job: Job, reply: dict) -> None:
        """Record a reply; it decides the job's end unless that has come already."""
        job.replies.append(reply)
        if job.status not in FINAL:
            job.output, job.error, job.done_at = (
                reply.get("output"),
                reply.get("error"),
                time.monotonic(),
            )
            job.status = "FAILED" if "error" in reply else "COMPLETED"
        await self._notify()

    async def stops(self, worker: str) -> list[str]:
        """Return the ids of jobs that `worker` is to stop, waiting for the first."""
        await self._until(lambda: bool(self._stops.get(worker)), self.behaviour.stop_hold_s)
        return sorted(self._stops.pop(worker, ()))


def application(platform: Platform) -> web.Application:
    """Return the HTTP face of `platform`."""
    behaviour = platform.behaviour

    def job_of(request: web.Request) -> Job:
        try:
            return platform.jobs[request.match_info["job"]]
        except KeyError:
            raise web.HTTPNotFound(text="no such job") from None

    async def worker_call(request: web.Request, name: str) -> None:
        platform.calls[name] += 1
        if request.headers.get("Authorization") != WORKER_KEY:
            raise web.HTTPUnauthorized(text="wrong worker key")
        await asyncio.sleep(behaviour.reply_delay_s)

    async def take(request: web.Request) -> web.Response:
        await worker_call(request, "job-take")
        if behaviour.take_faults:
            return web.Response(status=behaviour.take_faults.popleft())
        worker, batch = request.match_info["worker"], request.match_info["kind"] == "job-take-batch"
        limit = int(request.query["batch_size"]) if batch else 1
        transport = request.transport
        jobs = await platform.take(
            worker, limit, lambda: transport is None or transport.is_closing()
        )
        told = [{"id": job.id, "input": job.input} for job in jobs]
        if not told:
            return web.Response(status=204)
        return web.json_response(told if batch else told[0])

    async def done(request: web.Request) -> web.Response:
        await worker_call(request, "job-done")
        body = await request.text()
        if behaviour.done_faults:
            return web.Response(status=behaviour.done_faults.popleft())
        if request.match_info["job"] not in platform.jobs:
            platform.strays.append((request.match_info["job"], body))
        await platform.done(job_of(request), json.loads(body))
        return web.Response(text="ok")

    async def stop(request: web.Request) -> web.Response:
        await worker_call(request, "job-stop")
        ids = await platform.stops(request.match_info["worker"])
        return web.json_response({"jobsToStop": ids}) if ids else web.Response(status=204)

    async def ping(request: web.Request) -> web.Response:
        await worker_call(request, "ping")
        platform.pings.append({"worker": request.match_info["worker"], **request.query})
        return web.Response(text="ok")

    async def run(request: web.Request) -> web.Response:
        job = await platform.submit((await request.json())["input"])
        return web.json_response(job.public())

    async def runsync(request: web.Request) -> web.Response:
        job = await platform.submit((await request.json())["input"])
        await platform.finished(job, float(request.query.get("wait", 90_000)) / 1000)
        return web.json_response(job.public())

    async def status(request: web.Request) -> web.Response:
        return web.json_response(job_of(request).public())

    async def cancel(request: web.Request) -> web.Response:
        await platform.cancel(job_of(request))
        return web.json_response(job_of(request).public())

    async def purge(request: web.Request) -> web.Response:
        return web.json_response({"removed": await platform.purge(), "status": "completed"})

    async def health(request: web.Request) -> web.Response:
        return web.json_response(platform.health())

    app = web.Application(client_max_size=20 * 1024**2)
    base = "/v2/{endpoint}"
    app.add_routes(
        [
            web.get(base + "/{kind:job-take|job-take-batch}/{worker}", take),
            web.post(base + "/job-done/{worker}/{job}", done),
            web.get(base + "/job-stop/{worker}", stop),
            web.get(base + "/ping/{worker}", ping),
            web.post(base + "/run", run),
            web.post(base + "/runsync", runsync),
            web.get(base + "/status/{job}", status),
            web.post(base + "/cancel/{job}", cancel),
            web.post(base + "/purge-queue", purge),
            web.get(base + "/health", health),
        ]
    )
    return app


class PlatformServer:
    """The stand-in on a free port of 127.0.0.1, in a thread; a context manager."""

    def __init__(self, **behaviour: Any):  # fields of Behaviour
        self.behaviour = Behaviour(**behaviour)
        self._http = requests.Session()
        self._http.trust_env = False
        self._ready = threading.Event()

    def __enter__(self) -> PlatformServer:
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="platform", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the platform stand-in did not start within 10 s")
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        self._http.close()

    async def _serve(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self.platform = Platform(self.behaviour)
        runner = web.AppRunner(application(self.platform), access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v2/{ENDPOINT}"
        self._ready.set()
        await self._closing.wait()
        await runner.cleanup()

    def worker_env(self) -> dict[str, str]:
        """Return what the platform gives a worker, and the SDK's switches for a plain machine."""
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_POD_ID": WORKER,
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_AI_API_KEY": WORKER_KEY,
            "RUNPOD_PING_INTERVAL": "1000",  # milliseconds
            # Else the SDK wants 4 GB of free memory and a connection to 8.8.8.8:53.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "NO_PROXY": "127.0.0.1",  # the heartbeat takes proxies from the environment
        }

    def submit(self, job_input: Any) -> str:
        """Queue a job; return its id."""
        return self._http.post(f"{self.url}/run", json={"input": job_input}, timeout=30).json()[
            "id"
        ]

    def status(self, job_id: str) -> dict:
        return self._http.get(f"{self.url}/status/{job_id}", timeout=30).json()

    def cancel(self, job_id: str) -> dict:
        return self._http.post(f"{self.url}/cancel/{job_id}", timeout=30).json()

    def health(self) -> dict:
        return self._http.get(f"{self.url}/health", timeout=30).json()

    def runsync(self, job_input: Any, wait_s: float = 30) -> dict:
        """Run a job to its end; return its status."""
        wait = {"wait": str(round(wait_s * 1000))}
        return self._http.post(
            f"{self.url}/runsync", params=wait, json={"input": job_input}, timeout=wait_s + 10
        ).json()

    def job(self, job_id: str) -> Job:
        return self.platform.jobs[job_id]

    def wait(self, job_ids: Iterable[str], timeout_s: float) -> list[dict]:
        """Wait until every job has ended; return their states in order."""
        deadline = time.monotonic() + timeout_s
        for job_id in (ids := list(job_ids)):
            left = max(deadline - time.monotonic(), 0.01)
            call = self.platform.finished(self.job(job_id), left)
            if not asyncio.run_coroutine_threadsafe(call, self._loop).result(left + 10):
                raise AssertionError(f"{job_id} is {self.job(job_id).status} after {timeout_s} s")
        return [self.status(job_id) for job_id in ids]

    def until(self, ready: Callable[[Platform], bool], timeout_s: float, what: str) -> None:
        """Wait until `ready(platform)`, looked at every 20 ms."""
        deadline = time.monotonic() + timeout_s
        while not ready(self.platform):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {timeout_s} s")
            time.sleep(0.02)
