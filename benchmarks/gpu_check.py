"""Prove and measure everything on a GPU: `bash tools/gpu_check.sh OUT`, which starts this program.

Each part runs in a process of its own, with a time limit of its own. If one fails, its result has
the traceback, and the others go on. All results are in OUT as soon as they are known:
`<gpu>-<date>.json`, a page of Markdown, two pictures if matplotlib is there, and a log.
`--device cpu` tries everything out.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import gpu, gpu_report
from benchmarks.figures import file_stem, write
from benchmarks.gpu import Found, Skipped


@dataclass(frozen=True)
class Part:
    """One thing to prove or to measure."""

    title: str
    limit_s: int  # of TOTAL_S; with more or less time in all, the limit is longer or shorter
    run: Callable[[Found], None]


# In the order in which they run. One that others need is first, the longest is last.
PARTS = {
    "setup": Part("The machine, weights and photographs", 90, gpu.setup),
    "tests": Part("(a) The tests marked gpu", 90, gpu.tests),
    "vectors": Part("(b) Vectors against open_clip", 70, gpu.vectors),
    "encoding": Part("(c) Encoding by precision and batch", 70, gpu.encoding),
    "gpu-path": Part("(d) Each option of model.cuda", 70, gpu.gpu_path),
    "end-to-end": Part("(e) End to end, against the baseline worker", 170, gpu.end_to_end),
    "start": Part("(f) Start to first reply", 60, gpu.starts),
    "memory": Part("(g) Memory", 50, gpu.memory),
    "watchdog": Part("(h) A model that hangs", 100, gpu.watchdog),
    "out-of-memory": Part("(h) Out of memory", 60, gpu.out_of_memory),
    "cpu-time": Part("(i) CPU time by thread", 60, gpu.cpu_time),
    "options": Part("(d) Each option of a worker", 190, gpu.each_option),
}
TOTAL_S = 550  # a command may take 600 where this runs, and the installation takes some of them
LEAST_S = 10  # left for a part that is to be started


def run_in_child(part: Part, found: Found, limit_s: float, log: Path) -> None:
    """Run a part in this process, which was forked for it; write how it ended."""
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        print(f"\n=== {part.title}", file=file, flush=True)
        faulthandler.dump_traceback_later(max(1.0, limit_s - 2), file=file)
        try:
            part.run(found)
            found.save(status="failed" if found.problems else "done")
        except Skipped as why:
            found.save(status="skipped", reason=str(why))
        except BaseException:
            found.save(status="failed", error=traceback.format_exc())
            traceback.print_exc(file=file)
        sys.stdout.flush()
        faulthandler.cancel_dump_traceback_later()


def end(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a part and all processes that it has started; workers are in sessions of their own."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    process.kill()
    for child in tree:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.join(10)


def read(path: Path) -> dict[str, Any]:
    """Read what a part has kept so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_part(
    part: Part,
    device: str,
    is_short: bool,
    limit_s: float,
    log: Path,
    seen: Callable[[dict[str, Any]], None],  # called with the result when there is more of it
) -> dict[str, Any]:
    """Run a part in a process of its own; return its result, whatever becomes of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder) / "found.json"
        found = Found(path, device, is_short)
        # A fork has torch already; CUDA has not been touched here, so it works in the fork.
        process = multiprocessing.get_context("fork").Process(
            target=run_in_child, args=(part, found, limit_s, log)
        )
        process.start()
        known: dict[str, Any] = {}
        try:
            while process.is_alive() and time.perf_counter() - start < limit_s:
                process.join(0.2)
                if (now := read(path)) != known:
                    known = now
                    seen({"title": part.title, "status": "running", **known})
            timed_out = process.is_alive()
        finally:
            if process.is_alive():
                end(process)
        result = {"title": part.title, **read(path)}
    if timed_out:
        result |= {"status": "failed", "error": f"not finished after {limit_s:.0f} s; see the log"}
    elif "status" not in result:
        result |= {"status": "failed", "error": f"the process ended with {process.exitcode}"}
    return result | {"seconds": time.perf_counter() - start}


class Check:
    """One run: its results so far, on disk at all times."""

    def __init__(self, out: Path, device: str, is_short: bool):
        self.out, self.device, self.is_short = out, device, is_short
        self.started = time.perf_counter()
        self.results: dict[str, Any] = {
            "machine": {},
            "date": time.strftime("%Y-%m-%d"),
            "device": device,
            "form": "short" if is_short else "whole",
            "parts": {},
        }
        out.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def stem(self) -> str:
        """The name of the results, without its ending."""
        if self.device == "cpu" or not self.results["machine"]:
            return f"{'cpu' if self.device == 'cpu' else 'no-gpu'}-{self.results['date']}"
        return file_stem(self.results["machine"])

    @property
    def path(self) -> Path:
        """The file of the results."""
        return self.out / f"{self.stem}.json"

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of a part, and write all results and the page."""
        self.results["parts"][name] = result
        self.results["seconds"] = self.seconds
        if name == "setup" and not self.results["machine"]:
            self.results["machine"] = result.get("values", {}).get("machine", {})
        part = self.path.with_suffix(".part")
        write(part, self.results)
        part.replace(self.path)
        gpu_report.write_page(self.results, self.path)

    def run(self, names: Iterable[str], total_s: float) -> bool:
        """Run the parts one after the other; True if none has failed."""
        log = self.out / "check.log"
        log.write_text("", encoding="utf-8")
        for name in names:
            part, left = PARTS[name], total_s - self.seconds
            if left < LEAST_S:
                self.keep(name, {"title": part.title, "status": "skipped", "reason": "no time left",
                                 "seconds": 0.0})  # fmt: skip
                continue
            print(f"[{self.seconds:4.0f} s] {part.title} ... ", end="", flush=True)
            limit_s = min(part.limit_s * total_s / TOTAL_S, left)
            result = run_part(part, self.device, self.is_short, limit_s, log,
                              lambda partial, name=name: self.keep(name, partial))  # fmt: skip
            self.keep(name, result)
            print(f"{result['status']}, {result['seconds']:.0f} s", flush=True)
            for line in gpu_report.why(result):
                print(f"         {line}")
        return all(part["status"] != "failed" for part in self.results["parts"].values())


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bash tools/gpu_check.sh", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder of the results; with --report their file")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try it out")
    parser.add_argument("--short", action="store_true", help="as little as possible of everything")
    parser.add_argument(
        "--only", action="append", choices=[*PARTS], metavar="PART",
        help=f"run only this part; can be repeated: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything together")
    parser.add_argument("--report", action="store_true",
                        help="write page and pictures of results that are there")  # fmt: skip
    args = parser.parse_args(argv)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: must be cuda, cuda:N or cpu")
    return args


def hide_other_gpus(device: str) -> str:  # "cpu", "cuda"
    """Make cuda:N the only GPU of all processes: what is measured and waited for is the first."""
    kind, _, number = device.partition(":")
    if number:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        chosen = dict(enumerate(visible)).get(int(number), "-1") if visible else number
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    return kind


def main(argv: list[str] | None = None) -> int:
    """Run the parts, or write the page of earlier results; return the exit status."""
    args = arguments(argv)
    if args.report:
        results = json.loads(args.out.read_text(encoding="utf-8"))
        print("\n".join(str(path) for path in gpu_report.write_all(results, args.out)))
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported, in the parts
    check = Check(args.out, hide_other_gpus(args.device), args.short)
    is_good = check.run(args.only or PARTS, args.seconds)
    for path in gpu_report.write_all(check.results, check.path):
        print(f"wrote {path}")
    print(f"wrote {check.path}")
    return 0 if is_good else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # else it would wait for a part that hangs in the driver and cannot be killed
