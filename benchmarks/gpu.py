"""The parts of `tools/gpu_check.sh`: each proves or measures something.

What a part finds is on disk at once, and each runs in a process of its own: `benchmarks.gpu_check`.
In the short form, for the tests, the same code does as little as possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import lazy_cuda
import pytest
import torch
from local_worker import WorkerProcess
from PIL import Image
from seeded import seeded_file, seeded_hub

from benchmarks import CACHE, ROOT, cpu, kernels, network, photos, workers
from benchmarks.figures import MIX, THUMBNAILS, machine, write
from benchmarks.image_server import ImageServer
from benchmarks.load import Callers, Seen, output_of, signed
from benchmarks.workers import (
    AUTHORITY,
    BASELINE,
    CUDA_OPTIONS,
    DEPLOYED,
    OBSERVED,
    OURS,
    PeakMemory,
    Worker,
)
from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.errors import InferenceFailed, ModelError
from heimdex_clip_worker.model import golden
from heimdex_clip_worker.model.cuda import CudaOptions, CudaRunner
from heimdex_clip_worker.model.image import (
    Embedder,
    _forbid_cudnn_attention,
    forbid_tf32,
    to_vectors,
)
from heimdex_clip_worker.model.tower import DTYPES
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.pipeline import prepare_image
from heimdex_clip_worker.serving.process import usable_cpus
from heimdex_clip_worker.settings import VARIABLES

# Dense peaks of the data sheets in TFLOP/s: float16 and bfloat16 on the tensor cores with sums in
# float32, and float32 on the ordinary cores, because the worker forbids TF32. First match counts.
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "A6000": (155, 38.7),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "5090": (209, 104.8),
    "4090": (165, 82.6),
    "3090": (71, 35.6),
    "T4": (65, 8.1),
}
PACKAGES = ("torch", "torchvision", "pillow", "numpy", "open-clip-torch", "timm", "runpod")
PACKAGES += ("aiohttp",)
MODEL = "ViT-B-32"


# --- what a part keeps ----------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How much is done: everything, or as little as possible."""

    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")
    qualities: tuple[str, ...] = ("exact", "fast")  # of the preprocessing
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256, 512)
    repeats: int = 10
    path_batches: tuple[int, ...] = (1, 16, 64, 256)  # of the part `gpu-path`
    path_seconds: float = 0.5  # for each of them; 0: one batch
    warm_s: float = 0.2  # before each measurement of the device: its clock rises under load
    callers: tuple[tuple[int, int], ...] = ((1, 64), (32, 16), (128, 8))  # images in a job, callers
    kinds: tuple[tuple[str, str], ...] = (
        ("http", THUMBNAILS), ("http", MIX), ("https", THUMBNAILS), ("https", MIX),
    )  # fmt: skip
    seconds: float = 3.0  # of a load; 0: one job for each caller
    baseline_jobs: int = 4  # the SDK's loop takes one a second
    starts: int = 2
    photos: int = 20
    model_timeout_s: int = 10  # MODEL_TIMEOUT_S of the part `watchdog`


SHORT = Form(
    precisions=("fp32",), qualities=("fast",), batches=(1,), repeats=1, callers=((1, 2), (2, 1)),
    path_batches=(1,), path_seconds=0.0, warm_s=0.0, kinds=(("http", THUMBNAILS), ("https", MIX)),
    seconds=0.0, baseline_jobs=2, starts=1, photos=2, model_timeout_s=10,
)  # fmt: skip


class Skipped(Exception):
    """A part has nothing to do here; the message says why."""


@dataclass
class Found:
    """What a part has found so far; on disk at once."""

    path: Path
    device: str  # cuda or cpu
    is_short: bool
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def form(self) -> Form:
        """How much is to be done."""
        return SHORT if self.is_short else Form()

    @property
    def on_gpu(self) -> bool:
        """True if the device is a GPU."""
        return self.device != "cpu"

    def keep(self, **values: Any) -> None:
        """Keep values."""
        self.values |= values
        self.save()

    def row(self, table: str, **row: Any) -> None:
        """Keep a row of a table."""
        self.values.setdefault(table, []).append(row)
        self.save()

    def expect(self, is_so: bool, problem: str) -> None:
        """Keep a problem unless something is as it has to be; the part goes on."""
        if not is_so:
            self.problems.append(problem)
            self.save()

    def save(self, **more: Any) -> None:
        """Write everything; a reader sees all of it or what was there before."""
        part = self.path.with_suffix(".part")
        write(part, {"values": self.values, "problems": self.problems, **more})
        part.replace(self.path)


