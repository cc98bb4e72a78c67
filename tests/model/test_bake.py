"""An artifact baked as the image's build does it, and workers that start from nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_worker import HANDLER, SECRET, PhotoServer, WorkerProcess, plain_env
from safetensors.torch import save_file
from seeded import FILE, REPO, hub_env, seeded_file

from heimdex_clip_worker.auth import new_nonce, sign, sign_v2
from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.model import artifact, weights
from heimdex_clip_worker.model.photos import GOLDEN_PHOTOS

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

BAKE = [sys.executable, "-m", "heimdex_clip_worker.model.artifact"]
START_S = 60  # a cold start on a busy machine
PINNED = "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31"  # OpenAI's ViT-B-32
REVISION = "a6f597a30f7b82c51704746581f9a4e41421e878"


def seeded_digest() -> str:
    """Name the sha256 of the seeded weights; the hub's cache has it as the file's name."""
    return seeded_file().resolve().name


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tag `openai`, by the command that the Dockerfile runs."""
    home = tmp_path_factory.mktemp("bake")
    env = plain_env(home, **hub_env(home))
    command = [*BAKE, "--to", str(home / "clip"), "--sha256", seeded_digest()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return home / "clip"


@pytest.fixture
def copy(baked: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be damaged."""
    return Path(shutil.copytree(baked, tmp_path / "clip"))


def env_of(home: Path, artifact: Path, **more: str) -> dict[str, str]:
    """Build the environment of a worker that has an artifact and no checkpoint anywhere."""
    empty = {"HF_HOME": str(home / "no-hub"), "CLIP_ARTIFACT_DIR": str(artifact)}
    return plain_env(home, **empty, **more)


def change_manifest(folder: Path, **fields: object) -> None:
    """Change fields of an artifact's manifest, and its digest with them."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())["manifest"] | fields
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({"digest": digest, "manifest": content}))


def refusal(env: dict[str, str]) -> tuple[list[str], WorkerProcess]:
    """Run a worker that must not start; return its error lines, and the worker."""
    with EmulatorServer() as platform:
        with WorkerProcess(env | platform.worker_env(), *HANDLER, forked=True) as worker:
            assert worker.wait_for_exit(START_S) == 1
        assert platform.queue.calls["job-take"] == 0
    assert "Traceback" not in worker.output
    return [line for line in worker.stderr.splitlines() if "[ERROR]" in line], worker


def test_a_worker_starts_from_the_baked_artifact_alone_and_logs_its_fitness(baked, tmp_path):
    for path in [*baked.iterdir(), baked]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in baked.iterdir()}
    with PhotoServer() as photos, EmulatorServer() as platform:
        env = env_of(tmp_path, baked, **platform.worker_env())
        with WorkerProcess(env, *HANDLER) as worker:
            url, now = photos.photo("chelsea.jpg"), int(time.time())
            job = {"image_url": url, "auth": sign(url, secret=SECRET, ts=now)}
            image = platform.runsync(job, wait_s=START_S)["output"]
            words = {"text": "a cat"}
            key = {"kid": "v1", "secret": SECRET, "audience": "heimdex-clip"}
            times = {"ts": now, "exp": now + 300, "nonce": new_nonce()}
            words["auth"] = sign_v2(words, **key, **times)
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


def test_the_manifest_describes_the_baked_artifact(baked):
    manifest = json.loads((baked / "manifest.json").read_text())["manifest"]
    assert (manifest["model_name"], manifest["pretrained"]) == ("ViT-B-32", "openai")
    assert (manifest["precision"], manifest["activation"]) == ("fp16", "quickgelu")
    assert re.fullmatch("[0-9a-f]{64}", manifest["source"]["sha256"])
    assert [photo["name"] for photo in manifest["golden"]["photos"]] == list(GOLDEN_PHOTOS)
    assert 300e6 < sum(path.stat().st_size for path in baked.iterdir()) < 310e6


