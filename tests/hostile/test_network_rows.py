"""The catalogue's rows for URLs, lookups, TLS and HTTP, each fetched for real.

Each row is a test with its id. Besides the code, every test checks what holds for all rows: the
fetch ends by its deadline (+ 0.25 s, and the delay of a loaded machine), takes less than 50 MiB of
memory and makes the expected connections only; all are closed within 0.5 s; no error has a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import certifi
import psutil
import pytest
import rows_dns
import rows_http
import rows_tls
import rows_url
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from rows_url import PUBLIC, SECRET, Q
from servers import (
    CHUNKED,
    OK,
    PHOTO,
    NameServer,
    Net,
    Peer,
    Script,
    Successive,
    full,
    responds,
    serving,
)

from heimdex_clip_worker.errors import DownloadError, error_table
from heimdex_clip_worker.serving import download
from heimdex_clip_worker.serving.connection import Response
from heimdex_clip_worker.serving.download import (
    AddressPolicy,
    Fetcher,
    FetchLimits,
    _make_ssl_context,
    check_url,
)

pytestmark = [pytest.mark.model, pytest.mark.server]

LATE_S, LOADED_S, CLOSED_S, MEMORY = 0.25, 0.25, 0.5, 50 * 2**20
SECRETS = re.compile(rf"{SECRET}|token=|Traceback|File \"|\?|https?://")


class Monitor(threading.Thread):
    """Samples memory, and the delay with which a sleeping thread wakes on a loaded machine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process, self._done = psutil.Process(), threading.Event()
        self.memory = self._start = self._process.memory_info().rss
        self.late_s = 0.0

    def run(self) -> None:
        """Sample every 5 ms."""
        while True:
            due = time.perf_counter() + 0.005
            if self._done.wait(0.005):
                return
            self.late_s = max(self.late_s, time.perf_counter() - due)
            self.memory = max(self.memory, self._process.memory_info().rss)

    def added(self) -> int:
        """Compute the largest growth of memory, in bytes."""
        return self.memory - self._start

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@dataclass
class Result:
    """How a fetch ended."""

    code: str
    body: bytes | None
    error: DownloadError | None


def check_error(error: DownloadError) -> None:
    """Check what holds for every error."""
    assert error.code in error_table()
    assert isinstance(error, error_table()[error.code])
    for text in (str(error), error.detail, repr(error)):
        assert not SECRETS.search(text) and len(text) < 300, text
    assert str(error).startswith("Image download failed: ")


async def fetch(fetcher: Fetcher, url: Any) -> Result:
    """Fetch `url`; check the time, the memory and the error."""
    with Monitor() as monitor:
        start = time.perf_counter()
        try:
            result = Result("ok", await fetcher.fetch(url), None)
        except DownloadError as error:
            result = Result(error.code, None, error)
        took = time.perf_counter() - start
    if result.error:
        check_error(result.error)
    limit_s = fetcher.limits.timeout_s + LATE_S + min(LOADED_S, monitor.late_s)
    assert took < limit_s, f"{took:.3f} s > {limit_s:.3f} s"
    assert monitor.added() < MEMORY, f"{monitor.added() / 2**20:.0f} MiB"
    return result


def limits(row: Any = None, **more: Any) -> FetchLimits:
    """Make a row's limits: production's, with a shorter deadline and the row's own changes."""
    return FetchLimits(**{"timeout_s": 5.0, **getattr(row, "limits", {}), **more})


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts no authority, and is created quickly


def http_fetcher(limits: FetchLimits, policy: AddressPolicy, net: Net) -> Fetcher:
    """Make a fetcher for rows without TLS."""
    return Fetcher(limits, policy, resolve=net.look_up, ssl_context=NO_TLS)


def check_result(result: Result, row: Any, body: bytes = PHOTO) -> None:
    """Check that the result has the row's code, and the right body."""
    detail = result.error and f"{result.error} ({result.error.detail})"
    assert result.code in row.code.split("|"), detail
    if result.code == "ok":
        assert result.body == body


# Certificates


