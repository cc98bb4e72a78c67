"""What never returns: a run of the model, a decoder, a driver that holds the interpreter lock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_worker import FAKE, PhotoServer, WorkerProcess, is_alive, plain_env, signed

from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.errors import DecodeFailed, InferenceFailed, WorkerError
from heimdex_clip_worker.serving import pipeline as pipeline_module
from heimdex_clip_worker.serving import watchdog as watchdog_module
from heimdex_clip_worker.serving.decode import NeedsMemory, PixelLimits
from heimdex_clip_worker.serving.pipeline import Pipeline, _Prepared
from heimdex_clip_worker.serving.watchdog import Watchdog

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

HUNG = str(Path(__file__).parent.parent / "hung_worker.py")
LIMIT_S, FIRST_LIMIT_S = 1.0, 2.0  # see hung_worker.py
START_S = 60


@pytest.fixture
def platform() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture(autouse=True)
def released(photos: PhotoServer) -> Iterator[None]:
    """Release held photographs after each test."""
    yield
    photos.release()


@contextlib.contextmanager
def worker(
    platform: EmulatorServer, home: Path, script: str = HUNG, pod: str = "pod-1", **env: str
) -> Iterator[WorkerProcess]:
    """Run a worker with a small time limit; yield as soon as it has started."""
    own = {"MODEL_TIMEOUT_S": f"{LIMIT_S:g}", "DECODE_WORKERS": "1", **env}
    env = plain_env(home, **platform.worker_env(pod), **own)
    with WorkerProcess(env, script, forked=True) as process:
        yield process


def taking(platform: EmulatorServer, process: WorkerProcess) -> None:
    """Wait until a worker asks for jobs."""
    before = platform.queue.calls["job-take"]
    process.wait_until(
        lambda: platform.queue.calls["job-take"] > before, START_S, "the worker takes no jobs"
    )


def seconds_until_exit(process: WorkerProcess, part: str, limit_s: float = LIMIT_S) -> float:
    """Wait until `part` hangs and the process has ended with status 1."""
    process.wait_for_log(f"{part} hangs")
    start = time.monotonic()
    assert process.process.wait(limit_s + 20) == 1, process.tail()
    return time.monotonic() - start


def survivors(process: WorkerProcess) -> list[int]:
    """List the processes that an ended worker has left behind, such as its heartbeat."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.getsid(pid) == process.process.pid and is_alive(pid):
                left.append(pid)
    return left


def test_a_model_that_never_returns(platform, photos, tmp_path):
    """Jobs at any step are answered, the process ends, and the next worker serves them."""
    photos.hold()
    sources = [photos.photo(name) for name in ("chelsea.jpg", "coffee.jpg", "china.jpg")]
    inputs = [signed(url, request_id="r") for url in sources]
    inputs += [signed(f"{photos.url}/held/china.jpg", request_id="r"), {"selftest": True}]
    with worker(platform, tmp_path, HANG="model", HANG_AFTER="2") as process:
        taking(platform, process)
        for _ in range(2):
            assert platform.runsync(signed(photos.photo()))["status"] == "COMPLETED"
        jobs = [platform.submit(job_input) for job_input in inputs]
        assert seconds_until_exit(process, "model") < LIMIT_S + 5
        states = [platform.status(job) for job in jobs]
        assert survivors(process) == []
    assert {state["status"] for state in states} == {"FAILED"}, states
    outputs = [(state["output"]["code"], state["output"]["retryable"]) for state in states]
    assert outputs == [("INFERENCE_FAILED", True)] * len(jobs)
    assert "the model thread did not return within 1 s (MODEL_TIMEOUT_S)" in process.stderr
    assert " in hang < " in process.stderr
    photos.release()
    with worker(platform, tmp_path, FAKE, "pod-2") as healthy:
        again = platform.wait([platform.submit(job_input) for job_input in inputs], START_S)
        healthy.process.send_signal(signal.SIGKILL)  # its normal end takes a second or two
    assert {state["status"] for state in again} == {"COMPLETED"}, again


