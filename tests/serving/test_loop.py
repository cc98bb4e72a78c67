"""Calls from one event loop into another: what ends early, what is cancelled, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref

import pytest

from heimdex_clip_worker.serving.loop import LoopThread


@pytest.fixture
def thread():
    thread = LoopThread(lambda: contextlib.nullcontext("resource"), "other")
    yield thread
    asyncio.run(thread.close())


@pytest.mark.parametrize("exit_type", [SystemExit, KeyboardInterrupt])
def test_an_exit_stays_in_its_call(thread, exit_type):
    async def leave(resource):
        await asyncio.sleep(0.05)
        raise exit_type

    async def stay(resource):
        await asyncio.sleep(0.2)
        return threading.current_thread().name

    async def both():
        calls = [thread.call(function, timeout_s=30) for function in (leave, stay)]
        return await asyncio.gather(*calls, return_exceptions=True)

    error, name = asyncio.run(both())
    assert type(error) is RuntimeError and type(error.__cause__) is exit_type
    assert name == "other"


def test_work_that_has_not_begun_is_not_begun_after_its_deadline(thread):
    begun = []
    release = threading.Event()

    async def block(resource):
        release.wait(30)  # this loop does nothing else meanwhile

    async def begin(resource):
        begun.append(1)

    async def late():
        blocked = asyncio.create_task(thread.call(block, timeout_s=30))
        await asyncio.sleep(0.05)
        with pytest.raises(asyncio.TimeoutError):
            await thread.call(begin, timeout_s=0.05)
        release.set()
        await blocked
        await thread.call(block, timeout_s=30)  # a turn later

    asyncio.run(late())
    assert begun == []


def test_work_is_cancelled_at_its_deadline(thread):
    ended = threading.Event()

    async def wait_long(resource):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def late():
        with pytest.raises(asyncio.TimeoutError):
            await thread.call(wait_long, timeout_s=0.05)

    asyncio.run(late())
    assert ended.wait(30)


class Body(bytearray):
    """Bytes that can be referred to weakly."""


@pytest.mark.parametrize("end", ["error", "deadline"])
def test_a_failed_call_keeps_nothing_alive(thread, end):
    bodies = []

    async def fail(resource):
        body = Body(b"large")
        bodies.append(weakref.ref(body))
        await asyncio.sleep(60 if end == "deadline" else 0)
        raise ValueError(len(body))

    async def failed():
        with contextlib.suppress(ValueError, asyncio.TimeoutError):
            await thread.call(fail, timeout_s=0.1)
        for _ in range(50):  # the other loop may be at its last callback
            await asyncio.sleep(0.01)

    async def once():
        await thread.open()
        gc.collect()
        gc.disable()
        try:
            await failed()
            assert bodies[0]() is None
        finally:
            gc.enable()

    asyncio.run(once())


def test_a_cancelled_call_is_cancelled_though_its_result_is_on_its_way(thread):
    async def answer(resource):
        return 1

    async def cancel_late():
        await thread.open()
        call = asyncio.create_task(thread.call(answer, timeout_s=30))
        await asyncio.sleep(0)  # it is handed over
        threading.Event().wait(0.1)  # its result waits for this loop
        call.cancel()
        await asyncio.wait([call])
        return call.cancelled()

    assert asyncio.run(cancel_late())
