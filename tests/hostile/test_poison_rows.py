"""The catalogue's rows for kept connections, over http and over https.

Besides the row's codes, every test checks that no fetch gets another's bytes, and that the server
sees the expected connections and requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import rows_poison
import trustme
from rows_url import PUBLIC
from servers import CHUNKED, Net, Peer, Records, Script, Successive, full, location, serving

from heimdex_clip_worker import errors
from heimdex_clip_worker.errors import DownloadError
from heimdex_clip_worker.serving import connection, download, pool
from heimdex_clip_worker.serving.download import AddressPolicy, Fetcher, FetchLimits

pytestmark = [pytest.mark.model, pytest.mark.server]

AUTHORITY = trustme.CA()
NAMES = ("photos.example", "other.example")


def server_tls() -> ssl.SSLContext:
    """Make a server's context with a certificate for both names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(*NAMES).configure_cert(context)
    return context


def client_tls() -> ssl.SSLContext:
    """Make the fetcher's own context, which trusts the authority too."""
    context = download._make_ssl_context()
    AUTHORITY.configure_trust(context)
    return context


async def end_of(fetcher: Fetcher, url: str) -> str:
    """Fetch `url`; return `ok` if the body is its path, else the body or the code of the error."""
    try:
        body = await fetcher.fetch(url)
    except DownloadError as error:
        return error.code
    return "ok" if body.decode() == "/" + url.rsplit("/", 1)[1].partition("?")[0] else repr(body)


class Site:
    """A server for both names, a fetcher, and URLs of the server."""

    def __init__(self, script: Script, scheme: str, **limits: Any):
        self.script, self.scheme = script, scheme
        self.limits = FetchLimits(**{"timeout_s": 3.0, **limits})
        self.answers: Any = lambda host: [PUBLIC]

    def url(self, path: str, host: str = "photos.example") -> str:
        """Make a URL."""
        return f"{self.scheme}://{host}/{path}"

    async def run(self, work: Any) -> Any:
        """Await `work(fetcher)` with server and network in place."""
        tls = server_tls() if self.scheme == "https" else None
        async with serving(self.script, tls) as self.server:
            self.net = Net(self.answers, {80: self.server.port, 443: self.server.port})
            context = client_tls() if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            options = {"resolve": self.net.look_up, "ssl_context": context}
            with self.net.installed():
                async with Fetcher(self.limits, AddressPolicy(), **options) as fetcher:
                    return await work(fetcher)


def on_the_first(script: Script) -> Script:
    """Run `script` on the first connection; later ones respond correctly."""

    async def run(peer: Peer) -> None:
        is_special = peer.number == 0 or script is rows_poison.end_both
        await (script if is_special else rows_poison.respond)(peer)

    return run


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("row", rows_poison.ROWS, ids=lambda row: row.id)
def test_row(row: rows_poison.Row, scheme: str) -> None:
    site = Site(on_the_first(row.script), scheme)

    async def work(fetcher: Fetcher) -> list[str]:
        first = await end_of(fetcher, site.url("1"))
        await asyncio.sleep(rows_poison.PAUSE_S)
        return [first, await end_of(fetcher, site.url("2"))]

    first, second = asyncio.run(site.run(work))
    if row.id == "no-length" and scheme == "https":
        assert first == "BAD_RESPONSE"
    assert first in row.first.split("|") and second in row.second.split("|"), (first, second)
    assert len(site.server.peers) == row.connections
    assert len(site.server.requests) == row.requests


