"""The catalogue's rows for URLs, look-ups, TLS and HTTP, each fetched for real.

One row, one test with its id. Besides the code every test checks what holds for all of them: the
deadline (+ 0.25 s, and what a loaded machine adds), under 50 MiB of memory, the connections that
were made and no others, every one closed within 0.5 s, and errors that tell no secret.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from servers import CHUNKED, OK, PHOTO, EachTime, Net, Peer, Script, full, says, serving

from heimdex_clip_worker.download import Fetcher, Limits, Policy, check_url
from heimdex_clip_worker.errors import DownloadError, error_table

LATE_S, LOADED_S, CLOSED_S, MEMORY = 0.25, 0.25, 0.5, 50 * 2**20
TELLTALE = re.compile(rf"{SECRET}|token=|Traceback|File \"|\?|https?://")


class Watch(threading.Thread):
    """Samples memory, and how late a sleeping thread wakes: how loaded the machine is."""

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
        """Return by how many bytes memory grew at most."""
        return self.memory - self._start

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@dataclass
class Outcome:
    """What came of a fetch."""

    code: str
    body: bytes | None
    error: DownloadError | None


def judge(error: DownloadError) -> None:
    """Check what holds for every failure."""
    assert error.code in error_table()
    assert isinstance(error, error_table()[error.code])
    for text in (str(error), error.detail, repr(error)):
        assert not TELLTALE.search(text) and len(text) < 300, text
    assert str(error).startswith("Image download failed: ")


async def fetched(fetcher: Fetcher, url: Any) -> Outcome:
    """Fetch `url` within its budget of time and memory; judge the error."""
    with Watch() as watch:
        start = time.perf_counter()
        try:
            body = await fetcher.fetch(url)
            outcome = Outcome("ok", body, None)
        except DownloadError as error:
            outcome = Outcome(error.code, None, error)
        took = time.perf_counter() - start
    if outcome.error:
        judge(outcome.error)
    most = fetcher.limits.timeout_s + LATE_S + min(LOADED_S, watch.late_s)
    assert took < most, f"{took:.3f} s > {most:.3f} s"
    assert watch.added() < MEMORY, f"{watch.added() / 2**20:.0f} MiB"
    return outcome


def limits(row: Any = None, **more: Any) -> Limits:
    """Return a row's limits: those of production with a short deadline, and what it changes."""
    return Limits(**{"timeout_s": 5.0, **getattr(row, "limits", {}), **more})


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and is quickly made


def plain(limits: Limits, policy: Policy, net: Net) -> Fetcher:
    """Return a fetcher that needs no authorities."""
    return Fetcher(limits, policy, resolve=net.look_up, ssl_context=NO_TLS)


def expect(outcome: Outcome, row: Any, body: bytes = PHOTO) -> None:
    """Check the code, and the body of what was fetched."""
    detail = outcome.error and f"{outcome.error} ({outcome.error.detail})"
    assert outcome.code in row.code.split("|"), detail
    if outcome.code == "ok":
        assert outcome.body == body


# Certificates


def _signed(name: str, dns: list[x509.GeneralName]) -> tuple[bytes, bytes]:
    """Return a certificate that signed itself, and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(subject, subject, key.public_key())
    made = made.serial_number(7).not_valid_before(now - day).not_valid_after(now + day)
    made = made.add_extension(x509.SubjectAlternativeName(dns), critical=False)
    return (
        made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        ),
    )


class Certificates:
    """An authority, and contexts for servers with all sorts of certificates."""

    def __init__(self, folder: Path):
        self.folder, self.ca, self.stranger = folder, trustme.CA(), trustme.CA()
        self.path = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.path)

    def trusted(self) -> ssl.SSLContext:
        """Return a client context that trusts the authority."""
        return ssl.create_default_context(cafile=str(self.path))

    def server(self, kind: str) -> ssl.SSLContext:
        """Return a server context with a certificate of `kind`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if kind == "self-signed":
            pair = [self.folder / "self.pem", self.folder / "self.key"]
            both = _signed("photos.example", [x509.DNSName("photos.example")])
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
            ca = self.stranger
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
        ca.issue_cert(*names, **options).configure_cert(context)
        if kind == "tls-1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        elif kind == "tls-1.1":
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One authority for all tests."""
    return Certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def no_other_look_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that asks the system for a name: the resolver is injected."""

    def ask(host: Any, *args: Any, **more: Any) -> Any:
        if isinstance(host, str) and re.fullmatch(r"[0-9.]+", host):
            return real(host, *args, **more)
        raise AssertionError(f"asked the system for {host!r}")

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", ask)