def test_a_model_that_never_returns_and_holds_the_interpreter_lock(platform, photos, tmp_path):
    """Nothing of Python runs: the platform re-queues the jobs, and the next worker serves them."""
    platform.behaviour.lost_after_s = 2
    inputs = [signed(photos.photo(name)) for name in ("chelsea.jpg", "coffee.jpg")]
    with worker(platform, tmp_path, HANG="lock", HANG_AFTER="1") as process:
        taking(platform, process)
        assert platform.runsync(signed(photos.photo()))["status"] == "COMPLETED"
        jobs = [platform.submit(job_input) for job_input in inputs]
        assert seconds_until_exit(process, "lock") < LIMIT_S + 5
    assert "Timeout (" in process.stderr and " in hang" in process.stderr
    with worker(platform, tmp_path, FAKE, "pod-2") as healthy:
        states = platform.wait(jobs, START_S)
        healthy.process.send_signal(signal.SIGKILL)
    assert {state["status"] for state in states} == {"COMPLETED"}, states


def test_a_device_that_is_lost(platform, photos, tmp_path):
    """The jobs in hand are answered, and the process ends as any other: nothing aborts it."""
    photos.hold()
    inputs = [signed(photos.photo(name)) for name in ("chelsea.jpg", "coffee.jpg")]
    inputs.append(signed(f"{photos.url}/held/china.jpg"))
    with worker(platform, tmp_path, HANG="device", HANG_AFTER="1") as process:
        taking(platform, process)
        assert platform.runsync(signed(photos.photo()))["status"] == "COMPLETED"
        jobs = [platform.submit(job_input) for job_input in inputs]
        platform.wait(jobs[:2], 10)
        photos.release()
        assert process.wait_for_exit(20) == 0
    outputs = [platform.status(job)["output"] for job in jobs]
    assert [(o["code"], o["retryable"]) for o in outputs] == [("INFERENCE_FAILED", True)] * 3


def test_sigterm_while_the_model_hangs(platform, photos, tmp_path):
    """The platform holds its calls open: the SDK would wait for them after the last reply."""
    platform.behaviour.take_hold_s = platform.behaviour.stop_hold_s = 15
    with worker(platform, tmp_path, HANG="model") as process:
        taking(platform, process)
        job = platform.submit(signed(photos.photo()))
        process.wait_for_log("model hangs")
        process.terminate()
        start = time.monotonic()
        assert process.wait_for_exit(20) == 1
        assert time.monotonic() - start < LIMIT_S + 5
    assert platform.status(job)["output"]["code"] == "INFERENCE_FAILED"


def test_decoders_that_never_return(platform, photos, tmp_path):
    """One is replaced; with the second the worker has as many that hang as it has threads."""
    with worker(platform, tmp_path, HANG="decoder") as process:
        taking(platform, process)
        failed = platform.runsync(signed(photos.photo("clock.png"), request_id="r"))
        expected = {"code": "DECODE_FAILED", "retryable": False, "request_id": "r"}
        assert (failed["status"], failed["output"]) == ("FAILED", expected)
        states = platform.wait([platform.submit(signed(photos.photo())) for _ in range(8)], 10)
        assert {state["status"] for state in states} == {"COMPLETED"}
        photos.hold()
        held = platform.submit(signed(f"{photos.url}/held/china.jpg"))
        platform.submit(signed(photos.photo("clock.png")))
        start = time.monotonic()
        assert process.wait_for_exit(20) == 1, process.tail()
        assert time.monotonic() - start < 0.5 + 5
    assert platform.status(held)["output"]["code"] == "INFERENCE_FAILED"
    assert process.stderr.count("Watchdog: the decode thread did not return within 0.5 s, at") == 2


def test_sigterm_with_a_decoder_that_hangs(platform, photos, tmp_path):
    """Its job is answered, so this is a normal end; Python would wait for the thread for ever."""
    with worker(platform, tmp_path, HANG="decoder") as process:
        taking(platform, process)
        assert platform.runsync(signed(photos.photo("clock.png")))["status"] == "FAILED"
        process.terminate()
        assert process.wait_for_exit(10) == 0, process.tail()