# --- the machine ----------------------------------------------------------------


def nvidia_smi() -> dict[str, str]:
    """Ask the driver's tool about the GPU that torch sees first; empty if it is not there."""
    fields = "driver_version,memory.total,power.limit,clocks.max.sm,pcie.link.gen.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    number = int(first) if first.isdigit() and int(first) < len(lines) else 0
    values = [value.strip() for value in lines[number].split(",")] if lines else []
    return dict(zip(fields.split(","), values, strict=False)) | {"gpus": str(len(lines))}


def setup(found: Found) -> None:
    """Describe the machine, and make weights and photographs."""
    if found.on_gpu:
        torch.cuda.init()  # raises what is wrong
    about = machine()
    versions = {name: metadata.version(name) for name in PACKAGES}
    found.keep(machine=about if found.on_gpu else {**about, "gpu": None}, versions=versions)
    found.keep(driver=nvidia_smi() if found.on_gpu else {})
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, make in made_once(found).items():
        start = time.perf_counter()
        make()
        found.keep(**{f"{name}_s": time.perf_counter() - start})


def made_once(found: Found) -> dict[str, Callable[[], object]]:
    """List what later runs find on disk: weights, the serving artifacts of them, photographs."""
    made: dict[str, Callable[[], object]] = {"weights": seeded_hub}
    for precision in found.form.precisions:
        made[f"artifact_{precision}"] = partial(kernels.load, precision=precision)
    return made | {"photographs": partial(photos.pool, 1), "thumbnails": photos.thumbnails}


# --- (a) the tests --------------------------------------------------------------


def marked_files() -> list[str]:
    """List the test files and notebooks in which something is marked `gpu`."""
    files = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("tests/**/test_*.py")]
    marks = re.compile(r"#\| gpu\b|pytest\.mark\.gpu\b")
    return sorted(str(f) for f in files if marks.search(f.read_text(encoding="utf-8")))


class Listing:
    """Keeps the names of the tests that pytest finds."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the names."""
        self.names = [item.nodeid for item in session.items]


def list_tests(found: Found, command: list[str]) -> None:
    """List the tests, in this process: it has imported nearly everything that they need."""
    listing = Listing()
    status = pytest.main([*command, "--gpu", "-m", "gpu", "--collect-only"], plugins=[listing])
    for name in listing.names:
        found.row("tests", name=name, outcome="found")
    found.expect(status == 0 and bool(listing.names), "no test is marked gpu")


def tests(found: Found) -> None:
    """Run every test marked `gpu`; without a GPU run the others of those files, or just list them.

    Only these files are collected: others import what such a machine may not have.
    """
    command = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *marked_files()]
    if found.is_short and not found.on_gpu:
        list_tests(found, command)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-u", "-m", "pytest", *command, "-vv", f"--junitxml={report}"]
        command += ["--gpu", "-m", "gpu"] if found.on_gpu else []
        status = keep_lines(found, command)
        if report.exists():  # it has more of each
            found.values.pop("tests", None)
            for case in ElementTree.parse(report).iter("testcase"):
                keep_case(found, case)
    found.expect("tests" in found.values, "no test is marked gpu")
    found.expect(status == 0, f"pytest ended with {status}; see the log")