# URLs


@pytest.mark.parametrize("row", rows_url.ROWS, ids=lambda row: row.id)
def test_url(row: rows_url.Row, certificates: Certificates) -> None:
    asyncio.run(_test_url(row, certificates))


async def _test_url(row: rows_url.Row, certificates: Certificates) -> None:
    def look_up(host: str) -> list[str]:
        return ["127.0.0.1"] if host == "localhost" else [PUBLIC]

    async with serving(says(full())) as web, _secure(certificates, row) as tls:
        secure = str(row.url).lower().startswith("https")
        net = Net(look_up, {80: web.port, 8080: web.port, 443: tls.port if secure else web.port})
        context = certificates.trusted()
        with net.installed():
            async with Fetcher(
                limits(), row.policy, resolve=net.look_up, ssl_context=context
            ) as fetcher:
                outcome = await fetched(fetcher, row.url)
        expect(outcome, row)
        assert net.dialled == ([row.dials] if row.dials else [])
        if row.code != "ok" and not row.looks_up:
            assert not net.looked_up
            with pytest.raises(DownloadError):  # and not only where the socket is made
                check_url(row.url, row.policy)
        if row.sends:
            lines = (web.heard + tls.heard)[0].decode().split("\r\n")
            assert lines[0] == f"GET {row.sends} HTTP/1.1"
            assert [line for line in lines if line.startswith("Host:")] == [f"Host: {row.host}"]
        assert len(web.heard + tls.heard) == bool(row.dials)


@contextlib.asynccontextmanager
async def _secure(certificates: Certificates, row: rows_url.Row) -> Any:
    """Run a TLS server with the right certificate, where the row needs one."""
    needed = row.dials and str(row.url).lower().startswith("https")
    async with serving(says(full()), certificates.server("right") if needed else None) as server:
        yield server


# Look-ups


@pytest.mark.parametrize("row", rows_dns.ROWS, ids=lambda row: row.id)
def test_dns(row: rows_dns.Row) -> None:
    asyncio.run(_test_dns(row))


async def _test_dns(row: rows_dns.Row) -> None:
    async def script(peer: Peer) -> None:
        await peer.ask()
        await peer.say(row.says[min(peer.number, len(row.says) - 1)])

    answers = {
        name: answer.started() if isinstance(answer, EachTime) else answer
        for name, answer in row.answers.items()
    }
    async with serving(script) as server:
        net = Net(answers, {80: server.port, 8080: server.port}, row.troubles)
        with net.installed():
            async with plain(limits(row), row.policy, net) as fetcher:
                outcome = await fetched(fetcher, row.url)
        expect(outcome, row)
        assert len(net.dialled) <= row.most if row.most else tuple(net.dialled) == row.dials
        if row.look_ups is not None:
            assert len(net.looked_up) == row.look_ups
        assert await server.quiet(CLOSED_S)


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
        net = Net(lambda host: [PUBLIC], {443: server.port})
        context = certificates.trusted() if row.context == "injected" else None
        ours = Fetcher(limits(row), Policy(), resolve=net.look_up, ssl_context=context)
        with net.installed():
            async with ours as fetcher:
                outcome = await fetched(fetcher, row.url)
        expect(outcome, row)
        assert len(server.heard) == row.hears
        host = row.url.split("/")[2]
        if tls and host != PUBLIC and row.certificate != "tls-1.1":
            assert server.names[0] == host
        assert await server.quiet(CLOSED_S)


