"""The catalogue's rows for faults inside the worker, through the whole handler."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading

import pytest
import rows_auth
import rows_fault
import stand
import torch
from fake_worker import FakeEmbedder, mean_and_size

from heimdex_clip_worker.errors import InferenceFailed
from heimdex_clip_worker.handler import Worker
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.serving.batcher import Batcher
from heimdex_clip_worker.serving.pipeline import Pipeline, Vector
from heimdex_clip_worker.serving.watchdog import Watchdog

pytestmark = pytest.mark.model

KIT = rows_auth.Kit(now=1_764_000_000)
JOB = {"id": "job", "input": KIT.v1(request_id="r")}
FINE = FakeEmbedder.load("ViT-B-32")


class Tower(torch.nn.Module):
    """A tower that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, pixels):
        return self.function(pixels)


class Below(FakeEmbedder):
    """The fake embedder with the real `encode`."""

    encode = Embedder.encode


class Instead(FakeEmbedder):
    """The fake embedder with a function in place of `encode`."""

    def encode(self, pixels):
        return self.tower.function(pixels)


def once(fail):
    """Make a function that fails on its first call and works from then on."""
    calls = []

    def function(pixels):
        calls.append(len(pixels))
        return fail(pixels) if len(calls) == 1 else FINE.encode(pixels)

    return function


def embedder(kind: type, function) -> Embedder:
    """Make a fake embedder around a function."""
    return dataclasses.replace(kind.load("ViT-B-32"), tower=Tower(function))


@pytest.mark.parametrize("row", rows_fault.ROWS, ids=lambda row: row.id)
def test_row(row, caplog):
    caplog.set_level(logging.DEBUG, "heimdex_clip_worker")
    calls = []

    async def two() -> list[dict]:
        model = embedder(Below if row.in_tower else Instead, once(row.fail))
        fetcher = stand.Canned(stand.photo())
        worker = stand.make_worker(
            KIT, fetcher, embedder=model, on_fatal=lambda: calls.append("lost")
        )
        async with stand.running(worker):
            return [await asyncio.wait_for(worker.handle(JOB), 3) for _ in range(2)]

    reply, after = asyncio.run(two())
    assert stand.code_of(reply) == row.code and reply["request_id"] == "r"
    assert reply.get("refresh_worker", False) is row.fatal
    assert stand.code_of(after) == ("INFERENCE_FAILED" if row.fatal else "OK")
    assert after.get("refresh_worker", False) is row.fatal
    assert calls == ["lost"] * row.fatal
    for record in caplog.records:
        text = record.getMessage()
        assert not stand.SECRETS.search(text) and record.exc_info is None and "\n" not in text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("text", rows_fault.OOM)
