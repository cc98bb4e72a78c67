"""CPU time of a worker and its child processes by thread, read from outside: `/proc/PID/task`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

# By the beginning of a thread's name. The worker's main thread runs the loop that answers jobs; the
# main thread of a child process handles messages, and counts as fetching. Threads that a library
# starts have the name of the thread that started them: OpenMP's are the model's. A process that is
# forked has that name, too: so the SDK's heartbeat, and the process from which child processes are
# forked, are "other".
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


def processes(pid: int) -> list[int]:
    """List a worker's process, and its child processes and theirs."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def times(pid: int) -> Times:
    """Read the CPU time of each thread of a worker and of its child processes."""
    found: Times = {}
    for task in [task for one in processes(pid) for task in Path(f"/proc/{one}/task").glob("*")]:
        try:
            name = (task / "comm").read_text().strip()
            found[int(task.name)] = part_of(name, int(task.name) == pid), seconds_of(task)
        except OSError:  # the thread has ended
            continue
    return found


def children(pid: int) -> int:
    """Count the child processes that fetch and decode images; 0 if threads of the worker do it."""
    found = 0
    for child in processes(pid)[1:]:
        with contextlib.suppress(OSError):  # it has ended
            name = Path(f"/proc/{child}/comm").read_text()
            found += part_of(name, is_main=False) == "fetch"
    return found


def spent(before: Times, after: Times) -> dict[str, float]:  # seconds, by part
    """Compute what each part has spent between two readings."""
    parts = dict.fromkeys(PARTS, 0.0)
    for thread, (part, seconds) in after.items():
        parts[part] += seconds - before.get(thread, (part, 0.0))[1]
    return parts


def busiest_loop(parts: Mapping[str, float], children: int = 0) -> float:
    """Return the time of the busiest loop of which a worker has only one.

    If there are child processes, each has a loop that fetches.
    """
    return max(parts[part] for part in (LOOPS[:1] if children else LOOPS))
