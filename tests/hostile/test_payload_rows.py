"""The catalogue's rows for payloads and authentication through the whole handler."""

from __future__ import annotations

import asyncio
import copy
import logging
import statistics
import time

import pytest
import rows_auth
import rows_payload
import stand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.model

KIT = rows_auth.Kit(now=1_764_000_000)
LOG = "heimdex_clip_worker"


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    """Assert that log lines hold no secret, and that each is short and in one piece."""
    for record in caplog.records:
        text = record.getMessage()
        assert not stand.SECRETS.search(text) and record.exc_info is None, text[:300]
        assert "\n" not in text and len(text) < 1000
        text.encode()


async def answer(jobs, fetcher):
    """Send `jobs` to one worker, one after another; return the replies."""
    async with stand.running(stand.make_worker(KIT, fetcher)) as worker:
        return [await worker.handle(job) for job in jobs]


@pytest.mark.parametrize("row", rows_payload.ROWS, ids=lambda row: row.id)
def test_row(row, caplog):
    caplog.set_level(logging.DEBUG, LOG)
    fetcher = stand.Canned(stand.photo())
    [reply] = asyncio.run(answer([row.build(KIT)], fetcher))

    assert stand.code_of(reply) == row.code, reply
    assert reply["request_id"] == row.request_id
    assert fetcher.count == (row.code == "OK")
    check_log(caplog)


@pytest.mark.parametrize("row", rows_auth.ROWS, ids=lambda row: row.id)
def test_auth_row(row, caplog):
    caplog.set_level(logging.DEBUG, LOG)
    fetcher = stand.Unresolved()
    [reply] = asyncio.run(answer([{"id": "job", "input": row.build(KIT)}], fetcher))

    if row.code == "OK":
        assert stand.code_of(reply) == "DNS_FAILED" and len(fetcher.names) == 1
    else:
        # the second code: if the payload is read first
        before = {row.or_else, "INVALID_URL"} if row.or_else else set()
        assert stand.code_of(reply) in {row.code} | before
        assert fetcher.names == []
    check_log(caplog)


def test_failed_authentication_takes_under_10_ms_and_looks_no_name_up():
    jobs = [{"input": row.build(KIT)} for row in rows_auth.ROWS if row.code != "OK"]
    fetcher = stand.Unresolved()

    async def timed() -> list[float]:
        async with stand.running(stand.make_worker(KIT, fetcher)) as worker:
            times = []
            for job in jobs:
                start = time.perf_counter()
                await worker.handle(job)
                times.append(time.perf_counter() - start)
            return times

    times = asyncio.run(timed())
    assert statistics.median(times) < 0.01
    assert statistics.quantiles(times, n=100)[94] < 0.05  # even with 20 MB of payload
    assert fetcher.names == []


def test_row_ids_are_unique():
    ids = [row.id for row in rows_payload.ROWS]
    assert len(set(ids)) == len(ids)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=20,
)
FIELD = st.sampled_from(["image_url", "request_id", "normalize", "model", "auth", "extra", "v"])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(FIELD, JSON, max_size=5), st.sampled_from(["bare", "v1", "v2"]))
def test_any_payload_ends_in_a_declared_code(fields, how):
    signed = {"bare": {}, "v1": KIT.v1(), "v2": KIT.v2()}[how]
    job = {"input": {**copy.deepcopy(signed), **fields}}
    [reply] = asyncio.run(answer([job], stand.Canned(stand.photo("clock.png"))))
    stand.code_of(reply)
    assert reply["request_id"] in ("unknown", job["input"].get("request_id"))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(JSON)
def test_any_job_ends_in_a_declared_code(job):
    [reply, other] = asyncio.run(answer([job, {"input": job}], stand.Canned(b"")))
    assert stand.code_of(reply) != "OK" and stand.code_of(other) != "OK"
