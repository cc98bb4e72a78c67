"""The catalogue's rows for the selftest: unsigned requests that resemble it or hide behind it.

A row is data as in rows_payload: only `{"selftest": True}`, alone and exactly, needs no signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rows_auth import Kit, nested
from rows_payload import Row, failed, invalid

PLAIN = {"selftest": True}


class Eager(dict):
    """A dict that claims to be equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def bare(**fields: Any) -> Any:
    """Make a builder of an unsigned job with these fields."""
    return lambda kit: {"id": "job", "input": dict(fields)}


def beside(fields: Mapping[str, Any]) -> Any:
    """Make a builder of an unsigned job with the selftest and these fields."""
    return lambda kit: {"id": "job", "input": {**PLAIN, **fields}}


def signed(version: str, **fields: Any) -> Any:
    """Make a builder of a signed job with the selftest in it."""

    def build(kit: Kit) -> dict[str, Any]:
        if version == "v1":
            return {"id": "job", "input": kit.v1(**fields)}
        return {"id": "job", "input": kit.v2({"image_url": kit.url, **fields})}

    return build


VALUES = {
    "one": 1,
    "one-as-a-float": 1.0,
    "the-text-true": "true",
    "on": "on",
    "none": None,
    "false": False,
    "zero": 0,
    "a-list": [True],
    "an-object": {"selftest": True},
    "60-levels": nested(60),
    "a-huge-integer": 10**5000,
    "nan": float("nan"),
    "20-MB": "a" * 20_000_000,
}
SMUGGLED = {
    "an-image": {"image_url": "https://images.example.com/a.jpg?token=t0k3n"},
    "a-private-image": {"image_url": "http://169.254.169.254/latest/meta-data/"},
    "images": {"images": [{"image_url": "https://images.example.com/a.jpg"}]},
    "a-text": {"text": "a cat"},
    "texts": {"texts": ["a cat"]},
}
ALONE = {
    "an-empty-image": {"image_url": ""},
    "an-auth": {"auth": {}},
    "a-model": {"model": "ViT-B-32"},
    "another-photo": {"photo": "../../etc/passwd"},
    "an-encoding": {"encoding_format": "base64"},
    "a-number-for-a-key": {1: 2},
    "100-thousand-fields": {f"k{i}": i for i in range(100_000)},
}

ROWS = [
    *[invalid(f"selftest-is-{name}", bare(selftest=value)) for name, value in VALUES.items()],
    *[failed(f"selftest-and-{name}", beside(fields)) for name, fields in SMUGGLED.items()],
    *[invalid(f"selftest-and-{name}", beside(fields)) for name, fields in ALONE.items()],
    invalid("selftest-and-an-id", beside({"request_id": "r"}), "r"),
    invalid("selftest-in-capitals", bare(Selftest=True)),
    invalid("selftest-nested", lambda kit: {"input": {"input": PLAIN}}),
    invalid("selftest-beside-the-input", lambda kit: {"input": {}, **PLAIN}),
    invalid("selftest-in-a-list", lambda kit: {"input": [PLAIN]}),
    invalid("selftest-as-a-text", lambda kit: {"input": '{"selftest": true}'}),
    invalid("selftest-equal-to-all", lambda kit: {"input": Eager()}),
    failed("selftest-in-a-v1-job", signed("v1", selftest=True)),
    invalid("selftest-in-a-v2-job", signed("v2", selftest=True)),
    failed("a-v1-job-from-elsewhere", lambda kit: {"input": {**kit.v1(), **PLAIN}}),
    failed("a-v2-job-with-it-added", lambda kit: {"input": {**kit.v2(), **PLAIN}}, "hostile"),
    Row("selftest", "SELFTEST", bare(selftest=True)),
]
