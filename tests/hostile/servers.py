"""Servers that send exactly the bytes of a row, and a network that leads only to them.

A script is `async def script(peer)`. It runs for each connection, which is closed when it returns.
`Net` stands between the fetcher and the world: it records every lookup and every address that is
dialled, and connects all of them to a server on 127.0.0.1 instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import struct
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiodns
from aiodns import DNSResolver
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
PHOTO = b"\xff\xd8\xff\xe0 a photograph \xff\xd9"
DISCONNECTED = (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)


def full(body: bytes = PHOTO, *headers: bytes) -> bytes:
    """Make a complete and correct response."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return OK + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def location(url: str, status: bytes = b"302 Found", *more: bytes) -> bytes:
    """Make a redirect to `url`."""
    lines: Iterable[bytes] = (b"HTTP/1.1 " + status, b"Location: " + url.encode(), *more)
    return b"\r\n".join([*lines, b"Content-Length: 0", b"", b""])


class Peer:
    """One connection, seen from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Server):
        self.reader, self.writer, self.server = reader, writer, server
        self.number = len(server.peers)  # 0 for the first connection

    async def read_request(self) -> bytes:
        """Read the head of a request; the server records it."""
        request = await self.reader.readuntil(b"\r\n\r\n")
        self.server.requests.append(request)
        return request

    async def send(self, *parts: bytes, pause_s: float = 0.0) -> None:
        """Send `parts`, with a pause after each."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)

    async def drip(self, data: bytes, pause_s: float = 0.02) -> None:
        """Send `data` byte by byte."""
        await self.send(*(data[i : i + 1] for i in range(len(data))), pause_s=pause_s)

    async def send_forever(self, data: bytes, pause_s: float = 0.0) -> None:
        """Send `data` again and again, until the client closes the connection."""
        while True:
            await self.send(data, pause_s=pause_s)
            await asyncio.sleep(0)
            if self.reader.at_eof():
                raise ConnectionResetError

    async def wait_closed(self) -> None:
        """Wait until the client closes the connection."""
        while await self.reader.read(65_536):
            pass

    def reset(self) -> None:
        """End the connection with a RST."""
        plain = self.writer.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


