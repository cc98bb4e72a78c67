"""The worker's local server, asked with nothing but openssl and curl."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from local_worker import SECRET, PhotoServer, WorkerProcess, free_port, local_server, plain_env
from seeded import hub_env

MISSING = [tool for tool in ("openssl", "curl") if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")

ASK = r"""
set -eu
ts=$(( $(date +%s) + SHIFT ))
sig=$(printf '%s' "$IMAGE_URL|$ts" | openssl dgst -sha256 -hmac "$SECRET" -r | cut -d' ' -f1)
curl -sS --noproxy '*' --max-time 30 -H 'Content-Type: application/json' "$WORKER/runsync" -d "{
  \"input\": {
    \"$FIELD\": \"$IMAGE_URL\",
    \"request_id\": \"scene-abc-123\",
    \"auth\": {\"ts\": $ts, \"sig\": \"$sig\"}
  }
}"
"""
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 200_000  # MAX_IMAGE_SIZE_BYTES of the worker here
Ask = Callable[..., dict]


@pytest.fixture(scope="module")
def photos() -> Iterator[PhotoServer]:
    with PhotoServer(large_bytes=LIMIT + 1) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, str]]:
    """One worker for all of this module: the real handler, seeded weights for the tag `openai`."""
    home = tmp_path_factory.mktemp("local")
    limits = {"MAX_IMAGE_SIZE_BYTES": str(LIMIT), "IMAGE_DOWNLOAD_TIMEOUT": "1.5"}
    with local_server(plain_env(home, **hub_env(home), **limits)) as started:
        yield started


@pytest.fixture
def ask(server: tuple[WorkerProcess, str]) -> Ask:
    def ask(url: str, *, shift: int = 0, secret: str = SECRET, field: str = "image_url") -> dict:
        """Sign with openssl, send with curl, return what came back."""
        env = plain_env(server[0].home, WORKER=server[1], IMAGE_URL=url)
        env |= {"SHIFT": str(shift), "SECRET": secret, "FIELD": field}
        done = subprocess.run(
            ["sh", "-c", ASK], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_a_request_signed_by_openssl_is_answered(ask: Ask, photos: PhotoServer):
    said = ask(photos.photo(query="token=abc&download=1"))
    assert said["status"] == "COMPLETED", said
    output = said["output"]
    embedding, timings = output.pop("embedding"), output.pop("timings")
    assert re.fullmatch("[0-9a-f]{16}", output.pop("space_id"))
    assert output == {
        "request_id": "scene-abc-123",
        "dim": 512,
        "model": "ViT-B-32",
        "pretrained": "openai",
        "normalized": True,
    }
    assert len(embedding) == 512
    assert math.hypot(*embedding) == pytest.approx(1, abs=1e-5)
    assert {"download_ms", "inference_ms", "total_ms"} <= timings.keys()


def failure(said: dict) -> str:
    """Return the message of a failed job; this server tells nothing else of it."""
    assert said.keys() == {"id", "status", "error"} and said["status"] == "FAILED", said
    return said["error"]


@pytest.mark.parametrize(
    "wrong",
    [{"secret": "a-secret-that-is-not-the-worker's"}, {"shift": -180}, {"shift": 180}],
    ids=["wrong-signature", "old", "from-the-future"],
)
def test_a_request_that_is_not_authentic_is_refused_unread(ask: Ask, photos: PhotoServer, wrong):
    before = photos.hits.total()
    assert failure(ask(photos.photo(), **wrong)) == "Authentication failed"
    assert photos.hits.total() == before


def test_a_request_inside_the_window_is_answered(ask: Ask, photos: PhotoServer):
    assert ask(photos.photo(), shift=-100)["status"] == "COMPLETED"


def test_a_missing_image_url_is_named(ask: Ask, photos: PhotoServer):
    assert failure(ask(photos.photo(), field="image")) == "Missing required field: image_url"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "HTTP 404"),
        ("/page", "Unsupported image format"),
        ("/truncated.jpg", "Image could not be decoded"),
        ("/endless", "Timeout"),
    ],
)
def test_a_bad_answer_is_an_error_with_its_reason(ask: Ask, photos: PhotoServer, path, reason):
    before = photos.hits[path]
    assert failure(ask(photos.url + path)) == f"Image download failed: {reason}"
    assert photos.hits[path] == before + 1


def test_a_file_over_the_limit_is_refused_with_both_numbers(ask: Ask, photos: PhotoServer):
    message = failure(ask(photos.url + "/large.jpg"))
    numbers = [int(re.sub(r"\D", "", found)) for found in re.findall(r"\d[\d,  ]*\d", message)]
    assert message.startswith("Image download failed: ") and numbers == [LIMIT + 1, LIMIT], message


def test_an_unreachable_host_is_an_error(ask: Ask):
    said = ask(f"http://127.0.0.1:{free_port()}/a.jpg")
    assert failure(said) == "Image download failed: Connection failed"


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "0.0.0.0"])
def test_a_host_that_is_not_public_is_refused(ask: Ask, host: str):
    said = ask(f"http://{host}/a.jpg")
    assert failure(said) == "Image download failed: URL not allowed"


def test_the_log_tells_all_of_it_and_no_secret(server, ask: Ask, photos: PhotoServer):
    worker, _ = server
    ask(photos.photo(query="token=query-token-in-no-log"))
    ask(f"{photos.url}/missing?token=query-token-in-no-log")
    worker.wait_for_log("SOURCE_HTTP")
    assert "[INFO] Image downloaded successfully: (451, 300)" in worker.stderr
    for secret in (SECRET, "query-token-in-no-log", "token=", "Traceback"):
        assert secret not in worker.output


def test_the_hubs_test_passes_without_a_signature(server: tuple[WorkerProcess, str]) -> None:
    [case] = json.loads((ROOT / ".runpod" / "tests.json").read_text(encoding="utf-8"))["tests"]
    reply = requests.post(f"{server[1]}/runsync", json={"input": case["input"]}, timeout=30).json()

    assert (reply["status"], reply["output"]["selftest"]) == ("COMPLETED", "ok")
    assert reply["output"]["cosine"] > 0.999 and "embedding" not in reply["output"]
