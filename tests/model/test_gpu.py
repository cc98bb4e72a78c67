"""What only a GPU can show: `make test ARGS="--gpu -m gpu"`."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from heimdex_clip_worker.model import golden
from heimdex_clip_worker.model.cuda import CudaOptions, CudaRunner
from heimdex_clip_worker.model.image import (
    Embedder,
    _forbid_cudnn_attention,
    forbid_tf32,
    pick_device,
)

pytestmark = [pytest.mark.model, pytest.mark.gpu]

LOST = """
import os, torch
from heimdex_clip_worker.errors import InferenceFailed
from heimdex_clip_worker.model.image import run_tower

def beyond(rows):  # an index that does not exist: a device-side assert
    return torch.zeros(3, device=rows.device)[rows.long() + 1_000_000]

for _ in range(2):
    try:
        run_tower(beyond, torch.ones(2, 3), "cuda")
    except InferenceFailed as error:
        print(error.fatal, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def as_a_worker() -> None:
    """Set what `Embedder.load` sets on a GPU."""
    forbid_tf32()
    _forbid_cudnn_attention()


@pytest.fixture(scope="module")
def seeded():
    """Build a worker's embedders, images and texts, once for each precision and preprocessing."""
    state = golden.seeded_state()

    @cache
    def build(precision: str, quality: str = "fast"):
        return golden.seeded_worker(state, device="cuda", precision=precision, quality=quality)

    return build


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_the_vectors_are_open_clips(seeded, precision: str, quality: str) -> None:
    images, texts = seeded(precision, quality)
    distances = golden.distances(golden.embed_golden(images, texts))
    assert max(distances.values()) <= golden._allowed_drift(images)


def test_auto_takes_the_gpu() -> None:
    assert pick_device("auto").type == "cuda"


def test_a_device_that_is_lost_is_fatal_and_stays_so() -> None:
    run = [sys.executable, "-c", LOST + "os._exit(0)"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr[-2000:]


def test_a_process_whose_device_is_lost_ends_without_an_abort() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


# --- batches as a worker runs them: `model.cuda` ------------------------------------

TURN = {"fp32": 1e-9, "fp16": 5e-6, "bf16": 2e-4}  # most 1 - cosine to the plain path


def with_runner(seeded, precision: str, max_batch: int = 256, **options) -> Embedder:
    """Make an embedder with a runner that has not warmed up."""
    plain, _ = seeded(precision)
    how = {"max_batch": max_batch, "options": CudaOptions(**options)}
    return dataclasses.replace(plain, runner=CudaRunner(plain.tower, plain.preparation, **how))


def plain_rows(embedder: Embedder, pixels: torch.Tensor) -> torch.Tensor:
    return dataclasses.replace(embedder, runner=None).encode(pixels)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Coarse pictures of random colours, so that each has a vector of its own."""
    coarse = torch.rand(300, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=224).mul(255).to(torch.uint8)


WAYS = [(precision, "") for precision in TURN]
WAYS += [("fp16", option) for option in ("fold", "one_product", "pinned", "graphs")]


@pytest.mark.parametrize("precision, off", WAYS)
def test_every_way_to_run_a_batch_gives_the_same_vectors(seeded, pixels, precision, off) -> None:
    embedder = with_runner(seeded, precision, **{off: False} if off else {})
    embedder.runner.warm_up()
    for count in (1, 3, 64, 100, 256, 300):
        rows = embedder.encode(list(pixels[:count]))
        assert golden.drift(rows, plain_rows(embedder, pixels[:count])) <= TURN[precision], count


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_give_open_clips_vectors(seeded, precision: str) -> None:
    embedder = with_runner(seeded, precision)
    embedder.runner.warm_up()
    assert [*embedder.runner._graphs][-1] == 256
    _, texts = seeded(precision)
    distances = golden.distances(golden.embed_golden(embedder, texts))
    assert max(distances.values()) <= golden._allowed_drift(embedder)


def test_a_thousand_batches_keep_their_pixels_apart(seeded, pixels) -> None:
    embedder, order = with_runner(seeded, "fp16", max_batch=64), random.Random(0)
    embedder.runner.warm_up()
    expected = plain_rows(embedder, pixels)
    total = len(embedder.runner._slots._free)

    def decode(number: int) -> torch.Tensor:
        slot = embedder.runner.lend()
        return pixels[number].clone() if slot is None else slot.copy_(pixels[number])

    def run(numbers: list[int]) -> float:
        rows = embedder.encode([*decoders.map(decode, numbers)])
        return golden.drift(rows, expected[numbers])

    batches = [order.choices(range(300), k=order.randint(1, 64)) for _ in range(1000)]
    with ThreadPoolExecutor(4) as decoders, ThreadPoolExecutor(2) as models:
        assert max(models.map(run, batches)) <= TURN["fp16"]
    assert len(embedder.runner._slots._free) == total


def take_all(leave: int) -> list[torch.Tensor]:
    """Take the device's memory, but for some bytes."""
    torch.cuda.empty_cache()
    taken = []
    for size in (1 << 30, 1 << 26, 1 << 22):
        while torch.cuda.mem_get_info()[0] - leave > size:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                break
    return taken


def test_without_memory_for_graphs_batches_are_run_as_they_are(seeded, pixels, caplog) -> None:
    embedder = with_runner(seeded, "fp16")
    embedder.encode(pixels[:1])  # what the first run of all takes
    taken = take_all(leave=100_000_000)
    with caplog.at_level("WARNING", "heimdex_clip_worker"):
        embedder.warm_up()
    assert "without CUDA graphs" in caplog.text and embedder.runner._graphs == {}
    del taken
    torch.cuda.empty_cache()
    rows = embedder.encode(list(pixels[:256]))
    assert golden.drift(rows, plain_rows(embedder, pixels[:256])) <= TURN["fp16"]


def test_graphs_need_no_more_memory(seeded, pixels) -> None:
    embedder = with_runner(seeded, "fp16")
    embedder.runner.warm_up()
    expected = plain_rows(embedder, pixels[:200])
    taken = take_all(leave=0)
    rows = embedder.encode(list(pixels[:200]))
    del taken
    assert golden.drift(rows, expected) <= TURN["fp16"]
