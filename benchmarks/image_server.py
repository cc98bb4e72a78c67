"""Serve the photographs to the workers: `python -m benchmarks.image_server [CERTIFICATE]`.

It is a process of its own, so that it does not slow down the process that measures. `/50/NAME`
responds after 50 ms, and `/counts` tells how many connections were accepted and how many requests
came. The first line that it prints is its ports: of HTTP and, with a certificate, of HTTPS. It ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType

from aiohttp import web

from benchmarks import ROOT
from benchmarks.photos import FOLDER

HOST = "localhost"  # a name, so that the workers look it up, as they do in production
BACKLOG = 512  # connections that wait to be accepted: 64 callers may come at once


class Counts:
    """Connections accepted and requests received, by scheme."""

    def __init__(self) -> None:
        self.connections = {"http": 0, "https": 0}
        self.requests = {"http": 0, "https": 0}

    def counting(self, scheme: str, make: Callable[[], asyncio.Protocol]) -> Callable:
        """Wrap a factory of protocols; asyncio calls it for each connection that it accepts."""

        def made() -> asyncio.Protocol:
            self.connections[scheme] += 1
            return make()

        return made


def application(bodies: Mapping[str, bytes], counts: Counts) -> web.Application:
    """Make the server of these files."""

    async def respond(request: web.Request) -> web.Response:
        counts.requests[request.scheme] += 1
        delay_ms = int(request.match_info["delay_ms"])
        if delay_ms:
            await asyncio.sleep(delay_ms / 1000)
        body = bodies[request.match_info["name"]]
        return web.Response(body=body, content_type="image/jpeg")

    async def tell(request: web.Request) -> web.Response:
        return web.json_response({"connections": counts.connections, "requests": counts.requests})

    app = web.Application()
    app.router.add_get("/counts", tell)
    app.router.add_get(r"/{delay_ms:\d+}/{name}", respond)
    return app


@contextlib.asynccontextmanager
async def listening(
    bodies: Mapping[str, bytes],  # by name
    certificate: Path | None = None,  # with its key; None: no HTTPS
) -> AsyncIterator[list[int]]:  # ports
    """Serve while the block runs."""
    loop, counts = asyncio.get_running_loop(), Counts()
    runner = web.AppRunner(application(bodies, counts), access_log=None)
    await runner.setup()
    contexts: dict[str, ssl.SSLContext | None] = {"http": None}
    if certificate is not None:
        contexts["https"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        contexts["https"].load_cert_chain(certificate)
    servers = [
        await loop.create_server(
            counts.counting(scheme, runner.server), "127.0.0.1", 0, ssl=context, backlog=BACKLOG
        )
        for scheme, context in contexts.items()
    ]
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()
        await runner.cleanup()


async def serve(certificate: Path | None) -> None:
    """Serve on free ports until standard input ends; every photograph is in memory."""
    bodies = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    async with listening(bodies, certificate) as ports:
        print(*ports, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


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
    asyncio.run(serve(Path(sys.argv[1]) if sys.argv[1:] else None))
