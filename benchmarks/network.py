"""Measure over HTTPS, near and 20 ms away: rates, connections, and CPU time by thread."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import cpu, photos, workers
from benchmarks.delay_proxy import DelayProxy
from benchmarks.figures import MIX, THUMBNAILS, aligned, number
from benchmarks.image_server import ImageServer
from benchmarks.load import Callers
from benchmarks.workers import AUTHORITY, BASELINE, GOOD, OBSERVED, OBSERVED_STANDIN, OURS, Worker

if TYPE_CHECKING:
    from benchmarks.bench import Bench

ROUND_TRIP_MS = 20
WARM_UP_IMAGES = 16  # at most, in a job: 4 callers have more images in flight then than one batch


@dataclass(frozen=True)
class Load:
    """A load over HTTPS."""

    photos: str  # MIX or THUMBNAILS
    images: int  # in a job of ours; the other workers get one in each
    callers: int
    is_far: bool = False  # True: a round trip takes 20 ms


LOADS = {
    "https-mix": Load(MIX, 32, 4),
    "https-thumbs": Load(THUMBNAILS, 32, 4),
    "https-mix-20ms": Load(MIX, 32, 4, is_far=True),
    "https-thumbs-20ms": Load(THUMBNAILS, 32, 4, is_far=True),
    "https-singles": Load(MIX, 1, 64),
    "https-singles-thumbs": Load(THUMBNAILS, 1, 64),
}
# Figures besides the rates, and the load in which each is measured.
ALSO = {
    "https-connections": "https-mix",
    "https-answering": "https-mix",
    "https-fetching": "https-mix",
    "https-ceiling": "https-mix",
    "https-ceiling-thumbs": "https-thumbs",
    "good-singles": "https-singles",
    "good-thumbs": "https-singles-thumbs",
}
AGAINST_GOOD = {load: name for name, load in ALSO.items() if name.startswith("good-")}
FIGURES = {*LOADS, *ALSO, "https-lone"} - {"https-singles-thumbs"}


@dataclass
class Sample:
    """One run of a load: the rate, and what an image has cost."""

    load: str
    kind: str  # BASELINE, OURS or GOOD
    images_per_s: float
    connections: float  # accepted by the image server, per image
    cpu_ms: dict[str, float]  # per image, by part: cpu.PARTS
    children: int = 0  # processes that fetch and decode; 0: threads of the worker do it

    @property
    def ceiling(self) -> float:  # images/s
        """Compute how many images the busiest loop of which there is one can serve in a second."""
        return 1000 / cpu.busiest_loop(self.cpu_ms, self.children)


async def connections(callers: Callers, server: ImageServer) -> int:
    """Ask the image server how many connections it has accepted for the callers' scheme."""
    async with callers.session.get(f"{server.url}/counts") as response:
        counts = await response.json()
    return counts["connections"][callers.server.partition(":")[0]]


async def sample(
    callers: Callers,  # of this worker and these photographs
    worker: Worker,
    server: ImageServer,
    load: str,
    /,
    **drive: Any,  # as for `Callers.drive`
) -> Sample:
    """Drive a worker, and measure what an image costs."""
    await asyncio.sleep(0.3)  # the machine becomes quiet
    pid = worker.process.process.pid
    accepted, before = await connections(callers, server), cpu.times(pid)
    run = await callers.drive(worker, **drive)
    parts = cpu.spent(before, cpu.times(pid))
    made = await connections(callers, server) - accepted
    each_ms = {part: 1000 * seconds / run.images for part, seconds in parts.items()}
    return Sample(load, worker.kind, run.rate, made / run.images, each_ms, cpu.children(pid))


def summary(samples: Sequence[Sample]) -> list[dict]:
    """Reduce the runs of each load and worker to their medians."""
    runs: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for one in samples:
        runs[one.load, one.kind].append(one)
    return [
        {
            "load": load,
            "worker": kind,
            "images_per_s": median(run.images_per_s for run in same),
            "connections": median(run.connections for run in same),
            "cpu_ms": {part: median(run.cpu_ms[part] for run in same) for part in cpu.PARTS},
            "rounds": [asdict(run) for run in same],
        }
        for (load, kind), same in runs.items()
    ]


def cpu_table(rows: Sequence[Mapping]) -> str:
    """Write the summary as a table."""
    head = ["load", "worker", "images/s", "connections per image", *cpu.PARTS, "all, ms per image"]
    lines = [head]
    for row in rows:
        parts = row["cpu_ms"]
        lines.append([
            row["load"], row["worker"], number(row["images_per_s"]), f"{row['connections']:.2f}",
            *(f"{parts[part]:.2f}" for part in cpu.PARTS), f"{sum(parts.values()):.2f}",
        ])  # fmt: skip
    return aligned(lines)