def _self_signed(name: str, dns: list[x509.GeneralName]) -> tuple[bytes, bytes]:
    """Make a self-signed certificate and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(subject, subject, key.public_key())
    builder = builder.serial_number(7).not_valid_before(now - day).not_valid_after(now + day)
    builder = builder.add_extension(x509.SubjectAlternativeName(dns), critical=False)
    return (
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        ),
    )


class Certificates:
    """An authority, and server contexts with good and bad certificates."""

    def __init__(self, folder: Path):
        self.folder, self.ca, self.untrusted = folder, trustme.CA(), trustme.CA()
        self.path = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.path)

    def client(self) -> ssl.SSLContext:
        """Make a client context that trusts the authority."""
        return ssl.create_default_context(cafile=str(self.path))

    def server(self, kind: str) -> ssl.SSLContext:
        """Make a server context with a certificate of `kind`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if kind == "self-signed":
            pair = [self.folder / "self.pem", self.folder / "self.key"]
            both = _self_signed("photos.example", [x509.DNSName("photos.example")])
            for path, data in zip(pair, both, strict=True):
                path.write_bytes(data)
            context.load_cert_chain(*map(str, pair))
            return context
        now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
        ca, names, options = self.ca, ["photos.example"], {}
        if kind == "expired":
            options = {"not_before": now - 9 * day, "not_after": now - day}
        elif kind == "not-yet-valid":
            options = {"not_before": now + day, "not_after": now + 9 * day}
        elif kind == "unknown-authority":
            ca = self.untrusted
        elif kind == "common-name-only":
            names, options = ["elsewhere.example"], {"common_name": "photos.example"}
        else:
            names = {
                "wrong-host": ["evil.example"],
                "address": [PUBLIC],
                "an-address-for-a-name": [PUBLIC],
                "wildcard": ["*.cdn.example"],
                "wildcard-two-levels": ["*.cdn.example"],
                "wildcard-for-its-parent": ["*.cdn.example"],
            }.get(kind, names)
        if kind in ("rsa-1.2", "dhe-10000", "no-forward-secrecy"):
            options["key_type"] = trustme.KeyType.RSA
        ca.issue_cert(*names, **options).configure_cert(context)
        self._restrict(context, kind)
        return context

    def _restrict(self, context: ssl.SSLContext, kind: str) -> None:
        """Let a server's context offer only what `kind` says."""
        ciphers = {
            "dhe-10000": "DHE-RSA-AES128-GCM-SHA256",
            "no-forward-secrecy": "AES128-GCM-SHA256",
            "cbc": "ECDHE-ECDSA-AES128-SHA256",
            "chacha20": "ECDHE-ECDSA-CHACHA20-POLY1305",
        }
        if kind in ("tls-1.2", "rsa-1.2", *ciphers):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if kind in ciphers:
            context.set_ciphers(ciphers[kind])
        if kind == "dhe-10000":
            context.load_dh_params(str(rows_tls.dh_parameters(10_000, self.folder)))
        elif kind in ("ffdhe8192", "secp384r1", "secp521r1", "X25519"):
            context.set_ecdh_curve(kind)
        elif kind.endswith("-tickets"):
            context.num_tickets = int(kind.split("-")[0])
        elif kind == "logged":
            context.num_tickets, context.keylog_filename = 0, str(self.folder / "logged")
        elif kind == "tls-1.1":
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Create one authority for all tests."""
    return Certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def no_other_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that resolves a name through the system instead of the injected resolver."""

    def getaddrinfo(host: Any, *args: Any, **more: Any) -> Any:
        if isinstance(host, str) and re.fullmatch(r"[0-9.]+", host):
            return real(host, *args, **more)
        raise AssertionError(f"resolved {host!r} through the system")

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# URLs


@pytest.mark.parametrize("row", rows_url.ROWS, ids=lambda row: row.id)
def test_url(row: rows_url.Row, certificates: Certificates) -> None:
    asyncio.run(_test_url(row, certificates))


