"""The catalogue's rows for kept connections: servers that try to poison the next response.

Each row fetches /1 and then /2 from one host. The row's script runs on the first connection; later
connections respond correctly, with the path as the body. `first` and `second` are how the fetches
may end ("ok" with the own path as the body, never with anything else). `connections` is how many
the server accepts: 1 if the connection may be kept, 2 if it must not be. `requests` is how many
requests the server receives.
"""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import dataclass

from servers import CHUNKED, OK, Peer, Script, full, location

ONE, TWO = b"/1", b"/2"
POISON = full(b"poison")
PAUSE_S = 0.03  # between what is sent late, and between the two fetches


@dataclass(frozen=True)
class Row:
    """One server."""

    id: str
    script: Script
    first: str = "ok"
    second: str = "ok"
    connections: int = 2
    requests: int = 2
    tls_only: bool = False


async def respond(peer: Peer) -> None:
    """Respond to each request of a connection with its path."""
    while True:
        path = (await peer.read_request()).split()[1].partition(b"?")[0]
        await peer.send(full(path))


def sends(*parts: bytes, late: bytes = b"", then: str = "hold") -> Script:
    """Respond to the first request with `parts`, send `late`, and hold, close or reset."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"".join(parts))
        if late:
            await asyncio.sleep(PAUSE_S / 3)
            await peer.send(late)
        if then == "hold":
            await peer.wait_closed()
        elif then == "reset":
            await asyncio.sleep(PAUSE_S / 3)
            peer.reset()

    return script


def ends_after(count: int, how: str = "close") -> Script:
    """Respond to /1, and to /2 with `count` bytes of a response before the end."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(ONE))
        await peer.read_request()
        await peer.send(full(TWO)[:count])
        if how == "reset":
            await asyncio.sleep(PAUSE_S / 3)
            peer.reset()

    return script


async def end_both(peer: Peer) -> None:
    """Respond to /1 only: any other request ends its connection."""
    await peer.read_request()
    if peer.number == 0:
        await peer.send(full(ONE))
        await peer.read_request()


