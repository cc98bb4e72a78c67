"""What decoding one file costs, measured in a process of its own: `python cost.py FILE...`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.errors import WorkerError

ROOT = Path(__file__).resolve().parents[2]
CPU_S, MEMORY_MIB = 2.0, 400.0  # the budget of one image


def memory(what: str) -> float:
    """Return VmRSS (now) or VmHWM (at most so far) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024


@dataclass
class Peak:
    """How much more memory than at its start this process held at most, in MiB."""

    mib: float = 0.0


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    """Measure the peak of memory; 0 where the system is not Linux."""
    found = Peak()
    if not Path("/proc/self/clear_refs").exists():
        yield found
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    held = memory("VmRSS")
    try:
        yield found
    finally:
        found.mib = round(memory("VmHWM") - held, 1)


def measure(data: bytes) -> dict[str, object]:
    """Decode a file; return the code and what it took."""
    size, before = None, resource.getrusage(resource.RUSAGE_SELF)
    with peak() as more:
        try:
            size = decode(data, PixelLimits()).size
            code = "OK"
        except WorkerError as error:
            code = error.code
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"code": code, "size": size, "cpu_s": round(cpu, 3), "mib": more.mib}


def cost(path: Path) -> dict[str, object]:
    """Return what decoding the file at `path` takes in a fresh process."""
    command = [sys.executable, __file__, str(path)]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if run.returncode:
        raise AssertionError(f"decoding ended the process ({run.returncode}): {run.stderr[-500:]}")
    return json.loads(run.stdout)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(measure(Path(name).read_bytes())))
