"""Fill a pgvector table of 20,000 rows by two backfills, killed ten times with SIGKILL at random.

    python tests/backfill_20000.py [--rows 20000] [--kills 10] [--seed N] [--leak]

Every row must end with the right result, exactly once. Memory must not grow with the table. Two
undisturbed runs over all rows measure this:

- The first is as usual. Its peak memory, as the kernel sees it, may be at most PEAK times that
  over the first half of its time. A peak over a tenth of the rows is no base: the more jobs there
  are, the more often four of them happen to need the most at the same moment, and the allocator
  keeps the holes that they leave.
- In the second, no job is sent at STOPS moments until none is in flight. The number of Python's
  memory blocks, and the bytes that malloc has given out, are counted then. In the last three
  quarters, neither may change by more than MOST_BLOCKS and MOST_BYTES a row. A list of one object
  of each row is one block a row. `--leak` plants such a list, and the run must fail.

Takes minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import backfill_rig
from backfill_rig import Rig, output_of, rig, run_with_kills

WORDS = ("--batch", 32, "--in-flight", 4, "--json")
STOPS = 16
MOST_BLOCKS = 0.25  # a row; -0.002 were measured
MOST_BYTES = 32  # a row, of C code and of objects over 512 bytes; 8 were measured
PEAK = 1.1  # 6 MiB in the second half of 20,000 rows, or 600 bytes a row
# Runs before the command in its process. At each stop no job is sent until all have ended.
INSIDE = """
import ctypes, gc, json, sys
from heimdex_clip_worker.backfill import run

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

c = ctypes.CDLL(None)
c.mallinfo2.restype = Heap
send, write, kept = run.Run._send, run.Run._write, []
rows, next_stop = 0, STEP

def measured_send(self, pool):
    global next_stop
    if rows < next_stop or self._has_claimed_all:
        return send(self, pool)
    if not self._in_flight:
        next_stop += STEP
        for _ in range(3):
            gc.collect()
        heap = c.mallinfo2()
        sample = {"rows": rows, "blocks": sys.getallocatedblocks()}
        sample["bytes"] = heap.uordblks + heap.hblkhd
        print("MEMORY", json.dumps(sample), file=sys.stderr, flush=True)
        send(self, pool)

def counted_write(self, results):
    global rows
    rows += len(results)
    if LEAK:
        kept.extend(object() for _ in results)
    write(self, results)

run.Run._send, run.Run._write = measured_send, counted_write
"""


def command(rows: int, leak: bool) -> str:
    """Make the source of a process that measures its memory while it runs the command."""
    return f"STEP, LEAK = {rows // (STOPS + 1)}, {leak}\n{INSIDE}{backfill_rig.COMMAND}"


def slope(samples: list[dict[str, int]], name: str) -> float:
    """Fit a line through the samples behind the warm-up; return its slope, per row."""
    later = samples[len(samples) // 4 :]
    x, y = [one["rows"] for one in later], [one[name] for one in later]
    above = sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean(x)) ** 2 for a in x)


def peaks_mib(process: subprocess.Popen[str], timeout_s: float) -> tuple[float, float]:
    """Wait for a process; return its peak memory in MiB, over half of its time and over all."""
    peaks, deadline = [], time.monotonic() + timeout_s
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not done after {timeout_s} s\n{output_of(process)[-3000:]}")
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        peaks += [int(line.split()[1]) / 1024 for line in lines]
        time.sleep(0.1)
    assert process.returncode == 3, output_of(process)[-3000:]
    return peaks[len(peaks) // 2], peaks[-1]


def measure(
    world: Rig, rows: int, *, is_measured: bool = False, leak: bool = False
) -> tuple[tuple[float, float], dict, list[dict[str, int]]]:
    """Run undisturbed over `rows` rows; return the peaks of memory, the summary, the samples."""
    world.fill("quiet", rows)
    source = command(rows, leak) if is_measured else backfill_rig.COMMAND
    process = world.start_on_table("quiet", *WORDS, command=source)
    peaks = peaks_mib(process, 900)
    assert world.mistakes("quiet", rows) == []
    lines = output_of(process).splitlines()
    samples = [json.loads(one.removeprefix("MEMORY ")) for one in lines if one[:7] == "MEMORY "]
    return peaks, json.loads(lines[-1]), samples


def fill_with_kills(world: Rig, rows: int, kills: int, seed: int) -> dict:
    """Fill a table by two processes under kills."""
    world.fill("scenes", rows)
    began = time.monotonic()
    outcome = run_with_kills(
        lambda: world.start_on_table("scenes", *WORDS), 2, kills, seed, (1.0, rows / 2500)
    )
    outcome["seconds"] = time.monotonic() - began
    outcome["mistakes"] = world.mistakes("scenes", rows)
    return outcome


def check_memory(world: Rig, rows: int, *, leak: bool) -> bool:
    """Measure the memory of undisturbed runs, and print it; return whether it stays the same."""
    (half, whole), summary, _ = measure(world, rows)
    print(f"one process: {summary['images_per_second']} images/s; peak memory {half:.1f} MiB over "
          f"the first half, {whole:.1f} MiB over {rows:,} rows ({(whole / half - 1) * 100:+.1f} %, "
          f"most {(PEAK - 1) * 100:+.0f} %)", flush=True)  # fmt: skip
    _, _, samples = measure(world, rows, is_measured=True, leak=leak)
    print(f"{'rows':>8} {'blocks':>9} {'bytes in C':>12}")
    for one in samples:
        print(f"{one['rows']:>8,} {one['blocks']:>9,} {one['bytes']:>12,}")
    blocks, more = slope(samples, "blocks"), slope(samples, "bytes")
    print(f"a row more: {blocks:+.3f} blocks (most {MOST_BLOCKS}), "
          f"{more:+.1f} bytes in C (most {MOST_BYTES})")  # fmt: skip
    return abs(blocks) < MOST_BLOCKS and abs(more) < MOST_BYTES and whole < PEAK * half


def main() -> int:
    """Run everything; return 0 if every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--leak", action="store_true", help="keep one object of each row")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as home, rig(Path(home)) as world:
        outcome = fill_with_kills(world, args.rows, args.kills, args.seed)
        print(f"two processes, {outcome['killed']} kills: {args.rows:,} rows in "
              f"{outcome['seconds']:.0f} s, {len(outcome['mistakes'])} mistakes, "
              f"exit statuses {outcome['statuses']}", flush=True)  # fmt: skip
        print("\n".join(outcome["mistakes"][:20]), end="")
        is_same = check_memory(world, args.rows, leak=args.leak)
    kept = not outcome["mistakes"] and outcome["killed"] == args.kills and is_same
    return 0 if kept and set(outcome["statuses"]) <= {0, 3} else 1


if __name__ == "__main__":
    sys.exit(main())
