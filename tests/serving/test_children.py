"""Child processes that fetch and decode: what they answer, and what ends with them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

import psutil
import pytest
import torch
from local_worker import ROOT, PhotoServer, WorkerProcess, is_alive, plain_env, signed
from seeded import hub_env

from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.errors import (
    DecodeFailed,
    FetchFailed,
    FetchTimeout,
    InferenceFailed,
    InternalError,
    WorkerError,
)
from heimdex_clip_worker.model.photos import PHOTOS
from heimdex_clip_worker.model.preprocess import Preparation, fast
from heimdex_clip_worker.serving import child as child_module
from heimdex_clip_worker.serving import children as children_module
from heimdex_clip_worker.serving.child import AT_ONCE, PLACES
from heimdex_clip_worker.serving.children import Children
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.download import AddressPolicy, Fetcher, FetchLimits
from heimdex_clip_worker.serving.pipeline import Pipeline, prepare_image
from heimdex_clip_worker.serving.process import usable_cpus

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

POLICY = AddressPolicy(allowed_networks=(IPv4Network("127.0.0.0/8"),))
NAMES = sorted(path.name for path in PHOTOS.glob("*.jpg"))
DIM = 48


@dataclasses.dataclass
class Eye:
    """An embedder whose vector is the picture in 4 by 4 squares."""

    preparation: Preparation = Preparation(224, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    quality: str = "fast"
    runner: None = None
    dim: int = DIM
    at_least: int = 448

    def preprocess(self, image) -> torch.Tensor:
        return fast(image, self.preparation)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 4).flatten(1) + 1


@contextlib.asynccontextmanager
async def pipeline(count: int = 2, **limits: float) -> AsyncIterator[Pipeline]:
    """Make a pipeline with so many children; 0: with threads."""
    fetch_limits, pixels = FetchLimits(**limits), PixelLimits()
    children = Children.fork() if count else None
    if children:
        children.open(count, Eye(), fetch_limits, POLICY, pixels)
    fetcher = Fetcher(fetch_limits, POLICY)
    made = Pipeline(Eye(), fetcher, pixels, decode_workers=max(count - 1, 1), children=children)
    try:
        yield made
    finally:
        await made.close()


def run(work: Callable[..., Awaitable], *args, **limits) -> object:
    """Run a test on a pipeline with children."""

    async def running() -> object:
        async with pipeline(**limits) as made:
            return await asyncio.wait_for(work(made, *args), 60)

    return asyncio.run(running())


async def outcomes(made: Pipeline, urls: list[str], job: object = None) -> list:
    """Embed images at the same time; return vectors or errors."""
    work = [made.embed_url(url, True, job=job) for url in urls]
    return await asyncio.gather(*work, return_exceptions=True)


def plain(outcome: object) -> object:
    """Turn an outcome into something to compare."""
    if isinstance(outcome, WorkerError):
        return type(outcome), str(outcome), outcome.detail, outcome.retryable
    return outcome.values, outcome.size


async def soon(is_so: Callable[[], bool]) -> bool:
    """Wait until something is so, at most 10 seconds."""
    for _ in range(200):
        if is_so():
            return True
        await asyncio.sleep(0.05)
    return False


def pids(made: Pipeline) -> list[int]:
    return [child.pid for child in made.children._children]


def faulty(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], name: str) -> None:
    """Let children do something else with one photograph."""
    data = (PHOTOS / name).read_bytes()

    def prepare(file: bytes, *args: object) -> object:
        return act() if file == data else prepare_image(file, *args)

    monkeypatch.setattr(child_module, "prepare_image", prepare)


# --- what they answer -----------------------------------------------------------------


def test_vectors_and_errors_are_those_of_threads(photos: PhotoServer):
    urls = [photos.photo(name) for name in NAMES]
    urls += [f"{photos.url}/{path}" for path in (
        "missing", "status/503", "status/302", "page", "truncated.jpg", "tiny.png",
    )]  # fmt: skip
    urls += ["ftp://example.com/", "http://10.0.0.1/", "http://[::1]/", "not a url"]
    urls += [f"http://127.0.0.1:{free}/" for free in (9,)]
    ours, theirs = (
        [plain(one) for one in run(outcomes, urls, count=count)] for count in (2, 0)
    )  # fmt: skip
    assert ours == theirs
    assert {type(one[0]) for one in ours} == {list, type}


def test_limits_are_those_of_threads(photos: PhotoServer):
    urls = [f"{photos.url}/large.jpg", f"{photos.url}/endless", photos.photo()]
    limits = {"max_bytes": photos.large_bytes - 1, "timeout_s": 1.0}
    ours, theirs = (
        [plain(one) for one in run(outcomes, urls, count=count, **limits)] for count in (2, 0)
    )  # fmt: skip
    assert ours == theirs and ours[1][0] is FetchTimeout


def test_large_images_have_their_turn(photos: PhotoServer, monkeypatch: pytest.MonkeyPatch):
    from heimdex_clip_worker.serving import pipeline as module

    monkeypatch.setattr(module, "_THREAD_BYTES", 100_000)
    urls = [photos.photo(name) for name in NAMES] * 3
    ours, theirs = ([plain(one) for one in run(outcomes, urls, count=n)] for n in (2, 0))
    assert ours == theirs


def test_hundreds_at_once_keep_their_pixels_apart(photos: PhotoServer):
    names = [random.Random(7).choice(NAMES) for _ in range(300)]
    once = run(outcomes, [photos.photo(name) for name in NAMES], count=0)
    expected = {name: one.values for name, one in zip(NAMES, once, strict=True)}
    found = run(outcomes, [photos.photo(name) for name in names], count=3)
    assert [one.values for one in found] == [expected[name] for name in names]


def test_pixels_stay_while_something_refers_to_them(photos: PhotoServer):
    names = NAMES * 3  # more than there are places
    data = {name: (PHOTOS / name).read_bytes() for name in NAMES}
    here = {name: prepare_image(data[name], Eye(), PixelLimits()).pixels for name in NAMES}

    async def kept(made: Pipeline) -> None:
        [child] = made.children._children
        files = [await made.children.fetch(photos.photo(name)) for name in names]
        every = [await file.decode(None) for file in files]
        assert all(one[1].equal(here[name]) for name, one in zip(names, every, strict=True))
        assert len(child.places) == AT_ONCE  # the others are lent
        os.kill(child.pid, signal.SIGKILL)
        assert await soon(lambda: child.has_ended)
        assert all(one[1].equal(here[name]) for name, one in zip(names, every, strict=True))
        del every
        assert len(child.places) == PLACES

    run(kept, count=1)


def test_children_serve_one_loop_after_the_other(photos: PhotoServer):
    children = Children.fork()
    children.open(2, Eye(), FetchLimits(), POLICY, PixelLimits())
    made = Pipeline(
        Eye(), Fetcher(FetchLimits(), POLICY), PixelLimits(), decode_workers=2, children=children
    )
    found = [
        asyncio.run(asyncio.wait_for(made.embed_url(photos.photo(), True), 30)) for _ in range(3)
    ]
    assert len({tuple(one.values) for one in found}) == 1 and len(pids(made)) == 2
    asyncio.run(made.close())


# --- what ends, hangs or talks nonsense -----------------------------------------------


def test_a_decoder_that_crashes_takes_nothing_with_it(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    faulty(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), "rocket.jpg")

    async def crash(made: Pipeline) -> list:
        first = set(pids(made))
        names = ["rocket.jpg" if i % 8 == 3 else "coffee.jpg" for i in range(32)]
        found = await outcomes(made, [photos.photo(name) for name in names])
        again = await outcomes(made, [photos.photo("coffee.jpg")] * 4)
        assert len(pids(made)) == 2 and first != set(pids(made))
        return list(zip(names, found, strict=True)) + [("coffee.jpg", one) for one in again]

    for name, one in run(crash):
        if name == "rocket.jpg":
            assert isinstance(one, DecodeFailed) and "3 child processes" in one.detail
        else:
            assert one.size == (600, 400)


def test_files_at_which_a_child_has_ended_are_decoded_one_at_a_time(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    times = tmp_path / "times"

    def crash() -> None:
        with times.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    faulty(monkeypatch, crash, "rocket.jpg")
    assert {type(one) for one in run(outcomes, [photos.photo("rocket.jpg")] * 2, count=3)} == {
        DecodeFailed
    }
    first, second, *later = sorted(map(float, times.read_text().split()))
    assert second - first < 0.3 and len(later) == 4
    assert all(after - before > 0.3 for before, after in itertools.pairwise(later))


@pytest.mark.parametrize("holds_the_lock", [False, True])
def test_a_decoder_that_hangs_is_ended(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, holds_the_lock: bool
):
    import ctypes

    libc = (ctypes.PyDLL if holds_the_lock else ctypes.CDLL)(None)
    faulty(monkeypatch, lambda: libc.sleep(100), "rocket.jpg")
    monkeypatch.setattr(children_module, "_DECODE_TIMEOUT_S", 1.0)

    async def hang(made: Pipeline) -> None:
        first = set(pids(made))
        start = time.monotonic()
        names = ("coffee.jpg", "rocket.jpg", "coffee.jpg")
        found = await outcomes(made, [photos.photo(name) for name in names])
        assert isinstance(found[1], DecodeFailed)
        assert [one.size for one in found[::2]] == [(600, 400)] * 2  # whatever shared the child
        assert time.monotonic() - start < 20
        ended = first - set(pids(made))
        assert ended and await soon(lambda: not any(map(is_alive, ended)))

    run(hang, count=1 if holds_the_lock else 2)


def test_children_may_be_killed_at_any_moment(photos: PhotoServer):
    async def killed(made: Pipeline) -> list:
        async def kill() -> None:
            choose = random.Random(11)
            for _ in range(12):
                await asyncio.sleep(choose.uniform(0.02, 0.2))
                ready = [child.pid for child in made.children._children if child.is_ready]
                if ready:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(choose.choice(ready), signal.SIGKILL)

        killing = asyncio.ensure_future(kill())
        found = []
        while not killing.done():
            found += zip(NAMES, await outcomes(made, [photos.photo(n) for n in NAMES]), strict=True)
        assert len(pids(made)) == 3
        return found

    urls = [photos.photo(name) for name in NAMES]
    expected = dict(zip(NAMES, map(plain, run(outcomes, urls, count=0)), strict=True))
    found = run(killed, count=3)
    good = [(name, plain(one)) for name, one in found if not isinstance(one, Exception)]
    assert all(one == expected[name] for name, one in good)
    # Three in a row can be killed while they decode one image.
    assert len(found) - len(good) <= 2 and len(found) > 12


ERROR = '"error": "InternalError", "text": "Internal error", "detail": "a"'
BAD_ANSWERS = [
    "[1]", "{", "\xff", '{"number": 1', "7", '"number"', "null", "{}", '{"ready": true}',
    '{"number": N}', '{"number": [], "size": 1}', '{"number": N, "size": -1}',
    '{"number": N, "size": 1e3}', '{"number": N, "size": "1"}',
    '{"number": N, "size": 1%s}' % (30 * "0"),
    '{"number": N, "size": NaN}', '{"number": N, "needs": NaN}', '{"number": N, "needs": -1}',
    '{"number": N, "needs": 5}',  # of a file that is only being fetched
    '{"number": N, "width": 1, "height": 1, "seconds": 0.1}',  # the same
    '{"number": N, "error": "InferenceFailed", "text": "a", "detail": "b", "fatal": true}',
    '{"number": N, "error": "AuthFailed", "text": "a", "detail": "b"}',
    '{"number": N, "error": "os", "text": "a", "detail": "b"}',
    '{"number": N, "error": "InternalError", "text": 5, "detail": "b"}',
    '{"number": N, "error": "InternalError", "text": "a"}',
    '{"number": N, "error": "InternalError", "text": "a", "detail": "%s"}' % (2001 * "b"),
    '{"number": N, "error": "SourceHttp", "text": "a", "detail": "b"}',
    '{"number": N, "error": "SourceHttp", "text": "a", "detail": "b", "status": "x"}',
    '{"number": N, "error": "SourceHttp", "text": "a", "detail": "b", "status": 1%s}' % (99 * "0"),
    '{"number": N, "error": "InternalError", "text": "\\ud800", "detail": "b"}',
    '{"number": N, "error": "InternalError", "text": "a", "detail": "b\\nERROR c"}',
    '{"number": N, "size": 5, "more": "%s"}' % (80_000 * "b"),
    '{"number": N, "error": "SourceHttp", "text": "a", "detail": "b", "status": 404.0}',
    60_000 * "[",
]  # fmt: skip


@contextlib.asynccontextmanager
async def imitated(child: children_module._ChildHandle) -> AsyncIterator[socket.socket]:
    """Put a socket of the test in the place of a child's."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child.loop.remove_reader(child.sock)
    child.sock, real = mine, child.sock
    yield its
    real.close(), its.close()


