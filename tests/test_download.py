"""The downloader against oracles, certificates, silence, floods and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import re
import socket
import ssl
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from ipaddress import IPv4Address, ip_network

import psutil
import pytest
import trustme
from AntiSSRF import AntiSSRFPolicy, PolicyConfigOptions
from raw_server import repeat, say, serve

from heimdex_clip_worker import download
from heimdex_clip_worker.download import Fetcher, Limits, Policy, Target, check_address, check_url
from heimdex_clip_worker.errors import DownloadError, UrlNotAllowed

LOCAL = Policy(allowed_networks=(ip_network("127.0.0.0/8"),))
PHOTO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nphoto"
SECRET = "token=in-no-message"


async def here(host: str) -> list[str]:
    """Resolve every name to this machine."""
    return ["127.0.0.1"]


def run(*urls: str, policy: Policy = LOCAL, resolve=here, ssl_context=None, **limits):
    """Fetch `urls` at once; return for each its bytes or its error, and the seconds it took."""

    async def one(fetcher: Fetcher, url: str):
        start = time.perf_counter()
        try:
            return await fetcher.fetch(url), time.perf_counter() - start
        except DownloadError as error:
            for text in (str(error), error.detail):
                assert SECRET not in text and "http://" not in text
            return error, time.perf_counter() - start

    async def all_of_them():
        options = {"resolve": resolve, "ssl_context": ssl_context}
        async with Fetcher(Limits(**limits), policy, **options) as fetcher:
            return await asyncio.gather(*(one(fetcher, url) for url in urls))

    return asyncio.run(all_of_them())


def code(url: str, **options) -> str:
    """Return `ok` or the code of the error that fetching `url` ends with."""
    got = run(url, **options)[0][0]
    return "ok" if isinstance(got, bytes) else got.code


# Addresses


def allows(address: str) -> bool:
    try:
        check_address(address, Policy())
    except UrlNotAllowed:
        return False
    return True


def addresses() -> list[str]:
    """First, middle and last of each range and their neighbours, and random ones."""
    chance, edges = random.Random(0), []
    for network in download.DENIED:
        first, last = int(network[0]), int(network[-1])
        edges += [first - 1, first, (first + last) // 2, last, last + 1]
    return [
        str(IPv4Address(n)) for n in edges + [chance.getrandbits(32) for _ in range(5_000)]
        if 0 <= n < 2**32
    ]  # fmt: skip


def test_what_microsoft_antissrf_refuses_is_refused():
    oracle = AntiSSRFPolicy(PolicyConfigOptions.EXTERNAL_ONLY_LATEST)
    for address in addresses():
        asked = oracle._is_str_ip_address_connection_allowed(address)
        assert asked or not allows(address), address


def test_what_the_platforms_sdk_refuses_is_refused():
    oracle = pytest.importorskip("runpod.serverless.utils.rp_ssrf")
    for address in addresses():
        assert oracle.is_safe_address(address) or not allows(address), address


def test_every_denied_range_ends_where_it_should():
    for network in download.DENIED:
        assert not any(map(allows, (str(network[0]), str(network[-1]))))
    assert allows("100.63.255.255") and allows("100.128.0.0") and allows("168.63.129.17")


@pytest.mark.parametrize(
    "address", ["::ffff:1.1.1.1", "1.1.1", "", "0x1.1.1.1", "1.1.1.1%eth0", None, 1]
)
def test_only_dotted_quads_are_addresses(address):
    assert not allows(address)


# The dial


@pytest.mark.parametrize("found", [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_the_socket_checks_what_the_other_checks_let_through(found, monkeypatch):
    """Neither `check_url` nor the resolver has looked at these."""
    monkeypatch.setattr(download._CheckedResolver, "resolve", partial(lie, found))
    for host in ("127.0.0.1", "a.example"):
        target = Target("http", host, 80, f"http://{host}/")

        async def ask(target=target):
            async with Fetcher(Limits(), Policy()) as fetcher:
                return await download._ask(fetcher._session, target, 99)

        with pytest.raises(UrlNotAllowed):
            asyncio.run(ask())


async def lie(found: list[str], host: str, port: int = 0, family: int = 0) -> list[dict]:
    entry = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
    return [{"host": address, **entry} for address in found]


def test_another_port_is_for_names_in_allowed_networks_only():
    async def public(host: str) -> list[str]:
        return ["1.1.1.1"]

    with serve(say(PHOTO)) as (port, _):
        url = f"http://a.example:{port}/"
        assert code(url) == "ok"
        assert code(url, resolve=public) == code(url, policy=Policy()) == "URL_NOT_ALLOWED"


def test_nobody_listens_is_a_failed_connection():
    with serve(say()) as (port, _):
        pass
    assert code(f"http://127.0.0.1:{port}/?{SECRET}") == "CONNECT_FAILED"


def test_the_second_address_is_dialled_when_the_first_refuses():
    async def both(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    with serve(say(PHOTO)) as (port, _):
        assert code(f"http://a.example:{port}/", resolve=both) == "ok"


def test_an_address_that_says_nothing_gives_way_to_the_next(monkeypatch):
    async def both(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    monkeypatch.setattr(download, "CONNECT_TIMEOUT_S", 0.2)
    with (
        serve(say(PHOTO), tls=server_context(AUTHORITY, "a.example")) as (port, _),
        serve(say(), silent=True, address=("127.0.0.9", port)),
    ):
        url = f"https://a.example:{port}/"
        assert code(url, resolve=both, ssl_context=trusting(AUTHORITY)) == "ok"


def test_every_fetch_looks_the_name_up_again():
    """A name that was public a moment ago is not trusted now."""
    found = ["127.0.0.1"]

    async def rebind(host: str) -> list[str]:
        return [found.pop() if found else "10.0.0.1"]

    async def go(url: str) -> str:
        async with Fetcher(Limits(), LOCAL, resolve=rebind) as fetcher:
            assert await fetcher.fetch(url) == b"photo"
            with pytest.raises(UrlNotAllowed):
                await fetcher.fetch(url)

    with serve(say(PHOTO)) as (port, _):
        asyncio.run(go(f"http://a.example:{port}/"))


def test_a_cookie_is_not_kept():
    answer = say(PHOTO.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b; Path=/\r\n"))

    async def go(url: str) -> None:
        async with Fetcher(Limits(), LOCAL, resolve=here) as fetcher:
            assert await fetcher.fetch(url) == await fetcher.fetch(url) == b"photo"

    with serve(answer) as (port, asked):
        asyncio.run(go(f"http://a.example:{port}/"))
    assert len(asked) == 2 and "Cookie" not in asked[1]


def test_no_url_makes_a_parser_raise_anything_else():
    chance, letters = random.Random(0), "a1.:/?#[]@%-_~!$&'()*+,;=<>|^`{}\"\\ A0\u00e9"
    for _ in range(20_000):
        rest = "".join(chance.choices(letters, k=chance.randint(1, 9)))
        with contextlib.suppress(DownloadError):
            target = check_url(chance.choice(["http://", "https://"]) + rest, Policy())
            assert re.fullmatch(r"[a-z0-9.-]+", target.host) and target.port in (80, 443)


# TLS

AUTHORITY, STRANGER = trustme.CA(), trustme.CA()


def server_context(authority: trustme.CA, *names: str, **options) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **options).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = download._trust()
    authority.configure_trust(context)
    return context


LONG_AGO = datetime.now(timezone.utc) - timedelta(days=9)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (server_context(AUTHORITY, "a.example"), "ok"),
        (server_context(AUTHORITY, "b.example"), "TLS_ERROR"),
        (server_context(AUTHORITY, "*.example"), "TLS_ERROR"),
        (server_context(STRANGER, "a.example"), "TLS_ERROR"),
        (server_context(AUTHORITY, "a.example", not_after=LONG_AGO), "TLS_ERROR"),
        (None, "TLS_ERROR"),
    ],
    ids=["right", "other-name", "wildcard-top", "stranger", "expired", "plain-http"],
)
def test_a_certificate_is_checked(context, expected):
    with serve(say(PHOTO), tls=context) as (port, _):
        url = f"https://a.example:{port}/?{SECRET}"
        assert code(url, ssl_context=trusting(AUTHORITY)) == expected


def test_the_environment_does_not_add_authorities(monkeypatch, tmp_path):
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    assert ssl.create_default_context().get_ca_certs()[0]["issuer"]  # it would be trusted
    with serve(say(PHOTO), tls=server_context(AUTHORITY, "a.example")) as (port, _):
        assert code(f"https://a.example:{port}/") == "TLS_ERROR"


def test_a_redirect_never_leaves_tls():
    with serve(say(PHOTO)) as (plain, asked):
        leave = b"HTTP/1.1 302 F\r\nLocation: http://a.example:%d/\r\n\r\n" % plain
        with serve(say(leave), tls=server_context(AUTHORITY, "a.example")) as (port, _):
            got = code(f"https://a.example:{port}/", ssl_context=trusting(AUTHORITY))
    assert got == "URL_NOT_ALLOWED" and not asked


# Time


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_silence_ends_at_the_deadline(scheme):
    with serve(say(), silent=True) as (port, _):
        error, took = run(f"{scheme}://127.0.0.1:{port}/", timeout_s=0.4)[0]
    assert error.code == "FETCH_TIMEOUT" and 0.4 <= took < 0.65


def test_the_deadline_is_not_rounded_up():
    """aiohttp's own rounds a timeout over 5 s up to the next full second."""
    with serve(say(), silent=True) as (port, _):
        urls = [f"http://127.0.0.1:{port}/"] * 5
        got = run(*urls, timeout_s=5.1)
    assert all(error.code == "FETCH_TIMEOUT" and took < 5.35 for error, took in got)


