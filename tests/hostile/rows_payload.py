"""The catalogue's rows for payloads: malformed jobs, with a valid signature where possible.

A row is data: its `id`, the `code` that the reply must carry ("OK": a vector), `build`, which makes
the whole job from a `Kit` of rows_auth, and the `request_id` that the reply must echo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rows_auth import Kit, nested

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Row:
    """One job."""

    id: str
    code: str
    build: Callable[[Kit], Any]  # the whole job, not only its input
    request_id: str = UNKNOWN  # what the reply must carry


def invalid(id: str, build: Callable[[Kit], Any], request_id: str = UNKNOWN) -> Row:
    """A job that must end as INVALID_REQUEST."""
    return Row(id, "INVALID_REQUEST", build, request_id)


def failed(id: str, build: Callable[[Kit], Any], request_id: str = UNKNOWN) -> Row:
    """A job that must end as AUTH_FAILED."""
    return Row(id, "AUTH_FAILED", build, request_id)


def v1(**fields: Any) -> Callable[[Kit], dict[str, Any]]:
    """Make a builder of a job signed by version 1, with more fields."""
    return lambda kit: {"id": "job", "input": kit.v1(**fields)}


def v2(**fields: Any) -> Callable[[Kit], dict[str, Any]]:
    """Make a builder of a job signed by version 2 over all its fields."""
    return lambda kit: {"id": "job", "input": kit.v2({"image_url": kit.url, **fields})}


def without(name: str) -> Callable[[Kit], dict[str, Any]]:
    """Make a builder of a version 1 job that lacks a field."""
    return lambda kit: {"input": {k: v for k, v in kit.v1().items() if k != name}}


VALUES = {
    "none": None,
    "true": True,
    "0": 0,
    "a-float": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "a-string": "job",
    "a-list": [],
    "a-list-of-objects": [{"image_url": "https://a.example/b.jpg"}],
    "bytes": b"{}",
    "a-set": {1, 2},
    "60-levels": nested(60),
    "500-levels": nested(500),
    "a-huge-integer": 10**5000,
    "a-lone-surrogate": "\ud800",
    "20-MB": "a" * 20_000_000,
}

INPUTS = [
    invalid(f"input-is-{name}", lambda kit, value=value: {"id": "job", "input": value})
    for name, value in VALUES.items()
] + [
    invalid("job-is-empty", lambda kit: {}),
    invalid("job-has-other-fields", lambda kit: {"id": "job", "Input": kit.v1()}),
    invalid("input-is-empty", lambda kit: {"id": "job", "input": {}}),
    invalid("input-of-keys-that-are-not-text", lambda kit: {"input": {1: 2, None: 3, (1, 2): 4}}),
    *[
        Row(f"job-is-{name}", "INTERNAL", lambda kit, value=value: value)  # never by the platform
        for name, value in {"none": None, "a-list": [], "a-string": "x", "a-number": 7}.items()
    ],
]

FIELDS = (
    [invalid("image-url-is-missing", without("image_url"))]
    + [
        invalid(f"image-url-is-{name}", v1(url=value, sign="x"))
        for name, value in VALUES.items()
        if name not in ("a-string", "a-lone-surrogate", "20-MB")
    ]
    + [
        invalid("image-url-is-empty", v1(url="", sign="|7")),
        Row("image-url-of-20-MB", "INVALID_URL", v1(url="https://a.example/" + "a" * 20_000_000)),
        Row("image-url-of-4097", "INVALID_URL", v1(url="https://a.example/".ljust(4097, "a"))),
        failed("image-url-with-a-lone-surrogate", v1(url="https://a.example/\ud800")),
        failed("auth-is-missing", without("auth")),
    ]
    + [
        invalid(f"normalize-is-{name}", v1(normalize=value))
        for name, value in VALUES.items()
        if name not in ("true",)
    ]
    + [invalid(f"normalize-is-{text!r}", v1(normalize=text)) for text in ("false", "true", "", "1")]
    + [
        invalid(f"model-is-{name}", v1(model=value))
        for name, value in VALUES.items()
        if name not in ("none", "a-string", "a-lone-surrogate")
    ]
    + [
        invalid("model-of-201", v1(model="m" * 201)),
        failed("auth-is-a-string", lambda kit: {"input": {**kit.v1(), "auth": "sig"}}),
        failed("auth-is-60-levels", lambda kit: {"input": {**kit.v1(), "auth": nested(60)}}),
    ]
)

BAD_IDS = {
    "129-characters": "r" * 129,
    "20-MB": "r" * 20_000_000,
    "a-line-feed": "r\nERROR forged line",
    "a-nul": "r\0",
    "an-escape": "\x1b[2J",
    "a-delete": "r\x7f",
    "c1": "r\x9b31m",
    "a-lone-surrogate": "r\ud800",
    "a-surrogate-pair-in-two": "\ud83d\ude00",
    "right-to-left-override": "r\u202egpj.exe",
    "right-to-left-isolate": "r\u2067x\u2069",
    "right-to-left-mark": "r\u200f",
    "zero-width": "r\u200bx",
    "byte-order-mark": "\ufeffr",
    "line-separator": "r\u2028x",
    "private-use": "r\ue000",
    "unassigned": "r\U000e0fff",
    "no-character": "r\uffff",
    "a-number": 7,
    "a-huge-integer": 10**5000,
    "nan": float("nan"),
    "false": False,
    "a-list": ["r"],
    "an-object": {"r": "r"},
    "60-levels": nested(60),
    "bytes": b"r",
}

IDS = [
    *[invalid(f"request-id-{name}", v1(request_id=value)) for name, value in BAD_IDS.items()],
    *[
        Row(f"request-id-fine-{name}", "OK", v1(request_id=value), value)
        for name, value in {
            "128": "r" * 128,
            "spaces": "a request",
            "korean": "요청-1",
            "emoji": "\U0001f600",
            "quotes": "\"'\\<>&{}",
            "percent": "%s%d%n {0} {}",
        }.items()
    ],
    Row("request-id-empty", "OK", v1(request_id="")),
    Row("request-id-none", "OK", v1(request_id=None)),
    Row("request-id-missing", "OK", v1()),
    invalid("request-id-bad-and-no-signature", lambda kit: {"input": {"request_id": "r\n"}}),
]

BEYOND = [
    failed("v1-unknown-field", v1(extra=1)),
    failed("v1-unknown-field-keeps-its-id", v1(extra=1, request_id="r"), "r"),
    failed("v1-images", v1(images=[{"image_url": "https://a.example"}])),
    failed("v1-key-in-capitals", v1(Normalize=False)),
    failed("v1-100-thousand-fields", lambda kit: v1(**{f"k{i}": i for i in range(100_000)})(kit)),
    failed("v1-keys-not-text", lambda kit: {"input": {**kit.v1(), 1: 2, None: 3}}),
    invalid("v2-unknown-field", v2(extra=1)),
    invalid("v2-unknown-field-keeps-its-id", v2(extra=1, request_id="r"), "r"),
    invalid("v2-8-levels", v2(extra=nested(7))),
    failed("v2-60-levels", v2(extra=nested(60))),
    failed("v2-500-levels", v2(extra=nested(500))),
    failed("v2-keys-not-text", lambda kit: {"input": {**kit.v2(), 1: 2, None: 3}}, "hostile"),
    failed("v2-nan", v2(extra=float("nan"))),
    failed("v2-20-MB", v2(extra="a" * 20_000_000)),
    failed("v2-bytes", lambda kit: {"input": {**kit.v2(), "extra": b"x"}}, "hostile"),
    invalid("v2-normalize-is-a-string", v2(normalize="false")),
    Row("v2-fine", "OK", v2(request_id="r", normalize=False, model="ViT-B-32"), "r"),
    Row("v1-another-model", "OK", v1(model="RN50\n\u202e")),
    Row("v1-a-surrogate-for-a-model", "OK", v1(model="\ud800")),
]

ROWS = [*INPUTS, *FIELDS, *IDS, *BEYOND]
