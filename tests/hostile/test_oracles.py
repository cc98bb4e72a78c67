"""Two other address checks as oracles: `check_address` refuses every address that one of them does.

Microsoft's list and runpod's rules are compared on the ends of every special range, their
neighbours and middles, and on random addresses with a fixed seed. Only their checks of a plain
address are used, not their lookups or requests.
"""

from __future__ import annotations

import ipaddress
import random
import sys
from collections.abc import Callable

import pytest
from runpod.serverless.utils import rp_ssrf

from heimdex_clip_worker.errors import UrlNotAllowed
from heimdex_clip_worker.serving.download import _NOT_PUBLIC, AddressPolicy, check_address

pytestmark = pytest.mark.model

# Special ranges in IANA's two registries, and those of clouds: wider than the list of any check.
SPECIAL = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16
    169.254.169.254/32 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29 192.0.0.8/32 192.0.0.9/32
    192.0.0.10/32 192.0.0.170/31 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24
    192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
    233.252.0.0/24 240.0.0.0/4 255.255.255.255/32 100.100.100.200/32 192.0.0.192/32
    ::/128 ::1/128 ::/96 ::ffff:0:0/96 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64
    100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128 2001:2::/48 2001:3::/32 2001:4:112::/48
    2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20
    5f00::/16 fc00::/7 fd00:ec2::254/128 fe80::/10 fec0::/10 ff00::/8
"""
NETWORKS = [ipaddress.ip_network(text) for text in SPECIAL.split()]


def microsoft() -> Callable[[str], bool]:
    """Make a predicate: true if Microsoft's check refuses an address."""
    antissrf = pytest.importorskip("AntiSSRF", reason="microsoft-antissrf needs Python 3.11")
    policy = antissrf.AntiSSRFPolicy(antissrf.PolicyConfigOptions.EXTERNAL_ONLY_LATEST)
    return lambda address: not policy._is_str_ip_address_connection_allowed(address)


def runpod() -> Callable[[str], bool]:
    """Make a predicate: true if runpod's check refuses an address."""
    return lambda address: not rp_ssrf.is_safe_address(address)


ORACLES = {"microsoft": microsoft, "runpod": runpod}


def is_refused(address: str) -> bool:
    """True if `check_address` refuses an address."""
    try:
        check_address(address, AddressPolicy())
    except UrlNotAllowed:
        return True
    return False


def edges(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> list[str]:
    """List the ends and the middle of a range, and the neighbours of its ends."""
    first, last = int(network[0]), int(network[-1])
    values = {first - 1, first, first + 1, (first + last) // 2, last - 1, last, last + 1}
    count = 2**network.max_prefixlen
    make = type(network[0])  # an integer below 2^32 would be read as IPv4
    return [str(make(value)) for value in sorted(values) if 0 <= value < count]


def random_addresses(count: int, bits: int, seed: int) -> list[str]:
    """Draw `count` addresses, half of them in or near a special range."""
    rng, make = random.Random(seed), {32: ipaddress.IPv4Address, 128: ipaddress.IPv6Address}[bits]
    near = [network for network in NETWORKS if network.max_prefixlen == bits]
    values = [rng.getrandbits(bits) for _ in range(count // 2)]
    for _ in range(count // 2):
        network = rng.choice(near)
        value = int(network[0]) + rng.randrange(2 * network.num_addresses)
        values.append(min(value, 2**bits - 1))
    return [str(make(value)) for value in values]


def embedded(address: str) -> list[str]:
    """List the IPv6 addresses that contain an IPv4 address, one for each standard form."""
    number = int(ipaddress.IPv4Address(address))
    forms = {
        "mapped": 0xFFFF << 32 | number,
        "compatible": number,
        "translated": 0xFFFF << 48 | number,
        "nat64": 0x64FF9B << 96 | number,
        "nat64-local": 0x64FF9B0001 << 80 | number,
        "6to4": 0x2002 << 112 | number << 80,
        "teredo": 0x20010000 << 96 | number ^ 0xFFFFFFFF,
        "isatap": 0x2606470000000000 << 64 | 0x5EFE << 32 | number,
    }
    return [str(ipaddress.IPv6Address(value)) for value in forms.values()]


def missed(name: str, addresses: list[str]) -> list[str]:
    """List the addresses that the oracle refuses and `check_address` accepts."""
    oracle_refuses = ORACLES[name]()
    return [address for address in addresses if oracle_refuses(address) and not is_refused(address)]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_the_ends_of_a_special_range(name: str, network: ipaddress.IPv4Network) -> None:
    assert missed(name, edges(network)) == []


@pytest.mark.parametrize("bits", [32, 128])
@pytest.mark.parametrize("name", ORACLES)
def test_random_addresses(name: str, bits: int) -> None:
    assert missed(name, random_addresses(2000, bits, seed=20261123)) == []


@pytest.mark.parametrize("name", ORACLES)
def test_ipv4_inside_ipv6(name: str) -> None:
    inner = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "168.63.129.16", "8.8.8.8", "0.0.0.0"]
    addresses = [outer for address in inner for outer in embedded(address)]
    assert missed(name, addresses) == []
    assert all(map(is_refused, addresses))


@pytest.mark.parametrize("name", ORACLES)
def test_texts_that_are_no_address(name: str) -> None:
    texts = [
        "",
        "localhost",
        "127.1",
        "0177.0.0.1",
        "2130706433",
        "0x7f.1",
        "1.1.1.1 ",
        "::1%lo",
        "1.1.1.1/32",
        "１.1.1.1",
        "1.1.1",
        "1.1.1.1.1",
        "fe80::1%25eth0",
        "256.1.1.1",
    ]
    assert missed(name, texts) == []
    assert all(map(is_refused, texts))


def test_microsofts_own_list_is_covered() -> None:
    ranges = pytest.importorskip("AntiSSRF", reason="microsoft-antissrf needs Python 3.11")
    for network in map(ipaddress.ip_network, ranges.IPAddressRanges.recommended_latest):
        if network.version == 4:
            assert any(network.subnet_of(denied) for denied in _NOT_PUBLIC), network
        assert all(map(is_refused, edges(network)[1:-1])), network


@pytest.mark.parametrize("network", _NOT_PUBLIC, ids=str)
def test_a_denied_range_is_no_wider_than_listed(network: ipaddress.IPv4Network) -> None:
    inside = [str(network[i]) for i in (0, network.num_addresses // 2, -1)]
    assert all(map(is_refused, inside))
    outside = [int(network[0]) - 1, int(network[-1]) + 1]
    for value in outside:
        if 0 <= value < 2**32:
            address = ipaddress.IPv4Address(value)
            expected = any(address in other for other in _NOT_PUBLIC)
            assert is_refused(str(address)) == expected, address


def test_public_addresses_are_accepted() -> None:
    for address in ("1.1.1.1", "8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "9.9.9.9"):
        assert not is_refused(address)


def test_microsofts_oracle_is_installed() -> None:
    if sys.version_info >= (3, 11):
        assert microsoft()("127.0.0.1") and not microsoft()("8.8.8.8")
