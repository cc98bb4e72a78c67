"""The workers in their processes, behind the emulator or the SDK's local server."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from local_worker import WorkerProcess, free_port, plain_env
from seeded import hub_env

from benchmarks import CACHE, ROOT
from heimdex_clip_worker.emulator.server import EmulatorServer

BASELINE, OURS, GOOD = "plain", "ours", "good"  # as in the results files
CUDA_OPTIONS = "ours, with the options of BENCH_CUDA"
DEPLOYED = {
    BASELINE: (str(ROOT / "benchmarks" / "baseline_worker.py"),),
    OURS: ("-m", "heimdex_clip_worker.handler"),
}
OBSERVER = str(ROOT / "benchmarks" / "observed_worker.py")  # names threads, trusts an authority
OBSERVED = {
    BASELINE: DEPLOYED[BASELINE],  # it has no threads
    OURS: (OBSERVER, "heimdex_clip_worker.handler"),
    CUDA_OPTIONS: (OBSERVER, "benchmarks.cuda_worker"),
    GOOD: (OBSERVER, str(ROOT / "benchmarks" / "good_worker.py")),
}
# Where each of them looks for the authorities to trust. Ours looks in `certifi` alone.
AUTHORITY = {BASELINE: "REQUESTS_CA_BUNDLE", OURS: "BENCH_AUTHORITY", GOOD: "SSL_CERT_FILE"}
STANDIN = {kind: ("-m", "benchmarks.standin_worker", kind) for kind in (BASELINE, OURS)}
OBSERVED_STANDIN = {**STANDIN, OURS: (OBSERVER, *STANDIN[OURS][1:])}


@dataclass(frozen=True)
class Worker:
    """A running worker, and where its callers send their jobs."""

    kind: str  # BASELINE, OURS or GOOD
    url: str  # jobs are posted to its /runsync
    process: WorkerProcess
    started: float  # time.perf_counter()
    headers: dict[str, str] = field(default_factory=dict)  # of every job that is posted


@contextlib.contextmanager
def environment(**more: str) -> Iterator[dict[str, str]]:
    """Yield the environment of a worker; it is the same for all."""
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        env = plain_env(Path(home), **hub_env(Path(home)))
        yield env | {"CLIP_ARTIFACT_DIR": str(CACHE / "artifacts")} | more


@contextlib.contextmanager
def production(kind: str, *command: str, **more: str) -> Iterator[Worker]:
    """Run a worker under the SDK's production loop, as deployed.

    The platform takes 2,000 runsync calls in 10 seconds for an endpoint, however many workers it
    has. Here there is no such limit: a single worker could exceed it with jobs of one image.
    """
    with EmulatorServer(rates={}) as platform, environment(**platform.worker_env(), **more) as env:
        started = time.perf_counter()
        with WorkerProcess(env, *(command or DEPLOYED[kind])) as process:
            yield Worker(kind, platform.url, process, started, platform.headers)


@contextlib.contextmanager
def local(kind: str, *command: str, **more: str) -> Iterator[Worker]:
    """Run a worker under the SDK's local server."""
    port = free_port()
    flags = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    with environment(**more) as env:
        started = time.perf_counter()
        with WorkerProcess(env, *(command or DEPLOYED[kind]), *flags) as process:
            yield Worker(kind, f"http://127.0.0.1:{port}", process, started)


def memory(pid: int) -> int:  # bytes
    """Measure the memory of a worker and its children, counting shared pages once.

    The SDK's heartbeat is a fork of the worker, so it shares nearly all of its pages with the
    worker. Of a child, only the pages that no other process has are added. Pages that the child
    processes share with each other, but no longer with the worker, are missing: 15 MB.
    """
    main = psutil.Process(pid)
    total = main.memory_info().rss
    for child in main.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_full_info().uss
    return total


class PeakMemory:
    """The peak memory of a worker while the block runs; a context manager."""

    def __init__(self, worker: Worker, every_s: float = 0.2):
        self.pid, self.every_s, self.peak = worker.process.process.pid, every_s, 0  # bytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, memory(self.pid))
            if self._done.wait(self.every_s):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
