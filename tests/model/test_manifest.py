"""The manifest of a serving artifact: each altered part is refused; what its format stands for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.model import artifact, golden, tower
from heimdex_clip_worker.model.photos import GOLDEN_PHOTOS, PHOTOS
from heimdex_clip_worker.model.preprocess import Preparation
from heimdex_clip_worker.model.weights import file_digest

pytestmark = pytest.mark.model

NUMBERS = {"width": 8, "layers": 1, "heads": 2, "hidden": 16, "dim": 4, "activation": "quickgelu"}
SPACE = "0123456789abcdef"


def row(length: int = 4, norm: float = 1.0) -> str:
    """Write a golden row."""
    return golden.row_to_text(torch.tensor([norm] + [0.0] * (length - 1)))


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """The content of a valid manifest; it is in `tmp_path`, with the weights it names."""
    photos = [golden._Photo(name, file_digest(PHOTOS / name), row()) for name in GOLDEN_PHOTOS]
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"weights")
    source = artifact._Source(str(checkpoint), "", "", 7, 0, 0, 0, file_digest(checkpoint))
    manifest = artifact._Manifest(
        format=2,
        model_name="small",
        pretrained=str(checkpoint),
        asked="auto",
        precision="fp16",
        name="checkpoint",
        activation="quickgelu",
        preparation=Preparation(32, (0.5,) * 3, (0.5,) * 3),
        image=tower.ImageShape(**NUMBERS, image_size=32, patch_size=16),
        text=tower.TextShape(**NUMBERS, context_length=8, vocab_size=100),
        space_id=SPACE,
        source=source,
        files={"image.safetensors": "0" * 64, "text.safetensors": "1" * 64},
        golden=golden.Golden((row(),) * 3, tuple(photos), row(), 1e-4),
        made_with={"torch": "2"},
    )
    artifact._write_manifest(manifest, tmp_path)
    return json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["manifest"]


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the digest that fits it."""
    digest = hashlib.sha256(artifact._canonical_json(content)).hexdigest()
    text = json.dumps({"digest": digest, "manifest": content})
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    """Copy nested lists and dictionaries with one place changed; None removes it."""
    if not path:
        return to
    copy = value.copy()
    if to is None and len(path) == 1:
        del copy[path[0]]
    else:
        old = copy[path[0]] if isinstance(copy, list) or path[0] in copy else None
        copy[path[0]] = changed(old, path[1:], to)
    return copy


ALTERED = [
    ("format", ("format",), 1),
    ("format", ("format",), 3),
    ("precision", ("precision",), "fp8"),
    ("precision", ("precision",), ""),
    ("activation", ("activation",), "gelu"),
    ("activation", ("image", "activation"), "gelu"),
    ("preparation", ("preparation", "size"), 16),
    ("preparation", ("image", "image_size"), 64),
    ("preparation", ("preparation", "interpolation"), "bilinear"),
    ("preparation", ("preparation", "resize_mode"), "squash"),
    ("space_id", ("space_id",), SPACE[:15]),
    ("space_id", ("space_id",), SPACE + "0"),
    ("space_id", ("space_id",), SPACE.upper()),
    ("space_id", ("space_id",), SPACE + "\n"),
    ("space_id", ("space_id",), ""),
    ("files", ("files", "text.safetensors"), None),
    ("files", ("files", "image.safetensors"), None),
    ("files", ("files", "../other.safetensors"), "2" * 64),
    ("golden", ("golden", "photos"), []),
    ("golden", ("golden", "text"), row(5)),
    ("golden", ("golden", "photos", 2, "row"), row(3)),
    ("golden", ("golden", "image", 0), row(5)),
    ("golden", ("image", "dim"), 5),
    ("golden row", ("golden", "photos", 0, "row"), row(norm=1.01)),
    ("golden row", ("golden", "image", 2), row(norm=float("nan"))),
    ("golden row", ("golden", "text"), row(norm=0.99)),
]
NAMES = [f"{'.'.join(map(str, path))}-{number}" for number, (_, path, _) in enumerate(ALTERED)]