def test_a_check_that_never_returns(platform, tmp_path):
    """The first run may take longer. The worker ends without having taken a job."""
    with worker(platform, tmp_path, HANG="check") as process:
        took = seconds_until_exit(process, "check", FIRST_LIMIT_S)
    assert FIRST_LIMIT_S - 0.5 < took < FIRST_LIMIT_S + 5
    assert "within 2 s (2 times MODEL_TIMEOUT_S)" in process.stderr
    assert platform.queue.calls["job-take"] == 0
    assert [ping["status"] for ping in platform.queue.pings] == ["unhealthy"]


# --- in this process ----------------------------------------------------------


def hung_pipeline(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> Pipeline:
    """Make a pipeline whose decoder hangs until `release`; `large` files need 600 MB."""

    def prepare(data, embedder, limits, max_bytes=None):
        if data == b"large" and max_bytes is not None:
            raise NeedsMemory(600_000_000)
        if data != b"good":
            release.wait(20)
        return _Prepared((8, 8), torch.zeros(3), 0.0)

    monkeypatch.setattr(pipeline_module, "prepare_image", prepare)
    monkeypatch.setattr(pipeline_module, "_DECODE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 0.1)
    return Pipeline(None, None, PixelLimits(), decode_workers=3)


@pytest.mark.parametrize(("data", "most"), [(b"large", 2), (b"small", 4)])
def test_what_hangs_is_bounded_and_holds_no_reservation(data, most, monkeypatch):
    release = threading.Event()

    async def codes() -> list[str]:
        pipeline = hung_pipeline(monkeypatch, release)
        seen = []
        for file in [data, b"good"] * most:
            try:
                await asyncio.wait_for(pipeline._prepare_in_turn(file, "job"), 5)
                seen.append("OK")
            except WorkerError as error:
                seen.append(error.code)
            for budget in (pipeline.decode_slots, pipeline.large_bytes):
                assert budget.free == budget.total
        release.set()
        return seen

    expected = ["DECODE_FAILED", "OK"] * (most - 1) + ["INFERENCE_FAILED"] * 2
    assert asyncio.run(codes()) == expected


def test_a_text_tower_whose_load_never_returns():
    release = threading.Event()

    async def detail() -> str:
        options = {"load_text": lambda: release.wait(20), "model_timeout_s": 0.1}
        pipeline = Pipeline(None, None, PixelLimits(), decode_workers=1, **options)
        with pytest.raises(InferenceFailed) as caught:
            await pipeline.embed_text("a cat", True)
        release.set()
        return caught.value.detail

    limit = "within 0.4 s (4 times MODEL_TIMEOUT_S)"
    assert asyncio.run(detail()) == f"watchdog: the text thread did not return {limit}"


def test_calls_wait_while_no_thread_is_to_be_had(monkeypatch):
    """A thread that hangs cannot be replaced at once. The checks go on, and try it again."""
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 0.1)
    release, start, may_start = threading.Event(), threading.Thread.start, [True]

    def start_if_allowed(thread: threading.Thread) -> None:
        if not may_start[0]:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_allowed)

    async def results() -> list[object]:
        watchdog = Watchdog()
        decoders = watchdog.decode_threads(1, int, 0.2)
        heavy = decoders.run(release.wait, weight=0.5)
        work = asyncio.gather(heavy, decoders.run(divmod, 7, 2), return_exceptions=True)
        await asyncio.sleep(0.05)
        may_start[0] = False
        await asyncio.sleep(0.5)  # the first call has failed
        with pytest.raises(RuntimeError):
            await watchdog.threads(1, "model").run(int)
        may_start[0] = True
        results = await asyncio.wait_for(work, 5)
        await asyncio.sleep(0.2)
        release.set()
        return [type(results[0]), results[1], watchdog._is_checking]

    assert asyncio.run(results()) == [DecodeFailed, (3, 1), False]


def test_a_first_call_that_fails_leaves_the_next_one_its_time():
    async def limits() -> list[float]:
        model, seen = Watchdog(1).threads(1, "model"), []
        for function in (lambda: 1 / 0, int):
            with contextlib.suppress(ZeroDivisionError):
                await model.run(function)
            seen.append(model.limit_s)
        return seen

    assert asyncio.run(limits()) == [4, 1]


