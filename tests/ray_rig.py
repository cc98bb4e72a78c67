"""A local Ray, the emulator with a fake embedder, and image servers, for tests and measurements."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import ray
from backfill_rig import is_missing, make_png
from local_worker import FAKE, ROOT, plain_env

from heimdex_clip_worker.emulator.server import Emulator

# Ray's own processes must not take seconds to start; and nothing is reported to anybody.
RAY_ENV = {
    "PYTHONPATH": f"{ROOT / 'tests' / 'light_imports'}:{ROOT}:{ROOT / 'tests'}",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Images:
    """Image n is a single colour that encodes n; `/shy/n.png` is refused the first time."""

    def __init__(self) -> None:
        self.fetched: Counter[int] = Counter()  # successful downloads, by number
        self.refused: set[int] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def url(self, number: int, is_shy: bool = False) -> str:
        return f"{self.address}/{'shy/' * is_shy}{number}.png"

    def answer(self, path: str) -> tuple[int, bytes]:
        """Choose the status and the body for a path."""
        *folders, name = path.strip("/").split("/")
        number = int(name.partition(".")[0])
        with self._lock:
            if folders and number not in self.refused:
                self.refused.add(number)
                return 503, b""
            if is_missing(number):
                return 404, b""
            self.fetched[number] += 1
        return 200, make_png(number)

    def forget(self) -> None:
        """Count and refuse from the start."""
        with self._lock:
            self.fetched.clear()
            self.refused.clear()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        images = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, body = images.answer(self.path)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def __enter__(self) -> Images:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def write_table(path: Path, ids: Sequence[Any], urls: Sequence[str | None]) -> None:
    """Write a Parquet file of rows."""
    table = pyarrow.table({"id": pyarrow.array(ids), "image_url": pyarrow.array(urls)})
    pyarrow.parquet.write_table(table, path, row_group_size=100)


def start_ray(cpus: int, folder: str, attempts: int = 3) -> None:
    """Start Ray on this machine; on a busy one its processes may be late, so try again."""
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
    options |= {"log_to_driver": False, "logging_level": "error", "_temp_dir": folder}
    for attempt in range(attempts):
        try:
            ray.init(address="local", num_cpus=cpus, **options)
            return
        except Exception:  # Ray raises a bare one when its processes are late
            ray.shutdown()
            if attempt == attempts - 1:
                raise
            time.sleep(5)


@contextlib.contextmanager
def local_ray(home: Path, cpus: int = 4, **env: str) -> Iterator[None]:
    """Start Ray on this machine; its actors have the environment `env`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("CLIP_", "RUNPOD_"))]:
            patch.delenv(name)
        for name, value in {**plain_env(home), **env, **RAY_ENV}.items():
            patch.setenv(name, value)
        folder = tempfile.mkdtemp(prefix="ray-")  # a short name: sockets are in it
        try:
            start_ray(cpus, folder)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[Images]:
    """Start image server, emulator and Ray; yield the image server."""
    options = {"command": [sys.executable, FAKE], "env": plain_env(home)}
    with Images() as images, Emulator(workers=1, **options) as platform:
        platform.wait_ready()
        with local_ray(home, **platform.caller_env()):
            yield images
