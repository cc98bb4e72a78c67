"""Serve the photographs to the workers: `python -m benchmarks.image_server [CERTIFICATE]`.

It has processes of its own, so that it does not slow down the process that measures: one for every
four cores, because a fast worker fetches more than one process can serve. `/50/NAME` responds after
50 ms, and `/counts` tells how many connections were accepted and how many requests came, by all of
them. The first line that it prints is its ports: of HTTP and, with a certificate, of HTTPS. It ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web

from benchmarks import ROOT
from benchmarks.photos import FOLDER

HOST = "localhost"  # a name, so that the workers look it up, as they do in production
BACKLOG = 512  # connections that wait to be accepted: 64 callers may come at once


FORK = multiprocessing.get_context("fork")  # the photographs and the counts are shared
START_S = 30  # for all processes


class Counts:
    """Connections accepted and requests received by all processes, by scheme."""

    def __init__(self) -> None:
        self.connections = {scheme: FORK.Value("Q") for scheme in ("http", "https")}
        self.requests = {scheme: FORK.Value("Q") for scheme in ("http", "https")}

    @staticmethod
    def add(count: Any) -> None:
        """Count one more."""
        with count.get_lock():
            count.value += 1

    def counting(self, scheme: str, make: Callable[[], asyncio.Protocol]) -> Callable:
        """Wrap a factory of protocols; asyncio calls it for each connection that it accepts."""

        def made() -> asyncio.Protocol:
            self.add(self.connections[scheme])
            return make()

        return made

    def read(self) -> dict[str, dict[str, int]]:
        """Read all counts."""
        both = {"connections": self.connections, "requests": self.requests}
        return {name: {s: c.value for s, c in counts.items()} for name, counts in both.items()}


def application(bodies: Mapping[str, bytes], counts: Counts) -> web.Application:
    """Make the server of these files."""

    async def respond(request: web.Request) -> web.Response:
        counts.add(counts.requests[request.scheme])
        delay_ms = int(request.match_info["delay_ms"])
        if delay_ms:
            await asyncio.sleep(delay_ms / 1000)
        body = bodies[request.match_info["name"]]
        return web.Response(body=body, content_type="image/jpeg")

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(counts.read())

    app = web.Application()
    app.router.add_get("/counts", tell)
    app.router.add_get(r"/{delay_ms:\d+}/{name}", respond)
    return app


@contextlib.asynccontextmanager
async def listening(
    bodies: Mapping[str, bytes],  # by name
    certificate: Path | None = None,  # with its key; None: no HTTPS
    ports: Sequence[int] = (0, 0),  # of HTTP and HTTPS; 0: a free one
    counts: Counts | None = None,  # shared with other processes
) -> AsyncIterator[list[int]]:  # ports
    """Serve while the block runs; other processes may serve on the same ports."""
    loop, counts = asyncio.get_running_loop(), counts or Counts()
    runner = web.AppRunner(application(bodies, counts), access_log=None)
    await runner.setup()
    contexts: dict[str, ssl.SSLContext | None] = {"http": None}
    if certificate is not None:
        contexts["https"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        contexts["https"].load_cert_chain(certificate)
    servers = [
        await loop.create_server(
            counts.counting(scheme, runner.server), "127.0.0.1", port, ssl=context,
            backlog=BACKLOG, reuse_port=True,
        )
        for (scheme, context), port in zip(contexts.items(), ports, strict=False)
    ]  # fmt: skip
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()
        await runner.cleanup()


def free_ports(stack: contextlib.ExitStack) -> list[int]:
    """Keep two ports that several processes can listen on."""
    found = []
    for _ in range(2):
        kept = stack.enter_context(socket.socket())
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(("127.0.0.1", 0))  # it does not listen, so no connection comes to it
        found.append(kept.getsockname()[1])
    return found


async def serve(stdin: int, is_ready: Any, *how: Any) -> None:
    """Serve until standard input ends."""
    async with listening(*how):
        is_ready.release()
        await asyncio.get_running_loop().run_in_executor(None, os.read, stdin, 1)


def main(certificate: Path | None, processes: int) -> None:
    """Serve from some processes until standard input ends; every photograph is in memory."""
    bodies = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    counts, is_ready, stdin = Counts(), FORK.Semaphore(0), os.dup(0)
    with contextlib.ExitStack() as stack:
        ports = free_ports(stack)
        how = stdin, is_ready, bodies, certificate, ports, counts
        servers = [FORK.Process(target=run, args=how) for _ in range(processes)]
        for server in servers:
            server.start()
        if not all(is_ready.acquire(timeout=START_S) for _ in servers):
            raise SystemExit("the image server did not start")
        print(*ports[: 1 if certificate is None else 2], flush=True)
        for server in servers:
            server.join()


def run(*how: Any) -> None:
    """Serve in this process."""
    asyncio.run(serve(*how))


class ImageServer:
    """The image server in its process, and the authority of its certificate; a context manager."""

    def __enter__(self) -> ImageServer:
        import trustme

        self._folder = tempfile.TemporaryDirectory(prefix="bench-tls-")
        authority, folder = trustme.CA(), Path(self._folder.name)
        self.authority = folder / "authority.pem"  # for the workers to trust
        authority.cert_pem.write_to_path(self.authority)
        issued = authority.issue_cert(HOST, "127.0.0.1").private_key_and_cert_chain_pem
        issued.write_to_path(folder / "server.pem")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.image_server", str(folder / "server.pem")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        port, self.secure_port = map(int, self.process.stdout.readline().split())
        self.url = f"http://127.0.0.1:{port}"
        self.secure_url = f"https://{HOST}:{self.secure_port}"
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=10)  # closes its standard input
        self._folder.cleanup()

    def photo(self, name: str, delay_ms: int = 0) -> str:
        """Make the URL of a photograph that arrives after a delay."""
        return f"{self.url}/{delay_ms}/{name}"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None, max(1, len(os.sched_getaffinity(0)) // 4))
