"""The benchmark's own parts: its plain worker, its callers, its goals, its table and pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from aiohttp import web
from local_worker import SECRET, PhotoServer
from PIL import Image

from benchmarks import ROOT, bench, figures, kernels, photos, plots, standin_worker, workers
from benchmarks.figures import GOALS, Figure
from benchmarks.load import BenchmarkFailed, Callers, Seen, single, vectors_of
from benchmarks.workers import OURS, PLAIN, Worker
from heimdex_clip_worker.auth import Keyring, verify

KEYRING = Keyring(SECRET, {}, audience="heimdex-clip", window_s=120, max_lifetime_s=3600)


# --- the plain worker ---------------------------------------------------------


def test_the_plain_worker_answers_as_the_specification_says(embedder):
    """One start for both: a signed request has our vector, a forged one is refused."""
    with PhotoServer() as server, workers.local(PLAIN) as plain:
        said = asyncio.run(plain_answers(plain, server.photo("coffee.jpg")))
    found = said[0]["output"].pop("embedding")
    timings = said[0]["output"].pop("timings")
    assert said[0]["output"] == {
        "request_id": "one", "dim": 512, "model": "ViT-B-32", "pretrained": "openai",
        "normalized": True,
    }  # fmt: skip
    assert timings.keys() == {"download_ms", "inference_ms", "total_ms"}
    with Image.open(photos.ROOT / "heimdex_clip_worker" / "photos" / "coffee.jpg") as image:
        ours = embedder.embed([image.convert("RGB")])[0]
    assert np.dot(found, ours) > 0.999
    assert (said[1]["status"], said[1]["error"]) == ("FAILED", "Authentication failed")


async def plain_answers(plain: Worker, url: str) -> list[dict]:
    forged = single(url, "two")
    forged["auth"]["sig"] = "0" * 64
    async with aiohttp.ClientSession() as session:
        callers = Callers(session, url.partition("/photos/")[0], ["missing"])
        while True:
            try:
                return [
                    json.loads(await callers.post(plain, job))
                    for job in (single(url, "one"), forged)
                ]
            except aiohttp.ClientConnectorError:
                assert plain.process.process.poll() is None, plain.process.tail()
                await asyncio.sleep(0.1)


def test_the_plain_worker_is_this_packages_in_nothing():
    text = (ROOT / "benchmarks" / "plain_worker.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) (heimdex_clip_worker|benchmarks)", text, re.MULTILINE)


def test_the_stand_in_makes_the_same_vector_of_both_kinds_of_pixels():
    u8 = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (standin_worker.MEAN, standin_worker.STD))
    start = time.perf_counter()
    theirs = standin_worker.sampled((u8 / 255 - mean) / std)
    assert time.perf_counter() - start >= standin_worker.SLEEP_S
    torch.testing.assert_close(standin_worker.sampled(u8), theirs)


# --- the callers --------------------------------------------------------------


def row(name: str) -> list[float]:
    """Return a vector that tells which photograph it is of."""
    return np.random.default_rng(int.from_bytes(name.encode()[:4], "big")).normal(size=4).tolist()


async def driven(seen: Seen, kind: str, **load: int) -> tuple[object, list[dict]]:
    """Drive a stand-in that checks signatures and answers as the workers do."""
    asked: list[dict] = []

    def item(url: str, request_id: str, plain: bool) -> dict:
        values = row(url.rpartition("/")[2])
        written = base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
        return {"request_id": request_id, "embedding": values if plain else written}

    async def runsync(request: web.Request) -> web.Response:
        job = (await request.json())["input"]
        verify(job, keyring=KEYRING, now=time.time())
        asked.append(job)
        if "image_url" in job:
            output = item(job["image_url"], job["request_id"], plain=True)
        else:
            images = job["images"]
            output = {"results": [item(i["image_url"], i["request_id"], False) for i in images]}
        return web.json_response({"status": "COMPLETED", "output": output})

    app = web.Application()
    app.router.add_post("/runsync", runsync)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        callers = Callers(session, "http://origin", ["a", "b", "c", "d", "e"])
        run = await callers.drive(Worker(kind, url, None, 0.0), seen, **load)
    await runner.cleanup()
    return run, asked


def test_callers_send_signed_jobs_and_keep_every_vector():
    seen = Seen()
    run, asked = asyncio.run(driven(seen, OURS, jobs=6, callers=2, images=3, delay_ms=50))
    assert (run.images, len(run.latencies_s), len(asked)) == (18, 6, 6)
    assert run.rate == pytest.approx(18 / run.seconds)
    assert asked[0]["images"][0]["image_url"] == "http://origin/50/a"
    asyncio.run(driven(seen, PLAIN, jobs=5, callers=64))
    assert seen.compare()["vectors"] == {PLAIN: 5, OURS: 18}
    assert seen.compare()["least_cosine_to_plain"][OURS] == pytest.approx(1)


def test_one_vector_that_differs_ends_the_run():
    seen = Seen()
    asyncio.run(driven(seen, PLAIN, jobs=5, callers=1))
    seen.add(OURS, "a", np.asarray(row("a")))
    seen.compare()
    seen.add(OURS, "b", np.asarray(row("c")))
    with pytest.raises(BenchmarkFailed, match="ours: b has the cosine"):
        seen.compare()


def test_a_photograph_that_plain_never_had_is_noticed():
    seen = Seen()
    seen.add(OURS, "a", np.asarray(row("a")))
    assert (seen.missing(PLAIN), seen.missing(OURS)) == (["a"], [])
    with pytest.raises(BenchmarkFailed, match="never asked for"):
        seen.compare()


GOOD = {"request_id": "j.0", "embedding": [1.0, 0.0]}


@pytest.mark.parametrize(
    "said",
    [
        {"status": "FAILED", "error": "no"},
        {"status": "IN_PROGRESS"},
        {"status": "COMPLETED", "output": {"results": [GOOD]}},
        {"status": "COMPLETED", "output": {"results": [GOOD, GOOD | {"request_id": "j.2"}]}},
        {
            "status": "COMPLETED",
            "output": {"results": [GOOD, {"request_id": "j.1", "error": "HTTP 404"}]},
        },
    ],
    ids=["failed", "unfinished", "too-few", "out-of-order", "a-failed-image"],
)
def test_an_answer_that_is_not_complete_ends_the_run(said):
    with pytest.raises(BenchmarkFailed):
        vectors_of(json.dumps(said).encode(), "j", 2)


def test_every_twenty_photographs_hold_the_mix(monkeypatch):
    monkeypatch.setattr(photos, "make", lambda kind, number: (kind, number))
    found = photos.pool(2)
    for block in (found[:20], found[20:]):
        assert {kind: sum(k == kind for k, _ in block) for kind in photos.MIX} == photos.MIX
    assert len(set(found)) == 40


def test_memory_shared_with_a_child_is_counted_once():
    code = "import os, time; held = bytearray(os.urandom(80_000_000)); os.fork(); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        main = psutil.Process(parent.pid)
        deadline = time.monotonic() + 20
        while not main.children() and time.monotonic() < deadline:
            time.sleep(0.02)
        twice = main.memory_info().rss + main.children()[0].memory_info().rss
        assert 80e6 < workers.memory(parent.pid) < twice - 70e6
    finally:
        os.killpg(parent.pid, 9)
        parent.wait(10)


# --- the goals and what is shown ----------------------------------------------


def test_every_goal_is_measured_somewhere():
    kernel = {"encode", "preprocess-1080p", "preprocess-12mp"}
    measured = bench.UNDER_LOAD | {*bench.STANDIN_LOADS} | kernel | {"start"}
    assert measured == {*GOALS}


def test_a_goal_is_met_on_its_own_side_only():
    most, least = GOALS["memory"], GOALS["singles"]
    assert (most.met(0.6), most.met(0.61), least.met(25), least.met(24.9)) == (
        True, False, True, False,
    )  # fmt: skip


def test_a_figure_is_the_ratio_of_its_medians_and_memory_of_its_peaks():
    figure, memory = Figure("singles"), Figure("memory", by="max")
    for other, ours in ((1.0, 30.0), (1.1, 33.0), (5.0, 10.0)):
        figure.add(other, ours)
        memory.add(other, ours)
    assert figure.ratio == pytest.approx(30.0 / 1.1)
    assert memory.ratio == pytest.approx(33.0 / 5.0)


def test_the_table_shows_goals_met_and_missed():
    rows = {"singles": (1.05, 31.5), "batches": (1.05, 31.5), "encode": (800.0, 600.0)}
    found = []
    for name, (other, ours) in rows.items():
        found.append(Figure(name))
        found[-1].add(other, ours)
    lines = figures.table(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["one-image jobs, 64 callers", "images/s", "plain 1.05", "31.5", "30.0x", "≥ 25x", "yes"],
        ["jobs of 32 images, 4 callers", "images/s", "plain 1.05", "31.5", "30.0x", "≥ 35x", "NO"],
        ["encode at batch 32, share of GEMM", "GFLOP/s", "GEMM 800", "600", "75%", "≥ 70%", "yes"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_results_are_kept_whole_and_name_no_machine(tmp_path: Path):
    figure = Figure("singles", note="counts")
    figure.add(1.0, 26.0)
    path = tmp_path / "new" / f"{figures.file_stem(figures.machine())}.json"
    figures.write(path, {"machine": figures.machine(), "figures": {"singles": figure.as_json()}})
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert (kept["figures"]["singles"]["ratio"], kept["figures"]["singles"]["met"]) == (26, True)
    assert re.fullmatch(r"[a-z0-9-]+-\d{4}-\d\d-\d\d\.json", path.name)
    assert os.uname().nodename not in path.read_text(encoding="utf-8") + path.name


def test_both_pictures_are_drawn(tmp_path: Path):
    point = {"images_per_s": 20.0, "latencies_s": [0.1, 0.2] * 60}
    curves = {kind: [{"callers": n, **point} for n in (1, 8, 64)] for kind in (PLAIN, OURS)}
    curves |= {f"{kind}-lone": [0.1, 0.2] for kind in (PLAIN, OURS)}
    results = {"curves": curves, "figures": {"batches": {"ours": 30.0}}, "date": "2026-01-01"}
    results["machine"] = figures.machine()
    drawn = plots.draw(results, tmp_path / "here.json")
    assert [path.name for path in drawn] == ["here-throughput.png", "here-latency.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.size == (1140, 630)


def test_the_command_refuses_a_figure_it_does_not_know(capsys):
    assert bench.arguments(["--only", "json"]).only == ["json"]
    with pytest.raises(SystemExit):
        bench.arguments(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_a_vision_transformer_of_this_size_takes_9_gflop():
    assert kernels.flop() == pytest.approx(8.82e9, rel=1e-3)
