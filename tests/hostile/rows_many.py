"""The catalogue's rows for requests of many images, and of texts.

A row is data: its `id`, `fields`, the input without its `auth`, which is then signed by version 2,
and `codes`: those of its results ("OK": a vector), or the one code with which the job fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

URL = "https://images.example/scene.jpg"
ONE = {"image_url": URL}


@dataclass(frozen=True)
class Row:
    """One request."""

    id: str
    fields: dict[str, Any]
    codes: list[str] | str  # of the results, or of the job


def many(id: str, images: list[Any], codes: list[str], **more: Any) -> Row:
    """Make a request of images, each with a result of its own."""
    return Row(id, {"images": images, **more}, codes)


def texts(id: str, texts: list[Any], codes: list[str], **more: Any) -> Row:
    """Make a request of texts, each with a result of its own."""
    return Row(id, {"texts": texts, **more}, codes)


def refused(id: str, **fields: Any) -> Row:
    """Make a request that fails as a whole."""
    return Row(id, fields, "INVALID_REQUEST")


OK, BAD = "OK", "INVALID_REQUEST"
ROWS = [
    many("one-image", [ONE], [OK]),
    many("the-most-images", [ONE] * 128, [OK] * 128),
    many("the-same-image-twice", [ONE, ONE], [OK, OK]),
    many("base64", [ONE] * 3, [OK] * 3, encoding_format="base64"),
    many("own-ids", [{**ONE, "request_id": "a"}, {**ONE, "request_id": "b"}], [OK, OK]),
    many("own-normalize", [{**ONE, "normalize": False}, ONE], [OK, OK], normalize=True),
    many("a-bad-one-between-good-ones", [ONE, {"image_url": 7}, ONE], [OK, BAD, OK]),
    *[
        many(f"an-image-is-{name}", [ONE, value], [OK, BAD])
        for name, value in {
            "none": None,
            "text": URL,
            "a-number": 7,
            "a-list": [URL],
            "empty": {},
            "of-another-name": {"url": URL},
            "with-a-text": {"text": "a cat"},
            "signed-itself": {**ONE, "auth": {"ts": 1, "sig": "0" * 64}},
            "with-a-model": {**ONE, "model": "ViT-B-32"},
            "with-normalize-in-words": {**ONE, "normalize": "false"},
            "with-an-id-of-control-characters": {**ONE, "request_id": "a\nb"},
            "with-a-long-id": {**ONE, "request_id": "x" * 129},
            "nested": {"images": [ONE]},
        }.items()
    ],
    many("a-long-url", [{"image_url": URL + "x" * 5000}, ONE], ["INVALID_URL", OK]),
    texts("one-text", ["a cat"], [OK]),
    texts("many-texts", ["a cat", "a dog", "ein Hund", "犬"], [OK] * 4),
    texts("texts-in-base64", ["a cat"], [OK], encoding_format="base64"),
    texts("a-long-text", ["x" * 10_000], [OK]),
    *[
        texts(f"a-text-is-{name}", ["a cat", value], [OK, BAD])
        for name, value in {
            "none": None,
            "empty": "",
            "a-number": 7,
            "a-list": ["a cat"],
            "an-object": {"text": "a cat"},
            "too-long": "x" * 10_001,
        }.items()
    ],
    refused("no-images", images=[]),
    refused("images-are-text", images=URL),
    refused("images-are-an-object", images=ONE),
    refused("too-many-images", images=[ONE] * 129),
    refused("no-texts", texts=[]),
    refused("texts-are-text", texts="a cat"),
    refused("too-many-texts", texts=["a cat"] * 129),
    refused("a-text-that-is-a-list", text=["a cat"]),
    refused("a-text-that-is-too-long", text="x" * 10_001),
    refused("two-forms", images=[ONE], texts=["a cat"]),
    refused("an-image-and-a-text", image_url=URL, text="a cat"),
    refused("an-unknown-encoding", images=[ONE], encoding_format="float16"),
    refused("an-encoding-that-is-a-list", images=[ONE], encoding_format=["base64"]),
    refused("normalize-in-words", texts=["a cat"], normalize="false"),
    refused("an-unknown-field", texts=["a cat"], dimensions=256),
]
