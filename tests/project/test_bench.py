"""The parts of the benchmark: its baseline worker, callers, goals, table and pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import ssl
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import psutil
import pytest
import torch
import trustme
from aiohttp import web
from local_worker import FAKE, SECRET, PhotoServer, WorkerProcess, free_port, plain_env
from PIL import Image

from benchmarks import (
    ROOT,
    bench,
    cpu,
    figures,
    kernels,
    network,
    photos,
    plots,
    standin_worker,
    turn,
    workers,
)
from benchmarks.delay_proxy import listen
from benchmarks.figures import GOALS, Figure
from benchmarks.image_server import listening
from benchmarks.load import BenchmarkFailed, Callers, Seen, single, vectors_of
from benchmarks.network import Sample
from benchmarks.workers import BASELINE, GOOD, OBSERVED, OURS, Worker
from heimdex_clip_worker.auth import Keyring, verify
from heimdex_clip_worker.model.photos import PHOTOS
from heimdex_clip_worker.model.tower import ImageShape, VisionTower

pytestmark = [pytest.mark.model, pytest.mark.process]

KEYRING = Keyring(SECRET, {}, audience="heimdex-clip", window_s=120, max_lifetime_s=3600)


# --- the baseline worker ------------------------------------------------------


@pytest.mark.parametrize("kind", [BASELINE, GOOD])
def test_a_baseline_worker_replies_as_the_specification_says(embedder, kind: str):
    """A signed request gets our vector, and a forged one is refused; one start for both."""
    with PhotoServer() as server, workers.local(kind, *OBSERVED[kind]) as baseline:
        signed, forged = asyncio.run(baseline_replies(baseline, server.photo("coffee.jpg")))
    vector = signed["output"].pop("embedding")
    timings = signed["output"].pop("timings")
    assert signed["output"] == {
        "request_id": "one", "dim": 512, "model": "ViT-B-32", "pretrained": "openai",
        "normalized": True,
    }  # fmt: skip
    assert timings.keys() == {"download_ms", "inference_ms", "total_ms"}
    with Image.open(PHOTOS / "coffee.jpg") as image:
        ours = embedder.embed([image.convert("RGB")])[0]
    assert np.dot(vector, ours) > 0.999
    assert (forged["status"], forged["error"]) == ("FAILED", "Authentication failed")


async def baseline_replies(baseline: Worker, url: str) -> list[dict]:
    forged = single(url, "two")
    forged["auth"]["sig"] = "0" * 64
    async with aiohttp.ClientSession() as session:
        callers = Callers(session, url.partition("/photos/")[0], ["missing"])
        while True:
            try:
                return [
                    json.loads(await callers.post(baseline, job))
                    for job in (single(url, "one"), forged)
                ]
            except aiohttp.ClientConnectorError:
                assert baseline.process.process.poll() is None, baseline.process.tail()
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("name", ["baseline_worker.py", "good_worker.py"])
def test_a_baseline_worker_uses_nothing_of_this_package(name: str):
    text = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) (heimdex_clip_worker|benchmarks)(\S*)", text, re.M)
    assert {*imported} <= {("benchmarks", ".baseline_worker")}


def test_the_stand_in_gives_the_same_vector_for_both_kinds_of_pixels():
    u8 = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (standin_worker.MEAN, standin_worker.STD))
    start = time.perf_counter()
    baseline = standin_worker.sampled((u8 / 255 - mean) / std)
    assert time.perf_counter() - start >= standin_worker.SLEEP_S
    torch.testing.assert_close(standin_worker.sampled(u8), baseline)


# --- the callers --------------------------------------------------------------


def row(name: str) -> list[float]:
    """Make a vector that differs from photograph to photograph."""
    return np.random.default_rng(int.from_bytes(name.encode()[:4], "big")).normal(size=4).tolist()


async def driven(seen: Seen, kind: str, **load: int) -> tuple[object, list[dict]]:
    """Drive a stand-in that checks signatures and replies as the workers do."""
    jobs: list[dict] = []

    def item(url: str, request_id: str, as_floats: bool) -> dict:
        values = row(url.rpartition("/")[2])
        encoded = base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
        return {"request_id": request_id, "embedding": values if as_floats else encoded}

    async def runsync(request: web.Request) -> web.Response:
        job = (await request.json())["input"]
        verify(job, keyring=KEYRING, now=time.time())
        jobs.append(job)
        if "image_url" in job:
            output = item(job["image_url"], job["request_id"], as_floats=True)
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
        callers = Callers(session, "http://images", ["a", "b", "c", "d", "e"])
        run = await callers.drive(Worker(kind, url, None, 0.0), seen, **load)
    await runner.cleanup()
    return run, jobs


def test_callers_send_signed_jobs_and_keep_every_vector():
    seen = Seen()
    run, jobs = asyncio.run(driven(seen, OURS, jobs=6, callers=2, images=3, delay_ms=50))
    assert (run.images, len(run.latencies_s), len(jobs)) == (18, 6, 6)
    assert run.rate == pytest.approx(18 / run.seconds)
    assert jobs[0]["images"][0]["image_url"] == "http://images/50/a"
    asyncio.run(driven(seen, BASELINE, jobs=5, callers=64))
    assert seen.compare()["vectors"] == {BASELINE: 5, OURS: 18}
    assert seen.compare()["least_cosine_to_baseline"][OURS] == pytest.approx(1)


def test_one_different_vector_ends_the_run():
    seen = Seen()
    asyncio.run(driven(seen, BASELINE, jobs=5, callers=1))
    seen.add(OURS, "a", np.asarray(row("a")))
    seen.compare()
    seen.add(OURS, "b", np.asarray(row("c")))
    with pytest.raises(BenchmarkFailed, match="ours: b has the cosine"):
        seen.compare()


def test_a_photograph_that_the_baseline_never_had_is_noticed():
    seen = Seen()
    seen.add(OURS, "a", np.asarray(row("a")))
    assert (seen.missing(BASELINE), seen.missing(OURS)) == (["a"], [])
    with pytest.raises(BenchmarkFailed, match="never asked for"):
        seen.compare()


GOOD = {"request_id": "j.0", "embedding": [1.0, 0.0]}


@pytest.mark.parametrize(
    "response",
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
def test_an_incomplete_reply_ends_the_run(response):
    with pytest.raises(BenchmarkFailed):
        vectors_of(json.dumps(response).encode(), "j", 2)


def test_every_twenty_photographs_have_the_mix(monkeypatch):
    monkeypatch.setattr(photos, "make", lambda kind, number: (kind, number))
    pool = photos.pool(2)
    for block in (pool[:20], pool[20:]):
        assert {kind: sum(k == kind for k, _ in block) for kind in photos.MIX} == photos.MIX
    assert len(set(pool)) == 40


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


# --- the network --------------------------------------------------------------


def test_thumbnails_are_small_and_all_differ():
    files = {photos.thumbnail(source, n) for n in (0, 1) for source in photos.SOURCES}
    assert len(files) == 2 * len(photos.SOURCES) >= 20
    assert all(30_000 <= len(data) <= 60_000 for data in files)
    with Image.open(io.BytesIO(files.pop())) as image:
        assert image.size == (640, 360)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Path:
    """Make an authority, and beside it the certificate of a server."""
    made, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    made.cert_pem.write_to_path(folder / "authority.pem")
    issued = made.issue_cert("localhost").private_key_and_cert_chain_pem
    issued.write_to_path(folder / "server.pem")
    return folder / "authority.pem"


def trusting(authority: Path) -> aiohttp.ClientSession:
    context = ssl.create_default_context(cafile=authority)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))


def test_the_image_server_counts_connections_and_requests_by_scheme(authority: Path):
    async def counted() -> list[dict]:
        certificate, answers = authority.with_name("server.pem"), []
        async with listening({"a": b"JPEG"}, certificate) as (port, secure_port):
            for _ in range(2):
                async with trusting(authority) as session:
                    for _ in range(3):
                        url = f"https://localhost:{secure_port}/0/a"
                        async with session.get(url) as response:
                            assert await response.read() == b"JPEG"
            async with (
                trusting(authority) as session,
                session.get(f"http://127.0.0.1:{port}/counts") as response,
            ):
                answers.append(await response.json())
        return answers

    expected = {"connections": {"http": 1, "https": 2}, "requests": {"http": 0, "https": 6}}
    assert asyncio.run(counted()) == [expected]


def test_the_processes_of_the_image_server_count_together_and_end_with_standard_input(
    authority: Path,
):
    async def answers(port: int, secure_port: int) -> list[dict]:
        for _ in range(20):
            async with trusting(authority) as session:
                url = f"https://localhost:{secure_port}/0/coffee.jpg"
                async with session.get(url) as response:
                    assert await response.read() == (PHOTOS / "coffee.jpg").read_bytes()
        counted = []
        for _ in range(8):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{port}/counts") as response,
            ):
                counted.append(await response.json())
        return counted

    code = (
        "from pathlib import Path; from benchmarks import image_server as server; "
        f"server.FOLDER = Path({str(PHOTOS)!r}); "
        f"server.main(Path({str(authority.with_name('server.pem'))!r}), processes=3)"
    )
    command = [sys.executable, "-c", code]
    how = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as server:
        counted = asyncio.run(answers(*map(int, server.stdout.readline().split())))
        processes = psutil.Process(server.pid).children()
        server.communicate(timeout=20)
    assert len(processes) == 3 and server.returncode == 0
    assert [answer["requests"]["https"] for answer in counted] == [20] * 8
    assert [answer["connections"]["http"] for answer in counted] == [*range(1, 9)]


async def echoed(round_trip_s: float, chunks: list[bytes]) -> tuple[list[float], bytes]:
    """Send chunks through the proxy to a server that echoes them and closes after the last."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for chunk in chunks:
            writer.write(await reader.readexactly(len(chunk)))
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = await listen(server.sockets[0].getsockname()[1], round_trip_s)
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(*proxy.sockets[0].getsockname())
    times, body = [], b""
    for chunk in chunks[:2]:  # one after the other
        writer.write(chunk)
        body += await reader.readexactly(len(chunk))
        times.append(time.perf_counter() - start)
    for chunk in chunks[2:]:  # at once
        writer.write(chunk)
        await asyncio.sleep(0)
    body += await reader.read()  # until the server closes
    writer.close()
    proxy.close()
    server.close()
    return times, body