def test_there_are_rows_enough() -> None:
    assert sum(row.connections == 2 for row in rows_poison.ROWS) >= 50
    ids = [row.id for row in rows_poison.ROWS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_bytes_that_wait_in_the_socket_are_no_response(scheme: str) -> None:
    """They come when the fetcher's thread is busy, and the next request is there before it."""
    site, released = Site(rows_poison.respond, scheme), threading.Event()

    async def block(_: object) -> None:
        released.wait(5)

    async def work(fetcher: Fetcher) -> list[str]:
        first = await end_of(fetcher, site.url("1"))
        blocked = asyncio.ensure_future(fetcher._thread.call(block, timeout_s=5))
        await asyncio.sleep(0.02)
        await site.server.peers[0].send(rows_poison.POISON)
        second = asyncio.ensure_future(end_of(fetcher, site.url("2")))
        await asyncio.sleep(0.02)
        released.set()
        await blocked
        return [first, await second]

    assert asyncio.run(site.run(work)) == ["ok", "ok"]
    assert len(site.server.peers) == 2


@pytest.mark.parametrize("what", ["a-byte", "the-end"])
def test_what_only_the_socket_knows_of_is_seen(what: str) -> None:
    """It comes after the event loop has looked, and before the next request."""

    async def test() -> list[bool]:
        options = {"tls": None, "host": NAMES[0]}
        port = listener.getsockname()[1]
        wire = await connection.Connection.open("127.0.0.1", port, **options)
        with listener.accept()[0] as remote:
            was_silent = wire.is_silent()
            if what == "a-byte":
                remote.send(b"x")
            else:
                remote.shutdown(socket.SHUT_WR)
            select.select([wire._socket], [], [], 5)
            is_silent = wire.is_silent()
        wire.abort()
        return [was_silent, is_silent]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert asyncio.run(test()) == [True, False]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_hundred_fetches_share_a_connection_and_nothing_else(scheme: str) -> None:
    site = Site(rows_poison.respond, scheme)

    async def work(fetcher: Fetcher) -> list[str]:
        names = [f"a{n}z" for n in range(100)]
        return [await end_of(fetcher, site.url(f"{name}?token={name}")) for name in names]

    assert set(asyncio.run(site.run(work))) == {"ok"}
    assert len(site.server.peers) == 1 and len(site.net.lookups) == 1
    heads = [head.replace(b"a%dz" % n, b"N") for n, head in enumerate(site.server.requests)]
    assert len(set(heads)) == 1, "a request has something of another one"


def test_a_thousand_tiny_images_over_tls_are_no_flood() -> None:
    """The bytes that TLS adds are limited for each response: together they are many."""
    site = Site(rows_poison.respond, "https", max_connections=1)

    async def work(fetcher: Fetcher) -> set[str]:
        ends = set()
        for _ in range(10):
            ends |= set(await asyncio.gather(*(end_of(fetcher, site.url("1")) for _ in range(100))))
        return ends

    assert asyncio.run(site.run(work)) == {"ok"}
    assert len(site.server.peers) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_another_name_of_the_same_address_has_its_own_connection(scheme: str) -> None:
    site = Site(rows_poison.respond, scheme)

    async def work(fetcher: Fetcher) -> list[str]:
        urls = [site.url(str(n), NAMES[n % 2]) for n in range(6)]
        return [await end_of(fetcher, url) for url in urls]

    assert set(asyncio.run(site.run(work))) == {"ok"}
    assert len(site.server.peers) == 2
    hosts = [request.split(b"Host: ")[1].split(b"\r\n")[0] for request in site.server.requests]
    assert hosts == [b"photos.example", b"other.example"] * 3
    if scheme == "https":
        assert site.server.names == list(NAMES)


def test_another_scheme_and_port_have_their_own_connections() -> None:
    site = Site(rows_poison.respond, "http")

    async def work(fetcher: Fetcher) -> list[str]:
        urls = ["http://photos.example/1", "http://photos.example:443/2"] * 2
        return [await end_of(fetcher, url) for url in urls]

    assert set(asyncio.run(site.run(work))) == {"ok"}
    assert len(site.server.peers) == 2 and site.net.dialled == [f"{PUBLIC}:80", f"{PUBLIC}:443"]


def limited(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Give the fetcher a pool with other limits."""
    monkeypatch.setattr(download, "Pool", functools.partial(pool.Pool, **more))


@pytest.mark.parametrize(("limit", "fetches"), [("life_s", 12), ("idle_s", 2)])
def test_a_name_that_is_repointed_is_looked_up_again(
    limit: str, fetches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is used all the time, or not at all, until its time is over."""
    limited(monkeypatch, **{limit: 0.25})
    site = Site(rows_poison.respond, "https")
    answers = Successive([PUBLIC], ["10.0.0.1"]).restarted()
    site.answers = {"photos.example": answers}

    async def work(fetcher: Fetcher) -> list[str]:
        ends = []
        for _ in range(fetches):
            ends.append(await end_of(fetcher, site.url("1")))
            await asyncio.sleep(0.6 / fetches)
        ends.append(await end_of(fetcher, site.url("1")))
        return ends

    ends = asyncio.run(site.run(work))
    assert ends[0] == "ok" and ends[-1] == "URL_NOT_ALLOWED", ends
    assert len(site.server.peers) == 1


def test_a_connection_that_is_never_idle_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, life_s=0.1)
    site, until = Site(rows_poison.respond, "http", max_connections=1), time.monotonic() + 0.5

    async def work(fetcher: Fetcher) -> set[str]:
        async def caller() -> set[str]:
            ends = set()
            while time.monotonic() < until:
                ends.add(await end_of(fetcher, site.url("1")))
            return ends

        return set.union(*await asyncio.gather(*(caller() for _ in range(8))))

    assert asyncio.run(site.run(work)) == {"ok"}
    assert len(site.server.peers) >= 3


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, idle_s=0.1)
    site = Site(rows_poison.respond, "https")

    async def work(fetcher: Fetcher) -> None:
        assert await end_of(fetcher, site.url("1")) == "ok"
        assert not await site.server.has_closed(0.02)
        assert await site.server.has_closed(0.5)

    asyncio.run(site.run(work))