def keep_lines(found: Found, command: list[str]) -> int:
    """Run pytest, and keep each outcome as soon as it is printed; return the exit status."""
    outcome = re.compile(r"(\S.*::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if match := outcome.match(line):
                found.row("tests", name=match[1], outcome=match[2].lower())
    return process.returncode


def keep_case(found: Found, case: ElementTree.Element) -> None:
    """Keep the outcome of a test, as the report has it."""
    tags = {part.tag: part.get("message", "") for part in case}
    failed = tags.keys() & {"failure", "error"}
    outcome = "failed" if failed else "skipped" if "skipped" in tags else "passed"
    name = f"{case.get('classname')}::{case.get('name')}"
    found.row("tests", name=name, outcome=outcome, seconds=float(case.get("time", 0)))
    found.expect(not failed, f"{name}: {' '.join(tags[tag] for tag in failed)[:300]}")


# --- (b) the vectors ------------------------------------------------------------


def open_clip_rows(
    state: dict[str, torch.Tensor], device: str, precision: str
) -> dict[str, torch.Tensor]:  # photos and texts, in the order of `golden.golden`
    """Embed the package's photographs and texts with open_clip itself, on the device."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(
        MODEL, precision=precision, device=device, force_quick_gelu=True
    )
    model.load_state_dict(state)
    model.eval()
    tokenize, dtype = open_clip.get_tokenizer(MODEL), DTYPES[precision]
    pixels = []
    for path in (photos.SOURCES[0].with_name(name) for name in golden.golden()["photos"]):
        with Image.open(path) as image:
            pixels.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        rows = model.encode_image(torch.stack(pixels).to(device, dtype)).float().cpu()
        tokens = tokenize(list(golden.golden()["texts"])).to(device)
        return {"photos": rows, "texts": model.encode_text(tokens).float().cpu()}


def vectors(found: Found) -> None:
    """Compare the worker's vectors with open_clip's in float32 on the same device."""
    from safetensors.torch import load_file

    if found.on_gpu:
        forbid_tf32()
        _forbid_cudnn_attention()
    seeded_hub()
    state = load_file(seeded_file())
    theirs = open_clip_rows(state, found.device, "fp32")
    found.keep(open_clip_from_package=golden.distances(theirs))
    for precision in found.form.precisions:
        for quality in found.form.qualities:
            pair = golden.seeded_worker(
                state, device=found.device, precision=precision, quality=quality
            )
            rows = golden.embed_golden(*pair)
            drifts = {kind: golden.drift(rows[kind], theirs[kind].cpu()) for kind in theirs}
            bound = golden._allowed_drift(pair[0])
            found.row("drift", worker="ours", precision=precision, quality=quality,
                      **drifts, allowed=bound)  # fmt: skip
            found.expect(max(drifts.values()) <= bound,
                         f"{precision}, {quality}: 1 - cosine {drifts} > {bound}")  # fmt: skip
        if precision != "fp32":
            rows = open_clip_rows(state, found.device, precision)
            drifts = {kind: golden.drift(rows[kind], theirs[kind]) for kind in theirs}
            found.row("drift", worker="open_clip", precision=precision, quality="exact", **drifts)
        if found.is_short:  # every worker does the same at its start
            continue
        try:
            fit = kernels.load(device=found.device, precision=precision).warm_up()
            found.row("as_served", precision=precision, drift=fit.drift, allowed=fit.allowed)
        except (ModelError, InferenceFailed) as error:
            found.expect(False, f"{precision}: not fit to serve: {error}")


# --- (c) encoding ---------------------------------------------------------------


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:  # FLOP/s
    """Look up the dense peak of a GPU for a type; None if the table has none."""
    for known, (half, single) in PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


def on_device(embedder: Embedder, pixels: torch.Tensor) -> Callable[[], None]:
    """Make a run of the tower whose pixels are on the device already, and whose rows stay there."""
    placed, size = pixels.to(embedder.device), len(pixels)
    graphs = embedder.runner._graphs if embedder.runner else {}
    most = min(size, max(graphs, default=size))  # a runner runs larger batches in parts
    graph = graphs.get(most) if size % most == 0 else None

    def run() -> None:
        with torch.inference_mode():
            if graph is not None:
                for _ in range(size // most):
                    graph.replay()
            else:
                embedder.tower(embedder.prepare(placed))
        if placed.is_cuda:
            torch.cuda.synchronize()

    return run


def encoding(found: Found) -> None:
    """Measure the encoder alone, by precision and batch."""
    repeats, warm_s = found.form.repeats, found.form.warm_s if found.on_gpu else 0.0
    flop = kernels.flop() - kernels.unneeded_flop()
    for precision in found.form.precisions:
        embedder = kernels.load(device=found.device, precision=precision)
        if embedder.runner:
            embedder.runner.warm_up()
        dtype = kernels.weights_dtype(embedder)
        shapes = kernels.GEMMS_OF_A_GPU if found.on_gpu else kernels.GEMMS
        shapes = shapes[:1] if found.is_short else shapes
        measured = kernels.gemm(dtype, found.device, repeats, shapes, warm_s)
        peak = data_sheet_peak(torch.cuda.get_device_name(), dtype) if found.on_gpu else None
        found.row("gemm", precision=precision, flop_per_s=measured, data_sheet=peak)
        for size in found.form.batches:
            pixels = kernels.batch_of(embedder, size)
            if found.on_gpu:  # reserved: the memory of the graphs counts
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            inputs = kernels.inputs_of(embedder, size)
            spent = kernels.seconds(partial(embedder.encode, inputs), repeats, warm_s)
            del inputs
            alone = kernels.seconds(on_device(embedder, pixels), repeats, warm_s)
            rate, alone_rate = (size / statistics.median(times) for times in (spent, alone))
            flops = alone_rate * flop
            found.row(
                "encoding",
                precision=precision,
                batch=size,
                images_per_s=rate,
                on_device_images_per_s=alone_rate,
                share_of_gemm=flops / measured,
                share_of_peak=flops / peak if peak else None,
                vram_mb=torch.cuda.max_memory_reserved() / 1e6 if found.on_gpu else None,
            )
        del embedder


# --- (d) what `model.cuda` does -------------------------------------------------


OFF = CudaOptions(fold=False, one_product=False, pinned=False, graphs=False, in_flight=1)
WAYS: dict[str, CudaOptions | None] = {
    "all": CudaOptions(),
    "fold off": CudaOptions(fold=False),
    "one_product off": CudaOptions(one_product=False),
    "pinned off": CudaOptions(pinned=False),
    "graphs off": CudaOptions(graphs=False),
    "one batch in flight": CudaOptions(in_flight=1),
    "all off": OFF,
    "plain path": None,
    "all again": CudaOptions(),
}


def embedder_with(found: Found, options: CudaOptions | None) -> Embedder:
    """Load an embedder that runs batches in some way; without a GPU a stand-in takes its place."""
    most, precision = max(found.form.path_batches), "fp16" if found.on_gpu else "fp32"
    how = {"precision": precision, "max_batch": most, "cuda_options": options}
    embedder = kernels.load(device=found.device, **how)
    if options is None:
        return dataclasses.replace(embedder, runner=None)
    if not found.on_gpu:
        how = {"max_batch": most, "options": options, "cuda": lazy_cuda}
        runner = CudaRunner(embedder.tower, embedder.preparation, **how)
        embedder = dataclasses.replace(embedder, runner=runner)
    return embedder


def drive(embedder: Embedder, size: int, seconds: float, warm_s: float) -> float:  # images/s
    """Run batches one after the other, as many at a time as are in flight, to lists of numbers."""
    at_once = embedder.runner.options.in_flight if embedder.runner else 1
    inputs = [kernels.inputs_of(embedder, size) for _ in range(at_once)]

    def run(number: int) -> None:
        batch = inputs[number % at_once]
        if embedder.runner is None:  # as the pipeline does
            batch = torch.stack(list(batch))
        to_vectors(embedder.encode(batch), [True] * size)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, range(at_once)))
        one = time.perf_counter()
        run(0)
        one = time.perf_counter() - one
        list(pool.map(run, range(int(warm_s / one))))
        count = max(at_once, int(seconds / one))
        start = time.perf_counter()
        list(pool.map(run, range(count)))
        return count * size / (time.perf_counter() - start)


def gpu_path(found: Found) -> None:
    """Measure the encoder with each option of `CudaOptions` off, from pixels to numbers."""
    ways = [*WAYS][:1] if found.is_short else [*WAYS]
    reference: torch.Tensor | None = None
    for name in ways:
        before = vram_in_use() if found.on_gpu else 0
        embedder, start = embedder_with(found, WAYS[name]), time.perf_counter()
        if embedder.runner:
            embedder.runner.warm_up()
        warm_up_s = time.perf_counter() - start
        rows = golden.embed_photos(embedder)
        reference = embedder.photos if reference is None else reference
        drift, allowed = golden.drift(rows, reference), golden.DRIFT[embedder.precision]
        found.expect(drift <= allowed, f"{name}: 1 - cosine {drift} > {allowed}")
        rates = {
            str(size): drive(embedder, size, found.form.path_seconds, found.form.warm_s)
            for size in found.form.path_batches
        }
        vram = (vram_in_use() - before) / 1e6 if found.on_gpu else None
        found.row("ways", way=name, drift=drift, warm_up_s=warm_up_s, vram_mb=vram,
                  images_per_s=rates)  # fmt: skip
        del embedder, rows
        if found.on_gpu:
            torch.cuda.empty_cache()


# --- workers under load ---------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Jobs of one kind."""

    photos: str  # MIX or THUMBNAILS
    images: int  # in a job
    callers: int
    scheme: str = "https"


@dataclass
class Stage:
    """The photographs' server and the callers, for the workers of one part."""

    found: Found
    server: ImageServer
    session: aiohttp.ClientSession
    seen: Seen = field(default_factory=Seen)
    known: dict[tuple, Callers] = field(default_factory=dict)

    @contextlib.contextmanager
    def started(self, kind: str = OURS, **env: str) -> Iterator[Worker]:
        """Run a worker under the production loop."""
        more = {"CLIP_DEVICE": self.found.device, AUTHORITY[kind]: str(self.server.authority)}
        command = OBSERVED[CUDA_OPTIONS if "BENCH_CUDA" in env else kind]
        with workers.production(kind, *command, **(more | env)) as worker:
            yield worker

    def callers(self, worker: Worker, load: Load) -> Callers:
        """Get the callers of a worker, which go on through its photographs."""
        key = worker.kind, load.photos, load.scheme
        if key not in self.known:
            files = photos.thumbnails() if load.photos == THUMBNAILS else photos.pool(1)
            names = [path.name for path in files[: self.found.form.photos]]
            url = self.server.secure_url if load.scheme == "https" else self.server.url
            self.known[key] = Callers(self.session, url, names)
        return self.known[key]

    async def first(self, worker: Worker) -> float:  # seconds
        """Wait for the first reply; return the seconds since the worker's start."""
        load = Load(THUMBNAILS, 1, 1, "http")
        return await self.callers(worker, load).first(worker, self.seen)

    async def measure(self, worker: Worker, load: Load) -> dict[str, Any]:
        """Drive a worker for some seconds, after a job of each caller that is not counted."""
        callers, seconds = self.callers(worker, load), self.found.form.seconds
        how = {"seen": self.seen, "callers": load.callers, "images": load.images}
        jobs = load.callers
        if worker.kind != OURS:
            jobs = self.found.form.baseline_jobs
        elif seconds:
            run = await callers.drive(worker, jobs=jobs, **how)
            jobs = max(jobs, round(run.rate * seconds / load.images))
        own = time.process_time()
        one = await network.sample(callers, worker, self.server, "", jobs=jobs, **how)
        images = jobs * load.images
        return {
            "worker": worker.kind,
            "photos": load.photos,
            "images": load.images,
            "callers": load.callers,
            "scheme": load.scheme,
            "jobs": jobs,
            "images_per_s": one.images_per_s,
            "connections": one.connections,
            "cpu_ms": one.cpu_ms,
            "children": one.children,
            "callers_cpu_ms": 1000 * (time.process_time() - own) / images,
        }


@contextlib.asynccontextmanager
async def stage(found: Found) -> AsyncIterator[Stage]:
    """Serve photographs and prepare callers."""
    photos.pool(1), photos.thumbnails()  # those that are not there yet
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    with ImageServer() as server:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            yield Stage(found, server, session)


def loads(found: Found, schemes: Sequence[str], images: Sequence[int] = ()) -> list[Load]:
    """List the loads: each kind of photograph, in jobs of each size."""
    return [
        Load(kind, size, callers, scheme)
        for scheme, kind in found.form.kinds
        if scheme in schemes
        for size, callers in found.form.callers
        if not images or size in images
    ]


def largest_jobs(found: Found, kind: str = THUMBNAILS) -> Load:
    """Make the load of the largest jobs."""
    return Load(kind, *found.form.callers[-1], "http")


# --- (d) options ----------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A setting of the worker, to be compared with the default."""

    name: str
    env: dict[str, str]  # what this version does not know is reported, not measured


def options() -> list[Option]:
    """List the options; add a line to measure another one."""
    cpus = usable_cpus()
    return [
        Option("default", {}),
        Option("graphs off", cuda_env(CudaOptions(graphs=False))),
        Option("pinned off", cuda_env(CudaOptions(pinned=False))),
        Option("one batch in flight", cuda_env(CudaOptions(in_flight=1))),
        Option("all of model.cuda off", cuda_env(OFF)),
        Option("CLIP_PRECISION=bf16", {"CLIP_PRECISION": "bf16"}),
        Option("CLIP_PREPROCESS=exact", {"CLIP_PREPROCESS": "exact"}),
        Option("MAX_BATCH_SIZE=64", {"MAX_BATCH_SIZE": "64"}),
        Option(f"DECODE_WORKERS={2 * cpus}", {"DECODE_WORKERS": str(2 * cpus)}),
        Option("DECODE_IN=threads", {"DECODE_IN": "threads"}),
        Option("OMP_NUM_THREADS=1", {"OMP_NUM_THREADS": "1"}),
        Option("MAX_CONCURRENCY=300", {"MAX_CONCURRENCY": "300"}),
        Option("default again", {}),
    ]


def cuda_env(options: CudaOptions) -> dict[str, str]:
    """Write options of `model.cuda` for `benchmarks.cuda_worker`."""
    return {"BENCH_CUDA": json.dumps(dataclasses.asdict(options))}


def known_variables() -> set[str]:
    """List the variables that this version of the worker reads, and those of its libraries."""
    return {v.name for v in VARIABLES.values()} | {"OMP_NUM_THREADS", "BENCH_CUDA"}


async def _options(found: Found) -> None:
    chosen = options()[1:2] if found.is_short else options()
    for option in chosen:
        unknown = option.env.keys() - known_variables()
        if unknown:
            found.row("options", option=option.name, reason=f"unknown here: {sorted(unknown)}")
            continue
        async with stage(found) as here:
            with here.started(OURS, **option.env) as worker:
                start_s = await here.first(worker)
                rates = {
                    kind: (await here.measure(worker, largest_jobs(found, kind)))["images_per_s"]
                    for kind in (THUMBNAILS, MIX)
                }
        found.row("options", option=option.name, start_s=start_s, images_per_s=rates)


def each_option(found: Found) -> None:
    """Measure the worker with each option, in jobs of the largest size."""
    asyncio.run(_options(found))


# --- (e) end to end -------------------------------------------------------------


def reference_vectors(found: Found, seen: Seen) -> None:
    """Embed with open_clip what the baseline worker was not asked for, as it would have."""
    if not seen.missing(BASELINE):
        return
    import open_clip

    forbid_tf32()
    model, _, transform = open_clip.create_model_and_transforms(
        MODEL, pretrained=str(seeded_file()), device=found.device, force_quick_gelu=True
    )
    model.eval()
    for name in seen.missing(BASELINE):
        with Image.open(photos.FOLDER / name) as image, torch.inference_mode():
            pixels = transform(image.convert("RGB"))[None].to(found.device)
            row = model.encode_image(pixels)[0].float().cpu().numpy()
        seen.add(BASELINE, name, row)


async def _end_to_end(found: Found) -> None:
    schemes = ("http", "https")
    async with stage(found) as here:
        with here.started(BASELINE) as baseline, here.started(OURS) as ours:
            for worker in (ours, baseline):
                await here.first(worker)
            for load in loads(found, schemes):
                found.row("loads", **await here.measure(ours, load))
            for scheme in schemes:
                load = Load(THUMBNAILS if scheme == "http" else MIX, 1, 4, scheme)
                found.row("loads", **await here.measure(baseline, load))
    reference_vectors(found, here.seen)
    found.keep(compared=here.seen.compare())


def end_to_end(found: Found) -> None:
    """Measure both workers under the production loop, and compare all vectors."""
    asyncio.run(_end_to_end(found))


# --- (f) the start --------------------------------------------------------------


def steps_of(log: str) -> dict[str, float]:  # seconds
    """Read from a worker's log what its start took."""
    match = re.search(r"Fit to serve after ([\d.]+)s \((.*?)\)", log)
    if not match:
        return {}
    steps = dict(re.findall(r"([\w-]+) ([\d.]+)s", match[2])) | {"fit": match[1]}
    return {name: float(value) for name, value in steps.items()}


async def _start(found: Found, here: Stage, kind: str, **env: str) -> None:
    """Measure one start; the worker's log has its steps."""
    with here.started(kind, **env) as worker:
        seconds = await here.first(worker)
        steps = steps_of(worker.process.stderr)
        has_artifact = "CLIP_ARTIFACT_DIR" not in env
        found.row("starts", worker=kind, artifact=has_artifact, seconds=seconds, steps=steps)


async def _starts(found: Found) -> None:
    async with stage(found) as here:
        for _ in range(found.form.starts):
            for kind in (OURS,) if found.is_short else (BASELINE, OURS):
                await _start(found, here, kind)
        if not found.is_short:
            with tempfile.TemporaryDirectory() as empty:
                await _start(found, here, OURS, CLIP_ARTIFACT_DIR=empty)


def starts(found: Found) -> None:
    """Measure from the start of a process to its first reply."""
    asyncio.run(_starts(found))


# --- (g) memory -----------------------------------------------------------------


def vram_in_use() -> int:  # bytes, of all processes
    """Measure how much of the device's memory is in use."""
    free, total = torch.cuda.mem_get_info()
    return total - free


async def _memory(found: Found) -> None:
    async with stage(found) as here:
        for kind in (OURS,) if found.is_short else (OURS, BASELINE):
            before = vram_in_use() if found.on_gpu else 0
            with here.started(kind) as worker:
                await here.first(worker)
                idle = workers.memory(worker.process.process.pid)
                idle_vram = vram_in_use() if found.on_gpu else 0
                with PeakMemory(worker) as peak:
                    load = largest_jobs(found, MIX) if kind == OURS else Load(MIX, 1, 4, "http")
                    await here.measure(worker, load)
                vram = (vram_in_use() - before) / 1e6 if found.on_gpu else None
            found.row("memory", worker=kind, idle_mb=idle / 1e6, peak_mb=peak.peak / 1e6,
                      idle_vram_mb=(idle_vram - before) / 1e6 if found.on_gpu else None,
                      vram_mb=vram)  # fmt: skip


def memory(found: Found) -> None:
    """Measure the memory of host and device, idle and after the largest jobs."""
    asyncio.run(_memory(found))


# --- (h) the watchdog, and a real out-of-memory ---------------------------------


async def _hang(found: Found) -> None:
    """Let the model of a worker hang with jobs in hand, and start another worker afterwards."""
    timeout_s, jobs = found.form.model_timeout_s, 4
    with tempfile.TemporaryDirectory() as folder:
        switch = Path(folder) / "hang"
        async with stage(found) as here:
            with EmulatorServer() as platform:
                env = {"CLIP_DEVICE": found.device, "MODEL_TIMEOUT_S": str(timeout_s)}
                with workers.environment(**platform.worker_env(), **env) as made:
                    process = WorkerProcess(
                        made | {"BENCH_HANG": str(switch)}, "-m", "benchmarks.hung_worker"
                    )
                    with process:
                        worker = Worker(OURS, platform.url, process, time.perf_counter(),
                                        platform.headers)  # fmt: skip
                        await here.first(worker)
                        switch.touch()
                        urls = [here.server.photo(path.name) for path in photos.thumbnails()[:jobs]]
                        start = time.perf_counter()
                        calls = [
                            asyncio.create_task(
                                here.callers(worker, Load(THUMBNAILS, 1, 1, "http")).post(
                                    worker, signed([url], f"hung-{n}", "base64")
                                )
                            )
                            for n, url in enumerate(urls)
                        ]
                        status = await asyncio.to_thread(process.wait_for_exit, timeout_s + 30)
                        gone_s = time.perf_counter() - start
                    found.keep(exit_status=status, gone_after_s=gone_s, timeout_s=timeout_s)
                    with WorkerProcess(made, *DEPLOYED[OURS]):
                        await asyncio.wait(calls, timeout=60)
        outcomes = [
            json.loads(call.result()).get("status", "none") if call.done() else "no reply"
            for call in calls
        ]
        for call in calls:
            call.cancel()
    found.keep(jobs=outcomes)
    slack_s = 25 if found.is_short else 5  # the short form runs beside other tests
    found.expect(gone_s <= timeout_s + slack_s, f"the process was gone after {gone_s:.1f} s")
    found.expect("no reply" not in outcomes, f"jobs without a reply: {outcomes}")


def watchdog(found: Found) -> None:
    """Let a model never return: the worker has to be gone in time."""
    if "MODEL_TIMEOUT_S" not in known_variables():
        raise Skipped("this version of the worker has no MODEL_TIMEOUT_S")
    asyncio.run(_hang(found))


def attempt(embedder: Embedder, pixels: torch.Tensor) -> dict[str, Any]:
    """Encode a batch; describe what came of it."""
    try:
        rows = embedder.encode(pixels)
    except InferenceFailed as error:
        return {"outcome": "failed", "fatal": error.fatal, "detail": error.detail[:200]}
    return {"outcome": "vectors", "finite": bool(rows.isfinite().all())}


def fill_vram(leave: int) -> list[torch.Tensor]:  # bytes that stay free
    """Take the device's memory until only so much is left, in pieces that become smaller."""
    torch.cuda.empty_cache()
    taken: list[torch.Tensor] = []
    for size in (1 << 30, 1 << 27, 1 << 24):
        while torch.cuda.mem_get_info()[0] - leave >= size:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                break
    return taken


def need_of(embedder: Embedder, pixels: torch.Tensor) -> int:  # bytes
    """Measure how much memory a batch needs beyond what is in use."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    embedder.encode(pixels)
    return torch.cuda.max_memory_allocated() - before


def out_of_memory(found: Found) -> None:
    """Take the device's memory away and give it back: a batch is halved, fails, and works again."""
    if not found.on_gpu:
        raise Skipped("needs a GPU")
    with_graphs = kernels.load(device=found.device)
    with_graphs.runner.warm_up()
    embedder = dataclasses.replace(with_graphs, runner=None)
    pixels = kernels.batch_of(embedder, 512)
    need = need_of(embedder, pixels)
    found.keep(batch=512, need_mb=need / 1e6)
    taken = fill_vram(leave=int(0.8 * need))
    found.keep(room_for_half=attempt(embedder, pixels))
    del taken
    taken = fill_vram(leave=0)
    found.keep(no_room=attempt(embedder, pixels))
    found.keep(no_room_with_graphs=attempt(with_graphs, pixels))
    del taken
    torch.cuda.empty_cache()
    found.keep(room_again=attempt(embedder, pixels))
    values = found.values
    found.expect(values["room_for_half"]["outcome"] == "vectors", "the halves did not fit either")
    found.expect(values["no_room"].get("fatal") is False, "not refused, or fatal")
    found.expect(values["no_room_with_graphs"]["outcome"] == "vectors", "graphs needed more memory")
    found.expect(values["room_again"]["outcome"] == "vectors", "memory came back in vain")
    asyncio.run(_starved_worker(found))


async def _starved_worker(found: Found) -> None:
    """Take the memory away under a running worker, then give it back."""
    async with stage(found) as here:
        with here.started(OURS) as worker:
            await here.first(worker)
            names = [path.name for path in photos.thumbnails()]
            urls = [here.server.photo(name) for name in (names * 6)[:128]]
            callers = here.callers(worker, Load(THUMBNAILS, 128, 1, "http"))
            for name, leave in (("starved", 0), ("fed_again", None)):
                taken = [] if leave is None else fill_vram(leave)
                body = await callers.post(worker, signed(urls, name, "base64"))
                output = output_of(body)
                found.keep(**{name: {"images": output["count"], "failed": output["failed"]}})
                del taken
                torch.cuda.empty_cache()
            found.expect(found.values["fed_again"]["failed"] == 0, "images fail with memory again")


# --- (i) what bounds the worker -------------------------------------------------


def decoding(found: Found, kind: str) -> dict[str, float]:
    """Measure decoding and preprocessing: CPU time in one thread, and the rate of all threads."""
    embedder, limits = kernels.load(device=found.device), PixelLimits(max_pixels=50_000_000)
    work = partial(prepare_image, embedder=embedder, limits=limits)
    files = photos.thumbnails() if kind == THUMBNAILS else photos.pool(1)
    bodies = [path.read_bytes() for path in files[: found.form.photos]]
    threads = usable_cpus()
    torch.set_num_threads(1)
    work(bodies[0])
    start = time.thread_time()
    for body in bodies:
        work(body)
    one = (time.thread_time() - start) / len(bodies)
    every = bodies * (1 if found.is_short else max(1, threads // 2))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bodies[:threads]))
        start = time.perf_counter()
        list(pool.map(work, every))
        rate = len(every) / (time.perf_counter() - start)
    return {"one_thread_ms": 1000 * one, "threads": threads, "all_threads_images_per_s": rate}


async def _cpu_time(found: Found) -> None:
    async with stage(found) as here:
        with here.started(OURS) as worker:
            await here.first(worker)
            for load in loads(found, ("https",), [found.form.callers[i][0] for i in (0, -1)]):
                row = await here.measure(worker, load)
                spent = row["cpu_ms"]
                row["loop_ceiling"] = 1000 / max(cpu.busiest_loop(spent, row["children"]), 1e-6)
                row["decode_ceiling"] = 1000 * usable_cpus() / max(spent["decode"], 1e-6)
                found.row("cpu", **row)


def cpu_time(found: Found) -> None:
    """Measure CPU time per image by thread, and the ceilings that follow."""
    for kind in (THUMBNAILS, MIX):
        found.row("decoding", photos=kind, **decoding(found, kind))
    asyncio.run(_cpu_time(found))
