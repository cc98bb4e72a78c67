"""The fetcher against two other address checks, certificates, silence, floods and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import random
import re
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from ipaddress import IPv4Address, ip_network
from unittest.mock import Mock

import psutil
import pytest
import trustme
from AntiSSRF import AntiSSRFPolicy, PolicyConfigOptions
from raw_server import repeat, send, serve

from heimdex_clip_worker.errors import BadResponse, DownloadError, UrlNotAllowed
from heimdex_clip_worker.serving import download
from heimdex_clip_worker.serving.connection import Response
from heimdex_clip_worker.serving.download import (
    AddressPolicy,
    Fetcher,
    FetchLimits,
    Target,
    check_address,
    check_url,
)

pytestmark = [pytest.mark.model, pytest.mark.server]

LOCAL = AddressPolicy(allowed_networks=(ip_network("127.0.0.0/8"),))
PHOTO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nphoto"
SECRET = "token=in-no-message"


async def to_loopback(host: str) -> list[str]:
    """Resolve every name to this machine."""
    return ["127.0.0.1"]


def run(
    *urls: str, policy: AddressPolicy = LOCAL, resolve=to_loopback, ssl_context=None, **limits
) -> list[tuple[bytes | DownloadError, float]]:
    """Fetch `urls` side by side; return the bytes or the error of each, and its seconds."""

    async def fetch(fetcher: Fetcher, url: str):
        start = time.perf_counter()
        try:
            return await fetcher.fetch(url), time.perf_counter() - start
        except DownloadError as error:
            for text in (str(error), error.detail):
                assert SECRET not in text and "http://" not in text
            return error, time.perf_counter() - start

    async def fetch_all():
        options = {"resolve": resolve, "ssl_context": ssl_context}
        async with Fetcher(FetchLimits(**limits), policy, **options) as fetcher:
            return await asyncio.gather(*(fetch(fetcher, url) for url in urls))

    return asyncio.run(fetch_all())


def code(url: str, **options) -> str:
    """Fetch `url`; return the code of the error, or `ok`."""
    result = run(url, **options)[0][0]
    return "ok" if isinstance(result, bytes) else result.code


# Addresses


def is_allowed(address: str) -> bool:
    """True if `check_address` accepts `address` under the default policy."""
    try:
        check_address(address, AddressPolicy())
    except UrlNotAllowed:
        return False
    return True


def addresses() -> list[str]:
    """List the first, middle and last address of each range, their neighbours, and random ones."""
    rng, edges = random.Random(0), []
    for network in download._NOT_PUBLIC:
        first, last = int(network[0]), int(network[-1])
        edges += [first - 1, first, (first + last) // 2, last, last + 1]
    return [
        str(IPv4Address(n)) for n in edges + [rng.getrandbits(32) for _ in range(5_000)]
        if 0 <= n < 2**32
    ]  # fmt: skip


def test_every_address_that_microsoft_antissrf_refuses_is_refused():
    oracle = AntiSSRFPolicy(PolicyConfigOptions.EXTERNAL_ONLY_LATEST)
    for address in addresses():
        expected = oracle._is_str_ip_address_connection_allowed(address)
        assert expected or not is_allowed(address), address


def test_every_address_that_the_runpod_sdk_refuses_is_refused():
    oracle = pytest.importorskip("runpod.serverless.utils.rp_ssrf")
    for address in addresses():
        assert oracle.is_safe_address(address) or not is_allowed(address), address


def test_every_denied_range_has_the_right_ends():
    for network in download._NOT_PUBLIC:
        assert not any(map(is_allowed, (str(network[0]), str(network[-1]))))
    assert all(map(is_allowed, ("100.63.255.255", "100.128.0.0", "168.63.129.17")))


@pytest.mark.parametrize(
    "address", ["::ffff:1.1.1.1", "1.1.1", "", "0x1.1.1.1", "1.1.1.1%eth0", None, 1]
)
def test_only_dotted_quads_are_addresses(address):
    assert not is_allowed(address)


# The connection


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_the_address_is_checked_again_when_the_socket_is_made(addresses, monkeypatch):
    """Neither `check_url` nor the resolver checks these addresses."""

    async def resolve(self, host: str, port: int) -> list[str]:
        return addresses

    monkeypatch.setattr(download._CheckedResolver, "resolve", resolve)
    for host in ("127.0.0.1", "a.example"):
        target = Target("http", host, 80, f"http://{host}/")

        async def ask(target=target):
            async with Fetcher(FetchLimits(), AddressPolicy()) as fetcher:
                request = partial(download._request, until=0.0)
                return await fetcher._thread.call(request, target, 99, timeout_s=5)

        with pytest.raises(UrlNotAllowed):
            asyncio.run(ask())


def test_other_ports_are_open_in_allowed_networks_only():
    async def public(host: str) -> list[str]:
        return ["1.1.1.1"]

    with serve(send(PHOTO)) as (port, _):
        url = f"http://a.example:{port}/"
        assert code(url) == "ok"
        assert code(url, resolve=public) == code(url, policy=AddressPolicy()) == "URL_NOT_ALLOWED"


def test_a_closed_port_is_a_failed_connection():
    with serve(send()) as (port, _):
        pass
    assert code(f"http://127.0.0.1:{port}/?{SECRET}") == "CONNECT_FAILED"


def test_the_second_address_is_tried_when_the_first_refuses():
    async def both(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    with serve(send(PHOTO)) as (port, _):
        assert code(f"http://a.example:{port}/", resolve=both) == "ok"


def test_the_second_address_is_tried_when_the_first_is_silent(monkeypatch):
    async def both(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    monkeypatch.setattr(download, "_CONNECT_TIMEOUT_S", 0.2)
    with (
        serve(send(PHOTO), tls=server_context(AUTHORITY, "a.example")) as (port, _),
        serve(send(), silent=True, address=("127.0.0.9", port)),
    ):
        url = f"https://a.example:{port}/"
        assert code(url, resolve=both, ssl_context=trusting(AUTHORITY)) == "ok"


def test_every_fetch_resolves_the_name_again():
    """A name that was public a moment ago may be internal now."""
    addresses = ["127.0.0.1"]

    async def rebind(host: str) -> list[str]:
        return [addresses.pop() if addresses else "10.0.0.1"]

    async def fetch_twice(url: str) -> None:
        async with Fetcher(FetchLimits(), LOCAL, resolve=rebind) as fetcher:
            assert await fetcher.fetch(url) == b"photo"
            with pytest.raises(UrlNotAllowed):
                await fetcher.fetch(url)

    with serve(send(PHOTO)) as (port, _):
        asyncio.run(fetch_twice(f"http://a.example:{port}/"))


def test_a_cookie_is_not_kept():
    respond = send(PHOTO.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b; Path=/\r\n"))

    async def fetch_twice(url: str) -> None:
        async with Fetcher(FetchLimits(), LOCAL, resolve=to_loopback) as fetcher:
            assert await fetcher.fetch(url) == await fetcher.fetch(url) == b"photo"

    with serve(respond) as (port, requests):
        asyncio.run(fetch_twice(f"http://a.example:{port}/"))
    assert len(requests) == 2 and "Cookie" not in requests[1]


def test_no_url_raises_anything_but_a_download_error():
    rng, letters = random.Random(0), "a1.:/?#[]@%-_~!$&'()*+,;=<>|^`{}\"\\ A0\u00e9"
    for _ in range(20_000):
        text = "".join(rng.choices(letters, k=rng.randint(1, 9)))
        with contextlib.suppress(DownloadError):
            target = check_url(rng.choice(["http://", "https://"]) + text, AddressPolicy())
            assert re.fullmatch(r"[a-z0-9.-]+", target.host) and target.port in (80, 443)


# TLS

AUTHORITY, UNTRUSTED = trustme.CA(), trustme.CA()


def server_context(authority: trustme.CA, *names: str, **options) -> ssl.SSLContext:
    """Make a server's context with a certificate for `names`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **options).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Make the fetcher's context, and let it trust `authority` too."""
    context = download._make_ssl_context()
    authority.configure_trust(context)
    return context


LONG_AGO = datetime.now(timezone.utc) - timedelta(days=9)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (server_context(AUTHORITY, "a.example"), "ok"),
        (server_context(AUTHORITY, "b.example"), "TLS_ERROR"),
        (server_context(AUTHORITY, "*.example"), "TLS_ERROR"),
        (server_context(UNTRUSTED, "a.example"), "TLS_ERROR"),
        (server_context(AUTHORITY, "a.example", not_after=LONG_AGO), "TLS_ERROR"),
        (None, "TLS_ERROR"),
    ],
    ids=["right", "other-name", "wildcard-top", "untrusted", "expired", "plain-http"],
)
def test_the_certificate_is_checked(context, expected):
    with serve(send(PHOTO), tls=context) as (port, _):
        url = f"https://a.example:{port}/?{SECRET}"
        assert code(url, ssl_context=trusting(AUTHORITY)) == expected


def test_the_environment_adds_no_authorities(monkeypatch, tmp_path):
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    assert ssl.create_default_context().get_ca_certs()[0]["issuer"]  # Python's default trusts it
    with serve(send(PHOTO), tls=server_context(AUTHORITY, "a.example")) as (port, _):
        assert code(f"https://a.example:{port}/") == "TLS_ERROR"


def test_a_redirect_from_https_to_http_is_refused():
    with serve(send(PHOTO)) as (plain_port, requests):
        redirect = b"HTTP/1.1 302 F\r\nLocation: http://a.example:%d/\r\n\r\n" % plain_port
        with serve(send(redirect), tls=server_context(AUTHORITY, "a.example")) as (port, _):
            result = code(f"https://a.example:{port}/", ssl_context=trusting(AUTHORITY))
    assert result == "URL_NOT_ALLOWED" and not requests


# Time


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_silence_ends_at_the_deadline(scheme):
    with serve(send(), silent=True) as (port, _):
        error, took = run(f"{scheme}://127.0.0.1:{port}/", timeout_s=0.4)[0]
    assert error.code == "FETCH_TIMEOUT" and 0.4 <= took < 0.65


def test_the_deadline_is_not_rounded_up():
    """aiohttp's own timeout rounds anything over 5 s up to the next full second."""
    with serve(send(), silent=True) as (port, _):
        urls = [f"http://127.0.0.1:{port}/"] * 5
        results = run(*urls, timeout_s=5.1)
    assert all(error.code == "FETCH_TIMEOUT" and took < 5.35 for error, took in results)