# HTTP


@pytest.mark.parametrize("row", rows_http.ROWS, ids=lambda row: row.id)
def test_http(row: rows_http.Row) -> None:
    asyncio.run(_test_http(row))


async def _test_http(row: rows_http.Row) -> None:
    async with serving(row.script) as server:
        net = Net(lambda host: [PUBLIC], {80: server.port})
        with net.installed():
            async with plain(limits(row), row.policy, net) as fetcher:
                outcome = await fetched(fetcher, f"http://photos.example/a.jpg{Q}")
                assert await server.quiet(CLOSED_S), "left a connection open"
        expect(outcome, row, row.body)
        if row.asks is not None:
            assert len(server.heard) == row.asks
        assert {address for address in net.dialled} == {f"{PUBLIC}:80"}
        if row.says:
            assert row.says in str(outcome.error)
        if row.retryable is not None:
            assert outcome.error.retryable is row.retryable


# What spans more than one answer


@contextlib.asynccontextmanager
async def reaching(script: Script, **limit: Any) -> Any:
    """Run a server with `script`; yields it, and a fetcher for http://photos.example."""
    async with serving(script) as server:
        net = Net(lambda host: [PUBLIC], {80: server.port})
        with net.installed():
            async with plain(limits(**limit), Policy(), net) as fetcher:
                yield server, fetcher


URL = f"http://photos.example/a.jpg{Q}"


async def _head_only(peer: Peer) -> None:
    await peer.ask()
    await peer.say(OK)
    await peer.gone()


async def _flood(peer: Peer) -> None:
    await peer.ask()
    await peer.say(CHUNKED)
    await peer.forever(b"1\r\nx\r\n", 0.005)


STALLS: dict[str, Script] = {
    "before-the-answer": says(then="hold"),
    "in-the-head": _head_only,
    "in-the-body": says(full()[:-3], then="hold"),
    "in-a-dripped-body": _flood,
    "on-the-second-hop": rows_http.chain(rows_http.HOP[0], b""),
}


@pytest.mark.parametrize("stage", STALLS)
def test_cancelling_closes_the_connection(stage: str) -> None:
    async def held(peer: Peer) -> None:
        await STALLS[stage](peer)
        if peer.number:
            await peer.gone()

    async def test() -> None:
        async with reaching(held) as (server, fetcher):
            task = asyncio.ensure_future(fetcher.fetch(URL))
            await asyncio.sleep(0.15)
            assert len(server.heard) == 1 + (stage == "on-the-second-hop")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await server.quiet(CLOSED_S)

    asyncio.run(test())


@pytest.mark.parametrize("stage", ["look-up", "connection", "handshake"])
def test_cancelling_before_the_request(stage: str) -> None:
    async def test() -> None:
        async with serving(rows_tls.hang) as server:
            slow = (5.0, [PUBLIC]) if stage == "look-up" else [PUBLIC]
            troubles = {PUBLIC: 5.0} if stage == "connection" else {}
            net = Net({"photos.example": slow}, {443: server.port}, troubles)
            with net.installed():
                async with plain(limits(), Policy(), net) as fetcher:
                    task = asyncio.ensure_future(fetcher.fetch(URL.replace("http", "https")))
                    await asyncio.sleep(0.1)
                    start = time.perf_counter()
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    assert time.perf_counter() - start < CLOSED_S
                    assert await server.quiet(CLOSED_S)
            assert len(server.peers) == (stage == "handshake")

    asyncio.run(test())


