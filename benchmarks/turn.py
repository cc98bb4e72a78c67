"""Compare the workers of two checkouts in turn: `python -m benchmarks.turn OTHER [THIS]`.

Both run at the same time, with the same photographs, and are measured in turn, in another order in
each round. So what the machine does besides is the same for both, and the ratio of a round is worth
more than two rates. All vectors are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import aiohttp

from benchmarks import ROOT, photos, workers
from benchmarks.delay_proxy import DelayProxy
from benchmarks.figures import MIX, THUMBNAILS, aligned, number
from benchmarks.image_server import ImageServer
from benchmarks.load import LEAST_COSINE, BenchmarkFailed, Callers, Seen
from benchmarks.network import Sample, cpu_table, sample, summary
from benchmarks.workers import AUTHORITY, BASELINE, OBSERVED, OBSERVED_STANDIN, OURS, Worker

POOLS = {MIX: photos.pool, THUMBNAILS: photos.thumbnails}


@dataclass
class Side:
    """A checkout, its running worker, and what was measured of it."""

    name: str  # "first" or "second"
    checkout: Path
    worker: Worker
    callers: Callers
    seen: Seen = field(default_factory=lambda: Seen(LEAST_COSINE))
    samples: list[Sample] = field(default_factory=list)


def compare(first: Seen, second: Seen) -> dict:
    """Compare all vectors of the second worker with those of the first; raise BenchmarkFailed."""
    both = Seen(first.least)
    both.vectors[BASELINE], both.vectors[OURS] = first.vectors[OURS], second.vectors[OURS]
    return both.compare()


def rounds_table(first: list[float], second: list[float]) -> str:
    """Write the rates by round, and the median of the ratios."""
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    lines = [["round", "first, images/s", "second, images/s", "second / first"]]
    for turn, row in enumerate(zip(first, second, ratios, strict=True), 1):
        lines.append([str(turn), number(row[0]), number(row[1]), f"{row[2]:.3f}"])
    middle = [number(median(first)), number(median(second)), f"{median(ratios):.3f}"]
    return aligned([*lines, ["median", *middle]])


@contextlib.contextmanager
def started(
    checkout: Path,
    args: argparse.Namespace,
    server: ImageServer,
    more: Sequence[str],  # NAME=VALUE, besides those of `args`
) -> Iterator[Worker]:
    """Run a checkout's worker: the real one, or the stand-in of that checkout."""
    start, command = workers.production, OBSERVED[OURS]
    if args.standin:
        start, command = workers.local, OBSERVED_STANDIN[OURS]
    env = dict(pair.split("=", 1) for pair in (*args.env, *more))
    env |= {"PYTHONPATH": str(checkout), AUTHORITY[OURS]: str(server.authority)}
    with start(OURS, *command, **env) as worker:
        yield worker


async def turn(side: Side, args: argparse.Namespace, server: ImageServer) -> None:
    """Measure one side; each caller's first job is not counted, as it may open connections."""
    how = {"seen": side.seen, "callers": args.callers, "images": args.images}
    await side.callers.drive(side.worker, jobs=args.callers, **how)
    one = await sample(side.callers, side.worker, server, args.photos, jobs=args.jobs, **how)
    side.samples.append(replace(one, kind=side.name))


async def measure(args: argparse.Namespace) -> list[Side]:
    """Run both workers and measure them in turn."""
    names = [path.name for path in POOLS[args.photos]()]
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(ImageServer())
        host = server.url if args.http else server.secure_url
        if args.round_trip:
            proxy = DelayProxy(server.secure_port, args.round_trip)
            host = stack.enter_context(proxy).secure_url
        session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        await stack.enter_async_context(session)
        sides = []
        for name, checkout, more in (
            ("first", args.other, ()), ("second", args.this, args.this_env),
        ):  # fmt: skip
            worker = stack.enter_context(started(checkout, args, server, more))
            sides.append(Side(name, checkout, worker, Callers(session, host, names)))
            await sides[-1].callers.first(worker, sides[-1].seen)
        for done in range(args.rounds):
            for side in sides if done % 2 == 0 else sides[::-1]:
                await turn(side, args, server)
            rates = [number(side.samples[-1].images_per_s) for side in sides]
            print(f"round {done + 1}: {rates[0]} and {rates[1]} images/s", flush=True)
    return sides


def report(sides: list[Side]) -> str:
    """Write rates by round, and CPU time by thread."""
    first, second = ([one.images_per_s for one in side.samples] for side in sides)
    compared = compare(*(side.seen for side in sides))
    cosine = compared["least_cosine_to_baseline"][OURS]
    return "\n".join([
        *(f"{side.name}: {side.checkout}" for side in sides), "",
        rounds_table(first, second), "", "CPU time by thread, in ms per image", "",
        cpu_table(summary([one for side in sides for one in side.samples])), "",
        f"{compared['vectors'][OURS]} vectors compared; least cosine {cosine:.6f}",
    ])  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.turn", description=__doc__.partition("\n")[0]
    )
    checkout = {"type": lambda text: Path(text).resolve()}
    parser.add_argument("other", **checkout, help="a checkout, for example a git worktree")
    parser.add_argument("this", **checkout, nargs="?", default=ROOT, help="default: this checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=8, help="in a round, to each worker")
    parser.add_argument("--images", type=int, default=32, help="in a job")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--photos", choices=POOLS, default=MIX)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--http", action="store_true", help="fetch over HTTP")
    where.add_argument("--round-trip", type=int, default=0, metavar="MS", help="to the images")
    parser.add_argument(
        "--standin", action="store_true", help="a sleep as the model, under the local server"
    )
    variable = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--env", **variable, help="a variable of both workers")
    parser.add_argument("--this-env", **variable, help="a variable of the second worker alone")
    args = parser.parse_args(argv)
    for path in (args.other, args.this):
        if not (path / "heimdex_clip_worker").is_dir():
            parser.error(f"{path} is no checkout")
    return args


def main() -> None:
    """Measure and print; exit with 1 on failure."""
    try:
        print(f"\n{report(asyncio.run(measure(arguments())))}")
    except BenchmarkFailed as failure:
        raise SystemExit(f"\nTHE COMPARISON FAILED, there are no figures: {failure}") from None


if __name__ == "__main__":
    main()
