"""Run the smoke-test notebook against a worker started here: `make smoke`.

Platform, Supabase Storage and a server of photographs are here as well, all on 127.0.0.1. The
weights are seeded, and compared with golden vectors that open_clip makes of them.
"""

from __future__ import annotations

import contextlib
import json
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

from heimdex_clip_worker.platform import PlatformServer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"
CACHE = ROOT / ".cache" / "smoke"  # git-ignored; the notebooks that were run are left here


@dataclass
class Run:
    """A notebook that was run."""

    status: int  # papermill's exit status
    said: str  # what papermill printed, the failure at its end
    notebook: str  # what it left, as text
    seconds: float


def checkpoint(activation: str = "auto") -> Path:
    """Return the seeded weights as a file named `seeded`; only with auto it says its activation."""
    seeded_hub()
    folder = CACHE / f"weights-{activation}"
    folder.mkdir(parents=True, exist_ok=True)
    config = [seeded_file().parent / "open_clip_config.json"] if activation == "auto" else []
    for source in (seeded_file(), *config):
        link = folder / ("seeded.safetensors" if source == seeded_file() else source.name)
        if not link.exists():  # it is not there, or leads to where this folder was before
            link.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                link.symlink_to(source)
    return folder / "seeded.safetensors"


def golden_file() -> Path:
    """Return golden vectors of the seeded weights, made by tools/golden.py; make them once."""
    path = CACHE / f"golden-{REVISION[:12]}-2.json"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}")
        make = [sys.executable, str(ROOT / "tools" / "golden.py"), str(part)]
        run = [*make, "--pretrained", str(checkpoint())]
        subprocess.run(run, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
        part.replace(path)
    return path


def worker_env(home: Path, activation: str = "auto", **more: str) -> dict[str, str]:
    """Return the environment of a worker with the seeded weights."""
    return plain_env(
        home,
        CLIP_PRETRAINED=str(checkpoint(activation)),
        CLIP_ACTIVATION=activation,
        CLIP_ARTIFACT_DIR=str(CACHE / "artifacts"),
        CLIP_DEVICE="cpu",
        OMP_NUM_THREADS="1",  # threads that spin while others want the CPU make it slower
        **more,
    )


def caller_env(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of the notebook: keys, and nothing of this shell's."""
    kept = {"MPLCONFIGDIR": str(CACHE / "matplotlib"), "NO_PROXY": "127.0.0.1"}
    return plain_env(home, **kept, **more)


def papermill(notebook: Path, left: Path, parameters: Mapping[str, object]) -> list[str]:
    """Return the command that runs a notebook and leaves it at `left`."""
    told = {k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()}
    options = ["--no-progress-bar", "--parameters_yaml", json.dumps(told)]  # JSON is YAML
    return [sys.executable, "-m", "papermill", str(notebook), str(left), *options]


def run_notebook(
    name: str,  # of the notebook that is left in .cache/smoke
    env: Mapping[str, str],  # the whole environment
    parameters: Mapping[str, object],
    notebook: Path = NOTEBOOK,
    limit_s: float = 300,
) -> Run:
    """Run a notebook with papermill."""
    CACHE.mkdir(parents=True, exist_ok=True)
    left = CACHE / f"{name}.ipynb"
    left.unlink(missing_ok=True)
    start = time.monotonic()
    done = subprocess.run(
        papermill(notebook, left, parameters), env=dict(env), cwd=env["HOME"], timeout=limit_s,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    text = left.read_text(encoding="utf-8") if left.is_file() else ""
    return Run(done.returncode, done.stdout, text, time.monotonic() - start)


@contextlib.contextmanager
def on_the_platform(
    env: Mapping[str, str],  # of the worker
    *program: str,  # what Python runs; the handler when empty
) -> Iterator[PlatformServer]:
    """Run a worker under the local platform."""
    with (
        PlatformServer() as platform,
        WorkerProcess({**env, **platform.worker_env()}, *program),
    ):
        yield platform


def address(platform: PlatformServer) -> dict[str, object]:
    """Return the parameters that name an endpoint."""
    return {"base_url": platform.base_url, "endpoint_id": platform.endpoint_id}


def on_platform(home: Path) -> Run:
    """Run the notebook against the platform, with photographs in Supabase Storage."""
    parameters = {"golden": golden_file(), "n": 12, "timeout_s": 120}
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
    """Run it both ways and say how it went; return the exit status."""
    status = 0
    for run in (on_platform, on_local_server):
        with tempfile.TemporaryDirectory() as home:
            done = run(Path(home))
        status = status or done.status
        print(done.said if done.status else f"passed in {done.seconds:.0f} s", flush=True)
    print(f"The notebooks as they were run are in {CACHE.relative_to(ROOT)}/")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
