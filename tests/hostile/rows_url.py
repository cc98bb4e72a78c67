"""The catalogue's rows for URLs: what is refused before a packet is sent, and what is dialled.

Every name resolves to 93.184.216.34 (`localhost` to 127.0.0.1), and a server listens on ports 80
and 443 of every address. `dials` is the connection that must be made, or "" for none. `sends` is
the path and query of the request line and `host` the Host header, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from heimdex_clip_worker.serving.download import AddressPolicy

SECRET = "s3cr3t-t0k3n"  # must not appear in any error
Q = f"?token={SECRET}"
PUBLIC = "93.184.216.34"
LISTED = AddressPolicy(allowed_hosts=("photos.example", "*.cdn.example"))
HTTPS_ONLY = AddressPolicy(allow_http=False)
ANY = AddressPolicy()
OFFICE = AddressPolicy(allowed_networks=(IPv4Network("10.0.0.0/8"),))
EVERYTHING = AddressPolicy(allowed_networks=(IPv4Network("0.0.0.0/0"),))


@dataclass(frozen=True)
class Row:
    """One URL."""

    id: str
    code: str
    url: object
    policy: AddressPolicy = AddressPolicy()
    dials: str = ""
    sends: str = ""
    host: str = ""
    is_resolved: bool = False  # refused because of the address; before the lookup otherwise


def invalid(id: str, url: object, policy: AddressPolicy = ANY) -> Row:
    """A row whose URL is malformed."""
    return Row(f"url-{id}", "INVALID_URL", url, policy)


def denied(id: str, url: str, policy: AddressPolicy = ANY) -> Row:
    """A row whose URL leads to a forbidden host, port or address."""
    return Row(f"url-{id}", "URL_NOT_ALLOWED", url, policy)


def ok(
    id: str, url: str, sends: str, policy: AddressPolicy = ANY, dials: str = "", host: str = ""
) -> Row:
    """A row whose URL must be fetched, byte for byte."""
    dials = dials or PUBLIC + (":443" if url.lower().startswith("https") else ":80")
    return Row(f"url-{id}", "ok", url, policy, dials, sends, host or "photos.example")


SPLITS = [
    invalid("backslash-before-at", f"https://127.0.0.1\\@photos.example/a.jpg{Q}"),
    invalid("backslash-for-slash", f"https://photos.example\\a.jpg{Q}"),
    invalid("backslashes-for-slashes", f"https:\\\\photos.example\\a.jpg{Q}"),
    invalid("userinfo", f"https://user:{SECRET}@photos.example/a.jpg"),
    invalid("userinfo-name-only", f"https://photos.example@127.0.0.1/a.jpg{Q}"),
    invalid("userinfo-empty", f"https://@photos.example/a.jpg{Q}"),
    invalid("userinfo-twice", f"https://a@b@photos.example/a.jpg{Q}"),
    invalid("userinfo-before-private", f"http://photos.example:80@10.0.0.1/{Q}"),
    invalid("userinfo-encoded-at", f"http://photos.example%40127.0.0.1/{Q}"),
    denied("fragment-before-at", f"http://127.0.0.1#@photos.example/{Q}"),
    denied("query-before-at", f"http://127.0.0.1?@photos.example/{Q}"),
    ok("port-empty", f"http://photos.example:/a{Q}", f"/a{Q}"),
    ok("port-behind-a-hash", f"http://photos.example:#80/{Q}@x", "/"),
    invalid("space", f"https://photos.example/a b.jpg{Q}"),
    invalid("space-in-front", f" https://photos.example/a.jpg{Q}"),
    invalid("tab-in-host", f"https://photos\t.example/a.jpg{Q}"),
    invalid("line-break-at-the-end", f"https://photos.example/a.jpg{Q}\n"),
    invalid("header-injected", f"https://photos.example/a.jpg{Q} HTTP/1.1\r\nX-Evil: 1\r\n\r\n"),
    invalid("nul", f"https://photos.example/a\0.jpg{Q}"),
    invalid("delete", f"https://photos.example/a\x7f.jpg{Q}"),
    invalid("umlaut-in-path", f"https://photos.example/ä.jpg{Q}"),
    invalid("umlaut-in-host", f"https://phötos.example/a.jpg{Q}"),
    invalid("fullwidth-dot", f"http://127。0。0。1/a.jpg{Q}"),
    invalid("circled-digits", f"http://①②⑦.⓪.⓪.①/a.jpg{Q}"),
    invalid("fullwidth-slash", f"http://photos.example／@127.0.0.1/{Q}"),
    invalid("lone-surrogate", f"https://photos.example/\ud800{Q}"),
    invalid("percent-in-host", f"http://%31%32%37.0.0.1/{Q}"),
    invalid("encoded-slash-in-host", f"http://photos.example%2f.evil.example/{Q}"),
    invalid("encoded-nul-in-host", f"http://photos.example%00.evil.example/{Q}"),
    invalid("comma-in-host", f"http://photos.example,evil.example/{Q}"),
    invalid("semicolon-in-host", f"http://photos.example;evil.example/{Q}"),
]

SCHEMES = [
    *(
        invalid(f"scheme-{url.split(':')[0] or 'none'}", url)
        for url in (
            f"ftp://photos.example/a.jpg{Q}",
            "file:///etc/passwd",
            f"gopher://photos.example:80/_GET{Q}",
            f"data:image/png;base64,{SECRET}",
            f"ws://photos.example/{Q}",
            f"javascript:alert('{SECRET}')",
            f"httpx://photos.example/{Q}",
            f"http+unix://%2Fvar%2Frun%2Fdocker.sock/{Q}",
            f"://photos.example/{Q}",
        )
    ),
    invalid("no-scheme", f"photos.example/a.jpg{Q}"),
    invalid("scheme-relative", f"//photos.example/a.jpg{Q}"),
    invalid("one-slash", f"https:/photos.example/a.jpg{Q}"),
    invalid("no-slashes", f"https:photos.example/a.jpg{Q}"),
    invalid("three-slashes", f"https:///photos.example/a.jpg{Q}"),
    invalid("url-in-front-of-it", f"url:https://photos.example/a.jpg{Q}"),
    invalid("no-host", f"https:///{Q}"),
    invalid("only-a-scheme", "https://"),
    invalid("empty", ""),
    invalid("overlong", "https://photos.example/" + "a" * 4096),
    invalid("a-megabyte", "https://photos.example/" + "a" * 1_000_000 + Q),
    invalid("none", None),
    invalid("a-number", 7),
    invalid("bytes", b"https://photos.example/a.jpg"),
    invalid("a-list", ["https://photos.example/a.jpg"]),
]

HOSTS = [
    invalid("label-empty", f"https://photos..example/{Q}"),
    invalid("host-a-dot", f"https://./{Q}"),
    invalid("two-trailing-dots", f"https://photos.example../{Q}"),
    invalid("label-of-64", f"https://{'a' * 64}.example/{Q}"),
    invalid("host-of-254", f"https://{'.'.join(['a' * 49] * 5)}.exam/{Q}"),
    invalid("label-with-hyphen-in-front", f"https://-photos.example/{Q}"),
    invalid("label-with-underscore", f"https://pho_tos.example/{Q}"),
    invalid("quote-in-host", f"https://pho'tos.example/{Q}"),
    invalid("brackets-around-a-name", f"https://[photos.example]/{Q}"),
    invalid("bracket-open", f"https://[::1/{Q}"),
    invalid("bracket-then-name", f"https://[::1]photos.example/{Q}"),
]

NUMBERS = [
    *(
        invalid(f"ipv4-{name}", f"http://{host}/latest/meta-data{Q}")
        for name, host in {
            "integer": "2130706433",
            "integer-hex": "0x7f000001",
            "integer-octal": "017700000001",
            "hex-parts": "0x7f.0x0.0x0.0x1",
            "octal-parts": "0177.0.0.01",
            "leading-zeroes": "127.000.000.001",
            "two-parts": "127.1",
            "three-parts": "127.0.1",
            "mixed": "0x7f.1",
            "hex-last-part": "127.0.0.0x1",
            "five-parts": "127.0.0.0.1",
            "too-large-a-part": "127.0.0.256",
            "beyond-32-bits": "4294967297",
            "bare-0x": "0x",
            "zero": "0",
            "name-with-numeric-end": "photos.example.1",
            "name-with-hex-end": "photos.0xa",
            "metadata-as-integer": "2852039166",
            "metadata-in-octal": "0251.0376.0251.0376",
        }.items()
    ),
    *(
        denied(f"ipv4-{name}", f"http://{host}/latest/meta-data{Q}")
        for name, host in {
            "loopback": "127.0.0.1",
            "loopback-other": "127.255.255.254",
            "loopback-trailing-dot": "127.0.0.1.",
            "this-network": "0.0.0.0",
            "private-10": "10.0.0.1",
            "private-172": "172.31.255.255",
            "private-192": "192.168.1.1",
            "shared": "100.127.255.255",
            "metadata": "169.254.169.254",
            "metadata-of-containers": "169.254.170.2",
            "metadata-of-azure": "168.63.129.16",
            "metadata-of-alibaba": "100.100.100.200",
            "metadata-of-oracle": "192.0.0.192",
            "benchmarking": "198.19.0.1",
            "documentation": "203.0.113.7",
            "multicast": "239.255.255.250",
            "reserved": "240.0.0.1",
            "broadcast": "255.255.255.255",
        }.items()
    ),
    denied("metadata-though-everything-allowed", f"http://169.254.169.254/latest{Q}", EVERYTHING),
    denied("wireserver-though-everything-allowed", f"http://168.63.129.16/machine{Q}", EVERYTHING),
    replace(denied("localhost", f"http://localhost/{Q}"), is_resolved=True),
]

IPV6 = [
    denied(f"ipv6-{name}", f"http://[{host}]/latest/meta-data{Q}", policy)
    for name, host, policy in (
        ("loopback", "::1", ANY),
        ("loopback-long", "0:0:0:0:0:0:0:1", ANY),
        ("unspecified", "::", ANY),
        ("mapped-quad", "::ffff:127.0.0.1", ANY),
        ("mapped-hex", "::ffff:7f00:1", ANY),
        ("mapped-metadata", "::ffff:169.254.169.254", ANY),
        ("compatible", "::127.0.0.1", ANY),
        ("translated", "::ffff:0:127.0.0.1", ANY),
        ("nat64", "64:ff9b::7f00:1", ANY),
        ("nat64-local", "64:ff9b:1::a9fe:a9fe", ANY),
        ("6to4", "2002:7f00:1::", ANY),
        ("teredo", "2001:0:4136:e378:8000:63bf:3fff:fdd2", ANY),
        ("isatap", "2606:4700::5efe:7f00:1", ANY),
        ("unique-local", "fd00:ec2::254", ANY),
        ("link-local", "fe80::1", ANY),
        ("multicast", "ff02::1", ANY),
        ("site-local", "fec0::1", ANY),
        ("public", "2606:4700:4700::1111", ANY),
        ("public-though-everything-allowed", "2606:4700:4700::1111", EVERYTHING),
    )
] + [
    Row("url-ipv6-zone", "INVALID_URL|URL_NOT_ALLOWED", f"http://[fe80::1%25eth0]/{Q}"),
    Row("url-ipv6-zone-bare", "INVALID_URL|URL_NOT_ALLOWED", f"http://[fe80::1%eth0]/{Q}"),
    invalid("ipv6-without-brackets", f"http://::1/{Q}"),
    Row("url-ipv6-future", "INVALID_URL|URL_NOT_ALLOWED", f"http://[v1.fe80::a]/{Q}"),
    invalid("ipv6-nine-groups", f"http://[1:2:3:4:5:6:7:8:9]/{Q}"),
]

PORTS = [
    denied("port-22", f"http://photos.example:22/{Q}"),
    denied("port-8080", f"http://photos.example:8080/{Q}"),
    denied("port-of-redis", f"http://photos.example:6379/{Q}"),
    denied("port-of-public-address", f"http://{PUBLIC}:8443/{Q}"),
    replace(
        denied("port-of-public-name-with-a-network", f"http://photos.example:8080/{Q}", OFFICE),
        is_resolved=True,
    ),
    invalid("port-0", f"http://photos.example:0/{Q}"),
    invalid("port-65536", f"http://photos.example:65536/{Q}"),
    invalid("port-negative", f"http://photos.example:-80/{Q}"),
    invalid("port-a-word", f"http://photos.example:http/{Q}"),
    invalid("port-twice", f"http://photos.example:80:80/{Q}"),
    invalid("port-plus", f"http://photos.example:+80/{Q}"),
    invalid("port-underscore", f"http://photos.example:8_0/{Q}"),
    invalid("port-not-ascii", f"http://photos.example:８０/{Q}"),
    ok("port-443-over-http", f"http://photos.example:443/a{Q}", f"/a{Q}", dials=f"{PUBLIC}:443",
       host="photos.example:443"),
    ok("port-of-an-allowed-network", f"http://10.1.2.3:8080/a{Q}", f"/a{Q}", OFFICE,
       "10.1.2.3:8080", "10.1.2.3:8080"),
]  # fmt: skip

LISTS = [
    ok("listed", f"https://photos.example/a{Q}", f"/a{Q}", LISTED),
    ok("listed-in-capitals", f"https://PHOTOS.Example/a{Q}", f"/a{Q}", LISTED),
    ok("listed-with-trailing-dot", f"https://photos.example./a{Q}", f"/a{Q}", LISTED),
    ok("listed-suffix", f"http://a.b.cdn.example/a{Q}", f"/a{Q}", LISTED, host="a.b.cdn.example"),
    *(
        denied(f"not-listed-{name}", f"https://{host}/a.jpg{Q}", LISTED)
        for name, host in {
            "other": "evil.example",
            "longer": "photos.example.evil.example",
            "glued": "evilphotos.example",
            "glued-suffix": "evilcdn.example",
            "suffix-itself": "cdn.example",
            "below-an-exact-one": "a.photos.example",
            "in-the-middle": "a.cdn.example.evil.example",
            "hyphen": "a-cdn.example",
            "public-address": PUBLIC,
            "loopback": "127.0.0.1",
        }.items()
    ),
    invalid("listed-behind-encoded-hash", f"https://evil.example%23.cdn.example/{Q}", LISTED),
    invalid("listed-behind-underscore", f"https://evil.example_.cdn.example/{Q}", LISTED),
    invalid("listed-as-user", f"https://photos.example@evil.example/{Q}", LISTED),
    denied("listed-in-the-path", f"https://evil.example/photos.example/{Q}", LISTED),
]

SENT = [
    ok("http", f"http://photos.example/a.jpg{Q}", f"/a.jpg{Q}"),
    denied("http-when-https-is-asked-for", f"http://photos.example/a.jpg{Q}", HTTPS_ONLY),
    ok("https-when-https-is-asked-for", f"https://photos.example/a{Q}", f"/a{Q}", HTTPS_ONLY),
    ok("scheme-in-capitals", f"HTTPS://photos.example/a.jpg{Q}", f"/a.jpg{Q}"),
    ok("public-address", f"http://{PUBLIC}/a.jpg{Q}", f"/a.jpg{Q}", host=PUBLIC),
    ok("default-port-written-out", f"https://photos.example:443/a{Q}", f"/a{Q}"),
    ok("no-path", "https://photos.example", "/"),
    ok("query-without-path", f"https://photos.example{Q}", f"/{Q}"),
    ok("fragment-stays-here", f"https://photos.example/a.jpg{Q}#x@127.0.0.1", f"/a.jpg{Q}"),
    ok("fragment-without-path", "https://photos.example#/x", "/"),
    ok("longest", "http://photos.example/" + "a" * 4074, "/" + "a" * 4074),
    *(
        ok(f"kept-{name}", f"https://photos.example{sends}", sends)
        for name, sends in {
            "signature": "/o/s%2Fa.jpg?X-Amz-Signature=ab%2Fcd%3D%3D&X-Amz-Date=2026%2b1+2",
            "lower-case-escapes": "/a%2fb%c3%a4?t=%e3%d",
            "plus-and-encoded-plus": "/a+b%2Bc?x=1+2%2B3",
            "dots": "/a/../b/./c/%2e%2e/d?x=/../",
            "empty-values": "/a?&&x=&=y&",
            "double-slashes": "//a//b.jpg",
            "double-question-mark": "/a??b=?c",
            "quotes-and-pipes": "/a'b\"c|d`e^f{g}?h='<i>\"|j",
            "colon-and-at-in-path": "/user:pass@127.0.0.1/a.jpg",
            "lone-percent": "/a%?b=%zz",
        }.items()
    ),
    ok("question-mark-at-the-end", "https://photos.example/a.jpg?", "/a.jpg"),
    ok("question-mark-after-the-host", "https://photos.example?", "/"),
    ok("question-mark-before-a-fragment", "http://photos.example/a%3f.jpg?#x", "/a%3f.jpg"),
    ok("two-question-marks-at-the-end", "http://photos.example/a.jpg??", "/a.jpg??"),
    ok("question-mark-at-the-end-of-a-query", f"http://photos.example/a.jpg{Q}?", f"/a.jpg{Q}?"),
    denied("question-mark-after-a-private-address", "http://10.0.0.1/a.jpg?"),
]

ROWS = [*SPLITS, *SCHEMES, *HOSTS, *NUMBERS, *IPV6, *PORTS, *LISTS, *SENT]
