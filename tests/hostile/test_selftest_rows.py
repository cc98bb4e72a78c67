"""The catalogue's rows for the selftest, through the whole handler, and floods of it."""

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


def ask(work, *, model=FakeEmbedder, selftest=True):
    """Return what `work` makes of a worker, and how many downloads that took."""
    downloads, Counting.images = stand.Canned(stand.photo()), 0

    async def run():
        made = stand.make_worker(
            KIT, downloads, embedder=model.load("ViT-B-32"), selftest=selftest
        )
        async with stand.running(made) as worker:
            return await work(worker)

    return asyncio.run(run()), downloads.asked


@pytest.mark.parametrize("row", rows_selftest.ROWS, ids=lambda row: row.id)
def test_row(row, caplog):
    caplog.set_level(logging.DEBUG, "heimdex_clip_worker")
    reply, asked = ask(lambda worker: worker.handle(row.build(KIT)))

    assert stand.code_of(reply) == row.code, reply
    assert reply["request_id"] == row.request_id and asked == 0
    check_log(caplog)


@pytest.mark.parametrize("row", rows_selftest.ROWS, ids=lambda row: row.id)
def test_switched_off_it_is_a_request_that_nobody_signed(row):
    reply, asked = ask(lambda worker: worker.handle(row.build(KIT)), selftest=False)

    assert stand.code_of(reply) in {row.code, "INVALID_REQUEST"} - {"SELFTEST"} and asked == 0


@pytest.mark.parametrize("model, code", [(Counting, "SELFTEST"), (Broken, "INTERNAL")])
def test_a_flood_costs_one_run(model, code, caplog):
    async def flood(worker):
        together = await asyncio.gather(*[worker.handle(JOB) for _ in range(2000)])
        after = [await worker.handle(JOB) for _ in range(200)]
        return together + after

    replies, asked = ask(flood, model=model)
    assert {stand.code_of(reply) for reply in replies} == {code}
    assert (Counting.images, asked) == (1, 0)
    check_log(caplog)


def test_another_vector_than_the_golden_one_is_an_error():
    reply, _ = ask(lambda worker: worker.handle(JOB), model=Turned)
    assert stand.code_of(reply) == "INFERENCE_FAILED"


def test_an_answer_from_the_last_run_takes_under_a_millisecond():
    async def timed(worker):
        await worker.handle(JOB)
        spent = []
        for _ in range(300):
            start = time.perf_counter()
            await worker.handle(JOB)
            spent.append(time.perf_counter() - start)
        return spent

    spent, _ = ask(timed)
    assert statistics.median(spent) < 0.001


def test_a_flood_of_cancelled_ones_leaves_one_run_that_ends():
    async def flood(worker):
        jobs = [asyncio.ensure_future(worker.handle(JOB)) for _ in range(500)]
        await asyncio.sleep(0)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        return await worker.handle(JOB)

    reply, _ = ask(flood, model=Counting)
    assert stand.code_of(reply) == "SELFTEST" and Counting.images == 1


def test_who_is_cancelled_takes_nobody_along():
    async def two(worker):
        gone, stays = (asyncio.ensure_future(worker.handle(JOB)) for _ in range(2))
        await asyncio.sleep(0.001)
        gone.cancel()
        return await stays

    reply, _ = ask(two, model=Counting)
    assert stand.code_of(reply) == "SELFTEST" and Counting.images == 1


def test_a_flood_does_not_hold_up_those_who_sign():
    async def mixed(worker):
        jobs = [JOB] * 1000 + [{"input": KIT.v1()}] * 20 + [JOB] * 1000
        return await asyncio.gather(*[worker.handle(job) for job in jobs])

    start = time.perf_counter()
    replies, asked = ask(mixed, model=Counting)
    assert [stand.code_of(r) for r in replies].count("OK") == 20 == asked
    assert Counting.images == 21 and time.perf_counter() - start < 20


def test_a_reply_can_be_changed_without_changing_the_next():
    async def twice(worker):
        first = await worker.handle(JOB)
        first["timings"].clear()
        first.clear()
        return await worker.handle(JOB)

    reply, _ = ask(twice)
    assert reply["selftest"] == "ok" and reply["timings"]


def test_rows_have_ids_of_their_own():
    ids = [row.id for row in rows_selftest.ROWS]
    assert len(set(ids)) == len(ids)
