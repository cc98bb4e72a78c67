"""Worker processes and a photograph server for the end-to-end tests; loopback, waits bounded."""

from __future__ import annotations

import contextlib
import os
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

import requests

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "heimdex_clip_worker" / "photos"
SECRET = "end-to-end-secret-5f1d0c9b7a3e4826"
HANDLER = ("-m", "heimdex_clip_worker.handler")
_KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "OMP_WAIT_POLICY",  # set where workers run side by side
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "COVERAGE_PROCESS_START",
)


def plain_env(home: Path, **more: str) -> dict[str, str]:
    """Return an environment with nothing of this shell's settings in it, and `more` on top."""
    env = {name: os.environ[name] for name in _KEPT if name in os.environ}
    env |= {
        "HOME": str(home),  # the SDK reads an API key from ~/.runpod
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "EMBEDDING_HMAC_SECRET": SECRET,
        "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
    }
    return env | more


class WorkerProcess:
    """A worker in its own process, with all it prints; a context manager that always ends it."""

    def __init__(
        self,
        env: Mapping[str, str],  # the whole environment
        *args: str,  # what Python runs; the handler module when empty
        cwd: Path | None = None,
    ):
        self.log: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self.home = Path(env["HOME"])
        self.process = subprocess.Popen(
            [sys.executable, *(args or HANDLER)],
            env=dict(env),
            cwd=cwd or env["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # the SDK's heartbeat is a child process: both end together
        )
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in self.log
        ]
        for reader in self._readers:
            reader.start()

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
    def output(self) -> str:  # both, for searching
        return self.stdout + self.stderr

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until `ready()`; fail with the log when the process ends first or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.process.poll() is not None:
                self._drain()
                raise AssertionError(
                    f"{what}: the worker ended with {self.process.returncode}\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {timeout_s} s\n{self.tail()}")
            time.sleep(0.02)

    def wait_for_log(self, text: str, timeout_s: float = 20) -> None:
        self.wait_until(lambda: text in self.stderr, timeout_s, f"no line with {text!r}")

    def tail(self) -> str:
        return f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-3000:]}"

    def ended(self, timeout_s: float) -> int:
        """Wait for the process to end; return its exit status once all it printed is read."""
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
        """Send SIGTERM to the worker alone, as the platform does."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = 5.0) -> None:
        """End the worker and whatever it started: SIGTERM, then SIGKILL."""
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


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def local_server(
    env: Mapping[str, str], ready_s: float = 60
) -> Iterator[tuple[WorkerProcess, str]]:
    """Run the SDK's local API over the real handler; yield the process and its base URL."""
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
    request_queue_size = 256  # with 5, of 64 who dial at once some wait for seconds


class PhotoServer:
    """Serves the photographs, and what can be wrong with a download, on a free port of 127.0.0.1.

    `/photos/NAME` a photograph; `/held/NAME` one, but not before `release()`; `/missing` 404;
    `/status/NNN` that status; `/page` HTML; `/truncated.jpg` half a JPEG; `/endless` a body that
    drips until the server closes; `/large.jpg` `large_bytes` bytes. Query strings are ignored.
    """

    def __init__(self, large_bytes: int = 300_000):
        self.large_bytes = large_bytes
        self.hits: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()  # answers whose reader went away
        self._open = threading.Event()
        self._closing = threading.Event()

    def release(self) -> None:
        """Let everything under `/held/` go."""
        self._open.set()

    def hold(self) -> None:
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
        """Return the URL of a photograph."""
        return f"{self.url}/photos/{name}{'?' + query if query else ''}"

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        kind, _, name = path.lstrip("/").partition("/")
        if kind == "held":
            self._open.wait(60)
        if kind in ("photos", "held"):
            return self._send(request, 200, (PHOTOS / Path(name).name).read_bytes())
        if kind == "truncated.jpg":
            whole = (PHOTOS / "chelsea.jpg").read_bytes()
            return self._send(request, 200, whole[: len(whole) // 2])
        if kind == "large.jpg":
            whole = (PHOTOS / "chelsea.jpg").read_bytes()
            return self._send(request, 200, whole.ljust(self.large_bytes, b"\0"))
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