@pytest.mark.parametrize(("part", "path", "to"), ALTERED, ids=NAMES)
def test_an_altered_part_is_refused(part, path, to, content, tmp_path, caplog) -> None:
    settings = (content["model_name"], content["pretrained"], "auto", "fp16")
    assert artifact.find(tmp_path, *settings) is not None  # the one that is not altered
    write(tmp_path, changed(content, path, to))
    with pytest.raises(ValueError, match=rf"its {part} is not possible|a {part} has not"):
        artifact._read_manifest(tmp_path)
    with pytest.raises(ModelError, match="is damaged: "):  # part of an image
        artifact.find(tmp_path, *settings)


def test_an_artifact_that_can_be_made_again_is_not_used(content, tmp_path, caplog) -> None:
    settings = (content["model_name"], content["pretrained"], "auto", "fp16")
    folder = tmp_path / "shelf" / artifact._folder_name(*settings)
    folder.mkdir(parents=True)
    write(folder, content)
    assert artifact.find(tmp_path / "shelf", *settings) is not None
    write(folder, content | {"format": 1})
    assert artifact.find(tmp_path / "shelf", *settings) is None
    assert "its format is not possible" in caplog.text


def test_without_a_text_tower_there_is_no_file_and_no_vector_of_it(content, tmp_path) -> None:
    images = {"image.safetensors": "0" * 64}
    write(tmp_path, content | {"text": None, "files": images})
    assert artifact._read_manifest(tmp_path).text is None
    write(tmp_path, content | {"text": None})
    with pytest.raises(ValueError, match="its files is not possible"):
        artifact._read_manifest(tmp_path)


PIXELS = "321e6596a2e3465510e3b1404664a2f7af3796d27d0ba90683e2eca3005b9373"  # sha256
TOKENS = [49406, 11, 7930, 31687, 21876, 27903, 362, 38065, 42200, 49407]
PHOTOGRAPHS = {
    "chelsea.jpg": "fc898c685c70",
    "retina.jpg": "21502793eb1d",
    "clock.png": "7350ff5256b7",
}  # the first digits of each sha256
FIELDS = [
    "format", "model_name", "pretrained", "asked", "precision", "name", "activation",
    "preparation", "image", "text", "space_id", "source", "files", "golden", "made_with",
]  # fmt: skip
NESTED = {
    "preparation": ["size", "mean", "std", "interpolation", "resize_mode"],
    "image": [*NUMBERS, "image_size", "patch_size"],
    "text": [*NUMBERS, "context_length", "vocab_size"],
    "source": ["file", "revision", "beside", "size", "mtime_ns", "ctime_ns", "inode", "sha256"],
    "golden": ["image", "photos", "text", "drift"],
}


def test_the_format_stands_for_these_fields(content) -> None:
    """Artifacts on disk have them: change them only together with the format."""
    fields = {part: list(content[part]) for part in NESTED}
    assert (content["format"], list(content), fields) == (artifact._FORMAT, FIELDS, NESTED) == (
        2, FIELDS, NESTED
    )  # fmt: skip


def test_the_format_stands_for_these_golden_inputs() -> None:
    """Artifacts on disk were compared with their vectors: change them only with the format."""
    pixels = golden.golden_pixels(224).numpy().tobytes()
    shape = tower.TextShape(512, 12, 8, 2048, 512, "gelu", 77, 49_408)
    (tokens,) = golden.golden_tokens(shape).tolist()
    photos = {name: file_digest(PHOTOS / name)[:12] for name in GOLDEN_PHOTOS}
    inputs = (hashlib.sha256(pixels).hexdigest(), tokens, photos)
    padded = TOKENS + [0] * (77 - len(TOKENS))
    assert (artifact._FORMAT, *inputs) == (2, PIXELS, padded, PHOTOGRAPHS)
    assert list(photos) == list(PHOTOGRAPHS)


def test_the_allowed_drift_is_that_of_the_documents() -> None:
    assert golden.DRIFT == {"fp32": 1e-5, "fp16": 1e-4, "bf16": 5e-4}
    assert golden._FAST == 2e-5