def test_a_call_of_a_loop_that_was_closed_does_not_end_the_checks(monkeypatch):
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 0.1)
    watchdog, release = Watchdog(), threading.Event()
    decoders, loop = watchdog.decode_threads(3, int, 0.2), asyncio.new_event_loop()
    left = loop.create_task(decoders.run(release.wait))
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()

    async def hang() -> None:
        for _ in range(2):
            await decoders.run(time.sleep, 0.5)

    with pytest.raises(DecodeFailed):
        asyncio.run(asyncio.wait_for(hang(), 5))
    release.set()
    left._log_destroy_pending = False


def run_program(text: str) -> tuple[int, str]:
    """Run a program; return its status and what it wrote to stderr."""
    header = "import asyncio, ctypes, threading, time\n"
    header += "from heimdex_clip_worker.serving.watchdog import Watchdog, _end_process\n"
    command = [sys.executable, "-c", header + text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


def test_a_caller_whose_thread_hangs_can_end():
    """With the backend `local` the process is a caller's: it gets an error, and nothing ends it."""
    status, stderr = run_program("""
async def main():
    model = Watchdog(0.1).threads(1, "model")
    await model.run(int)
    try:
        await model.run(time.sleep, 1000)
    except Exception as error:
        print(error.code)

asyncio.run(main())
raise SystemExit(7)
""")
    assert status == 7, stderr


def test_the_end_comes_while_the_lock_is_held():
    status, stderr = run_program("_end_process(0.1)\nctypes.PyDLL(None).sleep(20)")
    assert status == 1 and "Timeout (" in stderr


def test_the_timer_stops_right_after_the_last_call(monkeypatch):
    """A platform may freeze a worker that has replied. When it goes on, no time may be over."""
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 5)

    async def is_checking() -> list[bool]:
        watchdog = Watchdog()
        model, seen = watchdog.threads(1, "model"), []
        for _ in range(2):
            calls = [asyncio.ensure_future(model.run(time.sleep, 0.15)) for _ in range(2)]
            await calls[0]
            seen.append(watchdog._is_checking)
            await calls[1]
            await asyncio.sleep(0.5)
            seen.append(watchdog._is_checking)
        return seen

    assert asyncio.run(is_checking()) == [True, False] * 2


def test_a_longer_limit_ends_with_the_first_call(monkeypatch):
    """The next call may hold the lock before any check has come."""
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 60)
    ends = []

    def note(after_s: float, **_: object) -> None:
        ends.append(after_s)

    monkeypatch.setattr(watchdog_module.faulthandler, "dump_traceback_later", note)

    async def two_calls() -> None:
        watchdog = Watchdog(10)
        watchdog.ends_process = True
        model = watchdog.threads(1, "model")
        await model.run(int)
        assert len(ends) == 2  # of the first call, and after it
        await model.run(int)

    asyncio.run(two_calls())
    assert 42 < ends[0] <= 43 and 12 < ends[1] <= 13


def test_an_idle_worker_has_no_timer_and_a_busy_one_has_one(monkeypatch):
    monkeypatch.setattr(watchdog_module, "_CHECK_S", 0.1)

    def timers_of(loop: asyncio.AbstractEventLoop) -> int:
        return sum(not timer.cancelled() for timer in loop._scheduled)

    async def timers() -> list[int]:
        loop = asyncio.get_running_loop()
        pipeline = Pipeline(None, None, PixelLimits(), decode_workers=3)
        work = [asyncio.ensure_future(pipeline.decode_pool.run(time.sleep, 0.001))]
        await asyncio.sleep(0)
        work += [asyncio.ensure_future(pipeline.decode_pool.run(int)) for _ in range(500)]
        counts = [timers_of(loop)]
        await asyncio.gather(*work)
        counts.append(timers_of(loop))
        await asyncio.sleep(0.3)
        return [*counts, timers_of(loop)]

    first, then, idle = asyncio.run(timers())
    assert (first, idle) == (1, 0) and then <= 1


def test_a_worker_without_a_job_lives_on(platform, photos, tmp_path):
    """The fitness check has its own event loop, in which no check of the watchdog follows."""
    with worker(platform, tmp_path) as process:
        taking(platform, process)
        time.sleep(FIRST_LIMIT_S + watchdog_module._SILENCE_S + 1.5)
        assert process.process.poll() is None, process.tail()
        assert platform.runsync(signed(photos.photo()))["status"] == "COMPLETED"
        process.process.send_signal(signal.SIGKILL)