@pytest.mark.parametrize("name", ["image.safetensors", "manifest.json"])
def test_a_worker_does_not_start_from_a_file_that_was_tampered_with(copy, tmp_path, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    (line,), _ = refusal(env_of(tmp_path, copy))
    assert "Cannot start: the serving artifact" in line and "damaged" in line


def test_vectors_other_than_the_golden_ones_stop_the_worker(copy, tmp_path):
    golden = json.loads((copy / "manifest.json").read_text())["manifest"]["golden"]
    rows = [photo["row"] for photo in golden["photos"]]
    for photo, row in zip(golden["photos"], rows[1:] + rows[:1], strict=True):
        photo["row"] = row
    change_manifest(copy, golden=golden)
    _, worker = refusal(env_of(tmp_path, copy))
    lines = [line for line in worker.output.splitlines() if "Fitness check failed" in line]
    assert len(lines) == 1 and "decoding or preprocessing does not give" in lines[0]


def test_photographs_other_than_the_golden_ones_stop_the_worker(copy, tmp_path):
    golden = json.loads((copy / "manifest.json").read_text())["manifest"]["golden"]
    golden["photos"][0]["sha256"] = "0" * 64
    change_manifest(copy, golden=golden)
    (line,), _ = refusal(env_of(tmp_path, copy))
    assert "not those of this package" in line


def test_a_worker_configured_for_other_weights_does_not_serve_the_baked_ones(baked, tmp_path):
    env = env_of(tmp_path, baked, CLIP_PRETRAINED="laion2b_s34b_b79k")
    (line,), worker = refusal(env)
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
    command = [*BAKE, "--to", str(tmp_path / "clip")]
    env = plain_env(tmp_path, HF_HOME=str(tmp_path / "no-hub"))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not os.path.exists(tmp_path / "clip")
    assert done.stderr.splitlines()[-1].startswith("[ERROR] No weights: CLIP_PRETRAINED='openai'")


# The weights are known by their digest


def hub_with(folder: Path, revision: str) -> str:
    """Build a hub's cache that has the seeded weights as the tag's file, at one commit."""
    hub_env(folder)
    repository = folder / f"models--{REPO.replace('/', '--')}"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision / FILE).symlink_to(seeded_file().resolve())
    return str(folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library contacts nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(pretrained: str, sha256: str = "", cache_dir: str | None = None) -> str:
    """Load weights that must be refused before one is read; return the reason."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelError) as caught:
        patch.setattr(weights, "_read_weights", None)
        weights.load_pinned("ViT-B-32", pretrained, sha256=sha256, cache_dir=cache_dir)
    return str(caught.value)


def test_other_weights_under_the_tag_are_refused(tmp_path, offline):
    reason = refused("openai", cache_dir=hub_with(tmp_path, REVISION))
    assert seeded_digest() in reason and f"{PINNED} is pinned" in reason


def test_another_revision_of_the_tag_is_not_used(tmp_path, offline):
    reason = refused("openai", cache_dir=hub_with(tmp_path, "0" * 40))
    assert reason.startswith("CLIP_PRETRAINED='openai' is neither in the hub")


def test_a_tag_without_a_pinned_digest_is_refused(tmp_path):
    reason = refused("laion2b_s34b_b79k", cache_dir=hub_with(tmp_path, REVISION))
    assert "has no pinned digest" in reason and "CLIP_SHA256" in reason


@pytest.mark.parametrize("sha256", ["0" * 64, "abc", "sha256:" + "0" * 64])
def test_a_checkpoint_with_another_digest_than_the_given_one_ends_the_build(
    tmp_path, capsys, sha256
):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")  # without tensors
    options = ["--pretrained", str(path), "--activation", "gelu", "--sha256", sha256]
    assert artifact.main(["--to", str(tmp_path / "clip"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is pinned" in line or "64 hexadecimal digits" in line
    assert not (tmp_path / "clip").exists()


def test_golden_vectors_are_made_of_the_pinned_weights_only(tmp_path, offline):
    path = Path(__file__).parents[2] / "tools" / "golden.py"
    tool = runpy.run_path(str(path))["golden"]
    with pytest.raises(ModelError, match=f"{PINNED} is pinned"):
        tool("ViT-B-32", "openai", [], hub_with(tmp_path, REVISION))
    with pytest.raises(ModelError, match=f"{PINNED} is pinned"):
        tool("ViT-B-32", str(seeded_file()), [], sha256=PINNED)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_openais_weights_are_pinned_by_the_published_digest(model):
    pin = weights._pin_of(model, weights._find_tag(model, "openai"), "")
    assert (pin.sha256, pin.revision) == (PINNED, REVISION)


def test_each_pin_is_of_one_repository():
    pins = weights._PINS.items()
    weights_of = {weights._find_tag(*name).facts["hf_hub"]: pin for name, pin in pins}
    assert len({pin.sha256 for pin in weights_of.values()}) == len(weights_of) == 2
    assert all(re.fullmatch("[0-9a-f]{40}", pin.revision) for pin in weights_of.values())


def test_a_file_that_is_swapped_after_its_digest_was_compared_is_not_served(tmp_path, monkeypatch):
    path, read = tmp_path / "weights.safetensors", weights._read_weights
    save_file(read(seeded_file()), path, metadata={"activation": "quickgelu"})

    def swap_and_read(path: Path) -> dict:
        state = read(path)
        state["visual.proj"] = state["visual.proj"] + 1
        save_file(state, path, metadata={"activation": "quickgelu"})
        return read(path)

    monkeypatch.setattr(weights, "_read_weights", swap_and_read)
    loaded = weights.load_pinned("ViT-B-32", str(path), sha256=weights.file_digest(path))
    with pytest.raises(ModelError, match="was replaced while it was read"):
        artifact._source_of(loaded)
