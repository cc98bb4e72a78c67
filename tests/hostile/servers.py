"""Servers that say whatever a row wants, byte for byte, and a network that leads only to them.

A script is `async def script(peer)`: it is run for every connection, and the connection is closed
when it returns. `Net` stands between the fetcher and the world: it notes every look-up and every
address that is dialled, and connects all of them to a server on 127.0.0.1 instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
PHOTO = b"\xff\xd8\xff\xe0 a photograph \xff\xd9"
GONE = (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)


def full(body: bytes = PHOTO, *headers: bytes) -> bytes:
    """Return a complete and correct answer."""
    return (
        OK
        + b"".join(h + b"\r\n" for h in headers)
        + b"Content-Length: %d\r\n\r\n" % len(body)
        + body
    )


class Peer:
    """One connection, seen from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Server):
        self.reader, self.writer, self.server = reader, writer, server
        self.number = len(server.peers)  # 0 for the first connection

    async def ask(self) -> bytes:
        """Return the head of the request, which the server keeps too."""
        request = await self.reader.readuntil(b"\r\n\r\n")
        self.server.heard.append(request)
        return request

    async def say(self, *parts: bytes, pause_s: float = 0.0) -> None:
        """Send `parts`, with a pause after each."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)

    async def drip(self, data: bytes, pause_s: float = 0.02) -> None:
        """Send `data` byte by byte."""
        await self.say(*(data[i : i + 1] for i in range(len(data))), pause_s=pause_s)

    async def forever(self, data: bytes, pause_s: float = 0.0) -> None:
        """Send `data` again and again, until the other side hangs up."""
        while True:
            await self.say(data, pause_s=pause_s)
            await asyncio.sleep(0)
            if self.reader.at_eof():
                raise ConnectionResetError

    async def gone(self) -> None:
        """Wait until the other side hangs up."""
        while await self.reader.read(65_536):
            pass

    def reset(self) -> None:
        """End the connection with a RST."""
        plain = self.writer.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


def says(*parts: bytes, pause_s: float = 0.0, then: str = "close") -> Script:
    """A script that reads a request, says `parts`, and then closes, resets, or holds the line."""

    async def script(peer: Peer) -> None:
        await peer.ask()
        await peer.say(*parts, pause_s=pause_s)
        if then == "reset":
            await asyncio.sleep(0.02)  # a RST overtakes what has not been read
            peer.reset()
        elif then == "hold":
            await peer.gone()

    return script


class Server:
    """A listening socket of 127.0.0.1 and everything that came in on it."""

    def __init__(self, script: Script):
        self.script, self.port = script, 0
        self.heard: list[bytes] = []  # heads of requests
        self.names: list[str | None] = []  # server names in TLS handshakes
        self.peers: list[Peer] = []
        self._open: set[asyncio.Task[Any]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Run the script on a new connection."""
        self._open.add(asyncio.current_task())
        peer = Peer(reader, writer, self)
        self.peers.append(peer)
        try:
            await self.script(peer)
        except GONE:
            pass
        finally:
            writer.close()
            with contextlib.suppress(*GONE, OSError):
                await writer.wait_closed()
            self._open.discard(asyncio.current_task())

    async def quiet(self, within_s: float) -> bool:
        """Return whether all connections have ended `within_s` seconds from now."""
        tasks = [t for t in self._open if t is not asyncio.current_task()]
        return not tasks or not (await asyncio.wait(tasks, timeout=within_s))[1]

    def stop(self) -> None:
        """Give up the connections that are left."""
        for task in self._open:
            task.cancel()


@contextlib.asynccontextmanager
async def serving(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Run a server with `script` on a free port."""
    server = Server(script)
    if tls:
        tls.sni_callback = lambda _, name, __: server.names.append(name)
    listener = await asyncio.start_server(server.connected, "127.0.0.1", 0, ssl=tls, limit=2**16)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        server.stop()
        listener.close()


class Net:
    """Look-ups and connections of the running loop: noted, and led to local servers."""

    def __init__(
        self,
        answers: Mapping[str, Any] | Callable[[str], Any],  # by host name; see `look_up`
        ports: Mapping[int, int],  # port that is dialled -> port of a local server
        troubles: Mapping[str, Any] | None = None,  # address -> exception, or seconds of silence
    ):
        self.answers, self.ports, self.troubles = answers, ports, troubles or {}
        self.looked_up: list[str] = []
        self.dialled: list[str] = []  # "address:port"

    async def look_up(self, host: str) -> Any:
        """Answer as the row says: a value, an exception, (seconds, value), or one for each time."""
        self.looked_up.append(host)
        answer = self.answers(host) if callable(self.answers) else self.answers.get(host)
        if isinstance(answer, EachTime):
            answer = answer.next()
        if isinstance(answer, tuple):
            await asyncio.sleep(answer[0])
            answer = answer[1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @contextlib.contextmanager
    def installed(self) -> Any:
        """Lead the running loop's connections to the local servers."""
        loop = asyncio.get_running_loop()
        real = loop.sock_connect

        async def sock_connect(sock: socket.socket, address: tuple[str, int]) -> None:
            self.dialled.append(f"{address[0]}:{address[1]}")
            trouble = self.troubles.get(address[0])
            if isinstance(trouble, Exception):
                raise trouble
            await asyncio.sleep(trouble or 0)
            await real(sock, ("127.0.0.1", self.ports.get(address[1], address[1])))

        loop.sock_connect = sock_connect  # type: ignore[method-assign]
        try:
            yield
        finally:
            del loop.sock_connect


class EachTime:
    """An answer for the first look-up, one for the second, and so on; the last one stays."""

    def __init__(self, *answers: Any):
        self._answers = answers

    def started(self) -> EachTime:
        """Return a copy that begins at the first answer."""
        copy = EachTime(*self._answers)
        copy._left = iter(self._answers)
        return copy

    def next(self) -> Any:
        """Return the next answer."""
        self._last = next(self._left, self._answers[-1])
        return self._last


def location(url: str, status: bytes = b"302 Found", *more: bytes) -> bytes:
    """Return a redirect to `url`."""
    lines: Iterable[bytes] = (b"HTTP/1.1 " + status, b"Location: " + url.encode(), *more)
    return b"\r\n".join([*lines, b"Content-Length: 0", b"", b""])
