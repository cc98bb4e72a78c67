"""Measure an accelerator: `make bench ARGS=--gpu`, or `ARGS="--gpu --device cpu"` to try it out.

Three things are measured: encoding alone by precision and batch, as a share of what the device can
do; decoding by all threads, for which the accelerator waits on most machines; and both workers end
to end, with downloads and decoding.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import kernels, photos
from benchmarks.bench import QUICK, Load, Plan, prepared
from benchmarks.figures import file_stem, machine, number, table, write
from benchmarks.load import BenchmarkFailed
from benchmarks.workers import OURS, production
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.pipeline import prepare_image
from heimdex_clip_worker.serving.process import usable_cpus

# Dense peaks of the data sheets in TFLOP/s: float16 and bfloat16 on the tensor cores with sums in
# float32, and float32 on the ordinary cores, because the worker forbids TF32. First match counts.
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "A6000": (155, 38.7),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "4090": (165, 82.6),
    "3090": (71, 35.6),
    "T4": (65, 8.1),
}
PRECISIONS = ("fp32", "fp16", "bf16")
BATCHES = (1, 8, 32, 64, 128, 256, 512)
LARGE = Load(callers=16, images=64, delay_ms=0)


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:  # FLOP/s
    """Look up the dense peak of a GPU for a type; None if the table has none."""
    for known, (half, single) in PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


def encoding(device: str, precisions: tuple[str, ...], batches: tuple[int, ...]) -> list[dict]:
    """Measure the encoder alone, from prepared pixels on the CPU to vectors on the CPU."""
    rows = []
    for precision in precisions:
        embedder = kernels.load(device=device, precision=precision)
        dtype, cuda = kernels.weights_dtype(embedder), device != "cpu"
        measured = kernels.gemm(dtype, device)
        peak = data_sheet_peak(torch.cuda.get_device_name(), dtype) if cuda else None
        for size in batches:
            pixels = kernels.batch_of(embedder, size)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(kernels.seconds(partial(embedder.encode, pixels), 10))
            flops = size * kernels.flop() / seconds
            rows.append({
                "precision": precision,
                "batch": size,
                "images_per_s": size / seconds,
                "share_of_gemm": flops / measured,
                "share_of_peak": flops / peak if peak else None,
                "vram_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
            })  # fmt: skip
    return rows


def decoding(device: str) -> float:  # images/s
    """Measure how fast all threads together prepare the benchmark's photographs."""
    threads = usable_cpus()
    embedder, limits = kernels.load(device=device), PixelLimits(max_pixels=50_000_000)
    work = partial(prepare_image, embedder=embedder, limits=limits)
    files = [path.read_bytes() for path in photos.pool()] * max(1, threads // 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, files[:threads]))
        start = time.perf_counter()
        list(pool.map(work, files))
        seconds = time.perf_counter() - start
    torch.set_num_threads(before)
    return len(files) / seconds


def vram_in_use() -> int:  # bytes, of all processes
    """Measure how much of the device's memory is in use."""
    free, total = torch.cuda.mem_get_info()
    return total - free


async def end_to_end(device: str, quick: bool) -> dict:
    """Measure both workers with jobs, end to end; raise BenchmarkFailed."""
    plan = QUICK if quick else replace(Plan(), single_jobs=1024, batch_jobs=32)
    names = ("singles", "batches", "lone", "start")
    async with prepared(plan, names, CLIP_DEVICE=device) as bench:
        before = vram_in_use() if device != "cpu" else 0
        with production(OURS, CLIP_DEVICE=device) as ours:
            await bench.callers.first(ours, bench.seen)
            large = await bench.drive(ours, bench.seen, LARGE, 2 if quick else 64)
            vram = (vram_in_use() - before) / 1e6 if device != "cpu" else None
        await bench.production()
        await bench.start()
        results = bench.results()
    print(table([bench.figures[name] for name in names]))
    results["large_jobs"] = {
        "callers": LARGE.callers,
        "images": LARGE.images,
        "images_per_s": large.rate,
        "vram_mb": vram,
    }
    return results


def encoding_table(rows: list[dict]) -> str:
    """Write the encoder's rates as a Markdown table."""
    head = ["precision", "batch", "images/s", "of GEMM", "of the data sheet", "VRAM, MB"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        peak, vram = row["share_of_peak"], row["vram_mb"]
        cells = [row["precision"], str(row["batch"]), number(row["images_per_s"])]
        cells += [
            f"{row['share_of_gemm']:.0%}",
            f"{peak:.0%}" if peak else "",
            number(vram) if vram else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(device: str, quick: bool, out: Path) -> None:
    """Measure, print, and keep the results beside the others; exit with 1 on failure."""
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --device cpu tries the code out")
    torch.manual_seed(0)
    about = machine() if device != "cpu" else {**machine(), "gpu": None}
    print(f"{about['gpu'] or about['cpu']}, {about['cores']} cores, torch {about['torch']}\n")
    rows = encoding(device, *((("fp32",), (1, 8)) if quick else (PRECISIONS, BATCHES)))
    print(encoding_table(rows))
    prepared_per_s = decoding(device)
    print(f"\nall threads prepare {number(prepared_per_s)} images/s\n")
    try:
        results = asyncio.run(end_to_end(device, quick))
    except BenchmarkFailed as failure:
        raise SystemExit(f"\nTHE BENCHMARK FAILED, there are no figures: {failure}") from None
    large = results["large_jobs"]
    print(
        f"\njobs of {large['images']} images, {large['callers']} callers: "
        f"{number(large['images_per_s'])} images/s end to end"
        + (f", {number(large['vram_mb'])} MB of VRAM" if large["vram_mb"] else "")
    )
    if quick or device == "cpu":
        print("Nothing was written: only the whole benchmark on a GPU writes results.")
        return
    results |= {"encoding": rows, "all_threads_prepare_per_s": prepared_per_s}
    path = out / f"{file_stem(results['machine'])}.json"
    write(path, results)
    print(f"wrote {path}")
