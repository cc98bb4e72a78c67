"""Seeded weights in a cache of the Hugging Face hub: the tag `openai` without the internet.

The weights are those of `nbs/03e_golden.ipynb`: random, always the same, and exact in float16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from heimdex_clip_worker.model.golden import seeded_state

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "seeded-hub"  # an HF_HOME; git-ignored, built once, about 300 MB
REPO = "timm/vit_base_patch32_clip_224.openai"  # as open_clip 3.3.0 asks for ViT-B-32, openai
FILE = "open_clip_model.safetensors"
REVISION = hashlib.sha1(b"seeded weights, version 1").hexdigest()  # raise it to rebuild the cache


def write_checkpoint(
    path: Path,  # ends in .safetensors, or is a pickle of a state dict
    state: dict,  # name -> tensor
    activation: str | None = None,  # for the header of a .safetensors; None: not stated
) -> Path:
    """Write a checkpoint file; return its path."""
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"activation": activation} if activation else None)
    else:
        torch.save(state, path)
    return path


def seeded_hub() -> Path:
    """Build a hub cache with seeded weights for the tag `openai`, once; return its folder."""
    if not seeded_file().is_file():
        CACHE.parent.mkdir(exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="seeded-hub-", dir=CACHE.parent))
        try:
            _build(building / "hub" / f"models--{REPO.replace('/', '--')}")
            _put(building)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return CACHE / "hub"


def seeded_file() -> Path:
    """Name the file of the seeded weights in that cache."""
    folder = f"models--{REPO.replace('/', '--')}"
    return CACHE / "hub" / folder / "snapshots" / REVISION / FILE


def hub_env(home: Path) -> dict[str, str]:
    """Build the environment of a process that uses this cache, and `home` for its other files."""
    hub = str(seeded_hub())
    return {"HF_HOME": str(home / "huggingface"), "HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": "1"}


def _build(repo: Path) -> None:
    """Write one repository: blobs by digest, a snapshot of links to them, a ref to the snapshot."""
    import open_clip

    facts = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    described = {"model_cfg": open_clip.get_model_config("ViT-B-32") | {"quick_gelu": True}}
    described["preprocess_cfg"] = {
        key: facts[key] for key in ("mean", "std", "interpolation", "resize_mode")
    }
    snapshot, blobs = repo / "snapshots" / REVISION, repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    write_checkpoint(snapshot / FILE, seeded_state())
    (snapshot / "open_clip_config.json").write_text(json.dumps(described))
    for file in sorted(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)


def _put(building: Path) -> None:
    """Rename a finished cache into its place, unless another process was first."""
    if CACHE.exists() and not seeded_file().is_file():  # of an earlier version
        shutil.rmtree(CACHE)
    try:
        building.rename(CACHE)
    except OSError:  # another process was first
        if not seeded_file().is_file():
            raise
