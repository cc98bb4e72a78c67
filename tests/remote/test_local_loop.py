"""The local backend in notebooks and threads: any thread may use it and close it, at any time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from heimdex_clip_worker.client import AsyncClipClient, ClipClient
from heimdex_clip_worker.errors import ClipInferenceError
from heimdex_clip_worker.remote import local

pytestmark = pytest.mark.server
FACTS = {"model": "ViT-B-32", "pretrained": "fake", "space_id": "00ff", "dim": 512}
URL = "https://abc.supabase.co/1.jpg"
ENV = {"CLIP_INFERENCE_BACKEND": "local"}


class FakeWorker:
    """A worker that answers each image with the same vector, after `delay_s`."""

    lost = False

    def __init__(self) -> None:
        self.delay_s, self.closed, self.started, self.cancelled = 0.0, 0, 0, 0
        self.images = SimpleNamespace(max_batch=8)

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        self.started += 1
        try:
            await asyncio.sleep(self.delay_s)
            await asyncio.to_thread(lambda: None)  # as for files: the loop's own executor
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        vector = {"embedding": [1.0] + [0.0] * 511, "normalized": True, "timings": {}, **FACTS}
        return {"request_id": job["input"]["request_id"], **vector}

    async def close(self) -> None:
        self.closed += 1
        await asyncio.sleep(0)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorker]:
    """Replace the model; no thread of the backend may be left after the test."""
    fake = FakeWorker()
    monkeypatch.setattr(local, "check_settings", lambda settings: None)
    monkeypatch.setattr(local, "_load_worker", lambda settings, with_files: (fake, fake))
    before = set(threading.enumerate())
    yield fake
    left = [t for t in set(threading.enumerate()) - before if "heimdex-clip-local" in t.name]
    assert not left


def use_once() -> int:
    with ClipClient.from_env(ENV) as client:
        return client.embed_image_url(URL)["dim"]


def close_by_hand() -> int:
    client = ClipClient.from_env(ENV)
    dim = client.embed_image_url(URL)["dim"]
    client.close()
    client.close()
    return dim


def one_client_in_many_threads() -> int:
    with ClipClient.from_env(ENV) as client, ThreadPoolExecutor(8) as pool:
        dims = {r["dim"] for r in pool.map(client.embed_image_url, [URL] * 32)}
    return dims.pop()


def close_without_use() -> int:
    ClipClient.from_env(ENV).close()
    return 512


def twice() -> int:
    assert use_once() == 512
    return use_once()


WAYS = [use_once, close_by_hand, one_client_in_many_threads, close_without_use, twice]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("patched", [False, True], ids=["asyncio", "patched-asyncio"])
def test_a_running_event_loop_does_not_matter(way, patched, worker, monkeypatch, recwarn):
    if patched:  # what notebooks do to nest loops: with some versions no task is the current one
        monkeypatch.setattr(asyncio, "current_task", lambda loop=None: None)

    async def cell() -> int:
        return way()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: pytest.fail(str(context)))
    assert loop.run_until_complete(cell()) == way() == 512
    loop.close()
    assert worker.closed >= 2 and not [w for w in recwarn if "never" in str(w.message)]


def test_each_of_many_threads_has_a_loop_and_a_client_of_its_own(worker):
    async def cell() -> int:
        return use_once()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: asyncio.run(cell()), range(16))) == [512] * 16
    assert worker.closed == 16


def test_the_asynchronous_client_can_be_closed_twice(worker):
    async def cell() -> int:
        async with AsyncClipClient.from_env(ENV) as client:
            results = await asyncio.gather(*[client.embed_image_url(URL) for _ in range(8)])
        await client.close()
        return len(results)

    assert asyncio.run(cell()) == 8 and worker.closed == 1


def all_closed(close: Callable[[], None], count: int = 8) -> None:
    """Close in many threads at once; every call must return."""
    start = threading.Barrier(count)

    def run() -> None:
        start.wait(5)
        close()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_several_threads_may_close_a_client_at_once(worker):
    for _ in range(20):
        client = ClipClient.from_env(ENV)
        client.embed_image_url(URL)
        all_closed(client.close)
    assert worker.closed == 20


def test_a_call_in_flight_ends_with_closed(worker):
    worker.delay_s = 60
    client = ClipClient.from_env(ENV)
    codes = []

    def embed() -> None:
        with pytest.raises(ClipInferenceError) as caught:
            client.embed_image_url(URL)
        codes.append(caught.value.code)

    threads = [threading.Thread(target=embed, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while worker.started < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    client.close()
    for thread in threads:
        thread.join(5)
    assert codes == ["CLOSED"] * 4 and worker.cancelled == 4
    with pytest.raises(ClipInferenceError) as caught:
        client.embed_image_url(URL)
    assert caught.value.code == "CLOSED"


def test_an_error_at_the_end_is_raised_and_leaves_no_thread(worker, monkeypatch):
    async def fail() -> None:
        raise RuntimeError("the pool is broken")

    monkeypatch.setattr(worker, "close", fail)
    client = ClipClient.from_env(ENV)
    with pytest.raises(RuntimeError, match="the pool is broken"):
        client.close()
    client.close()


@pytest.mark.usefixtures("ctrl_c")
def test_a_cancelled_task_cancels_its_job_in_this_process(worker):
    worker.delay_s = 60

    async def cell() -> float:
        async with AsyncClipClient.from_env(ENV) as client:
            task = asyncio.create_task(client.embed_image_url(URL))
            while not worker.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            task.cancel()
            start = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await task
        return time.monotonic() - start

    assert asyncio.run(cell()) < 1 and worker.cancelled == 1
