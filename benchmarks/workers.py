"""Both workers in their processes, behind the local platform or the SDK's local server."""

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
from heimdex_clip_worker.platform import PlatformServer

PLAIN, OURS = "plain", "ours"
DEPLOYED = {
    PLAIN: (str(ROOT / "benchmarks" / "plain_worker.py"),),
    OURS: ("-m", "heimdex_clip_worker.handler"),
}
STANDIN = {kind: ("-m", "benchmarks.standin_worker", kind) for kind in (PLAIN, OURS)}


@dataclass(frozen=True)
class Worker:
    """A worker that runs, and where its callers send their jobs."""

    kind: str  # plain or ours
    url: str  # jobs are posted to its /runsync
    process: WorkerProcess
    started: float  # time.perf_counter()
    headers: dict[str, str] = field(default_factory=dict)  # that jobs are posted with


@contextlib.contextmanager
def environment(**more: str) -> Iterator[dict[str, str]]:
    """Yield what a worker is to know: the same for both; ours ignores nothing that plain reads."""
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        env = plain_env(Path(home), **hub_env(Path(home)))
        yield env | {"CLIP_ARTIFACT_DIR": str(CACHE / "artifacts")} | more


@contextlib.contextmanager
def production(kind: str, *command: str, **more: str) -> Iterator[Worker]:
    """Run a worker under the SDK's production loop, as deployed."""
    with PlatformServer() as platform, environment(**platform.worker_env(), **more) as env:
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
    """Return what a worker and its children hold, pages that they share counted once.

    The SDK's heartbeat is a fork of the worker, so nearly all of its resident pages are the
    worker's own: of a child only what no other process has is added.
    """
    main = psutil.Process(pid)
    total = main.memory_info().rss
    for child in main.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_full_info().uss
    return total


class PeakMemory:
    """The most memory that a worker holds while the block runs; a context manager."""

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