class Network:
    """The workers that fetch over HTTPS, and the figures of one run."""

    def __init__(self, bench: Bench, proxy: DelayProxy):
        self.bench, self.plan, self.server = bench, bench.plan, bench.server
        self.hosts = {False: bench.server.secure_url, True: proxy.secure_url}
        self.names = {MIX: bench.callers.names, THUMBNAILS: [p.name for p in photos.thumbnails()]}
        self._callers: dict[tuple, Callers] = {}
        also = {load for name, load in ALSO.items() if name in bench.only}
        self.loads = [name for name in LOADS if name in bench.only | also]

    def callers(self, worker: Worker, photos: str, is_far: bool) -> Callers:
        """Get the callers of a worker, which go on through its photographs."""
        key = worker.kind, photos, is_far
        if key not in self._callers:
            names = self.names[photos]
            self._callers[key] = Callers(self.bench.callers.session, self.hosts[is_far], names)
        return self._callers[key]

    @contextlib.contextmanager
    def started(
        self, start: Callable[..., Any], commands: Mapping[str, tuple[str, ...]], *kinds: str
    ) -> Iterator[list[Worker]]:
        """Run workers that trust the image server's certificate."""
        with contextlib.ExitStack() as stack:
            started = []
            for kind in kinds:
                trust = {AUTHORITY[kind]: str(self.server.authority)}
                made = start(kind, *commands[kind], **trust, **self.bench.env)
                started.append(stack.enter_context(made))
            yield started

    # --- under the production loop ---------------------------------------------

    async def production(self) -> None:
        """Measure the workers side by side under the production loop, in turn."""
        kinds = [BASELINE, OURS]
        if self.bench.wanted(AGAINST_GOOD.values()):
            kinds.append(GOOD)
        self.bench.say(f"starting {len(kinds)} workers that fetch over HTTPS")
        with self.started(workers.production, OBSERVED, *kinds) as running:
            await self.bench.ready(*running)
            by_kind = {worker.kind: worker for worker in running}
            for _ in range(self.plan.network_rounds):
                await self.round(by_kind)

    async def round(self, by_kind: Mapping[str, Worker]) -> None:
        """Measure every load once; the baseline's rate is the loop's, so once for each distance."""
        for is_far in (False, True):
            names = [name for name in self.loads if LOADS[name].is_far == is_far]
            if not names:
                continue
            other = await self.sample(by_kind[BASELINE], names[0], self.plan.https_baseline_jobs)
            warm_for = None
            for name in names:
                jobs = self.plan.https_singles if LOADS[name].images == 1 else self.plan.https_jobs
                if warm_for != LOADS[name].callers:
                    await self.warm_up(by_kind[OURS], name)
                    warm_for = LOADS[name].callers
                ours = await self.sample(by_kind[OURS], name, jobs)
                self.add(name, other, ours)
                if name in AGAINST_GOOD and GOOD in by_kind:
                    await self.warm_up(by_kind[GOOD], name)
                    good = await self.sample(by_kind[GOOD], name, jobs)
                    self.figure(AGAINST_GOOD[name], good.images_per_s, ours.images_per_s)

    async def warm_up(self, worker: Worker, name: str) -> None:
        """Send each caller's first job, uncounted.

        Connections that were kept are closed while the other workers are measured. In production
        work comes all the time, so the connections of the first images are not counted here.
        """
        load = LOADS[name]
        callers = self.callers(worker, load.photos, load.is_far)
        how = self.how(worker, load, jobs=load.callers)
        how["images"] = min(how["images"], WARM_UP_IMAGES)
        await callers.drive(worker, **how)

    def how(self, worker: Worker, load: Load, jobs: int) -> dict:
        """Make the arguments of `Callers.drive`."""
        images = load.images if worker.kind == OURS else 1
        return {"seen": self.bench.seen, "jobs": jobs, "callers": load.callers, "images": images}

    async def sample(self, worker: Worker, name: str, jobs: int) -> Sample:
        """Measure a worker under a load."""
        load = LOADS[name]
        callers, how = self.callers(worker, load.photos, load.is_far), self.how(worker, load, jobs)
        one = await sample(callers, worker, self.server, name, **how)
        self.bench.samples.append(one)
        cost = {part: round(ms, 2) for part, ms in one.cpu_ms.items()}
        self.bench.say(
            f"{name}, {worker.kind}: {one.images_per_s:.1f} /s, {one.connections:.2f} connections"
            f" and {cost} ms of CPU an image"
        )
        return one

    def figure(self, name: str, other: float | None, ours: float, note: str = "") -> None:
        """Add a round to a figure, if it is wanted."""
        if name in self.bench.only:
            self.bench.figure(name, note).add(other, ours)

    def add(self, name: str, other: Sample, ours: Sample) -> None:
        """Add a round to the figures that a load gives."""
        load, plan = LOADS[name], self.plan
        jobs = plan.https_singles if load.images == 1 else plan.https_jobs
        note = f"a round: baseline {plan.https_baseline_jobs} jobs, ours {jobs} of {load.images}"
        self.figure(name, other.images_per_s, ours.images_per_s, note)
        if name == "https-mix":
            self.figure("https-connections", other.connections, ours.connections)
            self.figure("https-answering", None, ours.cpu_ms["main"])
            self.figure("https-fetching", None, ours.cpu_ms["fetch"])
            self.figure("https-ceiling", None, ours.ceiling)
        if name == "https-thumbs":
            self.figure("https-ceiling-thumbs", None, ours.ceiling)

    # --- a lone request --------------------------------------------------------

    async def complete(self) -> None:
        """Ask the baseline for the photographs that it has not had.

        Under the production loop it would rest for a second after each.
        """
        self.bench.say("the baseline's vectors of the other photographs")
        with self.started(workers.local, OBSERVED, BASELINE) as running:
            await self.bench.ready(*running)
            await self.bench.callers.complete(*running, self.bench.seen)

    async def lone(self) -> None:
        """Send single requests to idle workers: to each in turn, near and far in turn.

        The SDK's production loop polls ten times a second: that would hide 20 ms. So would a model
        whose threads wait for a core. So the workers run under the local server, with the stand-in.
        """
        self.bench.say("starting the stand-ins, for lone requests over HTTPS")
        seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
        seen = self.bench.seen_pixels
        with self.started(workers.local, OBSERVED_STANDIN, BASELINE, OURS) as running:
            for worker in running:
                await self.bench.callers.first(worker, seen)
            for turn in range(-1, self.plan.https_lone):  # one that is not counted
                for worker in running:
                    for is_far in (False, True):
                        callers = self.callers(worker, THUMBNAILS, is_far)
                        run = await callers.drive(worker, seen, jobs=1, callers=1)
                        if turn >= 0:
                            seconds[worker.kind, is_far] += run.latencies_s
            await self.bench.callers.complete(running[0], seen)
        await self.round_trips(seconds)

    async def round_trips(self, seconds: Mapping[tuple[str, bool], list[float]]) -> None:
        """Compute how many round trips a request has taken."""
        trips = []
        for kind in (BASELINE, OURS):
            near, far = seconds[kind, False], seconds[kind, True]
            trips.append(1000 * (median(far) - median(near)) / ROUND_TRIP_MS)
            self.bench.curves |= {f"{kind}-lone-https": near, f"{kind}-lone-https-20ms": far}
        measured = await self.round_trip_ms()
        note = (
            f"p50 of {self.plan.https_lone} requests 20 ms away, less the p50 of as many without; "
            f"a round trip of the proxy took {measured:.1f} ms"
        )
        self.figure("https-lone", *trips, note)
        self.bench.say("lone, 20 ms away: baseline {:.2f}, ours {:.2f} round trips".format(*trips))

    async def round_trip_ms(self, count: int = 9) -> float:
        """Measure the proxy's round trip on a connection that is kept."""
        context = ssl.create_default_context(cafile=self.server.authority)
        middles = []
        for host in self.hosts.values():
            times = []
            for _ in range(count + 1):
                start = time.perf_counter()
                async with self.bench.callers.session.get(f"{host}/counts", ssl=context) as reply:
                    await reply.read()
                times.append(time.perf_counter() - start)
            middles.append(median(times[1:]))  # the first one connects
        return 1000 * (middles[1] - middles[0])


async def measure(bench: Bench) -> None:
    """Measure the chosen figures over HTTPS."""
    with DelayProxy(bench.server.secure_port, ROUND_TRIP_MS) as proxy:
        network = Network(bench, proxy)
        if network.loads:
            await network.production()
            await network.complete()
        if "https-lone" in bench.only:
            await network.lone()