def test_idle_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, max_idle=2)
    site = Site(rows_poison.respond, "http")

    async def work(fetcher: Fetcher) -> int:
        for port in (80, 443):
            site.net.ports[port] = site.server.port
        hosts = [f"h{n}.example" for n in range(5)]
        ends = [await end_of(fetcher, site.url("1", host)) for host in hosts]
        assert set(ends) == {"ok"}
        await asyncio.sleep(0.1)
        return len(site.server._open)

    assert asyncio.run(site.run(work)) == 2


@pytest.mark.parametrize("count", [1, 4])
def test_no_more_than_the_limit_at_once_and_in_order(count: int) -> None:
    at_once, most, order = 0, 0, []

    async def slow(peer: Peer) -> None:
        nonlocal at_once, most
        while True:
            request = await peer.read_request()
            order.append(int(request.split()[1][1:]))
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1
            await peer.send(full(request.split()[1]))

    site = Site(slow, "http", max_connections=count)

    async def work(fetcher: Fetcher) -> list[str]:
        return await asyncio.gather(*(end_of(fetcher, site.url(str(n))) for n in range(40)))

    assert set(asyncio.run(site.run(work))) == {"ok"}
    assert most == len(site.server.peers) == count
    assert max(abs(place - n) for place, n in enumerate(order)) <= count, order


def test_cancelled_waiters_leave_no_gap() -> None:
    async def slow(peer: Peer) -> None:
        while True:
            request = await peer.read_request()
            await asyncio.sleep(0.02)
            await peer.send(full(request.split()[1]))

    site = Site(slow, "http", max_connections=2)

    async def work(fetcher: Fetcher) -> list[str]:
        jobs = [asyncio.ensure_future(end_of(fetcher, site.url(str(n)))) for n in range(40)]
        for n, job in enumerate(jobs):
            if n % 3:
                await asyncio.sleep(0.005)
                job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        return await asyncio.gather(*(end_of(fetcher, site.url(str(n))) for n in range(8)))

    assert set(asyncio.run(site.run(work))) == {"ok"}


