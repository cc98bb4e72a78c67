"""Send many mixed requests to one worker: `python tests/hostile/soak.py --count 10000`.

First an honest photograph is timed beside each kind of hostile job (see `beside.py`): it may take
one second more than alone, and where the machine is too busy to show that, the exit status is 2 at
best. Then valid and hostile jobs go through real authentication, fetching and
decoding, from servers on this machine, with a fake model. Descriptors, threads and memory must not
grow. Each job must get one reply with the expected code, and each photograph always the same
vector. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]

import beside  # noqa: E402
import images as im  # noqa: E402
import psutil  # noqa: E402
import rows_auth  # noqa: E402
import rows_image  # noqa: E402
import rows_payload  # noqa: E402
import stand  # noqa: E402

from heimdex_clip_worker.serving.decode import PixelLimits  # noqa: E402
from heimdex_clip_worker.serving.download import Fetcher, FetchLimits  # noqa: E402

KIT = rows_auth.Kit(now=1_764_000_000)
DRIFT = 0.05  # of memory, between the end of the warm-up and the end
MAX_BYTES, TIMEOUT_S = 2_000_000, 2.0
PHOTOS = ("chelsea.jpg", "clock.png", "coffee.jpg", "flower.jpg")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond to one request with a photograph, or in one of the hostile ways."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode().partition("?")[0].lstrip("/")
        for part in RESPONSES[path] if path in RESPONSES else [ok(stand.photo(path))]:
            if part is None:
                await asyncio.wait_for(reader.read(), 20)  # until the worker closes the connection
                continue
            writer.write(part)
            await writer.drain()
    writer.close()


def ok(body: bytes, more: str = "", length: int | None = None) -> bytes:
    """Make a response of status 200."""
    size = len(body) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


def moved(to: str) -> bytes:
    """Make a redirect."""
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


RESPONSES: dict[str, list[bytes | None]] = {  # path -> what is sent; None: wait
    "404": [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
    "503": [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"],
    "html": [ok(b"<!doctype html>" * 50)],
    "short": [ok(b"\xff\xd8\xff" + b"x" * 99, length=5000)],
    "large": [ok(b"", length=50_000_000)],
    "endless": [b"HTTP/1.1 200 OK\r\n\r\n\xff\xd8\xff", *[bytes(100_000)] * 40],
    "silent": [None],
    "drip": [b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"\xff", None],
    "loop": [moved("/loop")],
    "inside": [moved("http://10.0.0.1/latest")],
    "metadata": [moved("http://169.254.169.254/latest/meta-data")],
    "file": [moved("file:///etc/passwd")],
    "redirect-body": [moved("/404").replace(b": 0", b": 1000000"), *[bytes(100_000)] * 10],
    "garbage": [b"\x16\x03\x01 what?\r\n\r\n"],
    "nothing": [],
    "coding": [ok(b"x", "Content-Encoding: br\r\n")],
    "gzip": [ok(b"\x1f\x8b\x08\0trash", "Content-Encoding: gzip\r\n")],
    "bomb.png": [ok(im.png(im.ihdr((1, 60_000)), b"x"))],
    "pixels.gif": [ok(im.gif((9000, 9000), None, im.lzw(9)))],
    "scans.jpg": [ok(im.scan_bomb(500))],
    "half.jpg": [ok(stand.photo()[:9000])],
    "svg": [ok(b"<svg xmlns='http://www.w3.org/2000/svg'/>")],
}
CODES = {
    "404": "SOURCE_HTTP", "503": "SOURCE_HTTP", "html": "UNSUPPORTED_FORMAT",
    "short": "BAD_RESPONSE", "large": "IMAGE_TOO_LARGE", "endless": "IMAGE_TOO_LARGE",
    "silent": "FETCH_TIMEOUT", "drip": "FETCH_TIMEOUT", "loop": "TOO_MANY_REDIRECTS",
    "inside": "URL_NOT_ALLOWED", "metadata": "URL_NOT_ALLOWED", "file": "INVALID_URL",
    "redirect-body": "SOURCE_HTTP", "garbage": "BAD_RESPONSE", "nothing": "CONNECT_FAILED",
    "coding": "UNSUPPORTED_ENCODING", "gzip": "BAD_RESPONSE", "bomb.png": "IMAGE_LIMITS",
    "pixels.gif": "IMAGE_LIMITS", "scans.jpg": "IMAGE_LIMITS", "half.jpg": "DECODE_FAILED",
    "svg": "UNSUPPORTED_FORMAT",
}  # fmt: skip
SLOW = ("silent", "drip")  # each takes the whole deadline
TOO_BIG = 100_000  # characters: rows that test sizes are left out


@dataclass
class Report:
    """The results of a run."""

    jobs: int = 0
    seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int, float]] = field(default_factory=list)  # see `sample`

    def problems(self) -> list[str]:
        """List the problems in words."""
        _, fds, threads, mib = self.samples[0]
        _, fds_after, threads_after, mib_after = self.samples[-1]
        problems = self.wrong[:10]
        if fds_after > fds:
            problems.append(f"{fds_after} descriptors, {fds} after the warm-up")
        if threads_after > threads:
            problems.append(f"{threads_after} threads, {threads} after the warm-up")
        if mib_after > mib * (1 + DRIFT):
            problems.append(f"{mib_after:.0f} MiB, {mib:.0f} after the warm-up")
        return problems

    def table(self) -> str:
        """Format the figures as a small table."""
        lines = [f"{'jobs':>8} {'fds':>6} {'threads':>8} {'MiB':>8}"]
        for jobs, fds, threads, mib in self.samples:
            lines.append(f"{jobs:>8,} {fds:>6} {threads:>8} {mib:>8.1f}")
        counts = ", ".join(f"{code} {n:,}" for code, n in self.codes.most_common())
        lines.append(counts)
        rate = (
            f"{self.jobs:,} jobs in {self.seconds:.1f} s ({self.jobs / self.seconds:,.0f} a second)"
        )
        return "\n".join([*lines, rate])


def payloads() -> list[tuple[Any, set[str]]]:
    """Make hostile jobs that end before a download, with the codes that they may end with."""
    jobs = [
        ({"input": row.build(KIT)}, {row.code, row.or_else, "INVALID_URL"})
        for row in rows_auth.ROWS
        if row.code != "OK"
    ]
    jobs += [(row.build(KIT), {row.code}) for row in rows_payload.ROWS if row.code != "OK"]
    return [(job, codes) for job, codes in jobs if size_of(job) < TOO_BIG]


def size_of(job: Any) -> int:
    """Estimate how many characters a job has."""
    try:
        return len(repr(job))
    except (ValueError, RecursionError):  # an integer of too many digits
        return 0


def bodies() -> dict[str, str]:
    """Add the catalogue's small image files to the responses; return path -> code."""
    codes = {}
    for row in rows_image.ROWS:
        if not row.heavy and row.code != "OK":
            data = row.build()
            if len(data) < TOO_BIG and "webp-lossless-header" not in row.id:  # of another limit
                RESPONSES[f"row/{row.id}"] = [ok(data)]
                codes[f"row/{row.id}"] = row.code
    return codes