def test_memory_that_is_enough_for_half_a_batch(size, text):
    seen = []

    def function(pixels):
        seen.append(len(pixels))
        if len(pixels) > (size + 1) // 2:
            raise RuntimeError(text)
        return FINE.encode(pixels)

    pixels = torch.rand(size, 5)
    rows = embedder(Below, function).encode(pixels)
    assert torch.equal(rows, FINE.encode(pixels))
    assert seen == ([1] if size == 1 else [size, (size + 1) // 2, size // 2])


@pytest.mark.parametrize("size", [1, 2, 64])
def test_memory_that_is_never_enough(size):
    seen = []

    def function(pixels):
        seen.append(len(pixels))
        raise RuntimeError(rows_fault.OOM[0])

    with pytest.raises(InferenceFailed) as caught:
        embedder(Below, function).encode(torch.rand(size, 5))
    assert not caught.value.fatal and len(seen) <= 2


class Slow(FakeEmbedder):
    """The fake embedder, held up in one of its steps until it is released."""

    held, reached = threading.Event(), threading.Event()
    step = ""

    @classmethod
    def wait(cls, step: str) -> None:
        if step == cls.step:
            cls.reached.set()
            assert cls.held.wait(10)

    def preprocess(self, image):
        self.wait("decode")
        return mean_and_size(image)

    def encode(self, pixels):
        self.wait("forward")
        return super().encode(pixels)


@pytest.mark.parametrize("step", ["fetch", "decode", "forward"])
def test_cancelled(step):
    Slow.step = step
    Slow.held.clear()
    Slow.reached.clear()

    async def hold() -> None:
        if step == "fetch" and not Slow.held.is_set():
            Slow.reached.set()
            await asyncio.sleep(60)

    async def cancel() -> dict:
        fetcher = stand.Canned(stand.photo(), hold)
        worker = stand.make_worker(KIT, fetcher, embedder=Slow.load("ViT-B-32"))
        async with stand.running(worker):
            try:
                task = asyncio.ensure_future(worker.handle(JOB))
                assert await asyncio.to_thread(Slow.reached.wait, 10)
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=1)
                assert done and task.cancelled()
            finally:
                Slow.held.set()
            return await worker.handle(JOB)

    reply = asyncio.run(cancel())
    assert stand.code_of(reply) == "OK"


def test_a_fault_does_not_affect_its_neighbours():
    def function(pixels):
        if 451 in pixels[:, 3]:  # chelsea's width
            raise SystemExit(1)
        return FINE.encode(pixels)

    class Mixed(stand.Canned):
        async def fetch(self, url: str) -> bytes:
            self.count += 1
            return stand.photo("chelsea.jpg" if self.count % 2 else "clock.png")

    async def many() -> list[dict]:
        worker = stand.make_worker(KIT, Mixed(b""), embedder=embedder(Below, function))
        async with stand.running(worker):
            return await asyncio.gather(*(worker.handle(JOB) for _ in range(40)))

    codes = [stand.code_of(reply) for reply in asyncio.run(many())]
    assert codes.count("OK") == 20 and codes.count("INTERNAL") == 20


def test_a_batch_on_a_lost_device_is_not_retried():
    sizes = []

    def run(items):
        sizes.append(len(items))
        raise InferenceFailed(fatal=True)

    async def eight() -> None:
        batcher = Batcher(run, Watchdog().threads(1, "model"), max_batch=8)
        await asyncio.gather(*map(batcher.submit, range(8)), return_exceptions=True)

    asyncio.run(eight())
    assert sizes == [8]


class Leaving(Pipeline):
    """A pipeline that exits, on the event loop, for a URL that ends with `exit`."""

    async def embed_url(self, url: str, *args: object, **options: object) -> Vector:
        if url.endswith("exit"):
            raise SystemExit(1)
        return await super().embed_url(url, *args, **options)


def leaving_worker() -> Worker:
    """Make a worker with such a pipeline."""
    worker = stand.make_worker(KIT, stand.Canned(stand.photo()))
    worker.pipeline.__class__ = Leaving
    return worker


def test_system_exit_on_the_event_loop_stays_in_its_job():
    async def two() -> list[dict]:
        async with stand.running(leaving_worker()) as worker:
            names = ("exit", "a")
            jobs = [KIT.v2({"image_url": f"https://images.example/{name}"}) for name in names]
            return [await worker.handle({"input": job}) for job in jobs]

    assert [stand.code_of(reply) for reply in asyncio.run(two())] == ["INTERNAL", "OK"]


def test_system_exit_in_a_download_stays_in_its_job():
    async def leave() -> None:
        raise SystemExit(1)

    async def two() -> list[dict]:
        fetcher = stand.Canned(stand.photo(), leave)
        async with stand.running(stand.make_worker(KIT, fetcher)) as worker:
            first = await worker.handle(JOB)
            fetcher.after = None
            return [first, await worker.handle(JOB)]

    assert [stand.code_of(reply) for reply in asyncio.run(two())] == ["INTERNAL", "OK"]


def test_system_exit_on_the_event_loop_stays_in_its_item():
    async def many() -> dict:
        images = [{"image_url": f"https://images.example/{name}"} for name in ("a", "exit", "b")]
        async with stand.running(leaving_worker()) as worker:
            return await worker.handle({"input": KIT.v2({"images": images})})

    results = asyncio.run(many())["results"]
    assert [stand.code_of(result) for result in results] == ["OK", "INTERNAL", "OK"]


def test_a_reply_that_json_cannot_hold_is_an_error():
    model = dataclasses.replace(FakeEmbedder.load("ViT-B-32"), space_id=b"bytes")

    async def one() -> dict:
        fetcher = stand.Canned(stand.photo())
        async with stand.running(stand.make_worker(KIT, fetcher, embedder=model)) as worker:
            return await worker.handle(JOB)

    assert stand.code_of(asyncio.run(one())) == "INTERNAL"
