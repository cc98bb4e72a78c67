"""The callers: they sign jobs, send them, time the answers, and hold every vector to the other's.

A caller sends its next job when the last one is answered. Bodies are kept as they come and read
after the clock has stopped, so that callers take as little of the machine as they can.
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

from benchmarks.workers import OURS, PLAIN, Worker
from heimdex_clip_worker.auth import new_nonce, sign, sign_v2

WAIT_S = 300  # what /runsync is asked to wait, and all that it may on the real platform
LEAST_COSINE = 0.999  # between the two workers' vectors of one photograph


class BenchmarkFailed(Exception):
    """A job failed, or an answer is not what it should be: no figure of this run counts."""


def single(url: str, request_id: str) -> dict:
    """Return the input of a job of one image, signed now, version 1, which plain knows too."""
    auth = sign(url, secret=SECRET, ts=int(time.time()))
    return {"image_url": url, "request_id": request_id, "auth": auth}


def signed(urls: list[str], request_id: str, encoding: str) -> dict:
    """Return the input of a job of one image or several, signed now as our client does it."""
    images = [{"image_url": url, "request_id": f"{request_id}.{i}"} for i, url in enumerate(urls)]
    asked = {"images": images} if len(urls) > 1 else {"image_url": urls[0]}
    job = {**asked, "request_id": request_id, "encoding_format": encoding}
    now, audience = int(time.time()), "heimdex-clip"
    auth = sign_v2(
        job, kid="v1", secret=SECRET, audience=audience, ts=now, exp=now + 600, nonce=new_nonce()
    )
    return {**job, "auth": auth}


def vector(answer: dict) -> np.ndarray:  # (dim,) float32
    """Return the vector in a one-image answer, whichever way it is written."""
    given = answer["embedding"]
    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given), "<f4")
    return np.asarray(given, np.float32)


def output_of(body: bytes) -> dict:
    """Return the output of a finished job; raise BenchmarkFailed if it failed."""
    said = json.loads(body)
    if said.get("status") != "COMPLETED":
        raise BenchmarkFailed(f"a job ended with {body[:500]!r}")
    return said["output"]


def vectors_of(body: bytes, request_id: str, count: int) -> list[np.ndarray]:
    """Return the vectors a job was answered with, in order; raise BenchmarkFailed."""
    output = output_of(body)
    items = output.get("results", [output])
    ids = [item.get("request_id") for item in items]
    one = [request_id] if "results" not in output else None
    if ids != (one or [f"{request_id}.{i}" for i in range(count)]):
        raise BenchmarkFailed(f"{request_id} of {count} was answered with {ids}")
    failed = [item for item in items if "error" in item]
    if failed:
        raise BenchmarkFailed(f"{len(failed)} of {count} images failed: {failed[0]}")
    return [vector(item) for item in items]


@dataclass
class Seen:
    """Every vector that the workers gave, by worker and photograph."""

    least: float = LEAST_COSINE
    vectors: dict[str, dict[str, list[np.ndarray]]] = field(
        default_factory=lambda: {PLAIN: defaultdict(list), OURS: defaultdict(list)}
    )

    def add(self, kind: str, name: str, found: np.ndarray) -> None:
        """Keep a vector, scaled to length 1."""
        self.vectors[kind][name].append(found / np.linalg.norm(found))

    def missing(self, kind: str) -> list[str]:
        """Return the photographs that only the other worker has embedded."""
        other = self.vectors[OURS if kind == PLAIN else PLAIN]
        return sorted(other.keys() - self.vectors[kind].keys())

    def compare(self) -> dict:  # for the results
        """Hold every vector to plain's first of the same photograph; raise BenchmarkFailed."""
        plain = {name: found[0] for name, found in self.vectors[PLAIN].items()}
        missing = self.missing(PLAIN)
        if missing:
            raise BenchmarkFailed(f"plain was never asked for {missing}")
        low, counts = {PLAIN: 1.0, OURS: 1.0}, dict.fromkeys((PLAIN, OURS), 0)
        for kind, photos in self.vectors.items():
            for name, found in photos.items():
                cosine = float((np.stack(found) @ plain[name]).min())
                counts[kind] += len(found)
                low[kind] = min(low[kind], cosine)
                if not cosine >= self.least:
                    raise BenchmarkFailed(f"{kind}: {name} has the cosine {cosine:.6f} to plain's")
        return {
            "photographs": len(plain),
            "vectors": counts,
            "least_cosine_to_plain": {kind: round(value, 8) for kind, value in low.items()},
            "allowed": self.least,
        }


