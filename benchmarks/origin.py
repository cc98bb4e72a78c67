"""The server that the photographs are downloaded from: `python -m benchmarks.origin`.

A process of its own, so that it takes no time from whoever measures. `/50/NAME` answers after
50 ms. Its port is the first line it prints; it ends with its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import TracebackType

from aiohttp import web

from benchmarks import ROOT
from benchmarks.photos import FOLDER


def application() -> web.Application:
    """Return the server; every photograph is in memory."""
    bodies = {path.name: path.read_bytes() for path in FOLDER.iterdir()}

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(int(request.match_info["delay_ms"]) / 1000)
        body = bodies[request.match_info["name"]]
        return web.Response(body=body, content_type="image/jpeg")

    app = web.Application()
    app.router.add_get(r"/{delay_ms:\d+}/{name}", answer)
    return app


async def serve() -> None:
    """Serve on a free port until standard input ends."""
    runner = web.AppRunner(application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


class Origin:
    """The server in its process; a context manager."""

    def __enter__(self) -> Origin:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.origin"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=10)  # closes its standard input

    def photo(self, name: str, delay_ms: int = 0) -> str:
        """Return the URL of a photograph that comes after a delay."""
        return f"{self.url}/{delay_ms}/{name}"


if __name__ == "__main__":
    asyncio.run(serve())