@pytest.mark.parametrize(
    "part", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"]
)
def test_a_flood_of_interim_answers_is_cut_short(part):
    with serve(repeat(part * 4_000)) as (port, _):
        got = run(*[f"http://127.0.0.1:{port}/"] * 8, timeout_s=5)
    assert all(error.code == "BAD_RESPONSE" and took < 3 for error, took in got)


def test_an_endless_body_stops_at_the_limit():
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    with serve(lambda c: (c.sendall(head), repeat(bytes(65_536))(c))) as (port, _):
        error, took = run(f"http://127.0.0.1:{port}/")[0]
    assert error.code == "IMAGE_TOO_LARGE" and took < 3


def test_stuck_look_ups_fail_in_time_and_hold_up_nothing_else(monkeypatch):
    released = []

    def stuck(host: str, *args):
        while not released:
            time.sleep(0.02)
        raise OSError

    async def go() -> tuple[list[str], float]:
        async with Fetcher(Limits(dns_timeout_s=0.3, timeout_s=1), LOCAL) as fetcher:
            start = time.perf_counter()
            urls = [f"http://{n}.example/" for n in range(download.DNS_THREADS + 9)]
            lost = asyncio.gather(*map(fetcher.fetch, urls), return_exceptions=True)
            await asyncio.sleep(0.1)
            assert await asyncio.to_thread(lambda: "free") == "free"
            codes = [error.code for error in await lost]
            released.append(True)
            return codes, time.perf_counter() - start

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    codes, took = asyncio.run(go())
    assert set(codes) == {"DNS_FAILED"} and took < 0.95  # and not the fetch's deadline of 1 s


