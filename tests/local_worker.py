"""Worker processes and a photograph server for end-to-end tests: on loopback, with time limits."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
from forks import Fork
from PIL import Image, ImageStat

from heimdex_clip_worker.auth import sign
from heimdex_clip_worker.model.photos import PHOTOS

ROOT = Path(__file__).resolve().parent.parent
SECRET = "end-to-end-secret-5f1d0c9b7a3e4826"
HANDLER = ("-m", "heimdex_clip_worker.handler")
FAKE = str(Path(__file__).with_name("fake_worker.py"))
_INHERITED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "OMP_WAIT_POLICY",  # set where several workers share the CPUs
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "SSL_CERT_FILE",
    "COVERAGE_PROCESS_START",
)


def plain_env(home: Path, **more: str) -> dict[str, str]:
    """Make a worker's environment without the settings of this shell; `more` is added."""
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env |= {
        "HOME": str(home),  # the SDK reads an API key from ~/.runpod
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "EMBEDDING_HMAC_SECRET": SECRET,
        "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
    }
    return env | more


def signed(url: str, *, ts: int | None = None, secret: str = SECRET, **fields: object) -> dict:
    """Make a signed job input for `url`; without `ts` it is signed now."""
    ts = int(time.time()) if ts is None else ts
    return {"image_url": url, **fields, "auth": sign(url, secret=secret, ts=ts)}


def vector_and_timings(output: dict, request_id: str) -> tuple[list[float], dict[str, float]]:
    """Check every other field of a reply for one image."""
    fields = {name: output[name] for name in output.keys() - {"embedding", "timings", "space_id"}}
    assert fields == {
        "request_id": request_id,
        "dim": 512,
        "model": "ViT-B-32",
        "pretrained": "openai",
        "normalized": True,
    }
    assert re.fullmatch("[0-9a-f]{16}", output["space_id"])
    return output["embedding"], output["timings"]


def fake_vector(name: str) -> list[float]:
    """Compute the fake embedder's vector of a photograph: mean colour and size, normalized."""
    with Image.open(PHOTOS / name) as image:
        rgb = image.convert("RGB")
        row = [*ImageStat.Stat(rgb).mean, *rgb.size]
    return [value / math.hypot(*row) for value in row]


@functools.cache
def tiny_png() -> bytes:
    """Make the file of an image of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(file, "png")
    return file.getvalue()


class WorkerProcess:
    """A worker process and its output; leaving the context manager ends it."""

    def __init__(
        self,
        env: Mapping[str, str],  # the whole environment
        *args: str,  # of Python; none: the handler module
        cwd: Path | None = None,
        forked: bool = False,  # see forks.py; the fake worker always is
    ):
        self.log: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self.home = Path(env["HOME"])
        args, cwd = args or HANDLER, cwd or Path(env["HOME"])
        forked = (forked or args[0] == FAKE) and sys.platform == "linux"
        self.process: Any = Fork(args, env, cwd) if forked else self._start(env, args, cwd)
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in self.log
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _start(env: Mapping[str, str], args: tuple[str, ...], cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *args],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # to end it together with the SDK's heartbeat process
        )

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self.log[name].append(line)

    @property
    def stdout(self) -> str:
        return "".join(self.log["stdout"])

    @property
    def stderr(self) -> str:
        return "".join(self.log["stderr"])

    @property
    def output(self) -> str:
        """Join stdout and stderr, for searching."""
        return self.stdout + self.stderr

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float, failure: str) -> None:
        """Wait until `is_ready()`; fail with the log if the process ends or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if self.process.poll() is not None:
                self._drain()
                raise AssertionError(
                    f"{failure}: the worker ended with {self.process.returncode}\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"{failure}: not within {timeout_s} s\n{self.tail()}")
            time.sleep(0.02)

    def wait_for_log(self, text: str, timeout_s: float = 20) -> None:
        """Wait until stderr has `text`."""
        self.wait_until(lambda: text in self.stderr, timeout_s, f"no line with {text!r}")

    def tail(self) -> str:
        """Show the end of the output."""
        return f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-3000:]}"

    def wait_for_exit(self, timeout_s: float) -> int:
        """Wait for the process to end and its output to be read; return the exit status."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s\n{self.tail()}") from None
        self._drain()
        return self.process.returncode

    def _drain(self) -> None:
        for reader in self._readers:
            reader.join(5)

    def terminate(self) -> None:
        """Send SIGTERM to the worker only, as the platform does."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = 5.0) -> None:
        """End the worker and its child processes: SIGTERM, then SIGKILL."""
        if self.process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: see start_new_session
        self.process.wait(10)
        self._drain()
        self.process.stdout.close()
        self.process.stderr.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def is_alive(pid: int) -> bool:
    """True if a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """Find a port of 127.0.0.1 that is not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def local_server(
    env: Mapping[str, str], ready_s: float = 60
) -> Iterator[tuple[WorkerProcess, str]]:
    """Run the real handler under the SDK's local API; yield the process and its base URL."""
    port = free_port()
    flags = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError), requests.Session() as http:
            http.trust_env = False
            return http.get(url + "/openapi.json", timeout=5).status_code == 200
        return False

    with WorkerProcess(env, *HANDLER, *flags) as worker:
        worker.wait_until(answers, ready_s, "the local API does not answer")
        yield worker, url


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # with 5, some of 64 simultaneous connections wait for seconds


