"""The catalogue's rows for many images and texts, through the whole handler."""

from __future__ import annotations

import asyncio

import pytest
import rows_auth
import rows_many
import stand

from heimdex_clip_worker.auth import sign

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