@pytest.mark.parametrize(
    "part", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"]
)
def test_a_flood_of_interim_responses_is_cut_short(part):
    with serve(repeat(part * 4_000)) as (port, _):
        results = run(*[f"http://127.0.0.1:{port}/"] * 8, timeout_s=5)
    assert all(error.code == "BAD_RESPONSE" and took < 3 for error, took in results)


def test_an_endless_body_stops_at_the_limit():
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    with serve(lambda c: (c.sendall(head), repeat(bytes(65_536))(c))) as (port, _):
        error, took = run(f"http://127.0.0.1:{port}/")[0]
    assert error.code == "IMAGE_TOO_LARGE" and took < 3


@pytest.mark.parametrize(
    "error", [OSError(), socket.gaierror(-2, "x"), UnicodeError("x"), ValueError()]
)
def test_an_error_of_the_resolver_is_dns_failed(error):
    async def fail(host: str) -> list[str]:
        raise error

    assert code("http://a.example/", resolve=fail) == "DNS_FAILED"


# The connection


def test_a_broken_connection_is_retryable_and_a_short_body_is_not():
    part = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nphoto"
    for reset, expected in ((True, "FETCH_FAILED"), (False, "BAD_RESPONSE")):
        with serve(lambda c, r=reset: (c.sendall(part), time.sleep(0.1), send(reset=r)(c))) as (
            port,
            _,
        ):
            assert code(f"http://127.0.0.1:{port}/?{SECRET}") == expected


