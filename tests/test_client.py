"""The caller's side against the emulator: real jobs, real workers, and injected failures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import math
import os
import pydoc
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
import trustme
from local_worker import PHOTOS, ROOT, SECRET, WorkerProcess, plain_env
from PIL import Image, ImageStat
from raw_server import send, serve
from seeded import hub_env

from heimdex_clip_worker.client import AsyncClipClient, ClipClient
from heimdex_clip_worker.emulator.server import EmulatorServer, InjectedFault
from heimdex_clip_worker.errors import (
    ClipInferenceAuthError,
    ClipInferenceError,
    ClipInferenceNetworkError,
    ClipInferenceSetupError,
    ClipInferenceTimeoutError,
)
from heimdex_clip_worker.remote import endpoint
from heimdex_clip_worker.remote.endpoint import Signer

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

FAKE = str(Path(__file__).with_name("fake_worker.py"))
TOKEN = "eyJhbGciOiJIUzI1NiJ9.query-token-that-no-error-may-hold"
GOOD = ["chelsea.jpg", "coffee.jpg", "astronaut.jpg", "camera.jpg", "china.jpg", "flower.jpg"]
START_S = 60  # a cold start on a busy machine


@contextlib.contextmanager
def worker(home: Path, platform: EmulatorServer, pod: str = "pod-1") -> Iterator[WorkerProcess]:
    """Run the real handler with a fake embedder; yield once it takes jobs."""
    with WorkerProcess(plain_env(home, **platform.worker_env(pod)), FAKE) as process:
        process.wait_until(lambda: takes_jobs(platform, pod), START_S, "the worker takes no jobs")
        yield process


def takes_jobs(platform: EmulatorServer, pod: str) -> bool:
    worker = platform.queue.workers.get(pod)
    return bool(worker and worker.polls)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorServer]:
    """An emulator with one fake worker, shared by the tests of this module."""
    with EmulatorServer() as platform, worker(tmp_path_factory.mktemp("fake"), platform):
        yield platform


@pytest.fixture
def platform(served: EmulatorServer) -> Iterator[EmulatorServer]:
    """The shared emulator, reset after each test."""
    behaviour = served.behaviour
    before = {name: getattr(behaviour, name) for name in ("queue_delay_s", "paused", "throttled")}
    yield served
    for name, value in before.items():
        setattr(behaviour, name, value)
    behaviour.faults.clear()
    behaviour.rewrite = None


@pytest.fixture
def empty() -> Iterator[EmulatorServer]:
    """An emulator without a worker."""
    with EmulatorServer(lost_after_s=1) as platform:
        yield platform


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a response for 1.5 s at most, and for that of a cancel request 0.5 s."""
    monkeypatch.setattr(endpoint, "_EXCHANGE_S", 1.5)
    monkeypatch.setattr(endpoint, "_GRACE_S", 0.5)


Open = Callable[..., ClipClient]


@pytest.fixture
def connect() -> Iterator[Open]:
    """Open clients that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(platform: EmulatorServer, **options: object) -> ClipClient:
            env = {**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
            return stack.enter_context(ClipClient.from_env(env, **options))

        yield connect


def error_of(call: Callable, *args: object, **options: object) -> ClipInferenceError:
    """Call a function and return the error that it raises."""
    with pytest.raises(ClipInferenceError) as caught:
        call(*args, **options)
    return caught.value


def newest_job(platform: EmulatorServer) -> object:
    """Wait for a job and return the newest one."""
    platform.until(lambda state: state.jobs, 10, "no job")
    return list(platform.queue.jobs.values())[-1]


def job_count(platform: EmulatorServer) -> int:
    return platform.queue.calls["run"]


def expected(name: str) -> list[float]:
    """Compute the first numbers of the fake worker's vector of a photograph."""
    image = Image.open(PHOTOS / name).convert("RGB")
    vector = [*ImageStat.Stat(image).mean, *image.size]
    length = math.hypot(*vector)
    return [x / length for x in vector]


# --- results ----------------------------------------------------------------------------


def test_an_image_result_has_the_shape_of_the_wire(connect, platform, photos):
    result = connect(platform).embed_image_url(photos.photo(query=f"token={TOKEN}"), "scene-1")
    vector, timings = result.pop("embedding"), result.pop("timings")
    assert result == {
        "request_id": "scene-1", "dim": 512, "model": "ViT-B-32", "pretrained": "fake",
        "space_id": "fa4e000000000000", "normalized": True, "model_version": "openai-vit-b-32-v1",
    }  # fmt: skip
    assert all(type(x) is float for x in vector) and timings["total_ms"] > 0
    assert vector[:5] == pytest.approx(expected("chelsea.jpg"), abs=0.02)


def test_normalize_false_returns_the_models_own_vector(connect, platform, photos):
    result = connect(platform).embed_image_url(photos.photo(), normalize=False)
    assert result["normalized"] is False and math.hypot(*result["embedding"]) > 2
    assert len(result["request_id"]) == 16


def test_one_text_and_many_texts(connect, platform):
    client = connect(platform)
    one, many = client.embed_text("a cat", "q-1"), client.embed_texts(["a cat", "x" * 400, ""])
    assert one["request_id"] == "q-1" and many[0]["embedding"] == one["embedding"]
    assert [r.get("truncated") for r in many] == [False, True, None]
    assert many[2]["code"] == "INVALID_REQUEST"


