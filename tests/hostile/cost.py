"""What decoding one file costs, measured in a process of its own: `python cost.py FILE...`."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.errors import WorkerError

ROOT = Path(__file__).resolve().parents[2]
CPU_S, MEMORY_MIB = 2.0, 400.0  # the budget of one image


def measure(path: str) -> dict[str, object]:
    """Decode a file; return the code and what it took."""
    data = Path(path).read_bytes()
    before, size = resource.getrusage(resource.RUSAGE_SELF), None
    try:
        size = decode(data, PixelLimits()).size
        code = "OK"
    except WorkerError as error:
        code = error.code
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "code": code,
        "size": size,
        "bytes": len(data),
        "cpu_s": round(cpu, 3),
        "mib": round((after.ru_maxrss - before.ru_maxrss) / 1024, 1),  # Linux counts in KiB
    }


def cost(path: Path) -> dict[str, object]:
    """Return what decoding the file at `path` takes in a fresh process."""
    command = [sys.executable, __file__, str(path)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise AssertionError(f"decoding ended the process ({run.returncode}): {run.stderr[-500:]}")
    return json.loads(run.stdout)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(measure(name)))
