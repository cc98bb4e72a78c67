"""Measure the backfill on Ray with a stand-in for the model: `python tests/ray_scaling.py`.

Three figures, each taken in one run on this machine:

- images per second with 1, 2 and 4 actors, where each image takes 3 ms in a stand-in that sleeps,
  as an accelerator or an endpoint would;
- the processor time per image of all of Ray's processes, against that of a plain backfill of the
  same rows to a Parquet file, with a stand-in that takes no time;
- the peak memory of an actor for 2,000 and for 20,000 rows.

Nothing is counted before the first shard of a run is done: actors take seconds to start.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests are imported by name

from ray_rig import local_ray, write_table  # noqa: E402

from heimdex_clip_worker.backfill.files import FileSource  # noqa: E402
from heimdex_clip_worker.backfill.parquet import ParquetSink  # noqa: E402
from heimdex_clip_worker.backfill.rows import Selection  # noqa: E402
from heimdex_clip_worker.backfill.run import Options, Run  # noqa: E402
from heimdex_clip_worker.backfill.shards import Folder, Layout, plan  # noqa: E402
from heimdex_clip_worker.ray import Cluster, embed_shards  # noqa: E402

VECTOR = [512**-0.5] * 512


class StandIn:
    """Makes the same vector of every image, at once."""

    image_s = 0.0

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take the time of these images, and return their vectors."""
        time.sleep(self.image_s * len(items))
        facts = {"space_id": "5", "model": "m", "pretrained": "p", "normalized": True}
        return [{"embedding": VECTOR, **facts} for _ in items]


class SlowStandIn(StandIn):
    """Takes 3 ms for an image, without using a CPU."""

    image_s = 0.003


def write_rows(folder: Path, rows: int, file_rows: int) -> Path:
    """Write a folder of files with these rows."""
    folder.mkdir()
    for first in range(0, rows, file_rows):
        numbers = range(first, min(first + file_rows, rows))
        urls = [f"https://host/{number}.png" for number in numbers]
        write_table(folder / f"{first:07}.parquet", list(numbers), urls)
    return folder


def processes_of_ray() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def cpu_s() -> float:
    """Sum the processor time of this process and of all of Ray's."""
    total = sum(psutil.Process().cpu_times()[:2])
    for process in processes_of_ray():
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def actors() -> Iterator[psutil.Process]:
    """Yield the processes of the actors of a data set."""
    for process in processes_of_ray():
        with suppress(psutil.Error):
            if "ray::MapWorker" in " ".join(process.cmdline()):
                yield process


@contextmanager
def peak_of_actors() -> Iterator[list[int]]:
    """Sample the private memory of the actors; yield a list that holds the largest, in bytes."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            for process in actors():
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    peak[0] = max(peak[0], memory.rss - memory.shared)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def run_on_ray(
    source: Path, client: type[StandIn], count: int, shard_rows: int
) -> dict[str, float]:
    """Embed a folder with `count` actors; measure from the first shard's end to the last one's."""
    shards, layout = plan([str(source)], Layout(shard_rows=shard_rows))
    with tempfile.TemporaryDirectory() as out:
        Folder(out).settle(layout, shards)
        cluster = Cluster(actors=count, embedder={"client": client, "in_flight": 1, "batch": 50})
        began, cpu, rows = 0.0, 0.0, 0
        for entry in embed_shards([(shard, "new") for shard in shards], layout, out, cluster):
            if not began:
                began, cpu = time.monotonic(), cpu_s()
            else:
                rows += entry["rows"]
            last, used = time.monotonic(), cpu_s()
    return {"rate": rows / (last - began), "cpu_ms": 1e3 * (used - cpu) / rows}


def run_plain(source: Path) -> dict[str, float]:
    """Embed a folder in this process, to a Parquet file."""
    with tempfile.TemporaryDirectory() as out:
        sink = ParquetSink(Path(out) / "v.parquet", Selection())
        options = Options(in_flight=1, batch=50)
        began, cpu = time.monotonic(), time.process_time()
        run = Run(FileSource(source), sink, StandIn(), options)
        run.drive()
        sink.close(complete=True)
        seconds, used = time.monotonic() - began, time.process_time() - cpu
    return {"rate": run.meter.done / seconds, "cpu_ms": 1e3 * used / run.meter.done}


def main() -> None:
    """Take the three figures and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="of the first figure")
    parser.add_argument("--large", type=int, default=20_000, help="rows of the others")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    home = Path(tempfile.mkdtemp())
    small = write_rows(home / "small", args.rows, 500)
    large = write_rows(home / "large", args.large, 1000)
    tenth = write_rows(home / "tenth", args.large // 10, 1000)
    figures: dict[str, Any] = {}
    with local_ray(home):
        rates = {n: run_on_ray(small, SlowStandIn, n, 500)["rate"] for n in (1, 2, 4)}
        figures["images/s by actors"] = {n: round(rate) for n, rate in rates.items()}
        figures["of one actor"] = {n: round(rate / rates[1], 2) for n, rate in rates.items()}
        plain, engine = run_plain(large), run_on_ray(large, StandIn, 1, 1000)
        figures["CPU ms per image"] = {
            "plain": round(plain["cpu_ms"], 3), "ray": round(engine["cpu_ms"], 3),
            "ratio": round(engine["cpu_ms"] / plain["cpu_ms"], 2),
        }  # fmt: skip
        figures["images/s without a model"] = {
            "plain": round(plain["rate"]), "ray, one actor": round(engine["rate"]),
        }  # fmt: skip
        for name, folder in (("tenth", tenth), ("large", large)):
            with peak_of_actors() as peak:
                run_on_ray(folder, StandIn, 2, 1000)
            rows = args.large if name == "large" else args.large // 10
            figures[f"peak MiB of an actor, {rows:,} rows"] = round(peak[0] / 2**20)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
