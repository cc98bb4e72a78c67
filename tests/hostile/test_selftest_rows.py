"""The catalogue's rows for the selftest, through the whole handler, and floods of selftests."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from dataclasses import replace

import pytest
import rows_auth
import rows_selftest
import stand
import torch
from fake_worker import FakeEmbedder
from test_payload_rows import check_log

pytestmark = pytest.mark.model

KIT = rows_auth.Kit(now=1_764_000_000)
JOB = {"id": "job", "input": {"selftest": True}}


class Counting(FakeEmbedder):
    """A model that counts its images."""

    images = 0

    def encode(self, pixels):
        Counting.images += len(pixels)
        return super().encode(pixels)


class Broken(Counting):
    """A model that fails each time."""

    def encode(self, pixels):
        super().encode(pixels)
        raise RuntimeError("broken, with a secret: hostile-rows")


class Turned(FakeEmbedder):
    """A model whose golden vectors are not what it computes."""

    @classmethod
    def load(cls, *args, **kwargs):
        return replace(super().load(*args, **kwargs), photos=torch.eye(3, 512))


def run_worker(work, *, model=FakeEmbedder, selftest=True):
    """Await `work` on a worker; return its result and the number of downloads."""
    fetcher, Counting.images = stand.Canned(stand.photo()), 0

    async def run():
        made = stand.make_worker(
            KIT, fetcher, embedder=model.load("ViT-B-32"), selftest=selftest
        )
        async with stand.running(made) as worker:
            return await work(worker)

    return asyncio.run(run()), fetcher.count


@pytest.mark.parametrize("row", rows_selftest.ROWS, ids=lambda row: row.id)
def test_row(row, caplog):
    caplog.set_level(logging.DEBUG, "heimdex_clip_worker")
    reply, count = run_worker(lambda worker: worker.handle(row.build(KIT)))

    assert stand.code_of(reply) == row.code, reply
    assert reply["request_id"] == row.request_id and count == 0
    check_log(caplog)


@pytest.mark.parametrize("row", rows_selftest.ROWS, ids=lambda row: row.id)
def test_switched_off_a_selftest_is_an_unsigned_request(row):
    reply, count = run_worker(lambda worker: worker.handle(row.build(KIT)), selftest=False)

    assert stand.code_of(reply) in {row.code, "INVALID_REQUEST"} - {"SELFTEST"} and count == 0


@pytest.mark.parametrize("model, code", [(Counting, "SELFTEST"), (Broken, "INTERNAL")])
def test_a_flood_costs_one_run(model, code, caplog):
    async def flood(worker):
        together = await asyncio.gather(*[worker.handle(JOB) for _ in range(2000)])
        after = [await worker.handle(JOB) for _ in range(200)]
        return together + after

    replies, count = run_worker(flood, model=model)
    assert {stand.code_of(reply) for reply in replies} == {code}
    assert (Counting.images, count) == (1, 0)
    check_log(caplog)


def test_a_vector_other_than_the_golden_one_is_an_error():
    reply, _ = run_worker(lambda worker: worker.handle(JOB), model=Turned)
    assert stand.code_of(reply) == "INFERENCE_FAILED"


def test_a_repeated_reply_takes_under_a_millisecond():
    async def timed(worker):
        await worker.handle(JOB)
        spent = []
        for _ in range(300):
            start = time.perf_counter()
            await worker.handle(JOB)
            spent.append(time.perf_counter() - start)
        return spent

    spent, _ = run_worker(timed)
    assert statistics.median(spent) < 0.001


def test_a_flood_of_cancelled_selftests_leaves_one_run_that_ends():
    async def flood(worker):
        jobs = [asyncio.ensure_future(worker.handle(JOB)) for _ in range(500)]
        await asyncio.sleep(0)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        return await worker.handle(JOB)

    reply, _ = run_worker(flood, model=Counting)
    assert stand.code_of(reply) == "SELFTEST" and Counting.images == 1


def test_cancelling_one_caller_does_not_cancel_the_others():
    async def two(worker):
        first, second = (asyncio.ensure_future(worker.handle(JOB)) for _ in range(2))
        await asyncio.sleep(0.001)
        first.cancel()
        return await second

    reply, _ = run_worker(two, model=Counting)
    assert stand.code_of(reply) == "SELFTEST" and Counting.images == 1


def test_a_flood_does_not_hold_up_signed_requests():
    async def mixed(worker):
        jobs = [JOB] * 1000 + [{"input": KIT.v1()}] * 20 + [JOB] * 1000
        return await asyncio.gather(*[worker.handle(job) for job in jobs])

    start = time.perf_counter()
    replies, count = run_worker(mixed, model=Counting)
    assert [stand.code_of(r) for r in replies].count("OK") == 20 == count
    assert Counting.images == 21 and time.perf_counter() - start < 20


def test_a_reply_can_be_changed_without_changing_the_next():
    async def twice(worker):
        first = await worker.handle(JOB)
        first["timings"].clear()
        first.clear()
        return await worker.handle(JOB)

    reply, _ = run_worker(twice)
    assert reply["selftest"] == "ok" and reply["timings"]


def test_row_ids_are_unique():
    ids = [row.id for row in rows_selftest.ROWS]
    assert len(set(ids)) == len(ids)
