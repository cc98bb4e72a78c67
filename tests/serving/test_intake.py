"""What a worker takes under the SDK's loop: its share of large jobs, and many small ones."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from local_worker import FAKE, SECRET, WorkerProcess, plain_env, signed

from heimdex_clip_worker.auth import new_nonce, sign_v2
from heimdex_clip_worker.emulator.server import Emulator, EmulatorServer
from heimdex_clip_worker.serving.intake import Intake

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

IMAGE_S = "0.003"  # of the fake model: 128 images take 0.4 s
START_S = 60


def of_many(urls: list[str]) -> dict:
    """Make the signed input of a job of several images."""
    images = [{"image_url": url} for url in urls]
    fields = {"images": images, "encoding_format": "base64"}
    now = int(time.time())
    about = {"audience": "heimdex-clip", "ts": now, "exp": now + 600, "nonce": new_nonce()}
    return {**fields, "auth": sign_v2(fields, kid="v1", secret=SECRET, **about)}


@contextlib.contextmanager
def workers(
    home: Path, platform: EmulatorServer, count: int = 1, **more: str
) -> Iterator[list[WorkerProcess]]:
    """Run fake workers; yield when all of them take jobs."""
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(1, count + 1):
            env = plain_env(home, **platform.worker_env(f"pod-{number}"), **more)
            started.append(stack.enter_context(WorkerProcess(env, FAKE)))
        for number, worker in enumerate(started, 1):
            worker.wait_until(
                lambda pod=f"pod-{number}": pod in platform.queue.workers
                and platform.queue.workers[pod].polls,
                START_S,
                "the worker takes no jobs",
            )
        yield started


@contextlib.contextmanager
def all_at_once(platform: EmulatorServer) -> Iterator[None]:
    """Hand out what is submitted in the block only when all of it is there."""
    platform.behaviour.paused = True
    yield
    platform.behaviour.paused = False
    platform.call(platform.queue.notify)


@pytest.mark.timeout(120)
def test_three_workers_share_forty_jobs_of_128_images(tmp_path, photos):
    """They arrive after small jobs, when each worker expects more of these."""
    with (
        EmulatorServer() as platform,
        workers(tmp_path, platform, 3, FAKE_IMAGE_S=IMAGE_S),
    ):
        small = [platform.submit(signed(f"{photos.url}/tiny.png")) for _ in range(60)]
        with all_at_once(platform):
            large = [platform.submit(of_many([f"{photos.url}/tiny.png"] * 128)) for _ in range(40)]
        states = platform.wait([*small, *large], 50)
    assert {state["status"] for state in states} == {"COMPLETED"}
    replies = [state["output"] for state in states[60:]]
    assert {(reply["count"], reply["failed"]) for reply in replies} == {(128, 0)}
    assert {platform.job(job).replies for job in [*small, *large]} == {1}
    shares = Counter(state["workerId"] for state in states[60:])
    assert len(shares) == 3, shares
    assert max(shares.values()) <= 1.5 * 40 / 3 and min(shares.values()) >= 40 / 3 / 1.5, shares


def test_a_worker_has_no_more_large_jobs_in_hand_than_it_needs(tmp_path, photos):
    """Another worker would find the rest in the queue, and so does the scaler."""
    photos.hold()
    with EmulatorServer() as platform, workers(tmp_path, platform, MAX_IMAGES_IN_HAND="200"):
        with all_at_once(platform):
            urls = [f"{photos.url}/held/tiny.png"] * 128
            jobs = [platform.submit(of_many(urls)) for _ in range(8)]
        platform.until(lambda _: photos.hits["/held/tiny.png"] >= 16, 20, "no downloads")
        time.sleep(0.5)
        assert platform.health()["jobs"] == {
            "completed": 0, "failed": 0, "inProgress": 2, "inQueue": 6, "retried": 0,
        }  # fmt: skip
        photos.release()
        assert {state["status"] for state in platform.wait(jobs, 30)} == {"COMPLETED"}


def test_the_scaler_sees_the_jobs_that_a_worker_leaves_in_the_queue(tmp_path, photos):
    """What a worker has taken does not wait, so no other worker would be started for it."""
    photos.hold()
    scaling = {"workers": 3, "workers_min": 1, "scaler": "QUEUE_DELAY", "scaler_value": 0.5}
    options = {"command": [sys.executable, FAKE], "env": plain_env(tmp_path), "grace_s": 1}
    with Emulator(**scaling, **options) as platform:
        platform.wait_ready(START_S)
        for _ in range(8):
            platform.submit(of_many([f"{photos.url}/held/tiny.png"] * 128))
        platform.until(lambda _: len(platform.processes) == 3, 10, "three workers are started")
        assert len(platform.queue.workers["pod-1"].jobs) == 1
        photos.release()


def test_64_jobs_of_one_image_are_in_hand_at_once(tmp_path, photos):
    photos.hold()
    with EmulatorServer() as platform, workers(tmp_path, platform):
        url = f"{photos.url}/held/tiny.png"
        jobs = [platform.submit(signed(url)) for _ in range(70)]
        platform.until(lambda state: len(state.waiting) == 6, 10, "64 jobs in hand")
        time.sleep(1.5)
        assert platform.health()["jobs"]["inProgress"] == 64
        photos.release()
        assert {state["status"] for state in platform.wait(jobs, 30)} == {"COMPLETED"}


def test_items_that_have_failed_are_not_in_hand(tmp_path, photos):
    """Three of four images have no valid URL; with the fourth, fewer than two are left to do."""
    photos.hold()
    held, before = f"{photos.url}/held/tiny.png", photos.hits["/held/tiny.png"]
    with EmulatorServer() as platform, workers(tmp_path, platform, MAX_IMAGES_IN_HAND="2"):
        job = platform.submit(of_many([held, "ftp://a/b", "none", ""]))
        platform.until(lambda _: photos.hits["/held/tiny.png"] > before, 10, "a download")
        other = platform.runsync(signed(f"{photos.url}/tiny.png"), 10)
        assert other["status"] == "COMPLETED"
        assert platform.status(job)["status"] == "IN_PROGRESS"
        photos.release()
        [state] = platform.wait([job], 10)
        assert state["output"]["failed"] == 3


def test_sigterm_takes_no_more_jobs_while_images_are_in_hand(tmp_path, photos):
    photos.hold()
    with (
        EmulatorServer() as platform,
        workers(tmp_path, platform, MAX_IMAGES_IN_HAND="1") as [worker],
    ):
        jobs = [platform.submit(signed(f"{photos.url}/held/tiny.png")) for _ in range(3)]
        platform.until(lambda state: len(state.waiting) == 2, 10, "one job in hand")
        time.sleep(0.5)
        takes = platform.queue.calls["job-take"]
        worker.terminate()
        time.sleep(0.5)
        photos.release()
        assert worker.wait_for_exit(10) == 0
        assert platform.queue.calls["job-take"] == takes
        assert [platform.status(job)["status"] for job in jobs] == [
            "COMPLETED", "IN_QUEUE", "IN_QUEUE",
        ]  # fmt: skip


def test_the_sdk_asks_for_jobs_with_the_function_that_is_wrapped(monkeypatch):
    """The contract with the SDK in use: name, arguments, and that its loop looks it up."""
    from runpod.serverless.modules import rp_scale

    assert list(inspect.signature(rp_scale.get_job).parameters) == ["session", "num_jobs"]
    assert "self.jobs_fetcher(session, jobs_needed)" in inspect.getsource(rp_scale.JobScaler)

    async def another(session, num_jobs):
        return None

    monkeypatch.setattr(rp_scale, "get_job", another)
    assert rp_scale.JobScaler({}).jobs_fetcher is another


def test_the_sdks_loop_never_believes_that_it_is_full_of_small_jobs(monkeypatch):
    """It counts a job twice until the job begins, and sleeps for a second when it seems full."""
    from runpod.serverless.modules import rp_scale

    queue = [{"id": f"job-{n}", "input": {}} for n in range(200)]
    answered, sleeps, sleep = [], [], asyncio.sleep

    async def fetch(session, limit):
        await sleep(0)
        return [queue.pop() for _ in range(min(limit, len(queue)))]

    async def make_reply(job):
        await sleep(0.01)
        answered.append(job["id"])
        return {}

    async def note(delay_s):
        sleeps.append(delay_s)
        await sleep(min(delay_s, 0.05))

    async def run():
        scaler = rp_scale.JobScaler({"concurrency_modifier": lambda _: 64})
        scaler.jobs_fetcher = partial(intake.take, fetch)
        scaler.jobs_handler = lambda session, config, job: intake.handle(job)
        loops = asyncio.gather(scaler.get_jobs(None), scaler.run_jobs(None))
        while len(answered) < 200:
            await sleep(0.01)
        scaler.kill_worker()
        await loops

    intake = Intake(make_reply, lambda: 0, max_images=128, max_jobs=8)
    monkeypatch.setattr(asyncio, "sleep", note)
    asyncio.run(asyncio.wait_for(run(), 30))
    assert len(set(answered)) == 200 and max(sleeps) < 1
