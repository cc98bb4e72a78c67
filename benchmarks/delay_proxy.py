"""Put a server at a distance: `python -m benchmarks.delay_proxy PORT ROUND_TRIP_MS`.

It forwards connections to a port of 127.0.0.1, and delays every byte in each direction by half a
round trip. So a handshake costs the round trips that it needs, and a connection that is kept saves
them. It does not limit bandwidth, and it does not let a window grow slowly as TCP does: a large
body from a real distance takes longer.

It is a process of its own. The first line that it prints is its port. It ends when its standard
input does.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import deque
from types import TracebackType

from benchmarks import ROOT
from benchmarks.image_server import BACKLOG, HOST

# asyncio's timers fire up to 1 ms late, as epoll's unit is a millisecond.
TIMER_S = 0.0005


class End(asyncio.Protocol):
    """One end of a connection: what it receives, the other end sends when it is due."""

    def __init__(self, delay_s: float, opened: float):
        self.delay_s, self.opened = delay_s, opened  # the latter: no byte leaves before that
        self.loop = asyncio.get_running_loop()
        self.other: End | None = None
        self.transport: asyncio.Transport | None = None
        self.due: deque[bytes | None] = deque()  # None: the end of the bytes
        self.waiting: deque[bytes | None] = deque()  # what was due before the transport was there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what is due already."""
        self.transport = transport
        while self.waiting:
            self.send(self.waiting.popleft())

    def data_received(self, data: bytes) -> None:
        """Pass bytes on later."""
        self.later(data)

    def eof_received(self) -> bool:
        """Pass the end on later, and stay open for the other direction."""
        self.later(None)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Pass the end on later, if it has not been passed on."""
        self.later(None)

    def later(self, data: bytes | None) -> None:
        """Have the other end send this after the delay, and after all that came before it."""
        now = self.loop.time()
        self.due.append(data)
        self.loop.call_at(max(now, self.opened) + self.delay_s - TIMER_S, self.pass_on)

    def pass_on(self) -> None:
        """Pass on what has waited longest: two timers of one moment fire in any order."""
        self.other.send(self.due.popleft())

    def send(self, data: bytes | None) -> None:
        """Send bytes, or close after the last of them."""
        if self.transport is None:
            self.waiting.append(data)
        elif self.transport.is_closing():
            pass
        elif data is not None:
            self.transport.write(data)
        else:
            self.transport.close()


class Accepted(End):
    """The client's end.

    On loopback a client is connected at once. A client of a distant host is connected after a round
    trip, and sends its first byte then. So what this end receives leaves no earlier than a round
    trip after the connection was accepted. All that follows is late by the same round trip.
    """

    def __init__(self, port: int, delay_s: float):
        now = asyncio.get_running_loop().time()
        super().__init__(delay_s, opened=now + 2 * delay_s)
        self.port = port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the server."""
        super().connection_made(transport)
        self.other = End(self.delay_s, opened=0.0)
        self.other.other = self
        self.connecting = self.loop.create_task(self.connect())

    async def connect(self) -> None:
        """Connect to the server; close the client's connection if that fails."""
        try:
            await self.loop.create_connection(lambda: self.other, "127.0.0.1", self.port)
        except OSError:
            self.transport.abort()


async def listen(port: int, round_trip_s: float) -> asyncio.Server:
    """Accept connections to a port of 127.0.0.1 that is a round trip away."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(
        lambda: Accepted(port, round_trip_s / 2), "127.0.0.1", 0, backlog=BACKLOG
    )


async def serve(port: int, round_trip_s: float) -> None:
    """Forward until standard input ends."""
    server = await listen(port, round_trip_s)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


class DelayProxy:
    """The proxy in its process; a context manager."""

    def __init__(self, port: int, round_trip_ms: int):
        self.upstream, self.round_trip_ms = port, round_trip_ms

    def __enter__(self) -> DelayProxy:
        command = [sys.executable, "-m", "benchmarks.delay_proxy"]
        self.process = subprocess.Popen(
            [*command, str(self.upstream), str(self.round_trip_ms)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.secure_url = f"https://{HOST}:{int(self.process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=10)  # closes its standard input


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
