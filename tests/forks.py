"""Workers and commands, forked from a process that has imported torch and the handler.

A start of Python with these imports takes 3 s of CPU time, and the tests start about a hundred.
`python forks.py FD` is the process that forks: it listens at the socket `FD` until its standard
input ends. A fork has the environment, folder, output and session of a process of its own, and runs
and ends as `python FILE` or `python -m MODULE` does. OpenMP has read its variables before.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

MOST_BYTES = 100_000  # of a request: the environment and words of a worker


@cache
def _server() -> str:  # address of its socket
    """Start the process that forks, once; it ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    path = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, __file__, str(number)], pass_fds=[number], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )  # fmt: skip

    def end() -> None:
        process.stdin.close()
        process.wait(10)
        folder.cleanup()

    atexit.register(end)
    return path


class Fork:
    """A process, to be used like `subprocess.Popen`."""

    def __init__(self, words: tuple[str, ...], env: Mapping[str, str], cwd: Path | str):
        outputs = [os.pipe(), os.pipe()]
        request = json.dumps({"words": words, "env": dict(env), "cwd": str(cwd)}).encode()
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(_server())
        socket.send_fds(self._socket, [request], [write for _, write in outputs])
        for _, write in outputs:
            os.close(write)
        self.stdout, self.stderr = (os.fdopen(read, errors="replace") for read, _ in outputs)
        self._socket.settimeout(60)  # the first one waits for the imports
        self.pid = int(self._socket.recv(100))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit status, or a signal's number with a minus."""
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                self.returncode = int(self._socket.recv(100))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a fork", timeout or 0) from None
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit status, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return all output; kill the process if the time is up."""
        with ThreadPoolExecutor(2) as pool:
            outputs = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            finally:
                self.send_signal(signal.SIGKILL)
            out, err = (output.result() for output in outputs)
        self.stdout.close()
        self.stderr.close()
        return out, err


def _serve(listener: socket.socket) -> list[str] | None:
    """Fork for each request; return a fork's words in the fork, None at the end."""
    children: dict[int, socket.socket] = {}
    wake_up, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, *_ = select.select([listener, wake_up, 0], [], [])
        if wake_up in ready:
            os.read(wake_up, 1000)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with children.pop(ended[0]) as owner, contextlib.suppress(OSError):
                    owner.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
        if 0 in ready:
            return None
        if listener in ready:
            owner, _ = listener.accept()
            request, outputs, *_ = socket.recv_fds(owner, MOST_BYTES, 2)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listener, *children.values()):
                    other.close()
                for number in (wake_up, wake):
                    os.close(number)
                return _become(json.loads(request), outputs, owner)
            children[pid] = owner
            for number in outputs:
                os.close(number)


def _become(request: dict, outputs: list[int], owner: socket.socket) -> list[str]:
    """Take the session, environment, folder and output that were asked for; return the words."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the old ones know what kind of file was there
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    with owner:
        owner.send(str(os.getpid()).encode())
    return request["words"]


if __name__ == "__main__":
    import fake_worker  # noqa: F401

    with socket.socket(fileno=int(sys.argv[1])) as asked:
        words = _serve(asked)
    if words and words[0] == "-m":
        sys.modules.pop(words[1], None)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
