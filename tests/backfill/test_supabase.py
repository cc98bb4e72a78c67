"""Signed URLs of a private bucket: any object's name, and any server in the place of Storage."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from raw_server import send, serve
from storage_standin import StorageServer

from heimdex_clip_worker.backfill import supabase
from heimdex_clip_worker.backfill.rows import BackfillError, Outage, RowError
from heimdex_clip_worker.backfill.supabase import Bucket, url_maker
from heimdex_clip_worker.remote import endpoint

pytestmark = pytest.mark.server

NAMES = [
    "what?.jpg", "a#1.jpg", "100%.jpg", "a%20b.jpg", "a%2Fb.jpg", "a%3Ftoken=x.jpg", "my photo.jpg",
    "Zoë 日本 🐈.jpg", "e\u0301.jpg", "é.jpg", "a//b.jpg", "a/../b.jpg", "a/./b.jpg", "..", "a/..",
    "?token=abc", "a?token=b.c.d?token=e", "a&b=c;d.jpg", "a+b.jpg", "a:b@c.jpg", "[1].jpg",
    "back\\slash.jpg", "quote\"'`.jpg", "tab\tline\n.jpg", "end?", "end#", "end%", "end/", " ",
    "\x7f\x01.jpg", "<a>.jpg", "a" * 900,
]  # fmt: skip


@pytest.fixture
def storage() -> Iterator[StorageServer]:
    with StorageServer() as server:
        yield server


def fetch(url: str) -> bytes:
    """GET exactly this URL, as the worker does: nothing in it is changed."""
    assert url.isascii() and url.isprintable() and " " not in url and url.count("?") == 1
    assert "#" not in url and "\\" not in url
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", url.removeprefix(f"http://{parts.netloc}"))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 200, body
    return body


def test_any_name_of_an_object_can_be_signed_and_fetched(storage):
    for n, name in enumerate(NAMES):
        storage.objects[f"scenes/{name}"] = f"picture {n}".encode(), "image/jpeg"
    bucket = Bucket(storage.url, storage.key, "scenes")
    urls = bucket.sign(NAMES)
    assert [fetch(url) for url in urls] == [f"picture {n}".encode() for n in range(len(NAMES))]
    assert storage.calls["POST sign"] == 1


def test_a_retry_signs_the_same_name_again(storage):
    storage.objects["scenes/what?#%.jpg"] = b"picture", "image/jpeg"
    bucket = Bucket(storage.url, storage.key, "scenes")
    make_url = url_maker(bucket, "what?#%.jpg", *bucket.sign(["what?#%.jpg"]))
    assert [fetch(make_url()) for _ in range(3)] == [b"picture"] * 3


def test_a_missing_object_between_others_is_a_row_error(storage):
    storage.objects["scenes/a?.jpg"] = b"a", "image/jpeg"
    names = ["gone?.jpg", "a?.jpg", "", "/", "\udcff.jpg", "/a?.jpg"]
    results = Bucket(storage.url, storage.key, "scenes").sign(names)
    assert [isinstance(r, RowError) for r in results] == [True, False, True, True, True, False]
    assert results[0].code == "MISSING_OBJECT" and fetch(results[1]) == fetch(results[5]) == b"a"


@pytest.mark.parametrize("name", ["my films", "films#1", "50%", "ü"])
def test_any_name_of_a_bucket_will_do(name):
    with StorageServer([name]) as storage:
        storage.objects[f"{name}/1.jpg"] = b"picture", "image/jpeg"
        (url,) = Bucket(storage.url, storage.key, name).sign(["1.jpg"])
        assert fetch(url) == b"picture"
        with pytest.raises(BackfillError, match="Bucket not found"):
            Bucket(storage.url, storage.key, f"{name}?").sign(["1.jpg"])


def answer(entries: object, status: str = "200 OK", head: str = "") -> bytes:
    """Encode a response of Storage."""
    body = json.dumps(entries).encode()
    lines = f"HTTP/1.1 {status}\r\nConnection: close\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    return lines.encode() + body


SIGNED = {"path": "1.jpg", "signedURL": "/object/sign/scenes/1.jpg?token=a.b.c", "error": None}


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (answer([{**SIGNED, "path": "2.jpg"}]), Outage),
        (answer([{**SIGNED, "signedURL": "/object/sign/scenes/1.jpg"}]), Outage),
        (answer([{**SIGNED, "signedURL": "/object/sign/1.jpg?token=a.b.c&x=1"}]), Outage),
        (answer([{**SIGNED, "signedURL": "/object/sign/1.jpg?token=a b"}]), Outage),
        (answer([{**SIGNED, "signedURL": 7}]), Outage),
        (answer([SIGNED, SIGNED]), Outage),
        (answer([7]), Outage),
        (answer({}), Outage),
        (answer("x"), Outage),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"[" * 100_000, Outage),
        (b"nonsense", Outage),
        (b"", Outage),
        (answer({"message": "busy"}, "503 X"), Outage),
        (answer({"statusCode": "429", "message": "slow down"}, "400 X"), Outage),
        (answer({"statusCode": "403", "message": "no such key"}, "400 X"), BackfillError),
        (answer([SIGNED], "302 X", "Location: /x\r\n"), BackfillError),
        (answer([SIGNED], "204 X"), BackfillError),
    ],
)
def test_a_wrong_answer_signs_nothing(response, kind):
    with serve(send(response)) as (port, received), pytest.raises(kind):
        Bucket(f"http://127.0.0.1:{port}", "k", "scenes").sign(["1.jpg"])
    assert all(request.startswith("POST /storage/v1/object/sign/scenes ") for request in received)


HEADS = {
    "200": b"HTTP/1.1 200 X\r\n\r\n", "302": b"HTTP/1.1 302 X\r\nLocation: /x\r\n\r\n",
    "400": b"HTTP/1.1 400 X\r\n\r\n", "500": b"HTTP/1.1 500 X\r\n\r\n",
    "chunk": b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n",
    "headers": b"HTTP/1.1 200 X\r\nX: ",
}  # fmt: skip


@pytest.mark.parametrize("pause_s", [0, 0.02], ids=["at-once", "dripped"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_response_without_an_end_is_dropped(kind, pause_s, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RESULT_BYTES", 1_000_000)
    monkeypatch.setattr(supabase, "_SIGN_S", 1.0)
    sent = Counter()

    def endless(connection) -> None:
        connection.sendall(HEADS[kind])
        while True:
            connection.sendall(b"0" if pause_s else b"0" * 65_536)
            sent["bytes"] += 65_536
            time.sleep(pause_s)

    start = time.monotonic()
    with serve(endless) as (port, received), pytest.raises((Outage, BackfillError)):
        Bucket(f"http://127.0.0.1:{port}", "k", "scenes").sign(["1.jpg"])
    assert time.monotonic() - start < 3 and len(received) == 1
    assert pause_s or sent["bytes"] < 8_000_000


def test_neither_the_key_nor_a_token_is_in_an_error():
    body = answer({"message": "x" * 5000, "statusCode": "403"}, "400 X")
    with serve(send(body)) as (port, received), pytest.raises(BackfillError) as caught:
        Bucket(f"http://127.0.0.1:{port}", "service-role-key", "scenes").sign(["1.jpg"])
    assert "service-role-key" in received[0]
    assert "service-role-key" not in repr(caught.value) and len(str(caught.value)) < 500