def test_the_proxy_delays_the_connection_by_a_round_trip_and_each_exchange_by_another():
    times, _ = asyncio.run(echoed(0.1, [b"hello", b"again"]))
    assert times[0] >= 0.198 and times[1] - times[0] >= 0.098


def test_the_proxy_keeps_the_order_and_passes_the_end_on():
    chunks = [f"{n:05}".encode() for n in range(300)]
    assert asyncio.run(echoed(0.01, chunks))[1] == b"".join(chunks)


def test_the_proxy_closes_if_the_server_is_not_there():
    async def read() -> bytes:
        proxy = await listen(free_port(), 0.01)
        reader, writer = await asyncio.open_connection(*proxy.sockets[0].getsockname())
        writer.write(b"hello")
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(reader.read(), 5)
        return b""

    assert asyncio.run(read()) == b""


# --- CPU time by thread ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [("fetch", "fetch"), ("decode_1", "decode"), ("model_0", "model"), ("python", "other")],
)
def test_a_thread_belongs_to_a_part(name: str, part: str):
    assert cpu.part_of(name, is_main=False) == part
    assert cpu.part_of(name, is_main=True) == "main"


def test_time_is_spent_by_the_threads_of_now():
    before = {1: ("main", 1.0), 2: ("decode", 1.0), 3: ("decode", 5.0)}
    after = {1: ("main", 1.5), 2: ("decode", 3.0), 4: ("decode", 0.25), 5: ("fetch", 0.75)}
    parts = cpu.spent(before, after)
    assert parts == {"main": 0.5, "fetch": 0.75, "decode": 2.25, "model": 0.0, "other": 0.0}
    assert cpu.busiest_loop(parts) == 0.75
    assert cpu.busiest_loop(parts, children=2) == 0.5