async def _test_url(row: rows_url.Row, certificates: Certificates) -> None:
    def look_up(host: str) -> list[str]:
        return ["127.0.0.1"] if host == "localhost" else [PUBLIC]

    async with serving(responds(full())) as web, _secure(certificates, row) as tls:
        secure = str(row.url).lower().startswith("https")
        net = Net(look_up, {80: web.port, 8080: web.port, 443: tls.port if secure else web.port})
        context = certificates.client()
        with net.installed():
            async with Fetcher(
                limits(), row.policy, resolve=net.look_up, ssl_context=context
            ) as fetcher:
                result = await fetch(fetcher, row.url)
        check_result(result, row)
        assert net.dialled == ([row.dials] if row.dials else [])
        if row.code != "ok" and not row.is_resolved:
            assert not net.lookups
            with pytest.raises(DownloadError):  # refused here already, not only at the socket
                check_url(row.url, row.policy)
        if row.sends:
            lines = (web.requests + tls.requests)[0].decode().split("\r\n")
            assert lines[0] == f"GET {row.sends} HTTP/1.1"
            assert [line for line in lines if line.startswith("Host:")] == [f"Host: {row.host}"]
        assert len(web.requests + tls.requests) == bool(row.dials)


@contextlib.asynccontextmanager
async def _secure(certificates: Certificates, row: rows_url.Row) -> Any:
    """Run a TLS server with the right certificate, where the row needs one."""
    needed = row.dials and str(row.url).lower().startswith("https")
    context = certificates.server("right") if needed else None
    async with serving(responds(full()), context) as server:
        yield server


# Lookups


@pytest.mark.parametrize("row", rows_dns.ROWS, ids=lambda row: row.id)
def test_dns(row: rows_dns.Row) -> None:
    asyncio.run(_test_dns(row))


async def _test_dns(row: rows_dns.Row) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(row.responses[min(peer.number, len(row.responses) - 1)])

    answers = {
        name: answer.restarted() if isinstance(answer, Successive) else answer
        for name, answer in row.answers.items()
    }
    async with serving(script) as server:
        net = Net(answers, {80: server.port, 8080: server.port}, row.faults)
        with net.installed():
            async with http_fetcher(limits(row), row.policy, net) as fetcher:
                result = await fetch(fetcher, row.url)
        check_result(result, row)
        if row.max_dials:
            assert len(net.dialled) <= row.max_dials
        else:
            assert tuple(net.dialled) == row.dials
        if row.lookups is not None:
            assert len(net.lookups) == row.lookups
        assert await server.has_closed(CLOSED_S)


# TLS


@pytest.mark.parametrize("row", rows_tls.ROWS, ids=lambda row: row.id)
def test_tls(
    row: rows_tls.Row, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = certificates.folder
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value.format(ca=certificates.path, folder=folder))
    if row.context == "certifi":
        monkeypatch.setattr(certifi, "where", lambda: str(certificates.path))
    asyncio.run(_test_tls(row, certificates))
    assert not (folder / "keys").exists()


async def _test_tls(row: rows_tls.Row, certificates: Certificates) -> None:
    tls = None if row.plain else certificates.server(row.certificate)
    async with serving(row.script, tls) as server:
        server.keys = certificates.folder / "logged"
        net = Net(lambda host: [PUBLIC], {443: server.port})
        context = certificates.client() if row.context == "injected" else None
        fetcher = Fetcher(limits(row), AddressPolicy(), resolve=net.look_up, ssl_context=context)
        with net.installed():
            async with fetcher:
                result = await fetch(fetcher, row.url)
        check_result(result, row, row.body)
        assert len(server.requests) == row.requests
        host = row.url.split("/")[2]
        if tls and host != PUBLIC and row.certificate != "tls-1.1":
            assert server.names[0] == host
        assert await server.has_closed(CLOSED_S)


def _read_hello(hello: bytes) -> tuple[set[int], set[int]]:
    """Read the cipher suites and the groups that a ClientHello offers."""

    def take(size: int) -> bytes:
        nonlocal hello
        part, hello = hello[:size], hello[size:]
        return part

    def numbers(data: bytes) -> set[int]:
        return {int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)}

    take(5 + 4 + 2 + 32)  # record, message, version, random
    take(take(1)[0])  # session
    suites = numbers(take(int.from_bytes(take(2), "big")))
    take(take(1)[0])  # compression
    take(2)
    while hello:
        kind, data = int.from_bytes(take(2), "big"), take(int.from_bytes(take(2), "big"))
        if kind == 10:
            return suites, numbers(data[2:])
    raise AssertionError("no groups")


