"""What needs no worker: `python -m benchmarks.kernels encode|preprocess`, one JSON object out.

A process each, because torch's number of threads is of a process: all of them to encode, one to
preprocess.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from seeded import seeded_hub

from benchmarks import CACHE, photos
from heimdex_clip_worker.batch import Computing, Texts
from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.embed import Embedder

GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (1600, 768, 3072))


def load(**options: object) -> Embedder:
    """Return the embedder with the seeded weights, as the worker would have it."""
    options.setdefault("device", "cpu")
    return Embedder.load("ViT-B-32", "openai", cache_dir=str(seeded_hub()), **options)


def flop(
    size: int = 224, patch: int = 32, width: int = 768, layers: int = 12, dim: int = 512
) -> float:  # 8.8e9 for ViT-B/32
    """Return the floating-point operations that one image takes in a vision transformer."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    stem = 2 * patches * 3 * patch**2 * width
    block = tokens * 2 * 12 * width**2 + 4 * tokens**2 * width  # projections and MLP; attention
    return stem + layers * block + 2 * width * dim


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Return how long each call took, after one that is not counted; sorted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def gemm(dtype: torch.dtype, device: str = "cpu", repeats: int = 3) -> float:  # FLOP/s
    """Return the best rate at which a device multiplies matrices of a type."""
    best = 0.0
    for m, k, n in GEMMS + ((8192, 8192, 8192),) * (device != "cpu"):
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            with torch.inference_mode():
                a @ b
            if a.is_cuda:
                torch.cuda.synchronize()

        times = seconds(multiply, repeats)
        best = max(best, 2 * m * k * n / times[0])
    return best


def weights_dtype(embedder: Embedder) -> torch.dtype:
    """Return the type that a tower computes in: that of its matrices."""
    return next(p.dtype for p in embedder.tower.parameters() if p.dim() == 2)


def batch_of(embedder: Embedder, size: int) -> torch.Tensor:  # (size, 3, S, S)
    """Return a photograph `size` times, prepared as the worker would."""
    data = photos.make("native", 0).read_bytes()
    return torch.stack([embedder.preprocess(decode(data, PixelLimits()))] * size)


def encode(rounds: int, batch: int = 32) -> dict:
    """Return rounds of FLOP/s, a matrix multiplication's and the encoder's, in turn."""
    embedder = load()
    dtype = weights_dtype(embedder)
    pixels = batch_of(embedder, batch)
    note = f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    found: dict = {"note": note, "other": [], "ours": []}
    for _ in range(rounds):
        found["other"].append(gemm(dtype))
        took = statistics.median(seconds(lambda: embedder.encode(pixels), 5))
        found["ours"].append(batch * flop() / took)
    return found


def preprocess(rounds: int, kind: str, count: int = 4) -> dict:
    """Return rounds of images/s, JPEG to what the model takes, open_clip's and ours, in turn."""
    import open_clip

    torch.set_num_threads(1)
    work = Computing(load(), PixelLimits(max_pixels=50_000_000), Texts(None))
    theirs = open_clip.image_transform(224, is_train=False)
    files = [photos.make(kind, i).read_bytes() for i in range(count)]

    def plain() -> None:
        for data in files:
            theirs(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours() -> None:
        for data in files:
            work.pixels(data)

    note = f"{count} photographs, 1 thread"
    found: dict = {"note": note, "other": [], "ours": []}
    for _ in range(rounds):
        found["other"].append(count / statistics.median(seconds(plain, 3)))
        found["ours"].append(count / statistics.median(seconds(ours, 3)))
    return found


def main() -> None:
    """Measure one thing and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["encode", *(f"preprocess-{kind}" for kind in photos.MIX)])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    name, _, kind = given.what.partition("-")
    found = encode(given.rounds) if name == "encode" else preprocess(given.rounds, kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
