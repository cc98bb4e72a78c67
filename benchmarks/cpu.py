"""CPU time of a worker by thread, read from outside: `/proc/PID/task`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# By the beginning of a thread's name. The main thread runs the loop that answers jobs. Threads that
# a library starts have the name of the thread that started them: OpenMP's are the model's.
PARTS = {
    "main": "the loop that answers jobs",
    "fetch": "fetching",
    "decode": "decoding and preprocessing",
    "model": "the model",
    "other": "all other threads",
}
LOOPS = ("main", "fetch")  # of each a worker has one, however many cores there are

Times = dict[int, tuple[str, float]]  # thread -> its part, and its seconds so far


def part_of(name: str, is_main: bool) -> str:
    """Tell which part of the worker a thread belongs to."""
    if is_main:
        return "main"
    return next((part for part in ("fetch", "decode", "model") if name.startswith(part)), "other")


def seconds_of(task: Path) -> float:
    """Read the CPU time of a thread: in nanoseconds, or in ticks if there are no others."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def times(pid: int) -> Times:
    """Read the CPU time of each thread of a process."""
    found: Times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            found[int(task.name)] = part_of(name, int(task.name) == pid), seconds_of(task)
        except OSError:  # the thread has ended
            continue
    return found


def spent(before: Times, after: Times) -> dict[str, float]:  # seconds, by part
    """Compute what each part has spent between two readings."""
    parts = dict.fromkeys(PARTS, 0.0)
    for thread, (part, seconds) in after.items():
        parts[part] += seconds - before.get(thread, (part, 0.0))[1]
    return parts


def busiest_loop(parts: Mapping[str, float]) -> float:
    """Return the time of the busier of the two loops."""
    return max(parts[part] for part in LOOPS)
