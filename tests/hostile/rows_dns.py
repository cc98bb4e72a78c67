"""The catalogue's rows for lookups: name servers that lie, change their answers or stay silent.

`answers` maps a name to the result of its lookup: a value, an exception, (seconds, value), or
`Successive(...)` of these. `dials` are all the connections that may be made, in order. The first of
them receives the first of `responses`, and so on. The name looked up is the URL's host.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Any

from rows_url import PUBLIC, Q
from servers import Successive, full, location

from heimdex_clip_worker.serving.download import AddressPolicy

OTHER = "151.101.1.140"
OFFICE = AddressPolicy(allowed_networks=(IPv4Network("10.0.0.0/8"),))
METADATA_NETWORKS = (IPv4Network("169.254.0.0/16"), IPv4Network("168.63.129.16/32"))
LINK = AddressPolicy(allowed_networks=METADATA_NETWORKS)


@dataclass(frozen=True)
class Row:
    """One name, and the results of its lookups."""

    id: str
    code: str
    answers: dict[str, Any]
    dials: tuple[str, ...] = ()
    url: str = f"http://photos.example/a.jpg{Q}"
    policy: AddressPolicy = AddressPolicy()
    responses: tuple[bytes, ...] = (full(),)  # to the first connection, the second, ...
    limits: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)  # address -> exception or seconds
    lookups: int | None = None
    max_dials: int | None = None  # the number of connections, where `dials` does not list them


def row(id: str, code: str, answer: Any, *dials: str, **more: Any) -> Row:
    """A row in which the lookup of the one name results in `answer`."""
    return Row(f"dns-{id}", code, {"photos.example": answer}, dials, **more)


def denied(id: str, answer: Any, **more: Any) -> Row:
    """A row whose name has a forbidden address: nothing is dialled."""
    return row(id, "URL_NOT_ALLOWED", answer, lookups=1, **more)


def failed(id: str, answer: Any, **more: Any) -> Row:
    """A row whose lookup fails: nothing is dialled."""
    return row(id, "DNS_FAILED", answer, lookups=1, **more)


A80, B80 = f"{PUBLIC}:80", f"{OTHER}:80"
INTERNAL = [
    denied(f"answer-{name}", [address])
    for name, address in {
        "loopback": "127.0.0.1",
        "private": "10.0.0.5",
        "metadata": "169.254.169.254",
        "wireserver": "168.63.129.16",
        "shared": "100.64.0.1",
        "this-network": "0.0.0.0",
        "broadcast": "255.255.255.255",
        "ipv6-loopback": "::1",
        "ipv6-mapped": "::ffff:127.0.0.1",
        "ipv6-public": "2606:4700:4700::1111",
        "ipv6-zone": "fe80::1%eth0",
    }.items()
]
MIXED = [
    denied("bad-first", ["127.0.0.1", PUBLIC]),
    denied("bad-last", [PUBLIC, OTHER, "10.0.0.1"]),
    denied("bad-in-the-middle", [PUBLIC, "169.254.169.254", OTHER]),
    denied("bad-after-a-thousand", [PUBLIC] * 1000 + ["192.168.0.1"]),
    denied("ipv6-beside-ipv4", [PUBLIC, "2606:4700:4700::1111"]),
]
GARBAGE = [
    denied("garbage-word", ["not an address"]),
    denied("garbage-empty-text", [""]),
    denied("garbage-integer", [2130706433]),
    denied("garbage-integer-as-text", ["2130706433"]),
    denied("garbage-octal", ["0177.0.0.1"]),
    denied("garbage-short", ["127.1"]),
    denied("garbage-null", [None]),
    denied("garbage-bytes", [b"\x7f\0\0\x01"]),
    denied("garbage-a-name", ["localhost"]),
    denied("garbage-line-break", [PUBLIC + "\n"]),
    denied("garbage-with-port", [PUBLIC + ":80"]),
    denied("garbage-text-for-a-list", PUBLIC),
    denied("garbage-nested", [[PUBLIC]]),
]
FAILURES = [
    failed("no-answer", []),
    failed("null", None),
    failed("gaierror", socket.gaierror(socket.EAI_NONAME, f"unknown {Q}")),
    failed("try-again", socket.gaierror(socket.EAI_AGAIN, "try again")),
    failed("herror", socket.herror(1, "unknown host")),
    failed("os-error", OSError(f"no route to the name server {Q}")),
    failed("timeout-error", TimeoutError()),
    failed("unicode-error", UnicodeError("label too long")),
    failed("connection-error", ConnectionResetError()),
    failed("slow", (2.0, [PUBLIC]), limits={"dns_timeout_s": 0.15, "timeout_s": 1.0}),
    row("slower-than-the-deadline", "FETCH_TIMEOUT", (2.0, [PUBLIC]), limits={"timeout_s": 0.2}),
    row("slow-but-in-time", "ok", (0.1, [PUBLIC]), A80, limits={"dns_timeout_s": 0.6}),
]
REBINDING = [
    row("rebinding-look-up", "ok", Successive([PUBLIC], ["127.0.0.1"]), A80, lookups=1),
    row(
        "rebinding-hop",
        "URL_NOT_ALLOWED",
        Successive([PUBLIC], ["127.0.0.1"]),
        A80,
        responses=(location("/b.jpg"), full()),
        lookups=2,
    ),
    row(
        "rebinding-third-hop",
        "URL_NOT_ALLOWED",
        Successive([PUBLIC], [OTHER], ["169.254.169.254"]),
        A80,
        B80,
        responses=(location("/b.jpg"), location("/c.jpg"), full()),
        lookups=3,
    ),
    row(
        "moves-honestly",
        "ok",
        Successive([PUBLIC], [OTHER]),
        A80,
        B80,
        responses=(location("/b.jpg"), full()),
        lookups=2,
    ),
    Row(
        "dns-redirect-to-inner-name",
        "URL_NOT_ALLOWED",
        {"photos.example": [PUBLIC], "inside.example": ["10.0.0.9"]},
        (A80,),
        responses=(location("http://inside.example/a.jpg"), full()),
        lookups=2,
    ),
    Row(
        "dns-redirect-to-unknown-name",
        "DNS_FAILED",
        {"photos.example": [PUBLIC], "nowhere.example": socket.gaierror()},
        (A80,),
        responses=(location("http://nowhere.example/a.jpg"), full()),
    ),
    Row(
        "dns-redirect-to-slow-name",
        "FETCH_TIMEOUT",
        {"photos.example": [PUBLIC], "slow.example": (2.0, [PUBLIC])},
        (A80,),
        responses=(location("http://slow.example/a.jpg"), full()),
        limits={"timeout_s": 0.3},
    ),
]
OFFICE_URL = f"http://photos.example:8080/a.jpg{Q}"
NETWORKS = [
    row("allowed-network", "ok", ["10.1.2.3"], "10.1.2.3:80", policy=OFFICE),
    row(
        "allowed-network-any-port",
        "ok",
        ["10.1.2.3"],
        "10.1.2.3:8080",
        policy=OFFICE,
        url=OFFICE_URL,
    ),
    denied("allowed-network-public-answer-on-its-port", [PUBLIC], policy=OFFICE, url=OFFICE_URL),
    denied(
        "allowed-network-one-public-answer", ["10.1.2.3", PUBLIC], policy=OFFICE, url=OFFICE_URL
    ),
    denied("beside-the-allowed-network", ["11.0.0.0", "172.16.0.1"], policy=OFFICE),
    denied("another-private-network", ["192.168.1.1"], policy=OFFICE),
    denied("metadata-in-allowed-network", ["169.254.169.254"], policy=LINK),
    denied("wireserver-in-allowed-network", ["168.63.129.16"], policy=LINK),
]
REFUSED, UNREACHABLE = ConnectionRefusedError(111, f"refused {Q}"), OSError(101, "unreachable")
MANY = [f"93.184.216.{i}" for i in range(1, 31)]
DIALS = [
    row("connect-refused", "CONNECT_FAILED", [PUBLIC], A80, faults={PUBLIC: REFUSED}),
    row("connect-unreachable", "CONNECT_FAILED", [PUBLIC], A80, faults={PUBLIC: UNREACHABLE}),
    row(
        "connect-hangs",
        "FETCH_TIMEOUT",
        [PUBLIC],
        A80,
        faults={PUBLIC: 3.0},
        limits={"timeout_s": 0.2},
    ),
    row("second-address-answers", "ok", [PUBLIC, OTHER], A80, B80, faults={PUBLIC: REFUSED}),
    row("the-same-address-twice", "ok", [PUBLIC, PUBLIC], A80),
    row(
        "many-addresses-that-refuse",
        "CONNECT_FAILED",
        MANY,
        max_dials=16,
        faults=dict.fromkeys(MANY, REFUSED),
    ),
]

ROWS = [*INTERNAL, *MIXED, *GARBAGE, *FAILURES, *REBINDING, *NETWORKS, *DIALS]
