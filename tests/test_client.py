"""The caller's side against the local platform: real jobs, workers, and all that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import trustme
from local_worker import PHOTOS, ROOT, SECRET, PhotoServer, WorkerProcess, plain_env
from PIL import Image, ImageStat
from raw_server import say, serve
from seeded import hub_env

from heimdex_clip_worker import endpoint
from heimdex_clip_worker.client import AsyncClipClient, ClipClient
from heimdex_clip_worker.endpoint import Signer
from heimdex_clip_worker.errors import (
    ClipInferenceAuthError,
    ClipInferenceError,
    ClipInferenceNetworkError,
    ClipInferenceSetupError,
    ClipInferenceTimeoutError,
)
from heimdex_clip_worker.platform import Fault, PlatformServer

FAKE = str(Path(__file__).with_name("fake_worker.py"))
TOKEN = "eyJhbGciOiJIUzI1NiJ9.query-token-that-no-error-may-hold"
GOOD = ["chelsea.jpg", "coffee.jpg", "astronaut.jpg", "camera.jpg", "china.jpg", "flower.jpg"]
START_S = 60  # a cold start on a busy machine


@pytest.fixture(scope="module")
def photos() -> Iterator[PhotoServer]:
    with PhotoServer() as server:
        yield server


@contextlib.contextmanager
def worker(home: Path, platform: PlatformServer, pod: str = "pod-1") -> Iterator[WorkerProcess]:
    """Run the real handler over the fake embedder; yield once it takes jobs."""
    with WorkerProcess(plain_env(home, **platform.worker_env(pod)), FAKE) as process:
        process.wait_until(lambda: polls(platform, pod), START_S, "the worker takes no jobs")
        yield process


def polls(platform: PlatformServer, pod: str) -> bool:
    found = platform.platform.workers.get(pod)
    return bool(found and found.polls)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlatformServer]:
    """A platform with one fake worker that lives through the tests that share it."""
    with PlatformServer() as platform, worker(tmp_path_factory.mktemp("fake"), platform):
        yield platform


@pytest.fixture
def platform(served: PlatformServer) -> Iterator[PlatformServer]:
    """The same, as it was at first."""
    behaviour = served.behaviour
    before = {name: getattr(behaviour, name) for name in ("queue_delay_s", "paused", "throttled")}
    yield served
    for name, value in before.items():
        setattr(behaviour, name, value)
    behaviour.faults.clear()
    behaviour.rewrite = None


@pytest.fixture
def empty() -> Iterator[PlatformServer]:
    """A platform without a worker."""
    with PlatformServer(lost_after_s=1) as platform:
        yield platform


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a runsync be held for 1 s and come 0.5 s late at most."""
    monkeypatch.setattr(endpoint, "WAIT_S", 1.0)
    monkeypatch.setattr(endpoint, "GRACE_S", 0.5)


Open = Callable[..., ClipClient]


