"""Weights baked as the image's build does it, and workers that have nothing else to start from."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_worker import HANDLER, SECRET, PhotoServer, WorkerProcess, plain_env
from seeded import hub_env

from heimdex_clip_worker.artifact import GOLDEN_PHOTOS, canonical
from heimdex_clip_worker.auth import new_nonce, sign, sign_v2
from heimdex_clip_worker.platform import PlatformServer

START_S = 60  # a cold start on a busy machine


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tag `openai`, by the command that the Dockerfile runs."""
    home = tmp_path_factory.mktemp("bake")
    command = [sys.executable, "-m", "heimdex_clip_worker.bake", "--to", str(home / "clip")]
    env = plain_env(home, **hub_env(home))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return home / "clip"


@pytest.fixture
def copy(baked: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(baked, tmp_path / "clip"))


def env_of(home: Path, artifact: Path, **more: str) -> dict[str, str]:
    """Return the environment of a worker that has an artifact and no checkpoint anywhere."""
    empty = {"HF_HOME": str(home / "no-hub"), "CLIP_ARTIFACT_DIR": str(artifact)}
    return plain_env(home, **empty, **more)


def changed(folder: Path, change: dict) -> None:
    """Change an artifact's manifest, and its digest with it."""
    path = folder / "manifest.json"
    told = json.loads(path.read_text())["manifest"]
    told |= change
    digest = hashlib.sha256(canonical(told)).hexdigest()
    path.write_text(json.dumps({"digest": digest, "manifest": told}))


def refused(env: dict[str, str]) -> tuple[list[str], WorkerProcess]:
    """Run a worker that must not start; return its error lines."""
    with PlatformServer() as platform:
        with WorkerProcess(env | platform.worker_env(), *HANDLER) as worker:
            assert worker.ended(START_S) == 1
        assert platform.platform.calls["job-take"] == 0
    assert "Traceback" not in worker.output
    return [line for line in worker.stderr.splitlines() if "[ERROR]" in line], worker


def test_a_worker_starts_from_what_was_baked_alone_and_says_how_fit_it_is(baked, tmp_path):
    for path in [*baked.iterdir(), baked]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in baked.iterdir()}
    with PhotoServer() as photos, PlatformServer() as platform:
        env = env_of(tmp_path, baked, **platform.worker_env())
        with WorkerProcess(env, *HANDLER) as worker:
            url, now = photos.photo("chelsea.jpg"), int(time.time())
            job = {"image_url": url, "auth": sign(url, secret=SECRET, ts=now)}
            image = platform.runsync(job, wait_s=START_S)["output"]
            words = {"text": "a cat"}
            said = {"kid": "v1", "secret": SECRET, "audience": "heimdex-clip"}
            times = {"ts": now, "exp": now + 300, "nonce": new_nonce()}
            words["auth"] = sign_v2(words, **said, **times)
            text = platform.runsync(words, wait_s=30)["output"]
    golden = json.loads((baked / "manifest.json").read_text())["manifest"]["golden"]["photos"]
    row = struct.unpack("<512f", base64.b64decode(golden[0]["row"]))
    assert 1 - sum(a * b for a, b in zip(row, image["embedding"], strict=True)) < 6e-4
    assert (image["pretrained"], text["space_id"]) == ("openai", image["space_id"])
    assert {path.name: path.stat().st_mtime_ns for path in baked.iterdir()} == before
    line = next(line for line in worker.stderr.splitlines() if "Fit to serve" in line)
    steps = r"\(import [\d.]+s, load [\d.]+s, SDK [\d.]+s, warm-up [\d.]+s\)"
    numbers = r"golden answers 1 - cosine [\d.e-]+ <= [\d.e-]+, (bf16|fp32) on cpu"
    assert re.search(rf"after [\d.]+s {steps}: {numbers}", line), line


def test_the_manifest_says_what_was_baked(baked):
    told = json.loads((baked / "manifest.json").read_text())["manifest"]
    assert (told["model_name"], told["pretrained"]) == ("ViT-B-32", "openai")
    assert (told["precision"], told["activation"]) == ("fp16", "quickgelu")
    assert re.fullmatch("[0-9a-f]{64}", told["source"]["sha256"])
    assert [photo["name"] for photo in told["golden"]["photos"]] == list(GOLDEN_PHOTOS)
    assert 300e6 < sum(path.stat().st_size for path in baked.iterdir()) < 310e6


@pytest.mark.parametrize("name", ["image.safetensors", "manifest.json"])
def test_a_worker_does_not_start_from_what_was_tampered_with(copy, tmp_path, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    (line,), _ = refused(env_of(tmp_path, copy))
    assert "Cannot start: the serving artifact" in line and "damaged" in line


def test_vectors_that_are_not_the_golden_ones_stop_the_worker(copy, tmp_path):
    golden = json.loads((copy / "manifest.json").read_text())["manifest"]["golden"]
    rows = [photo["row"] for photo in golden["photos"]]
    for photo, row in zip(golden["photos"], rows[1:] + rows[:1], strict=True):
        photo["row"] = row
    changed(copy, {"golden": golden})
    _, worker = refused(env_of(tmp_path, copy))
    lines = [line for line in worker.output.splitlines() if "Fitness check failed" in line]
    assert len(lines) == 1 and "decoding or preprocessing does not give" in lines[0]


def test_photographs_other_than_the_golden_ones_stop_the_worker(copy, tmp_path):
    golden = json.loads((copy / "manifest.json").read_text())["manifest"]["golden"]
    golden["photos"][0]["sha256"] = "0" * 64
    changed(copy, {"golden": golden})
    (line,), _ = refused(env_of(tmp_path, copy))
    assert "not those of this package" in line


def test_other_weights_than_the_baked_ones_are_not_answered_with_these(baked, tmp_path):
    env = env_of(tmp_path, baked, CLIP_PRETRAINED="laion2b_s34b_b79k")
    (line,), worker = refused(env)
    assert "neither in the hub cache nor to be had" in line
    assert "it was made for ('ViT-B-32', 'openai', 'auto')" in worker.stderr


def test_a_start_imports_neither_sympy_nor_the_compiler_of_torch(baked, tmp_path):
    code = f"""
import sys
from heimdex_clip_worker.handler import Embedder, TextEmbedder
embedder = Embedder.load("ViT-B-32", "openai", artifact_dir={str(baked)!r})
embedder.warm_up()
TextEmbedder.load(embedder)
print({{"sympy", "torch._dynamo", "torch._inductor", "torchvision", "triton"}} & {{*sys.modules}})
"""
    env = env_of(tmp_path, baked)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_a_build_without_weights_fails(tmp_path):
    command = [sys.executable, "-m", "heimdex_clip_worker.bake", "--to", str(tmp_path / "clip")]
    env = plain_env(tmp_path, HF_HOME=str(tmp_path / "no-hub"))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not os.path.exists(tmp_path / "clip")
    assert done.stderr.splitlines()[-1].startswith("[ERROR] No weights: CLIP_PRETRAINED='openai'")
