"""Measure what needs no worker: `python -m benchmarks.kernels NAME` prints one JSON object.

Each measurement is a process of its own, because torch's number of threads belongs to the process:
all threads to encode, one to preprocess.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from seeded import seeded_hub

from benchmarks import CACHE, photos
from benchmarks.figures import MIX, THUMBNAILS
from heimdex_clip_worker.model import preprocess as preprocessing
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.serving.decode import PixelLimits, decode
from heimdex_clip_worker.serving.pipeline import prepare_image

GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (1600, 768, 3072))
GEMMS_OF_A_GPU = (*GEMMS, (8192, 8192, 8192))

POOLS = {MIX: partial(photos.pool, 1), THUMBNAILS: photos.thumbnails}


def load(**options: object) -> Embedder:
    """Load the embedder with the seeded weights, as the worker would: open_clip is needed once."""
    options = {"device": "cpu", "artifact_dir": str(CACHE / "artifacts"), **options}
    return Embedder.load("ViT-B-32", "openai", cache_dir=str(seeded_hub()), **options)


def flop(
    size: int = 224, patch: int = 32, width: int = 768, layers: int = 12, dim: int = 512
) -> float:  # 8.8e9 for ViT-B/32
    """Compute the floating-point operations for one image in a vision transformer.

    They are those of the model as it is published. `unneeded_flop` has what a worker leaves out.
    """
    patches = (size // patch) ** 2
    tokens = patches + 1
    stem = 2 * patches * 3 * patch**2 * width
    block = tokens * 2 * 12 * width**2 + 4 * tokens**2 * width  # projections and MLP; attention
    return stem + layers * block + 2 * width * dim


def unneeded_flop(size: int = 224, patch: int = 32, width: int = 768) -> float:  # 0.6e9
    """Compute how many of them the worker's tower saves: its last block is for one token only."""
    others = (size // patch) ** 2
    # Of these tokens only keys and values are computed: no query, output and perceptron (2 + 8
    # squares of the width), and no attention.
    return others * (2 * 10 * width**2 + 4 * (others + 1) * width)


def seconds(
    call: Callable[[], object],
    repeats: int,
    warm_s: float = 0.0,  # a GPU is slow at first: its clock rises under load
) -> list[float]:
    """Measure each call after a first one, and others for `warm_s`, that do not count; sorted."""
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < warm_s:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def gemm(
    dtype: torch.dtype,
    device: str = "cpu",
    repeats: int = 3,
    shapes: tuple[tuple[int, int, int], ...] = GEMMS,
    warm_s: float = 0.0,  # as for `seconds`
) -> float:  # FLOP/s
    """Measure the best rate at which a device multiplies matrices of a type."""
    best = 0.0
    for m, k, n in shapes:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            with torch.inference_mode():
                a @ b
            if a.is_cuda:
                torch.cuda.synchronize()

        times = seconds(multiply, repeats, warm_s)
        best = max(best, 2 * m * k * n / times[0])
    return best


def weights_dtype(embedder: Embedder) -> torch.dtype:
    """The type in which a tower computes: that of its matrices."""
    return next(p.dtype for p in embedder.tower.parameters() if p.dim() == 2)


def batch_of(embedder: Embedder, size: int) -> torch.Tensor:  # (size, 3, S, S)
    """Prepare a photograph `size` times, as the worker would."""
    data = photos.make("native", 0).read_bytes()
    return torch.stack([embedder.preprocess(decode(data, PixelLimits()))] * size)


def inputs_of(embedder: Embedder, size: int) -> torch.Tensor | list[torch.Tensor]:
    """Prepare a photograph `size` times, where a worker's decoders would write it."""
    pixels = batch_of(embedder, size)
    if embedder.runner is None:
        return pixels
    slots = [embedder.runner.lend() for _ in range(size)]
    return [
        one if slot is None else slot.copy_(one) for one, slot in zip(pixels, slots, strict=True)
    ]


def encode(rounds: int, batch: int = 32) -> dict:
    """Measure the FLOP/s of a matrix multiplication and of the encoder, in turn."""
    embedder = load()
    dtype = weights_dtype(embedder)
    pixels = batch_of(embedder, batch)
    note = f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    result: dict = {"note": note, "other": [], "ours": []}
    for _ in range(rounds):
        result["other"].append(gemm(dtype))
        median = statistics.median(seconds(lambda: embedder.encode(pixels), 5))
        result["ours"].append(batch * flop() / median)
    return result


def preprocess(rounds: int, kind: str, count: int = 4) -> dict:
    """Measure images/s from JPEG to the model's input, with open_clip's code and ours, in turn."""
    import open_clip

    torch.set_num_threads(1)
    embedder, limits = load(), PixelLimits(max_pixels=50_000_000)
    transform = open_clip.image_transform(224, is_train=False)
    files = [photos.make(kind, i).read_bytes() for i in range(count)]

    def baseline() -> None:
        for data in files:
            transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours() -> None:
        for data in files:
            prepare_image(data, embedder, limits)

    note = f"{count} photographs, 1 thread"
    result: dict = {"note": note, "other": [], "ours": []}
    for _ in range(rounds):
        result["other"].append(count / statistics.median(seconds(baseline, 3)))
        result["ours"].append(count / statistics.median(seconds(ours, 3)))
    return result


def copy(rounds: int, kind: str, count: int = 4) -> dict:
    """Measure images/s, JPEG to pixels, with a copy of Pillow's memory and without, in turn.

    In the thread's own CPU time, because a busy machine's noise is larger than the difference.
    """
    torch.set_num_threads(1)
    preparation = preprocessing.Preparation(224, (0.5,) * 3, (0.5,) * 3)
    files = [photos.make(kind, i).read_bytes() for i in range(count)]

    def rate(memory: Callable) -> float:
        preprocessing._memory = memory
        start = time.thread_time()
        for data in files:
            image = decode(data, PixelLimits(), at_least=preparation.draft_size)
            preprocessing.fast(image, preparation)
        return count / (time.thread_time() - start)

    ways = {"other": preprocessing._copied, "ours": preprocessing._memory}
    result: dict = {"note": f"{count} photographs, 1 thread, CPU time", "other": [], "ours": []}
    for number in range(-1, rounds):  # one that is not counted
        for name, memory in ways.items():
            value = rate(memory)
            result[name] += [value] if number >= 0 else []
    return result


def decoding(rounds: int, kind: str) -> dict:
    """Measure the CPU time of a thread from the bytes of an image to the model's pixels."""
    torch.set_num_threads(1)
    embedder, limits = load(), PixelLimits(max_pixels=50_000_000)
    files = [path.read_bytes() for path in POOLS[kind]()]
    result: dict = {"note": f"{len(files)} photographs, 1 thread, CPU time", "ours": []}
    for number in range(-1, rounds):  # one that is not counted
        start = time.thread_time()
        for data in files:
            prepare_image(data, embedder, limits)
        result["ours"] += [(time.thread_time() - start) / len(files)] if number >= 0 else []
    return result


def main() -> None:
    """Measure one thing and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = [f"{name}-{kind}" for name in ("preprocess", "copy") for kind in photos.MIX]
    kinds += [f"decode-{kind}" for kind in POOLS]
    parser.add_argument("what", choices=["encode", *kinds])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    name, _, kind = args.what.partition("-")
    measure = {"preprocess": preprocess, "copy": copy, "decode": decoding}
    result = encode(args.rounds) if name == "encode" else measure[name](args.rounds, kind)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