@pytest.mark.parametrize("text", BAD_ANSWERS, ids=map(str, range(len(BAD_ANSWERS))))
def test_a_child_that_talks_nonsense_is_ended(photos: PhotoServer, text: str):
    async def nonsense(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        first = made.children._children[0]
        fetched = children_module._Fetched(made.children, f"{photos.url}/held/coffee.jpg")
        waiting = asyncio.ensure_future(fetched.fetch(first, 10**6, 30))
        await asyncio.sleep(0.1)
        async with imitated(first) as socket_of_child:
            [number] = first.questions
            socket_of_child.send(text.replace("N,", f"{number},").encode("latin-1"))
            first.read()
            with pytest.raises(children_module._ChildEnded):
                await waiting
        assert first.pid not in pids(made) and len(pids(made)) == 2
        return await outcomes(made, [photos.photo("coffee.jpg")] * 3)

    assert [one.size for one in run(nonsense)] == [(600, 400)] * 3


@pytest.mark.parametrize(
    "answer",
    [
        {"needs": 5},  # although it may take as much as it takes
        {"size": 5},
        {"width": 10**30, "height": 1, "seconds": 0.1},
        {"width": 1, "height": 0, "seconds": 0.1},
        {"width": 1, "height": 1, "seconds": -1.0},
        {"width": 1, "height": 1, "seconds": float("nan")},
        {"width": 1, "seconds": 0.1},
    ],
)
def test_an_impossible_answer_to_a_decoding_ends_the_child(photos: PhotoServer, answer: dict):
    async def impossible(made: Pipeline) -> None:
        file = await made.children.fetch(photos.photo("coffee.jpg"))
        child, number = file.child, file.number
        async with imitated(child) as socket_of_child:
            decoding = asyncio.ensure_future(file.decode(None))
            await asyncio.sleep(0)
            socket_of_child.send(json.dumps({"number": number, **answer}).encode())
            child.read()
            with pytest.raises(children_module._ChildEnded):
                await decoding
        assert child.pid not in pids(made)
        assert made.children.decoders._value == 2

    run(impossible)


def test_a_child_that_answers_what_nobody_asked_is_ended(photos: PhotoServer):
    async def unasked(made: Pipeline) -> None:
        await outcomes(made, [photos.photo()] * 4)
        child = made.children._children[0]
        slow = asyncio.ensure_future(made.children.fetch(f"{photos.url}/held/coffee.jpg"))
        await asyncio.sleep(0)
        assert child.is_ready
        async with imitated(child) as socket_of_child:
            socket_of_child.send(b'{"number": 10000, "size": 5}')
            child.read()
        assert child.has_ended
        slow.cancel()

    photos.hold()
    run(unasked)
    photos.release()


def test_a_file_that_moves_holds_up_no_other(photos: PhotoServer, monkeypatch: pytest.MonkeyPatch):
    faulty(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), "rocket.jpg")

    async def moving(made: Pipeline) -> float:
        await outcomes(made, [photos.photo("coffee.jpg")] * 2)
        fetch = made.children.fetch_again

        async def slowly(file: object) -> None:
            if getattr(file, "ends", 0):
                await asyncio.sleep(20)
            await fetch(file)

        made.children.fetch_again = slowly
        jobs = [outcomes(made, [photos.photo("rocket.jpg")] * 2, job=at) for at in range(6)]
        evil = asyncio.gather(*jobs)
        await asyncio.sleep(1.5)
        start = time.monotonic()
        for _ in range(5):
            [one] = await outcomes(made, [photos.photo("coffee.jpg")], job="good")
            assert one.size == (600, 400)
        took = time.monotonic() - start
        evil.cancel()
        return took

    assert run(moving, count=3) < 3