@dataclass
class Run:
    """What came of a load."""

    images: int = 0
    seconds: float = 0.0  # from the first job's sending to the last one's answer
    latencies_s: list[float] = field(default_factory=list)  # a job each

    @property
    def rate(self) -> float:  # images a second
        """Return the images answered in a second."""
        return self.images / self.seconds


class Callers:
    """Sends jobs to the workers, each worker going through all photographs in the same order."""

    def __init__(self, session: aiohttp.ClientSession, origin: str, names: list[str]):
        self.session, self.origin, self.names = session, origin, names
        self.turns: dict[str, Iterator[str]] = defaultdict(lambda: itertools.cycle(names))
        self._numbers = itertools.count()

    async def post(self, worker: Worker, job_input: dict) -> bytes:
        """Return what the platform says of a job when it has ended."""
        params = {"wait": str(WAIT_S * 1000)}
        url, body = worker.url + "/runsync", {"input": job_input}
        call = self.session.post(url, params=params, json=body, headers=worker.headers)
        async with call as answer:
            return await answer.read()

    async def first(self, worker: Worker, seen: Seen, within_s: float = 240) -> float:  # seconds
        """Wait for a worker that is starting; return how long after its start it answered."""
        call = asyncio.create_task(self._first(worker))
        while not call.done():
            await asyncio.wait({call}, timeout=0.2)
            ended = worker.process.process.poll() is not None
            if not call.done() and (ended or time.perf_counter() - worker.started > within_s):
                call.cancel()
                raise BenchmarkFailed(f"{worker.kind} does not answer\n{worker.process.tail()}")
        seconds = time.perf_counter() - worker.started
        seen.add(worker.kind, self.names[0], vectors_of(call.result(), "first", 1)[0])
        return seconds

    async def _first(self, worker: Worker) -> bytes:
        while True:
            try:
                return await self.post(worker, single(f"{self.origin}/0/{self.names[0]}", "first"))
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
        delay_ms: int = 0,  # of the origin
        encoding: str = "base64",  # of our answers; plain knows only floats
    ) -> Run:
        """Send `jobs` jobs, `callers` at a time, and check every answer; raise BenchmarkFailed."""
        turn, answers = self.turns[worker.kind], []
        lots = iter([[next(turn) for _ in range(images)] for _ in range(jobs)])

        async def caller() -> None:
            for names in lots:
                urls = [f"{self.origin}/{delay_ms}/{name}" for name in names]
                name = f"job-{next(self._numbers)}"
                ours = worker.kind == OURS
                job = signed(urls, name, encoding) if ours else single(urls[0], name)
                sent = time.perf_counter()
                body = await self.post(worker, job)
                answers.append((name, names, body, time.perf_counter() - sent))

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(min(callers, jobs))))
        run = Run(jobs * images, time.perf_counter() - start)
        for name, names, body, latency in answers:
            for photo, found in zip(names, vectors_of(body, name, images), strict=True):
                seen.add(worker.kind, photo, found)
            run.latencies_s.append(latency)
        return run

    async def complete(self, worker: Worker, seen: Seen) -> None:
        """Ask a worker for the photographs that only the other one has been asked for."""
        for name in seen.missing(worker.kind):
            body = await self.post(worker, single(f"{self.origin}/0/{name}", "complete"))
            seen.add(worker.kind, name, vectors_of(body, "complete", 1)[0])