@pytest.mark.parametrize("steps", range(6))
def test_a_fetch_that_is_cancelled_as_it_connects_ends(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline may fall between the end of a handshake and the next step of the fetch."""
    opened: list[Mock] = []
    was_running: list[bool] = []

    async def open_at(*_: Any, **__: Any) -> Mock:
        await asyncio.sleep(0.01)
        cancel(steps)
        opened.append(Mock())
        return opened[-1]

    def cancel(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(cancel, left - 1)
        else:
            was_running.append(work.cancel())

    async def test() -> pool.Pool:
        nonlocal work
        dialler = download._Dialler(Mock(), AddressPolicy(), [])
        connections = pool.Pool(dialler.dial)
        work = asyncio.ensure_future(connections._take(("http", PUBLIC, 80), is_new=True))
        await asyncio.wait([work])
        await asyncio.sleep(0.01)
        return connections

    work: Any = None
    monkeypatch.setattr(connection.Connection, "open", open_at)
    connections = asyncio.run(test())
    assert work.cancelled() == was_running[0]
    if work.cancelled():
        assert not connections._hosts and all(mock.abort.called for mock in opened)


BUSY = b"HTTP/1.1 503 X\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"


class Unreliable:
    """A server that responds in all ways, refuses connections, and calms down at the end."""

    def __init__(self, seed: int):
        self.rng, self.is_calm = random.Random(seed), False

    async def script(self, peer: Peer) -> None:
        """Respond to requests until a response ends the connection."""
        while True:
            path = (await peer.read_request()).split()[1]
            way = 9 if self.is_calm else self.rng.randrange(12)
            if way == 0:
                await peer.wait_closed()
            elif way == 1:
                return peer.reset()
            elif way == 2:
                await asyncio.sleep(self.rng.random() / 50)
            elif way == 3:
                return await peer.send(full(path)[: self.rng.randrange(40)])
            others = {4: BUSY, 5: full(path) + rows_poison.POISON, 6: location(path.decode())}
            others[7] = full(path, b"Connection: close")
            others[8] = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(path), path)
            await peer.send(others.get(way, full(path)))

    async def dial(self, connect: Any, host: tuple[str, str, int]) -> connection.Connection:
        """Connect, late or not at all."""
        if not self.is_calm and self.rng.random() < 0.1:
            raise errors.ConnectFailed from ConnectionRefusedError()
        await asyncio.sleep(self.rng.choice([0, 0, 0.005]))
        return await connect(host)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("seed", range(2))
def test_no_place_is_lost_whatever_happens(scheme: str, seed: int) -> None:
    """Hundreds of fetches, cancelled at random: then every count is 0, and a fetch works."""
    remote = Unreliable(seed)
    site, rng = Site(remote.script, scheme), remote.rng
    fetch = Fetcher(FetchLimits(timeout_s=0.3), AddressPolicy())._follow
    limits = {"per_host": rng.randint(1, 3), "max_idle": rng.choice([0, 1, 9])}
    lives = {"idle_s": rng.choice([0.01, 9]), "life_s": rng.choice([0.03, 9])}

    async def work(fetcher: Fetcher) -> None:
        resolver = download._CheckedResolver(site.net.look_up, AddressPolicy(), 5)
        contexts = [client_tls()] if scheme == "https" else []
        dialler = download._Dialler(resolver, AddressPolicy(), contexts)
        connections = pool.Pool(functools.partial(remote.dial, dialler.dial), **limits, **lives)

        async def one(n: int) -> None:
            with contextlib.suppress(DownloadError):
                body = await fetch(connections, site.url(str(n), rng.choice(NAMES)))
                assert body == b"/%d" % n

        jobs: list[asyncio.Task[None]] = []
        for n in range(300):
            jobs.append(asyncio.ensure_future(one(n)))
            await asyncio.sleep(rng.choice([0, 0, 0.001]))
            asyncio.get_running_loop().call_later(rng.random() / 4, jobs[-1].cancel)
        done, pending = await asyncio.wait(jobs, timeout=3)
        assert not pending
        assert not [job for job in done if not job.cancelled() and job.exception()]
        remote.is_calm = True
        for name in NAMES:
            good = fetch(connections, site.url("1", name))
            assert await asyncio.wait_for(good, 0.25) == b"/1"
        lines = list(connections._hosts.values())
        assert all(line.count == len(line.idle) for line in lines)
        assert all(waiter.done() for line in lines for waiter in line.waiters)
        await connections.close()
        assert not connections._idle and await site.server.has_closed(0.5)

    asyncio.run(site.run(work))


def site_that_notes_sessions() -> tuple[Site, list[bool]]:
    """Make a site that closes each connection, and a list of whether its session was resumed."""
    reused: list[bool] = []

    async def once(peer: Peer) -> None:
        await peer.read_request()
        reused.append(peer.writer.get_extra_info("ssl_object").session_reused)
        await peer.send(full(b"/1", b"Connection: close"))

    return Site(once, "https"), reused


def test_a_session_is_resumed_where_the_server_offers_it() -> None:
    site, reused = site_that_notes_sessions()

    async def work(fetcher: Fetcher) -> list[str]:
        ends = [await end_of(fetcher, site.url("1")) for _ in range(3)]
        return [*ends, await end_of(fetcher, site.url("1", "other.example"))]

    assert set(asyncio.run(site.run(work))) == {"ok"}
    assert reused == [False, True, True, False]  # never for another name


def test_a_resumed_session_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate was checked in the first handshake only."""
    monkeypatch.setattr(connection, "_SESSION_S", 0.6)
    site, reused = site_that_notes_sessions()

    async def work(fetcher: Fetcher) -> list[str]:
        ends = []
        for pause_s in (0.35, 0.35, 0.0):
            ends.append(await end_of(fetcher, site.url("1")))
            await asyncio.sleep(pause_s)
        return ends

    assert set(asyncio.run(site.run(work))) == {"ok"} and reused == [False, True, False]


def test_a_session_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SESSION_S", -1.0)
    site, reused = site_that_notes_sessions()

    async def work(fetcher: Fetcher) -> list[str]:
        return [await end_of(fetcher, site.url("1")) for _ in range(2)]

    assert asyncio.run(site.run(work)) == ["ok", "ok"] and reused == [False, False]


@pytest.mark.parametrize("what", ["half-a-record", "half-a-header", "tickets", "an-alert"])
def test_tls_records_after_a_response(what: str, tmp_path: Path) -> None:
    """Half a record may be the beginning of anything; complete ones without data are harmless."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        records = Records(peer, tmp_path / "keys")
        records.send(records.make(23, full(b"/1")))
        await asyncio.sleep(0.01)
        ticket = records.make(22, b"\4\0\0\x0b" + b"\0\0\0\1" + b"\0\0\0\0" + b"\0" + b"\0\1")
        parts = {"half-a-record": ticket[:-3], "half-a-header": ticket[:3], "tickets": b""}
        alert = b"\x17\3\3\0\x13" + bytes(19)  # cannot be decrypted
        records.send(parts.get(what, alert))
        await peer.wait_closed()

    async def first_only(peer: Peer) -> None:
        await (script if peer.number == 0 else rows_poison.respond)(peer)

    site = Site(first_only, "https")
    real = server_tls

    def logged() -> ssl.SSLContext:
        context = real()
        context.num_tickets, context.keylog_filename = 0, str(tmp_path / "keys")
        return context

    globals()["server_tls"] = logged
    try:

        async def work(fetcher: Fetcher) -> list[str]:
            first = await end_of(fetcher, site.url("1"))
            await asyncio.sleep(0.05)
            if what == "tickets":
                return [first]
            return [first, await end_of(fetcher, site.url("2"))]

        assert set(asyncio.run(site.run(work))) == {"ok"}
    finally:
        globals()["server_tls"] = real
    assert len(site.server.peers) == (1 if what == "tickets" else 2)


def test_a_record_that_began_in_the_last_read_fits_too() -> None:
    """What a read completes may be more than it has brought: all of it is decrypted."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_tls().wrap_bio(incoming, outgoing, server_side=True)
    layer = connection._Tls(client_tls(), NAMES[0])
    layer.receive(b"")
    for _ in range(2):
        incoming.write(layer.take_outgoing())
        with contextlib.suppress(ssl.SSLWantReadError):
            server.do_handshake()
        layer.receive(outgoing.read())
    sizes = [16_384] * 8 + [16_207]
    for size in sizes:
        server.write(bytes(size))
    wire = outgoing.read()
    assert len(layer.receive(wire[:16_405])) == 0 and len(wire) == 16_405 + connection._MORE_BYTES
    assert len(layer.receive(wire[16_405:])) == sum(sizes)
    assert not layer.is_ended and layer.is_silent()


def test_much_data_allows_no_read_of_tiny_records() -> None:
    """Each of them may cost OpenSSL 35 microseconds, and nothing else runs in that time."""
    records = connection._RecordCounter()
    records.expect_response()
    for _ in range(640):
        records.add(b"\x17\3\3\x40\x11" + bytes(16_401))
        records.deliver(16_384)
    records.add((b"\x17\3\3\0\x16" + bytes(22)) * 300)
    with pytest.raises(connection._Surplus):
        records.add((b"\x17\3\3\0\x16" + bytes(22)) * 2_000)


def test_a_request_that_cannot_be_encrypted_is_an_error_of_tls() -> None:
    async def test() -> bool:
        async with serving(rows_poison.respond, server_tls()) as server:
            options = {"tls": client_tls(), "host": NAMES[0]}
            wire = await connection.Connection.open("127.0.0.1", server.port, **options)
            with contextlib.suppress(ssl.SSLWantReadError):
                wire._tls._object.unwrap()
            with pytest.raises(errors.TlsError):
                await wire.send(b"GET /1 HTTP/1.1\r\n\r\n").read_head()
            return wire.finish()

    assert not asyncio.run(test())


async def read_slowly(
    script: Script, size: int, complete: asyncio.Event, wait_s: float = 0.05
) -> tuple[int, bool]:
    """Read `size` bytes over TLS; return how many came, and whether the connection may be kept."""
    async with serving(script, server_tls()) as server:
        options = {"tls": client_tls(), "host": NAMES[0]}
        wire = await connection.Connection.open("127.0.0.1", server.port, **options)
        response, length = wire.send(b"GET / HTTP/1.1\r\n\r\n"), 0
        await response.read_head()
        await asyncio.sleep(wait_s)
        with contextlib.suppress(DownloadError):
            while part := await response.read(1):
                length += len(part)
                if length == size:
                    complete.set()
                await asyncio.sleep(0.02)  # as if it was decompressed
        is_kept = wire.finish() and wire.is_silent()
        wire.abort()
        await asyncio.sleep(0.02)
        return length, is_kept


def test_a_response_that_nobody_has_decrypted_yet_is_seen() -> None:
    """Reading pauses at the end of a long body, so nobody has decrypted what follows."""
    size, complete = 220_000, asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(bytes(size)))
        await complete.wait()
        await peer.send(rows_poison.POISON)
        await peer.wait_closed()

    assert asyncio.run(read_slowly(script, size, complete)) == (size, False)