def plan(count: int, base: str, seed: int) -> list[tuple[Any, set[str], str]]:
    """Make `count` jobs, the codes that each may end with, and the photograph of valid ones."""
    rng, hostile, paths = random.Random(seed), payloads(), {**CODES, **bodies()}
    quick, jobs = [path for path in paths if path not in SLOW], []
    for number in range(count):
        kind = rng.random()
        if kind < 0.4:
            photo = rng.choice(PHOTOS)
            job = KIT.v1(url=f"{base}/{photo}?token=t0k3n", request_id=str(number))
            jobs.append(({"input": job}, {"OK"}, photo))
        elif kind < 0.7:
            path = rng.choice(SLOW) if rng.random() < 0.02 else rng.choice(quick)
            job = KIT.v1(url=f"{base}/{path}?token=t0k3n", request_id=str(number))
            jobs.append(({"input": job}, {paths[path]}, ""))
        else:
            jobs.append((*rng.choice(hostile), ""))
    return jobs


def sample(jobs: int) -> tuple[int, int, int, float]:  # jobs, descriptors, threads, MiB
    """Measure what this process and its child processes hold after `jobs` jobs."""
    gc.collect()
    process, fds, threads, size = psutil.Process(), 0, 0, 0
    for one in [process, *process.children(recursive=True)]:
        fds, threads = fds + one.num_fds(), threads + one.num_threads()
        size += one.memory_info().rss if one == process else one.memory_full_info().uss
    return jobs, fds, threads, size / 2**20