def test_a_second_answer_does_not_reach_the_next_fetch() -> None:
    async def twice(peer: Peer) -> None:
        request = await peer.ask()
        mine = request.split()[1].partition(b"?")[0]
        await peer.say(full(mine, b"Connection: keep-alive"), full(b"poison"))
        await peer.gone()

    async def test() -> None:
        async with reaching(twice) as (server, fetcher):
            for path in ("/1", "/2", "/3"):
                got = await fetched(fetcher, URL.replace("/a.jpg", path))
                assert got.code == "BAD_RESPONSE" or got.body == path.encode()
                await asyncio.sleep(0.02)
            assert len(server.peers) == len(server.heard) == 3

    asyncio.run(test())


def test_junk_between_two_fetches_stays_there() -> None:
    async def late(peer: Peer) -> None:
        await peer.ask()
        await peer.say(full(b"%d" % peer.number, b"Connection: keep-alive"))
        await asyncio.sleep(0.02)
        await peer.say(full(b"poison"))
        await peer.gone()

    async def test() -> None:
        async with reaching(late) as (server, fetcher):
            bodies = []
            for _ in range(3):
                bodies.append((await fetched(fetcher, URL)).body)
                await asyncio.sleep(0.05)
            assert bodies == [b"0", b"1", b"2"]

    asyncio.run(test())


def test_fetches_beside_one_another_keep_their_answers() -> None:
    async def echo(peer: Peer) -> None:
        path = (await peer.ask()).split()[1]
        await asyncio.sleep(0.05 * (peer.number % 3))
        await peer.say(full(path))

    async def test() -> None:
        async with reaching(echo) as (server, fetcher):
            paths = [f"/{i}.jpg" for i in range(60)]
            urls = [f"http://photos.example{path}" for path in paths]
            assert await asyncio.gather(*map(fetcher.fetch, urls)) == [p.encode() for p in paths]
            assert await server.quiet(CLOSED_S)

    asyncio.run(test())


def test_cookies_are_not_sent_back() -> None:
    cookie = b"Set-Cookie: id=7; Path=/"
    hops = rows_http.chain(rows_http.location("/b", b"302 Found", cookie), full(PHOTO, cookie))

    async def test() -> None:
        async with reaching(hops) as (server, fetcher):
            for _ in range(2):
                assert (await fetched(fetcher, URL)).code == "ok"
            assert len(server.heard) == 3 and not any(b"ookie" in head for head in server.heard)

    asyncio.run(test())


def test_no_header_follows_a_redirect_but_our_own() -> None:
    hops = rows_http.chain(rows_http.location("http://other.example/b"), full())

    async def test() -> None:
        async with reaching(hops) as (server, fetcher):
            assert (await fetched(fetcher, URL)).code == "ok"
        first, second = (head.decode().lower().split("\r\n") for head in server.heard)
        names = ["host", "user-agent", "accept-encoding", "accept", "connection"]
        for head in (first, second):
            assert sorted(line.split(":")[0] for line in head[1:-2]) == sorted(names)
        assert "host: other.example" in second and SECRET not in "".join(second)

    asyncio.run(test())


def test_the_environment_is_not_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
        async with serving(says(full())) as server:
            net = Net(lambda host: ["151.101.1.140"], {80: server.port, 3128: server.port})
            with net.installed():
                async with plain(limits(), Policy(), net) as fetcher:
                    assert (await fetched(fetcher, URL)).code == "ok"
            assert net.dialled == ["151.101.1.140:80"]
            assert b"uthorization" not in server.heard[0]
            assert server.heard[0].startswith(b"GET /a.jpg")

    asyncio.run(test())


SYSTEM: dict[str, tuple[str, Callable[..., Any]]] = {
    "hangs": ("DNS_FAILED", lambda *_, **__: time.sleep(0.7)),
    "answers-inwards": ("URL_NOT_ALLOWED", lambda *_, **__: [_info(PUBLIC), _info("10.0.0.1")]),
    "answers-ipv6": ("URL_NOT_ALLOWED", lambda *_, **__: [_info("::ffff:127.0.0.1")]),
    "answers-nothing": ("DNS_FAILED", lambda *_, **__: []),
    "knows-no-such-name": ("DNS_FAILED", lambda *_, **__: _raise(socket.gaierror(-2, "name"))),
    "cannot-encode-the-name": ("DNS_FAILED", lambda *_, **__: _raise(UnicodeError("label"))),
}


