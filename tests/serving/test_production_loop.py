"""The worker under the SDK's production loop, against the local platform."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_worker import (
    FAKE,
    HANDLER,
    SECRET,
    PhotoServer,
    WorkerProcess,
    fake_vector,
    free_port,
    plain_env,
    signed,
    vector_and_timings,
)
from seeded import hub_env

from heimdex_clip_worker.emulator.server import EmulatorServer

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

TOKEN = "eyJhbGciOiJIUzI1NiJ9.query-token-that-no-log-may-hold"
GOOD = ["chelsea.jpg", "coffee.jpg", "astronaut.jpg", "camera.jpg"]
GOOD += ["china.jpg", "clock.png", "flower.jpg", "retina.jpg"]
START_S = 60  # a cold start on a busy machine


@pytest.fixture
def platform() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture(autouse=True)
def released(photos: PhotoServer) -> Iterator[None]:
    """Release held photographs after each test."""
    yield
    photos.release()


@contextlib.contextmanager
def fake_worker(home: Path, platform: EmulatorServer) -> Iterator[WorkerProcess]:
    """Run the real handler over the fake embedder; yield when it takes jobs."""
    with WorkerProcess(plain_env(home, **platform.worker_env()), FAKE) as worker:
        taking(platform, worker)
        yield worker


@pytest.fixture
def fake(platform: EmulatorServer, tmp_path: Path) -> Iterator[WorkerProcess]:
    """A fake worker of its own, which a test may stop."""
    with fake_worker(tmp_path, platform) as worker:
        yield worker


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorServer]:
    """A platform with one fake worker, shared by many tests."""
    with EmulatorServer() as platform, fake_worker(tmp_path_factory.mktemp("fake"), platform):
        yield platform


def taking(platform: EmulatorServer, worker: WorkerProcess) -> None:
    worker.wait_until(
        lambda: platform.queue.calls["job-take"] > 0, START_S, "the worker takes no jobs"
    )


def in_progress(platform: EmulatorServer, job_ids: list[str]) -> None:
    platform.until(
        lambda state: all(state.jobs[job].status == "IN_PROGRESS" for job in job_ids),
        10,
        "jobs are not taken",
    )


# --- the real model -----------------------------------------------------------


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[EmulatorServer, WorkerProcess]]:
    """The worker as deployed, taking jobs; seeded weights for the tag `openai` in a hub cache."""
    home = tmp_path_factory.mktemp("real")
    with EmulatorServer() as platform:
        env = plain_env(home, **platform.worker_env(), **hub_env(home))
        with WorkerProcess(env, *HANDLER) as worker:
            taking(platform, worker)
            yield platform, worker


def test_a_reply_is_as_the_contract_says(real, photos):
    platform, _ = real
    job = platform.runsync(signed(photos.photo(query=f"token={TOKEN}"), request_id="scene-abc-123"))
    assert (job["status"], job["workerId"]) == ("COMPLETED", "pod-1"), job
    embedding, timings = vector_and_timings(job["output"], "scene-abc-123")
    assert len(embedding) == 512 and all(type(x) is float for x in embedding)
    assert math.hypot(*embedding) == pytest.approx(1, abs=1e-5)
    assert {"download_ms", "inference_ms", "total_ms"} <= timings.keys()
    assert all(value >= 0 and value == round(value, 2) for value in timings.values())
    assert timings["total_ms"] >= max(timings["download_ms"], timings["inference_ms"])


def test_vectors_differ_by_photograph_and_normalizing_keeps_their_direction(real, photos):
    platform, _ = real
    items = [("coffee.jpg", True), ("coffee.jpg", False), ("china.jpg", True)]
    # One after another: in bf16 the other images of a batch move a vector by more than the bound.
    jobs = [platform.runsync(signed(photos.photo(name), normalize=unit)) for name, unit in items]
    outputs = [job["output"] for job in jobs]
    assert [output["normalized"] for output in outputs] == [True, False, True]
    unit, raw, other = (output["embedding"] for output in outputs)
    length = math.hypot(*raw)
    assert abs(length - 1) > 1e-3
    assert dot(unit, raw) / length == pytest.approx(1, abs=1e-5)
    assert dot(unit, other) < 0.999


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_the_log_has_the_specified_lines(real, photos):
    platform, worker = real
    platform.runsync(signed(photos.photo("coffee.jpg", f"token={TOKEN}"), request_id="scene-log-1"))
    worker.wait_for_log("Request scene-log-1 completed in")
    lines = worker.stderr.splitlines()
    lines = lines[lines.index("[INFO] Processing request: scene-log-1") :]
    assert lines[1:3] == [
        "[INFO] Image downloaded successfully: (600, 400)",
        "[INFO] Generated embedding with 512 dimensions",
    ]
    no_digits = re.sub(r"\d+\.\d{3}s", "Ts", lines[3])
    done = "[INFO] Request scene-log-1 completed in Ts (download: Ts, inference: Ts)"
    assert no_digits == done


def test_fitness_checks_have_passed_and_heartbeats_arrive(real):
    platform, worker = real
    assert re.search(r"Running [1-9]\d* fitness check", worker.stdout), worker.stdout
    assert "All fitness checks passed" in worker.stdout
    platform.until(lambda state: len(state.pings) >= 2, 10, "no heartbeats")
    assert {ping["worker"] for ping in platform.queue.pings} == {"pod-1"}


def test_the_model_named_by_the_caller_is_only_a_warning(real, photos):
    platform, worker = real
    job = platform.runsync(signed(photos.photo(), request_id="scene-model-1", model="ViT-L-14"))
    assert (job["status"], job["output"]["model"]) == ("COMPLETED", "ViT-B-32")
    assert any(
        line.startswith("[WARNING]") and "ViT-L-14" in line for line in worker.stderr.splitlines()
    )


# --- everything else ----------------------------------------------------------


def test_many_jobs_run_at_once_and_each_gets_its_own_reply_once(served, photos):
    names = [GOOD[i % len(GOOD)] for i in range(40)]
    photos.hold()
    before = photos.hits.total()
    jobs = [
        served.submit(signed(f"{photos.url}/held/{name}", request_id=f"scene-{i}"))
        for i, name in enumerate(names)
    ]
    served.until(lambda _: photos.hits.total() - before == 40, 15, "40 downloads at once")
    in_progress(served, jobs)
    photos.release()
    for i, (name, job) in enumerate(zip(names, served.wait(jobs, 20), strict=True)):
        assert (job["status"], job["output"]["request_id"]) == ("COMPLETED", f"scene-{i}"), job
        assert job["output"]["embedding"][:5] == pytest.approx(fake_vector(name), abs=1e-5), name
    assert [served.job(job).replies for job in jobs] == [1] * 40
    assert not served.queue.strays


def test_forty_jobs_take_seconds_not_one_second_each(served, photos):
    start = time.monotonic()
    states = served.wait([served.submit(signed(photos.photo())) for _ in range(40)], 30)
    assert {state["status"] for state in states} == {"COMPLETED"}
    assert time.monotonic() - start < 10


def test_an_error_reaches_its_caller_and_affects_no_other_job(served, photos):
    """Each bad job gets one reply with its message and code; a good one then still works."""
    good, now = photos.photo(query=f"token={TOKEN}"), int(time.time())
    base, failed = photos.url, "Image download failed"
    unused = f"http://127.0.0.1:{free_port()}/a.jpg"
    table = [
        (signed(good, secret="x" * 32), "Authentication failed", "AUTH_FAILED", False),
        (signed(good, ts=now - 600), "Authentication failed", "AUTH_EXPIRED", False),
        ({"image_url": good}, "Authentication failed", "AUTH_FAILED", False),
        (
            {"auth": {"ts": now, "sig": "0" * 64}},
            "Missing required field: image_url",
            "INVALID_REQUEST",
            False,
        ),
        (
            signed(good, normalize="false"),
            "normalize must be true or false",
            "INVALID_REQUEST",
            False,
        ),
        (signed(f"{base}/missing?token={TOKEN}"), f"{failed}: HTTP 404", "SOURCE_HTTP", False),
        (signed(f"{base}/status/503"), f"{failed}: HTTP 503", "SOURCE_HTTP", True),
        (
            signed(f"{base}/page"),
            f"{failed}: Unsupported image format",
            "UNSUPPORTED_FORMAT",
            False,
        ),
        (
            signed(f"{base}/truncated.jpg"),
            f"{failed}: Image could not be decoded",
            "DECODE_FAILED",
            False,
        ),
        (signed(unused), f"{failed}: Connection failed", "CONNECT_FAILED", True),
        (
            signed("http://10.0.0.1/a.jpg"),
            f"{failed}: URL not allowed",
            "URL_NOT_ALLOWED",
            False,
        ),
        # On these two the fake model raises RuntimeError and SystemExit.
        (signed(photos.photo("rocket.jpg")), "Internal error", "INTERNAL", True),
        (signed(photos.photo("hubble.jpg")), "Internal error", "INTERNAL", True),
    ]
    jobs = [served.submit({**row[0], "request_id": f"bad-{i}"}) for i, row in enumerate(table)]
    states = served.wait(jobs, 30)
    for i, (state, (_, message, code, retryable)) in enumerate(zip(states, table, strict=True)):
        assert (state["status"], state["error"]) == ("FAILED", message), state
        assert state["output"] == {"code": code, "retryable": retryable, "request_id": f"bad-{i}"}
        assert served.job(state["id"]).replies == 1
    assert served.runsync(signed(good))["status"] == "COMPLETED"


def test_input_that_is_not_a_request_fails_with_a_message(served):
    for value in ["text", 7, [], None, {}, {"image_url": 7}, {"image_url": ["a"], "auth": "no"}]:
        job = served.runsync(value)
        assert (job["status"], job["output"]["code"]) == ("FAILED", "INVALID_REQUEST"), (value, job)
        assert job["output"]["request_id"] == "unknown"


def test_sigterm_finishes_the_jobs_in_hand_and_takes_no_more(fake, platform, photos):
    photos.hold()
    jobs = [
        platform.submit(signed(f"{photos.url}/held/coffee.jpg", request_id=f"last-{i}"))
        for i in range(8)
    ]
    in_progress(platform, jobs)
    platform.until(lambda _: photos.hits["/held/coffee.jpg"] >= 8, 10, "downloads have begun")
    fake.terminate()
    time.sleep(platform.behaviour.take_hold_s + 0.5)  # the job-take that was open is over
    late = platform.submit(signed(photos.photo()))
    takes = platform.queue.calls["job-take"]
    time.sleep(1)
    assert fake.process.poll() is None
    photos.release()
    assert {state["status"] for state in platform.wait(jobs, 10)} == {"COMPLETED"}
    assert fake.wait_for_exit(10) == 0
    assert platform.status(late)["status"] == "IN_QUEUE"
    assert platform.queue.calls["job-take"] == takes


def test_sigterm_stops_an_idle_worker_soon(fake):
    start = time.monotonic()
    fake.terminate()
    assert fake.wait_for_exit(10) == 0
    assert time.monotonic() - start < 5  # job-stop is held for 1 s, and the SDK sleeps for 1 s


def test_a_cancelled_job_stops_its_download_and_nothing_else(served, photos):
    photos.hold()
    before = photos.dropped["/endless"]
    other = served.submit(signed(f"{photos.url}/held/china.jpg"))
    doomed = served.submit(signed(f"{photos.url}/endless", request_id="doomed"))
    in_progress(served, [other, doomed])
    served.until(lambda _: photos.hits["/endless"] > 0, 10, "the download has begun")
    assert served.cancel(doomed)["status"] == "CANCELLED"
    served.until(lambda _: photos.dropped["/endless"] > before, 5, "the download goes on")
    photos.release()
    assert served.wait([other], 10)[0]["status"] == "COMPLETED"
    assert served.job(doomed).replies == 0
    assert served.runsync(signed(photos.photo()))["status"] == "COMPLETED"


def test_replies_survive_a_platform_that_fails_now_and_then(served, photos):
    served.behaviour.fail("job-take", 500, 502)
    served.behaviour.fail("job-done", 500, 503)
    served.behaviour.reply_delay_s = 0.1
    states = served.wait([served.submit(signed(photos.photo())) for _ in range(3)], 30)
    assert {state["status"] for state in states} == {"COMPLETED"}
    assert [served.job(state["id"]).replies for state in states] == [1, 1, 1]
    assert not any(served.behaviour.faults.values())


# --- secrets ------------------------------------------------------------------


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_no_secret_signature_or_query_string_is_ever_printed(level, platform, photos, tmp_path):
    env = plain_env(tmp_path, **platform.worker_env(), LOG_LEVEL=level)
    urls = [
        photos.photo(query=f"token={TOKEN}"),
        photos.photo("rocket.jpg", f"token={TOKEN}"),
        photos.photo("hubble.jpg", f"token={TOKEN}"),
        f"{photos.url}/missing?token={TOKEN}",
        f"{photos.url}/page?token={TOKEN}",
        f"{photos.url}/truncated.jpg?token={TOKEN}",
        f"http://127.0.0.1:{free_port()}/a.jpg?token={TOKEN}",
        f"http://user:{TOKEN}@127.0.0.1/a.jpg",
        f"http://10.0.0.1/a.jpg?token={TOKEN}",
        f"no url at all?token={TOKEN}",
    ]
    inputs = [signed(url) for url in urls]
    inputs += [
        signed(urls[0], secret="x" * 32),
        signed(urls[0], ts=1),
        {"image_url": urls[0], "auth": {"sig": "f" * 64}},
    ]
    inputs += [
        {
            "image_url": urls[0],
            "auth": {"ts": int(time.time()), "sig": inputs[0]["auth"]["sig"].upper()},
        }
    ]
    with WorkerProcess(env, FAKE) as worker:
        taking(platform, worker)
        states = platform.wait([platform.submit(job_input) for job_input in inputs], 40)
        worker.terminate()
        assert worker.wait_for_exit(15) == 0
    assert [state["status"] for state in states] == ["COMPLETED"] + ["FAILED"] * (len(inputs) - 1)
    assert worker.stderr.count("Processing request") >= 10 and "Started" in worker.stdout
    printed = worker.output + "".join(str(state) for state in states)
    words = [SECRET, TOKEN, platform.worker_key, "token=", "Traceback"]
    signatures = [job_input["auth"]["sig"] for job_input in inputs]
    assert [word for word in words if word in printed] == []
    assert [sig for sig in signatures if sig.lower() in printed.lower()] == []


def test_a_job_on_the_command_line_gets_its_reply_and_is_not_printed(photos, tmp_path):
    """`--test_input` belongs to the SDK, which prints the request at its own default level."""
    job = {"input": signed(photos.photo(query=f"token={TOKEN}"), request_id="by-hand")}
    env = plain_env(tmp_path, LOG_LEVEL="DEBUG")
    with WorkerProcess(env, FAKE, "--test_input", json.dumps(job)) as worker:
        assert worker.wait_for_exit(START_S) == 0, worker.tail()
    assert "'request_id': 'by-hand'" in worker.stdout
    for word in (SECRET, TOKEN, job["input"]["auth"]["sig"]):
        assert word not in worker.output


# --- refusing to start --------------------------------------------------------


def refusal(env: dict[str, str], *args: str) -> list[str]:
    """Check all that a worker prints which refuses to start; return its errors."""
    with WorkerProcess(env, *args, forked=True) as worker:
        assert worker.wait_for_exit(START_S) == 1, worker.tail()
    assert "Traceback" not in worker.output, worker.output
    lines = worker.stderr.splitlines()
    assert all(re.match(r"\[(INFO|ERROR)\] ", line) for line in lines), worker.stderr
    return [line for line in lines if line.startswith("[ERROR]")]


def test_no_start_without_a_secret(platform, tmp_path):
    env = plain_env(tmp_path, **platform.worker_env())
    for change in [{}, {"EMBEDDING_HMAC_SECRET": ""}, {"EMBEDDING_HMAC_SECRET": "short"}]:
        bare = {
            name: value for name, value in env.items() if name != "EMBEDDING_HMAC_SECRET"
        } | change
        lines = refusal(bare, FAKE)
        assert len(lines) == 1 and "EMBEDDING_HMAC_SECRET" in lines[0], lines
        assert "short" not in lines[0].replace("too short", "")
    assert platform.queue.calls["job-take"] == 0


def test_no_start_with_wrong_settings_and_each_of_them_is_named(platform, tmp_path):
    wrong = {
        "MAX_IMAGE_SIZE_BYTES": "-5",
        "IMAGE_DOWNLOAD_TIMEOUT": "soon",
        "CLIP_MODEL_NAME": "ViT-Q-99",
    }
    env = plain_env(tmp_path, **platform.worker_env(), **hub_env(tmp_path), **wrong)
    lines = refusal(env, *HANDLER)
    assert len(lines) == 3, lines
    for name, value in wrong.items():
        assert [name in line and value in line for line in lines].count(True) == 1, (name, lines)
    assert platform.queue.calls["job-take"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "sign", [{"RUNPOD_GPU_COUNT": "1"}, {"NVIDIA_VISIBLE_DEVICES": "GPU-5c1d2e3f-0a1b"}]
)
def test_no_start_on_the_cpu_of_a_host_that_has_a_gpu(platform, tmp_path, sign):
    env = plain_env(tmp_path, **platform.worker_env(), **hub_env(tmp_path), **sign)
    [line] = refusal(env, *HANDLER)
    assert line.startswith("[ERROR] Cannot start: CLIP_DEVICE='auto': this host has a GPU")
    [(name, value)] = sign.items()
    assert f"({name}={value})" in line and "CLIP_DEVICE=cpu if a CPU worker is wanted" in line
    assert re.search(r"torch cannot use \((RuntimeError|AssertionError): \w+", line), line
    assert platform.queue.calls["job-take"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_required_gpu_that_is_not_there_is_told_with_its_cause(platform, tmp_path):
    more = hub_env(tmp_path) | {"CLIP_DEVICE": "cuda"}
    [line] = refusal(plain_env(tmp_path, **platform.worker_env(), **more), *HANDLER)
    assert "CLIP_DEVICE='cuda': torch sees 0 CUDA devices here (" in line
    assert re.search(r"\((RuntimeError|AssertionError): \w+", line), line


def test_no_start_without_weights(platform, tmp_path):
    env = plain_env(tmp_path, **platform.worker_env(), HF_HOME=str(tmp_path / "empty"))
    lines = refusal(env, *HANDLER)
    assert len(lines) == 1 and "openai" in lines[0], lines
    assert platform.queue.calls["job-take"] == 0


def test_a_failing_fitness_check_stops_the_worker(platform, tmp_path):
    env = plain_env(tmp_path, **platform.worker_env(), FAKE_EMBEDDER="nan")
    with WorkerProcess(env, FAKE) as worker:
        assert worker.wait_for_exit(START_S) == 1
    assert "Fitness check failed: warm_up" in worker.stdout
    assert [ping["status"] for ping in platform.queue.pings] == ["unhealthy"]
    assert platform.queue.calls["job-take"] == 0
    assert "Traceback" not in worker.output
