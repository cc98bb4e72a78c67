"""Time an honest photograph beside one hostile job: `python tests/hostile/beside.py [NAME...]`.

The hostile servers run in a process of their own, so that their CPU time is not the worker's. Each
of KINDS is one signed job, or several, sent again as soon as they end. In each of ROUNDS rounds,
photographs are embedded one after another, first alone, then beside these jobs. A round is late if
its slowest photograph took more than LATE_S longer than the median alone in the same round. This
limit is the same on a busy machine.

Exit status: 0 if no round of any kind is late, 1 if most rounds of a kind are later than the load
of the machine explains, 2 if the machine was too busy: nothing is shown, neither that the promise
is kept nor that it is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gzip
import hashlib
import json
import logging
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]

import images as im  # noqa: E402
import rows_auth  # noqa: E402
import rows_image  # noqa: E402
import rows_tls  # noqa: E402
import stand  # noqa: E402
import trustme  # noqa: E402
from servers import CHUNKED, OK, NameServer, Peer, full, serving  # noqa: E402

from heimdex_clip_worker.serving import download, process  # noqa: E402
from heimdex_clip_worker.serving.download import Fetcher, FetchLimits  # noqa: E402

LATE_S = 1.0  # how much longer a photograph may take beside a hostile job
ROUNDS = 3  # for each kind
UNSTABLE_S = 0.25  # by which the slowest photograph alone may differ from the median alone
QUIET_S = 60.0  # until a worker must be idle after its jobs are cancelled
TIMEOUT_S = 10.0  # of a download
KIT = rows_auth.Kit(now=1_764_000_000)
GZIP = OK + b"Content-Encoding: gzip\r\n\r\n"
BODIES: dict[str, Callable[[], list[bytes]]] = {  # what the plain server sends
    "photo": lambda: [full(stand.photo())],
    "one-byte-chunks": lambda: [CHUNKED, b"1\r\nx\r\n" * 3_500_000],  # 21 MB
    "line-breaks": lambda: [b"\r\n" * 10_000_000],
    "chunk-extensions": lambda: [
        CHUNKED, (b"8;" + b"x" * 90 + b"\r\n12345678\r\n") * 100_000
    ],
    "gzip-and-more": lambda: [GZIP + gzip.compress(stand.photo()), *[bytes(50_000)] * 400],
    "gzip-bomb": lambda: [GZIP + gzip.compress(bytes(200_000_000), 9)],
    "large-header": lambda: [OK + b"X: " + bytes(20_000_000)],
    "many-headers": lambda: [OK + b"X: y\r\n" * 3_000_000],
    "endless-body": lambda: [OK + b"\r\n" + bytes(20_000_000)],
    "interim-responses": lambda: [b"HTTP/1.1 100 Continue\r\n\r\n" * 500_000],
}  # fmt: skip
FILES: dict[str, tuple[Callable[[], bytes], str]] = {  # name -> how to make it, code of its error
    **{row.id: (row.build, row.code) for row in rows_image.ROWS},
    "png-8x8-with-a-second-header-of-49-megapixels": (
        lambda: im.png(im.ihdr((8, 8)), im.deflated([bytes(21_001)] * 7000), im.ihdr((7000, 7000))),
        "DECODE_FAILED",
    ),
    "webp-16-megapixels-lossless": (
        rows_image.noise("RGB", (4000, 3999), "WEBP", lossless=True, quality=0, method=0),
        "OK",
    ),
    "webp-20-megapixels-with-alpha": (
        rows_image.noise("LA", (5000, 4000), "WEBP", quality=1, method=0),
        "OK",
    ),
}
TOO_LONG = ("webp-25-megapixels-lossless",)  # beyond the limit of a download


def body(path: str) -> list[bytes]:
    """Make what the plain server sends for a path."""
    if path.startswith("file/"):
        return [full(FILES[path.removeprefix("file/")][0]())]
    return BODIES[path]()


def serve_plain(listener: socket.socket) -> None:
    """Answer connections with bytes that are ready, each in a thread."""
    bodies, lock = functools.cache(body), threading.Lock()

    def prepare(path: str) -> list[bytes]:
        with lock:  # so that a body is not made many times at once
            return bodies(path)

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, IndexError):
            path = connection.recv(65_536).split()[1].decode().strip("/").partition("?")[0]
            if path == "silent":
                connection.recv(1)
                return
            for part in prepare(path):
                connection.sendall(part)
                if path == "gzip-and-more":
                    time.sleep(0.01)

    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def tls_server(kind: str, authority: trustme.CA, folder: Path) -> ssl.SSLContext:
    """Make the context of a server that costs its clients CPU."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key_type = trustme.KeyType.RSA if kind == "dhe" else trustme.KeyType.ECDSA
    authority.issue_cert("localhost", "127.0.0.1", key_type=key_type).configure_cert(context)
    if kind == "dhe":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("DHE-RSA-AES128-GCM-SHA256")
        context.load_dh_params(str(rows_tls.dh_parameters(10_000, folder)))
    elif kind == "ffdhe8192":
        context.set_ecdh_curve(kind)
    elif kind == "tickets":
        context.num_tickets = 2000
    else:
        context.num_tickets, context.keylog_filename = 0, str(folder / "keys")
    return context


