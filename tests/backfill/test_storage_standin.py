"""The stand-in for Supabase Storage, used through Supabase's own client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from storage3 import SyncStorageClient
from storage3.exceptions import StorageApiError
from storage_standin import StorageServer

pytestmark = pytest.mark.server
BODY = b"\xff\xd8\xff a photograph \r\n--with--\r\n bytes that look like a form's \xff\xd9"
JPEG = {"content-type": "image/jpeg"}


class Clock:
    """A clock that moves only when a test moves it."""

    now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def storage() -> Iterator[StorageServer]:
    with StorageServer(["scenes"], clock=Clock()) as server:
        yield server


def client(storage: StorageServer, key: str | None = None) -> SyncStorageClient:
    headers = {"Authorization": f"Bearer {key or storage.key}", "apikey": key or storage.key}
    return SyncStorageClient(f"{storage.url}/storage/v1/", headers)


@pytest.fixture
def scenes(storage: StorageServer):
    with client(storage) as connected:
        yield connected.from_("scenes")


def failure(call, *args) -> tuple[str, str, str]:
    """Call, and return status, error and message of the exception."""
    with pytest.raises(StorageApiError) as caught:
        call(*args)
    return str(caught.value.status), caught.value.code, caught.value.message


def fetch(url: str) -> requests.Response:
    with requests.Session() as http:
        http.trust_env = False
        return http.get(url, timeout=10)


def test_an_upload_is_stored_byte_for_byte(storage, scenes):
    assert scenes.upload("a/1.jpg", BODY, JPEG).full_path == "scenes/a/1.jpg"
    assert storage.objects == {"scenes/a/1.jpg": (BODY, "image/jpeg")}
    assert scenes.download("a/1.jpg") == BODY


def test_a_second_upload_is_refused_without_upsert(storage, scenes):
    scenes.upload("1.jpg", BODY, JPEG)
    assert failure(scenes.upload, "1.jpg", b"other", JPEG)[:2] == ("409", "Duplicate")
    scenes.upload("1.jpg", b"other", {**JPEG, "upsert": "true"})
    assert storage.objects["scenes/1.jpg"][0] == b"other"


def test_a_signed_url_needs_no_key_and_expires(storage, scenes):
    scenes.upload("a/my photo.jpg", BODY, JPEG)
    url = scenes.create_signed_url("a/my photo.jpg", 300)["signedURL"]
    assert fetch(url).content == BODY
    storage.clock.now += 300
    late = fetch(url)
    assert (late.status_code, late.json()["error"]) == (400, "InvalidJWT")


def test_a_signed_url_reads_only_its_own_object(storage, scenes):
    scenes.upload("1.jpg", BODY, JPEG)
    scenes.upload("2.jpg", BODY, JPEG)
    url = scenes.create_signed_url("1.jpg", 300)["signedURL"]
    assert fetch(url.replace("1.jpg", "2.jpg")).json()["error"] == "InvalidSignature"
    assert fetch(url[:-4] + "AAAA").json()["error"] == "InvalidJWT"
    assert fetch(url.partition("?")[0]).status_code == 400


def test_many_paths_are_signed_at_once_and_a_missing_object_has_an_error(scenes):
    scenes.upload("1.jpg", BODY, JPEG)
    signed, missing = scenes.create_signed_urls(["1.jpg", "2.jpg"], 300)
    assert fetch(signed["signedURL"]).content == BODY
    assert missing["signedURL"] is None and missing["error"].startswith("Either the object")


def test_a_missing_object_is_not_signed(scenes):
    missing = failure(scenes.create_signed_url, "nowhere.jpg", 300)
    assert missing == ("404", "not_found", "Object not found")


def test_a_wrong_key_is_refused(storage):
    with client(storage, "another-key") as connected:
        refused = failure(connected.from_("scenes").upload, "1.jpg", BODY, JPEG)
    assert refused[:2] == ("403", "Unauthorized") and not storage.objects


def test_a_missing_bucket_has_its_own_error(storage):
    with client(storage) as connected:
        refused = failure(connected.from_("films").upload, "1.jpg", BODY, JPEG)
    assert refused == ("404", "Bucket not found", "Bucket not found")


def test_remove_ignores_missing_objects(storage, scenes):
    scenes.upload("a/1.jpg", BODY, JPEG)
    url = scenes.create_signed_url("a/1.jpg", 300)["signedURL"]
    assert [entry["name"] for entry in scenes.remove(["a/1.jpg", "a/2.jpg"])] == ["a/1.jpg"]
    assert not storage.objects and fetch(url).status_code == 400


def test_list_shows_one_folder(scenes):
    for path in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        scenes.upload(path, BODY, JPEG)
    assert [entry["name"] for entry in scenes.list("a")] == ["1.jpg", "2.jpg"]