CHILD_OF_A_WORKER = """
import sys
from types import SimpleNamespace
from asyncio import run
from ipaddress import IPv4Network
from heimdex_clip_worker.model.preprocess import Preparation
from heimdex_clip_worker.serving.children import Children
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.download import AddressPolicy, FetchLimits

async def work():
    for _ in range(5):
        await (await children.fetch(sys.argv[1])).decode(None)
    print("done", flush=True)
    sys.stdin.read()

children = Children.fork()
ones = (1.0, 1.0, 1.0)
embedder = SimpleNamespace(preparation=Preparation(224, ones, ones), quality="fast", runner=None)
policy = AddressPolicy(allowed_networks=(IPv4Network("127.0.0.0/8"),))
children.open(2, embedder, FetchLimits(), policy, PixelLimits())
run(work())
"""


def test_an_observed_worker_has_its_child_processes_counted_and_they_trust_the_authority(
    authority: Path, tmp_path: Path
):
    """Real child processes, which fetch over HTTPS."""
    program, bodies = tmp_path / "worker.py", {"a": (PHOTOS / "coffee.jpg").read_bytes()}
    program.write_text(CHILD_OF_A_WORKER, encoding="utf-8")
    env = plain_env(tmp_path) | {workers.AUTHORITY[OURS]: str(authority)}

    async def measured() -> tuple[dict[str, float], int]:
        async with listening(bodies, authority.with_name("server.pem")) as (_, port):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            url = f"https://localhost:{port}/0/a"
            command = [sys.executable, workers.OBSERVER, str(program), url]
            process = await asyncio.create_subprocess_exec(*command, env=env, **pipes)
            assert await asyncio.wait_for(process.stdout.readline(), 60) == b"done\n"
            result = cpu.spent({}, cpu.times(process.pid)), cpu.children(process.pid)
            process.stdin.close()
            await process.wait()
        return result

    parts, count = asyncio.run(measured())
    assert count == 2
    assert min(parts["main"], parts["fetch"], parts["decode"]) > 0