async def answer_tls(peer: Peer) -> None:
    """Change the key a thousand times; other servers cost CPU before they answer."""
    if peer.server.kind == "key-updates":
        await rows_tls.updates(1000)(peer)
    else:
        await peer.read_request()
        await peer.send(full(stand.photo()))


async def serve_all(folder: Path) -> None:
    """Run the servers; print their ports."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    threading.Thread(target=serve_plain, args=(listener,), daemon=True).start()
    authority, ports = trustme.CA(), {"plain": listener.getsockname()[1]}
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    async with contextlib.AsyncExitStack() as stack:
        for kind in ("dhe", "ffdhe8192", "tickets", "key-updates"):
            context = tls_server(kind, authority, folder)
            server = await stack.enter_async_context(serving(answer_tls, context))
            server.kind, server.keys, ports[kind] = kind, folder / "keys", server.port
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def hostile_servers() -> Iterator[tuple[dict[str, int], Path]]:
    """Run the servers in a process; yield their ports, and the authority of their certificates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--serve", folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as servers:
            try:
                yield json.loads(servers.stdout.readline()), Path(folder) / "ca.pem"
            finally:
                servers.kill()


@dataclass(frozen=True)
class Kind:
    """A kind of hostile job."""

    input: Callable[[dict[str, int], int], dict[str, Any]]  # ports, number of the job -> its input
    jobs: int = 1
    is_text: bool = False  # whether a text is timed beside it, and not a photograph
    files: tuple[str, ...] = ()  # names of the files that it downloads


def images(server: str, *paths: str) -> Callable[[dict[str, int], int], dict[str, Any]]:
    """Make the input of jobs whose images are at `paths` of a hostile server."""
    scheme = "http" if server == "plain" else "https"

    def make(ports: dict[str, int], number: int) -> dict[str, Any]:
        places = [paths[(128 * number + i) % len(paths)] for i in range(128)]
        base = f"{scheme}://127.0.0.1:{ports[server]}"
        return {"images": [{"image_url": f"{base}/{p}?{i}"} for i, p in enumerate(places)]}

    return make


def files(*names: str, jobs: int = 1) -> Kind:
    """A kind of job whose images are these files."""
    return Kind(images("plain", *(f"file/{name}" for name in names)), jobs, files=names)


def _hanging_names(ports: dict[str, int], number: int) -> dict[str, Any]:
    return {"images": [{"image_url": f"http://hang-{i}.example/"} for i in range(128)]}


def _long_texts(ports: dict[str, int], number: int) -> dict[str, Any]:
    return {"texts": ["a" * 8_000] * 128}


