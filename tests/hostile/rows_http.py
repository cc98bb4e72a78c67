"""The catalogue's rows for HTTP: servers that break the protocol, stall, or never stop sending.

Each row fetches http://photos.example/a.jpg once, from a server of its own. `code` is how the fetch
must end ("a|b": either), and `requests` how many requests the server receives. Where `code` is
"ok", the result is `body`.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rows_url import Q
from servers import CHUNKED, OK, PHOTO, Peer, Script, full, location, responds

from heimdex_clip_worker.serving.download import AddressPolicy


@dataclass(frozen=True)
class Row:
    """One server."""

    id: str
    code: str
    script: Script
    limits: dict[str, Any] = field(default_factory=dict)
    requests: int | None = 1  # None: any number
    body: bytes = PHOTO
    retryable: bool | None = None  # None: as the error's class says
    policy: AddressPolicy = AddressPolicy()
    message: str = ""  # a part of the public message
    sends: str = ""  # path and query of the last request


def row(id: str, code: str, script: Script | Sequence[bytes], **more: Any) -> Row:
    """A row whose server runs `script`, or sends the parts that `script` lists."""
    return Row(f"http-{id}", code, script if callable(script) else responds(*script), **more)


def bad(id: str, *parts: bytes, **more: Any) -> Row:
    """A row whose response breaks HTTP."""
    return row(id, "BAD_RESPONSE", parts, **more)


def refused(id: str, *parts: bytes) -> Row:
    """A row whose response has a content coding that is not decoded."""
    return row(id, "UNSUPPORTED_ENCODING", parts, retryable=False)


def ok(id: str, *parts: bytes, **more: Any) -> Row:
    """A row whose response is unusual but correct."""
    return row(id, "ok", parts, **more)


def late(id: str, script: Script, **more: Any) -> Row:
    """A row whose server takes longer than the deadline."""
    return row(id, "FETCH_TIMEOUT", script, **{"limits": {"timeout_s": 0.3}, **more})


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Script:
    """A script that sends `head`, and then `piece` for ever."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(head)
        await peer.send_forever(piece, pause_s)

    return script


def length(value: bytes, body: bytes = PHOTO) -> tuple[bytes, bytes]:
    """Make a response with a Content-Length of `value`."""
    return OK + b"Content-Length: " + value + b"\r\n\r\n", body


async def reset_at_once(peer: Peer) -> None:
    """Reset the connection without reading the request."""
    peer.reset()


async def close_at_once(peer: Peer) -> None:
    """Close the connection without reading the request."""


async def drip_head(peer: Peer) -> None:
    """Drip the head of a correct response, slower than the deadline."""
    await peer.read_request()
    await peer.drip(full(), pause_s=0.03)


async def drip_body(peer: Peer) -> None:
    """Drip the body of a correct response, slower than the deadline."""
    await peer.read_request()
    await peer.send(OK + b"Content-Length: 500\r\n\r\n")
    await peer.drip(bytes(500))