def test_the_fetcher_offers_no_costly_handshake() -> None:
    hellos: list[bytes] = []

    async def record(peer: Peer) -> None:
        hellos.append(await peer.reader.read(4096))
        await peer.send(b"\x15\x03\x03\x00\x02\x02\x28")  # handshake_failure

    async def test() -> None:
        async with serving(record) as server:
            net = Net(lambda host: [PUBLIC], {443: server.port})
            with net.installed():
                async with Fetcher(limits(), AddressPolicy(), resolve=net.look_up) as fetcher:
                    result = await fetch(fetcher, URL.replace("http", "https"))
            assert result.code == "TLS_ERROR"

    asyncio.run(test())
    first, second = map(_read_hello, hellos)
    tls13, scsv = {0x1301, 0x1302, 0x1303}, {0x00FF}
    aead = {0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9}  # ECDHE with AES-GCM or ChaCha20
    assert first[0] - scsv == tls13 | aead and first[1] == {23}  # P-256
    assert second[0] - scsv == aead and not any(256 <= group < 512 for group in second[1])  # ffdhe
    for context in (_make_ssl_context(), _make_ssl_context(all_curves=True)):
        assert context.options & ssl.OP_NO_RENEGOTIATION


# HTTP


@pytest.mark.parametrize("row", rows_http.ROWS, ids=lambda row: row.id)
def test_http(row: rows_http.Row) -> None:
    asyncio.run(_test_http(row))


async def _test_http(row: rows_http.Row) -> None:
    async with serving(row.script) as server:
        net = Net(lambda host: [PUBLIC], {80: server.port})
        with net.installed():
            async with http_fetcher(limits(row), row.policy, net) as fetcher:
                result = await fetch(fetcher, f"http://photos.example/a.jpg{Q}")
                assert await server.has_closed(CLOSED_S), "left a connection open"
        check_result(result, row, row.body)
        if row.requests is not None:
            assert len(server.requests) == row.requests
        assert {address for address in net.dialled} == {f"{PUBLIC}:80"}
        if row.message:
            assert row.message in str(result.error)
        if row.sends:
            assert server.requests[-1].startswith(f"GET {row.sends} HTTP/1.1\r\n".encode())
        if row.retryable is not None:
            assert result.error.retryable is row.retryable


# More than one response


@contextlib.asynccontextmanager
async def fetching_from(script: Script, **limit: Any) -> Any:
    """Run a server with `script`; yield it and a fetcher for http://photos.example."""
    async with serving(script) as server:
        net = Net(lambda host: [PUBLIC], {80: server.port})
        with net.installed():
            async with http_fetcher(limits(**limit), AddressPolicy(), net) as fetcher:
                yield server, fetcher


URL = f"http://photos.example/a.jpg{Q}"


async def _head_only(peer: Peer) -> None:
    await peer.read_request()
    await peer.send(OK)
    await peer.wait_closed()


async def _flood(peer: Peer) -> None:
    await peer.read_request()
    await peer.send(CHUNKED)
    await peer.send_forever(b"1\r\nx\r\n", 0.005)


STALLS: dict[str, Script] = {
    "before-the-response": responds(then="hold"),
    "in-the-head": _head_only,
    "in-the-body": responds(full()[:-3], then="hold"),
    "in-a-dripped-body": _flood,
    "on-the-second-hop": rows_http.chain(rows_http.HOP[0], b""),
}


@pytest.mark.parametrize("stage", STALLS)
def test_cancelling_closes_the_connection(stage: str) -> None:
    async def held(peer: Peer) -> None:
        await STALLS[stage](peer)
        if peer.number:
            await peer.wait_closed()

    async def test() -> None:
        async with fetching_from(held) as (server, fetcher):
            task = asyncio.ensure_future(fetcher.fetch(URL))
            await asyncio.sleep(0.15)
            assert len(server.requests) == 1 + (stage == "on-the-second-hop")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await server.has_closed(CLOSED_S)

    asyncio.run(test())


