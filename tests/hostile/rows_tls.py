"""The catalogue's rows for TLS, with certificates of an authority that the test creates.

`certificate` names one of the certificates that the test creates. `script` is what the server does
after the handshake. With `plain` the server speaks no TLS, and the script has the bare socket.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows_url import Q
from servers import OK, PHOTO, Peer, Records, Script, full, location, responds


@dataclass(frozen=True)
class Row:
    """One TLS server."""

    id: str
    code: str
    certificate: str = "right"  # right, wildcard, address, wrong-host, expired, not-yet, ...
    script: Script = responds(full())
    plain: bool = False
    url: str = f"https://photos.example/a.jpg{Q}"
    context: str = "certifi"  # trust the test's authority in place of certifi's list;
    # injected: by a context given to the fetcher; production: trust certifi's own list
    environment: dict[str, str] = field(default_factory=dict)  # {ca}, {folder} are filled in
    limits: dict[str, Any] = field(default_factory=dict)
    requests: int = 0  # how many the server receives
    body: bytes = PHOTO


async def hang(peer: Peer) -> None:
    """Send nothing."""
    await peer.wait_closed()


async def greet_and_hang(peer: Peer) -> None:
    """Wait for the client's hello, begin a handshake record, and send no more."""
    await peer.reader.read(5)
    await peer.send(b"\x16\x03\x03\x40\x00\x02")
    await peer.wait_closed()


