"""Run a worker under observation: `python benchmarks/observed_worker.py PROGRAM [ARGUMENT ...]`.

PROGRAM is a module or the path of a file, and runs unchanged as `__main__`. Two things differ from
running it directly, for the benchmark alone:

- Each Python thread gives its name to the system, which Python 3.11 does not do. So the CPU time of
  a worker can be read by thread, from outside.
- Where BENCH_AUTHORITY names a file, `certifi` names that file as the authorities to trust. So a
  worker fetches over HTTPS from the benchmark's image server, and needs no setting for it.

It is run by its path, because the worker may be of another checkout, whose benchmarks differ.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import threading


def name_threads() -> None:
    """Give the name of each thread that starts from now on to the system."""
    run = threading.Thread.run

    def named(self: threading.Thread) -> None:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm,
        ):
            comm.write(self.name)  # the system keeps 15 characters
        run(self)

    threading.Thread.run = named


def trust(authority: str) -> None:
    """Let `certifi` name the benchmark's authority; call it before the worker is imported."""
    import certifi

    certifi.where = lambda: authority


def main() -> None:
    """Observe, then run the program."""
    del sys.path[0]  # this folder: its modules are no top-level ones
    sys.argv = sys.argv[1:]
    name_threads()
    if authority := os.environ.get("BENCH_AUTHORITY"):
        trust(authority)
    program = sys.argv[0]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