@pytest.mark.parametrize("stage", ["lookup", "connection", "handshake"])
def test_cancelling_before_the_request_closes_the_connection(stage: str) -> None:
    async def test() -> None:
        async with serving(rows_tls.hang) as server:
            slow = (5.0, [PUBLIC]) if stage == "lookup" else [PUBLIC]
            faults = {PUBLIC: 5.0} if stage == "connection" else {}
            net = Net({"photos.example": slow}, {443: server.port}, faults)
            with net.installed():
                async with http_fetcher(limits(), AddressPolicy(), net) as fetcher:
                    task = asyncio.ensure_future(fetcher.fetch(URL.replace("http", "https")))
                    await asyncio.sleep(0.1)
                    start = time.perf_counter()
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    assert time.perf_counter() - start < CLOSED_S
                    assert await server.has_closed(CLOSED_S)
            assert len(server.peers) == (stage == "handshake")

    asyncio.run(test())


def test_a_second_response_does_not_reach_the_next_fetch() -> None:
    async def respond_twice(peer: Peer) -> None:
        request = await peer.read_request()
        path = request.split()[1].partition(b"?")[0]
        await peer.send(full(path, b"Connection: keep-alive"), full(b"poison"))
        await peer.wait_closed()

    async def test() -> None:
        async with fetching_from(respond_twice) as (server, fetcher):
            for path in ("/1", "/2", "/3"):
                result = await fetch(fetcher, URL.replace("/a.jpg", path))
                assert result.code == "BAD_RESPONSE" or result.body == path.encode()
                await asyncio.sleep(0.02)
            assert len(server.peers) == len(server.requests) == 3

    asyncio.run(test())


def test_bytes_between_two_fetches_reach_neither() -> None:
    async def respond_late(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(b"%d" % peer.number, b"Connection: keep-alive"))
        await asyncio.sleep(0.02)
        await peer.send(full(b"poison"))
        await peer.wait_closed()

    async def test() -> None:
        async with fetching_from(respond_late) as (server, fetcher):
            bodies = []
            for _ in range(3):
                bodies.append((await fetch(fetcher, URL)).body)
                await asyncio.sleep(0.05)
            assert bodies == [b"0", b"1", b"2"]

    asyncio.run(test())


def test_concurrent_fetches_get_their_own_responses() -> None:
    async def echo(peer: Peer) -> None:
        path = (await peer.read_request()).split()[1]
        await asyncio.sleep(0.05 * (peer.number % 3))
        await peer.send(full(path))

    async def test() -> None:
        async with fetching_from(echo) as (server, fetcher):
            paths = [f"/{i}.jpg" for i in range(60)]
            urls = [f"http://photos.example{path}" for path in paths]
            assert await asyncio.gather(*map(fetcher.fetch, urls)) == [p.encode() for p in paths]
            assert await server.has_closed(CLOSED_S)

    asyncio.run(test())


def test_a_large_first_read_is_no_long_line() -> None:
    response = Response(Mock())
    response.feed(full(bytes(60_000)))
    assert response.status == 200 and response.is_exact()


def test_a_body_is_read_no_faster_than_it_is_used() -> None:
    transport = Mock()

    async def test() -> None:
        response = Response(transport)
        response.feed(OK + b"Content-Length: 1000000\r\n\r\n" + bytes(60_000))
        assert not transport.pause_reading.called
        response.feed(bytes(16_384))
        response.feed(bytes(16_384))
        assert transport.pause_reading.call_count == 1 and not transport.resume_reading.called
        assert len(await response.read(1)) == 60_000 + 2 * 16_384
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(response.read(1), 0.01)
        assert transport.resume_reading.call_count == 1

    asyncio.run(test())


def test_cookies_are_not_sent_back() -> None:
    cookie = b"Set-Cookie: id=7; Path=/"
    hops = rows_http.chain(rows_http.location("/b", b"302 Found", cookie), full(PHOTO, cookie))

    async def test() -> None:
        async with fetching_from(hops) as (server, fetcher):
            for _ in range(2):
                assert (await fetch(fetcher, URL)).code == "ok"
            assert len(server.requests) == 3
            assert not any(b"ookie" in request for request in server.requests)

    asyncio.run(test())


def test_only_our_own_headers_follow_a_redirect() -> None:
    hops = rows_http.chain(rows_http.location("http://other.example/b"), full())

    async def test() -> None:
        async with fetching_from(hops) as (server, fetcher):
            assert (await fetch(fetcher, URL)).code == "ok"
        first, second = (head.decode().lower().split("\r\n") for head in server.requests)
        names = ["host", "user-agent", "accept-encoding", "accept", "connection"]
        for head in (first, second):
            assert sorted(line.split(":")[0] for line in head[1:-2]) == sorted(names)
        assert "host: other.example" in second and SECRET not in "".join(second)

    asyncio.run(test())