def _info(address: str) -> tuple[Any, ...]:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", SYSTEM)
def test_the_systems_resolver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, answer = SYSTEM[name]
    monkeypatch.setattr(socket, "getaddrinfo", answer)

    async def test() -> float:
        net = Net({}, {})
        with net.installed():
            ours = Fetcher(limits(dns_timeout_s=0.15), Policy(), ssl_context=NO_TLS)
            async with ours as fetcher:
                assert (await fetched(fetcher, URL)).code == code
        assert net.dialled == []
        return time.perf_counter()

    start = time.perf_counter()
    assert asyncio.run(test()) - start < 0.6, "waited for a look-up that nobody wants any more"


def test_many_hung_look_ups_leave_the_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.6))

    async def test() -> None:
        ours = Fetcher(limits(dns_timeout_s=0.2), Policy(), ssl_context=NO_TLS)
        async with ours as fetcher:
            urls = [f"http://n{i}.example/{Q}" for i in range(50)]
            jobs = [asyncio.ensure_future(fetched(fetcher, url)) for url in urls]
            await asyncio.sleep(0.05)
            start = time.perf_counter()
            await asyncio.to_thread(int)
            assert time.perf_counter() - start < LATE_S, "other work waited for look-ups"
            assert {outcome.code for outcome in await asyncio.gather(*jobs)} == {"DNS_FAILED"}

    asyncio.run(test())


class Fickle(str):
    """An address that reads as a public one when it is first looked at."""

    looks = 0

    def __str__(self) -> str:
        self.looks += 1
        return PUBLIC if self.looks == 1 else str.__str__(self)


def test_the_address_is_checked_again_where_the_socket_is_made() -> None:
    async def test() -> None:
        net = Net(lambda host: [Fickle("10.0.0.1")], {})
        with net.installed():
            async with plain(limits(), Policy(), net) as fetcher:
                assert (await fetched(fetcher, URL)).code == "URL_NOT_ALLOWED"
        assert net.dialled == []

    asyncio.run(test())


def test_nothing_is_left_behind() -> None:
    def count() -> tuple[int, int]:
        return psutil.Process().num_fds(), threading.active_count()

    async def test() -> tuple[int, int]:
        picked = [row for row in rows_http.ROWS if row.id.startswith("http-redirect-to-")]
        async with reaching(full_or(picked)) as (server, fetcher):
            for _ in range(5):
                await fetcher.fetch(URL)
            await server.quiet(CLOSED_S)
            before = count()
            for _ in range(200):
                await fetched_quickly(fetcher)
            assert await server.quiet(CLOSED_S)
            after = count()
            assert after[0] <= before[0] and after[1] <= before[1], (before, after)
        return before

    asyncio.run(test())


def full_or(picked: list[rows_http.Row]) -> Script:
    """A script that answers every second connection rightly, the others like one of `picked`."""

    async def script(peer: Peer) -> None:
        if peer.number < 5 or peer.number % 2:
            await says(full())(peer)
        else:
            await picked[peer.number // 2 % len(picked)].script(peer)

    return script


async def fetched_quickly(fetcher: Fetcher) -> None:
    """Fetch without a watch."""
    with contextlib.suppress(DownloadError):
        assert await fetcher.fetch(URL) == PHOTO


def test_rows_have_ids_of_their_own() -> None:
    ids = [row.id for module in (rows_url, rows_dns, rows_tls, rows_http) for row in module.ROWS]
    assert len(set(ids)) == len(ids) >= 110


def test_rows_expect_declared_codes() -> None:
    codes = {*error_table(), "ok"}
    for module in (rows_url, rows_dns, rows_tls, rows_http):
        assert all(codes.issuperset(row.code.split("|")) for row in module.ROWS)
