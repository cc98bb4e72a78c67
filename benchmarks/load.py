"""The callers: they sign jobs, send them, time the replies, and compare the vectors.

A caller sends its next job after the reply to the last one. Replies are kept as bytes and parsed
after the clock has stopped, so that the callers use as little of the machine as possible.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from local_worker import SECRET

from benchmarks.workers import BASELINE, OURS, Worker
from heimdex_clip_worker.auth import new_nonce, sign, sign_v2

WAIT_S = 300  # for /runsync: the longest wait that the real platform allows
LEAST_COSINE = 0.999  # between the two workers' vectors of one photograph


class BenchmarkFailed(Exception):
    """A job failed, or a reply is wrong: no figure of this run counts."""


def single(url: str, request_id: str) -> dict:
    """Make the input of a job of one image, signed with version 1 as the baseline needs it."""
    auth = sign(url, secret=SECRET, ts=int(time.time()))
    return {"image_url": url, "request_id": request_id, "auth": auth}


def signed(urls: list[str], request_id: str, encoding: str) -> dict:
    """Make the input of a job of one or more images, signed as our client does it."""
    images = [{"image_url": url, "request_id": f"{request_id}.{i}"} for i, url in enumerate(urls)]
    form = {"images": images} if len(urls) > 1 else {"image_url": urls[0]}
    job = {**form, "request_id": request_id, "encoding_format": encoding}
    now, audience = int(time.time()), "heimdex-clip"
    auth = sign_v2(
        job, kid="v1", secret=SECRET, audience=audience, ts=now, exp=now + 600, nonce=new_nonce()
    )
    return {**job, "auth": auth}


def vector(reply: dict) -> np.ndarray:  # (dim,) float32
    """Decode the vector of one result, in either encoding."""
    embedding = reply["embedding"]
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.asarray(embedding, np.float32)


def output_of(body: bytes) -> dict:
    """Read the output of a finished job; raise BenchmarkFailed if it failed."""
    job = json.loads(body)
    if job.get("status") != "COMPLETED":
        raise BenchmarkFailed(f"a job ended with {body[:500]!r}")
    return job["output"]


def vectors_of(body: bytes, request_id: str, count: int) -> list[np.ndarray]:
    """Read the vectors of a job, in order; raise BenchmarkFailed unless all are there."""
    output = output_of(body)
    items = output.get("results", [output])
    ids = [item.get("request_id") for item in items]
    one = [request_id] if "results" not in output else None
    if ids != (one or [f"{request_id}.{i}" for i in range(count)]):
        raise BenchmarkFailed(f"{request_id} of {count} has results for {ids}")
    failed = [item for item in items if "error" in item]
    if failed:
        raise BenchmarkFailed(f"{len(failed)} of {count} images failed: {failed[0]}")
    return [vector(item) for item in items]


@dataclass
class Seen:
    """All vectors of the workers, by worker and photograph."""

    least: float = LEAST_COSINE
    vectors: dict[str, dict[str, list[np.ndarray]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, kind: str, name: str, row: np.ndarray) -> None:
        """Keep a vector, scaled to length 1."""
        self.vectors[kind][name].append(row / np.linalg.norm(row))

    def missing(self, kind: str) -> list[str]:
        """List the photographs that only other workers have embedded."""
        every = {name for photos in self.vectors.values() for name in photos}
        return sorted(every - self.vectors[kind].keys())

    def compare(self) -> dict:  # for the results
        """Compare all vectors with the first of the baseline; raise BenchmarkFailed."""
        baseline = {name: rows[0] for name, rows in self.vectors[BASELINE].items()}
        missing = self.missing(BASELINE)
        if missing:
            raise BenchmarkFailed(f"the baseline was never asked for {missing}")
        low, counts = dict.fromkeys(self.vectors, 1.0), dict.fromkeys(self.vectors, 0)
        for kind, photos in self.vectors.items():
            for name, rows in photos.items():
                cosine = float((np.stack(rows) @ baseline[name]).min())
                counts[kind] += len(rows)
                low[kind] = min(low[kind], cosine)
                if not cosine >= self.least:
                    raise BenchmarkFailed(f"{kind}: {name} has the cosine {cosine:.6f} to baseline")
        return {
            "photographs": len(baseline),
            "vectors": counts,
            "least_cosine_to_baseline": {kind: round(value, 8) for kind, value in low.items()},
            "allowed": self.least,
        }


@dataclass
class Run:
    """The outcome of a load."""

    images: int = 0
    seconds: float = 0.0  # from sending the first job to the last reply
    latencies_s: list[float] = field(default_factory=list)  # one for each job

    @property
    def rate(self) -> float:  # images a second
        """Images per second."""
        return self.images / self.seconds


class Callers:
    """Send jobs to the workers; each worker gets all photographs in the same order."""

    def __init__(self, session: aiohttp.ClientSession, server: str, names: list[str]):
        self.session, self.server, self.names = session, server, names
        self.turns: dict[str, Iterator[str]] = defaultdict(lambda: itertools.cycle(names))
        self._numbers = itertools.count()

    async def post(self, worker: Worker, job_input: dict) -> bytes:
        """Post a job, wait for its end, and return the platform's response."""
        params = {"wait": str(WAIT_S * 1000)}
        url, body = worker.url + "/runsync", {"input": job_input}
        call = self.session.post(url, params=params, json=body, headers=worker.headers)
        async with call as response:
            return await response.read()

    async def first(self, worker: Worker, seen: Seen, within_s: float = 240) -> float:  # seconds
        """Wait for the first reply of a starting worker; return the seconds since its start."""
        call = asyncio.create_task(self._first(worker))
        while not call.done():
            await asyncio.wait({call}, timeout=0.2)
            ended = worker.process.process.poll() is not None
            if not call.done() and (ended or time.perf_counter() - worker.started > within_s):
                call.cancel()
                raise BenchmarkFailed(f"{worker.kind} does not reply\n{worker.process.tail()}")
        seconds = time.perf_counter() - worker.started
        seen.add(worker.kind, self.names[0], vectors_of(call.result(), "first", 1)[0])
        return seconds

    async def _first(self, worker: Worker) -> bytes:
        while True:
            try:
                return await self.post(worker, single(f"{self.server}/0/{self.names[0]}", "first"))
            except aiohttp.ClientConnectorError:  # the local server does not listen yet
                await asyncio.sleep(0.02)

    async def drive(
        self,
        worker: Worker,
        seen: Seen,
        *,
        jobs: int,
        callers: int,
        images: int = 1,  # in a job
        delay_ms: int = 0,  # of the image server
        encoding: str = "base64",  # of our replies; the baseline knows only floats
    ) -> Run:
        """Send `jobs` jobs, `callers` at a time, and check every reply; raise BenchmarkFailed."""
        turn, replies = self.turns[worker.kind], []
        photos = iter([[next(turn) for _ in range(images)] for _ in range(jobs)])

        async def caller() -> None:
            for names in photos:
                urls = [f"{self.server}/{delay_ms}/{name}" for name in names]
                name = f"job-{next(self._numbers)}"
                ours = worker.kind == OURS
                job = signed(urls, name, encoding) if ours else single(urls[0], name)
                sent = time.perf_counter()
                body = await self.post(worker, job)
                replies.append((name, names, body, time.perf_counter() - sent))

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(min(callers, jobs))))
        run = Run(jobs * images, time.perf_counter() - start)
        for name, names, body, latency in replies:
            for photo, row in zip(names, vectors_of(body, name, images), strict=True):
                seen.add(worker.kind, photo, row)
            run.latencies_s.append(latency)
        return run

    async def complete(self, worker: Worker, seen: Seen) -> None:
        """Ask a worker for the photographs that only the other one has embedded."""
        for name in seen.missing(worker.kind):
            body = await self.post(worker, single(f"{self.server}/0/{name}", "complete"))
            seen.add(worker.kind, name, vectors_of(body, "complete", 1)[0])