async def redirect_slowly(peer: Peer) -> None:
    """Redirect slowly: no single hop exceeds the deadline, all of them together do."""
    await peer.read_request()
    await peer.send(location("/a.jpg")[:-2], pause_s=0.12)
    await peer.send(b"\r\n")


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
SLOW = [
    late("silent", responds(then="hold")),
    late("dripped-head", drip_head),
    late("dripped-body", drip_body),
    late("head-without-end", responds(OK + b"Content-Type: image/jpeg\r\n", then="hold")),
    late("status-line-without-end", responds(b"HTTP/1.1 2", then="hold")),
    late("body-that-stops", responds(full()[:-3], then="hold")),
    late("chunks-that-stop", responds(CHUNKED + b"5\r\nphoto\r\n", then="hold")),
    late("dripped-chunks", endless(CHUNKED, b"1\r\nx\r\n", 0.02)),
    late("dripped-chunk-size", endless(CHUNKED, b"0", 0.02)),
    late("dripped-headers", endless(OK, b"X: y\r\n", 0.02)),
    late("dripped-interim-answers", endless(b"", CONTINUE, 0.05)),
    late("close-delimited-that-stays", responds(OK + b"\r\n" + PHOTO, then="hold")),
    late("redirects-slowly", redirect_slowly, requests=None),
    ok("dripped-in-time", *(full()[i : i + 9] for i in range(0, len(full()), 9))),
]
HEADS = [
    row("endless-headers", "BAD_RESPONSE", endless(OK, b"X-A: b\r\n" * 4096)),
    row("endless-header", "HEADERS_TOO_LARGE", endless(OK + b"X-A: ", b"a" * 65_536)),
    row("endless-status-line", "HEADERS_TOO_LARGE", endless(b"HTTP/1.1 200 ", b"a" * 65_536)),
    row("endless-line-breaks", "BAD_RESPONSE", endless(b"", b"\r\n" * 32_768)),
    row("endless-interim-answers", "BAD_RESPONSE", endless(b"", CONTINUE * 2000)),
    row("seventeen-interim-answers", "BAD_RESPONSE", [CONTINUE * 17 + full()]),
    row("endless-early-hints", "BAD_RESPONSE", endless(b"", HINTS * 1000)),
    row("endless-folded-header", "HEADERS_TOO_LARGE",
        endless(OK + b"X-A: b\r\n", b" c\r\n" * 9999)),
    row("huge-header", "HEADERS_TOO_LARGE", [OK, b"X-A: " + b"a" * 1_000_000 + b"\r\n\r\n"],
        message="more than 32,768 bytes in a line", retryable=False),
    row("huge-header-name", "HEADERS_TOO_LARGE", [OK, b"a" * 100_000 + b": b\r\n\r\n"]),
    row("header-of-32769-bytes", "HEADERS_TOO_LARGE", [full(PHOTO, b"X-A: " + b"a" * 32_769)]),
    ok("header-of-32000-bytes", full(PHOTO, b"Content-Security-Policy: " + b"a" * 32_000)),
    ok("header-of-9000-bytes-in-pieces", full(PHOTO, b"X: " + b"a" * 9000)[:5000],
       full(PHOTO, b"X: " + b"a" * 9000)[5000:]),
    ok("two-headers-of-20000-bytes", full(PHOTO, b"X: " + b"a" * 20_000, b"Y: " + b"a" * 20_000)),
    bad("many-headers", OK, b"X-A: b\r\n" * 5000, b"Content-Length: 0\r\n\r\n"),
    bad("header-without-colon", OK + b"nothing here\r\nContent-Length: 5\r\n\r\nphoto"),
    bad("header-with-nul", OK + b"X: a\0b\r\nContent-Length: 5\r\n\r\nphoto"),
    row("space-before-colon", "ok|BAD_RESPONSE", [OK + b"Content-Length : 5\r\n\r\nphoto"],
        body=b"photo"),
    bad("header-name-empty", OK + b": x\r\nContent-Length: 5\r\n\r\nphoto"),
    row("interim-answer-only", "CONNECT_FAILED|BAD_RESPONSE", [CONTINUE]),
    ok("a-few-interim-answers", CONTINUE, HINTS, CONTINUE + full()),
]  # fmt: skip
LENGTHS = [
    bad("length-too-long", *length(b"5000")),
    bad("length-too-short", *length(b"5")),
    bad("length-negative", *length(b"-1")),
    bad("length-plus", *length(b"+%d" % len(PHOTO))),
    bad("length-hex", *length(b"0x%x" % len(PHOTO))),
    bad("length-fraction", *length(b"22.0")),
    bad("length-a-word", *length(b"all")),
    bad("length-empty", *length(b"")),
    bad("length-underscore", *length(b"2_2")),
    bad("length-two-numbers", *length(b"22, 23")),
    bad("length-of-5000-digits", *length(b"9" * 5000)),
    bad("length-twice", OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nphoto"),
    bad("length-twice-different", OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nphoto"),
    bad("length-not-ascii", *length("２２".encode())),
    row("length-huge", "IMAGE_TOO_LARGE", length(b"99999999999"), message="99,999,999,999 bytes"),
    row("length-beyond-64-bits", "IMAGE_TOO_LARGE|BAD_RESPONSE", length(b"9" * 30)),
    row("length-one-over", "IMAGE_TOO_LARGE", length(b"1001", bytes(1001)),
        limits={"max_bytes": 1000}, message="1,001 bytes > 1,000 allowed"),
    row("length-just-right", "ok", length(b"1000", bytes(1000)), body=bytes(1000),
        limits={"max_bytes": 1000}),
    bad("length-and-chunked", OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"5\r\nphoto\r\n0\r\n\r\n"),
    bad("chunked-and-length", OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        b"5\r\nphoto\r\n0\r\n\r\n"),
    ok("length-zero", *length(b"0", b""), body=b""),
    row("reset-instead-of-body", "FETCH_FAILED", responds(length(b"5000")[0], then="reset")),
    row("reset-in-the-body", "FETCH_FAILED", responds(*length(b"5000"), then="reset")),
    row("reset-in-close-delimited", "FETCH_FAILED", responds(OK + b"\r\n", PHOTO, then="reset")),
    row("reset-in-chunks", "FETCH_FAILED", responds(CHUNKED + b"5\r\nphoto\r\n", then="reset")),
]  # fmt: skip
CHUNKS = [
    bad("chunks-cut", CHUNKED + b"5\r\nphoto\r\n"),
    bad("chunk-cut", CHUNKED + b"50\r\nphoto"),
    bad("chunk-size-a-word", CHUNKED + b"zz\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-size-negative", CHUNKED + b"-5\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-size-empty", CHUNKED + b"\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-size-0x", CHUNKED + b"0x5\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-size-underscore", CHUNKED + b"0_5\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-size-overflow", CHUNKED + b"1" + b"0" * 16 + b"5\r\nphoto\r\n0\r\n\r\n"),
    bad("chunk-longer-than-said", CHUNKED + b"3\r\nphoto\r\n0\r\n\r\n"),
    row("chunk-of-exabytes", "BAD_RESPONSE|IMAGE_TOO_LARGE",
        [CHUNKED + b"7fffffffffffffff\r\nphoto"]),
    row("endless-chunk-size", "BAD_RESPONSE", endless(CHUNKED, b"0" * 65_536)),
    row("endless-chunk-extension", "BAD_RESPONSE", endless(CHUNKED + b"5;a=", b"b" * 65_536)),
    row("endless-trailers", "BAD_RESPONSE", endless(CHUNKED + b"0\r\n", b"X: y\r\n" * 8192)),
    row("endless-chunks", "IMAGE_TOO_LARGE",
        endless(CHUNKED, b"10000\r\n" + bytes(65_536) + b"\r\n")),
    row("endless-tiny-chunks", "BAD_RESPONSE", endless(CHUNKED, b"1\r\nx\r\n" * 8192)),
    bad("tiny-chunks-after-a-photograph", CHUNKED + b"10000\r\n" + bytes(65_536) + b"\r\n",
        b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n"),
    bad("tiny-chunks", CHUNKED + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n"),
    bad("chunks-with-long-extensions", CHUNKED, b"8;%b\r\n12345678\r\n" % (b"x" * 99) * 3000),
    ok("few-tiny-chunks", CHUNKED + b"1\r\nx\r\n" * 1500 + b"0\r\n\r\n", body=b"x" * 1500),
    ok("many-chunks-of-512-bytes", CHUNKED, *[b"200\r\n%b\r\n" % bytes(512)] * 2000,
       b"0\r\n\r\n", body=bytes(1_024_000)),
    row("endless-close-delimited", "IMAGE_TOO_LARGE", endless(OK + b"\r\n", bytes(65_536))),
    row("endless-after-the-length", "ok|BAD_RESPONSE", endless(full(), bytes(65_536))),
    ok("chunked", CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PHOTO), PHOTO)),
    ok("chunked-with-trailer", CHUNKED + b"%X;a=b\r\n%b\r\n0\r\nX: y\r\n\r\n"
       % (len(PHOTO), PHOTO)),
]  # fmt: skip


@functools.cache
def bomb(layers: int = 1, mib: int = 200) -> bytes:
    """Compress `mib` MiB of zeroes in `layers` layers of gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(packer.compress(bytes(2**20)) for _ in range(mib)) + packer.flush()
    for _ in range(layers - 1):
        data = gzip.compress(data)
    return data


def coded(coding: bytes, body: bytes) -> bytes:
    """Make a response that announces `coding`."""
    return full(body, b"Content-Encoding: " + coding)


async def send_bomb(peer: Peer) -> None:
    """Send a gzip bomb."""
    await peer.read_request()
    await peer.send(coded(b"gzip", bomb()))


async def send_chunked_bomb(peer: Peer) -> None:
    """Send a gzip bomb in one chunk."""
    await peer.read_request()
    data = bomb()
    await peer.send(CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n%x\r\n" % len(data), data)


ZIPPED = gzip.compress(PHOTO, mtime=0)
CODINGS = [
    ok("gzip", coded(b"gzip", ZIPPED)),
    ok("x-gzip", coded(b"X-GZIP", ZIPPED)),
    ok("identity", coded(b"identity", PHOTO)),
    row("gzip-bomb", "IMAGE_TOO_LARGE", send_bomb),
    row("gzip-bomb-in-a-chunk", "IMAGE_TOO_LARGE", send_chunked_bomb),
    row("gzip-one-byte-over", "IMAGE_TOO_LARGE", [coded(b"gzip", gzip.compress(bytes(1001)))],
        limits={"max_bytes": 1000}),
    row("gzip-endless", "IMAGE_TOO_LARGE|BAD_RESPONSE",
        endless(OK + b"Content-Encoding: gzip\r\n\r\n" + ZIPPED[:10], b"\0\0\0\xff\xff" * 9999)),
    refused("gzip-twice", coded(b"gzip, gzip", gzip.compress(ZIPPED))),
    refused("gzip-twice-in-two-headers",
            full(gzip.compress(ZIPPED), b"Content-Encoding: gzip", b"Content-Encoding: gzip")),
    ok("gzip-announced-once-packed-twice", coded(b"gzip", gzip.compress(ZIPPED)), body=ZIPPED),
    bad("gzip-cut", coded(b"gzip", ZIPPED[:-9])),
    bad("gzip-without-checksum", coded(b"gzip", ZIPPED[:-8])),
    bad("gzip-wrong-checksum", coded(b"gzip", ZIPPED[:-8] + bytes(8))),
    bad("gzip-that-is-none", coded(b"gzip", PHOTO)),
    bad("gzip-of-nothing", coded(b"gzip", b"")),
    bad("gzip-then-junk", coded(b"gzip", ZIPPED + b"junk")),
    bad("gzip-two-members", coded(b"gzip", ZIPPED + ZIPPED)),
    row("gzip-then-endless-junk", "BAD_RESPONSE",
        endless(OK + b"Content-Encoding: gzip\r\n\r\n" + ZIPPED, bytes(1000), 0.002)),
    ok("gzip-of-much", coded(b"gzip", gzip.compress(bytes(9_000_000))), body=bytes(9_000_000)),
    ok("gzip-in-single-bytes", CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n",
       *[b"1\r\n%c\r\n" % byte for byte in ZIPPED], b"0\r\n\r\n"),
    *(
        refused(f"coding-{name}", coded(value, body))
        for name, value, body in (
            ("deflate", b"deflate", zlib.compress(PHOTO)),
            ("deflate-over-a-photo", b"deflate", PHOTO),
            ("br", b"br", PHOTO),
            ("br-in-capitals", b"BR", PHOTO),
            ("br-with-a-weight", b"br;q=1.0", PHOTO),
            ("zstd", b"zstd", PHOTO),
            ("compress", b"compress", PHOTO),
            ("x-compress", b"x-compress", PHOTO),
            ("gzip-and-br", b"gzip, br", ZIPPED),
            ("br-and-a-word", b"aws-chunked, br", PHOTO),
            ("xz", b"xz", PHOTO),
            ("br-of-nothing", b"br", b""),
        )
    ),
    refused("coding-br-and-a-huge-length", OK + b"Content-Encoding: br\r\n"
            b"Content-Length: 99999999999\r\n\r\n"),
    refused("coding-br-in-chunks", CHUNKED[:-2] + b"Content-Encoding: br\r\n\r\n5\r\nphoto\r\n"),
    refused("coding-br-until-the-end", OK + b"Content-Encoding: br\r\n\r\n" + PHOTO),
    *(
        ok(f"coding-{name}", coded(value, body))
        for name, value, body in (
            ("aws-chunked", b"aws-chunked", PHOTO),
            ("aws-chunked-in-capitals", b"AWS-Chunked", PHOTO),
            ("utf-8", b"UTF-8", PHOTO),
            ("none", b"none", PHOTO),
            ("binary", b"binary", PHOTO),
            ("base64", b"base64", PHOTO),
            ("a-media-type", b"image/jpeg", PHOTO),
            ("latin-1", b"\xe4\xf6", PHOTO),
            ("empty", b"", PHOTO),
            ("commas", b",,", PHOTO),
            ("two-words", b"aws-chunked, identity", PHOTO),
            ("unknown", b"rot13", PHOTO),
            ("gzip-and-a-word", b"gzip,aws-chunked", ZIPPED),
            ("gzip-in-quotes", b'"gzip"', ZIPPED),
        )
    ),
    bad("transfer-gzip", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n"
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZIPPED), ZIPPED)),
    bad("transfer-unknown", OK + b"Transfer-Encoding: xchunked\r\n\r\n" + PHOTO),
    bad("transfer-chunked-twice", OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n"
        b"5\r\nphoto\r\n0\r\n\r\n"),
    bad("transfer-identity", OK + b"Transfer-Encoding: identity\r\n\r\n" + PHOTO),
]  # fmt: skip


def status(number: int, *headers: bytes) -> Row:
    """A row whose server responds with a status other than 200."""
    lines = [b"HTTP/1.1 %d Whatever" % number, *headers]
    if number not in (101, 204, 304):
        lines.append(b"Content-Length: 5\r\n\r\nphoto")
    else:
        lines.append(b"\r\n")
    retryable = number in (408, 425, 429) or number >= 500
    parts = [b"\r\n".join(lines)]
    more = {"retryable": retryable, "message": f"HTTP {number}"}
    return row(f"status-{number}", "SOURCE_HTTP", parts, **more)


STATUSES = [
    status(206, b"Content-Range: bytes 0-4/999"),
    status(304),
    *map(status, (101, 201, 202, 203, 204, 300, 305, 400, 401, 402, 403, 404, 405, 408, 410, 416)),
    *map(status, (418, 421, 425, 429, 451, 499, 500, 501, 502, 503, 504, 507, 511, 520, 599)),
    row("status-300-with-location", "SOURCE_HTTP", [location("/b.jpg", b"300 Choose")]),
    row("status-401-asks-for-login", "SOURCE_HTTP",
        [b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"]),
    row("status-500-endless", "SOURCE_HTTP",
        endless(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"10000\r\n" + bytes(65_536) + b"\r\n")),
    row("status-999", "SOURCE_HTTP|BAD_RESPONSE", [b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n"],
        retryable=False),
    row("status-0", "SOURCE_HTTP|BAD_RESPONSE", [b"HTTP/1.1 000 No\r\nContent-Length: 0\r\n\r\n"],
        retryable=False),
    bad("status-20", b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n"),
    bad("status-2000", b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"),
    bad("status-negative", b"HTTP/1.1 -200 OK\r\nContent-Length: 0\r\n\r\n"),
    bad("status-a-word", b"HTTP/1.1 two OK\r\nContent-Length: 0\r\n\r\n"),
]  # fmt: skip


def chain(*hops: bytes) -> Script:
    """A script that sends the first of `hops` to the first connection, and so on."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(hops[min(peer.number, len(hops) - 1)])

    return script


def leads(id: str, code: str, to: str, **more: Any) -> Row:
    """A row whose server redirects to `to`; there is no request after that."""
    return row(f"redirect-{id}", code, [location(to)], **more)


FLOOD = b"10000\r\n" + bytes(65_536) + b"\r\n"
LOOP = b"HTTP/1.1 302 Found\r\nLocation: /a.jpg\r\nTransfer-Encoding: chunked\r\n\r\n"
HOP = [location(f"/{i}.jpg", b"%d Moved" % s) for i, s in enumerate((301, 302, 303, 307, 308))]
REDIRECTS = [
    row("redirect-once", "ok", chain(HOP[0], full()), requests=2),
    row("redirect-three-times", "ok", chain(*HOP[:3], full()), requests=4),
    row("redirect-307-and-308", "ok", chain(*HOP[3:], full()), requests=3),
    row("redirect-four-times", "TOO_MANY_REDIRECTS", chain(*HOP[:4], full()), requests=4),
    row("redirect-to-itself", "TOO_MANY_REDIRECTS", chain(location("/a.jpg")), requests=4,
        message="more than 3"),
    row("redirect-back-and-forth", "TOO_MANY_REDIRECTS",
        chain(location("/b.jpg"), location("/a.jpg"), location("/b.jpg"), location("/a.jpg")),
        requests=4),
    row("redirect-when-none-are-allowed", "TOO_MANY_REDIRECTS", chain(HOP[0], full()),
        limits={"max_redirects": 0}),
    row("redirect-endless-body", "TOO_MANY_REDIRECTS", endless(LOOP, FLOOD), requests=4),
    row("redirect-endless-close-delimited", "TOO_MANY_REDIRECTS",
        endless(b"HTTP/1.1 302 F\r\nLocation: /a.jpg\r\n\r\n", bytes(65_536)), requests=4),
    row("redirect-dripped-body", "TOO_MANY_REDIRECTS", endless(LOOP, b"1\r\nx\r\n", 0.05),
        requests=4),
    row("redirect-gzip-bomb", "ok", chain(location("/b", b"302 F", b"Content-Encoding: gzip"),
                                          full()), requests=2),
    leads("to-loopback", "URL_NOT_ALLOWED", f"http://127.0.0.1/{Q}"),
    leads("to-private", "URL_NOT_ALLOWED", f"http://192.168.1.1/{Q}"),
    leads("to-metadata", "URL_NOT_ALLOWED", "http://169.254.169.254/latest/meta-data/"),
    leads("to-ipv6", "URL_NOT_ALLOWED", f"http://[::ffff:169.254.169.254]/{Q}"),
    leads("to-port", "URL_NOT_ALLOWED", f"http://photos.example:22/{Q}"),
    leads("to-port-without-scheme", "URL_NOT_ALLOWED", f"//photos.example:6379/{Q}"),
    leads("off-the-list", "URL_NOT_ALLOWED", f"http://evil.example/{Q}",
          policy=AddressPolicy(allowed_hosts=("photos.example",))),
    leads("to-integer", "INVALID_URL", f"http://2130706433/{Q}"),
    leads("to-file", "INVALID_URL", "file:///etc/passwd"),
    leads("to-ftp", "INVALID_URL", f"ftp://photos.example/{Q}"),
    leads("to-data", "INVALID_URL", "data:image/png;base64,aaaa"),
    leads("to-gopher", "INVALID_URL", f"gopher://127.0.0.1:6379/_FLUSHALL{Q}"),
    leads("to-userinfo", "INVALID_URL", f"http://u:p@photos.example/{Q}"),
    leads("to-userinfo-without-scheme", "INVALID_URL", f"//photos.example@127.0.0.1/{Q}"),
    leads("to-backslash", "INVALID_URL", f"http://127.0.0.1\\@photos.example/{Q}"),
    leads("to-backslashes", "INVALID_URL", "\\\\evil.example\\a"),
    leads("to-a-host-with-umlaut", "INVALID_URL", "http://ä.example/a.jpg"),
    leads("to-a-host-with-space", "INVALID_URL", "http://photos .example/a.jpg"),
    leads("to-a-no-break-space", "INVALID_URL", "http://\u00a0127.0.0.1/a.jpg"),
    leads("to-fullwidth-digits", "INVALID_URL", "http://１２７.0.0.1/a.jpg"),
    leads("to-a-fullwidth-slash", "INVALID_URL", "http:／／127.0.0.1/a.jpg@photos.example\\"),
    leads("to-1400-umlauts", "INVALID_URL", "/" + "ä" * 1400),
    row("redirect-with-a-space", "ok", chain(location("/a b.jpg?t=x y"), full()), requests=2,
        sends="/a%20b.jpg?t=x%20y"),
    row("redirect-with-umlaut", "ok", chain(location("/ä.jpg?t=é"), full()), requests=2,
        sends="/%C3%A4.jpg?t=%C3%A9"),
    row("redirect-with-emoji", "ok", chain(location("/\U0001f600/b.jpg"), full()), requests=2,
        sends="/%F0%9F%98%80/b.jpg"),
    row("redirect-in-latin-1", "ok",
        chain(location("/b.jpg").replace(b"/b", b"/\xe4"), full()), requests=2,
        sends="/%E4.jpg"),
    row("redirect-half-encoded", "ok", chain(location("/%C3%A4/ö b%20c.jpg"), full()), requests=2,
        sends="/%C3%A4/%C3%B6%20b%20c.jpg"),
    row("redirect-with-a-last-question-mark", "ok", chain(location("/b.jpg?"), full()),
        requests=2, sends="/b.jpg"),
    leads("to-tab", "INVALID_URL|BAD_RESPONSE", "/a\t.jpg"),
    leads("to-nul", "INVALID_URL|BAD_RESPONSE", "/a\0.jpg"),
    leads("to-bracket", "INVALID_URL", "http://[/a.jpg"),
    leads("overlong", "INVALID_URL|BAD_RESPONSE", "/" + "a" * 5000),
    leads("empty", "INVALID_URL", ""),
    row("redirect-without-location", "BAD_RESPONSE",
        [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"]),
    row("redirect-with-two-locations", "BAD_RESPONSE",
        [location("/b.jpg", b"302 Found", b"Location: http://evil.example/")]),
    row("redirect-relative", "ok", chain(location("b.jpg?x=%2f"), full()), requests=2),
    row("redirect-dots", "ok", chain(location("../../b.jpg"), full()), requests=2),
    row("redirect-query-only", "ok", chain(location("?b"), full()), requests=2),
    row("redirect-fragment-only", "TOO_MANY_REDIRECTS", chain(location("#x")), requests=4),
    row("redirect-refresh-header", "SOURCE_HTTP",
        [b"HTTP/1.1 404 No\r\nRefresh: 0; url=/b.jpg\r\nContent-Length: 0\r\n\r\n"]),
    row("redirect-content-location", "ok", [full(PHOTO, b"Location: /b", b"Content-Location: /b")]),
]  # fmt: skip
NOT_HTTP = [
    bad("version-0.9", PHOTO),
    bad("version-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"),
    bad("version-2-frames", b"\0\0\x12\x04\0\0\0\0\0" + bytes(18)),
    bad("version-9.9", b"HTTP/9.9 200 OK\r\nContent-Length: 5\r\n\r\nphoto"),
    bad("version-a-word", b"HTTP/one 200 OK\r\nContent-Length: 5\r\n\r\nphoto"),
    bad("other-protocol", b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    bad("icy", b"ICY 200 OK\r\nContent-Length: 5\r\n\r\nphoto"),
    bad("binary", bytes(range(256)) * 16),
    bad("zeroes", bytes(100_000)),
    bad("a-request", b"GET / HTTP/1.1\r\nHost: photos.example\r\n\r\n"),
    row("endless-binary", "BAD_RESPONSE", endless(b"", bytes(range(256)) * 256)),
    row("endless-zeroes", "BAD_RESPONSE", endless(b"", bytes(65_536))),
    bad("tls-on-the-http-port", b"\x15\x03\x03\x00\x02\x02\x28"),
    row("closes-at-once", "CONNECT_FAILED", close_at_once, requests=0),
    row("closes-after-the-request", "CONNECT_FAILED", []),
    row("closes-in-the-status-line", "BAD_RESPONSE|CONNECT_FAILED", [b"HTTP/1.1 2"]),
    row("closes-in-the-head", "BAD_RESPONSE|CONNECT_FAILED", [OK + b"Content-Le"]),
    row("resets-at-once", "CONNECT_FAILED", reset_at_once, requests=None),
    row("resets-after-the-request", "CONNECT_FAILED", responds(then="reset")),
    ok("version-1.0", b"HTTP/1.0 200 OK\r\n\r\n" + PHOTO),
    ok("version-1.0-with-length", full().replace(b"1.1", b"1.0")),
    ok("close-delimited", OK + b"\r\n" + PHOTO),
    ok("no-reason", full().replace(b" OK", b" ")),
    ok("type-is-a-lie", full(PHOTO, b"Content-Type: text/html; charset=\xff")),
    ok("keep-alive-offered", full(PHOTO, b"Connection: keep-alive", b"Keep-Alive: timeout=99")),
    ok("upgrade-offered", full(PHOTO, b"Upgrade: h2c", b"Alt-Svc: h2=\"127.0.0.1:22\"")),
]  # fmt: skip

ROWS = [*SLOW, *HEADS, *LENGTHS, *CHUNKS, *CODINGS, *STATUSES, *REDIRECTS, *NOT_HTTP]
