"""The catalogue's rows for many images and texts, through the whole handler; fair shares."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import images as im
import pytest
import rows_auth
import rows_many
import stand
import torch
from fake_worker import FakeEmbedder, FakeText

from heimdex_clip_worker.auth import sign
from heimdex_clip_worker.contract import Bounds, parse
from heimdex_clip_worker.errors import InferenceFailed, InvalidRequest
from heimdex_clip_worker.serving import pipeline as pipeline_module
from heimdex_clip_worker.serving.budget import Budget
from heimdex_clip_worker.serving.decode import NeedsMemory, PixelLimits
from heimdex_clip_worker.serving.pipeline import Pipeline, _Prepared

pytestmark = pytest.mark.model

KIT = rows_auth.Kit(now=1_764_000_000)


async def answer(job_input: dict) -> tuple[dict, int]:
    """Send a job to a worker; return the reply and the number of downloads."""
    fetcher = stand.Canned(stand.photo())
    async with stand.running(stand.make_worker(KIT, fetcher)) as worker:
        return await worker.handle({"id": "job", "input": job_input}), fetcher.count


@pytest.mark.parametrize("row", rows_many.ROWS, ids=lambda row: row.id)
def test_row(row):
    reply, count = asyncio.run(answer(KIT.v2({**row.fields, "request_id": "job-1"})))

    assert stand.code_of(reply) == ("OK" if isinstance(row.codes, list) else row.codes), reply
    assert reply["request_id"] == "job-1"
    if isinstance(row.codes, list):
        assert [stand.code_of(result) for result in reply["results"]] == row.codes
    assert count == (row.codes.count("OK") if "images" in row.fields and "results" in reply else 0)


@pytest.mark.parametrize("row", rows_many.ROWS, ids=lambda row: row.id)
def test_a_version_1_signature_is_not_enough(row):
    auth = sign(rows_many.URL, secret=KIT.v1_secret, ts=int(KIT.now))
    reply, count = asyncio.run(answer({**row.fields, "auth": auth}))

    assert stand.code_of(reply) in {"AUTH_FAILED", "INVALID_REQUEST"} and count == 0
    assert "results" not in reply


def test_the_items_are_signed():
    job = KIT.v2({"images": [rows_many.ONE, rows_many.ONE]})
    changed = [
        {**job, "images": [rows_many.ONE]},
        {**job, "images": [rows_many.ONE, {"image_url": rows_many.URL + "?"}]},
        {**job, "images": [rows_many.ONE, {**rows_many.ONE, "normalize": False}]},
        {**job, "encoding_format": "base64"},
    ]
    for forged in changed:
        reply, count = asyncio.run(answer(forged))
        assert (stand.code_of(reply), count) == ("AUTH_FAILED", 0)


def test_each_item_keeps_its_own_id_and_normalize():
    images = [
        {"image_url": rows_many.URL, "request_id": f"s-{i}", "normalize": i % 2 == 0}
        for i in range(20)
    ]
    reply, _ = asyncio.run(answer(KIT.v2({"images": images})))

    assert [r["request_id"] for r in reply["results"]] == [f"s-{i}" for i in range(20)]
    for result, image in zip(reply["results"], images, strict=True):
        length = sum(x * x for x in result["embedding"]) ** 0.5
        assert result["normalized"] is image["normalize"]
        assert (abs(length - 1) < 1e-6) is image["normalize"]


class Slow(stand.Canned):
    """A fetcher whose slow servers take long."""

    async def fetch(self, url: str) -> bytes:
        if "slow" in url:
            await asyncio.sleep(9)
        return await super().fetch(url)


def seconds_beside(
    fetcher: stand.Canned,
    jobs: int,
    url: str,
    max_batch: int = 64,
    more: dict | None = None,
    after_s: float | None = None,
) -> float:
    """Time one image, or the job `more`, while jobs of 128 such URLs are in flight."""
    fields = more or {"image_url": rows_many.URL}

    async def one() -> float:
        many = KIT.v2({"images": [{"image_url": url}] * 128})
        worker = stand.make_worker(KIT, fetcher, max_batch=max_batch)
        async with stand.running(worker):
            others = [asyncio.create_task(worker.handle({"input": many})) for _ in range(jobs)]
            await asyncio.sleep(after_s or 0.1 + 0.02 * jobs)
            start = time.perf_counter()
            reply = await worker.handle({"input": KIT.v2(fields)})
            took = time.perf_counter() - start
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            budget = worker.pipeline.byte_budget
            assert budget.free == budget.total and not budget._held and not budget._evictable
        assert stand.code_of(reply) == "OK"
        return took

    return asyncio.run(one())


@pytest.mark.parametrize("jobs", [1, 4, 7, 20, 63])
@pytest.mark.parametrize("max_batch", [1, 64])  # as on a CPU and on a GPU
def test_a_job_of_slow_servers_does_not_hold_up_others(max_batch, jobs):
    url = rows_many.URL + "?slow"
    assert seconds_beside(Slow(stand.photo()), jobs, url, max_batch) < 0.9


def test_slow_servers_do_not_hold_up_a_job_of_many():
    many = {"images": [rows_many.ONE] * 20}
    assert seconds_beside(Slow(stand.photo()), 20, rows_many.URL + "?slow", more=many) < 2


class Steady(stand.Canned):
    """A fetcher that takes a moment for each image, and counts those that were given up."""

    cancelled = 0

    async def fetch(self, url: str) -> bytes:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().fetch(url)


def test_downloads_that_give_way_are_done_again():
    fetcher = Steady(stand.photo())
    worker = stand.make_worker(KIT, fetcher)

    async def thirty() -> list[dict]:
        many = KIT.v2({"images": [rows_many.ONE] * 30})
        async with stand.running(worker):
            jobs = [worker.handle({"input": many}) for _ in range(30)]
            return await asyncio.gather(*jobs)

    replies = asyncio.run(thirty())
    assert [(reply["count"], reply["failed"]) for reply in replies] == [(30, 0)] * 30
    assert fetcher.count == 900 and fetcher.cancelled > 0


def test_a_job_that_holds_nothing_is_served_first():
    async def order() -> list[str]:
        budget, served = Budget(10), []

        async def wait(count: int, job: str) -> None:
            await budget.acquire(count, job)
            served.append(job)

        await budget.acquire(4, "one")
        await budget.acquire(2, "two")
        waiting = [asyncio.ensure_future(wait(7, "none"))]
        await asyncio.sleep(0)
        waiting.append(asyncio.ensure_future(wait(2, "two")))
        await asyncio.sleep(0)
        budget.release(4, "one")
        await asyncio.sleep(0)
        budget.release(7, "none")
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        return served

    assert asyncio.run(order()) == ["none", "two"]


def test_a_cancelled_job_that_has_given_way_leaves_nothing():
    async def cancel() -> None:
        budget, rng = Budget(8), random.Random(1)

        async def hold(job: int) -> None:
            while True:
                async with budget.reserve(1, job) as reservation:
                    gone = asyncio.Event()
                    with reservation.may_evict(gone.set):
                        await gone.wait()
                    if rng.random() < 0.5:
                        await asyncio.sleep(0)

        for _ in range(20):
            jobs = [asyncio.ensure_future(hold(n % 6)) for n in range(40)]
            for job in rng.sample(jobs, 40):
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            assert budget.free == 8 and not budget._held and not budget._evictable
            assert not +budget._leaving
            async with budget.reserve(8):
                pass

    asyncio.run(cancel())


class Wordy(FakeText):
    """A text embedder that takes its time."""

    words_s = model_s = 0.0

    def tokenize(self, text):
        time.sleep(self.words_s if len(text) > 100 else 0)
        return super().tokenize(text)

    def encode(self, tokens):
        time.sleep(self.model_s)
        return super().encode(tokens)


@pytest.mark.parametrize("slow", ["slow-words", "slow-model"])
def test_jobs_of_texts_do_not_hold_up_a_query(slow, monkeypatch):
    attribute, seconds = {"slow-words": ("words_s", 0.02), "slow-model": ("model_s", 0.1)}[slow]
    monkeypatch.setattr(Wordy, attribute, seconds)
    monkeypatch.setattr(stand, "FakeText", Wordy)
    worker = stand.make_worker(KIT, stand.Canned(stand.photo()), max_batch=16)

    async def query() -> float:
        many = KIT.v2({"texts": ["word " * 100] * 128})
        async with stand.running(worker):
            others = [asyncio.create_task(worker.handle({"input": many})) for _ in range(4)]
            await asyncio.sleep(0.3)
            start = time.perf_counter()
            reply = await worker.handle({"input": KIT.v2({"text": "a red car"})})
            took = time.perf_counter() - start
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        assert stand.code_of(reply) == "OK"
        return took

    assert asyncio.run(query()) < 0.9


def test_a_job_of_large_images_does_not_hold_up_others():
    large = im.png_rows((4000, 3000))  # 128 of them: 20 s of decoding
    took = seconds_beside(stand.Canned(large), 1, rows_many.URL)
    assert took < 5, took


class Beside(stand.Canned):
    """A photograph, and another file behind URLs with `?other`."""

    def __init__(self, other: bytes):
        super().__init__(stand.photo())
        self.other = other

    async def fetch(self, url: str) -> bytes:
        data = await super().fetch(url)
        return self.other if url.endswith("?other") else data


def test_files_of_many_huffman_tables_share_memory_and_do_not_hold_up_others(monkeypatch):
    """Each takes 364 MiB: two at once took 722 MiB, and a photograph waited for both."""
    fetcher, now, most, lock = Beside(im.huffman_groups()), [0], [0], threading.Lock()
    prepare = pipeline_module.prepare_image

    def count(data, embedder, limits, max_bytes=None):
        is_whole = data is fetcher.other and max_bytes is None
        with lock:
            now[0] += is_whole
            most[0] = max(most[0], now[0])
        try:
            return prepare(data, embedder, limits, max_bytes)
        finally:
            with lock:
                now[0] -= is_whole

    monkeypatch.setattr(pipeline_module, "prepare_image", count)
    took = seconds_beside(fetcher, 4, rows_many.URL + "?other", after_s=1.5)
    assert most[0] == 1 and took < 5, (most, took)


def test_large_images_are_decoded_one_after_another_and_small_ones_beside_them(monkeypatch):
    """Five jobs of files that could take 600 MB each, on three threads, beside small images."""
    now, most, small_beside, lock = [0], [0], [0], threading.Lock()

    def prepare(data, embedder, limits, max_bytes=None):
        large = data == b"large"
        if large and max_bytes is not None and max_bytes < 600_000_000:
            raise NeedsMemory(600_000_000)
        with lock:
            now[0] += large
            most[0] = max(most[0], now[0])
            small_beside[0] += not large and now[0]
        time.sleep(0.05 if large else 0.005)
        with lock:
            now[0] -= large
        return _Prepared((8, 8), torch.zeros(3), 0.0)

    monkeypatch.setattr(pipeline_module, "prepare_image", prepare)

    async def mixed() -> int:
        pipeline = Pipeline(None, None, PixelLimits(), decode_workers=3)
        large = [asyncio.ensure_future(pipeline._prepare_in_turn(b"large", n)) for n in range(5)]
        for n in range(5):
            await asyncio.sleep(0.02)
            await pipeline._prepare_in_turn(b"small", n)
        await asyncio.gather(*large)
        return pipeline.large_bytes.free - pipeline.large_bytes.total

    assert asyncio.run(mixed()) == 0
    assert most[0] == 1 and small_beside[0] > 0


def test_a_job_of_slow_files_does_not_take_all_decode_threads(monkeypatch):
    """Three threads had six images of one job before that of another: two seconds each."""

    def prepare(data, embedder, limits, max_bytes=None):
        time.sleep(1 if data == b"slow" else 0)
        return _Prepared((8, 8), torch.zeros(3), 0.0)

    monkeypatch.setattr(pipeline_module, "prepare_image", prepare)

    async def other() -> float:
        pipeline = Pipeline(None, None, PixelLimits(), decode_workers=3)
        slow = [asyncio.ensure_future(pipeline._prepare_in_turn(b"slow", 1)) for _ in range(6)]
        await asyncio.sleep(0.1)
        start = time.perf_counter()
        await pipeline._prepare_in_turn(b"quick", 2)
        took = time.perf_counter() - start
        await asyncio.gather(*slow)
        return took

    assert asyncio.run(other()) < 0.5


class Counted(stand.Canned):
    """A fetcher that takes a moment, and counts the downloads in flight."""

    now = most = 0

    async def fetch(self, url: str) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        return await super().fetch(url)


def test_downloads_in_flight_fit_in_the_byte_budget():
    fetcher = Counted(stand.photo())

    async def four() -> None:
        many = KIT.v2({"images": [rows_many.ONE] * 128})
        async with stand.running(stand.make_worker(KIT, fetcher)) as worker:
            await asyncio.gather(*[worker.handle({"input": many}) for _ in range(4)])

    asyncio.run(four())
    assert fetcher.count == 512 and fetcher.most <= 64


class Ahead(stand.Canned):
    """Counts the images in flight: requested, and not yet through the model."""

    embedded = most = 0

    async def fetch(self, url: str) -> bytes:
        data = await super().fetch(url)
        self.most = max(self.most, self.count - self.embedded)
        return data


def test_few_images_lie_ready_for_a_slow_model():
    fetcher, embedder = Ahead(stand.photo()), FakeEmbedder.load("ViT-B-32")
    encode = embedder.encode

    def slow(pixels):
        time.sleep(0.05)
        fetcher.embedded += len(pixels)
        return encode(pixels)

    object.__setattr__(embedder, "encode", slow)
    worker = stand.make_worker(KIT, fetcher, embedder=embedder, max_batch=20)

    async def four() -> list[dict]:
        many = KIT.v2({"images": [rows_many.ONE] * 64})
        async with stand.running(worker):
            return await asyncio.gather(*[worker.handle({"input": many}) for _ in range(4)])

    assert [reply["count"] for reply in asyncio.run(four())] == [64] * 4
    assert fetcher.embedded == 256 and 40 <= fetcher.most <= 3 * 20  # three batches


def test_small_batches_do_not_slow_downloads_down():
    fetcher = Counted(stand.photo())
    worker = stand.make_worker(KIT, fetcher, max_batch=1)

    async def one() -> dict:
        async with stand.running(worker):
            return await worker.handle({"input": KIT.v2({"images": [rows_many.ONE] * 128})})

    assert asyncio.run(one())["count"] == 128
    assert fetcher.most >= 24  # of 48: a job on its own has half


def test_a_download_waits_until_all_of_its_memory_is_free():
    async def second() -> bool:
        budget = Budget(10)
        await budget.acquire(6, "one")
        waiting = asyncio.ensure_future(budget.acquire(6, "another"))
        await asyncio.sleep(0.01)
        early = waiting.done()
        budget.release(6, "one")
        await asyncio.wait_for(waiting, 1)
        return early

    assert asyncio.run(second()) is False


def test_an_answer_that_could_be_too_large_is_refused_before_any_work():
    job = {"images": [rows_many.ONE] * 128}
    assert parse(job, Bounds(dim=1024)).many
    with pytest.raises(InvalidRequest, match="allowed: at most 97 images fit"):
        parse(job, Bounds(dim=4096))


def test_a_device_lost_in_one_of_many_images_ends_the_worker():
    class Lost(FakeEmbedder):
        def encode(self, pixels):
            raise InferenceFailed(fatal=True)

    async def one() -> dict:
        made = stand.make_worker(
            KIT, stand.Canned(stand.photo()), embedder=Lost.load("ViT-B-32")
        )
        async with stand.running(made) as worker:
            return await worker.handle({"input": KIT.v2({"images": [rows_many.ONE] * 3})})

    reply = asyncio.run(one())
    assert reply["failed"] == 3 and reply["refresh_worker"] is True