@pytest.mark.parametrize(
    "error", [OSError(), socket.gaierror(-2, "x"), UnicodeError("x"), ValueError()]
)
def test_a_failing_resolver_is_a_failed_look_up(error):
    async def fail(host: str) -> list[str]:
        raise error

    assert code("http://a.example/", resolve=fail) == "DNS_FAILED"


# The connection


def test_a_broken_connection_can_be_tried_again_a_short_answer_not():
    part = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nphoto"
    for reset, expected in ((True, "FETCH_FAILED"), (False, "BAD_RESPONSE")):
        with serve(lambda c, r=reset: (c.sendall(part), time.sleep(0.1), say(reset=r)(c))) as (
            port,
            _,
        ):
            assert code(f"http://127.0.0.1:{port}/?{SECRET}") == expected


@pytest.mark.parametrize("wait_s", [0.0, 0.1], ids=["before-the-head", "in-the-body"])
def test_cancellation_passes_and_hangs_up_at_once(wait_s):
    gone, hung_up = [], threading.Event()

    def answer(connection: socket.socket) -> None:
        if wait_s:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n")
        connection.settimeout(5)
        gone.append((connection.recv(1), time.perf_counter()))
        hung_up.set()

    async def go(url: str) -> float:
        async with Fetcher(Limits(), LOCAL) as fetcher:
            task = asyncio.create_task(fetcher.fetch(url))
            await asyncio.sleep(0.2)
            task.cancel()
            start = time.perf_counter()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(hung_up.wait, 5)
            return start

    with serve(answer) as (port, _):
        start = asyncio.run(go(f"http://127.0.0.1:{port}/"))
    assert gone[0][0] == b"" and gone[0][1] - start < 0.1


def test_a_thousand_fetches_leave_nothing_open():
    table = [
        (say(PHOTO), bytes), (say(PHOTO, reset=True), object), (say(b""), DownloadError),
        (say(b"HTTP/1.1 302 F\r\nLocation: /\r\n\r\n"), DownloadError),
        (say(b"junk\r\n\r\n"), DownloadError),
    ]  # fmt: skip

    async def go() -> tuple[int, int]:
        me = psutil.Process()
        async with Fetcher(Limits(), LOCAL, resolve=here) as fetcher:
            before = me.num_fds()
            for answer, kind in table:
                with serve(answer) as (port, _):
                    for _ in range(10):
                        urls = [f"http://a.example:{port}/{n}" for n in range(20)]
                        got = await asyncio.gather(
                            *map(fetcher.fetch, urls), return_exceptions=True
                        )
                        assert all(isinstance(one, kind) for one in got)
            gc.collect()
            await asyncio.sleep(0.2)
            return before, me.num_fds()

    before, after = asyncio.run(go())
    assert after <= before + 20


def test_the_executor_of_the_fetcher_ends_with_it():
    async def go() -> ThreadPoolExecutor:
        async with Fetcher(Limits(), LOCAL) as fetcher:
            return fetcher._threads

    with pytest.raises(RuntimeError):
        asyncio.run(go()).submit(print)


@pytest.mark.parametrize(
    "url", ["http://a.example/\n", "http://a.example/\x00", "\thttp://a.example/", 7, b"x"]
)
def test_a_url_is_checked_before_anything_is_looked_up(url):
    async def never(host: str) -> list[str]:
        raise AssertionError

    assert run(url, resolve=never)[0][0].code == "INVALID_URL"
    with pytest.raises(DownloadError):
        check_url(url, Policy())


def test_a_body_in_tiny_chunks_takes_little_more_than_its_own_length():
    body = download._Body("", max_bytes=1 << 20)
    tracemalloc.start()
    for i in range(200_000):
        body.add(bytes([i & 255, i >> 16]))
    whole = body.end()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole == b"".join(bytes([i & 255, i >> 16]) for i in range(200_000))
    assert peak < 3 * len(whole), peak
