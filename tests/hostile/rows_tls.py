"""The catalogue's rows for TLS, with certificates of an authority made on the spot.

`certificate` names one of those that the test makes; `script` is what the server does once the
handshake is through. Where `plain`, the server speaks no TLS and the script has the bare socket.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

from rows_url import Q
from servers import OK, Peer, Script, full, location, says


@dataclass(frozen=True)
class Row:
    """One TLS server."""

    id: str
    code: str
    certificate: str = "right"  # right, wildcard, address, wrong-host, expired, not-yet, ...
    script: Script = says(full())
    plain: bool = False
    url: str = f"https://photos.example/a.jpg{Q}"
    context: str = "certifi"  # certifi, by way of which the test's authority comes; injected:
    # the test's own context; production: certifi with its own list
    environment: dict[str, str] = field(default_factory=dict)  # {ca}, {folder} are filled in
    limits: dict[str, Any] = field(default_factory=dict)
    hears: int = 0  # requests that the server may get to see


async def hang(peer: Peer) -> None:
    """Say nothing."""
    await peer.gone()


async def greet_and_hang(peer: Peer) -> None:
    """Wait for the hello, begin a handshake record, and say no more."""
    await peer.reader.read(5)
    await peer.say(b"\x16\x03\x03\x40\x00\x02")
    await peer.gone()


async def drip_handshake(peer: Peer) -> None:
    """Drip a handshake record that never gets anywhere."""
    await peer.reader.read(5)
    await peer.say(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
    await peer.forever(b"\0", pause_s=0.02)


async def garbage(peer: Peer) -> None:
    """Answer the hello with noise."""
    await peer.reader.read(5)
    await peer.say(bytes(range(256)) * 8)


async def endless_garbage(peer: Peer) -> None:
    """Answer the hello with noise that does not end."""
    await peer.reader.read(5)
    await peer.forever(bytes(range(256)) * 256)


async def plain_http(peer: Peer) -> None:
    """Take the hello for a request, and answer it."""
    await peer.reader.read(5)
    await peer.say(full())


async def alert(peer: Peer) -> None:
    """Answer the hello with a fatal alert."""
    await peer.reader.read(5)
    await peer.say(b"\x15\x03\x03\x00\x02\x02\x28")


async def hang_up(peer: Peer) -> None:
    """Close at the hello."""
    await peer.reader.read(5)


async def cut_body(peer: Peer) -> None:
    """Drop the TCP connection in the middle of a body, without a word."""
    await peer.ask()
    await peer.say(OK + b"Content-Length: 5000\r\n\r\nhalf")
    await asyncio.sleep(0.02)
    peer.reset()


async def end_without_goodbye(peer: Peer) -> None:
    """End a close-delimited body at TCP's level, as somebody on the way can: no close_notify."""
    await peer.ask()
    await peer.say(OK + b"\r\nhalf")
    peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    await peer.gone()


def bad(certificate: str, **more: Any) -> Row:
    """A row with a certificate that must not be taken: no request is sent."""
    return Row(f"tls-{certificate}", "TLS_ERROR", certificate, **more)


def rude(id: str, code: str, script: Script, **more: Any) -> Row:
    """A row whose server does not know TLS, or does not want to."""
    return Row(f"tls-{id}", code, script=script, plain=True, **more)


SHORT = {"timeout_s": 0.3}
ROWS = [
    Row("tls-right", "ok", hears=1),
    Row("tls-right-for-an-injected-context", "ok", context="injected", hears=1),
    Row("tls-wildcard", "ok", "wildcard", url=f"https://a.cdn.example/a.jpg{Q}", hears=1),
    Row("tls-address", "ok", "address", url=f"https://93.184.216.34/a.jpg{Q}", hears=1),
    Row("tls-1.2", "ok", "tls-1.2", hears=1),
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
        hears=1,
    ),
    rude("plain-http", "TLS_ERROR", plain_http),
    rude("plain-http-at-once", "TLS_ERROR", lambda peer: peer.say(b"HTTP/1.1 400 No\r\n\r\n")),
    rude("garbage", "TLS_ERROR", garbage),
    rude("endless-garbage", "TLS_ERROR", endless_garbage),
    rude("fatal-alert", "TLS_ERROR", alert),
    rude("closes-at-the-hello", "CONNECT_FAILED|TLS_ERROR", hang_up),
    rude("hangs-in-the-handshake", "FETCH_TIMEOUT", hang, limits=SHORT),
    rude("hangs-after-half-a-record", "FETCH_TIMEOUT", greet_and_hang, limits=SHORT),
    rude("drips-the-handshake", "FETCH_TIMEOUT", drip_handshake, limits=SHORT),
    Row("tls-hangs-after-the-handshake", "FETCH_TIMEOUT", script=hang, limits=SHORT),
    Row("tls-cut-in-the-body", "FETCH_FAILED|BAD_RESPONSE", script=cut_body, hears=1),
    Row(
        "tls-close-delimited-without-goodbye",
        "BAD_RESPONSE",
        script=end_without_goodbye,
        hears=1,
    ),
    Row(
        "tls-redirect-to-http",
        "URL_NOT_ALLOWED",
        script=says(location("http://photos.example/a.jpg")),
        hears=1,
    ),
    Row(
        "tls-redirect-to-a-name-without-certificate",
        "TLS_ERROR",
        script=says(location("https://elsewhere.example/a.jpg")),
        hears=1,
    ),
]
