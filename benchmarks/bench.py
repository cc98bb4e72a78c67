"""Measure the worker against a plain one: `make bench`, or `python -m benchmarks.bench --help`.

Both run at the same time, under the same loop of the platform's SDK, on the same weights and
photographs, and take turns: plain, ours, plain, ours. Each figure is the ratio of the medians. All
vectors are compared; one that differs, or one job that fails, and there are no figures at all.
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

import aiohttp

from benchmarks import ROOT, photos, workers
from benchmarks.figures import GOALS, Figure, file_stem, machine, table, write
from benchmarks.load import BenchmarkFailed, Callers, Run, Seen, output_of, signed
from benchmarks.origin import Origin
from benchmarks.workers import OURS, PLAIN, STANDIN, PeakMemory, Worker

# Pixels of a sharp edge may differ a little between the two ways to make an image small, and a
# stand-in's vector is pixels; the real model's vectors must be far closer.
LEAST_COSINE_OF_PIXELS = 0.98


@dataclass(frozen=True)
class Plan:
    """How much of everything is measured."""

    rounds: int = 3
    plain_jobs: int = 12  # the SDK's loop takes one a second
    single_jobs: int = 256
    batch_jobs: int = 8  # of 32 images
    standin_jobs: tuple[int, int, int] = (80, 512, 40)  # plain; ours; plain while the origin waits
    lone: int = 16  # requests to each worker
    sweep: tuple[tuple[int, int], ...] = ((1, 16), (2, 24), (4, 32), (8, 48), (16, 80), (32, 128))
    plain_sweep: tuple[tuple[int, int], ...] = ((1, 8), (8, 12))  # callers, jobs
    kernel_rounds: int = 3
    blocks: int = 2  # of 20 photographs


QUICK = Plan(
    rounds=1,
    plain_jobs=4,
    single_jobs=64,
    batch_jobs=4,
    standin_jobs=(20, 128, 20),
    lone=4,
    sweep=((1, 8), (8, 24)),
    plain_sweep=((1, 4),),
    kernel_rounds=1,
    blocks=1,
)


@dataclass(frozen=True)
class Load:
    """What the callers of one figure do."""

    callers: int
    images: int  # in a job of ours; plain gets one in each
    delay_ms: int  # of the origin
    encoding: str = "base64"  # of our answers: what our client asks for; plain knows only floats


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
UNDER_LOAD = {*LOADS, "memory", "lone", "json"}  # what the two workers in production are for


@dataclass
class Bench:
    """One run: what it measures, and what it has found so far."""

    plan: Plan
    only: set[str]
    callers: Callers
    env: dict[str, str] = field(default_factory=dict)  # more of it, for both workers
    seen: Seen = field(default_factory=Seen)
    seen_pixels: Seen = field(default_factory=lambda: Seen(LEAST_COSINE_OF_PIXELS))
    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, list] = field(default_factory=dict)  # for the plots
    started: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Tell a waiting person how far it is."""
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def figure(self, name: str, note: str = "", by: str = "median") -> Figure:
        """Return a figure to add a round to."""
        return self.figures.setdefault(name, Figure(name, note=note, by=by))

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that were asked for."""
        return [name for name in names if name in self.only]

    async def ready(self, *started: Worker) -> None:
        """Wait until workers answer; one after the other, as each uses all cores to start."""
        for worker in started:
            await self.callers.first(worker, self.seen)

    # --- two workers in production --------------------------------------------

    async def production(self) -> None:
        """Measure what needs both workers under the production loop, side by side."""
        self.say("starting both workers under the production loop")
        with (
            workers.production(PLAIN, **self.env) as plain,
            workers.production(OURS, **self.env) as ours,
        ):
            await self.ready(plain, ours)
            loads = self.wanted(LOADS) or (["singles"] if "memory" in self.only else [])
            for number in range(self.plan.rounds if loads else 0):
                await self.round(number, loads, plain, ours)
            if "lone" in self.only:
                await self.lone(plain, ours)
            if "json" in self.only:
                await self.json(ours)
            if "singles" in self.only:
                await self.sweep(plain, ours)
            await self.callers.complete(plain, self.seen)
            await self.callers.complete(ours, self.seen)

    async def round(self, number: int, loads: list[str], plain: Worker, ours: Worker) -> None:
        """Measure one round of every load, one worker while the other idles.

        Jobs of one image and of many are the same to plain, which gets one image in each; its
        rate is the loop's. It is measured once for each delay of the origin.
        """
        others: dict[int, Run] = {}  # by delay
        plan, most = self.plan, [0, 0]  # memory of both, bytes
        for name in loads:
            load = LOADS[name]
            jobs = plan.single_jobs if load.images == 1 else plan.batch_jobs
            with PeakMemory(plain) as other_peak:
                if load.delay_ms not in others:
                    run = await self.drive(plain, self.seen, load, plan.plain_jobs)
                    others[load.delay_ms] = run
            with PeakMemory(ours) as peak:
                mine = await self.drive(ours, self.seen, load, jobs)
            other = others[load.delay_ms]
            most = [max(most[0], other_peak.peak), max(most[1], peak.peak)]
            note = f"a round: plain {plan.plain_jobs} jobs, ours {jobs} of {load.images}"
            self.figure(name, note).add(other.rate, mine.rate)
            self.say(f"round {number + 1}, {name}: plain {other.rate:.2f}, ours {mine.rate:.1f} /s")
            if name == "singles":
                self.keep_curve(PLAIN, load.callers, other)
                self.keep_curve(OURS, load.callers, mine)
        if "memory" in self.only:
            note = "the worker and what its heartbeat adds, sampled every 0.2 s under load"
            self.figure("memory", note, by="max").add(*[peak / 1e6 for peak in most])

    async def drive(self, worker: Worker, seen: Seen, load: Load, jobs: int) -> Run:
        """Run a load once the machine is quiet again; plain gets one image in each job."""
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

    async def lone(self, plain: Worker, ours: Worker) -> None:
        """Send single requests to workers that idle, to one and the other in turn.

        The SDK's loop looks for new jobs ten times a second, and rests for a second after it had
        as many as it wants: the pauses are longer than that, and not in step with it.
        """
        figure, pause = self.figure("lone", f"{self.plan.lone} requests each"), random.Random(0)
        for _ in range(self.plan.lone):
            took = []
            for worker in (plain, ours):
                await asyncio.sleep(pause.uniform(0.7, 0.9))
                run = await self.callers.drive(worker, self.seen, jobs=1, callers=1)
                took.append(run.latencies_s[0])
            figure.add(*took)
        for kind, found in ((PLAIN, figure.other), (OURS, figure.ours)):
            self.curves[f"{kind}-lone"] = list(found)
        middles = [figure.middle(found) for found in (figure.other, figure.ours)]
        self.say("lone: plain {:.3f}, ours {:.3f} s".format(*middles))

    async def json(self, ours: Worker) -> None:
        """Count the bytes of 32 vectors in both encodings, in answers as they are sent."""
        urls = [f"{self.callers.origin}/0/{name}" for name in (self.callers.names * 2)[:32]]
        sizes = []
        for encoding in ("float", "base64"):
            body = await self.callers.post(ours, signed(urls, encoding, encoding))
            sizes.append(float(len(json.dumps(output_of(body)))))
        self.figure("json", "a job of 32 images, the whole answer").add(*sizes)

    async def sweep(self, plain: Worker, ours: Worker) -> None:
        """Measure fewer callers than 64, for the plots alone."""
        self.say("fewer callers, for the plots")
        for worker, points in ((plain, self.plan.plain_sweep), (ours, self.plan.sweep)):
            for callers, jobs in points:
                run = await self.drive(worker, self.seen, Load(callers, 1, 0), jobs)
                self.keep_curve(worker.kind, callers, run)

    # --- the rest --------------------------------------------------------------

    async def standin(self) -> None:
        """Measure both workers with a sleep of 3 ms for a model, on the SDK's local server."""
        names, plan = self.wanted(STANDIN_LOADS), self.plan
        self.say("starting both workers with the fast-accelerator stand-in")
        with (
            workers.local(PLAIN, *STANDIN[PLAIN]) as plain,
            workers.local(OURS, *STANDIN[OURS]) as ours,
        ):
            for worker in (plain, ours):
                await self.callers.first(worker, self.seen_pixels)
            for number in range(plan.rounds):
                for name in names:
                    load = STANDIN_LOADS[name]
                    jobs = plan.standin_jobs[2 if load.delay_ms else 0], plan.standin_jobs[1]
                    other, mine = [
                        await self.drive(worker, self.seen_pixels, load, count)
                        for worker, count in zip((plain, ours), jobs, strict=True)
                    ]
                    note = "the model is a sleep of 3 ms a batch; a round: plain {}, ours {} images"
                    self.figure(name, note.format(*jobs)).add(other.rate, mine.rate)
                    rates = f"plain {other.rate:.1f}, ours {mine.rate:.1f} /s"
                    self.say(f"round {number + 1}, {name}: {rates}")
            for worker in (plain, ours):
                await self.callers.complete(worker, self.seen_pixels)

    async def start(self) -> None:
        """Measure from the start of a process, under the production loop, to its first answer."""
        note = "under the production loop; artifact on disk, files in the page cache"
        figure, warm = self.figure("start", note), -1  # one round that only fills the page cache
        for number in range(warm, self.plan.rounds):
            took = []
            for kind in (PLAIN, OURS):
                with workers.production(kind, **self.env) as worker:
                    took.append(await self.callers.first(worker, self.seen))
            if number != warm:
                figure.add(*took)
                self.say(f"round {number + 1}, start: plain {took[0]:.2f}, ours {took[1]:.2f} s")

    async def kernels(self) -> None:
        """Measure encoding and preprocessing, each in a process of its own."""
        for name in self.wanted(["encode", "preprocess-1080p", "preprocess-12mp"]):
            self.say(name)
            found = await kernel(name, rounds=self.plan.kernel_rounds)
            unit = 1e9 if name == "encode" else 1
            figure = self.figure(name, found["note"])
            for pair in zip(found["other"], found["ours"], strict=True):
                figure.add(*(value / unit for value in pair))

    async def all(self) -> None:
        """Measure what was asked for."""
        if self.wanted(UNDER_LOAD):
            await self.production()
        if self.wanted(STANDIN_LOADS):
            await self.standin()
        if "start" in self.only:
            await self.start()
        await self.kernels()

    def results(self) -> dict:
        """Return everything found; raise BenchmarkFailed when the workers do not agree."""
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
            "curves": self.curves,
        }