@pytest.mark.parametrize("wait_s", [0.0, 0.1], ids=["before-the-head", "in-the-body"])
def test_cancelling_a_fetch_closes_the_connection_at_once(wait_s):
    received, closed = [], threading.Event()

    def respond(connection: socket.socket) -> None:
        if wait_s:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n")
        connection.settimeout(5)
        received.append((connection.recv(1), time.perf_counter()))
        closed.set()

    async def cancel(url: str) -> float:
        async with Fetcher(FetchLimits(), LOCAL) as fetcher:
            task = asyncio.create_task(fetcher.fetch(url))
            await asyncio.sleep(0.2)
            task.cancel()
            start = time.perf_counter()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(closed.wait, 5)
            return start

    with serve(respond) as (port, _):
        start = asyncio.run(cancel(f"http://127.0.0.1:{port}/"))
    assert received[0][0] == b"" and received[0][1] - start < 0.1


def test_a_thousand_fetches_leave_nothing_open():
    table = [
        (send(PHOTO), bytes), (send(PHOTO, reset=True), object), (send(b""), DownloadError),
        (send(b"HTTP/1.1 302 F\r\nLocation: /\r\n\r\n"), DownloadError),
        (send(b"junk\r\n\r\n"), DownloadError),
    ]  # fmt: skip

    async def count_descriptors() -> tuple[int, int]:
        process = psutil.Process()
        async with Fetcher(FetchLimits(), LOCAL, resolve=to_loopback) as fetcher:
            before = process.num_fds()
            for respond, kind in table:
                with serve(respond) as (port, _):
                    for _ in range(10):
                        urls = [f"http://a.example:{port}/{n}" for n in range(20)]
                        results = await asyncio.gather(
                            *map(fetcher.fetch, urls), return_exceptions=True
                        )
                        assert all(isinstance(result, kind) for result in results)
            gc.collect()
            await asyncio.sleep(0.2)
            return before, process.num_fds()

    before, after = asyncio.run(count_descriptors())
    assert after <= before + 20