@pytest.fixture
def connect() -> Iterator[Open]:
    """Open clients that are closed at the end, whatever happens."""
    with contextlib.ExitStack() as stack:

        def connect(platform: PlatformServer, **options: object) -> ClipClient:
            env = {**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
            return stack.enter_context(ClipClient.from_env(env, **options))

        yield connect


def fails(call: Callable, *args: object, **options: object) -> ClipInferenceError:
    """Return the error that a call ends with."""
    with pytest.raises(ClipInferenceError) as caught:
        call(*args, **options)
    return caught.value


def job_of(platform: PlatformServer) -> object:
    """Return the newest job of the platform, waiting for it."""
    platform.until(lambda state: state.jobs, 10, "no job")
    return list(platform.platform.jobs.values())[-1]


def submitted(platform: PlatformServer) -> int:
    return platform.platform.calls["runsync"]


def expected(name: str) -> list[float]:
    """Return the first numbers of the fake worker's vector of a photograph."""
    image = Image.open(PHOTOS / name).convert("RGB")
    vector = [*ImageStat.Stat(image).mean, *image.size]
    length = math.hypot(*vector)
    return [x / length for x in vector]


# --- what works ---------------------------------------------------------------


def test_an_image_comes_back_in_the_wires_shape(connect, platform, photos):
    result = connect(platform).embed_image_url(photos.photo(query=f"token={TOKEN}"), "scene-1")
    vector, timings = result.pop("embedding"), result.pop("timings")
    assert result == {
        "request_id": "scene-1", "dim": 512, "model": "ViT-B-32", "pretrained": "fake",
        "space_id": "fa4e000000000000", "normalized": True, "model_version": "openai-vit-b-32-v1",
    }  # fmt: skip
    assert all(type(x) is float for x in vector) and timings["total_ms"] > 0
    assert vector[:5] == pytest.approx(expected("chelsea.jpg"), abs=0.02)


def test_a_vector_as_the_model_gives_it(connect, platform, photos):
    result = connect(platform).embed_image_url(photos.photo(), normalize=False)
    assert result["normalized"] is False and math.hypot(*result["embedding"]) > 2
    assert len(result["request_id"]) == 16


def test_texts_one_and_many(connect, platform):
    client = connect(platform)
    one, many = client.embed_text("a cat", "q-1"), client.embed_texts(["a cat", "x" * 400, ""])
    assert one["request_id"] == "q-1" and many[0]["embedding"] == one["embedding"]
    assert [r.get("truncated") for r in many] == [False, True, None]
    assert many[2]["code"] == "INVALID_REQUEST"


def test_a_batch_is_split_and_keeps_its_order_and_its_bad_items(connect, platform, photos):
    before, told = submitted(platform), []
    names = [GOOD[n % len(GOOD)] for n in range(40)]
    urls = [photos.photo(name) for name in names]
    items = [{"image_url": url, "request_id": f"s-{n}"} for n, url in enumerate(urls)]
    items[7] = {"image_url": f"{photos.url}/missing", "request_id": "s-7"}
    items[8] = {"image_url": "", "request_id": "s-8"}
    items[9] = {"image_url": photos.photo(), "normalise": True}
    results = connect(platform, max_items=16).embed_image_batch(items, lambda *n: told.append(n))
    codes = [result["code"] for result in results[7:10]]
    assert codes == ["SOURCE_HTTP", "INVALID_REQUEST", "INVALID_REQUEST"]
    assert results[7]["request_id"] == "s-7" and results[7]["retryable"] is False
    for n, (name, result) in enumerate(zip(names, results, strict=True)):
        if n not in (7, 8, 9):
            assert result["request_id"] == f"s-{n}"
            assert result["embedding"][3:5] == pytest.approx(expected(name)[3:5], abs=0.02)
    assert submitted(platform) - before == 3 and told[-1] == (40, 3) and len(told) == 3


def test_128_images_are_one_job(connect, platform, photos):
    before = submitted(platform)
    results = connect(platform).embed_image_batch([{"image_url": photos.photo()}] * 130)
    assert len(results) == 130 and not any("error" in r for r in results)
    assert submitted(platform) - before == 2


def test_long_texts_are_split_by_what_a_signature_covers(connect, platform):
    before = submitted(platform)
    results = connect(platform).embed_texts(["日" * 10_000] * 60)
    assert len(results) == 60 and not any("error" in r for r in results)
    assert submitted(platform) - before == 2


def test_many_threads_share_a_client(connect, platform, photos):
    client = connect(platform)

    def ask(n: int) -> bool:
        name = GOOD[n % len(GOOD)]
        result = client.embed_image_url(photos.photo(name), f"t-{n}")
        right = result["embedding"][:5] == pytest.approx(expected(name), abs=0.02)
        return right and result["request_id"] == f"t-{n}"

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def test_the_same_awaited(platform, photos):
    async def main() -> list[dict]:
        env = {**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
        async with AsyncClipClient.from_env(env) as client:
            told = []
            calls = [client.embed_image_url(photos.photo()) for _ in range(8)]
            several = await asyncio.gather(*calls)
            items = [{"image_url": photos.photo(), "request_id": "b"}]
            several += await client.embed_image_batch(items, lambda *n: told.append(n))
            several += [await client.embed_text("a cat"), *await client.embed_texts(["a", "b"])]
            await asyncio.sleep(0)
            assert told == [(1, 0)] and (await client.health_check())["status"] == "ready"
            return several

    assert [len(result["embedding"]) for result in asyncio.run(main())] == [512] * 12


# --- the platform in trouble ------------------------------------------------------


def test_refusals_that_pass_are_waited_out(connect, platform, photos):
    platform.behaviour.fail("runsync", 429, 500, Fault(drop=True), Fault(503, retry_after_s=1))
    client, start = connect(platform), time.monotonic()
    assert client.embed_image_url(photos.photo())["dim"] == 512
    assert time.monotonic() - start >= 1
    assert not platform.behaviour.faults["runsync"]


def test_a_lost_answer_is_asked_for_again(connect, platform, photos):
    platform.behaviour.fail("runsync", Fault(after=True, drop=True))
    before = submitted(platform)
    assert connect(platform).embed_image_url(photos.photo())["dim"] == 512
    assert submitted(platform) - before == 2


def test_retry_after_beyond_the_deadline_is_not_waited_for(connect, platform, photos):
    platform.behaviour.fail("runsync", Fault(429, retry_after_s=60))
    start = time.monotonic()
    error = fails(connect(platform, timeout_s=20).embed_image_url, photos.photo(), "s-1")
    assert isinstance(error, ClipInferenceNetworkError) and error.retryable
    assert (error.code, error.request_id) == ("RATE_LIMITED", "s-1")
    assert time.monotonic() - start < 5


def test_endless_refusals_end_with_the_deadline(connect, platform, photos):
    platform.behaviour.fail("runsync", *[500] * 99)
    start = time.monotonic()
    error = fails(connect(platform, timeout_s=2).embed_image_url, photos.photo())
    assert error.code == "PLATFORM_ERROR" and "attempt" in str(error)
    assert time.monotonic() - start < 4


def test_a_hanging_platform_is_left_at_the_deadline(connect, platform, photos):
    platform.behaviour.fail("runsync", Fault(hang_s=8))
    start = time.monotonic()
    error = fails(connect(platform, timeout_s=1.5).embed_image_url, photos.photo())
    assert isinstance(error, ClipInferenceTimeoutError) and error.code == "TIMEOUT"
    assert 1.4 < time.monotonic() - start < 2.5


def test_an_exchange_that_hangs_is_tried_anew(connect, platform, photos, impatient):
    platform.behaviour.fail("runsync", Fault(hang_s=30))
    assert connect(platform, timeout_s=20).embed_image_url(photos.photo())["dim"] == 512


def test_nobody_there_is_told_at_the_deadline(photos):
    env = {"RUNPOD_BASE_URL": "http://127.0.0.1:1/v2", "RUNPOD_API_KEY": "rpa_NOBODY_THERE"}
    env |= {"RUNPOD_CLIP_ENDPOINT_ID": "abc", "EMBEDDING_HMAC_SECRET": SECRET}
    with ClipClient.from_env(env, timeout_s=1) as client:
        assert fails(client.embed_image_url, photos.photo()).code == "UNREACHABLE"
        assert client.health_check()["status"] == "unreachable"


def test_a_slow_queue_is_polled_to_its_end_through_trouble(connect, platform, photos, impatient):
    platform.behaviour.queue_delay_s = 3
    platform.behaviour.fail("status", 500, 429, Fault(drop=True))
    before = submitted(platform)
    assert connect(platform).embed_image_url(photos.photo())["dim"] == 512
    assert submitted(platform) - before == 1 and not platform.behaviour.faults["status"]


@pytest.mark.parametrize("where", ["runsync", "status"])
def test_a_job_that_expired_in_the_queue_is_sent_again(
    where, connect, platform, photos, impatient
):
    platform.behaviour.paused = True
    client, before = connect(platform), submitted(platform)
    polled = platform.platform.calls["status"]
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(client.embed_image_url, photos.photo())
        if where == "runsync":
            platform.until(lambda state: state.queue, 10, "not queued")
        else:
            platform.until(lambda state: state.calls["status"] > polled, 10, "not polled")
        platform.call(platform.platform.forget, next(iter(platform.platform.queue.values())))
        platform.behaviour.paused = False
        assert result.result(20)["dim"] == 512
    assert submitted(platform) - before == 2


def test_a_cancelled_job_is_not_sent_again(connect, platform, photos):
    platform.behaviour.paused = True
    client, before = connect(platform), submitted(platform)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(fails, client.embed_image_url, photos.photo())
        platform.until(lambda state: state.queue, 10, "not queued")
        platform.ask("POST", "/purge-queue")
        assert result.result(10).code == "JOB_CANCELLED"
    assert submitted(platform) - before == 1


@pytest.mark.parametrize("attempts", [3, 1], ids=["the-platform-retries", "the-client-retries"])
def test_a_worker_killed_in_mid_job_costs_nothing(attempts, connect, empty, photos, tmp_path):
    empty.behaviour.max_attempts = attempts
    photos.hold()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        begun = {pod: worker(tmp_path, empty, pod) for pod in ("pod-1", "pod-2")}
        started = {pod: pool.submit(stack.enter_context, one) for pod, one in begun.items()}
        pods = {pod: one.result(START_S) for pod, one in started.items()}
        result = pool.submit(connect(empty).embed_image_url, f"{photos.url}/held/coffee.jpg", "s")
        empty.until(lambda state: any(w.jobs for w in state.workers.values()), 10, "not taken")
        (pod,) = (w.pod for w in empty.platform.workers.values() if w.jobs)
        os.killpg(pods[pod].process.pid, signal.SIGKILL)
        photos.release()
        assert result.result(30)["request_id"] == "s"
    assert submitted(empty) == (1 if attempts == 3 else 2)


# --- what the worker says ------------------------------------------------------------


def test_a_failure_that_may_pass_is_tried_three_times_and_minted_each_time(
    connect, platform, photos
):
    minted, before = [], submitted(platform)

    def mint() -> str:
        minted.append(time.monotonic())
        return photos.photo("rocket.jpg", f"token={TOKEN}")

    error = fails(connect(platform).embed_image_url, mint, "s-1")
    assert (error.code, error.retryable, error.request_id) == ("INTERNAL", True, "s-1")
    assert len(minted) == submitted(platform) - before == 3 and TOKEN not in repr(vars(error))


def test_a_failure_that_cannot_pass_is_not(connect, platform, photos):
    before = submitted(platform)
    error = fails(connect(platform).embed_image_url, f"{photos.url}/missing")
    assert (error.code, str(error)) == ("SOURCE_HTTP", "Image download failed: HTTP 404")
    assert type(error) is ClipInferenceError and submitted(platform) - before == 1


def test_only_what_failed_in_a_batch_is_tried_again(connect, platform, photos):
    minted: Counter[str] = Counter()

    def mint(name: str) -> Callable[[], str]:
        def make() -> str:
            minted[name] += 1
            return photos.photo(name)

        return make

    items = [{"image_url": mint(name)} for name in ("coffee.jpg", "rocket.jpg", "china.jpg")]
    results = connect(platform).embed_image_batch(items)
    assert [r.get("code") for r in results] == [None, "INTERNAL", None]
    assert minted == {"coffee.jpg": 1, "rocket.jpg": 3, "china.jpg": 1}


def test_a_function_that_fails_harms_its_own_item(connect, platform, photos):
    def broken() -> str:
        raise RuntimeError(TOKEN)

    good, bad = connect(platform).embed_image_batch(
        [{"image_url": photos.photo}, {"image_url": broken, "request_id": "b"}]
    )
    assert good["dim"] == 512 and (bad["code"], bad["request_id"]) == ("MINT_FAILED", "b")
    assert "RuntimeError" in bad["error"] and TOKEN not in bad["error"]


# --- who asks ------------------------------------------------------------------------


def test_a_wrong_api_key_is_told_apart_from_a_wrong_secret(connect, platform, photos):
    key = fails(connect(platform, api_key="rpa_SOMEBODY_ELSES").embed_image_url, photos.photo())
    secret = "another-secret-of-32-bytes-ok-ok"
    signature = fails(connect(platform, hmac_secret=secret).embed_image_url, photos.photo())
    assert type(key) is type(signature) is ClipInferenceAuthError
    assert (key.code, signature.code) == ("API_KEY_REFUSED", "AUTH_FAILED")
    assert "RUNPOD_API_KEY" in str(key) and "EMBEDDING_HMAC_SECRET" in str(signature)


def test_what_concerns_all_ends_a_batch(connect, platform, photos):
    client = connect(platform, hmac_secret="another-secret-of-32-bytes-ok-ok", max_items=2)
    error = fails(client.embed_image_batch, [{"image_url": photos.photo()}] * 12)
    assert error.code == "AUTH_FAILED"


def test_an_unknown_endpoint_is_told(connect, platform, photos):
    error = fails(connect(platform, endpoint_id="nobody").embed_image_url, photos.photo())
    assert error.code == "ENDPOINT_NOT_FOUND" and isinstance(error, ClipInferenceSetupError)


@pytest.mark.parametrize(
    "vector", json.loads((ROOT / "test_vectors.json").read_text())["v2"], ids=lambda v: v["name"]
)
def test_the_signer_makes_the_published_signatures(vector, monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: vector["ts"] + 0.9)
    monkeypatch.setattr(endpoint, "new_nonce", lambda: vector["nonce"])
    signer = Signer(vector["kid"], vector["secret"], vector["audience"], max_lifetime_s=10**9)
    signed = signer.sign(vector["input"], vector["exp"] - vector["ts"] - 120)
    assert signed["auth"] == vector["auth"]


# --- giving up -----------------------------------------------------------------------


def test_a_call_that_times_out_cancels_its_job(connect, empty, photos, impatient):
    client = connect(empty, timeout_s=1.8)
    error = fails(client.embed_image_url, photos.photo())
    client.close()
    assert error.code == "TIMEOUT" and "IN_QUEUE" in str(error)
    assert job_of(empty).status == "CANCELLED"


def test_a_call_that_times_out_before_it_knows_its_job_cancels_it(connect, empty, photos):
    client = connect(empty, timeout_s=0.5)
    assert fails(client.embed_image_url, photos.photo()).code == "TIMEOUT"
    client.close()
    assert job_of(empty).status == "CANCELLED"


@pytest.mark.parametrize("after_s", [0.4, 1.6], ids=["in-runsync", "while-polling"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "batch"])
def test_ctrl_c_cancels_the_job(after_s, many, connect, empty, photos, impatient):
    client = connect(empty, max_items=1)
    threading.Timer(after_s, os.kill, [os.getpid(), signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        if many:
            client.embed_image_batch([{"image_url": photos.photo()}] * 3)
        else:
            client.embed_image_url(photos.photo())
    assert time.monotonic() - start < after_s + 1
    client.close()
    assert Counter(job.status for job in empty.platform.jobs.values()) == {
        "CANCELLED": 3 if many else 1
    }


def test_a_cancelled_task_cancels_its_job(empty, photos, impatient):
    async def main() -> None:
        env = {**empty.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET}
        async with AsyncClipClient.from_env(env) as client:
            for call in (
                client.embed_image_url(photos.photo()),
                client.embed_image_batch([{"image_url": photos.photo()}] * 2),
            ):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(call, 0.5)

    asyncio.run(main())
    assert {job.status for job in empty.platform.jobs.values()} == {"CANCELLED"}
    assert len(empty.platform.jobs) == 2


def test_a_closed_client_says_so(connect, platform, photos):
    client = connect(platform)
    client.close()
    assert fails(client.embed_image_url, photos.photo()).code == "CLOSED"
    assert fails(client.embed_image_batch, [{"image_url": photos.photo()}]).code == "CLOSED"


# --- answers that lie ------------------------------------------------------------------


def bent(**changes: object) -> Callable[[dict], dict]:
    """Return a rewriting of a worker's reply with other fields in its output."""
    return lambda reply: {**reply, "output": {**reply["output"], **changes}}


@pytest.mark.parametrize(
    ("rewrite", "code"),
    [
        (bent(embedding="AADAfw==" * 256), "BAD_ANSWER"),
        (bent(embedding=[math.nan] * 512), "BAD_ANSWER"),
        (bent(embedding=[0.1] * 512), "BAD_ANSWER"),
        (bent(embedding=[1.0] + [0] * 510), "BAD_ANSWER"),
        (bent(embedding=None), "BAD_ANSWER"),
        (bent(dim=768, embedding=[1.0] + [0] * 767), "BAD_ANSWER"),
        (bent(normalized=False), "BAD_ANSWER"),
        (bent(request_id="another"), "BAD_ANSWER"),
        (bent(space_id=None), "BAD_ANSWER"),
        (bent(model="ViT-L-14"), "WRONG_MODEL"),
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
    monkeypatch.setattr(endpoint, "FIRST_S", 0.05)
    platform.behaviour.rewrite = rewrite
    error = fails(connect(platform).embed_image_url, photos.photo())
    assert error.code == code and TOKEN not in str(error)


@pytest.mark.parametrize("changes", [{"results": []}, {"results": 3}, {"request_id": "another"}])
def test_a_batch_that_is_not_the_one_asked_for_is_refused(changes, connect, platform, photos):
    platform.behaviour.rewrite = bent(**changes)
    results = connect(platform).embed_image_batch([{"image_url": photos.photo()}] * 3)
    assert [result["code"] for result in results] == ["BAD_ANSWER"] * 3


def test_answers_that_change_places_are_refused(connect, platform, photos):
    platform.behaviour.rewrite = lambda reply: bent(results=reply["output"]["results"][::-1])(reply)
    items = [{"image_url": photos.photo(name), "request_id": name} for name in GOOD[:3]]
    codes = [result.get("code") for result in connect(platform).embed_image_batch(items)]
    assert codes == ["BAD_ANSWER", None, "BAD_ANSWER"]


def test_another_space_is_refused(connect, platform, photos):
    client = connect(platform)
    assert client.embed_image_url(photos.photo())["space_id"] == client.space_id
    platform.behaviour.rewrite = bent(space_id="0123456789abcdef")
    assert fails(client.embed_image_url, photos.photo()).code == "SPACE_CHANGED"
    assert fails(connect(platform, space_id="ff").embed_image_url, photos.photo()).code == (
        "SPACE_CHANGED"
    )


# --- a platform that lies ------------------------------------------------------------------


@contextlib.contextmanager
def lying(answer: bytes | Callable, timeout_s: float = 3) -> Iterator[tuple[ClipClient, list[str]]]:
    """Open a client whose platform says `answer` to everything."""
    speak = say(answer) if isinstance(answer, bytes) else answer

    def talk(connection) -> None:
        size = re.search(r"Content-Length: (\d+)", heard[-1])
        while size and len(heard[-1].partition("\r\n\r\n")[2]) < int(size[1]):
            heard[-1] += connection.recv(65_536).decode("latin-1")
        speak(connection)

    with serve(talk) as (port, heard):
        env = {"RUNPOD_BASE_URL": f"http://127.0.0.1:{port}/v2", "RUNPOD_API_KEY": "rpa_MY_API_KEY"}
        env |= {"RUNPOD_CLIP_ENDPOINT_ID": "abc", "EMBEDDING_HMAC_SECRET": SECRET}
        with ClipClient.from_env(env, timeout_s=timeout_s) as client:
            yield client, heard


def http(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """Return an HTTP answer in bytes."""
    headers = {"Content-Length": len(body), "Connection": "close"} | headers
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_redirect_to_another_host_gets_nothing():
    with serve(say(http(b"{}"))) as (port, stolen):
        elsewhere = f"http://localhost:{port}/v2/abc/runsync"
        for status in ("301 Moved", "307 Temporary", "308 Permanent"):
            with lying(http(b"", status, Location=elsewhere)) as (client, heard):
                assert fails(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
            assert "Bearer rpa_MY_API_KEY" in heard[0]
        assert stolen == []


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in</html>", b"[]", b"{}", b'{"id": 7, "status": "COMPLETED"}', b"[" * 50_000,
        b'{"id": "../../purge-queue", "status": "IN_QUEUE"}', b"", b"\xff\xfe",
    ],
    ids=lambda body: str(body[:20]),
)  # fmt: skip
def test_an_answer_that_is_none_is_refused(body):
    with lying(http(body)) as (client, heard):
        error = fails(client.embed_text, "a cat")
    assert error.code == "PLATFORM_ANSWER" and isinstance(error, ClipInferenceNetworkError)
    assert not any("purge" in line for line in heard)


def test_an_answer_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1_000_000)

    def endless(connection) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65_536)

    with lying(endless, timeout_s=20) as (client, _):
        assert fails(client.embed_text, "a cat").code == "PLATFORM_ANSWER"


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"])
def test_a_dripping_answer_ends_at_the_deadline(head, impatient):
    def drip(connection) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"H")
            time.sleep(0.05)

    start = time.monotonic()
    with lying(drip, timeout_s=1) as (client, _):
        assert fails(client.embed_text, "a cat").code in ("TIMEOUT", "UNREACHABLE")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("state", ['"PONDERING"', "[]", "{}", "null", "[" * 900 + "]" * 900])
def test_a_state_nobody_knows_is_waited_for_until_the_deadline(state):
    said = http(b'{"id": "j-1", "status": %s}' % state.encode())
    with lying(said, timeout_s=1) as (client, heard):
        error = fails(client.embed_text, "a cat")
        assert error.code == "TIMEOUT" and ("PONDERING" in str(error)) == ("PONDERING" in state)
    assert "POST /v2/abc/cancel/j-1" in heard[-1]


def test_the_platform_tells_of_another_job():
    answers = iter([b'{"id": "j-1", "status": "IN_QUEUE"}'])
    other = b'{"id": "j-2", "status": "COMPLETED", "output": {}}'
    with lying(lambda c: c.sendall(http(next(answers, other)))) as (client, heard):
        assert fails(client.embed_text, "a cat").code == "PLATFORM_ANSWER"
    assert "POST /v2/abc/cancel/j-1" in heard[-1]


def test_no_error_holds_a_secret_a_signature_or_a_query():
    answers = [
        http(b""), http(b"{", "500 no"), http(b"", "401 no"), http(b"", "302 no", Location="http://x"),
        http(b'{"id": "j", "status": "FAILED", "error": "https://a/b?token=%s %s"}'
             % (TOKEN.encode(), SECRET.encode() * 2)),
        b"nonsense", b"",
    ]  # fmt: skip
    for answer in answers:
        with lying(answer, timeout_s=0.7) as (client, heard):
            error = fails(client.embed_image_url, f"https://abc.supabase.co/a.jpg?token={TOKEN}")
        told = ""
        while error:
            told += repr(error) + repr(vars(error))
            error = error.__cause__ or error.__context__
        sent = json.loads(heard[0].partition("\r\n\r\n")[2])["input"]["auth"]["sig"]
        for secret in (TOKEN, SECRET, "rpa_MY_API_KEY", sent):
            assert secret not in told, told


def test_over_tls_an_answer_is_read_and_a_dripping_one_is_left(tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def failed_then_drip(connection) -> None:
        if len(heard) == 1:
            return connection.sendall(http(b'{"id": "j", "status": "CANCELLED"}'))
        while True:
            connection.sendall(b"H")
            time.sleep(0.05)

    with serve(failed_then_drip, tls=context) as (port, heard):
        session = endpoint.open_session(url := f"https://127.0.0.1:{port}/", "rpa_MY_API_KEY")
        assert fails(endpoint.exchange, session, "GET", url, None, 5).code == "UNREACHABLE"
        assert heard == []  # nobody vouches for this server
        session.verify = str(tmp_path / "ca.pem")
        assert endpoint.exchange(session, "GET", url, None, 5).said["status"] == "CANCELLED"
        start = time.monotonic()
        assert fails(endpoint.exchange, session, "GET", url, None, 0.7).code == "UNREACHABLE"
        assert 0.6 < time.monotonic() - start < 2


def test_only_what_must_be_is_sent(photos):
    with lying(http(b"", "401 no")) as (client, heard):
        fails(client.embed_image_url, photos.photo(), "s-1")
    head, _, body = heard[0].partition("\r\n\r\n")
    asked = json.loads(body)
    assert "Cookie" not in head and "Authorization: Bearer rpa_MY_API_KEY" in head
    assert asked["input"]["auth"]["v"] == 2 and asked["input"]["encoding_format"] == "base64"
    assert 120 < asked["input"]["auth"]["exp"] - asked["input"]["auth"]["ts"] <= 3600
    assert asked["policy"]["ttl"] >= 10_000 and SECRET not in heard[0]


def test_a_netrc_takes_no_ones_place(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with lying(http(b"", "401 no")) as (client, heard):
        assert fails(client.embed_text, "a cat").code == "API_KEY_REFUSED"
    assert "Bearer rpa_MY_API_KEY" in heard[0]


# --- health --------------------------------------------------------------------------------


def test_health_tells_states_apart(connect, empty, tmp_path, photos):
    client = connect(empty)
    assert client.health_check()["status"] == "cold"
    empty.submit({"text": "a cat"})
    assert client.health_check()["status"] == "no_workers"
    empty.behaviour.throttled = 1
    assert client.health_check()["status"] == "throttled"
    empty.behaviour.throttled = 0
    empty.call(lambda: setattr(empty.platform.heard("pod-9"), "unhealthy", True))
    said = client.health_check()
    assert (said["status"], said["workers"]["unhealthy"]) == ("crash_loop", 1)
    assert "log" in said["message"]


def test_health_is_ready_when_a_worker_is(connect, platform):
    said = connect(platform).health_check()
    assert said["status"] == "ready" and said["workers"]["ready"] == 1
    assert fails(connect(platform, api_key="rpa_WRONG_KEY").health_check).code == "API_KEY_REFUSED"


# --- the plain install ---------------------------------------------------------------------


def test_the_client_is_light():
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


PLAINLY = """
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


def test_the_plain_install_is_enough_and_survives_a_bad_day(platform, photos, tmp_path):
    packages = Path(requests.__file__).parent.parent
    for path in [ROOT / "heimdex_clip_worker", *(p for n in NEEDS for p in packages.glob(n))]:
        (tmp_path / path.name).symlink_to(path)
    platform.behaviour.queue_delay_s = 0.5
    platform.behaviour.fail("caller", 429, 500, Fault(drop=True), Fault(hang_s=1), Fault(503))
    env = json.dumps({**platform.caller_env(), "EMBEDDING_HMAC_SECRET": SECRET})
    run = [sys.executable, "-I", "-S", "-c", PLAINLY, str(tmp_path), env]
    run += [photos.photo(name) for name in GOOD]
    done = subprocess.run(run, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [48, 0, 512, []]


# --- this machine ---------------------------------------------------------------------------

LOCALLY = """
import json, sys
from heimdex_clip_worker.client import ClipClient

with ClipClient.from_env(timeout_s=60) as client:
    one = client.embed_image_url(sys.argv[1])
    text = client.embed_text("a cat")
    many = client.embed_image_batch([{"image_url": url} for url in sys.argv[1:]])
    print(json.dumps([one, text, *many]))
"""


@pytest.mark.timeout(300)
def test_local_vectors_are_the_workers_own(embedder, photos, tmp_path):
    from heimdex_clip_worker.embed import to_vectors

    names = GOOD[:2]
    urls = [*map(photos.photo, names), photos.url + "/missing"]
    env = plain_env(tmp_path, **hub_env(tmp_path), CLIP_INFERENCE_BACKEND="local")
    run = [sys.executable, "-c", LOCALLY, *urls]
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


# --- the printed example ---------------------------------------------------------------------


def printed(language: str, word: str) -> str:
    """Return the README's block in `language` that holds `word`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", readme, re.S) if word in b]
    return block


@pytest.mark.skipif(not shutil.which("openssl") or not shutil.which("curl"), reason="needs both")
def test_the_printed_shell_example_works(platform, photos, tmp_path):
    script = printed("sh", "openssl dgst").replace("https://api.runpod.ai/v2", platform.base_url)
    env = plain_env(tmp_path, IMAGE_URL=photos.photo(query="token=a&b=c"), no_proxy="*")
    env |= {"RUNPOD_API_KEY": platform.api_key, "RUNPOD_CLIP_ENDPOINT_ID": platform.endpoint_id}
    run = ["sh", "-eu", "-c", script]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    job = json.loads(done.stdout)
    assert (job["status"], job["output"]["request_id"]) == ("COMPLETED", "scene-abc-123"), job


def test_the_printed_python_example_works(platform, photos):
    code, names = printed("python", "auth import sign"), {}
    code, count = re.subn('url = ".*"', f"url = {photos.photo()!r}", code)
    code, more = re.subn('secret = ".*"', f"secret = {SECRET!r}", code)
    exec(code, names)
    job = platform.ask("POST", "/runsync", json=names["request"])
    assert (job["status"], count, more) == ("COMPLETED", 1, 1), job