async def drip_handshake(peer: Peer) -> None:
    """Drip a handshake record that never ends."""
    await peer.reader.read(5)
    await peer.send(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
    await peer.send_forever(b"\0", pause_s=0.02)


async def garbage(peer: Peer) -> None:
    """Answer the hello with noise."""
    await peer.reader.read(5)
    await peer.send(bytes(range(256)) * 8)


async def endless_garbage(peer: Peer) -> None:
    """Answer the hello with endless noise."""
    await peer.reader.read(5)
    await peer.send_forever(bytes(range(256)) * 256)


async def plain_http(peer: Peer) -> None:
    """Answer the hello with an HTTP response."""
    await peer.reader.read(5)
    await peer.send(full())


async def alert(peer: Peer) -> None:
    """Answer the hello with a fatal alert."""
    await peer.reader.read(5)
    await peer.send(b"\x15\x03\x03\x00\x02\x02\x28")


async def hang_up(peer: Peer) -> None:
    """Close at the hello."""
    await peer.reader.read(5)


async def cut_body(peer: Peer) -> None:
    """Reset the TCP connection in the middle of a body."""
    await peer.read_request()
    await peer.send(OK + b"Content-Length: 5000\r\n\r\nhalf")
    await asyncio.sleep(0.02)
    peer.reset()


async def end_without_goodbye(peer: Peer) -> None:
    """End a close-delimited body with a FIN and no close_notify, as an attacker on the way can."""
    await peer.read_request()
    await peer.send(OK + b"\r\nhalf")
    peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    await peer.wait_closed()


def updates(count: int) -> Script:
    """A script that changes the key `count` times before its response."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        records = Records(peer, peer.server.keys)
        for _ in range(0, count, 200):
            records.send(b"".join(records.update_key() for _ in range(min(count, 200))))
            await asyncio.sleep(0.002)
        records.send(records.make(23, full()))
        await peer.wait_closed()

    return script


def in_records(size: int, body: bytes) -> Script:
    """A script that sends a body in records that hold `size` bytes each."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(body)[: -len(body)])
        await peer.send(*(body[i : i + size] for i in range(0, len(body), size)))

    return script


def dh_parameters(bits: int, folder: Path) -> Path:
    """Write a Diffie-Hellman group of `bits` bits; its modulus is no prime, and as costly."""
    modulus = random.Random(bits).getrandbits(bits) | 1 << (bits - 1) | 1
    number = b"\0" + modulus.to_bytes(bits // 8, "big")
    body = b"\x02\x82" + len(number).to_bytes(2, "big") + number + b"\x02\x01\x02"
    data = base64.encodebytes(b"\x30\x82" + len(body).to_bytes(2, "big") + body).decode()
    path = folder / f"dh-{bits}.pem"
    path.write_text(f"-----BEGIN DH PARAMETERS-----\n{data}-----END DH PARAMETERS-----\n")
    return path


def bad(certificate: str, **more: Any) -> Row:
    """A row with a certificate that must be refused: no request is sent."""
    return Row(f"tls-{certificate}", "TLS_ERROR", certificate, **more)


def rude(id: str, code: str, script: Script, **more: Any) -> Row:
    """A row whose server does not complete a handshake."""
    return Row(f"tls-{id}", code, script=script, plain=True, **more)


LARGE = bytes(byte & 15 for byte in random.Random(0).randbytes(1_000_000))  # half as large as gzip
SHORT = {"timeout_s": 0.3}
REFUSED = "TLS_ERROR|CONNECT_FAILED"  # asyncio's servers close without an alert
ROWS = [
    Row("tls-right", "ok", requests=1),
    Row("tls-right-for-an-injected-context", "ok", context="injected", requests=1),
    Row("tls-wildcard", "ok", "wildcard", url=f"https://a.cdn.example/a.jpg{Q}", requests=1),
    Row("tls-address", "ok", "address", url=f"https://93.184.216.34/a.jpg{Q}", requests=1),
    Row("tls-1.2", "ok", "tls-1.2", requests=1),
    bad("wrong-host"),
    bad("expired"),
    bad("not-yet-valid"),
    bad("self-signed"),
    bad("unknown-authority"),
    bad("common-name-only"),
    bad("an-address-for-a-name"),
    bad("wildcard-two-levels", url=f"https://a.b.cdn.example/a.jpg{Q}"),
    bad("wildcard-for-its-parent", url=f"https://cdn.example/a.jpg{Q}"),
    bad("name-for-an-address", url=f"https://93.184.216.34/a.jpg{Q}"),
    Row("tls-1.1", "TLS_ERROR|CONNECT_FAILED", "tls-1.1"),
    Row("tls-not-of-certifi", "TLS_ERROR", context="production"),
    Row(
        "tls-authority-from-the-environment",
        "TLS_ERROR",
        context="production",
        environment={
            "SSL_CERT_FILE": "{ca}",
            "REQUESTS_CA_BUNDLE": "{ca}",
            "CURL_CA_BUNDLE": "{ca}",
        },
    ),
    Row(
        "tls-key-log-not-written",
        "ok",
        environment={"SSLKEYLOGFILE": "{folder}/keys"},
        requests=1,
    ),
    # What costs the client CPU: Diffie-Hellman in large numbers, and records that bring no data.
    Row("tls-costly-cipher", REFUSED, "dhe-10000"),
    Row("tls-costly-group", REFUSED, "ffdhe8192"),
    Row("tls-key-updates", "BAD_RESPONSE", "logged", script=updates(3000), requests=1),
    Row("tls-a-few-key-updates", "ok", "logged", script=updates(100), requests=1),
    Row("tls-2000-tickets", "BAD_RESPONSE", "2000-tickets", requests=1),
    Row("tls-8-tickets", "ok", "8-tickets", requests=1),
    Row("tls-records-of-a-byte", "BAD_RESPONSE", script=in_records(1, bytes(12_000)), requests=1),
    Row("tls-records-of-a-kilobyte", "ok", script=in_records(1024, bytes(2_000_000)), requests=1,
        body=bytes(2_000_000)),
    # Reading pauses while a part is decompressed, and then the server closes the connection.
    Row("tls-large-gzip", "ok", requests=1, body=LARGE,
        script=responds(full(gzip.compress(LARGE, 1), b"Content-Encoding: gzip"))),
    # Honest servers that do not know the group that is offered first.
    Row("tls-only-p-384", "ok", "secp384r1", requests=1),
    Row("tls-only-p-521", "ok", "secp521r1", requests=1),
    Row("tls-only-x25519", "ok", "X25519", requests=1),
    Row("tls-1.2-with-rsa", "ok", "rsa-1.2", requests=1),
    Row("tls-chacha20", "ok", "chacha20", requests=1),
    Row("tls-without-forward-secrecy", REFUSED, "no-forward-secrecy"),
    Row("tls-cbc", REFUSED, "cbc"),
    rude("plain-http", "TLS_ERROR", plain_http),
    rude("plain-http-at-once", "TLS_ERROR", lambda peer: peer.send(b"HTTP/1.1 400 No\r\n\r\n")),
    rude("garbage", "TLS_ERROR", garbage),
    rude("endless-garbage", "TLS_ERROR", endless_garbage),
    rude("fatal-alert", "TLS_ERROR", alert),
    rude("closes-at-the-hello", "CONNECT_FAILED|TLS_ERROR", hang_up),
    rude("hangs-in-the-handshake", "FETCH_TIMEOUT", hang, limits=SHORT),
    rude("hangs-after-half-a-record", "FETCH_TIMEOUT", greet_and_hang, limits=SHORT),
    rude("drips-the-handshake", "FETCH_TIMEOUT", drip_handshake, limits=SHORT),
    Row("tls-hangs-after-the-handshake", "FETCH_TIMEOUT", script=hang, limits=SHORT),
    Row("tls-cut-in-the-body", "FETCH_FAILED|BAD_RESPONSE", script=cut_body, requests=1),
    Row(
        "tls-close-delimited-without-goodbye",
        "BAD_RESPONSE",
        script=end_without_goodbye,
        requests=1,
    ),
    Row(
        "tls-redirect-to-http",
        "URL_NOT_ALLOWED",
        script=responds(location("http://photos.example/a.jpg")),
        requests=1,
    ),
    Row(
        "tls-redirect-to-a-name-without-certificate",
        "TLS_ERROR",
        script=responds(location("https://elsewhere.example/a.jpg")),
        requests=1,
    ),
]  # fmt: skip
