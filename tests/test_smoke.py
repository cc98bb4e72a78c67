"""The smoke-test notebook passes on a good worker, fails on bad ones, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import smoke
from local_worker import SECRET, PhotoServer, local_server, plain_env
from seeded import hub_env
from storage_standin import StorageServer

from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.golden import golden
from heimdex_clip_worker.platform import PlatformServer

pytestmark = pytest.mark.timeout(300)  # the first run makes golden vectors and the artifact
FAKE = str(Path(__file__).parent / "fake_worker.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def storage() -> Iterator[StorageServer]:
    with StorageServer() as server:
        yield server


@pytest.fixture(scope="module")
def photos() -> Iterator[PhotoServer]:
    with PhotoServer() as server:
        yield server


def outputs(run: smoke.Run) -> str:
    """Return all that the cells printed."""
    cells = nbformat.reads(run.notebook, as_version=4).cells
    return "\n".join(str(cell.get("outputs", "")) for cell in cells)


def pictures(run: smoke.Run) -> int:
    return run.notebook.count('"image/png"')


def failure(run: smoke.Run) -> str:
    """Return the sentence that a run ended with."""
    assert run.status != 0, "the notebook passed"
    found = re.findall(r"^(?:AssertionError|RuntimeError): (.*(?:\n.+)*)", run.said, re.M)
    assert found, run.said[-3000:]
    return found[-1]


# A good worker


@pytest.fixture(scope="module")
def on_platform(home: Path) -> smoke.Run:
    """Run it on the real handler under the platform, by way of Supabase Storage."""
    return smoke.on_platform(home)


def test_it_passes_on_the_platform_with_signed_urls_of_supabase(on_platform: smoke.Run):
    assert on_platform.status == 0, on_platform.said[-3000:]
    assert "PASSED: 17 checks" in outputs(on_platform)


def test_it_shows_no_secret(on_platform: smoke.Run):
    for word in (SECRET, "token=", "rpa_", "service-role-"):
        assert word not in on_platform.notebook + on_platform.said


def test_it_draws_similarity_captions_and_latency(on_platform: smoke.Run):
    assert pictures(on_platform) == 3


def test_it_says_that_seeded_weights_match_no_captions(on_platform: smoke.Run):
    assert "SEEDED WEIGHTS" in outputs(on_platform)


def test_it_passes_on_a_local_server_with_public_urls(home: Path):
    run = smoke.on_local_server(home)
    assert run.status == 0, run.said[-3000:]
    assert "another secret is refused" in outputs(run)


def test_golden_vectors_made_anew_are_those_of_the_package():
    made = json.loads(smoke.golden_file().read_text(encoding="utf-8"))["photos"]
    pairs = [(decode_vector(made[name]), row) for name, row in golden()["photos"].items()]
    cosines = [np.dot(one, row.tolist()) for one, row in pairs]
    assert len(cosines) == 10 and min(cosines) > 0.99999


# Bad workers


@pytest.fixture(scope="module")
def small(home: Path) -> Iterator[PlatformServer]:
    """A worker whose model gives 256 numbers."""
    with smoke.on_the_platform(plain_env(home, FAKE_DIM="256"), FAKE) as platform:
        yield platform


def run_on(
    platform: PlatformServer, home: Path, storage: StorageServer, name: str, **more: object
) -> smoke.Run:
    """Run the notebook with photographs in the storage; nothing may be left there."""
    keys = {
        "EMBEDDING_HMAC_SECRET": str(more.pop("secret", SECRET)),
        "RUNPOD_API_KEY": str(more.pop("api_key", platform.api_key)),
        "SUPABASE_SERVICE_ROLE_KEY": storage.key,
    }
    env = smoke.caller_env(home, **{**storage.env(), **keys})
    parameters = {**smoke.address(platform), "n": 4, "timeout_s": 30, **more}
    run = smoke.run_notebook(name, env, parameters)
    assert storage.calls["POST object"] and not storage.objects
    for word in (*keys.values(), "token="):
        assert word not in run.notebook + run.said
    return run


def test_it_fails_on_a_wrong_dimension(small: PlatformServer, home: Path, storage: StorageServer):
    said = failure(run_on(small, home, storage, "dimension"))
    assert said.startswith("a vector of 256 numbers, said to have 256, where 512 are wanted")
    assert "CLIP_MODEL_NAME" in said


def test_it_fails_on_another_secret(small: PlatformServer, home: Path, storage: StorageServer):
    said = failure(run_on(small, home, storage, "secret", secret="the-callers-own-secret-0123"))
    assert said.startswith("FAILED: Authentication failed [AUTH_FAILED]: the endpoint has another")


def test_it_fails_on_a_queue_that_nobody_empties(home: Path, storage: StorageServer):
    with PlatformServer() as platform:
        said = failure(run_on(platform, home, storage, "stuck", timeout_s=2))
        states = [job.status for job in platform.platform.jobs.values()]
    assert said.startswith("the job is still IN_QUEUE after 2 s") and "Does a worker start?" in said
    assert states == ["CANCELLED"]


def test_it_fails_on_plain_gelu(home: Path, photos: PhotoServer):
    env = smoke.worker_env(home, "gelu")
    with local_server(env) as (_, url):
        parameters = {
            "base_url": url, "storage": "url", "image": photos.photo("chelsea.jpg"),
        }  # fmt: skip
        run = smoke.run_notebook("gelu", smoke.caller_env(home), parameters)
    said = failure(run)
    assert said.startswith("THE VECTORS ARE WRONG. Cosines to the golden vectors: chelsea.jpg 0.99")
    assert "CLIP_ACTIVATION" in said


def test_weights_that_are_said_to_be_trained_must_match_captions(home: Path, photos: PhotoServer):
    """The seeded weights under the name `openai`: nothing is excused, and nothing matches."""
    artifacts = smoke.CACHE / "artifacts-openai"
    options = {"CLIP_ARTIFACT_DIR": str(artifacts), "OMP_NUM_THREADS": "1"}
    with local_server(plain_env(home, **hub_env(home), **options)) as (_, url):
        parameters = {
            "base_url": url, "storage": "url", "image": f"{photos.url}/photos/", "n": 10,
            "golden": next(artifacts.glob("*/manifest.json")),
        }  # fmt: skip
        run = smoke.run_notebook("captions", smoke.caller_env(home), parameters)
    assert "agrees with the golden vectors" in outputs(run)
    assert re.match(r"\w+\.jpg matches '.+' \(-?0\.\d+\) better than '", failure(run))


def test_it_fails_on_a_worker_that_lets_everybody_in(home: Path, photos: PhotoServer):
    env = plain_env(home, FAKE_DOOR="open")
    with smoke.on_the_platform(env, FAKE) as platform:
        parameters = {
            **smoke.address(platform), "storage": "url", "image": photos.photo("chelsea.jpg"),
            "golden": "skip", "timeout_s": 30,
        }  # fmt: skip
        env = smoke.caller_env(home, RUNPOD_API_KEY=platform.api_key)
        run = smoke.run_notebook("open", env, parameters)
    assert failure(run).startswith("THE ENDPOINT IS OPEN: it answered another secret")
    assert "NOT COMPARED with golden vectors" in outputs(run)


def test_it_fails_on_a_401(small: PlatformServer, home: Path, storage: StorageServer):
    run = run_on(small, home, storage, "gate", api_key="rpa_OF_SOMEBODY_ELSE_0123456789")
    assert re.match(r"HTTP 401 from \S+/local/runsync: RUNPOD_API_KEY is not valid", failure(run))


# Careless callers


def test_an_interrupt_removes_what_was_uploaded(home: Path, storage: StorageServer):
    with PlatformServer() as platform:
        env = smoke.caller_env(home, RUNPOD_API_KEY=platform.api_key, **storage.env())
        parameters = {**smoke.address(platform), "timeout_s": 60}
        command = smoke.papermill(smoke.NOTEBOOK, home / "interrupted.ipynb", parameters)
        run = subprocess.Popen(
            command, env=env, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        platform.until(lambda there: len(there.jobs) > 0, 60, "no request came")
        assert len(storage.objects) == 10
        run.send_signal(signal.SIGINT)
        assert run.wait(30) != 0 and not storage.objects


def test_it_names_the_cure_for_a_bucket_that_is_not_there(home: Path, storage: StorageServer):
    env = smoke.caller_env(home, RUNPOD_API_KEY="rpa_UNUSED", **storage.env("films"))
    said = failure(smoke.run_notebook("bucket", env, {"endpoint_id": "e1"}))
    assert said.startswith("Supabase Storage refuses the upload (404, Bucket not found)")
    assert "SUPABASE_BUCKET" in said


def test_it_names_everything_that_is_missing_before_it_asks(home: Path):
    env = plain_env(home)
    del env["EMBEDDING_HMAC_SECRET"]
    said = failure(smoke.run_notebook("missing", env, {}))
    names = re.findall(r"^(?:the parameter )?(\w+)", said, re.M)
    assert names == [
        "Not", "EMBEDDING_HMAC_SECRET", "endpoint_id", "RUNPOD_API_KEY", "SUPABASE_URL",
        "SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_BUCKET",
    ]  # fmt: skip
