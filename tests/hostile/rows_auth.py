"""The catalogue's rows for authentication: hostile jobs, and how each must end.

A row is data: its `id`, the `code` it must end with, and `build`, which makes the whole job input
from a `Kit`. The kit has the worker's settings (secrets, audience, clock), and signs with the
standard library alone. So a row can have the right signature of something that
`heimdex_clip_worker.auth` would never sign.

- `code` is how `auth.verify` must end: "AUTH_FAILED", "AUTH_EXPIRED", or "OK" for honest jobs.
- `or_else` is a second code, with which the whole handler may end if it reads the payload first.
- Every input survives `json.loads(json.dumps(...))` (Python's NaN included), so it can be posted.
- Times are 30 s away from every limit, so rows with `Kit(now=int(time.time()))` also run on the
  real clock.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

INVALID = "INVALID_REQUEST"


@dataclass(frozen=True)
class Kit:
    """The worker's settings and clock from which a row is built."""

    now: int  # Unix seconds
    url: str = "https://images.example.com/object/sign/scenes/a.jpg?token=t0k3n"
    v1_secret: str = "hostile-rows-version-one"
    keys: Mapping[str, str] = field(
        default_factory=lambda: {
            "2026-11": "hostile-rows-new-key",
            "2026-08": "hostile-rows-old-key",
        }
    )
    audience: str = "heimdex-clip"
    window_s: int = 120
    max_lifetime_s: int = 3600

    def mac(self, message: str, secret: str | None = None) -> str:
        """Compute the HMAC-SHA256 of `message` in hex, with version 1's secret by default."""
        key = (self.v1_secret if secret is None else secret).encode()
        return hmac.new(key, message.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def v1(
        self,
        *,
        url: Any = ...,
        ts: Any = ...,
        secret: str | None = None,
        sign: Any = ...,
        **fields: Any,
    ) -> dict[str, Any]:
        """Make a version 1 job. `sign` is signed in place of the URL, a bar and the time."""
        url = self.url if url is ... else url
        ts = self.now if ts is ... else ts
        message = f"{url}|{ts}" if sign is ... else sign
        return {"image_url": url, **fields, "auth": {"ts": ts, "sig": self.mac(message, secret)}}

    def v1_auth(self, **changes: Any) -> dict[str, Any]:
        """Make a version 1 job and change its `auth` after signing; `...` removes a field."""
        return changed(self.v1(), changes)

    def v2(
        self, body: dict[str, Any] | None = None, *, secret: str | None = None, **claims: Any
    ) -> dict[str, Any]:
        """Make a version 2 job, rightly signed over `claims`; `audience` and `tag` are not sent."""
        body = {"image_url": self.url, "request_id": "hostile"} if body is None else body
        claims = {
            "kid": "2026-11", "ts": self.now, "exp": self.now + 900, "nonce": "n" * 24, **claims,
        }  # fmt: skip
        tag = claims.pop("tag", "CLIPW-HMAC-SHA256-V2")
        audience = claims.pop("audience", self.audience)
        if secret is None:
            secret = {**self.keys, "v1": self.v1_secret}.get(str(claims["kid"]), "")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        lines = [
            tag,
            audience,
            *(str(claims[name]) for name in ("kid", "ts", "exp", "nonce")),
            digest,
        ]
        return {**body, "auth": {"v": 2, **claims, "sig": self.mac("\n".join(lines), secret)}}

    def v2_auth(self, **changes: Any) -> dict[str, Any]:
        """Make a version 2 job and change its `auth` after signing; `...` removes a field."""
        return changed(self.v2(), changes)


def changed(job: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Change the `auth` of a job; `...` removes a field."""
    auth = {**job["auth"], **changes}
    return {**job, "auth": {name: value for name, value in auth.items() if value is not ...}}


@dataclass(frozen=True)
class Row:
    """One hostile (or honest) job."""

    id: str
    code: str  # how verify must end; "OK": accepted
    build: Callable[[Kit], Any]  # the whole job input
    or_else: str = ""  # with which the handler may end instead, if it reads the payload first


def nested(levels: int) -> list[Any]:
    """Nest `levels` lists."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def flipped(sig: str) -> str:
    """Change the last bit of `sig`."""
    return sig[:-1] + format(int(sig[-1], 16) ^ 1, "x")


def failed(id: str, build: Callable[[Kit], Any], or_else: str = "") -> Row:
    """Make a row that must end as AUTH_FAILED."""
    return Row(id, "AUTH_FAILED", build, or_else)


def expired(id: str, build: Callable[[Kit], Any]) -> Row:
    """Make a row that must end as AUTH_EXPIRED: the signature is right, its time is not."""
    return Row(id, "AUTH_EXPIRED", build)


def honest(id: str, build: Callable[[Kit], Any]) -> Row:
    """Make a row that must be accepted."""
    return Row(id, "OK", build)


HONEST = [
    honest("v1-honest", lambda kit: kit.v1()),
    honest(
        "v1-honest-with-every-field",
        lambda kit: kit.v1(request_id="r", normalize=False, model="ViT-B-32"),
    ),
    honest("v1-honest-a-minute-ago", lambda kit: kit.v1(ts=kit.now - 60)),
    honest("v1-honest-clock-ahead", lambda kit: kit.v1(ts=kit.now + 60)),
    honest("v1-honest-url-with-a-bar", lambda kit: kit.v1(url=kit.url + "&a=|7|8")),
    honest("v2-honest", lambda kit: kit.v2()),
    honest("v2-honest-older-key", lambda kit: kit.v2(kid="2026-08")),
    honest("v2-honest-with-the-v1-secret", lambda kit: kit.v2(kid="v1")),
    honest(
        "v2-honest-after-50-minutes-in-a-queue",
        lambda kit: kit.v2(ts=kit.now - 3000, exp=kit.now + 500),
    ),
    honest(
        "v2-honest-auth-in-any-order",
        lambda kit: changed(kit.v2(), dict(reversed(kit.v2()["auth"].items()))),
    ),
]

SHAPE = [
    failed("input-null", lambda kit: None, INVALID),
    failed("input-true", lambda kit: True, INVALID),
    failed("input-a-list", lambda kit: [kit.v1()], INVALID),
    failed("input-json-in-a-string", lambda kit: json.dumps(kit.v1()), INVALID),
    failed("input-empty", lambda kit: {}, INVALID),
    failed("auth-missing", lambda kit: {"image_url": kit.url}),
    failed("auth-null", lambda kit: {"image_url": kit.url, "auth": None}),
    failed("auth-true", lambda kit: {"image_url": kit.url, "auth": True}),
    failed("auth-a-list", lambda kit: {"image_url": kit.url, "auth": [kit.v1()["auth"]]}),
    failed(
        "auth-a-list-of-pairs",
        lambda kit: {"image_url": kit.url, "auth": [list(p) for p in kit.v1()["auth"].items()]},
    ),
    failed(
        "auth-json-in-a-string",
        lambda kit: {"image_url": kit.url, "auth": json.dumps(kit.v1()["auth"])},
    ),
    failed(
        "auth-the-signature-alone",
        lambda kit: {"image_url": kit.url, "auth": kit.v1()["auth"]["sig"]},
    ),
    failed("auth-empty", lambda kit: {"image_url": kit.url, "auth": {}}),
    failed(
        "auth-inside-auth", lambda kit: {"image_url": kit.url, "auth": {"auth": kit.v1()["auth"]}}
    ),
    failed("auth-at-the-top-level", lambda kit: {"image_url": kit.url, **kit.v1()["auth"]}),
    failed("auth-under-another-case", lambda kit: {"image_url": kit.url, "Auth": kit.v1()["auth"]}),
    failed(
        "auth-a-hundred-thousand-keys",
        lambda kit: {"image_url": kit.url, "auth": {f"k{i}": 0 for i in range(100_000)}},
        INVALID,
    ),
    failed(
        "auth-60-levels-deep",
        lambda kit: {"image_url": kit.url, "auth": {"ts": nested(60), "sig": ""}},
        INVALID,
    ),
    failed("v1-no-ts", lambda kit: kit.v1_auth(ts=...)),
    failed("v1-no-sig", lambda kit: kit.v1_auth(sig=...)),
    failed("v1-one-key-more", lambda kit: kit.v1_auth(debug=True)),
    failed("v1-says-it-is-1", lambda kit: kit.v1_auth(v=1)),
]

V1_TIME = [
    expired("v1-five-minutes-old", lambda kit: kit.v1(ts=kit.now - 300)),
    expired("v1-five-minutes-ahead", lambda kit: kit.v1(ts=kit.now + 300)),
    expired("v1-time-in-milliseconds", lambda kit: kit.v1(ts=kit.now * 1000)),
    expired("v1-time-zero", lambda kit: kit.v1(ts=0)),
    expired("v1-largest-time", lambda kit: kit.v1(ts=2**53 - 1)),
    failed("v1-old-and-forged", lambda kit: kit.v1(ts=kit.now - 300, secret="not the secret")),
    failed("v1-old-moved-to-now", lambda kit: changed(kit.v1(ts=kit.now - 300), {"ts": kit.now})),
    failed("v1-ts-true", lambda kit: kit.v1(ts=True)),
    failed("v1-ts-true-signed-as-1", lambda kit: kit.v1(ts=True, sign=f"{kit.url}|1")),
    failed("v1-ts-a-float", lambda kit: kit.v1(ts=float(kit.now))),
    failed(
        "v1-ts-a-float-signed-as-int",
        lambda kit: kit.v1(ts=float(kit.now), sign=f"{kit.url}|{kit.now}"),
    ),
    failed("v1-ts-a-string", lambda kit: kit.v1(ts=str(kit.now))),
    failed("v1-ts-nan", lambda kit: kit.v1(ts=float("nan"))),
    failed("v1-ts-1e400", lambda kit: kit.v1(ts=1e400)),
    failed("v1-ts-minus-1e400", lambda kit: kit.v1(ts=-1e400)),
    failed("v1-ts-400-digits", lambda kit: kit.v1(ts=10**400)),
    failed("v1-ts-beyond-2-to-53", lambda kit: kit.v1(ts=2**53)),
    failed("v1-ts-negative", lambda kit: kit.v1(ts=-1)),
    failed("v1-ts-null", lambda kit: kit.v1(ts=None)),
    failed("v1-ts-a-list", lambda kit: kit.v1(ts=[kit.now])),
    failed("v1-ts-an-object", lambda kit: kit.v1(ts={"ts": kit.now})),
]

V1_SIG = [
    failed("v1-sig-upper-case", lambda kit: kit.v1_auth(sig=kit.v1()["auth"]["sig"].upper())),
    failed("v1-sig-last-bit", lambda kit: kit.v1_auth(sig=flipped(kit.v1()["auth"]["sig"]))),
    failed("v1-sig-63-digits", lambda kit: kit.v1_auth(sig=kit.v1()["auth"]["sig"][:63])),
    failed("v1-sig-65-digits", lambda kit: kit.v1_auth(sig=kit.v1()["auth"]["sig"] + "0")),
    failed("v1-sig-line-break", lambda kit: kit.v1_auth(sig=kit.v1()["auth"]["sig"] + "\n")),
    failed("v1-sig-space-before", lambda kit: kit.v1_auth(sig=" " + kit.v1()["auth"]["sig"])),
    failed("v1-sig-0x", lambda kit: kit.v1_auth(sig="0x" + kit.v1()["auth"]["sig"])),
    failed(
        "v1-sig-sha256-prefix", lambda kit: kit.v1_auth(sig="sha256=" + kit.v1()["auth"]["sig"])
    ),
    failed("v1-sig-nul-at-end", lambda kit: kit.v1_auth(sig=kit.v1()["auth"]["sig"] + "\0")),
    failed("v1-sig-fullwidth-digits", lambda kit: kit.v1_auth(sig="０" * 64)),
    failed("v1-sig-arabic-digits", lambda kit: kit.v1_auth(sig="٣" * 64)),
    failed("v1-sig-lone-surrogates", lambda kit: kit.v1_auth(sig="\ud800" * 64), INVALID),
    failed("v1-sig-not-hex", lambda kit: kit.v1_auth(sig="g" * 64)),
    failed("v1-sig-zeros", lambda kit: kit.v1_auth(sig="0" * 64)),
    failed("v1-sig-empty", lambda kit: kit.v1_auth(sig="")),
    failed("v1-sig-null", lambda kit: kit.v1_auth(sig=None)),
    failed("v1-sig-true", lambda kit: kit.v1_auth(sig=True)),
    failed("v1-sig-a-number", lambda kit: kit.v1_auth(sig=int(kit.v1()["auth"]["sig"], 16))),
    failed("v1-sig-a-list", lambda kit: kit.v1_auth(sig=[kit.v1()["auth"]["sig"]])),
    failed("v1-sig-list-of-64", lambda kit: kit.v1_auth(sig=list(kit.v1()["auth"]["sig"]))),
    failed("v1-sig-a-megabyte", lambda kit: kit.v1_auth(sig="a" * 1_000_000), INVALID),
]

V1_FORGED = [
    failed("v1-other-secret", lambda kit: kit.v1(secret="not the secret")),
    failed("v1-empty-secret", lambda kit: kit.v1(secret="")),
    failed("v1-secret-with-line-break", lambda kit: kit.v1(secret=kit.v1_secret + "\n")),
    failed("v1-signed-with-a-v2-key", lambda kit: kit.v1(secret=kit.keys["2026-11"])),
    failed(
        "v1-plain-sha256",
        lambda kit: kit.v1_auth(sig=hashlib.sha256(f"{kit.url}|{kit.now}".encode()).hexdigest()),
    ),
    failed(
        "v1-plain-sha256-with-secret",
        lambda kit: kit.v1_auth(
            sig=hashlib.sha256(f"{kit.v1_secret}{kit.url}|{kit.now}".encode()).hexdigest()
        ),
    ),
    failed(
        "v1-other-url",
        lambda kit: {**kit.v1(), "image_url": "http://169.254.169.254/latest/meta-data"},
    ),
    failed(
        "v1-url-of-another-file",
        lambda kit: {**kit.v1(), "image_url": kit.url.replace("a.jpg", "b.jpg")},
    ),
    failed(
        "v1-url-percent-encoded-after",
        lambda kit: {**kit.v1(), "image_url": kit.url.replace("a.jpg", "%61.jpg")},
    ),
    failed(
        "v1-url-upper-case-host",
        lambda kit: {**kit.v1(), "image_url": kit.url.replace("https", "HTTPS")},
    ),
    failed("v1-url-space-after", lambda kit: {**kit.v1(), "image_url": kit.url + " "}),
    failed(
        "v1-separator-moved",
        lambda kit: kit.v1(url=kit.url + "|1", ts=kit.now, sign=f"{kit.url}|1{kit.now}"),
    ),
    failed("v1-signed-without-separator", lambda kit: kit.v1(sign=f"{kit.url}{kit.now}")),
    failed("v1-signed-time-first", lambda kit: kit.v1(sign=f"{kit.now}|{kit.url}")),
    failed("v1-signed-with-line-break", lambda kit: kit.v1(sign=f"{kit.url}|{kit.now}\n")),
    failed("v1-url-a-list", lambda kit: kit.v1(url=[kit.url]), INVALID),
    failed("v1-url-an-object", lambda kit: kit.v1(url={"url": kit.url}), INVALID),
    failed("v1-url-a-number", lambda kit: kit.v1(url=7), INVALID),
    failed("v1-url-null", lambda kit: kit.v1(url=None), INVALID),
    failed("v1-url-missing", lambda kit: {"auth": kit.v1(url=None)["auth"]}, INVALID),
    failed("v1-url-lone-surrogate", lambda kit: kit.v1(url=kit.url + "\ud800"), INVALID),
    failed(
        "v1-url-two-megabytes",
        lambda kit: kit.v1(url="https://a.example/" + "a" * 2_000_000),
        INVALID,
    ),
    failed(
        "v1-asks-for-many-images",
        lambda kit: kit.v1(images=[{"image_url": kit.url}] * 128),
        INVALID,
    ),
    failed("v1-asks-for-text", lambda kit: kit.v1(text="a cat"), INVALID),
    failed("v1-unknown-field", lambda kit: kit.v1(priority=9), INVALID),
    failed("v1-unknown-field-null", lambda kit: kit.v1(images=None), INVALID),
    failed("v1-unknown-field-and-old", lambda kit: kit.v1(ts=kit.now - 300, priority=9), INVALID),
    failed(
        "v1-a-hundred-thousand-fields",
        lambda kit: kit.v1(**{f"k{i}": 0 for i in range(100_000)}),
        INVALID,
    ),
]

V2_SHAPE = [
    *(
        failed(f"v2-no-{name}", lambda kit, name=name: kit.v2_auth(**{name: ...}))
        for name in ("v", "kid", "ts", "exp", "nonce", "sig")
    ),
    failed("v2-one-key-more", lambda kit: kit.v2_auth(alg="none")),
    *(
        failed(f"v2-v-{name}", lambda kit, value=value: kit.v2_auth(v=value))
        for name, value in {
            "true": True,
            "2.0": 2.0,
            "text": "2",
            "1": 1,
            "3": 3,
            "null": None,
            "list": [2],
        }.items()
    ),
    *(
        failed(
            f"v2-kid-{name}", lambda kit, value=value: kit.v2(kid=value, secret=kit.keys["2026-11"])
        )
        for name, value in {
            "empty": "",
            "65-long": "k" * 65,
            "line-break": "2026-11\n",
            "two-lines": "2026-11\n1",
            "a-space": "2026 11",
            "not-ascii": "２０２６-11",
            "null": None,
            "a-number": 2026,
            "a-list": ["2026-11"],
            "an-object": {"a": 1},
            "a-path": "../../dev/null",
        }.items()
    ),
    *(
        failed(f"v2-nonce-{name}", lambda kit, value=value: kit.v2(nonce=value))
        for name, value in {
            "empty": "",
            "15-long": "n" * 15,
            "65-long": "n" * 65,
            "line-break": "n" * 24 + "\n",
            "a-dot": "n" * 24 + ".",
            "not-ascii": "é" * 24,
            "null": None,
            "a-number": 10**20,
            "a-list": ["n" * 24],
        }.items()
    ),
    failed(
        "v2-kid-lone-surrogate",
        lambda kit: kit.v2(kid="\ud800", secret=kit.keys["2026-11"]),
        INVALID,
    ),
    failed("v2-nonce-of-20-MB", lambda kit: kit.v2(nonce="n" * 20_000_000), INVALID),
    *(
        failed(f"v2-ts-{name}", lambda kit, value=value: kit.v2(ts=value))
        for name, value in {
            "true": True,
            "text": "1764000000",
            "nan": float("nan"),
            "1e400": 1e400,
            "400-digits": 10**400,
            "negative": -1,
            "null": None,
        }.items()
    ),
    failed("v2-ts-a-float", lambda kit: kit.v2(ts=float(kit.now))),
    failed("v2-exp-a-float", lambda kit: kit.v2(exp=float(kit.now + 900))),
    *(
        failed(f"v2-exp-{name}", lambda kit, value=value: kit.v2(exp=value))
        for name, value in {
            "text": "1764000900",
            "nan": float("nan"),
            "1e400": 1e400,
            "400-digits": 10**400,
            "null": None,
            "a-list": [],
        }.items()
    ),
    failed("v2-sig-upper-case", lambda kit: kit.v2_auth(sig=kit.v2()["auth"]["sig"].upper())),
    failed("v2-sig-line-break", lambda kit: kit.v2_auth(sig=kit.v2()["auth"]["sig"] + "\n")),
    failed("v2-sig-null", lambda kit: kit.v2_auth(sig=None)),
    failed("v2-sig-fullwidth-digits", lambda kit: kit.v2_auth(sig="０" * 64)),
    failed("v2-sig-zeros", lambda kit: kit.v2_auth(sig="0" * 64)),
    failed("v2-sig-last-bit", lambda kit: kit.v2_auth(sig=flipped(kit.v2()["auth"]["sig"]))),
]

V2_TIME = [
    expired("v2-expired-five-minutes-ago", lambda kit: kit.v2(ts=kit.now - 600, exp=kit.now - 300)),
    expired(
        "v2-signed-five-minutes-ahead", lambda kit: kit.v2(ts=kit.now + 300, exp=kit.now + 900)
    ),
    expired("v2-in-milliseconds", lambda kit: kit.v2(ts=kit.now * 1000, exp=kit.now * 1000 + 900)),
    failed(
        "v2-expired-and-forged",
        lambda kit: kit.v2(ts=kit.now - 600, exp=kit.now - 300, secret="not the secret"),
    ),
    failed("v2-exp-put-off-after-signing", lambda kit: kit.v2_auth(exp=kit.now + 1200)),
    failed("v2-ts-changed-after-signing", lambda kit: kit.v2_auth(ts=kit.now - 1)),
    failed("v2-nonce-changed-after-signing", lambda kit: kit.v2_auth(nonce="m" * 24)),
    failed("v2-good-for-a-day", lambda kit: kit.v2(exp=kit.now + 86_400)),
    failed("v2-good-for-ever", lambda kit: kit.v2(exp=2**53 - 1)),
    failed("v2-exp-is-ts", lambda kit: kit.v2(exp=kit.now)),
    failed("v2-exp-before-ts", lambda kit: kit.v2(ts=kit.now + 30, exp=kit.now - 30)),
]

V2_FORGED = [
    failed("v2-other-secret", lambda kit: kit.v2(secret="not the secret")),
    failed("v2-empty-secret", lambda kit: kit.v2(secret="")),
    failed("v2-signed-with-another-kids-key", lambda kit: kit.v2(secret=kit.keys["2026-08"])),
    failed("v2-renamed-to-another-kid", lambda kit: kit.v2_auth(kid="2026-08")),
    failed("v2-unknown-kid", lambda kit: kit.v2(kid="2020-01", secret=kit.keys["2026-11"])),
    failed("v2-unknown-kid-empty-key", lambda kit: kit.v2(kid="2020-01", secret="")),
    failed("v2-unknown-kid-stand-in-key", lambda kit: kit.v2(kid="2020-01", secret="no-such-key")),
    failed("v2-unknown-kid-none-as-key", lambda kit: kit.v2(kid="2020-01", secret="None")),
    failed("v2-kid-named-like-a-method", lambda kit: kit.v2(kid="__class__", secret="")),
    failed("v2-other-audience", lambda kit: kit.v2(audience="heimdex-clip-staging")),
    failed("v2-no-audience", lambda kit: kit.v2(audience="")),
    failed("v2-other-tag", lambda kit: kit.v2(tag="CLIPW-HMAC-SHA256-V1")),
    failed("v2-url-changed", lambda kit: {**kit.v2(), "image_url": kit.url + "&width=1"}),
    failed("v2-normalize-added", lambda kit: {**kit.v2(), "normalize": False}),
    failed(
        "v2-field-taken-away", lambda kit: {k: v for k, v in kit.v2().items() if k != "request_id"}
    ),
    failed("v2-request-id-changed", lambda kit: {**kit.v2(), "request_id": "other"}),
    failed("v2-null-field-added", lambda kit: {**kit.v2(), "normalize": None}, INVALID),
    failed(
        "v2-true-became-1",
        lambda kit: {**kit.v2({"image_url": kit.url, "normalize": True}), "normalize": 1},
        INVALID,
    ),
    failed(
        "v2-image-added-to-the-list",
        lambda kit: {
            **kit.v2({"images": [{"image_url": kit.url}]}),
            "images": [{"image_url": kit.url}] * 2,
        },
        INVALID,
    ),
    failed(
        "v2-images-in-another-order",
        lambda kit: {
            **kit.v2({"images": [{"image_url": kit.url}, {"image_url": kit.url + "2"}]}),
            "images": [{"image_url": kit.url + "2"}, {"image_url": kit.url}],
        },
        INVALID,
    ),
    failed(
        "v2-precomposed-became-combining",
        lambda kit: {
            **kit.v2({"image_url": kit.url, "request_id": "\u00e9"}),
            "request_id": "e\u0301",
        },
        INVALID,
    ),
    failed(
        "v2-of-another-job",
        lambda kit: {**kit.v2(), "auth": kit.v2({"image_url": kit.url})["auth"]},
    ),
    failed("v2-cut-down-to-v1", lambda kit: kit.v2_auth(v=..., kid=..., exp=..., nonce=...)),
    failed(
        "v2-made-from-v1", lambda kit: changed(kit.v2(kid="v1"), {"sig": kit.v1()["auth"]["sig"]})
    ),
    failed(
        "v1-message-shaped-like-v2",
        lambda kit: changed(
            kit.v2(kid="v1"),
            {"sig": kit.mac(f"CLIPW-HMAC-SHA256-V2\n{kit.audience}\nv1\n{kit.now}\n1|{kit.now}")},
        ),
    ),
]

V2_BODY = [
    failed(
        f"v2-body-{name}",
        lambda kit, value=value: kit.v2({"image_url": kit.url, "x": value}),
        INVALID,
    )
    for name, value in {
        "a-float": 0.5,
        "a-whole-float": 1.0,
        "nan": float("nan"),
        "1e400": 1e400,
        "2-to-53": 2**53,
        "minus-2-to-53": -(2**53),
        "400-digits": 10**400,
        "lone-surrogate": "\ud800",
        "key-not-ascii": {"é": 1},
        "key-lone-surrogate": {"\ud800": 1},
        "9-levels": nested(8),
        "60-levels": nested(60),
        "5000-numbers": [0] * 5000,
        "5000-empty-lists": [[]] * 5000,
    }.items()
] + [
    failed(
        "v2-body-over-a-megabyte",
        lambda kit: kit.v2({"image_url": kit.url, "x": "a" * 1_100_000}),
        INVALID,
    ),
    failed(
        "v2-body-over-a-megabyte-in-utf-8",
        lambda kit: kit.v2({"image_url": kit.url, "x": "é" * 600_000}),
        INVALID,
    ),
    failed(
        "v2-body-of-20-MB",
        lambda kit: kit.v2({"image_url": kit.url, "x": "a" * 20_000_000}),
        INVALID,
    ),
    failed(
        "v2-body-a-million-numbers",
        lambda kit: kit.v2({"image_url": kit.url, "x": [0] * 1_000_000}),
        INVALID,
    ),
    failed(
        "v2-body-200-thousand-keys",
        lambda kit: kit.v2({"image_url": kit.url, "x": {str(i): 0 for i in range(200_000)}}),
        INVALID,
    ),
    failed(
        "v2-body-a-hundred-thousand-fields",
        lambda kit: kit.v2({"image_url": kit.url, **{f"k{i}": 0 for i in range(100_000)}}),
        INVALID,
    ),
]

ROWS = [*HONEST, *SHAPE, *V1_TIME, *V1_SIG, *V1_FORGED, *V2_SHAPE, *V2_TIME, *V2_FORGED, *V2_BODY]