def test_closing_the_fetcher_ends_its_thread_and_its_fetches():
    async def close(url: str) -> DownloadError:
        async with Fetcher(FetchLimits(), LOCAL) as fetcher:
            fetch = asyncio.create_task(fetcher.fetch(url))
            await asyncio.sleep(0.2)
        assert not {"fetch"} & {thread.name for thread in threading.enumerate()}
        with pytest.raises(DownloadError) as caught:
            await fetch
        return caught.value

    with serve(send(), silent=True) as (port, _):
        assert asyncio.run(close(f"http://127.0.0.1:{port}/")).code == "CONNECT_FAILED"


def test_a_fetch_that_crosses_the_close_of_another_thread_ends_at_once(monkeypatch):
    """The loop would end between the last look at it and the hand-over, with the work in it."""
    real_close, real_submit = asyncio.SelectorEventLoop.close, asyncio.run_coroutine_threadsafe
    closing, submitted, results = threading.Event(), threading.Event(), []

    def close(loop: asyncio.AbstractEventLoop) -> None:
        if threading.current_thread().name == "fetch":
            closing.set()
            submitted.wait(1)
        real_close(loop)

    def submit(work, loop):
        if threading.current_thread().name == "late":
            closing.wait(0.3)
            result = real_submit(work, loop)
            submitted.set()
            return result
        return real_submit(work, loop)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "close", close)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", submit)

    async def fetch_late(fetcher: Fetcher, url: str) -> None:
        start = time.perf_counter()
        with contextlib.suppress(DownloadError):
            await fetcher.fetch(url)
        results.append(time.perf_counter() - start)

    async def cross(url: str) -> None:
        fetcher = Fetcher(FetchLimits(timeout_s=5), LOCAL)
        assert await fetcher.fetch(url) == b"photo"
        target = partial(asyncio.run, fetch_late(fetcher, url))
        late = threading.Thread(target=target, name="late")
        late.start()
        await asyncio.sleep(0.1)
        await fetcher.close()
        await asyncio.to_thread(late.join)
        await fetcher.close()

    with serve(send(PHOTO)) as (port, _):
        asyncio.run(cross(f"http://127.0.0.1:{port}/"))
    assert results[0] < 3


def test_a_closed_fetcher_opens_again():
    async def fetch_twice(url: str) -> None:
        fetcher = Fetcher(FetchLimits(), LOCAL)
        for _ in range(2):
            assert await fetcher.fetch(url) == b"photo"
            await fetcher.close()

    with serve(send(PHOTO)) as (port, _):
        asyncio.run(fetch_twice(f"http://127.0.0.1:{port}/"))


def test_one_fetcher_serves_several_event_loops():
    fetcher = Fetcher(FetchLimits(), LOCAL)

    async def fetch(url: str) -> bytes:
        return await fetcher.fetch(url)

    with serve(send(PHOTO)) as (port, _), ThreadPoolExecutor(4) as threads:
        urls = [f"http://127.0.0.1:{port}/"] * 20
        assert list(threads.map(lambda url: asyncio.run(fetch(url)), urls)) == [b"photo"] * 20
        names = [thread.name for thread in threading.enumerate()]
        asyncio.run(fetcher.close())
    assert names.count("fetch") == 1


@pytest.mark.parametrize(
    "url", ["http://a.example/\n", "http://a.example/\x00", "\thttp://a.example/", 7, b"x"]
)
def test_a_url_is_checked_before_its_name_is_resolved(url):
    async def never(host: str) -> list[str]:
        raise AssertionError

    assert run(url, resolve=never)[0][0].code == "INVALID_URL"
    with pytest.raises(DownloadError):
        check_url(url, AddressPolicy())


