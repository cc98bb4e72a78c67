"""The catalogue's rows for many images and texts, through the whole handler."""

from __future__ import annotations

import asyncio
import time

import images as im
import pytest
import rows_auth
import rows_many
import stand
from fake_worker import FakeEmbedder

from heimdex_clip_worker.auth import sign
from heimdex_clip_worker.batch import BATCHES, FEWEST, Budget
from heimdex_clip_worker.contract import Bounds, parse
from heimdex_clip_worker.errors import InferenceFailed, InvalidRequest

KIT = rows_auth.Kit(now=1_764_000_000)


async def answer(job_input: dict) -> tuple[dict, int]:
    """Return the reply of one worker, and how many downloads it took."""
    downloads = stand.Canned(stand.photo())
    async with stand.running(stand.make_worker(KIT, downloads)) as worker:
        return await worker.handle({"id": "job", "input": job_input}), downloads.asked


@pytest.mark.parametrize("row", rows_many.ROWS, ids=lambda row: row.id)
def test_row(row):
    reply, asked = asyncio.run(answer(KIT.v2({**row.fields, "request_id": "job-1"})))

    assert stand.code_of(reply) == ("OK" if isinstance(row.codes, list) else row.codes), reply
    assert reply["request_id"] == "job-1"
    if isinstance(row.codes, list):
        assert [stand.code_of(result) for result in reply["results"]] == row.codes
    assert asked == (row.codes.count("OK") if "images" in row.fields and "results" in reply else 0)


@pytest.mark.parametrize("row", rows_many.ROWS, ids=lambda row: row.id)
def test_a_version_1_signature_covers_none_of_it(row):
    auth = sign(rows_many.URL, secret=KIT.v1_secret, ts=int(KIT.now))
    reply, asked = asyncio.run(answer({**row.fields, "auth": auth}))

    assert stand.code_of(reply) in {"AUTH_FAILED", "INVALID_REQUEST"} and asked == 0
    assert "results" not in reply


def test_what_is_in_the_list_is_signed():
    job = KIT.v2({"images": [rows_many.ONE, rows_many.ONE]})
    changed = [
        {**job, "images": [rows_many.ONE]},
        {**job, "images": [rows_many.ONE, {"image_url": rows_many.URL + "?"}]},
        {**job, "images": [rows_many.ONE, {**rows_many.ONE, "normalize": False}]},
        {**job, "encoding_format": "base64"},
    ]
    for forged in changed:
        reply, asked = asyncio.run(answer(forged))
        assert (stand.code_of(reply), asked) == ("AUTH_FAILED", 0)


def test_each_wish_and_each_id_comes_back_in_its_place():
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
    """Some servers take a second to answer."""

    async def fetch(self, url: str) -> bytes:
        if "slow" in url:
            await asyncio.sleep(1)
        return await super().fetch(url)


def beside_jobs(downloads: stand.Canned, jobs: int, url: str) -> float:
    """Return how long one image takes while jobs of 128 such URLs are under way."""

    async def one() -> float:
        many = KIT.v2({"images": [{"image_url": url}] * 128})
        async with stand.running(stand.make_worker(KIT, downloads)) as worker:
            others = [asyncio.create_task(worker.handle({"input": many})) for _ in range(jobs)]
            await asyncio.sleep(0.1)
            start = time.perf_counter()
            reply = await worker.handle({"input": KIT.v2({"image_url": rows_many.URL})})
            took = time.perf_counter() - start
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        assert stand.code_of(reply) == "OK"
        return took

    return asyncio.run(one())


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_job_of_slow_servers_keeps_nobody_waiting(jobs):
    assert beside_jobs(Slow(stand.photo()), jobs, rows_many.URL + "?slow") < 0.9


def test_a_job_of_large_images_keeps_nobody_waiting():
    large = im.png_rows((4000, 3000))  # 128 of them: 20 s of decoding
    took = beside_jobs(stand.Canned(large), 1, rows_many.URL)
    assert took < 5, took


class Counted(stand.Canned):
    """Downloads that take a moment, and are counted while they do."""

    now = most = 0

    async def fetch(self, url: str) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        return await super().fetch(url)


def test_no_more_is_downloaded_at_once_than_memory_is_meant_for():
    downloads = Counted(stand.photo())

    async def four() -> None:
        many = KIT.v2({"images": [rows_many.ONE] * 128})
        async with stand.running(stand.make_worker(KIT, downloads)) as worker:
            await asyncio.gather(*[worker.handle({"input": many}) for _ in range(4)])

    asyncio.run(four())
    assert downloads.asked == 512 and downloads.most <= 64


class Ahead(stand.Canned):
    """Counts the images in hand: asked for, and not yet through the model."""

    embedded = most = 0

    async def fetch(self, url: str) -> bytes:
        data = await super().fetch(url)
        self.most = max(self.most, self.asked - self.embedded)
        return data


def test_few_images_lie_ready_for_a_slow_model():
    downloads, embedder = Ahead(stand.photo()), FakeEmbedder.load("ViT-B-32")
    encode = embedder.encode

    def slow(pixels):
        time.sleep(0.05)
        downloads.embedded += len(pixels)
        return encode(pixels)

    object.__setattr__(embedder, "encode", slow)
    worker = stand.make_worker(KIT, downloads, embedder=embedder, max_batch=20)

    async def four() -> list[dict]:
        many = KIT.v2({"images": [rows_many.ONE] * 64})
        async with stand.running(worker):
            return await asyncio.gather(*[worker.handle({"input": many}) for _ in range(4)])

    assert [reply["count"] for reply in asyncio.run(four())] == [64] * 4
    assert downloads.embedded == 256 and 40 <= downloads.most <= BATCHES * 20


def test_a_model_of_small_batches_does_not_slow_the_downloads_down():
    downloads = Counted(stand.photo())
    worker = stand.make_worker(KIT, downloads, max_batch=1)

    async def one() -> dict:
        async with stand.running(worker):
            return await worker.handle({"input": KIT.v2({"images": [rows_many.ONE] * 128})})

    assert asyncio.run(one())["count"] == 128
    assert downloads.most >= FEWEST // 2  # a job that is alone has half


def test_a_download_waits_until_all_of_its_memory_is_free():
    async def second() -> bool:
        budget = Budget(10)
        await budget.take(6, "one")
        waiting = asyncio.ensure_future(budget.take(6, "another"))
        await asyncio.sleep(0.01)
        early = waiting.done()
        budget.give_back(6, "one")
        await asyncio.wait_for(waiting, 1)
        return early

    assert asyncio.run(second()) is False


def test_an_answer_that_would_not_pass_is_refused_before_the_work():
    job = {"images": [rows_many.ONE] * 128}
    assert parse(job, Bounds(dim=1024)).many
    with pytest.raises(InvalidRequest, match="allowed: at most 97 images fit"):
        parse(job, Bounds(dim=4096))


def test_one_lost_device_among_many_images_ends_the_worker():
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