def responds(*parts: bytes, pause_s: float = 0.0, then: str = "close") -> Script:
    """A script that reads a request, sends `parts`, and then closes, resets or holds."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(*parts, pause_s=pause_s)
        if then == "reset":
            await asyncio.sleep(0.02)  # a RST overtakes bytes that have not been read
            peer.reset()
        elif then == "hold":
            await peer.wait_closed()

    return script


class Server:
    """A listening socket on 127.0.0.1, and a record of what it received."""

    def __init__(self, script: Script):
        self.script, self.port = script, 0
        self.requests: list[bytes] = []  # their heads
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
        except DISCONNECTED:
            pass
        finally:
            writer.close()
            with contextlib.suppress(*DISCONNECTED, OSError):
                await writer.wait_closed()
            self._open.discard(asyncio.current_task())

    async def has_closed(self, within_s: float) -> bool:
        """True if all connections end within `within_s` seconds."""
        tasks = [t for t in self._open if t is not asyncio.current_task()]
        return not tasks or not (await asyncio.wait(tasks, timeout=within_s))[1]

    def stop(self) -> None:
        """Cancel the connections that are left."""
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
    """Lookups and connections: recorded, and led to local servers."""

    def __init__(
        self,
        answers: Mapping[str, Any] | Callable[[str], Any],  # by host name; see `look_up`
        ports: Mapping[int, int],  # port that is dialled -> port of a local server
        faults: Mapping[str, Any] | None = None,  # address -> exception, or seconds of silence
    ):
        self.answers, self.ports, self.faults = answers, ports, faults or {}
        self.lookups: list[str] = []
        self.dialled: list[str] = []  # "address:port"

    async def look_up(self, host: str) -> Any:
        """Answer as the row says: a value, an exception, (seconds, value), or `Successive`."""
        self.lookups.append(host)
        answer = self.answers(host) if callable(self.answers) else self.answers.get(host)
        if isinstance(answer, Successive):
            answer = answer.next()
        if isinstance(answer, tuple):
            await asyncio.sleep(answer[0])
            answer = answer[1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @contextlib.contextmanager
    def installed(self) -> Any:
        """Lead the connections of all event loops to the local servers: the fetcher has its own."""
        real = BaseSelectorEventLoop.sock_connect

        async def sock_connect(
            loop: BaseSelectorEventLoop, sock: socket.socket, address: tuple[str, int]
        ) -> None:
            self.dialled.append(f"{address[0]}:{address[1]}")
            fault = self.faults.get(address[0])
            if isinstance(fault, Exception):
                raise fault
            await asyncio.sleep(fault or 0)
            await real(loop, sock, ("127.0.0.1", self.ports.get(address[1], address[1])))

        BaseSelectorEventLoop.sock_connect = sock_connect  # type: ignore[method-assign]
        try:
            yield
        finally:
            BaseSelectorEventLoop.sock_connect = real  # type: ignore[method-assign]


class Successive:
    """One answer for the first lookup, another for the second, and so on; the last one stays."""

    def __init__(self, *answers: Any):
        self._answers = answers

    def restarted(self) -> Successive:
        """Make a copy that begins at the first answer."""
        copy = Successive(*self._answers)
        copy._left = iter(self._answers)
        return copy

    def next(self) -> Any:
        """Take the next answer."""
        return next(self._left, self._answers[-1])


class Records:
    """TLS 1.3 records of a server's own making, sent past its TLS library.

    The server's context must have 0 tickets and log its keys, and the cipher must be AES-256.
    """

    def __init__(self, peer: Peer, keys: Path):
        lines = keys.read_text(encoding="ascii").splitlines()
        logged = [line.split()[2] for line in lines if line.startswith("SERVER_TRAFFIC_SECRET_0")]
        self._transport = peer.writer.transport._ssl_protocol._transport
        self._use(bytes.fromhex(logged[-1]))

    def _expand(self, label: bytes, length: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack("!HB", length, len(label)) + label + b"\0"
        return HKDFExpand(SHA384(), length, info).derive(self._secret)

    def _use(self, secret: bytes) -> None:
        self._secret, self._sent = secret, 0
        self._cipher, self._nonce = AESGCM(self._expand(b"key", 32)), self._expand(b"iv", 12)

    def make(self, kind: int, message: bytes) -> bytes:
        """Encrypt a message: 22 is the handshake's kind, 23 that of data."""
        head = b"\x17\3\3" + struct.pack("!H", len(message) + 17)
        nonce = (int.from_bytes(self._nonce, "big") ^ self._sent).to_bytes(12, "big")
        self._sent += 1
        return head + self._cipher.encrypt(nonce, message + bytes([kind]), head)

    def update_key(self) -> bytes:
        """Make a record that changes the key."""
        record = self.make(22, b"\x18\0\0\1\0")
        self._use(self._expand(b"traffic upd", 48))
        return record

    def send(self, data: bytes) -> None:
        """Send records."""
        self._transport.write(data)


class NameServer(asyncio.DatagramProtocol):
    """A name server on 127.0.0.1: `addresses` maps a name to its addresses, or to None: silence."""

    def __init__(self, addresses: Callable[[str], list[str] | None], ttl_s: int = 0):
        self.addresses, self.ttl_s, self.port = addresses, ttl_s, 0
        self.asked: list[str] = []

    def connection_made(self, transport: Any) -> None:
        """Note the port."""
        self.transport, self.port = transport, transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, sender: Any) -> None:
        """Answer one question: no addresses mean that the name does not exist."""
        labels, end = [], 12
        while data[end]:
            labels.append(data[end + 1 : end + 1 + data[end]].decode())
            end += 1 + data[end]
        self.asked.append(".".join(labels))
        addresses = self.addresses(self.asked[-1])
        if addresses is None:
            return
        flags = 0x8180 if addresses else 0x8183
        head = data[:2] + struct.pack("!HHHHH", flags, 1, len(addresses), 0, 0)
        entry = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, self.ttl_s, 4)
        entries = b"".join(entry + socket.inet_aton(address) for address in addresses)
        self.transport.sendto(head + data[12 : end + 5] + entries, sender)

    @contextlib.asynccontextmanager
    async def running(self, monkeypatch: Any) -> AsyncIterator[None]:
        """Be the system's name server within the block."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
        resolver = functools.partial(DNSResolver, nameservers=[f"127.0.0.1:{self.port}"])
        monkeypatch.setattr(aiodns, "DNSResolver", resolver)
        try:
            yield
        finally:
            transport.close()