def test_an_observed_worker_names_its_threads_and_trusts_an_authority_over_a_distance(
    authority: Path, tmp_path: Path
):
    """The real handler and fetcher with a fake model: one start for all."""
    certificate, names = authority.with_name("server.pem"), ["coffee.jpg", "chelsea.jpg"]
    port, flags = free_port(), ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port"]
    env = plain_env(tmp_path) | {workers.AUTHORITY[OURS]: str(authority)}

    async def driven(worker: Worker) -> tuple[float, dict[str, float]]:
        bodies = {name: (PHOTOS / name).read_bytes() for name in names}
        async with listening(bodies, certificate) as (_, secure_port):
            proxy = await listen(secure_port, 0.1)
            host = f"https://localhost:{proxy.sockets[0].getsockname()[1]}"
            async with aiohttp.ClientSession() as session:
                callers = Callers(session, host, names)
                await callers.first(worker, Seen(), within_s=100)
                before = cpu.times(worker.process.process.pid)
                run = await callers.drive(worker, Seen(), jobs=1, callers=1, images=2)
            proxy.close()
        return run.seconds, cpu.spent(before, cpu.times(worker.process.process.pid))

    with WorkerProcess(env, workers.OBSERVER, FAKE, *flags, str(port)) as process:
        url = f"http://127.0.0.1:{port}"
        seconds, parts = asyncio.run(driven(Worker(OURS, url, process, time.perf_counter())))
    assert seconds > 0.098
    assert min(parts["main"], parts["fetch"], parts["decode"], parts["model"]) > 0