def keeps(*parts: bytes) -> Script:
    """Respond to /1 with `parts`, and correctly to what follows on the same connection."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        for part in parts:
            await peer.send(part)
            await asyncio.sleep(PAUSE_S / 10)
        await respond(peer)

    return script


def chunked(*after: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    """Make a response in chunks, and what follows."""
    return CHUNKED + b"2\r\n/1\r\n" + last + b"".join(after)


def zipped(*after: bytes) -> bytes:
    """Make a compressed body, and what follows."""
    return gzip.compress(ONE, mtime=0) + b"".join(after)


BAD = "ok|BAD_RESPONSE"  # BAD_RESPONSE only if the surplus arrives together with the response
LOST = "CONNECT_FAILED|FETCH_FAILED|BAD_RESPONSE"
ZIPPED = b"Content-Encoding: gzip"
SURPLUS = [
    Row("a-byte", sends(full(ONE), b"x"), BAD),
    Row("a-zero-byte", sends(full(ONE), b"\0"), BAD),
    Row("a-line-end", sends(full(ONE), b"\r\n"), BAD),
    Row("a-line-feed", sends(full(ONE), b"\n"), BAD),
    Row("a-response", sends(full(ONE), POISON), BAD),
    Row("a-hundred-responses", sends(full(ONE), POISON * 100), BAD),
    Row("half-a-response", sends(full(ONE), POISON[:30]), BAD),
    Row("the-rest-of-a-longer-body", sends(full(ONE), b"and more of it"), BAD),
    Row("an-interim-response", sends(full(ONE), b"HTTP/1.1 100 Continue\r\n\r\n"), BAD),
    Row("a-late-byte", sends(full(ONE), late=b"x"), BAD),
    Row("a-late-line-end", sends(full(ONE), late=b"\r\n"), BAD),
    Row("a-late-response", sends(full(ONE), late=POISON), BAD),
    Row("a-late-half-response", sends(full(ONE), late=POISON[:9]), BAD),
    Row("a-late-response-and-an-end", sends(full(ONE), late=POISON, then="close"), BAD),
    Row("a-body-though-the-length-is-0", sends(full(b""), b"/1"), "BAD_RESPONSE"),
]
FRAMES = [
    Row("chunks-and-a-byte", sends(chunked(b"x")), BAD),
    Row("chunks-and-a-line-end", sends(chunked(b"\r\n")), BAD),
    Row("chunks-and-a-response", sends(chunked(POISON)), BAD),
    Row("chunks-and-a-late-response", sends(chunked(), late=POISON), BAD),
    Row("chunks-and-a-trailer", sends(chunked(last=b"0\r\nX: y\r\n\r\n"))),
    Row("chunks-and-a-trailing-length", sends(chunked(last=b"0\r\nContent-Length: 9\r\n\r\n")),
        BAD),
    Row("chunks-and-an-extension-at-the-end", sends(chunked(last=b"0;a=b\r\n\r\n"))),
    Row("a-chunk-one-byte-too-short", sends(CHUNKED + b"3\r\n/1\r\n0\r\n\r\n"), "BAD_RESPONSE"),
    Row("a-chunk-that-ends-with-a-line-feed", sends(CHUNKED + b"2\r\n/1\n0\r\n\r\n"), BAD),
    Row("chunks-and-a-bare-carriage-return",
        sends(CHUNKED.replace(b": ", b":\r "), b"2\r\n/1\r\n0\r\n\r\n"), BAD),
    Row("length-longer-than-the-body", sends(full(ONE + b"..")[:-2], then="close"),
        "BAD_RESPONSE"),
    Row("length-shorter-than-the-body",
        sends(OK + b"Content-Length: 2\r\n\r\n/1" + POISON), BAD),
    Row("length-of-5000-digits",
        sends(OK + b"Content-Length: " + b"2".zfill(5000) + b"\r\n\r\n/1"), "BAD_RESPONSE"),
    Row("no-length", sends(OK + b"\r\n/1", then="close"), "ok|BAD_RESPONSE"),
    Row("bare-line-feeds", sends(full(ONE).replace(b"\r\n", b"\n"))),
    Row("one-bare-line-feed", sends(full(ONE).replace(b"OK\r\n", b"OK\n"))),
    Row("a-continued-header", sends(full(ONE, b"X: y\r\n Content-Length: 9"))),
    Row("a-line-end-before-the-head", sends(b"\r\n" + full(ONE))),
    Row("gzip-and-a-byte", sends(full(zipped(b"x"), ZIPPED)), "BAD_RESPONSE"),
    Row("gzip-and-a-late-response", sends(full(zipped(), ZIPPED), late=POISON), BAD),
]  # fmt: skip
HEADS = [
    Row("an-interim-response-before", sends(b"HTTP/1.1 100 Continue\r\n\r\n", full(ONE))),
    Row("early-hints-before", sends(b"HTTP/1.1 103 Early Hints\r\n\r\n", full(ONE))),
    Row("connection-close", sends(full(ONE, b"Connection: close"), late=POISON), BAD),
    Row("connection-close-among-others", sends(full(ONE, b"Connection: keep-alive, close"))),
    Row("connection-close-in-capitals", sends(full(ONE, b"CONNECTION: CLOSE"))),
    Row("http-1.0", sends(full(ONE).replace(b"/1.1 ", b"/1.0 "))),
    Row("http-1.0-keep-alive",
        sends(full(ONE, b"Connection: keep-alive").replace(b"/1.1 ", b"/1.0 "))),
    Row("an-upgrade", sends(full(ONE, b"Upgrade: h2c", b"Connection: upgrade"))),
    Row("an-upgrade-that-is-offered", sends(full(ONE, b"Upgrade: h2c"))),
    Row("switching-protocols",
        sends(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", POISON),
        "SOURCE_HTTP"),
    Row("a-redirect", sends(location("/1")), requests=3),
    Row("a-redirect-with-a-body", sends(location("/1")[:-5], b"%d\r\n\r\n" % len(POISON), POISON),
        "ok|BAD_RESPONSE", requests=3),
    Row("a-redirect-and-a-late-response", sends(location("/1"), late=POISON), requests=3),
    *(Row(f"status-{status}", sends(full(ONE).replace(b"200 OK", b"%d X" % status)), "SOURCE_HTTP")
      for status in (201, 204, 206, 304, 404, 429, 500, 503)),
]  # fmt: skip
ENDS = [
    Row("closes", sends(full(ONE), then="close")),
    Row("resets", sends(full(ONE), then="reset")),
    Row("closes-at-the-second-request", ends_after(0), requests=3),
    Row("resets-at-the-second-request", ends_after(0, "reset"), requests=3),
    Row("closes-both-connections-at-the-second-request", end_both, second="CONNECT_FAILED",
        requests=3),
    *(Row(f"{how}-after-{count}-bytes", ends_after(count, how.removesuffix("s")), second=LOST,
          connections=1)
      for how in ("closes", "resets") for count in (1, 8, 17, 37, 38, 39)),
]  # fmt: skip
KEPT = [
    Row("kept-length", keeps(full(ONE)), connections=1),
    Row("kept-length-in-pieces", keeps(full(ONE)[:5], full(ONE)[5:25], full(ONE)[25:]),
        connections=1),
    Row("kept-chunks", keeps(chunked()), connections=1),
    Row("kept-chunks-in-pieces", keeps(chunked()[:-9], chunked()[-9:-3], chunked()[-3:]),
        connections=1),
    Row("kept-gzip", keeps(full(zipped(), ZIPPED)), connections=1),
    Row("kept-keep-alive",
        keeps(full(ONE, b"Connection: keep-alive", b"Keep-Alive: timeout=5")), connections=1),
    Row("kept-with-hints-of-http-3", keeps(full(ONE, b"Alt-Svc: h3=\":443\"")), connections=1),
]  # fmt: skip

ROWS = [*SURPLUS, *FRAMES, *HEADS, *ENDS, *KEPT]