@contextlib.asynccontextmanager
async def loopback_server() -> AsyncIterator[str]:
    """Serve RESPONSES on a free port; yield the base URL."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def wait_for_connections() -> None:
    """Wait until the last connections have closed."""
    await asyncio.sleep(0.3)


async def soak(
    count: int,
    concurrency: int,
    seed: int,
    steps: int,
    warm_up: float = 0.3,
    processes: bool = False,  # whether child processes fetch and decode
) -> Report:
    """Send `count` jobs and report; the first share of them is the warm-up."""
    report, limits = Report(jobs=count), FetchLimits(max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S)
    fetcher = Fetcher(limits, stand.loopback())
    pixels = PixelLimits(max_pixels=5_000_000)
    vectors: dict[str, list[float]] = {}
    async with loopback_server() as base:
        worker = stand.make_worker(KIT, fetcher, limits=pixels, processes=processes)
        async with stand.running(worker):
            jobs = plan(count, base, seed)
            start, position, step = time.perf_counter(), 0, -(-count // steps)

            async def send(job: Any, codes: set[str], photo: str) -> None:
                reply = await worker.handle(job)
                code = stand.code_of(reply)
                report.codes[code] += 1
                if code not in codes:
                    report.wrong.append(f"{code} instead of {codes}: {str(job)[:150]}")
                if photo and code == "OK":
                    if vectors.setdefault(photo, reply["embedding"]) != reply["embedding"]:
                        report.wrong.append(f"another vector for {photo}")
                    if reply["request_id"] != job["input"]["request_id"]:
                        report.wrong.append("another request's id")

            slots = asyncio.Semaphore(concurrency)

            async def send_in_slot(job: Any) -> None:
                async with slots:
                    await send(*job)

            while position < count:
                share = jobs[position : position + step]
                await asyncio.gather(*(send_in_slot(job) for job in share))
                position += len(share)
                if position >= warm_up * count:
                    await wait_for_connections()
                    report.samples.append(sample(position))
            report.seconds = time.perf_counter() - start
    if sum(report.codes.values()) != count:
        report.wrong.append(f"{sum(report.codes.values())} replies to {count} jobs")
    return report


def main() -> int:
    """Run the soak and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="number of measurements")
    parser.add_argument("--processes", action="store_true", help="fetch and decode in processes")
    parser.add_argument("--beside", type=float, default=2.0, help="seconds of a round; 0: none")
    args = parser.parse_args()
    logging.getLogger("heimdex_clip_worker").setLevel(logging.CRITICAL)
    status = 0
    if args.beside:
        how = {"seconds": args.beside, "processes": args.processes}
        results = asyncio.run(beside.measure_all(beside.KINDS, **how))
        status = beside.exit_status(results)
    how = {"processes": args.processes}
    report = asyncio.run(soak(args.count, args.concurrency, args.seed, args.steps, **how))
    print(report.table())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    print(f"peak {peak:,.0f} MiB, {os.cpu_count()} CPUs")
    for problem in report.problems():
        print(f"WRONG: {problem}")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