def test_the_deployed_worker_knows_no_authority_of_the_benchmark():
    for path in (ROOT / "heimdex_clip_worker").rglob("*.py"):
        assert workers.AUTHORITY[OURS] not in path.read_text(encoding="utf-8")


# --- goals, table and pictures ------------------------------------------------


def test_a_goal_for_a_number_of_its_own_needs_no_other():
    figure = Figure("https-fetching")
    figure.add(None, 0.5)
    assert (figure.ratio, figure.met, figure.goal.wanted()) == (None, True, "≤ 0.6")
    assert figure.cells()[2:7] == ["", "0.50", "", "≤ 0.6", "yes"]
    trips = Figure("https-lone", [4.0], [1.4])
    assert trips.cells()[2:7] == ["baseline 4.00", "1.40", "0.35x", "≤ 1.3", "NO"]


def test_the_table_tells_shares_of_a_bound_that_is_known():
    rated, other = Figure("singles", [1.0], [30.0], bound=40.0), Figure("json", [2.0], [1.0])
    last = [line.rpartition("|")[0].rpartition("|")[2].strip() for line in
            figures.table([rated, other]).splitlines()]  # fmt: skip
    assert last[0] == "of the bound" and last[2:] == ["75%", ""]
    assert rated.as_json()["shares"] == {"other": 0.025, "ours": 0.75}
    kept = {"figures": {"singles": rated.as_json()}}
    assert figures.table_of(kept) == figures.table([rated])
    del kept["figures"]["singles"]["bound"]  # results of an earlier version
    assert "of the bound" not in figures.table_of(kept)


def run_of(only: set[str]) -> bench.Bench:
    return bench.Bench(bench.QUICK, only, None, Callers(None, "http://images", ["a"]))


def test_the_bound_is_the_model_and_a_share_of_decoding(monkeypatch):
    async def kernel(name: str, rounds: int) -> dict:
        return {"ours": [{"decode-mix": 0.004, "decode-thumbnails": 0.002}[name]]}

    monkeypatch.setattr(bench, "kernel", kernel)
    monkeypatch.setattr(bench, "usable_cpus", lambda: 2)
    run = run_of(set())
    run.figure("encode").add(kernels.flop() / 1e9 / 0.018, 300.0)  # an image takes 18 ms
    run.figure("batches").add(1.0, 25.0)
    run.figure("https-thumbs").add(1.0, 25.0)
    run.figure("json").add(1.0, 1.0)
    asyncio.run(run.bound())
    assert run.figures["batches"].bound == pytest.approx(1 / 0.020)
    assert run.figures["https-thumbs"].bound == pytest.approx(1 / 0.019)
    assert run.figures["json"].bound is None


def a_sample(kind: str, rate: float, main: float, fetch: float) -> Sample:
    parts = dict.fromkeys(cpu.PARTS, 0.0) | {"main": main, "fetch": fetch}
    return Sample("https-mix", kind, rate, 0.05, parts)


def test_a_ceiling_is_that_of_the_busier_loop(monkeypatch):
    monkeypatch.setattr(photos, "thumbnails", lambda: [])
    run = run_of({"https-mix", "https-ceiling", "https-connections"})
    run.server, proxy = SimpleNamespace(secure_url="https://near"), SimpleNamespace(secure_url="")
    measured = network.Network(run, proxy)
    assert measured.loads == ["https-mix"]
    measured.add("https-mix", a_sample(BASELINE, 1.0, 9.0, 0.0), a_sample(OURS, 30.0, 0.4, 0.5))
    assert run.figures["https-ceiling"].ours == [2000]
    assert run.figures["https-mix"].ratio == 30
    assert run.figures["https-connections"].ours == [0.05]
    of_children = replace(a_sample(OURS, 30.0, 0.4, 0.5), children=3)
    assert of_children.ceiling == 2500  # a loop that fetches is in each of them
    assert "https-fetching" not in run.figures