PLAIN = (
    "one-byte-chunks", "line-breaks", "chunk-extensions", "gzip-and-more", "gzip-bomb",
    "large-header", "many-headers", "endless-body", "interim-responses", "silent",
)  # fmt: skip
COSTLY = (  # files of many parts, which cost time before anything is decoded
    "avif-1024-cells-of-95-equal-sequence-headers", "avif-1024-cells-of-96-sequence-headers",
    "avif-32-cells-of-10-sequence-headers", "avif-1024-cells-of-96-other-units",
    "avif-1024-different-cells", "avif-one-cell-1024-times",
    "avif-one-cell-of-3000-extents-1024-times", "avif-one-cell-of-250-properties-1024-times",
    "avif-of-2000-transparencies", "avif-beside-boxes-in-boxes", "avif-1000-units",
    "avif-table-of-100000-bytes", "avif-30000-properties", "avif-6-million-extents-of-no-bytes",
    "avif-grid-of-65280-cells", "avif-100000-boxes",
    "png-8x8-with-a-second-header-of-49-megapixels", "png-a-million-empty-chunks",
    "png-of-10000-text-chunks", "png-ztxt-bomb", "png-itxt-bomb", "png-iccp-bomb",
    "gif-a-million-extensions", "gif-of-1000-frames",
    "jpeg-100000-segments", "jpeg-60000-scans", "jpeg-100-scans",
    "jpeg-2-million-comments-behind-its-only-scan", "jpeg-300000-tables-behind-its-only-scan",
    "jpeg-600000-scans-behind-its-only-scan", "jpeg-2-million-frames-behind-its-only-scan",
)  # fmt: skip
HEAVY = (
    *(row.id for row in rows_image.ROWS if row.heavy and row.id not in TOO_LONG),
    "webp-16-megapixels-lossless", "webp-20-megapixels-with-alpha",
)  # fmt: skip
LIGHT = tuple(row.id for row in rows_image.ROWS if not row.heavy)
KINDS: dict[str, Kind] = {
    **{name: Kind(images("plain", name)) for name in PLAIN},
    **{
        name: Kind(images(name, "photo")) for name in ("dhe", "ffdhe8192", "tickets", "key-updates")
    },
    "hanging-names": Kind(_hanging_names),
    "twenty-jobs-of-slow-servers": Kind(images("plain", "silent"), jobs=20),
    "sixty-jobs-of-slow-servers": Kind(images("plain", "silent"), jobs=60),
    "four-jobs-of-long-texts": Kind(_long_texts, jobs=4),
    "a-text-beside-four-jobs-of-long-texts": Kind(_long_texts, jobs=4, is_text=True),
    **{name: files(name) for name in (*COSTLY, *HEAVY)},
    "all-light-files": files(*LIGHT, jobs=-(-len(LIGHT) // 128)),
    "all-heavy-files": files(*HEAVY),
}


class _Patches:
    """What `NameServer.running` needs of pytest's monkeypatch."""

    @staticmethod
    def setattr(module: Any, name: str, value: Any) -> None:
        setattr(module, name, value)


@contextlib.contextmanager
def trusting(context: ssl.SSLContext) -> Iterator[None]:
    """Let processes that are forked in the block trust as a context does."""
    make = download._make_ssl_context
    download._make_ssl_context = lambda **options: context
    try:
        yield
    finally:
        download._make_ssl_context = make


@contextlib.asynccontextmanager
async def worker_and_ports(
    processes: bool = False,  # whether child processes fetch and decode
) -> AsyncIterator[tuple[Any, dict[str, int]]]:
    """Run the servers and a worker that trusts them."""
    names = NameServer(lambda host: None)
    with hostile_servers() as (ports, authority), hostile_servers() as (others, _):
        ports["honest"] = others["plain"]
        context = download._make_ssl_context()
        context.load_verify_locations(cafile=str(authority))
        limits = FetchLimits(timeout_s=TIMEOUT_S)
        fetcher = Fetcher(limits, stand.loopback(), ssl_context=context)
        threads = process.usable_cpus() + 1  # as the handler has by default
        async with names.running(_Patches):
            with trusting(context):  # the children make contexts of their own
                how = {"decode_workers": threads, "processes": processes}
                worker = stand.make_worker(KIT, fetcher, **how)
            async with stand.running(worker):
                yield worker, ports


async def photograph(worker: Any, ports: dict[str, int], *, is_text: bool) -> float:
    """Embed one photograph, or a text; return the seconds."""
    one = {"text": "a red car"} if is_text else {
        "image_url": f"http://127.0.0.1:{ports['honest']}/photo"
    }  # fmt: skip
    start = time.perf_counter()
    reply = await worker.handle({"input": KIT.v2(one)})
    took = time.perf_counter() - start
    assert stand.code_of(reply) == "OK" or took >= TIMEOUT_S, reply
    return took


@dataclass
class Round:
    """The times of one round, in seconds."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)  # see `load`, while the worker is idle

    @property
    def added(self) -> list[float]:
        """How much longer each photograph took than the median alone."""
        return [took - median(self.alone) for took in self.beside]

    @property
    def is_late(self) -> bool:
        """True if a photograph took too long."""
        return max(self.added) > LATE_S

    @property
    def is_late_for_any_load(self) -> bool:
        """True if a photograph took too long even if other processes made each second longer."""
        return max(self.added) > LATE_S * max(1.0, *self.loads)

    @property
    def is_stable(self) -> bool:
        """True if a photograph alone always took about the same time."""
        return max(self.alone) - median(self.alone) <= UNSTABLE_S


@dataclass(frozen=True)
class Result:
    """What was measured beside one kind of jobs."""

    rounds: Sequence[Round]

    @property
    def verdict(self) -> str:
        """`ok`, `LATE`, or `busy` where the machine was too busy to show either."""
        late = sum(one.is_late_for_any_load for one in self.rounds)
        if not all(one.is_stable for one in self.rounds):
            return "busy"
        if late > len(self.rounds) / 2:
            return "LATE"
        return "busy" if any(one.is_late for one in self.rounds) else "ok"

    def line(self, name: str) -> str:
        """Format a line of the table."""
        alone, beside, added = (
            [value for one in self.rounds for value in getattr(one, which)]
            for which in ("alone", "beside", "added")
        )
        worst = " ".join(f"{max(one.added):6.3f}" for one in self.rounds)
        load = median(value for one in self.rounds for value in one.loads)
        return (
            f"{name:56} {median(alone):6.3f} {max(alone):6.3f} {median(beside):7.3f} "
            f"{max(beside):7.3f} {median(added):7.3f}   {worst}  {len(beside):4}  {load:4.1f}  "
            f"{self.verdict}"
        )


HEADER = (
    f"{'seconds':56} {'alone':>6} {'worst':>6} {'beside':>7} {'worst':>7} {'added':>7}   "
    f"{'worst added in each round':{7 * ROUNDS - 1}}  {'n':>4}  load"
)


async def measure_round(worker: Any, ports: dict[str, int], kind: Kind, *, seconds: float) -> Round:
    """Time photographs alone, and then beside the jobs of `kind`."""
    times = Round()
    await idle()
    times.loads.append(await load())
    end = time.perf_counter() + 0.3
    while len(times.alone) < 5 or time.perf_counter() < end:
        times.alone.append(await photograph(worker, ports, is_text=kind.is_text))
        await asyncio.sleep(0.02)

    async def send_again_and_again(job: dict[str, Any]) -> None:
        while True:
            await worker.handle(job)
            await asyncio.sleep(0)

    jobs = [{"input": KIT.v2(kind.input(ports, number))} for number in range(kind.jobs)]
    hostile = [asyncio.create_task(send_again_and_again(job)) for job in jobs]
    end = time.perf_counter() + seconds
    while not times.beside or time.perf_counter() < end:
        await asyncio.sleep(0.02)
        times.beside.append(await photograph(worker, ports, is_text=kind.is_text))
    for job in hostile:
        job.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    await idle()
    times.loads.append(await load())
    return times


async def idle() -> None:
    """Wait until this process has nothing to do: the threads end what they began."""
    end = time.perf_counter() + QUIET_S
    while time.perf_counter() < end:
        start_s = time.process_time()
        await asyncio.sleep(0.2)
        if time.process_time() - start_s < 0.02:
            return
    raise AssertionError(f"the worker is busy {QUIET_S:.0f} s after its jobs were cancelled")


async def load() -> float:
    """Measure how long a second of CPU takes, on 0.1 s of it on each CPU at the same time."""

    def work() -> float:
        start, cpu_s, data = time.perf_counter(), time.thread_time(), bytes(500_000)
        while time.thread_time() < cpu_s + 0.1:
            hashlib.sha256(data)  # releases the interpreter lock
        return (time.perf_counter() - start) / 0.1

    count = process.usable_cpus()
    return max(await asyncio.gather(*(asyncio.to_thread(work) for _ in range(count))))


async def prepare(worker: Any, ports: dict[str, int], kind: Kind) -> None:
    """Let the server make the files of a kind; check that the worker receives and refuses them."""
    for name in kind.files:
        reader, writer = await asyncio.open_connection("127.0.0.1", ports["plain"])
        writer.write(f"GET /file/{name} HTTP/1.1\r\n\r\n".encode())
        while await reader.read(1_000_000):
            pass
        writer.close()
    if len(kind.files) == 1:
        url = f"http://127.0.0.1:{ports['plain']}/file/{kind.files[0]}"
        reply = await worker.handle({"input": KIT.v2({"image_url": url})})
        assert stand.code_of(reply) == FILES[kind.files[0]][1], reply


async def measure(
    worker: Any, ports: dict[str, int], kind: Kind, *, seconds: float, rounds: int = ROUNDS
) -> Result:
    """Measure a kind in rounds of `seconds` beside it."""
    await prepare(worker, ports, kind)
    return Result(
        [await measure_round(worker, ports, kind, seconds=seconds) for _ in range(rounds)]
    )


async def measure_all(
    kinds: dict[str, Kind], *, seconds: float, processes: bool = False
) -> dict[str, Result]:
    """Measure each kind, and print the table."""
    results = {}
    async with worker_and_ports(processes) as (worker, ports):
        await photograph(worker, ports, is_text=False)
        print(HEADER, flush=True)
        for name, kind in kinds.items():
            results[name] = await measure(worker, ports, kind, seconds=seconds)
            print(results[name].line(name), flush=True)
    return results


def named(results: dict[str, Result], verdict: str) -> list[str]:
    """Name the kinds with a verdict."""
    return [name for name, result in results.items() if result.verdict == verdict]


def exit_status(results: dict[str, Result]) -> int:
    """Print the kinds that are not `ok`; return 0, 1 or 2 (see above)."""
    late, busy = named(results, "LATE"), named(results, "busy")
    for name in late:
        print(f"WRONG: a photograph is late beside {name}")
    for name in busy:
        print(f"machine too busy, nothing shown: {name}")
    return 1 if late else 2 if busy else 0


def main() -> int:
    """Measure the kinds that the command line names, or all."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve_all(Path(sys.argv[2])))
        return 0
    logging.getLogger("heimdex_clip_worker").setLevel(logging.CRITICAL)
    sys.setswitchinterval(0.0002)  # as `process.tune` does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--processes", action="store_true", help="fetch and decode in processes")
    args = parser.parse_args()
    names = args.kinds
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}")
    kinds = {name: KINDS[name] for name in names or KINDS}
    return exit_status(asyncio.run(measure_all(kinds, seconds=2, processes=args.processes)))


if __name__ == "__main__":
    sys.exit(main())