@pytest.mark.parametrize("size", [70_000, 150_000, 220_000, 280_000])
def test_an_end_while_reading_pauses_loses_nothing(size: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(bytes(size), b"Connection: close"))
        await asyncio.sleep(0.02)
        peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        await peer.wait_closed()

    assert asyncio.run(read_slowly(script, size, asyncio.Event())) == (size, False)


def test_a_surplus_that_arrives_while_reading_pauses_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = 200_000

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(full(bytes(size)) + rows_poison.POISON)
        await asyncio.sleep(0.05)
        peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        await peer.wait_closed()

    length, is_kept = asyncio.run(read_slowly(script, size, asyncio.Event(), wait_s=0.2))
    assert length <= size and not is_kept
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_response_on_a_kept_connection_is_not_kept(scheme: str) -> None:
    """Its parser refers to it, and it to its parser: only a collection would free its body."""
    site, alive = Site(rows_poison.respond, scheme), []

    async def work(fetcher: Fetcher) -> None:
        for _ in range(3):
            assert await end_of(fetcher, site.url("1")) == "ok"
        await asyncio.sleep(0.05)
        alive.extend(o for o in gc.get_objects() if isinstance(o, connection.Response))

    gc.collect()
    gc.disable()
    try:
        asyncio.run(site.run(work))
    finally:
        gc.enable()
    assert alive == []