class PhotoServer:
    """An image server on a free port of 127.0.0.1, with good and bad downloads.

    `/photos/NAME` a photograph; `/held/NAME` the same after `release()`; `/missing` 404;
    `/status/NNN` that status; `/page` HTML; `/truncated.jpg` half a JPEG; `/endless` a body that
    drips until the server closes; `/large.jpg` `large_bytes` bytes; `/tiny.png` and
    `/held/tiny.png` a PNG of 8 x 8 pixels. Query strings are ignored.
    """

    def __init__(self, large_bytes: int = 300_000):
        self.large_bytes = large_bytes
        self.hits: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()  # responses whose reader closed the connection
        self._open = threading.Event()
        self._closing = threading.Event()

    def release(self) -> None:
        """Answer all requests for `/held/`, those to come included."""
        self._open.set()

    def hold(self) -> None:
        """Hold requests for `/held/` from now on."""
        self._open.clear()

    def __enter__(self) -> PhotoServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                server.hits[path] += 1
                try:
                    server.answer(self, path)
                except (BrokenPipeError, ConnectionResetError):
                    server.dropped[path] += 1
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self._http = _Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._open.set()
        self._http.shutdown()
        self._http.server_close()

    def photo(self, name: str = "chelsea.jpg", query: str = "") -> str:
        """Make the URL of a photograph."""
        return f"{self.url}/photos/{name}{'?' + query if query else ''}"

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        """Answer one GET request."""
        kind, _, name = path.lstrip("/").partition("/")
        if kind == "held":
            self._open.wait(60)
        if path.endswith("tiny.png"):
            return self._send(request, 200, tiny_png(), "image/png")
        if kind in ("photos", "held"):
            return self._send(request, 200, (PHOTOS / Path(name).name).read_bytes())
        if kind == "truncated.jpg":
            photo = (PHOTOS / "chelsea.jpg").read_bytes()
            return self._send(request, 200, photo[: len(photo) // 2])
        if kind == "large.jpg":
            photo = (PHOTOS / "chelsea.jpg").read_bytes()
            return self._send(request, 200, photo.ljust(self.large_bytes, b"\0"))
        if kind == "page":
            return self._send(request, 200, b"<!doctype html><title>Sign in</title>", "text/html")
        if kind == "endless":
            return self._drip(request)
        status = int(name) if kind == "status" else 404
        return self._send(request, status, b"Not here", "text/plain")

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "image/jpeg"
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _drip(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "image/jpeg")
        request.send_header("Content-Length", "100000")
        request.end_headers()
        while not self._closing.wait(0.05):
            request.wfile.write(b"\xff")
            request.wfile.flush()