def test_a_split_batch_keeps_its_order_and_its_failed_items(connect, platform, photos):
    before, progress = job_count(platform), []
    names = [GOOD[n % len(GOOD)] for n in range(40)]
    urls = [photos.photo(name) for name in names]
    items = [{"image_url": url, "request_id": f"s-{n}"} for n, url in enumerate(urls)]
    items[7] = {"image_url": f"{photos.url}/missing", "request_id": "s-7"}
    items[8] = {"image_url": "", "request_id": "s-8"}
    items[9] = {"image_url": photos.photo(), "normalise": True}
    results = connect(platform, max_items=16).embed_image_batch(
        items, lambda *n: progress.append(n)
    )
    codes = [result["code"] for result in results[7:10]]
    assert codes == ["SOURCE_HTTP", "INVALID_REQUEST", "INVALID_REQUEST"]
    assert results[7]["request_id"] == "s-7" and results[7]["retryable"] is False
    for n, (name, result) in enumerate(zip(names, results, strict=True)):
        if n not in (7, 8, 9):
            assert result["request_id"] == f"s-{n}"
            assert result["embedding"][3:5] == pytest.approx(expected(name)[3:5], abs=0.02)
    assert job_count(platform) - before == 3 and progress[-1] == (40, 3)
    assert [done for done, _ in progress] == list(range(1, 41))


def test_a_failed_item_leaves_no_garbage_that_holds_vectors(connect, platform, photos):
    client = connect(platform)
    items = [{"image_url": photos.photo()}, {"image_url": f"{photos.url}/missing"}]
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)  # what would be freed now is kept to be looked at
    try:
        results = client.embed_image_batch(items)
        gc.collect()
        left = [one for one in gc.garbage if isinstance(one, ClipInferenceError)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert [result.get("code") for result in results] == [None, "SOURCE_HTTP"] and left == []


def test_progress_is_reported_for_each_item_when_its_last_job_has_ended(
    connect, platform, photos, monkeypatch
):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 1.0)
    names = ["coffee.jpg", "rocket.jpg", "china.jpg"]  # the second fails and is sent again
    progress: list[tuple[int, int, float, str]] = []

    def note(done: int, failed: int) -> None:
        progress.append((done, failed, time.monotonic(), threading.current_thread().name))

    items = [{"image_url": photos.photo(name)} for name in names]
    connect(platform).embed_image_batch(items, note)
    assert [entry[:2] for entry in progress] == [(1, 0), (2, 0), (3, 1)]
    assert {entry[3] for entry in progress} == {threading.current_thread().name}
    assert progress[1][2] - progress[0][2] < 0.1 < progress[2][2] - progress[1][2]


def test_an_error_of_the_callback_ends_the_batch(connect, platform, photos):
    def broken(done: int, failed: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        connect(platform).embed_image_batch([{"image_url": photos.photo()}] * 3, broken)


@pytest.mark.parametrize("kind", [ClipClient, AsyncClipClient], ids=["sync", "async"])
def test_help_shows_what_is_public(kind):
    text = pydoc.plain(pydoc.render_doc(kind))
    assert set(re.findall(r"\b_[a-zA-Z]\w*", text)) == set() and "from_env" in text
    assert "on_progress: 'Callable[[int, int], None] | None'" in text and "Self" in text


def test_128_images_are_one_job(connect, platform, photos):
    before = job_count(platform)
    results = connect(platform).embed_image_batch([{"image_url": photos.photo()}] * 130)
    assert len(results) == 130 and not any("error" in r for r in results)
    assert job_count(platform) - before == 2


def test_long_texts_are_split_at_the_size_that_a_signature_covers(connect, platform):
    before = job_count(platform)
    results = connect(platform).embed_texts(["日" * 10_000] * 60)
    assert len(results) == 60 and not any("error" in r for r in results)
    assert job_count(platform) - before == 2


def test_many_threads_share_a_client(connect, platform, photos):
    client = connect(platform)

    def embed(n: int) -> bool:
        name = GOOD[n % len(GOOD)]
        result = client.embed_image_url(photos.photo(name), f"t-{n}")
        right = result["embedding"][:5] == pytest.approx(expected(name), abs=0.02)
        return right and result["request_id"] == f"t-{n}"

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(embed, range(48)))