def test_cpu_time_is_shown_by_load_worker_and_thread():
    rows = network.summary([a_sample(OURS, rate, 0.4, 0.25) for rate in (30.0, 32.0, 90.0)])
    assert rows[0]["images_per_s"] == 32 and len(rows[0]["rounds"]) == 3
    line = [cell.strip() for cell in network.cpu_table(rows).splitlines()[2].strip("|").split("|")]
    assert line == [
        "https-mix", OURS, "32.0", "0.05", "0.40", "0.25", "0.00", "0.00", "0.00", "0.65",
    ]  # fmt: skip


def test_two_checkouts_are_compared_round_by_round():
    lines = turn.rounds_table([10.0, 20.0, 40.0], [11.0, 30.0, 44.0]).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:]] == [
        "1.100", "1.500", "1.100", "1.100",
    ]  # fmt: skip


def test_two_checkouts_must_give_the_same_vectors():
    seen = [Seen(), Seen()]
    for one in seen:
        one.add(OURS, "a", np.asarray(row("a")))
    assert turn.compare(*seen)["vectors"] == {BASELINE: 1, OURS: 1}
    seen[1].add(OURS, "a", np.asarray(row("b")))
    with pytest.raises(BenchmarkFailed, match="a has the cosine"):
        turn.compare(*seen)


def test_a_comparison_needs_checkouts(tmp_path: Path, capsys):
    args = turn.arguments([str(ROOT), "--photos", "thumbnails", "--round-trip", "20"])
    assert (args.other, args.this, args.round_trip) == (ROOT, ROOT, 20)
    args = turn.arguments([str(ROOT), "--this-env", "DECODE_IN=processes"])
    assert (args.env, args.this_env) == ([], ["DECODE_IN=processes"])
    with pytest.raises(SystemExit):
        turn.arguments([str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


def test_every_goal_is_measured_somewhere():
    kernel = {"encode", "preprocess-1080p", "preprocess-12mp"}
    measured = bench.UNDER_LOAD | {*bench.STANDIN_LOADS} | kernel | {"start"} | network.FIGURES
    assert measured == {*GOALS}


def test_a_goal_is_a_lower_or_an_upper_bound():
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
    measured = [Figure(name, [other], [ours]) for name, (other, ours) in rows.items()]
    lines = figures.table(measured).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    other = "baseline 1.05"
    assert cells == [
        ["one-image jobs, 64 callers", "images/s", other, "31.5", "30.0x", "≥ 25x", "yes"],
        ["jobs of 32 images, 4 callers", "images/s", other, "31.5", "30.0x", "≥ 35x", "NO"],
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
    curves = {kind: [{"callers": n, **point} for n in (1, 8, 64)] for kind in (BASELINE, OURS)}
    curves |= {f"{kind}-lone": [0.1, 0.2] for kind in (BASELINE, OURS)}
    results = {"curves": curves, "figures": {"batches": {"ours": 30.0}}, "date": "2026-01-01"}
    results["machine"] = figures.machine()
    drawn = plots.draw(results, tmp_path / "here.json")
    assert [path.name for path in drawn] == ["here-throughput.png", "here-latency.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.size == (1140, 630)


def test_the_command_refuses_an_unknown_figure(capsys):
    assert bench.arguments(["--only", "json"]).only == ["json"]
    with pytest.raises(SystemExit):
        bench.arguments(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_the_vision_transformer_takes_9_gflop_an_image():
    assert kernels.flop() == pytest.approx(8.82e9, rel=1e-3)


def test_the_tower_leaves_out_what_torch_counts_less() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = ImageShape(768, 12, 12, 3072, 512, "gelu", image_size=224, patch_size=32)
    with torch.device("meta"):
        tower, pixels = VisionTower(shape), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tower(pixels)
    done = kernels.flop() - kernels.unneeded_flop()
    assert done == pytest.approx(counter.get_total_flops(), rel=1e-3)
