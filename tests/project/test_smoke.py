"""The smoke-test notebook passes on a good worker, fails on bad ones, and removes its uploads."""

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
import showcase_smoke
import smoke
from local_worker import FAKE, SECRET, PhotoServer, local_server, plain_env
from seeded import hub_env
from storage_standin import StorageServer

from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.model.golden import golden

pytestmark = [
    pytest.mark.model, pytest.mark.process, pytest.mark.server,
    pytest.mark.timeout(300),  # the first run makes golden vectors and the artifact
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def storage() -> Iterator[StorageServer]:
    with StorageServer() as server:
        yield server


def outputs(run: smoke.Run) -> str:
    """Collect all outputs of the cells."""
    cells = nbformat.reads(run.notebook, as_version=4).cells
    return "\n".join(str(cell.get("outputs", "")) for cell in cells)


def pictures(run: smoke.Run) -> int:
    """Count the pictures of a run."""
    return run.notebook.count('"image/png"')


CHATTER = r"(Input|Output) Notebook:|Executing notebook|\[IPKernelApp\]|Passed unknown|\s*$"


def failure(run: smoke.Run) -> str:
    """Find the line that a run ended with: first on the terminal, in the notebook, the summary."""
    assert run.status != 0, "the notebook passed"
    line = next(line for line in run.output.splitlines() if not re.match(CHATTER, line))
    assert re.fullmatch(r"FAILED: .+ \.\.\. .+", line), run.output[-3000:]
    assert run.summary.splitlines()[0] == line
    cells = nbformat.reads(run.notebook, as_version=4).cells
    errors = [out for cell in cells for out in cell.get("outputs", []) if "traceback" in out]
    assert [error["traceback"] for error in errors] == [[line]]  # and no traceback
    return line.removeprefix("FAILED: ")


# A good worker


@pytest.fixture(scope="module")
def on_platform(home: Path) -> smoke.Run:
    """Run it on the real handler under an emulator, with Supabase Storage."""
    return smoke.on_platform(home)


def test_it_passes_under_an_emulator_with_signed_urls_of_supabase(on_platform: smoke.Run):
    assert on_platform.status == 0, on_platform.output[-3000:]
    assert "PASSED: 17 checks" in outputs(on_platform)
    assert on_platform.summary.startswith("PASSED: 17 checks of http://127.0.0.1:")


def test_its_summary_shows_two_plots_without_image_files(on_platform: smoke.Run):
    """GitHub shows Mermaid and tables in a summary, and no images in data URIs."""
    [chart] = re.findall(r"^```mermaid\n(.+?)^```$", on_platform.summary, re.M | re.S)
    assert chart.splitlines()[0] == "xychart-beta"
    for name in ("bar", "line"):
        [numbers] = re.findall(rf"^    {name} \[(.+)\]$", chart, re.M)
        assert len(numbers.split(", ")) == 12
    cosines = on_platform.summary.partition("### Cosines of the photographs")[2]
    assert len(re.findall(r"^\| [a-z]+ (?:\| -?\d\.\d\d ){10}\|$", cosines, re.M)) == 10
    assert "data:image" not in on_platform.summary


def test_it_shows_no_secret(on_platform: smoke.Run):
    for word in (SECRET, "token=", "rpa_", "service-role-"):
        assert word not in on_platform.notebook + on_platform.output + on_platform.summary


def test_it_draws_similarity_captions_and_latency(on_platform: smoke.Run, home: Path):
    assert pictures(on_platform) == 3
    files = sorted(path.name for path in (home / "pictures").iterdir())
    assert files == ["captions.png", "latencies.png", "similarity.png"]


def test_the_committed_notebook_shows_what_a_run_shows(on_platform: smoke.Run):
    committed = smoke.NOTEBOOK.read_text(encoding="utf-8")
    expected = showcase_smoke.deterministic(committed)
    again = showcase_smoke.with_outputs(committed, on_platform.notebook)
    assert showcase_smoke.deterministic(again) == expected
    assert "PASSED: 17 checks" in expected["summary"] and committed.count('"image/png"') == 3


def test_it_says_that_seeded_weights_match_no_captions(on_platform: smoke.Run):
    assert "SEEDED WEIGHTS" in outputs(on_platform)


def test_it_passes_on_a_local_server_with_public_urls(home: Path):
    run = smoke.on_local_server(home)
    assert run.status == 0, run.output[-3000:]
    assert "another secret is refused" in outputs(run)


def test_the_committed_outputs_show_nothing_of_the_machine():
    """No port, path, key or token; text of the standard output, and small pictures."""
    text = smoke.NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    printed = "\n".join("".join(output.get("text", "")) for output in outputs)
    for pattern in (
        r"(127\.0\.0\.1|localhost):\d", r"(?<![\w.:/])/\w+/", r"rpa_|service-role|token=",
        r"[0-9a-f]{32}", re.escape(SECRET),
    ):  # fmt: skip
        assert not re.search(pattern, printed), pattern


def test_the_documents_show_what_health_prints():
    shown = showcase_smoke.HEALTH.read_text(encoding="utf-8")
    assert shown == showcase_smoke.terminal(showcase_smoke.health_runs())
    assert "ready: Workers are ready." in shown and "no workers: " in shown


def test_new_golden_vectors_equal_those_of_the_package():
    made = json.loads(smoke.golden_file().read_text(encoding="utf-8"))["photos"]
    pairs = [(decode_vector(made[name]), row) for name, row in golden()["photos"].items()]
    cosines = [np.dot(one, row.tolist()) for one, row in pairs]
    assert len(cosines) == 10 and min(cosines) > 0.99999


# Bad workers


@pytest.fixture(scope="module")
def small(home: Path) -> Iterator[EmulatorServer]:
    """A worker whose vectors have 256 numbers."""
    with smoke.on_the_platform(plain_env(home, FAKE_DIM="256"), FAKE) as platform:
        yield platform


def run_on(
    platform: EmulatorServer, home: Path, storage: StorageServer, name: str, **more: object
) -> smoke.Run:
    """Run the notebook with photographs in the storage, where nothing may stay."""
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
        assert word not in run.notebook + run.output + run.summary
    return run


def test_it_fails_on_a_wrong_dimension(small: EmulatorServer, home: Path, storage: StorageServer):
    message = failure(run_on(small, home, storage, "dimension"))
    assert message.startswith("a vector of 256 numbers, said to have 256, where 512 are wanted ...")
    assert "CLIP_MODEL_NAME" in message


def test_it_fails_on_another_secret(small: EmulatorServer, home: Path, storage: StorageServer):
    run = run_on(small, home, storage, "secret", secret="the-callers-own-secret-0123")
    expected = "the job is FAILED: Authentication failed [AUTH_FAILED] ... the endpoint has another"
    assert failure(run).startswith(expected)


def test_it_fails_on_a_queue_without_workers(home: Path, storage: StorageServer):
    with EmulatorServer() as platform:
        message = failure(run_on(platform, home, storage, "stuck", timeout_s=2))
        states = [job.status for job in platform.queue.jobs.values()]
    assert message.startswith("the job is still IN_QUEUE after 2 s")
    assert "Does a worker start?" in message
    assert states == ["CANCELLED"]


def test_it_fails_on_plain_gelu(home: Path, photos: PhotoServer):
    env = smoke.worker_env(home, "gelu")
    with local_server(env) as (_, url):
        parameters = {
            "base_url": url, "storage": "url", "image": photos.photo("chelsea.jpg"),
        }  # fmt: skip
        run = smoke.run_notebook("gelu", smoke.caller_env(home), parameters)
    message, expected = failure(run), "Cosines to the golden vectors: chelsea.jpg 0.99"
    assert message.startswith(f"THE VECTORS ARE WRONG. {expected}")
    assert "CLIP_ACTIVATION" in message


def test_weights_named_openai_must_match_captions(home: Path, photos: PhotoServer):
    """Seeded weights under the name `openai`: captions are checked, and do not match."""
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


def test_it_fails_on_a_worker_that_accepts_any_signature(home: Path, photos: PhotoServer):
    env = plain_env(home, FAKE_AUTH="off")
    with smoke.on_the_platform(env, FAKE) as platform:
        parameters = {
            **smoke.address(platform), "storage": "url", "image": photos.photo("chelsea.jpg"),
            "golden": "skip", "timeout_s": 30,
        }  # fmt: skip
        env = smoke.caller_env(home, RUNPOD_API_KEY=platform.api_key)
        run = smoke.run_notebook("open", env, parameters)
    assert failure(run).startswith("THE ENDPOINT IS OPEN: it answered another secret")
    assert "NOT COMPARED with golden vectors" in outputs(run)


def test_it_fails_on_a_401(small: EmulatorServer, home: Path, storage: StorageServer):
    run = run_on(small, home, storage, "gate", api_key="rpa_OF_SOMEBODY_ELSE_0123456789")
    expected = r"HTTP 401 from \S+/local/runsync \.\.\. RUNPOD_API_KEY is not valid"
    assert re.match(expected, failure(run))


# Interrupts, and settings that are wrong or missing


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_removes_what_was_uploaded(home: Path, storage: StorageServer):
    with EmulatorServer() as platform:
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


def test_it_names_the_setting_of_a_bucket_that_does_not_exist(home: Path, storage: StorageServer):
    env = smoke.caller_env(home, RUNPOD_API_KEY="rpa_UNUSED", **storage.env("films"))
    message = failure(smoke.run_notebook("bucket", env, {"endpoint_id": "e1"}))
    assert message.startswith("Supabase Storage refuses the upload (404, Bucket not found)")
    assert "SUPABASE_BUCKET" in message


def test_it_names_everything_that_is_missing_before_any_request(home: Path):
    env = plain_env(home)
    del env["EMBEDDING_HMAC_SECRET"]
    message = failure(smoke.run_notebook("missing", env, {}))
    assert re.findall(r"(\w+) is missing", message) == [
        "EMBEDDING_HMAC_SECRET", "RUNPOD_API_KEY", "RUNPOD_CLIP_ENDPOINT_ID", "SUPABASE_URL",
        "SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_BUCKET",
    ]  # fmt: skip