def test_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("default login me password mine\n", encoding="ascii")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy"):
        for each in (name, name.upper()):
            monkeypatch.setenv(each, f"http://me:mine@{PUBLIC}:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    async def test() -> None:
        async with serving(responds(full())) as server:
            net = Net(lambda host: ["151.101.1.140"], {80: server.port, 3128: server.port})
            with net.installed():
                async with http_fetcher(limits(), AddressPolicy(), net) as fetcher:
                    assert (await fetch(fetcher, URL)).code == "ok"
            assert net.dialled == ["151.101.1.140:80"]
            assert b"uthorization" not in server.requests[0]
            assert server.requests[0].startswith(b"GET /a.jpg")

    asyncio.run(test())


SYSTEM_LOOKUPS: dict[str, tuple[str, list[str] | None]] = {
    "hangs": ("DNS_FAILED", None),
    "an-internal-address": ("URL_NOT_ALLOWED", [PUBLIC, "10.0.0.1"]),
    "an-internal-address-first": ("URL_NOT_ALLOWED", ["169.254.169.254", PUBLIC]),
    "loopback": ("URL_NOT_ALLOWED", ["127.0.0.1"]),
    "no-such-name": ("DNS_FAILED", []),
    "an-address": ("ok", [PUBLIC]),
}


@pytest.mark.parametrize("name", SYSTEM_LOOKUPS)
def test_the_systems_lookup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, addresses = SYSTEM_LOOKUPS[name]

    async def test() -> float:
        async with serving(responds(full())) as server:
            net, names = Net({}, {80: server.port}), NameServer(lambda host: addresses)
            fetcher = Fetcher(limits(dns_timeout_s=0.15), AddressPolicy(), ssl_context=NO_TLS)
            async with names.running(monkeypatch), fetcher:
                with net.installed():
                    assert (await fetch(fetcher, URL)).code == code
            assert net.dialled == ([f"{PUBLIC}:80"] if code == "ok" else [])
            assert "photos.example" in names.asked
        return time.perf_counter()

    start = time.perf_counter()
    assert asyncio.run(test()) - start < 1, "waited for an abandoned lookup"


@pytest.mark.parametrize(("kept_s", "count"), [(0.0, 3), (60.0, 1)])
def test_an_answer_of_a_name_server_is_kept_for_seconds(
    kept_s: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name server allows an hour."""
    assert download._DNS_CACHE_S <= 10
    monkeypatch.setattr(download, "_DNS_CACHE_S", kept_s)

    async def test() -> None:
        names = NameServer(lambda host: [PUBLIC], ttl_s=3600)
        async with serving(responds(full())) as server, names.running(monkeypatch):
            net = Net({}, {80: server.port})
            fetcher = Fetcher(limits(dns_timeout_s=0.5), AddressPolicy(), ssl_context=NO_TLS)
            with net.installed():
                async with fetcher:
                    for _ in range(3):
                        assert (await fetch(fetcher, URL)).code == "ok"
                        await asyncio.sleep(0.02)
        assert len(names.asked) == count and len(net.dialled) == 3

    asyncio.run(test())


def _own_names() -> list[tuple[str, str]]:
    """List the names of /etc/hosts with their addresses."""
    text = Path("/etc/hosts").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    entries = [(name, address) for address, *names in filter(None, lines) for name in names]
    return [(name, address) for name, address in entries if re.fullmatch(r"[0-9.]+", address)]


def test_the_file_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry for entry in _own_names() if re.fullmatch(r"[a-z0-9.-]+", entry[0])]
    name, address = entries[-1]  # the last one is not localhost, where there is another

    async def test() -> None:
        names = NameServer(lambda host: None)
        allowed = AddressPolicy(allowed_networks=(IPv4Network(f"{address}/32"),))
        async with serving(responds(full())) as server, names.running(monkeypatch):
            net = Net({}, {80: server.port})
            with net.installed():
                for policy, code in ((allowed, "ok"), (AddressPolicy(), "URL_NOT_ALLOWED")):
                    async with Fetcher(limits(), policy, ssl_context=NO_TLS) as fetcher:
                        assert (await fetch(fetcher, f"http://{name}/a.jpg{Q}")).code == code
            assert names.asked == [] and net.dialled == [f"{address}:80"]

    asyncio.run(test())


def test_names_that_hang_delay_no_other_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str) -> list[str] | None:
        return None if host.startswith("n") else [PUBLIC]

    async def test() -> None:
        async with serving(responds(full())) as server:
            net, names = Net({}, {80: server.port}), NameServer(addresses)
            fetcher = Fetcher(limits(dns_timeout_s=1.0), AddressPolicy(), ssl_context=NO_TLS)
            async with names.running(monkeypatch), fetcher:
                with net.installed():
                    await fetcher.fetch(URL)
                    process = psutil.Process()
                    before = process.num_fds(), process.num_threads()
                    urls = [f"http://n{i}.example/{Q}" for i in range(300)]
                    jobs = [asyncio.ensure_future(fetcher.fetch(url)) for url in urls]
                    await asyncio.sleep(0.2)
                    start = time.perf_counter()
                    assert (await fetch(fetcher, URL)).code == "ok"
                    assert time.perf_counter() - start < LATE_S, "waited for another's lookups"
                    for job in jobs[:150]:
                        job.cancel()
                    ends = await asyncio.gather(*jobs, return_exceptions=True)
                    assert {type(end).__name__ for end in ends} == {"CancelledError", "DnsFailed"}
                    assert (await fetch(fetcher, URL)).code == "ok"
                    after = process.num_fds(), process.num_threads()
                    assert after[0] <= before[0] + 4 and after[1] <= before[1] + 2, (before, after)

    asyncio.run(test())


class Fickle(str):
    """An address that reads as a public one the first time."""

    reads = 0

    def __str__(self) -> str:
        self.reads += 1
        return PUBLIC if self.reads == 1 else str.__str__(self)


def test_the_address_is_checked_again_when_the_socket_is_made() -> None:
    async def test() -> None:
        net = Net(lambda host: [Fickle("10.0.0.1")], {})
        with net.installed():
            async with http_fetcher(limits(), AddressPolicy(), net) as fetcher:
                assert (await fetch(fetcher, URL)).code == "URL_NOT_ALLOWED"
        assert net.dialled == []

    asyncio.run(test())


def test_fetches_leave_no_descriptors_or_threads() -> None:
    def count() -> tuple[int, int]:
        return psutil.Process().num_fds(), threading.active_count()

    async def test() -> tuple[int, int]:
        rows = [row for row in rows_http.ROWS if row.id.startswith("http-redirect-to-")]
        async with fetching_from(full_or(rows)) as (server, fetcher):
            for _ in range(5):
                await fetcher.fetch(URL)
            await server.has_closed(CLOSED_S)
            before = count()
            for _ in range(200):
                await fetch_unmonitored(fetcher)
            assert await server.has_closed(CLOSED_S)
            after = count()
            assert after[0] <= before[0] and after[1] <= before[1], (before, after)
        return before

    asyncio.run(test())


def full_or(rows: list[rows_http.Row]) -> Script:
    """A script that responds correctly to every second connection, to the others like `rows`."""

    async def script(peer: Peer) -> None:
        if peer.number < 5 or peer.number % 2:
            await responds(full())(peer)
        else:
            await rows[peer.number // 2 % len(rows)].script(peer)

    return script


async def fetch_unmonitored(fetcher: Fetcher) -> None:
    """Fetch without measuring time and memory."""
    with contextlib.suppress(DownloadError):
        assert await fetcher.fetch(URL) == PHOTO


def test_row_ids_are_unique() -> None:
    ids = [row.id for module in (rows_url, rows_dns, rows_tls, rows_http) for row in module.ROWS]
    assert len(set(ids)) == len(ids) >= 110


def test_rows_expect_declared_codes() -> None:
    codes = {*error_table(), "ok"}
    for module in (rows_url, rows_dns, rows_tls, rows_http):
        assert all(codes.issuperset(row.code.split("|")) for row in module.ROWS)