def test_the_asynchronous_client(platform, photos):
    async def main() -> list[dict]:
        env = {**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
        async with AsyncClipClient.from_env(env) as client:
            progress = []
            calls = [client.embed_image_url(photos.photo()) for _ in range(8)]
            several = await asyncio.gather(*calls)
            items = [{"image_url": photos.photo(), "request_id": "b"}]
            several += await client.embed_image_batch(items, lambda *n: progress.append(n))
            several += [await client.embed_text("a cat"), *await client.embed_texts(["a", "b"])]
            await asyncio.sleep(0)
            assert progress == [(1, 0)] and (await client.health_check())["status"] == "ready"
            return several

    assert [len(result["embedding"]) for result in asyncio.run(main())] == [512] * 12


# --- failures of the platform -----------------------------------------------------------


def test_transient_refusals_are_retried(connect, platform, photos):
    refusal = InjectedFault(503, retry_after_s=1)
    platform.behaviour.fail("run", 429, 500, InjectedFault(drop=True), refusal)
    client, start = connect(platform), time.monotonic()
    assert client.embed_image_url(photos.photo())["dim"] == 512
    assert time.monotonic() - start >= 1
    assert not platform.behaviour.faults["run"]


def test_a_request_whose_response_is_lost_is_sent_again(connect, platform, photos):
    platform.behaviour.fail("run", InjectedFault(after=True, drop=True))
    before = job_count(platform)
    assert connect(platform).embed_image_url(photos.photo())["dim"] == 512
    assert job_count(platform) - before == 2


def test_retry_after_beyond_the_deadline_ends_the_call(connect, platform, photos):
    platform.behaviour.fail("run", InjectedFault(429, retry_after_s=60))
    start = time.monotonic()
    error = error_of(connect(platform, timeout_s=20).embed_image_url, photos.photo(), "s-1")
    assert isinstance(error, ClipInferenceNetworkError) and error.retryable
    assert (error.code, error.request_id) == ("RATE_LIMITED", "s-1")
    assert time.monotonic() - start < 5


def test_endless_refusals_end_at_the_deadline(connect, platform, photos):
    platform.behaviour.fail("run", *[500] * 99)
    start = time.monotonic()
    error = error_of(connect(platform, timeout_s=2).embed_image_url, photos.photo())
    assert error.code == "PLATFORM_ERROR" and "attempt" in str(error)
    assert time.monotonic() - start < 4


def test_a_call_to_a_hanging_platform_ends_at_the_deadline(connect, platform, photos):
    platform.behaviour.fail("run", InjectedFault(hang_s=8))
    start = time.monotonic()
    error = error_of(connect(platform, timeout_s=1.5).embed_image_url, photos.photo())
    assert isinstance(error, ClipInferenceTimeoutError) and error.code == "TIMEOUT"
    assert 1.4 < time.monotonic() - start < 2.5


def test_a_hanging_exchange_is_repeated(connect, platform, photos, short_waits):
    platform.behaviour.fail("run", InjectedFault(hang_s=30))
    assert connect(platform, timeout_s=20).embed_image_url(photos.photo())["dim"] == 512


def test_an_unreachable_platform_is_reported_at_the_deadline(photos):
    env = {"RUNPOD_BASE_URL": "http://127.0.0.1:1/v2", "RUNPOD_API_KEY": "rpa_MY_API_KEY"}
    env |= {"RUNPOD_CLIP_ENDPOINT_ID": "abc", "EMBEDDING_HMAC_SECRET": SECRET}
    with ClipClient.from_env(env, timeout_s=1) as client:
        assert error_of(client.embed_image_url, photos.photo()).code == "UNREACHABLE"
        health = client.health_check()
        assert health["status"] == "unreachable"
        assert health["message"].startswith("The platform does not answer. ")


def test_a_queued_job_is_polled_through_failures(connect, platform, photos):
    platform.behaviour.queue_delay_s = 1
    platform.behaviour.fail("status", 500, 429, InjectedFault(drop=True))
    before = job_count(platform)
    assert connect(platform).embed_image_url(photos.photo())["dim"] == 512
    assert job_count(platform) - before == 1 and not platform.behaviour.faults["status"]


def test_a_job_that_expired_in_the_queue_is_sent_again(connect, platform, photos):
    platform.behaviour.paused = True
    client, before = connect(platform), job_count(platform)
    polled = platform.queue.calls["status"]
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(client.embed_image_url, photos.photo())
        platform.until(lambda state: state.calls["status"] > polled, 10, "not polled")
        platform.call(platform.queue.forget, next(iter(platform.queue.waiting.values())))
        platform.behaviour.paused = False
        assert result.result(20)["dim"] == 512
    assert job_count(platform) - before == 2


def test_a_cancelled_job_is_not_sent_again(connect, platform, photos):
    platform.behaviour.paused = True
    client, before = connect(platform), job_count(platform)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(error_of, client.embed_image_url, photos.photo())
        platform.until(lambda state: state.waiting, 10, "not queued")
        platform.request("POST", "/purge-queue")
        assert result.result(10).code == "JOB_CANCELLED"
    assert job_count(platform) - before == 1


@pytest.mark.parametrize("attempts", [3, 1], ids=["the-platform-retries", "the-client-retries"])
def test_a_call_survives_the_kill_of_its_worker(attempts, connect, empty, photos, tmp_path):
    empty.behaviour.max_attempts = attempts
    photos.hold()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        begun = {pod: worker(tmp_path, empty, pod) for pod in ("pod-1", "pod-2")}
        started = {pod: pool.submit(stack.enter_context, one) for pod, one in begun.items()}
        pods = {pod: one.result(START_S) for pod, one in started.items()}
        result = pool.submit(connect(empty).embed_image_url, f"{photos.url}/held/coffee.jpg", "s")
        empty.until(lambda state: any(w.jobs for w in state.workers.values()), 10, "not taken")
        (pod,) = (w.pod for w in empty.queue.workers.values() if w.jobs)
        os.killpg(pods[pod].process.pid, signal.SIGKILL)
        photos.release()
        assert result.result(30)["request_id"] == "s"
    assert job_count(empty) == (1 if attempts == 3 else 2)


# --- failures of items ------------------------------------------------------------------


def test_a_retryable_failure_gets_three_jobs_with_a_new_url_each(connect, platform, photos):
    calls, before = [], job_count(platform)

    def make_url() -> str:
        calls.append(time.monotonic())
        return photos.photo("rocket.jpg", f"token={TOKEN}")

    error = error_of(connect(platform).embed_image_url, make_url, "s-1")
    assert (error.code, error.retryable, error.request_id) == ("INTERNAL", True, "s-1")
    assert len(calls) == job_count(platform) - before == 3 and TOKEN not in repr(vars(error))


def test_a_final_failure_gets_one_job(connect, platform, photos):
    before = job_count(platform)
    error = error_of(connect(platform).embed_image_url, f"{photos.url}/missing")
    assert (error.code, str(error)) == ("SOURCE_HTTP", "Image download failed: HTTP 404")
    assert type(error) is ClipInferenceError and job_count(platform) - before == 1


def test_only_the_failed_items_of_a_batch_are_retried(connect, platform, photos):
    calls: Counter[str] = Counter()

    def make_url(name: str) -> Callable[[], str]:
        def make() -> str:
            calls[name] += 1
            return photos.photo(name)

        return make

    items = [{"image_url": make_url(name)} for name in ("coffee.jpg", "rocket.jpg", "china.jpg")]
    results = connect(platform).embed_image_batch(items)
    assert [r.get("code") for r in results] == [None, "INTERNAL", None]
    assert calls == {"coffee.jpg": 1, "rocket.jpg": 3, "china.jpg": 1}


def test_a_failing_url_function_fails_its_own_item_only(connect, platform, photos):
    def broken() -> str:
        raise RuntimeError(TOKEN)

    good, bad = connect(platform).embed_image_batch(
        [{"image_url": photos.photo}, {"image_url": broken, "request_id": "b"}]
    )
    assert good["dim"] == 512 and (bad["code"], bad["request_id"]) == ("MINT_FAILED", "b")
    assert "RuntimeError" in bad["error"] and TOKEN not in bad["error"]


# --- keys and signatures ----------------------------------------------------------------


def test_a_wrong_api_key_and_a_wrong_secret_have_their_own_codes(connect, platform, photos):
    key = error_of(connect(platform, api_key="rpa_SOMEBODY_ELSES").embed_image_url, photos.photo())
    secret = "another-secret-of-32-bytes-ok-ok"
    signature = error_of(connect(platform, hmac_secret=secret).embed_image_url, photos.photo())
    assert type(key) is type(signature) is ClipInferenceAuthError
    assert (key.code, signature.code) == ("API_KEY_REFUSED", "AUTH_FAILED")
    assert "RUNPOD_API_KEY" in str(key) and "EMBEDDING_HMAC_SECRET" in str(signature)


def test_a_refused_signature_ends_the_whole_batch(connect, platform, photos):
    client = connect(platform, hmac_secret="another-secret-of-32-bytes-ok-ok", max_items=2)
    error = error_of(client.embed_image_batch, [{"image_url": photos.photo()}] * 12)
    assert error.code == "AUTH_FAILED"


def test_an_unknown_endpoint_is_a_setup_error(connect, platform, photos):
    error = error_of(connect(platform, endpoint_id="nobody").embed_image_url, photos.photo())
    assert error.code == "ENDPOINT_NOT_FOUND" and isinstance(error, ClipInferenceSetupError)


@pytest.mark.parametrize(
    "vector", json.loads((ROOT / "test_vectors.json").read_text())["v2"], ids=lambda v: v["name"]
)
def test_the_signer_produces_the_published_signatures(vector, monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: vector["ts"] + 0.9)
    monkeypatch.setattr(endpoint, "new_nonce", lambda: vector["nonce"])
    signer = Signer(vector["kid"], vector["secret"], vector["audience"], max_lifetime_s=10**9)
    signed = signer.sign(vector["input"], vector["exp"] - vector["ts"] - 120)
    assert signed["auth"] == vector["auth"]


# --- abandoned calls --------------------------------------------------------------------


def test_a_call_that_times_out_cancels_its_job(connect, empty, photos):
    client = connect(empty, timeout_s=0.8)
    error = error_of(client.embed_image_url, photos.photo())
    client.close()
    assert error.code == "TIMEOUT" and "job: IN_QUEUE, cancelled now" in str(error)
    assert newest_job(empty).status == "CANCELLED"


def test_a_call_that_times_out_before_it_knows_its_job_cancels_it(connect, empty, photos):
    empty.behaviour.fail("run", InjectedFault(hang_s=1, after=True))
    client = connect(empty, timeout_s=0.5)
    error = error_of(client.embed_image_url, photos.photo())
    client.close()
    assert error.code == "TIMEOUT" and "being submitted, cancelled if it was accepted" in str(error)
    assert newest_job(empty).status == "CANCELLED"


@contextlib.contextmanager
def held_by_a_worker(platform: EmulatorServer, photos: object) -> Iterator[str]:
    """Yield the URL of a photograph that a worker cannot fetch before the block ends."""
    photos.hold()
    try:
        yield f"{photos.url}/held/coffee.jpg"
    finally:
        photos.release()


def in_progress_in(state: object) -> list[object]:
    return [job for job in list(state.jobs.values()) if job.status == "IN_PROGRESS"]


def interrupt_when(is_ready: Callable[[], object]) -> tuple[threading.Thread, list[float]]:
    """Send Ctrl-C to this process as soon as `is_ready()`; the time is in the list."""
    sent: list[float] = []

    def watch() -> None:
        while not is_ready():
            time.sleep(0.01)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread, sent


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("many", [False, True], ids=["one", "batch"])
def test_ctrl_c_cancels_a_job_that_a_worker_has(many, connect, platform, photos):
    client = connect(platform, max_items=1)
    with held_by_a_worker(platform, photos) as url:
        count = 3 if many else 1
        _, sent = interrupt_when(lambda: len(in_progress_in(platform.queue)) == count)
        with pytest.raises(KeyboardInterrupt):
            if many:
                client.embed_image_batch([{"image_url": url}] * count)
            else:
                client.embed_image_url(url)
        client.close()
        assert time.monotonic() - sent[0] < 2
        states = [job.status for job in list(platform.queue.jobs.values())[-count:]]
    assert states == ["CANCELLED"] * count


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_job_is_submitted_cancels_it(connect, empty, photos):
    empty.behaviour.fail("run", InjectedFault(hang_s=0.5, after=True))
    client = connect(empty)
    _, sent = interrupt_when(lambda: empty.queue.jobs)
    with pytest.raises(KeyboardInterrupt):
        client.embed_image_url(photos.photo())
    assert time.monotonic() - sent[0] < 0.4
    client.close()
    assert newest_job(empty).status == "CANCELLED"


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("many", [False, True], ids=["one", "batch"])
def test_ctrl_c_cancels_the_job(many, connect, empty, photos):
    client = connect(empty, max_items=1)
    count = 3 if many else 1
    _, sent = interrupt_when(lambda: len(empty.queue.jobs) == count)
    with pytest.raises(KeyboardInterrupt):
        if many:
            client.embed_image_batch([{"image_url": photos.photo()}] * 3)
        else:
            client.embed_image_url(photos.photo())
    client.close()
    assert time.monotonic() - sent[0] < 2
    assert Counter(job.status for job in empty.queue.jobs.values()) == {"CANCELLED": count}


def test_a_cancelled_task_cancels_its_job(platform, photos):
    async def main() -> float:
        env = {**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
        async with AsyncClipClient.from_env(env) as client:
            for call in (
                client.embed_image_url(url), client.embed_image_batch([{"image_url": url}] * 2)
            ):  # fmt: skip
                task = asyncio.create_task(call)
                await asyncio.to_thread(platform.until, in_progress_in, 10, "no job is taken")
                task.cancel()
                cancelled_at = time.monotonic()
                with pytest.raises(asyncio.CancelledError):
                    await task
        return time.monotonic() - cancelled_at

    with held_by_a_worker(platform, photos) as url:
        assert asyncio.run(main()) < 2
        assert [job.status for job in list(platform.queue.jobs.values())[-2:]] == ["CANCELLED"] * 2


def test_many_waiting_calls_stay_below_the_platforms_rates(connect, empty, photos):
    client = connect(empty, timeout_s=3)
    with ThreadPoolExecutor(64) as pool:
        codes = list(pool.map(lambda n: error_of(client.embed_text, f"{n}").code, range(64)))
    assert codes == ["TIMEOUT"] * 64
    assert empty.queue.calls["status"] < 3 * 200 and empty.queue.calls["run"] == 64


def test_a_closed_client_raises_closed(connect, platform, photos):
    client = connect(platform)
    client.close()
    assert error_of(client.embed_image_url, photos.photo()).code == "CLOSED"
    assert error_of(client.embed_image_batch, [{"image_url": photos.photo()}]).code == "CLOSED"


# --- wrong answers ----------------------------------------------------------------------


def with_output(**changes: object) -> Callable[[dict], dict]:
    """Make a function that changes fields in the output of a worker's reply."""
    return lambda reply: {**reply, "output": {**reply["output"], **changes}}


@pytest.mark.parametrize(
    ("rewrite", "code"),
    [
        (with_output(embedding="AADAfw==" * 256), "BAD_ANSWER"),
        (with_output(embedding=[math.nan] * 512), "BAD_ANSWER"),
        (with_output(embedding=[0.1] * 512), "BAD_ANSWER"),
        (with_output(embedding=[1.0] + [0] * 510), "BAD_ANSWER"),
        (with_output(embedding=None), "BAD_ANSWER"),
        (with_output(dim=768, embedding=[1.0] + [0] * 767), "BAD_ANSWER"),
        (with_output(normalized=False), "BAD_ANSWER"),
        (with_output(request_id="another"), "BAD_ANSWER"),
        (with_output(space_id=None), "BAD_ANSWER"),
        (with_output(model="ViT-L-14"), "WRONG_MODEL"),
        (lambda reply: {"output": "a vector"}, "BAD_ANSWER"),
        (lambda reply: {"output": {}}, "BAD_ANSWER"),
        (lambda reply: {"error": "Killed"}, "JOB_FAILED"),
        (lambda reply: {"error": f"Traceback: {SECRET}?token={TOKEN}"}, "JOB_FAILED"),
        (lambda reply: {"output": None}, "NO_OUTPUT"),
    ],
    ids=[
        "no-finite-numbers-in-base64",
        "no-finite-numbers",
        "another-length",
        "too-short",
        "no-vector",
        "another-dim",
        "not-normalised",
        "another-request",
        "no-space",
        "another-model",
        "text-for-an-output",
        "an-empty-output",
        "killed",
        "a-traceback",
        "no-output",
    ],
)
def test_a_wrong_answer_is_refused(rewrite, code, connect, platform, photos, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.05)
    platform.behaviour.rewrite = rewrite
    error = error_of(connect(platform).embed_image_url, photos.photo())
    assert error.code == code and TOKEN not in str(error)


@pytest.mark.parametrize("changes", [{"results": []}, {"results": 3}, {"request_id": "another"}])
def test_the_answer_to_another_batch_is_refused(changes, connect, platform, photos):
    platform.behaviour.rewrite = with_output(**changes)
    results = connect(platform).embed_image_batch([{"image_url": photos.photo()}] * 3)
    assert [result["code"] for result in results] == ["BAD_ANSWER"] * 3


def test_results_in_another_order_are_refused(connect, platform, photos):
    platform.behaviour.rewrite = lambda reply: with_output(
        results=reply["output"]["results"][::-1]
    )(reply)
    items = [{"image_url": photos.photo(name), "request_id": name} for name in GOOD[:3]]
    codes = [result.get("code") for result in connect(platform).embed_image_batch(items)]
    assert codes == ["BAD_ANSWER", None, "BAD_ANSWER"]


def test_another_space_is_refused(connect, platform, photos):
    client = connect(platform)
    assert client.embed_image_url(photos.photo())["space_id"] == client.space_id
    platform.behaviour.rewrite = with_output(space_id="0123456789abcdef")
    assert error_of(client.embed_image_url, photos.photo()).code == "SPACE_CHANGED"
    assert error_of(connect(platform, space_id="ff").embed_image_url, photos.photo()).code == (
        "SPACE_CHANGED"
    )


# --- hostile platforms ------------------------------------------------------------------


@contextlib.contextmanager
def connect_to(
    answer: bytes | Callable, timeout_s: float = 3
) -> Iterator[tuple[ClipClient, list[str]]]:
    """Open a client of a server that sends `answer` to every request; yield the requests, too."""
    send_answer = send(answer) if isinstance(answer, bytes) else answer

    def respond(connection) -> None:
        size = re.search(r"Content-Length: (\d+)", received[-1])
        while size and len(received[-1].partition("\r\n\r\n")[2]) < int(size[1]):
            received[-1] += connection.recv(65_536).decode("latin-1")
        send_answer(connection)

    with serve(respond) as (port, received):
        env = {"RUNPOD_BASE_URL": f"http://127.0.0.1:{port}/v2", "RUNPOD_API_KEY": "rpa_MY_API_KEY"}
        env |= {"RUNPOD_CLIP_ENDPOINT_ID": "abc", "EMBEDDING_HMAC_SECRET": SECRET}
        with ClipClient.from_env(env, timeout_s=timeout_s) as client:
            yield client, received


def response(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """Encode an HTTP response."""
    headers = {"Content-Length": len(body), "Connection": "close"} | headers
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_redirect_is_not_followed():
    with serve(send(response(b"{}"))) as (port, redirected):
        elsewhere = f"http://localhost:{port}/v2/abc/run"
        for status in ("301 Moved", "307 Temporary", "308 Permanent"):
            with connect_to(response(b"", status, Location=elsewhere)) as (client, received):
                assert error_of(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
            assert "Bearer rpa_MY_API_KEY" in received[0]
        assert redirected == []


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in</html>", b"[]", b"{}", b'{"id": 7, "status": "COMPLETED"}', b"[" * 50_000,
        b'{"id": "../../purge-queue", "status": "IN_QUEUE"}', b"", b"\xff\xfe",
    ],
    ids=lambda body: str(body[:20]),
)  # fmt: skip
def test_an_unreadable_response_is_refused(body):
    with connect_to(response(body)) as (client, received):
        error = error_of(client.embed_text, "a cat")
    assert error.code == "PLATFORM_ANSWER" and isinstance(error, ClipInferenceNetworkError)
    assert not any("purge" in line for line in received)


HEAD = b"\r\nConnection: close\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(b" " * 2**26)  # 64 MiB in 64 KiB
ENDLESS = {  # what is sent first, and then again and again
    **{
        str(status): (b"HTTP/1.1 %d X" % status + HEAD + b"\r\n", b"x" * 65_536)
        for status in (200, 201, 400, 401, 404, 408, 429, 500, 503)
    },
    **{
        str(status): (b"HTTP/1.1 %d X" % status + HEAD + b"Location: /x\r\n\r\n", b"x" * 65_536)
        for status in (300, 301, 302, 303, 307, 308)
    },
    "chunks": (CHUNKED, b"1000\r\n%4096d\r\n" % 7),
    "302-chunks": (
        b"HTTP/1.1 302 X\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1000\r\n%4096d\r\n" % 7,
    ),
    "line": (CHUNKED, b"0" * 65_536),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n" * 9_999),
    "status-line": (b"", b"x" * 65_536),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: %60000d\r\n" % 7),
    "interim": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_response_without_an_end_is_dropped(kind, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RESULT_BYTES", 1_000_000)
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.05)
    sent = Counter()

    def endless(connection) -> None:
        first, again = ENDLESS[kind]
        connection.sendall(first)
        while True:
            connection.sendall(again)
            sent["bytes"] += len(again)

    start = time.monotonic()
    timeout_s = 10 if kind[0] in "45" else 2  # these two end by themselves, at once
    with connect_to(endless, timeout_s=timeout_s) as (client, received):
        error = error_of(client.embed_text, "a cat")
        health = client.health_check() if kind in ("200", "302", "line") else None
    codes = {"4": ("API_KEY", "ENDPOINT", "REQUEST", "RATE", "PLATFORM"), "5": ("PLATFORM_ERROR",)}
    assert error.code.startswith(codes.get(kind[0], ("PLATFORM_ANSWER", "TIMEOUT", "UNREACHABLE")))
    assert health is None or health["status"] == "unreachable"
    assert sent["bytes"] < 8_000_000 * len(received)  # what sockets hold is included
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 399])
def test_the_body_of_a_redirect_is_not_awaited(status):
    head = b"HTTP/1.1 %d X\r\nLocation: /x\r\nContent-Length: 99\r\n\r\n" % status

    def respond(connection) -> None:
        connection.sendall(head)
        connection.recv(1)  # until the client leaves

    with serve(respond) as (port, _):
        session = endpoint._open_session(url := f"http://127.0.0.1:{port}/", "rpa_MY_API_KEY")
        assert endpoint._exchange(session, "POST", url, b"{}", 3).status == status


def test_a_small_response_that_grows_when_decompressed_takes_little_memory():
    bomb = response(BOMB, Content_Encoding="gzip")
    tracemalloc.start()
    with connect_to(bomb, timeout_s=5) as (client, _):
        assert error_of(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


@pytest.mark.parametrize("kind", ["200", "302", "500", "line"])
def test_an_endless_response_to_a_cancel_request_is_dropped(kind, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RESULT_BYTES", 1_000_000)
    sent = Counter()

    def respond(connection) -> None:
        if len(received) == 1:
            return connection.sendall(response(b'{"id": "j-1", "status": "IN_QUEUE"}'))
        first, again = ENDLESS[kind if "cancel" in received[-1] else "302"]
        connection.sendall(first)
        while True:
            connection.sendall(again)
            sent["bytes"] += len(again)

    start = time.monotonic()
    with connect_to(respond, timeout_s=2) as (client, received):
        assert error_of(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
    assert any("POST /v2/abc/cancel/j-1" in request for request in received)
    assert sent["bytes"] < 8_000_000 * len(received) and time.monotonic() - start < 6


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"], ids=["head", "body"]
)
def test_a_dripping_response_ends_at_the_deadline(head, short_waits):
    def drip(connection) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"H")
            time.sleep(0.05)

    start = time.monotonic()
    with connect_to(drip, timeout_s=1) as (client, _):
        assert error_of(client.embed_text, "a cat").code in ("TIMEOUT", "UNREACHABLE")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("state", ['"PONDERING"', "[]", "{}", "null", "[" * 900 + "]" * 900])
def test_an_unknown_job_state_is_polled_until_the_deadline(state):
    unfinished = response(b'{"id": "j-1", "status": %s}' % state.encode())
    with connect_to(unfinished, timeout_s=1) as (client, received):
        error = error_of(client.embed_text, "a cat")
        assert error.code == "TIMEOUT" and ("PONDERING" in str(error)) == ("PONDERING" in state)
    assert "POST /v2/abc/cancel/j-1" in received[-1]


def test_a_response_about_another_job_is_refused():
    answers = iter([b'{"id": "j-1", "status": "IN_QUEUE"}'])
    other = b'{"id": "j-2", "status": "COMPLETED", "output": {}}'
    with connect_to(lambda c: c.sendall(response(next(answers, other)))) as (client, received):
        assert error_of(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
    assert "POST /v2/abc/cancel/j-1" in received[-1]


def test_no_error_holds_a_secret_a_signature_or_a_query():
    answers = [
        response(b""), response(b"{", "500 no"), response(b"", "401 no"),
        response(b"", "302 no", Location="http://x"),
        response(b'{"id": "j", "status": "FAILED", "error": "https://a/b?token=%s %s"}'
             % (TOKEN.encode(), SECRET.encode() * 2)),
        b"nonsense", b"",
    ]  # fmt: skip
    for answer in answers:
        with connect_to(answer, timeout_s=0.7) as (client, received):
            error = error_of(client.embed_image_url, f"https://abc.supabase.co/a.jpg?token={TOKEN}")
        text = ""
        while error:
            text += repr(error) + repr(vars(error))
            error = error.__cause__ or error.__context__
        signature = json.loads(received[0].partition("\r\n\r\n")[2])["input"]["auth"]["sig"]
        for secret in (TOKEN, SECRET, "rpa_MY_API_KEY", signature):
            assert secret not in text, text


def test_responses_are_read_and_limited_over_tls(tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def cancelled_then_drip(connection) -> None:
        if len(received) == 1:
            return connection.sendall(response(b'{"id": "j", "status": "CANCELLED"}'))
        while True:
            connection.sendall(b"H")
            time.sleep(0.05)

    with serve(cancelled_then_drip, tls=context) as (port, received):
        session = endpoint._open_session(url := f"https://127.0.0.1:{port}/", "rpa_MY_API_KEY")
        assert error_of(endpoint._exchange, session, "GET", url, None, 5).code == "UNREACHABLE"
        assert received == []  # its certificate is not trusted
        session.verify = str(tmp_path / "ca.pem")
        assert endpoint._exchange(session, "GET", url, None, 5).document["status"] == "CANCELLED"
        start = time.monotonic()
        assert error_of(endpoint._exchange, session, "GET", url, None, 0.7).code == "UNREACHABLE"
        assert 0.6 < time.monotonic() - start < 2


def test_a_request_holds_what_it_must_and_no_secret(photos):
    with connect_to(response(b"", "401 no")) as (client, received):
        error_of(client.embed_image_url, photos.photo(), "s-1")
    head, _, body = received[0].partition("\r\n\r\n")
    job = json.loads(body)
    assert "Cookie" not in head and "Authorization: Bearer rpa_MY_API_KEY" in head
    assert job["input"]["auth"]["v"] == 2 and job["input"]["encoding_format"] == "base64"
    assert 120 < job["input"]["auth"]["exp"] - job["input"]["auth"]["ts"] <= 3600
    assert job["policy"]["ttl"] >= 10_000 and SECRET not in received[0]


def test_a_netrc_does_not_replace_the_api_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with connect_to(response(b"", "401 no")) as (client, received):
        assert error_of(client.embed_text, "a cat").code == "API_KEY_REFUSED"
    assert "Bearer rpa_MY_API_KEY" in received[0]


# --- health -----------------------------------------------------------------------------


def test_health_distinguishes_the_states_of_an_endpoint(connect, empty, tmp_path, photos):
    client = connect(empty)
    assert client.health_check()["status"] == "cold"
    empty.submit({"text": "a cat"})
    assert client.health_check()["status"] == "no_workers"
    empty.behaviour.throttled = 1
    assert client.health_check()["status"] == "throttled"
    empty.behaviour.throttled = 0
    empty.call(lambda: setattr(empty.queue.touch("pod-9"), "unhealthy", True))
    health = client.health_check()
    assert (health["status"], health["workers"]["unhealthy"]) == ("crash_loop", 1)
    assert "log" in health["message"]


@pytest.mark.parametrize(
    ("workers", "status"),
    [
        ({"idle": 2}, "standby"),
        ({"idle": 1, "throttled": 2, "initializing": 1}, "standby"),
        ({"idle": 1, "ready": 1}, "ready"),
        ({"idle": 1, "running": 1}, "ready"),
        ({"idle": 1, "unhealthy": 1}, "crash_loop"),
        ({"running": 3, "ready": 3, "unhealthy": 1}, "crash_loop"),
        ({}, "cold"),
    ],
)
def test_an_idle_worker_is_on_standby_and_hides_no_crash_loop(workers, status):
    backend = Mock(**{"health.return_value": {"jobs": {}, "workers": workers}})
    health = ClipClient(backend).health_check()
    assert health["status"] == status
    if status == "standby":
        assert "the next job wakes a worker" in health["message"]


def test_health_is_ready_when_a_worker_is(connect, platform):
    health = connect(platform).health_check()
    assert health["status"] == "ready" and health["workers"]["ready"] == 1
    assert (
        error_of(connect(platform, api_key="rpa_WRONG_KEY").health_check).code == "API_KEY_REFUSED"
    )


# --- the plain install ------------------------------------------------------------------


def test_importing_the_client_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time(); import heimdex_clip_worker.client; "
        "took = time.process_time() - start; "
        "heavy = {'torch', 'runpod', 'aiohttp', 'open_clip', 'PIL', 'numpy', 'torchvision'}; "
        "print(took, sorted(heavy & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code]  # seconds of CPU: this machine may be busy
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    took, heavy = done.stdout.strip().split(" ", 1)
    assert heavy == "[]" and float(took) < 0.5


PLAIN_SCRIPT = """
import json, sys
sys.path.append(sys.argv[1])
from heimdex_clip_worker.client import ClipClient

with ClipClient.from_env(json.loads(sys.argv[2]), timeout_s=30) as client:
    results = client.embed_image_batch([{"image_url": url} for url in sys.argv[3:]] * 8)
    one = client.embed_image_url(sys.argv[3])
heavy = {"torch", "runpod", "aiohttp", "open_clip", "PIL", "numpy"} & set(sys.modules)
print(json.dumps([len(results), sum("error" in r for r in results), one["dim"], sorted(heavy)]))
"""
NEEDS = ["requests", "urllib3", "certifi", "idna", "charset_normalizer", "*__mypyc*"]


def test_the_plain_install_is_enough_even_among_failures(platform, photos, tmp_path):
    packages = Path(requests.__file__).parent.parent
    for path in [ROOT / "heimdex_clip_worker", *(p for n in NEEDS for p in packages.glob(n))]:
        (tmp_path / path.name).symlink_to(path)
    platform.behaviour.queue_delay_s = 0.5
    dropped, slow = InjectedFault(drop=True), InjectedFault(hang_s=1)
    platform.behaviour.fail("caller", 429, 500, dropped, slow, 503)
    env = json.dumps({**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET})
    run = [sys.executable, "-I", "-S", "-c", PLAIN_SCRIPT, str(tmp_path), env]
    run += [photos.photo(name) for name in GOOD]
    done = subprocess.run(run, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [48, 0, 512, []]


# --- the local backend ------------------------------------------------------------------

LOCAL_SCRIPT = """
import json, sys
from heimdex_clip_worker.client import ClipClient

with ClipClient.from_env(timeout_s=60) as client:
    one = client.embed_image_url(sys.argv[1])
    text = client.embed_text("a cat")
    many = client.embed_image_batch([{"image_url": url} for url in sys.argv[1:]])
    print(json.dumps([one, text, *many]))
"""


@pytest.mark.timeout(300)
def test_the_local_backend_returns_the_workers_vectors(embedder, photos, tmp_path):
    from heimdex_clip_worker.model.image import to_vectors

    names = GOOD[:2]
    urls = [*map(photos.photo, names), photos.url + "/missing"]
    env = plain_env(tmp_path, **hub_env(tmp_path), CLIP_INFERENCE_BACKEND="local")
    run = [sys.executable, "-c", LOCAL_SCRIPT, *urls]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, text, *many = json.loads(done.stdout)
    assert many[2]["code"] == "SOURCE_HTTP" and text["space_id"] == embedder.space_id
    assert one["embedding"] == pytest.approx(many[0]["embedding"], abs=5e-3)
    for name, result in zip(names, many, strict=False):
        pixels = embedder.preprocess(Image.open(PHOTOS / name).convert("RGB"))
        (own,) = to_vectors(embedder.encode(pixels[None]), [True])
        cosine = math.fsum(a * b for a, b in zip(result["embedding"], own, strict=True))
        assert cosine > 0.999 and result["space_id"] == embedder.space_id


# --- the examples of the documents ------------------------------------------------------


def documented_block(language: str, word: str) -> str:
    """Find the block of the pages on signing and calling that holds `word`."""
    pages = [ROOT / "docs" / "how-to" / name for name in ("sign.md", "call.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.S) if word in b]
    return block


@pytest.mark.skipif(not shutil.which("openssl") or not shutil.which("curl"), reason="needs both")
def test_the_shell_example_of_the_documents_works(platform, photos, tmp_path):
    script = documented_block("sh", "openssl dgst").replace(
        "https://api.runpod.ai/v2", platform.base_url
    )
    env = plain_env(tmp_path, IMAGE_URL=photos.photo(query="token=a&b=c"), no_proxy="*")
    env |= {"RUNPOD_API_KEY": platform.api_key, "RUNPOD_CLIP_ENDPOINT_ID": platform.endpoint_id}
    run = ["sh", "-eu", "-c", script]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    job = json.loads(done.stdout)
    assert (job["status"], job["output"]["request_id"]) == ("COMPLETED", "scene-abc-123"), job


def test_the_python_example_of_the_documents_works(platform, photos, monkeypatch):
    code, names = documented_block("python", "auth import sign"), {}
    code, count = re.subn('url = ".*"', f"url = {photos.photo()!r}", code)
    monkeypatch.setenv("EMBEDDING_HMAC_SECRET", SECRET)
    exec(code, names)
    job = platform.request("POST", "/runsync", json=names["request"])
    assert (job["status"], count) == ("COMPLETED", 1), job