def test_a_handshake_that_fails_leaves_no_connection_behind() -> None:
    """It has large buffers, and an exception that refers to it would keep it until a collection."""

    async def test() -> int:
        async with serving(rows_poison.respond, server_tls()) as server:
            options = {"tls": download._make_ssl_context(), "host": NAMES[0]}
            with pytest.raises(ssl.SSLCertVerificationError):
                await connection.Connection.open("127.0.0.1", server.port, **options)
            await asyncio.sleep(0.05)
            kinds = (connection.Connection, connection._Tls)
            return sum(isinstance(each, kinds) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(test()) == 0
    finally:
        gc.enable()


class Busy:
    """A host that refuses while `refuses` is true; it counts the requests at a time."""

    def __init__(self, takes_s: float):
        self.takes_s, self.refuses = takes_s, False
        self._at_once, self._most = 0, 0
        self.site = Site(self.serve, "http", max_connections=16)

    async def serve(self, peer: Peer) -> None:
        """Respond to each request of a connection."""
        while True:
            path = (await peer.read_request()).split()[1]
            self._at_once += 1
            self._most = max(self._most, self._at_once)
            await asyncio.sleep(self.takes_s)
            self._at_once -= 1
            busy = b"HTTP/1.1 429 X\r\nContent-Length: 0\r\n\r\n"
            await peer.send(busy if self.refuses else full(path))

    async def most(self, fetcher: Fetcher, count: int, *, refuses: bool) -> int:
        """Fetch `count` times at once; return the most requests at a time."""
        self._most, self.refuses = 0, refuses
        await asyncio.gather(*(end_of(fetcher, self.site.url(str(n))) for n in range(count)))
        return self._most


def test_a_host_that_refuses_gets_fewer_connections_until_it_responds() -> None:
    host = Busy(takes_s=0.02)

    async def work(fetcher: Fetcher) -> list[int]:
        return [await host.most(fetcher, 32, refuses=turn < 5) for turn in range(7)]

    counts = asyncio.run(host.site.run(work))
    assert counts[0] > 8 and counts[4] == 1 and counts[-1] > 8, counts


def test_a_host_that_refuses_gets_fewer_idle_connections_too() -> None:
    host = Busy(takes_s=0.05)

    async def work(fetcher: Fetcher) -> list[int]:
        return [await host.most(fetcher, n, refuses=n == 1) for n in (16, 1, 16)]

    assert asyncio.run(host.site.run(work))[2] <= 12


def test_what_is_given_back_to_a_closed_pool_is_closed() -> None:
    """The loop of the fetcher ends: nothing would close an idle connection."""

    async def test() -> bool:
        async with serving(rows_poison.respond) as server:

            async def dial(_: object) -> connection.Connection:
                options = {"tls": None, "host": NAMES[0]}
                return await connection.Connection.open("127.0.0.1", server.port, **options)

            connections = pool.Pool(dial)
            request = b"GET /1 HTTP/1.1\r\n\r\n"

            async def read(response: connection.Response) -> None:
                assert await response.read(99) == b"/1"
                await connections.close()

            await connections.exchange(("http", NAMES[0], 80), request, read)
            return await server.has_closed(0.2)

    assert asyncio.run(test())


def test_a_host_that_refuses_holds_up_no_other() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.read_request()
        if b"photos.example" in request:
            await asyncio.sleep(0.3)
            await peer.send(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")
        else:
            await peer.send(full(request.split()[1]))

    site = Site(script, "http", max_connections=4, timeout_s=1.0)

    async def work(fetcher: Fetcher) -> float:
        jobs = [asyncio.ensure_future(end_of(fetcher, site.url(str(n)))) for n in range(40)]
        await asyncio.sleep(0.5)
        start = time.perf_counter()
        assert await end_of(fetcher, site.url("1", "other.example")) == "ok"
        took = time.perf_counter() - start
        assert set(await asyncio.gather(*jobs)) <= {"SOURCE_HTTP", "FETCH_TIMEOUT"}
        return took

    assert asyncio.run(site.run(work)) < 0.25


def busy_once(retry_after: bytes) -> Script:
    """Respond 503 with a Retry-After to the first two requests of each path, then correctly."""
    seen: dict[bytes, int] = {}

    async def script(peer: Peer) -> None:
        while True:
            path = (await peer.read_request()).split()[1]
            seen[path] = seen.get(path, 0) + 1
            if seen[path] > int(path[1:]):
                await peer.send(full(path))
            else:
                lines = b"Retry-After: %b\r\nContent-Length: 0\r\n\r\n" % retry_after
                await peer.send(b"HTTP/1.1 503 Busy\r\n" + lines)

    return script


@pytest.mark.parametrize(
    ("value", "path", "code", "requests"),
    [
        (b"0", "1", "ok", 2),
        (b"0", "2", "SOURCE_HTTP", 2),  # once
        (b"Fri, 31 Dec 1999 23:59:59 GMT", "1", "ok", 2),
        (b"9", "1", "SOURCE_HTTP", 1),  # after the deadline
        (b"soon", "1", "SOURCE_HTTP", 1),
        (b"1, 1", "1", "SOURCE_HTTP", 1),
    ],
)
def test_retry_after_is_honoured_once(value: bytes, path: str, code: str, requests: int) -> None:
    site = Site(busy_once(value), "http")

    async def work(fetcher: Fetcher) -> str:
        start = time.perf_counter()
        end = await end_of(fetcher, site.url(path))
        assert time.perf_counter() - start < 1
        return end

    assert asyncio.run(site.run(work)) == code
    assert len(site.server.requests) == requests


def test_retry_after_waits_as_long_as_it_says() -> None:
    site = Site(busy_once(b"1"), "http")

    async def work(fetcher: Fetcher) -> float:
        start = time.perf_counter()
        assert await end_of(fetcher, site.url("1")) == "ok"
        return time.perf_counter() - start

    assert 1.0 <= asyncio.run(site.run(work)) < 2.0


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Fail a test that leaves a transport or an exception behind."""
    yield
    assert not [str(w.message) for w in recwarn if issubclass(w.category, ResourceWarning)]
