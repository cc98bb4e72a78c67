"""Measure the worker against the baseline worker: `make bench`, or `make bench ARGS=--help`.

Both run at the same time, under the same loop of the platform's SDK, with the same weights and
photographs, and are measured in turn. Each figure is the ratio of the medians. All vectors are
compared. If one differs, or if one job fails, there are no figures. `benchmarks.network` measures
over HTTPS.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp

from benchmarks import ROOT, network, photos, workers
from benchmarks.figures import GOALS, Figure, file_stem, machine, table, write
from benchmarks.image_server import ImageServer
from benchmarks.load import BenchmarkFailed, Callers, Run, Seen, output_of, signed
from benchmarks.workers import BASELINE, OURS, STANDIN, PeakMemory, Worker
from heimdex_clip_worker.serving.process import usable_cpus

# The stand-in's vectors are pixels, and the two workers scale sharp edges a little differently.
# The vectors of the real model must be far closer.
LEAST_COSINE_OF_PIXELS = 0.98


@dataclass(frozen=True)
class Plan:
    """How many rounds and jobs are measured."""

    rounds: int = 3
    baseline_jobs: int = 12  # the SDK's loop takes one a second
    single_jobs: int = 256
    batch_jobs: int = 8  # of 32 images
    standin_jobs: tuple[int, int, int] = (80, 512, 40)  # baseline; ours; baseline, slow images
    lone: int = 16  # requests to each worker
    sweep: tuple[tuple[int, int], ...] = ((1, 16), (2, 24), (4, 32), (8, 48), (16, 80), (32, 128))
    baseline_sweep: tuple[tuple[int, int], ...] = ((1, 8), (8, 12))  # callers, jobs
    kernel_rounds: int = 3
    network_rounds: int = 2
    https_baseline_jobs: int = 8
    https_jobs: int = 8  # of 32 images
    https_singles: int = 160
    https_lone: int = 32  # requests to each worker, near and far
    blocks: int = 2  # of 20 photographs


QUICK = Plan(
    rounds=1,
    baseline_jobs=4,
    single_jobs=64,
    batch_jobs=4,
    standin_jobs=(20, 128, 20),
    lone=4,
    sweep=((1, 8), (8, 24)),
    baseline_sweep=((1, 4),),
    kernel_rounds=1,
    network_rounds=1,
    https_baseline_jobs=3,
    https_jobs=4,
    https_singles=64,
    https_lone=8,
    blocks=1,
)


@dataclass(frozen=True)
class Load:
    """The load of one figure."""

    callers: int
    images: int  # in a job of ours; the baseline gets one in each
    delay_ms: int  # of the image server
    encoding: str = "base64"  # of our replies, as our client asks; the baseline knows only floats


LOADS = {
    "singles": Load(64, 1, 0),
    "batches": Load(4, 32, 0),
    "singles-100ms": Load(64, 1, 100),
    "batches-100ms": Load(4, 32, 100),
}
STANDIN_LOADS = {
    "fast-0ms": Load(64, 1, 0),
    "fast-50ms": Load(64, 1, 50),
    "fast-floats": Load(64, 1, 0, "float"),
}
UNDER_LOAD = {*LOADS, "memory", "lone", "json"}  # figures that need both workers under load


@dataclass
class Bench:
    """One run: what it measures, and its results so far."""

    plan: Plan
    only: set[str]
    server: ImageServer
    callers: Callers
    env: dict[str, str] = field(default_factory=dict)  # additional variables for both workers
    seen: Seen = field(default_factory=Seen)
    seen_pixels: Seen = field(default_factory=lambda: Seen(LEAST_COSINE_OF_PIXELS))
    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, list] = field(default_factory=dict)  # for the plots
    samples: list[network.Sample] = field(default_factory=list)  # over HTTPS
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)  # by photographs
    started: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def figure(self, name: str, note: str = "", by: str = "median") -> Figure:
        """Get a figure to add a round to."""
        return self.figures.setdefault(name, Figure(name, note=note, by=by))

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Select the names that are to be measured."""
        return [name for name in names if name in self.only]

    async def ready(self, *started: Worker) -> None:
        """Wait for the first reply of each worker, in turn, as each uses all cores to start."""
        for worker in started:
            await self.callers.first(worker, self.seen)

    # --- two workers in production --------------------------------------------

    async def production(self) -> None:
        """Measure both workers side by side under the production loop."""
        self.say("starting both workers under the production loop")
        with (
            workers.production(BASELINE, **self.env) as baseline,
            workers.production(OURS, **self.env) as ours,
        ):
            await self.ready(baseline, ours)
            loads = self.wanted(LOADS) or (["singles"] if "memory" in self.only else [])
            for number in range(self.plan.rounds if loads else 0):
                await self.round(number, loads, baseline, ours)
            if "lone" in self.only:
                await self.lone(baseline, ours)
            if "json" in self.only:
                await self.json(ours)
            if "singles" in self.only:
                await self.sweep(baseline, ours)
            await self.callers.complete(baseline, self.seen)
            await self.callers.complete(ours, self.seen)

    async def round(self, number: int, loads: list[str], baseline: Worker, ours: Worker) -> None:
        """Measure one round of every load, one worker while the other idles.

        The baseline gets one image in each job, whatever the load, and its rate is the loop's. So
        it is measured once for each delay of the image server.
        """
        others: dict[int, Run] = {}  # by delay
        plan, peaks = self.plan, [0, 0]  # memory of both, bytes
        for name in loads:
            load = LOADS[name]
            jobs = plan.single_jobs if load.images == 1 else plan.batch_jobs
            with PeakMemory(baseline) as other_peak:
                if load.delay_ms not in others:
                    run = await self.drive(baseline, self.seen, load, plan.baseline_jobs)
                    others[load.delay_ms] = run
            with PeakMemory(ours) as peak:
                run_ours = await self.drive(ours, self.seen, load, jobs)
            other = others[load.delay_ms]
            peaks = [max(peaks[0], other_peak.peak), max(peaks[1], peak.peak)]
            note = f"a round: baseline {plan.baseline_jobs} jobs, ours {jobs} of {load.images}"
            self.figure(name, note).add(other.rate, run_ours.rate)
            rates = f"baseline {other.rate:.2f}, ours {run_ours.rate:.1f} /s"
            self.say(f"round {number + 1}, {name}: {rates}")
            if name == "singles":
                self.keep_curve(BASELINE, load.callers, other)
                self.keep_curve(OURS, load.callers, run_ours)
        if "memory" in self.only:
            note = "the worker and its heartbeat process, sampled every 0.2 s under load"
            self.figure("memory", note, by="max").add(*[peak / 1e6 for peak in peaks])

    async def drive(self, worker: Worker, seen: Seen, load: Load, jobs: int) -> Run:
        """Run a load when the machine is quiet again; the baseline gets one image in each job."""
        await asyncio.sleep(0.3)
        images = load.images if worker.kind == OURS else 1
        return await self.callers.drive(
            worker,
            seen,
            jobs=jobs,
            callers=load.callers,
            images=images,
            delay_ms=load.delay_ms,
            encoding=load.encoding,
        )

    def keep_curve(self, kind: str, callers: int, run: Run) -> None:
        """Keep a run for the plots."""
        point = {"callers": callers, "images_per_s": run.rate, "latencies_s": run.latencies_s}
        self.curves.setdefault(kind, []).append(point)

    async def lone(self, baseline: Worker, ours: Worker) -> None:
        """Send single requests to idle workers, to each in turn.

        The SDK's loop polls ten times a second, and rests for a second after it got all the jobs
        that it wants. The pauses here are random, so that they are not in step with it.
        """
        figure, pause = self.figure("lone", f"{self.plan.lone} requests each"), random.Random(0)
        for _ in range(self.plan.lone):
            seconds = []
            for worker in (baseline, ours):
                await asyncio.sleep(pause.uniform(0.7, 0.9))
                run = await self.callers.drive(worker, self.seen, jobs=1, callers=1)
                seconds.append(run.latencies_s[0])
            figure.add(*seconds)
        for kind, rounds in ((BASELINE, figure.other), (OURS, figure.ours)):
            self.curves[f"{kind}-lone"] = list(rounds)
        middles = [figure.middle(rounds) for rounds in (figure.other, figure.ours)]
        self.say("lone: baseline {:.3f}, ours {:.3f} s".format(*middles))

    async def json(self, ours: Worker) -> None:
        """Count the bytes of replies with 32 vectors, in both encodings."""
        urls = [f"{self.callers.server}/0/{name}" for name in (self.callers.names * 2)[:32]]
        sizes = []
        for encoding in ("float", "base64"):
            body = await self.callers.post(ours, signed(urls, encoding, encoding))
            sizes.append(float(len(json.dumps(output_of(body)))))
        self.figure("json", "a job of 32 images, the whole reply").add(*sizes)

    async def sweep(self, baseline: Worker, ours: Worker) -> None:
        """Measure fewer callers than 64, only for the plots."""
        self.say("fewer callers, for the plots")
        for worker, points in ((baseline, self.plan.baseline_sweep), (ours, self.plan.sweep)):
            for callers, jobs in points:
                run = await self.drive(worker, self.seen, Load(callers, 1, 0), jobs)
                self.keep_curve(worker.kind, callers, run)

    # --- the rest --------------------------------------------------------------

    async def standin(self) -> None:
        """Measure both workers with a sleep of 3 ms as the model, on the SDK's local server."""
        names, plan = self.wanted(STANDIN_LOADS), self.plan
        self.say("starting both workers with the fast-accelerator stand-in")
        with (
            workers.local(BASELINE, *STANDIN[BASELINE]) as baseline,
            workers.local(OURS, *STANDIN[OURS]) as ours,
        ):
            for worker in (baseline, ours):
                await self.callers.first(worker, self.seen_pixels)
            for number in range(plan.rounds):
                for name in names:
                    load = STANDIN_LOADS[name]
                    jobs = plan.standin_jobs[2 if load.delay_ms else 0], plan.standin_jobs[1]
                    other, run_ours = [
                        await self.drive(worker, self.seen_pixels, load, count)
                        for worker, count in zip((baseline, ours), jobs, strict=True)
                    ]
                    note = "the model is a sleep of 3 ms a batch; a round: {} and {} images"
                    self.figure(name, note.format(*jobs)).add(other.rate, run_ours.rate)
                    rates = f"baseline {other.rate:.1f}, ours {run_ours.rate:.1f} /s"
                    self.say(f"round {number + 1}, {name}: {rates}")
            for worker in (baseline, ours):
                await self.callers.complete(worker, self.seen_pixels)

    async def start(self) -> None:
        """Measure from the start of a process, under the production loop, to its first reply."""
        note = "under the production loop; artifact on disk, files in the page cache"
        figure, warm = self.figure("start", note), -1  # one round that only fills the page cache
        for number in range(warm, self.plan.rounds):
            seconds = []
            for kind in (BASELINE, OURS):
                with workers.production(kind, **self.env) as worker:
                    seconds.append(await self.callers.first(worker, self.seen))
            if number != warm:
                figure.add(*seconds)
                times = "baseline {:.2f}, ours {:.2f} s".format(*seconds)
                self.say(f"round {number + 1}, start: {times}")

    async def kernels(self) -> None:
        """Measure encoding and preprocessing, each in a process of its own."""
        for name in self.wanted(["encode", "preprocess-1080p", "preprocess-12mp"]):
            self.say(name)
            kept = await kernel(name, rounds=self.plan.kernel_rounds)
            unit = 1e9 if name == "encode" else 1
            figure = self.figure(name, kept["note"])
            for pair in zip(kept["other"], kept["ours"], strict=True):
                figure.add(*(value / unit for value in pair))

    async def bound(self) -> None:
        """Compute what no worker exceeds here: model and decoding alone, all cores busy.

        An image takes the model's multiplications, at the rate of the best GEMM, which uses all
        cores; and a decoding, in one of as many threads as there are cores.
        """
        from benchmarks.kernels import flop

        rated = {name: figure for name, figure in self.figures.items() if figure.goal.photos}
        if "encode" not in self.figures or not rated:
            return
        gemm_s = flop() / 1e9 / median(self.figures["encode"].other)
        for kind in sorted({figure.goal.photos for figure in rated.values()}):
            self.say(f"decode-{kind}")
            kept = await kernel(f"decode-{kind}", rounds=self.plan.kernel_rounds)
            decode_s = median(kept["ours"])
            rate = 1 / (gemm_s + decode_s / usable_cpus())
            spent = {"gemm_ms": 1000 * gemm_s, "decode_ms": 1000 * decode_s}
            self.bounds[kind] = {"images_per_s": rate, **spent}
        for figure in rated.values():
            figure.bound = self.bounds[figure.goal.photos]["images_per_s"]

    async def all(self) -> None:
        """Measure every chosen figure."""
        if self.wanted(UNDER_LOAD):
            await self.production()
        if self.wanted(network.FIGURES):
            await network.measure(self)
        if self.wanted(STANDIN_LOADS):
            await self.standin()
        if "start" in self.only:
            await self.start()
        await self.kernels()
        await self.bound()

    def results(self) -> dict:
        """Collect all results; raise BenchmarkFailed if the workers' vectors differ."""
        checked = {}
        for name, seen in (("vectors", self.seen), ("stand_in_pixels", self.seen_pixels)):
            if any(seen.vectors.values()):
                checked[name] = seen.compare()
        return {
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - self.started),
            "figures": {
                name: self.figures[name].as_json() for name in GOALS if name in self.figures
            },
            "compared": checked,
            "bounds": self.bounds,
            "https": network.summary(self.samples),
            "curves": self.curves,
        }


