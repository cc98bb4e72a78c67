"""Run the smoke-test notebook against a worker on this machine: `make smoke`.

An emulator, a Supabase Storage and a server of photographs run on 127.0.0.1 as well. The weights
are seeded, and their vectors are compared with golden vectors that open_clip computes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from local_worker import PhotoServer, WorkerProcess, local_server, plain_env
from seeded import REVISION, seeded_file, seeded_hub
from storage_standin import StorageServer

from heimdex_clip_worker.emulator.server import EmulatorServer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"
CACHE = ROOT / ".cache" / "smoke"  # git-ignored; the executed notebooks are kept here


@dataclass
class Run:
    """An executed notebook."""

    status: int  # papermill's exit status
    output: str  # of papermill, with the failure at its end
    notebook: str  # as text
    summary: str  # what a workflow's run would show
    seconds: float


def checkpoint(activation: str = "auto") -> Path:
    """Link the seeded weights as a file named `seeded`, with its config only for `auto`."""
    seeded_hub()
    folder = CACHE / f"weights-{activation}"
    folder.mkdir(parents=True, exist_ok=True)
    config = [seeded_file().parent / "open_clip_config.json"] if activation == "auto" else []
    for source in (seeded_file(), *config):
        link = folder / ("seeded.safetensors" if source == seeded_file() else source.name)
        if not link.exists():  # missing, or pointing to an earlier place of this folder
            link.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                link.symlink_to(source)
    return folder / "seeded.safetensors"


def golden_file() -> Path:
    """Find golden vectors of the seeded weights, or make them with tools/golden.py."""
    path = CACHE / f"golden-{REVISION[:12]}-2.json"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}")
        make = [sys.executable, str(ROOT / "tools" / "golden.py"), str(part)]
        run = [*make, "--pretrained", str(checkpoint())]
        subprocess.run(run, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
        part.replace(path)
    return path


def worker_env(home: Path, activation: str = "auto", **more: str) -> dict[str, str]:
    """Make the environment of a worker with the seeded weights."""
    return plain_env(
        home,
        CLIP_PRETRAINED=str(checkpoint(activation)),
        CLIP_ACTIVATION=activation,
        CLIP_ARTIFACT_DIR=str(CACHE / "artifacts"),
        CLIP_DEVICE="cpu",
        OMP_NUM_THREADS="1",  # spinning threads would slow down other processes
        **more,
    )


def caller_env(home: Path, **more: str) -> dict[str, str]:
    """Make the environment of the notebook: keys, and nothing from this shell."""
    fixed = {"MPLCONFIGDIR": str(CACHE / "matplotlib"), "NO_PROXY": "127.0.0.1"}
    return plain_env(home, **fixed, **more)


def papermill(notebook: Path, executed: Path, parameters: Mapping[str, object]) -> list[str]:
    """Write the command that runs a notebook and saves it as `executed`."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()}
    options = ["--no-progress-bar", "--parameters_yaml", json.dumps(values)]  # JSON is YAML
    return [sys.executable, "-m", "papermill", str(notebook), str(executed), *options]


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["papermill.__main__"])


def _run_forked(words: list[str], env: Mapping[str, str], log: str, limit_s: float) -> int:
    """Run papermill in a fork of a process that has imported it, which takes 2 s of CPU time."""
    process = _FORKS.Process(target=_papermill, args=(words, dict(env), log))
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        process.join(10)
        raise TimeoutError(f"papermill still runs after {limit_s} s: {Path(log).read_text()}")
    return process.exitcode


def _papermill(words: list[str], env: Mapping[str, str], log: str) -> None:
    """Be the command `papermill`: its words, environment, folder and output."""
    from papermill.__main__ import papermill as command

    os.environ.clear()
    os.environ.update(env)
    os.chdir(env["HOME"])
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = words
    command()


def run_notebook(
    name: str,  # of the executed notebook in .cache/smoke
    env: Mapping[str, str],  # the whole environment
    parameters: Mapping[str, object],
    notebook: Path = NOTEBOOK,
    limit_s: float = 300,
) -> Run:
    """Run a notebook with papermill."""
    CACHE.mkdir(parents=True, exist_ok=True)
    executed = CACHE / f"{name}.ipynb"
    summary = CACHE / f"{name}.md"
    for file in (executed, summary):
        file.unlink(missing_ok=True)
    start = time.monotonic()
    command = papermill(notebook, executed, parameters)
    env = {**env, "GITHUB_STEP_SUMMARY": str(summary)}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        status = _run_forked(command[command.index("papermill") :], env, log.name, limit_s)
        output = Path(log.name).read_text(encoding="utf-8", errors="replace")
    seconds = time.monotonic() - start
    texts = [f.read_text(encoding="utf-8") if f.is_file() else "" for f in (executed, summary)]
    return Run(status, output, *texts, seconds)


@contextlib.contextmanager
def on_the_platform(
    env: Mapping[str, str],  # of the worker
    *program: str,  # what Python runs; the handler when empty
) -> Iterator[EmulatorServer]:
    """Run a worker under an emulator."""
    with (
        EmulatorServer() as platform,
        WorkerProcess({**env, **platform.worker_env()}, *program),
    ):
        yield platform


def address(platform: EmulatorServer) -> dict[str, object]:
    """Name an emulator's endpoint by the notebook's parameters."""
    return {"base_url": platform.base_url, "endpoint_id": platform.endpoint_id}


def on_platform(home: Path) -> Run:
    """Run the notebook against an emulator, with photographs in Supabase Storage."""
    parameters = {"golden": golden_file(), "n": 12, "timeout_s": 120, "pictures": home / "pictures"}
    with StorageServer() as storage, on_the_platform(worker_env(home)) as platform:
        env = caller_env(home, RUNPOD_API_KEY=platform.api_key, **storage.env())
        run = run_notebook("platform", env, {**address(platform), **parameters})
        assert not storage.objects, f"left in the bucket: {sorted(storage.objects)}"
    return run


def on_local_server(home: Path) -> Run:
    """Run the notebook against a --rp_serve_api server, with photographs at public URLs."""
    with PhotoServer() as photos, local_server(worker_env(home)) as (_, url):
        parameters = {
            "base_url": url, "endpoint_id": "", "storage": "url", "image": f"{photos.url}/photos/",
            "n": 3, "timeout_s": 120,
        }  # fmt: skip
        return run_notebook("local-server", caller_env(home), parameters)


def main() -> int:
    """Run the notebook both ways and print the results; return the exit status."""
    status = 0
    for run in (on_platform, on_local_server):
        with tempfile.TemporaryDirectory() as home:
            done = run(Path(home))
        status = status or done.status
        print(done.output if done.status else f"passed in {done.seconds:.0f} s", flush=True)
    print(f"The executed notebooks are in {CACHE.relative_to(ROOT)}/")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