TINY = [bytes([i & 255, i >> 16]) for i in range(200_000)]
WHOLE = b"".join(TINY)


def peak_of(work: Callable[[], bytes]) -> int:
    """Measure the memory that it takes to collect the bytes of `TINY`."""
    tracemalloc.start()
    try:
        assert work() == WHOLE
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_body_in_tiny_pieces_takes_little_more_memory_than_its_length():
    response = Response(Mock())
    response.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n")

    def receive() -> bytes:
        for piece in TINY:
            response.feed(piece)
        return asyncio.run(response.read(400_000))

    assert peak_of(receive) < 6 * 400_000  # 14 million bytes if each piece was kept


def test_gzip_in_tiny_chunks_takes_little_more_memory_than_its_length():
    packer = zlib.compressobj(0, wbits=31)
    chunks = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in TINY]
    chunks.append(packer.flush())

    async def unpack() -> bytes:
        body = download._Gunzip(max_bytes=1 << 22)
        for chunk in chunks:
            await body.add(chunk)
        return body.end()

    assert peak_of(lambda: asyncio.run(unpack())) < 6 * 400_000


def test_the_first_byte_after_the_gzip_ends_the_fetch():
    packed = gzip.compress(b"photo")

    async def add(*chunks: bytes) -> None:
        body = download._Gunzip(1000)
        for chunk in chunks:
            await body.add(chunk)

    asyncio.run(add(packed))
    for chunks in ((packed, b"x"), (packed + b"x",), (packed, packed)):
        with pytest.raises(BadResponse):
            asyncio.run(add(*chunks))


def test_decompression_lets_others_have_their_turn():
    bomb = gzip.compress(bytes(10_000_000))  # 10 kB

    async def count_turns() -> int:
        body, turns = download._Gunzip(10_000_000), 0
        work = asyncio.create_task(body.add(bomb))
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        assert body.end() == bytes(10_000_000)
        return turns

    assert asyncio.run(count_turns()) > 100


def test_gzip_ends_whatever_its_pieces():
    rng = random.Random(3)
    for size in (0, 1, 65_535, 65_536, 65_537, 131_072, 200_000):
        data = rng.randbytes(size // 2) + bytes(size - size // 2)
        packed = gzip.compress(data)

        async def unpack(step: int, data=data, packed=packed) -> bytes:
            body = download._Gunzip(max(len(data), len(packed)))
            for start in range(0, len(packed), step):
                await body.add(packed[start : start + step])
            return body.end()

        for step in (7, 1000, len(packed)):
            assert asyncio.run(unpack(step)) == data


def test_a_fetcher_recovers_when_it_could_not_open(monkeypatch):
    real, failures = asyncio.events.new_event_loop, [OSError(24, "Too many open files")]

    def open_loop() -> asyncio.AbstractEventLoop:
        if threading.current_thread().name == "fetch" and failures:
            raise failures.pop()
        return real()

    monkeypatch.setattr(asyncio.events, "new_event_loop", open_loop)

    async def fetch_twice(url: str) -> bytes:
        fetcher = Fetcher(FetchLimits(timeout_s=5), LOCAL)
        with pytest.raises(DownloadError) as caught:
            await fetcher.fetch(url)
        assert (caught.value.code, caught.value.retryable) == ("CONNECT_FAILED", True)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    with serve(send(PHOTO)) as (port, _):
        assert asyncio.run(fetch_twice(f"http://127.0.0.1:{port}/")) == b"photo"


@pytest.mark.parametrize("part", ["_make_ssl_context", "Pool", "_name_servers"])
def test_a_fetcher_recovers_when_a_part_of_it_could_not_open(part, monkeypatch):
    real, failures = getattr(download, part), [OSError(24, "Too many open files")]

    def make(*args, **options):
        if failures:
            raise failures.pop()
        return real(*args, **options)

    monkeypatch.setattr(download, part, make)

    async def fetch_many(url: str) -> list:
        fetcher = Fetcher(FetchLimits(timeout_s=5), LOCAL)
        first = await asyncio.gather(fetcher.fetch(url), return_exceptions=True)
        rest = await asyncio.gather(*[fetcher.fetch(url) for _ in range(3)])
        await fetcher.close()
        return [type(first[0]).__name__, *rest]

    with serve(send(PHOTO)) as (port, _):
        results = asyncio.run(fetch_many(f"http://127.0.0.1:{port}/"))
    assert results == ["ConnectFailed", b"photo", b"photo", b"photo"]