def test_a_file_that_moves_keeps_to_its_reservation(photos: PhotoServer):
    async def grown(made: Pipeline) -> None:
        file = await made.children.fetch(photos.photo("coffee.jpg"))
        file.size -= 1  # it was smaller at first
        file.child.end()
        with pytest.raises(FetchFailed, match="Transfer failed"):
            await file.prepare(partial(file.decode, None))

    run(grown)

def test_a_cancelled_job_leaves_no_file_to_the_garbage_collector(photos: PhotoServer):
    async def cancelled(made: Pipeline) -> None:
        await outcomes(made, [photos.photo()] * 4)
        gc.collect()
        gc.disable()
        try:
            jobs = [
                asyncio.ensure_future(outcomes(made, [photos.photo("coffee.jpg")] * 6, job=at))
                for at in range(3)
            ]
            for pause_s in (0.005, 0.02, 0.03):
                await asyncio.sleep(pause_s)
                jobs.pop().cancel()
            await asyncio.sleep(0.5)
            assert [child.in_hand for child in made.children._children] == [0, 0]
        finally:
            gc.enable()

    run(cancelled)

def test_a_child_that_closes_its_socket_is_ended(photos: PhotoServer):
    async def closed(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        first = made.children._children[0]
        async with imitated(first) as socket_of_child:
            socket_of_child.shutdown(socket.SHUT_WR)
            first.read()
        assert await soon(lambda: not is_alive(first.pid))
        return await outcomes(made, [photos.photo("coffee.jpg")] * 3)

    assert [one.size for one in run(closed)] == [(600, 400)] * 3

def test_a_fetch_beside_a_decoder_that_hangs_is_not_blamed(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    import ctypes

    libc = ctypes.PyDLL(None)  # it holds the lock, so the child answers nothing any more
    faulty(monkeypatch, lambda: libc.sleep(100), "rocket.jpg")
    monkeypatch.setattr(children_module, "_DECODE_TIMEOUT_S", 4.0)
    monkeypatch.setattr(children_module, "_LATE_S", 0.2)

    async def beside(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        file = await made.children.fetch(photos.photo("rocket.jpg"))
        decoding = asyncio.ensure_future(file.prepare(partial(file.decode, None)))
        fetching = asyncio.ensure_future(made.embed_url(photos.photo("coffee.jpg"), True))
        found = await asyncio.gather(fetching, decoding, return_exceptions=True)
        assert isinstance(found[1], DecodeFailed) and "within 4 s" in found[1].detail
        return found[0]

    assert run(beside, count=1, timeout_s=1.0).size == (600, 400)

def test_a_file_at_which_a_child_has_ended_is_decoded_with_nothing_else(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rocket, log = (PHOTOS / "rocket.jpg").read_bytes(), tmp_path / "log"

    def prepare(file: bytes, *args: object) -> object:
        name = "rocket" if file == rocket else "coffee"
        with log.open("a") as events:
            events.write(f"{name} begins\n")
        if name == "rocket":
            if log.read_text().count("rocket begins") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1)
        with log.open("a") as events:
            events.write(f"{name} ends\n")
        return prepare_image(file, *args)

    monkeypatch.setattr(child_module, "prepare_image", prepare)
    # All files go to the newest child.
    monkeypatch.setattr(children_module, "_choose", lambda all: max(all, key=lambda one: one.pid))

    async def beside(made: Pipeline) -> None:
        file = await made.children.fetch(photos.photo("rocket.jpg"))
        decoding = asyncio.ensure_future(file.prepare(partial(file.decode, None)))
        assert await soon(lambda: log.exists() and log.read_text().count("rocket begins") == 2)
        file = await made.children.fetch(photos.photo("coffee.jpg"))
        assert (await file.decode(None))[0] == (600, 400)
        await decoding

    run(beside, count=2)
    assert log.read_text().split("\n")[1:5] == [
        "rocket begins", "rocket ends", "coffee begins", "coffee ends"
    ]  # fmt: skip

def test_a_loop_that_stood_still_reads_its_answers_first(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(children_module, "_LATE_S", 0.0)

    async def stood_still(made: Pipeline) -> None:
        await outcomes(made, [photos.photo()])
        first = pids(made)
        work = [asyncio.ensure_future(made.children.fetch(photos.photo(n))) for n in NAMES]
        await asyncio.sleep(0)
        time.sleep(3)  # noqa: ASYNC251 (meanwhile all answers come)
        assert all(len(file) for file in await asyncio.gather(*work))
        assert pids(made) == first

    run(stood_still, count=1, timeout_s=1.5)

def test_a_child_that_fetches_for_ever_is_ended(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    async def fetch(self: object, number: int, url: str) -> None:
        time.sleep(100)  # noqa: ASYNC251 (its loop stands still)

    monkeypatch.setattr(child_module._Child, "fetch", fetch)
    monkeypatch.setattr(children_module, "_LATE_S", 0.2)
    [one] = run(outcomes, [photos.photo()], timeout_s=0.3)
    assert isinstance(one, FetchTimeout) and "did not answer within 0.5 s" in one.detail

def test_children_that_cannot_start_are_given_up(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(children_module, "be_child", lambda *args: os._exit(1))

    async def given_up(made: Pipeline) -> list:
        found = await outcomes(made, [photos.photo("coffee.jpg")])  # notices
        deadline = time.monotonic() + 20
        while pids(made) and time.monotonic() < deadline:
            found += await outcomes(made, [photos.photo("coffee.jpg")])
        assert not pids(made)
        found = await outcomes(made, [photos.photo("coffee.jpg")] * 3)
        return found, await soon(lambda: pids(made))

    monkeypatch.setattr(children_module, "_NEXT_TRY_S", 1.0)
    found, are_tried_again = run(given_up)
    assert [one.size for one in found] == [(600, 400)] * 3 and are_tried_again
    assert "images are fetched and decoded in threads" in caplog.text

def stop(made: Pipeline) -> list[int]:
    """Stop all children: they neither end nor read."""
    for pid in pids(made):
        os.kill(pid, signal.SIGSTOP)
    return pids(made)

def test_messages_wait_for_a_child_that_reads_slowly(photos: PhotoServer):
    async def flooded(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        first = stop(made)
        urls = [photos.photo("coffee.jpg", query="x" * 4000)] * 300
        work = asyncio.ensure_future(outcomes(made, urls))
        await asyncio.sleep(0.5)
        assert any(child.outbox for child in made.children._children)
        for pid in first:
            os.kill(pid, signal.SIGCONT)
        found = await work
        assert pids(made) == first
        return found

    assert {one.size for one in run(flooded)} == {(600, 400)}

def test_a_child_that_is_stopped_is_ended(photos: PhotoServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(children_module, "_LATE_S", 0.2)

    async def stopped(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        first = stop(made)
        [one] = await outcomes(made, [photos.photo("coffee.jpg")])
        assert isinstance(one, FetchTimeout)
        assert not {*first} <= {*pids(made)}
        while {*first} & {*pids(made)}:  # the other one gets a file, sooner or later
            await outcomes(made, [photos.photo("coffee.jpg")])
        return await outcomes(made, [photos.photo("coffee.jpg")] * 4)

    assert {one.size for one in run(stopped, timeout_s=1.0)} == {(600, 400)}

def test_without_more_processes_those_that_run_go_on(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    forked, fork = [], os.fork

    def refuse_the_fourth() -> int:
        forked.append(1)
        if len(forked) > 2:  # in the fork server: its copy of the list
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refuse_the_fourth)

    async def fewer(made: Pipeline) -> list:
        [only] = pids(made)
        found = await outcomes(made, [photos.photo("coffee.jpg")] * 4)
        assert pids(made) == [only]
        os.kill(only, signal.SIGKILL)
        assert await soon(lambda: not pids(made))
        return found + await outcomes(made, [photos.photo("coffee.jpg")] * 2)

    assert [one.size for one in run(fewer)] == [(600, 400)] * 6

def test_a_fork_server_that_hangs_delays_new_children_only(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(children_module, "_START_S", 0.5)
    monkeypatch.setattr(children_module, "_NEXT_TRY_S", 1.5)

    async def hanging(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        first, last = pids(made)
        os.kill(made.children._pid, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        assert await soon(lambda: len(pids(made)) == 1)
        os.kill(made.children._pid, signal.SIGCONT)  # now it starts a child, too late, and says so
        found = await outcomes(made, [photos.photo("coffee.jpg")] * 3)
        assert await soon(lambda: len(pids(made)) == 2)  # the next try
        assert last in pids(made)
        found += await outcomes(made, [photos.photo("coffee.jpg")] * 8)
        await asyncio.sleep(0.3)
        family = psutil.Process(made.children._pid).children()
        assert sorted(child.pid for child in family) == sorted(pids(made))
        return found

    assert [one.size for one in run(hanging)] == [(600, 400)] * 11

def test_without_a_fork_server_nothing_is_tried_again(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(children_module, "_NEXT_TRY_S", 0.2)

    async def ended(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        os.kill(made.children._pid, signal.SIGKILL)  # and with it the children
        assert await soon(lambda: not pids(made))
        caplog.clear()
        await asyncio.sleep(1.0)
        return await outcomes(made, [photos.photo("coffee.jpg")] * 3)

    assert [one.size for one in run(ended)] == [(600, 400)] * 3
    assert not caplog.records

def test_what_could_not_be_started_is_started_later(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    make, is_full = children_module._shared_memory, True

    def full(name: str, size: int) -> int:
        if name == "pixels" and is_full:
            raise OSError(24, "Too many open files")
        return make(name, size)

    monkeypatch.setattr(children_module, "_shared_memory", full)
    monkeypatch.setattr(children_module, "_NEXT_TRY_S", 0.3)

    async def later(made: Pipeline) -> list:
        nonlocal is_full
        found = await outcomes(made, [photos.photo("coffee.jpg")])
        descriptors = psutil.Process().num_fds()
        await asyncio.sleep(1.0)
        assert not pids(made) and psutil.Process().num_fds() == descriptors
        is_full = False
        assert await soon(lambda: len(pids(made)) == 2)
        return found + await outcomes(made, [photos.photo("coffee.jpg")] * 2)

    assert [one.size for one in run(later)] == [(600, 400)] * 3

@pytest.mark.parametrize("name", ["memfd_create", "fork"])
def test_where_no_child_can_be_started_threads_do_the_work(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch, name: str
):
    def impossible(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, name, impossible)
    [one] = run(outcomes, [photos.photo("coffee.jpg")])
    assert one.size == (600, 400)

def test_when_all_children_have_ended_threads_go_on(photos: PhotoServer):
    async def ended(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        urls = [f"{photos.url}/held/coffee.jpg"] * 6
        work = asyncio.ensure_future(outcomes(made, urls))
        await asyncio.sleep(0.2)
        for pid in (made.children._pid, *pids(made)):
            os.kill(pid, signal.SIGKILL)
        assert await soon(lambda: not pids(made))
        photos.release()
        found = await work
        made.children.close()
        made.children.close()  # once more ends no other process
        return found

    photos.hold()
    assert [one.size for one in run(ended)] == [(600, 400)] * 6

def test_what_a_child_has_fetched_is_fetched_by_a_thread_when_no_child_is_left(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    faulty(monkeypatch, lambda: time.sleep(10), "rocket.jpg")

    async def ended(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        work = [
            asyncio.ensure_future(made.embed_url(photos.photo(name), True))
            for name in ("rocket.jpg", "coffee.jpg")
        ]
        [child] = made.children._children
        assert await soon(lambda: child.is_full or child.places[0] != 0)  # it decodes the first
        await asyncio.sleep(0.3)  # the second waits for it
        for pid in (made.children._pid, child.pid):
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*work, return_exceptions=True)

    first, second = run(ended, count=1)
    assert isinstance(first, InferenceFailed) and second.size == (600, 400)

def test_a_doubtful_file_is_not_decoded_in_the_worker(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    faulty(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), "rocket.jpg")

    async def ended(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        os.kill(made.children._pid, signal.SIGKILL)  # and with it the children
        assert await soon(lambda: not pids(made))
        return await outcomes(made, [photos.photo("coffee.jpg")])

    async def crash(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()])
        monkeypatch.setattr(made.children, "_start", lambda: False)
        return await outcomes(made, [photos.photo("rocket.jpg")])

    assert [one.size for one in run(ended)] == [(600, 400)]
    [one] = run(crash, count=1)
    assert isinstance(one, InferenceFailed) and "a file at which one has ended" in one.detail

def test_without_descriptors_nothing_waits_for_ever(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    async def exhausted(made: Pipeline) -> list:
        await outcomes(made, [photos.photo()] * 2)
        work = asyncio.ensure_future(outcomes(made, [f"{photos.url}/held/coffee.jpg"] * 6))
        await asyncio.sleep(0.2)

        def none(*args: object) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(children_module.os, "memfd_create", none)
        os.kill(pids(made)[0], signal.SIGKILL)
        assert await soon(lambda: len(pids(made)) == 1)
        photos.release()
        return await work

    photos.hold()
    assert [one.size for one in run(exhausted)] == [(600, 400)] * 6

def test_a_loop_that_ends_in_the_middle_leaves_nothing_behind(photos: PhotoServer):
    children = Children.fork()
    children.open(2, Eye(), FetchLimits(), POLICY, PixelLimits())

    async def begin() -> None:
        file = await children.fetch(photos.photo())
        for work in (file.decode(None), children.fetch(f"{photos.url}/held/coffee.jpg")):
            asyncio.ensure_future(work)
        await asyncio.sleep(0.001)

    async def end() -> list:
        files = [await children.fetch(photos.photo("coffee.jpg")) for _ in range(4)]
        return [(await file.decode(None))[0] for file in files]

    photos.hold()
    for _ in range(2):
        asyncio.run(begin())
    assert asyncio.run(asyncio.wait_for(end(), 20)) == [(600, 400)] * 4
    photos.release()
    children.close()

def test_an_image_passes_one_that_takes_long(photos: PhotoServer, monkeypatch: pytest.MonkeyPatch):
    faulty(monkeypatch, lambda: time.sleep(3) or 1 / 0, "rocket.jpg")

    async def passed(made: Pipeline) -> float:
        await outcomes(made, [photos.photo("coffee.jpg")] * 2)
        slow = asyncio.ensure_future(outcomes(made, [photos.photo("rocket.jpg")] * 64, job="slow"))
        await asyncio.sleep(0.5)
        start = time.monotonic()
        [one] = await outcomes(made, [photos.photo("coffee.jpg")], job="quick")
        assert one.size == (600, 400)
        slow.cancel()
        return time.monotonic() - start

    assert run(passed, count=3) < 1.5

# --- what nobody waits for any more ---------------------------------------------------

def test_a_file_that_nobody_needs_is_dropped(photos: PhotoServer):
    async def dropped(made: Pipeline) -> None:
        children, before = made.children, photos.dropped["/endless"]
        file = await children.fetch(photos.photo())
        slow = asyncio.ensure_future(children.fetch(f"{photos.url}/endless"))
        waiting = asyncio.ensure_future(children.fetch(f"{photos.url}/held/coffee.jpg"))
        await asyncio.sleep(0.3)
        assert sum(child.in_hand for child in children._children) == 3
        slow.cancel(), waiting.cancel()
        await asyncio.gather(slow, waiting, return_exceptions=True)
        child, number = file.child, file.number
        del file
        assert await soon(lambda: not any(child.in_hand for child in children._children))
        assert not any(child.questions for child in children._children)
        # The child has closed the connection.
        assert await soon(lambda: photos.dropped["/endless"] == before + 1)
        decoders = made.children.decoders
        await decoders.acquire()
        assert await child.take_turns(1)
        with pytest.raises(InternalError) as raised:
            await child.decode(number, None, 1, decoders)
        assert "KeyError" in raised.value.detail

    photos.hold()
    run(dropped)
    photos.release()

def test_a_job_that_is_cancelled_while_a_child_decodes_disturbs_no_other(
    photos: PhotoServer, monkeypatch: pytest.MonkeyPatch
):
    rocket = (PHOTOS / "rocket.jpg").read_bytes()

    def prepare(file: bytes, eye: object, *args: object) -> object:
        if file != rocket:
            return prepare_image(file, eye, *args)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:  # it writes pixels although nobody waits for them
            eye.pixels.fill_(0)
        raise DecodeFailed

    monkeypatch.setattr(child_module, "prepare_image", prepare)
    names = [name for name in NAMES if name != "rocket.jpg"]
    urls = [photos.photo(name) for name in names]

    async def cancelled(made: Pipeline) -> list:
        slow = asyncio.ensure_future(made.embed_url(photos.photo("rocket.jpg"), True))
        await asyncio.sleep(0.25)
        slow.cancel()
        return await outcomes(made, urls)

    expected = [plain(one) for one in run(outcomes, urls, count=0)]
    assert [plain(one) for one in run(cancelled, count=2, max_connections=1)] == expected

# --- what they may do -----------------------------------------------------------------

@pytest.mark.parametrize(("count", "connections", "most"), [(3, 7, 6), (3, 2, 2), (2, 1, 1)])
def test_all_children_together_keep_to_the_connections_of_a_host(
    photos: PhotoServer, count: int, connections: int, most: int
):
    async def counted(made: Pipeline) -> int:
        before = photos.hits["/held/coffee.jpg"]
        work = [
            asyncio.ensure_future(made.children.fetch(f"{photos.url}/held/coffee.jpg"))
            for _ in range(24)
        ]
        await asyncio.sleep(1.0)
        hits = photos.hits["/held/coffee.jpg"] - before
        photos.release()
        await asyncio.gather(*work)
        return hits

    photos.hold()
    assert run(counted, count=count, max_connections=connections) == most

def test_the_shared_memory_keeps_its_size():
    descriptor = children_module._shared_memory("pixels", 1000)
    for size in (0, 999, 1001):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)

def test_no_child_changes_what_others_are_told(photos: PhotoServer):
    async def changed(made: Pipeline) -> None:
        with pytest.raises(PermissionError):
            os.pwrite(made.children._config_fd, b"x", 0)

    run(changed)

def test_without_memory_a_child_ends_before_its_worker(photos: PhotoServer):
    async def scores(made: Pipeline) -> None:
        await outcomes(made, [photos.photo()] * 4)
        files = [Path(f"/proc/{pid}/oom_score_adj") for pid in pids(made)]
        assert {file.read_text() for file in files} == {"1000\n"}  # noqa: ASYNC240

    run(scores)

def test_a_decoder_in_a_child_uses_one_cpu(photos: PhotoServer, monkeypatch: pytest.MonkeyPatch):
    def threads() -> None:
        raise DecodeFailed(detail=f"{torch.get_num_threads()} threads")

    faulty(monkeypatch, threads, "rocket.jpg")
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = run(outcomes, [photos.photo("rocket.jpg")] * 8)
    finally:
        torch.set_num_threads(torch_threads)
    assert {one.detail for one in found} == {"1 threads"}

def test_children_know_no_more_than_they_need():
    told = child_module.config_of(Eye(), FetchLimits(), POLICY, PixelLimits())
    assert b"secret" not in told and len(told) < 1000

# --- their end ------------------------------------------------------------------------

def test_a_child_ends_when_its_socket_is_closed(photos: PhotoServer):
    async def closed(made: Pipeline) -> None:
        await outcomes(made, [photos.photo()] * 2)
        child = made.children._children[0]
        child.loop.remove_reader(child.sock)
        child.sock.close()
        assert await soon(lambda: not is_alive(child.pid))
        made.children._children.remove(child)

    run(closed)

OWNER = """
import os, sys, time
from test_children import *
children = Children.fork()
children.open(3, Eye(), FetchLimits(), POLICY, PixelLimits())
if not os.fork():  # as the SDK's heartbeat: it has all sockets of its parent
    time.sleep(60)
    os._exit(0)
print(children._pid, *[child.pid for child in children._children], flush=True)
time.sleep(60)
"""

def test_children_end_with_their_worker_however_it_ends():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    processes = [int(pid) for pid in owner.stdout.readline().split()]
    heartbeat = {child.pid for child in psutil.Process(owner.pid).children()} - set(processes)
    try:
        assert len(processes) == 4 and all(map(is_alive, processes))
        for pid in processes:  # of a terminal, or of the platform: they are the worker's business
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert all(map(is_alive, processes))
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 5
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_alive, processes))
    finally:
        for pid in heartbeat:
            os.kill(pid, signal.SIGKILL)
        owner.stdout.close()

def test_a_worker_answers_alike_and_leaves_no_process(photos: PhotoServer, tmp_path: Path):
    jobs = {name: signed(photos.photo(name), request_id=name) for name in NAMES[:3]}
    jobs["bad"] = signed(f"{photos.url}/missing", request_id="bad")
    replies = {}
    for where in ("processes", "threads"):
        home = tmp_path / where
        home.mkdir()
        with EmulatorServer() as platform:
            env = plain_env(home, **hub_env(home), **platform.worker_env(), DECODE_IN=where)
            with WorkerProcess(env) as worker:
                found = {name: platform.runsync(job, 100) for name, job in jobs.items()}
                family = psutil.Process(worker.process.pid).children(recursive=True)
                worker.terminate()
                assert worker.wait_for_exit(20) == 0, worker.tail()
                assert not any(is_alive(process.pid) for process in family)
            replies[where] = {name: reply["output"] for name, reply in found.items()}, len(family)
    (ours, many), (theirs, few) = replies["processes"], replies["threads"]
    for name in jobs:
        for reply in (ours[name], theirs[name]):
            reply.pop("timings", None)
    assert ours == theirs and ours["bad"]["code"] == "SOURCE_HTTP"
    assert many - few == 1 + usable_cpus() + 2  # the fork server, and as many as threads