async def kernel(name: str, rounds: int) -> dict:
    """Run `benchmarks.kernels` and return its result; raise BenchmarkFailed."""
    command = [sys.executable, "-m", "benchmarks.kernels", name, "--rounds", str(rounds)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    if process.returncode:
        raise BenchmarkFailed(f"{name} ended with {process.returncode}\n{err.decode()[-3000:]}")
    return json.loads(out)


@contextlib.asynccontextmanager
async def prepared(plan: Plan, only: Iterable[str], **env: str) -> AsyncIterator[Bench]:
    """Yield a run with its photographs, their server and its callers."""
    names = [path.name for path in photos.pool(plan.blocks)]
    # The SDK's local server closes idle connections after 5 s; no request may be sent just then.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    with ImageServer() as server:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            yield Bench(plan, {*only}, server, Callers(session, server.url, names), env)


async def measure(plan: Plan, only: Iterable[str]) -> Bench:
    """Run the benchmark."""
    async with prepared(plan, only) as bench:
        await bench.all()
    return bench


def report(bench: Bench, results: dict) -> str:
    """Write the report that is printed at the end."""
    about = results["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}; {results['date']}, "
        f"{results['seconds']} s",
        "",
        table([bench.figures[name] for name in GOALS if name in bench.figures]),
        "",
    ]
    if bench.samples:
        title = "over HTTPS: CPU time of each worker by thread, in ms per image"
        lines += [title, "", network.cpu_table(results["https"]), ""]
    for kind, bound in results["bounds"].items():
        lines.append(
            f"the bound, {kind}: {bound['images_per_s']:.1f} images/s (model "
            f"{bound['gemm_ms']:.1f} ms of all cores, decoding {bound['decode_ms']:.1f} ms of one)"
        )
    for name, kept in results["compared"].items():
        lines.append(
            f"{name.replace('_', ' ')} compared: {kept['vectors'][OURS]} of ours on "
            f"{kept['photographs']} photographs; least cosine to the baseline "
            f"{kept['least_cosine_to_baseline'][OURS]:.6f}"
        )
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=...",
        description=__doc__.partition("\n")[0],
        epilog="`python -m benchmarks.turn OTHER` compares the workers of two checkouts; "
        "`make gpu-check` measures a GPU.",
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to try it out")
    parser.add_argument(
        "--only", action="append", choices=sorted(GOALS), metavar="NAME",
        help=f"measure only this figure; can be repeated: {', '.join(GOALS)}. "
        "Shares of the bound need `encode` too.",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print the table, write the results and draw the plots; exit with 1 on failure."""
    args = arguments()
    try:
        bench = asyncio.run(measure(QUICK if args.quick else Plan(), args.only or GOALS))
        results = bench.results()
    except BenchmarkFailed as failure:
        raise SystemExit(f"\nTHE BENCHMARK FAILED, there are no figures: {failure}") from None
    print(report(bench, results))
    if args.only or args.quick:
        print("Nothing was written: only the whole benchmark writes results.")
        return
    from benchmarks import plots

    path = args.out / f"{file_stem(results['machine'])}.json"
    write(path, results)
    for picture in plots.draw(results, path):
        print(f"wrote {picture}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
