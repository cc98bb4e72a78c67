"""Batches on a GPU, with a stand-in for `torch.cuda` that is as late as CUDA allows."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import lazy_cuda
import pytest
import torch
from PIL import Image

from heimdex_clip_worker.errors import InferenceFailed
from heimdex_clip_worker.model import image
from heimdex_clip_worker.model.cuda import CudaOptions, CudaRunner
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.model.preprocess import Preparation
from heimdex_clip_worker.model.tower import ImageShape, VisionTower
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.pipeline import Pipeline

pytestmark = [pytest.mark.model]

SHAPE = ImageShape(64, 2, 2, 128, 16, "gelu", image_size=32, patch_size=8)
PREPARATION = Preparation(32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
torch.manual_seed(0)
TOWER = VisionTower.load(
    SHAPE, {n: torch.randn_like(t) / 8 for n, t in VisionTower(SHAPE).state_dict().items()}
)
PLAIN = Embedder(
    tower=TOWER, transform=None, model_name="small", pretrained="seeded", activation="gelu",
    dim=16, image_size=32, device="cpu", preparation=PREPARATION, quality="fast",
)  # fmt: skip
PIXELS = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
ROWS = PLAIN.encode(PIXELS)


def make(max_batch: int = 8, **options) -> Embedder:
    """Make an embedder with a runner that has not warmed up."""
    options = CudaOptions(**options)
    how = {"max_batch": max_batch, "options": options, "cuda": lazy_cuda}
    return dataclasses.replace(PLAIN, runner=CudaRunner(TOWER, PREPARATION, **how))


@pytest.fixture
def warm() -> Iterator[Embedder]:
    embedder = make()
    embedder.runner.warm_up()
    yield embedder
    lazy_cuda.failures.clear()


def is_close(rows: torch.Tensor, numbers: slice) -> bool:
    return rows.shape == ROWS[numbers].shape and torch.allclose(rows, ROWS[numbers], atol=1e-4)


def lent(embedder: Embedder, numbers: slice) -> list[torch.Tensor]:
    """Write images into slots, as decoders do."""
    return [embedder.runner.lend().copy_(pixels) for pixels in PIXELS[numbers]]


def free(embedder: Embedder) -> int:
    return len(embedder.runner._slots._free)


# --- rows -------------------------------------------------------------------------


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(CudaOptions)])
def test_no_option_changes_the_rows(option: str) -> None:
    embedder = make(**{option: 1 if option == "in_flight" else False})
    assert is_close(embedder.encode(PIXELS), slice(24))
    embedder.runner.warm_up()
    assert is_close(embedder.encode(PIXELS), slice(24))


def test_padding_does_not_reach_a_result(warm) -> None:
    warm.encode(PIXELS[:8])  # what the padding of the next batches is
    for count in (1, 3, 5, 7):
        assert is_close(warm.encode(list(PIXELS[8 : 8 + count])), slice(8, 8 + count))


def test_two_threads_get_their_own_rows(warm, monkeypatch) -> None:
    replay = lazy_cuda.CUDAGraph.replay

    def late(self) -> None:
        time.sleep(0.002)  # without the lock, the other batch comes in between
        replay(self)

    monkeypatch.setattr(lazy_cuda.CUDAGraph, "replay", late)
    batches = [slice(n % 16, n % 16 + 1 + n % 8) for n in range(40)]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda numbers: warm.encode(lent(warm, numbers)), batches)
        assert all(is_close(rows, n) for rows, n in zip(results, batches, strict=True))


# --- slots ------------------------------------------------------------------------


def test_a_slot_is_not_lent_again_before_its_batch_has_ended(warm, monkeypatch) -> None:
    seen = []
    synchronize = lazy_cuda.Event.synchronize

    def watched(self) -> None:
        gc.collect()
        seen.append(free(warm))  # the caller has dropped the pixels; the copies are still to come
        synchronize(self)

    monkeypatch.setattr(lazy_cuda.Event, "synchronize", watched)
    total = free(warm)
    assert is_close(warm.encode(lent(warm, slice(8))), slice(8))
    gc.collect()
    assert seen == [total - 8] and free(warm) == total


def test_the_pixels_of_an_image_are_written_into_a_slot(warm) -> None:
    for quality in ("fast", "exact"):
        for picture in (Image.radial_gradient("L"), Image.new("L", (90, 70), 9)):  # the latter flat
            embedder = dataclasses.replace(warm, quality=quality)
            before, picture = free(warm), picture.convert("RGB")
            pixels = embedder.preprocess(picture)
            assert free(warm) == before - 1
            plain = dataclasses.replace(PLAIN, quality=quality)
            assert torch.equal(pixels, plain.preprocess(picture))
            del pixels


def test_without_a_free_slot_an_image_has_ordinary_memory(warm) -> None:
    taken = [warm.runner.lend() for _ in range(free(warm))]
    pixels = [warm.preprocess(Image.new("RGB", (40, 40), (n, 0, 0))) for n in range(4)]
    assert warm.runner.lend() is None and len(taken) == 24
    assert torch.allclose(warm.encode(pixels), PLAIN.encode(torch.stack(pixels)), atol=1e-4)


# --- failures ---------------------------------------------------------------------


def test_a_batch_that_fails_copies_nothing_any_more_and_leaves_the_others_alone(warm) -> None:
    total = free(warm)
    lazy_cuda.failures.extend([None, None, RuntimeError("shapes differ")])
    with pytest.raises(InferenceFailed) as caught:
        warm.encode(lent(warm, slice(8)))
    copying, computing = warm.runner._copying, warm.runner._computing
    assert not caught.value.fatal and caught.value.retryable
    assert (copying.done, computing.done) == (copying.given, computing.given)
    for start in range(0, 16, 4):  # both lanes are there
        assert is_close(warm.encode(lent(warm, slice(start, start + 4))), slice(start, start + 4))
    del caught
    gc.collect()
    assert free(warm) == total


def test_a_batch_without_memory_is_halved(warm) -> None:
    lazy_cuda.failures.append(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_close(warm.encode(lent(warm, slice(7))), slice(7))


def test_a_lost_device_is_fatal(warm) -> None:
    lazy_cuda.failures.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(InferenceFailed) as caught:
        warm.encode(PIXELS[:8])
    assert caught.value.fatal


CAPTURE = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize("text", ["CUDA out of memory", CAPTURE])
def test_what_cannot_be_recorded_is_run_as_it_is(text: str, monkeypatch, caplog) -> None:
    embedder = make()

    def refused(*args, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(lazy_cuda, "graph", refused)
    monkeypatch.setattr(image, "_never_free", pytest.fail)  # the device is not lost
    with caplog.at_level("WARNING", "heimdex_clip_worker"):
        image._warm_up(embedder.runner)
    assert "without CUDA graphs" in caplog.text and embedder.runner._graphs == {}
    assert is_close(embedder.encode(PIXELS[:7]), slice(7))


def test_a_device_that_is_lost_at_the_start_is_told(monkeypatch) -> None:
    def lost(self) -> int:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(CudaRunner, "warm_up", lost)
    with pytest.raises(InferenceFailed) as caught:
        make().warm_up()
    assert caught.value.fatal


def test_every_size_is_recorded_and_replayed_once_before_the_first_batch(warm) -> None:
    replays = {size: graph.replays for size, graph in warm.runner._graphs.items()}
    assert replays == {1: 1, 2: 1, 4: 1, 8: 1}
    warm.encode(PIXELS[:3])
    assert [graph.replays for graph in warm.runner._graphs.values()] == [1, 1, 2, 1]


def test_a_graph_that_cannot_be_replayed_is_found_before_the_first_batch(monkeypatch) -> None:
    embedder = make()

    def full(self) -> None:
        raise torch.OutOfMemoryError("CUDA error: out of memory")  # as its upload may raise

    monkeypatch.setattr(lazy_cuda.CUDAGraph, "replay", full)
    image._warm_up(embedder.runner)
    assert embedder.runner._graphs == {} and is_close(embedder.encode(PIXELS[:7]), slice(7))


def test_a_capture_that_fails_leaves_no_stream_behind_in_the_thread(monkeypatch) -> None:
    embedder = make()
    compute = CudaRunner._compute

    def refused(self, pixels):
        if lazy_cuda.is_recording():
            raise RuntimeError(CAPTURE)
        return compute(self, pixels)

    monkeypatch.setattr(CudaRunner, "_compute", refused)
    image._warm_up(embedder.runner)
    assert embedder.runner._graphs == {} and lazy_cuda.current_stream() is None


# --- in a worker ------------------------------------------------------------------


def pipeline_of(embedder, **options) -> Pipeline:
    limits = SimpleNamespace(max_bytes=1000)
    fetcher = SimpleNamespace(limits=limits, close=lambda: asyncio.sleep(0))
    return Pipeline(embedder, fetcher, PixelLimits(), decode_workers=2, max_batch=8, **options)


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").rotate(7 * number).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_a_pipeline_runs_on_it(warm) -> None:
    async def embed(pipeline: Pipeline) -> list[list[float]]:
        async def one(number: int) -> list[float]:
            prepared = await pipeline.prepare(jpeg(number))
            return (await pipeline.embed_prepared(prepared, False, 0.0)).values

        vectors = await asyncio.gather(*map(one, range(30)))
        await pipeline.close()
        return vectors

    ours, plain = (torch.tensor(asyncio.run(embed(pipeline_of(e)))) for e in (warm, PLAIN))
    assert torch.allclose(ours, plain, atol=1e-4)


class Held:
    """An embedder with a runner, whose runs take until they are let go."""

    dim, at_least = 3, None
    runner = SimpleNamespace(options=CudaOptions())

    def __init__(self) -> None:
        self.let_go, self.running = threading.Event(), threading.Semaphore(0)
        self.ended = 0

    def encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        self.running.release()
        self.let_go.wait(60)
        self.ended += 1
        return torch.stack(images)


async def start_two(embedder: Held, pipeline: Pipeline) -> list[asyncio.Task]:
    """Start two batches, and wait until both run."""
    work = []
    for _ in range(2):
        work.append(asyncio.create_task(pipeline.images.submit((torch.ones(3), False))))
        await asyncio.to_thread(embedder.running.acquire)
    return work


def test_a_third_batch_waits_and_takes_all_that_has_come() -> None:
    embedder = Held()

    async def run() -> None:
        pipeline = pipeline_of(embedder)
        work = await start_two(embedder, pipeline)
        for _ in range(4):  # one comes after the other
            work.append(asyncio.create_task(pipeline.images.submit((torch.ones(3), False))))
            await asyncio.sleep(0.001)
        embedder.let_go.set()
        await asyncio.gather(*work)
        await pipeline.close()
        assert embedder.ended == 3

    asyncio.run(run())


def test_closing_waits_for_both_batches() -> None:
    embedder = Held()

    async def run() -> None:
        pipeline = pipeline_of(embedder)
        await start_two(embedder, pipeline)
        threading.Timer(0.1, embedder.let_go.set).start()
        await pipeline.close()
        assert embedder.ended == 2

    asyncio.run(run())


def test_two_batches_that_hang_are_lost_in_the_time_of_one() -> None:
    embedder = Held()

    async def run() -> list[BaseException]:
        pipeline = pipeline_of(embedder, model_timeout_s=1)
        pipeline._model_pool.is_first = False  # the first run has four times as long
        work = await start_two(embedder, pipeline)
        late = asyncio.create_task(pipeline.images.submit((torch.ones(3), False)))
        start = time.monotonic()
        errors = await asyncio.gather(*work, late, return_exceptions=True)
        assert time.monotonic() - start < 10
        embedder.let_go.set()
        return errors

    errors = asyncio.run(run())
    assert len(errors) == 3 and all(error.fatal and error.retryable for error in errors)
