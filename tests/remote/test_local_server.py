"""The worker's local server, and requests that are made with openssl and curl alone."""

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
from local_worker import (
    SECRET,
    PhotoServer,
    WorkerProcess,
    free_port,
    local_server,
    plain_env,
    vector_and_timings,
)
from seeded import hub_env

MISSING = [tool for tool in ("openssl", "curl") if not shutil.which(tool)]
pytestmark = [
    pytest.mark.model,
    pytest.mark.process,
    pytest.mark.server,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]

SEND = r"""
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
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200_000  # MAX_IMAGE_SIZE_BYTES of the worker here
Send = Callable[..., dict]


@pytest.fixture(scope="module")
def photos() -> Iterator[PhotoServer]:
    with PhotoServer(large_bytes=LIMIT + 1) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, str]]:
    """One worker for the whole module: the real handler, with seeded weights for `openai`."""
    home = tmp_path_factory.mktemp("local")
    limits = {"MAX_IMAGE_SIZE_BYTES": str(LIMIT), "IMAGE_DOWNLOAD_TIMEOUT": "1.5"}
    with local_server(plain_env(home, **hub_env(home), **limits)) as started:
        yield started


@pytest.fixture
def send(server: tuple[WorkerProcess, str]) -> Send:
    def send(url: str, *, shift: int = 0, secret: str = SECRET, field: str = "image_url") -> dict:
        """Sign with openssl, send with curl, and return the job."""
        env = plain_env(server[0].home, WORKER=server[1], IMAGE_URL=url)
        env |= {"SHIFT": str(shift), "SECRET": secret, "FIELD": field}
        done = subprocess.run(
            ["sh", "-c", SEND], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return send


def test_a_request_signed_by_openssl_gets_a_vector(send: Send, photos: PhotoServer):
    job = send(photos.photo(query="token=abc&download=1"))
    assert job["status"] == "COMPLETED", job
    embedding, timings = vector_and_timings(job["output"], "scene-abc-123")
    assert len(embedding) == 512
    assert math.hypot(*embedding) == pytest.approx(1, abs=1e-5)
    assert {"download_ms", "inference_ms", "total_ms"} <= timings.keys()


def failure(job: dict) -> str:
    """Take the message out of a failed job, which holds nothing else on this server."""
    assert job.keys() == {"id", "status", "error"} and job["status"] == "FAILED", job
    return job["error"]


@pytest.mark.parametrize(
    "wrong",
    [{"secret": "a-secret-that-is-not-the-worker's"}, {"shift": -180}, {"shift": 180}],
    ids=["wrong-signature", "old", "from-the-future"],
)
def test_an_unauthenticated_request_triggers_no_download(send: Send, photos: PhotoServer, wrong):
    before = photos.hits.total()
    assert failure(send(photos.photo(), **wrong)) == "Authentication failed"
    assert photos.hits.total() == before


def test_a_request_inside_the_time_window_gets_a_vector(send: Send, photos: PhotoServer):
    assert send(photos.photo(), shift=-100)["status"] == "COMPLETED"


def test_a_missing_image_url_is_named_in_the_error(send: Send, photos: PhotoServer):
    assert failure(send(photos.photo(), field="image")) == "Missing required field: image_url"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "HTTP 404"),
        ("/page", "Unsupported image format"),
        ("/truncated.jpg", "Image could not be decoded"),
        ("/endless", "Timeout"),
    ],
)
def test_a_bad_image_is_an_error_with_its_reason(send: Send, photos: PhotoServer, path, reason):
    before = photos.hits[path]
    assert failure(send(photos.url + path)) == f"Image download failed: {reason}"
    assert photos.hits[path] == before + 1


def test_a_file_over_the_limit_is_refused_naming_both_sizes(send: Send, photos: PhotoServer):
    message = failure(send(photos.url + "/large.jpg"))
    numbers = [int(re.sub(r"\D", "", text)) for text in re.findall(r"\d[\d,  ]*\d", message)]
    assert message.startswith("Image download failed: ") and numbers == [LIMIT + 1, LIMIT], message


def test_an_unreachable_host_is_an_error(send: Send):
    job = send(f"http://127.0.0.1:{free_port()}/a.jpg")
    assert failure(job) == "Image download failed: Connection failed"


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "0.0.0.0"])
def test_a_host_that_is_not_public_is_refused(send: Send, host: str):
    job = send(f"http://{host}/a.jpg")
    assert failure(job) == "Image download failed: URL not allowed"


def test_the_log_holds_every_request_and_no_secret(server, send: Send, photos: PhotoServer):
    worker, _ = server
    send(photos.photo(query="token=query-token-in-no-log"))
    send(f"{photos.url}/missing?token=query-token-in-no-log")
    worker.wait_for_log("SOURCE_HTTP")
    assert "[INFO] Image downloaded successfully: (451, 300)" in worker.stderr
    for secret in (SECRET, "query-token-in-no-log", "token=", "Traceback"):
        assert secret not in worker.output


def test_the_hubs_selftest_needs_no_signature(server: tuple[WorkerProcess, str]) -> None:
    [case] = json.loads((ROOT / ".runpod" / "tests.json").read_text(encoding="utf-8"))["tests"]
    reply = requests.post(f"{server[1]}/runsync", json={"input": case["input"]}, timeout=30).json()

    assert (reply["status"], reply["output"]["selftest"]) == ("COMPLETED", "ok")
    assert reply["output"]["cosine"] > 0.999 and "embedding" not in reply["output"]