async def kernel(name: str, rounds: int) -> dict:
    """Return what `benchmarks.kernels` prints; raise BenchmarkFailed."""
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
    """Yield a run that has its photographs, their server and its callers."""
    names = [path.name for path in photos.pool(plan.blocks)]
    # The SDK's local server hangs up after 5 s of silence: no request may meet that moment.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    with Origin() as origin:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            yield Bench(plan, {*only}, Callers(session, origin.url, names), env)


async def measure(plan: Plan, only: Iterable[str]) -> Bench:
    """Run the benchmark and return what it found."""
    async with prepared(plan, only) as bench:
        await bench.all()
    return bench


def report(bench: Bench, results: dict) -> str:
    """Return what is printed at the end."""
    about = results["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}; {results['date']}, "
        f"{results['seconds']} s",
        "",
        table([bench.figures[name] for name in GOALS if name in bench.figures]),
        "",
    ]
    for name, found in results["compared"].items():
        lines.append(
            f"{name.replace('_', ' ')} compared: {found['vectors'][OURS]} of ours on "
            f"{found['photographs']} photographs; least cosine to plain's "
            f"{found['least_cosine_to_plain'][OURS]:.6f}"
        )
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=...", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it all work?")
    parser.add_argument(
        "--only", action="append", choices=sorted(GOALS), metavar="NAME",
        help=f"measure this figure only; may be given again: {', '.join(GOALS)}",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="measure an accelerator instead")
    parser.add_argument("--device", default="cuda", help="for --gpu: cuda, or cpu to try it out")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results"
    )
    return parser.parse_args(given)


def main() -> None:
    """Measure, print the table, write the results and draw the plots; end with 1 on failure."""
    given = arguments()
    if given.gpu:
        from benchmarks import gpu

        gpu.main(given.device, given.quick, given.out)
        return
    try:
        bench = asyncio.run(measure(QUICK if given.quick else Plan(), given.only or GOALS))
        results = bench.results()
    except BenchmarkFailed as failure:
        raise SystemExit(f"\nTHE BENCHMARK FAILED, there are no figures: {failure}") from None
    print(report(bench, results))
    if given.only or given.quick:
        print("Nothing was written: that takes the whole benchmark.")
        return
    from benchmarks import plots

    path = given.out / f"{file_stem(results['machine'])}.json"
    write(path, results)
    for picture in plots.draw(results, path):
        print(f"wrote {picture}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
