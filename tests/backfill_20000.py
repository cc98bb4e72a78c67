"""Fill a pgvector table of 20,000 rows by two backfills, killed -9 ten times at random moments.

    python tests/backfill_20000.py [--rows 20000] [--kills 10] [--seed N]

Every row must end right and exactly once, and memory must not grow with the table: the peak of an
undisturbed run over all rows is held against that of one over a tenth of them. Takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from backfill_rig import Rig, rig, said, with_kills

WORDS = ("--batch", 32, "--in-flight", 4, "--json")


def peak_mib(process: subprocess.Popen[str], timeout_s: float) -> float:
    """Wait for a process; return the most memory it has had, as the kernel saw it."""
    peak, deadline = 0, time.monotonic() + timeout_s
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not done after {timeout_s} s\n{said(process)[-3000:]}")
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.1)
    assert process.returncode == 3, said(process)[-3000:]
    return peak / 1024


def measure(world: Rig, rows: int) -> tuple[float, dict]:
    """Return peak memory in MiB and the summary of an undisturbed run over `rows` rows."""
    world.fill("quiet", rows)
    process = world.on_table("quiet", *WORDS)
    peak = peak_mib(process, 900)
    assert world.mistakes("quiet", rows) == []
    return peak, json.loads(said(process).splitlines()[-1])


def kill(world: Rig, rows: int, kills: int, seed: int) -> dict:
    """Fill a table by two processes under kills; return how it went."""
    world.fill("scenes", rows)
    began = time.monotonic()
    outcome = with_kills(
        lambda: world.on_table("scenes", *WORDS), 2, kills, seed, (1.0, rows / 2500)
    )
    outcome["seconds"] = time.monotonic() - began
    outcome["mistakes"] = world.mistakes("scenes", rows)
    return outcome


def main() -> int:
    """Run it all; return 0 when every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as home, rig(Path(home)) as world:
        outcome = kill(world, args.rows, args.kills, args.seed)
        print(f"two processes, {outcome['killed']} kills: {args.rows:,} rows in "
              f"{outcome['seconds']:.0f} s, {len(outcome['mistakes'])} mistakes, "
              f"exit statuses {outcome['statuses']}", flush=True)  # fmt: skip
        print("\n".join(outcome["mistakes"][:20]), end="")
        small, _ = measure(world, args.rows // 10)
        large, summary = measure(world, args.rows)
    print(f"one process: {summary['images_per_second']} images/s; peak memory {small:.1f} MiB at "
          f"{args.rows // 10:,} rows, {large:.1f} MiB at {args.rows:,} "
          f"({(large / small - 1) * 100:+.1f} %)")  # fmt: skip
    held = not outcome["mistakes"] and outcome["killed"] == args.kills and large < 1.2 * small
    return 0 if held and set(outcome["statuses"]) <= {0, 3} else 1


if __name__ == "__main__":
    sys.exit(main())
