"""Measure what decoding a file costs, in a process of its own: `python cost.py FILE...`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heimdex_clip_worker.errors import WorkerError
from heimdex_clip_worker.serving.decode import NeedsMemory, PixelLimits, decode

ROOT = Path(__file__).resolve().parents[2]
CPU_S, MEMORY_MIB = 2.0, 400.0  # the budget of one image
INFLATED_S = 0.064  # for `inflate`, on the machine on which the budget was set


def memory(field: str) -> float:
    """Read VmRSS (now) or VmHWM (the peak so far) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024


@dataclass
class Peak:
    """The peak of memory over that at the start, in MiB."""

    mib: float = 0.0


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    """Measure the peak of memory within the block; 0 where the system is not Linux."""
    result = Peak()
    if not Path("/proc/self/clear_refs").exists():
        yield result
        return
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    try:
        yield result
    finally:
        result.mib = round(memory("VmHWM") - before, 1)


def inflate() -> float:  # CPU seconds, the least of three
    """Measure how quick this machine is at present: decompress 41 MB."""
    noise = random.Random(0).randbytes(800)
    packed = zlib.compress(b"".join(noise[i : i + 200] * 3 for i in range(0, 800, 7)) * 600)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        zlib.decompress(packed)
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(data: bytes) -> dict[str, object]:
    """Decode a file; return the code, the CPU seconds, the memory, and the estimate of it.

    On a machine that is slower than that of the budget, the seconds are those of the latter.
    """
    charged = 0.0
    with contextlib.suppress(WorkerError):
        try:
            decode(data, PixelLimits(), max_bytes=0)
        except NeedsMemory as large:
            charged = round(large.count / 2**20, 1)
    size, before = None, resource.getrusage(resource.RUSAGE_SELF)
    with peak() as growth:
        try:
            size = decode(data, PixelLimits()).size
            code = "OK"
        except WorkerError as error:
            code = error.code
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if cpu >= CPU_S:  # a shared machine may be half as quick for an hour
        cpu /= max(1.0, inflate() / INFLATED_S)
    took = {"cpu_s": round(cpu, 3), "mib": growth.mib, "charged": charged}
    return {"code": code, "size": size, **took}


def cost(
    path: Path,
    fresh: bool = False,  # the imports take 2.5 s; a fork has done nothing else before
) -> dict[str, object]:
    """Measure the decoding of the file at `path` in a process of its own."""
    from forks import Fork

    if fresh:
        command = [sys.executable, __file__, str(path)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        status, out, err = run.returncode, run.stdout, run.stderr
    else:
        process = Fork((__file__, str(path)), os.environ, ROOT)
        out, err = process.communicate(60)
        status = process.returncode
    if status:
        raise AssertionError(f"decoding ended the process ({status}): {err[-500:]}")
    return json.loads(out)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(measure(Path(name).read_bytes())))
