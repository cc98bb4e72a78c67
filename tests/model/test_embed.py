"""The image embedder compared with open_clip itself, loaded as in production."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import seeded
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file

from heimdex_clip_worker.errors import InferenceFailed, ModelError
from heimdex_clip_worker.model import image as embed
from heimdex_clip_worker.model import weights
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.model.weights import check_model
from heimdex_clip_worker.serving.decode import PixelLimits, decode

pytestmark = pytest.mark.model

PHOTOS = photographs()


def photo(index: int) -> Image.Image:
    return Image.open(PHOTOS[index]).convert("RGB")


def file_of(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def sixteen_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L"), dtype=np.uint16)
    return Image.fromarray(grey * 257)  # 0..65535


def with_alpha(image: Image.Image) -> Image.Image:
    faded = image.copy()
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    return faded


# the same photographs in many forms: name -> (bytes, the image given to open_clip)
def variants() -> dict[str, tuple[bytes, Image.Image]]:
    made = {p.stem: p.read_bytes() for p in PHOTOS} | {
        "progressive": file_of(photo(0).resize((1920, 1080)), "JPEG", progressive=True),
        "cmyk": file_of(photo(1).convert("CMYK"), "JPEG", quality=90),
        "grey jpeg": file_of(photo(2).convert("L").resize((300, 900)), "JPEG"),
        "palette png": file_of(photo(3).quantize(64), "PNG"),
        "alpha png": file_of(with_alpha(photo(4)), "PNG"),
        "grey and alpha png": file_of(with_alpha(photo(5)).convert("LA"), "PNG"),
        "black and white png": file_of(photo(6).convert("1"), "PNG"),
        "webp": file_of(photo(7).resize((1200, 301)), "WEBP", quality=80),
        "alpha webp": file_of(with_alpha(photo(8)), "WEBP", lossless=True),
        "gif": file_of(photo(9).quantize(128), "GIF"),
        "avif": file_of(photo(3), "AVIF"),
        "tiny": file_of(photo(4).resize((37, 23)), "PNG"),
    }
    pairs = {n: (data, Image.open(io.BytesIO(data)).convert("RGB")) for n, data in made.items()}
    deep = file_of(sixteen_bit(photo(5)), "PNG")
    pairs["16-bit grey png"] = (deep, photo(5).convert("L").convert("RGB"))
    return pairs


@pytest.fixture(scope="module")
def arrivals() -> dict[str, tuple[bytes, Image.Image]]:
    return variants()


@pytest.fixture(scope="module")
def references(
    seeded_hub: Path, arrivals: dict[str, tuple[bytes, Image.Image]]
) -> dict[str, torch.Tensor]:  # quickgelu, gelu -> (N, 512) unit rows
    """open_clip's own vectors of the arrivals; with plain GELU, of the first ones only."""
    rows = {}
    for name, quick in (("quickgelu", True), ("gelu", False)):
        model, _, transform = open_clip.create_model_and_transforms(
            "ViT-B-32", "openai", force_quick_gelu=quick, cache_dir=str(seeded_hub)
        )
        images = [image for _, image in arrivals.values()][: None if quick else len(PHOTOS)]
        pixels = torch.stack([transform(image) for image in images])
        with torch.inference_mode():
            rows[name] = model.eval().encode_image(pixels, normalize=True)
    return rows


@pytest.fixture(scope="module")
def vectors(
    embedder: Embedder, arrivals: dict[str, tuple[bytes, Image.Image]]
) -> torch.Tensor:  # (N, 512)
    images = [decode(data, PixelLimits()) for data, _ in arrivals.values()]
    return torch.tensor(embedder.embed(images))


def test_every_mode_and_format_has_open_clips_vector(arrivals, vectors, references):
    cosines = (vectors * references["quickgelu"]).sum(1)
    assert dict(zip(arrivals, cosines.tolist(), strict=True)) == {
        name: pytest.approx(1, abs=1e-5) for name in arrivals
    }


def test_no_vector_is_that_of_plain_gelu(vectors, references):
    assert (vectors[: len(PHOTOS)] * references["gelu"]).sum(1).max() < 0.999


def test_different_photographs_have_different_vectors(vectors):
    similar = vectors[: len(PHOTOS)] @ vectors[: len(PHOTOS)].T
    assert (similar - torch.eye(len(PHOTOS))).max() < 0.99


def test_pixels_equal_open_clips_bit_for_bit(embedder, arrivals):
    transform = open_clip.image_transform(224, is_train=False)
    for data, image in arrivals.values():
        pixels = embedder.preprocess(decode(data, PixelLimits()))[None]
        assert torch.equal(embedder.prepare(pixels)[0], transform(image))


def test_vectors_are_unit_rows_of_plain_floats(vectors, embedder):
    assert (vectors.double().norm(dim=1) - 1).abs().max() < 1e-6
    (vector,) = embedder.embed([photo(0)])
    assert {type(x) for x in vector} == {float} and json.loads(json.dumps(vector)) == vector


def test_an_image_has_the_same_vector_alone_and_in_a_batch(embedder, vectors, arrivals):
    alone = torch.tensor(embedder.embed([photo(0)]))
    assert torch.allclose(alone[0], vectors[list(arrivals).index(PHOTOS[0].stem)], atol=1e-5)


def test_normalize_is_honoured_for_each_image(embedder):
    unit, raw = torch.tensor(embedder.embed([photo(0), photo(0)], [True, False]))
    assert torch.allclose(raw / raw.norm(), unit, atol=1e-6) and (raw.norm() - 1).abs() > 0.1


def test_only_the_image_tower_is_in_memory(embedder):
    parts = 768  # of a row inside; the class token and its place are kept as one
    assert sum(p.numel() for p in embedder.tower.parameters()) == 87_849_216 - parts
    assert not any(p.requires_grad for p in embedder.tower.parameters())


def test_an_extremely_long_image_is_prepared_cheaply(embedder):
    assert embedder.preprocess(Image.new("RGB", (1, 16_384), "red")).shape == (3, 224, 224)


def test_the_tag_loads_offline_with_only_environment_variables(vectors, arrivals, tmp_path):
    """A process of its own: the hub library reads its variables when it is imported."""
    code = f"""
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from heimdex_clip_worker.model.image import Embedder
e = Embedder.load("ViT-B-32", "openai", device="cpu", precision="fp32", preprocess="exact")
assert (e.pretrained, e.activation, e.dim, e.image_size) == ("openai", "quickgelu", 512, 224)
print(e.embed([Image.open({str(PHOTOS[0])!r}).convert("RGB")])[0])
"""
    env = {**os.environ, **seeded.hub_env(tmp_path), "PYTHONPATH": str(seeded.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = vectors[list(arrivals).index(PHOTOS[0].stem)]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5)


# --- other architectures ------------------------------------------------------


@pytest.mark.parametrize(
    ("model_name", "activation", "suffix"),
    [
        ("ViT-S-32-alt", "gelu", ".pt"),
        ("RN50", "auto", ".pt"),
        ("coca_ViT-B-32", "quickgelu", ".safetensors"),
        ("ViTamin-S", "auto", ".safetensors"),
        ("MobileCLIP2-S0", "auto", ".safetensors"),
    ],
)
def test_other_towers_equal_open_clips(model_name, activation, suffix, tmp_path):
    torch.manual_seed(0)
    options = {"force_quick_gelu": activation == "quickgelu", "pretrained_text": False}
    model = open_clip.create_model(model_name, **options).eval()
    tensors = {n: t for n, t in model.state_dict().items() if n.startswith("visual.")}
    path = seeded.write_checkpoint(tmp_path / f"seeded{suffix}", tensors)
    exact = {"device": "cpu", "precision": "fp32", "preprocess": "exact"}
    loaded = Embedder.load(model_name, str(path), activation=activation, **exact)
    pixels = torch.stack([loaded.preprocess(photo(i)) for i in (0, 3)])
    with torch.inference_mode():
        expected = model.encode_image(loaded.prepare(pixels), normalize=False)
    rows = loaded.encode(pixels)
    assert rows.shape == (2, loaded.dim)
    assert torch.cosine_similarity(rows, expected).min() > 0.99999
    assert loaded.pretrained == "seeded"


# --- refusals -------------------------------------------------


@pytest.fixture(scope="module")
def state(seeded_hub: Path) -> dict[str, torch.Tensor]:
    """The image tower of the seeded weights."""
    weights = load_file(seeded.seeded_file())
    return {n: t for n, t in weights.items() if n.startswith("visual.")}


def refusal(model_name: str, path: Path | str, **options: str) -> str:
    """Load what must be refused; return the one line of the error."""
    with pytest.raises(ModelError) as caught:
        Embedder.load(model_name, str(path), **{"device": "cpu", **options})
    line = str(caught.value)
    assert "\n" not in line and line.startswith("CLIP_"), line
    return line


def test_a_file_without_evidence_is_refused_with_both_ways_out(state, tmp_path):
    path = seeded.write_checkpoint(tmp_path / "silent.safetensors", state)
    line = refusal("ViT-B-32", path)
    assert "CLIP_ACTIVATION" in line and "CLIP_MODEL_NAME=ViT-B-32-quickgelu" in line
    assert check_model("ViT-B-32", str(path)) == [line]
    assert Embedder.load("ViT-B-32-quickgelu", str(path)).activation == "quickgelu"


def test_contradicting_evidence_is_refused(state, tmp_path):
    path = seeded.write_checkpoint(tmp_path / "w.safetensors", state, activation="gelu")
    assert "disputed" in refusal("ViT-B-32-quickgelu", path)
    assert "disputed" in refusal("ViT-B-32", path, activation="quickgelu")
    assert "disputed" in refusal("ViT-B-32", "openai", activation="gelu")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {}})
    )
    assert "open_clip_config.json says quickgelu" in refusal("ViT-B-32", path)


def test_the_config_beside_a_file_sets_activation_and_preprocessing(seeded_hub, tmp_path):
    loaded = Embedder.load("ViT-B-32", str(seeded.seeded_file()), device="cpu")
    assert (loaded.activation, loaded.pretrained) == ("quickgelu", "open_clip_model")
    squashed = {"model_cfg": {}, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(squashed))
    assert weights._file_facts("ViT-B-32", tmp_path / "w.pt") == {"resize_mode": "squash"}


def test_weights_that_do_not_fit_are_refused(state, tmp_path):
    options = {"activation": "quickgelu"}
    path = tmp_path / "w.safetensors"
    seeded.write_checkpoint(path, state)
    assert "positional_embedding" in refusal("ViT-B-32-256", path, **options)
    assert "missing" in refusal("ViT-L-14", path, **options)
    seeded.write_checkpoint(path, {n: t for n, t in state.items() if n != "visual.proj"})
    assert "1 missing (proj)" in refusal("ViT-B-32", path, **options)
    seeded.write_checkpoint(path, {**state, "visual.extra": torch.zeros(1)})
    assert "1 unknown (extra)" in refusal("ViT-B-32", path, **options)
    seeded.write_checkpoint(path, {"something": torch.zeros(1)})
    assert "152 missing" in refusal("ViT-B-32", path, **options)


def test_damaged_files_are_refused(seeded_hub, tmp_path):
    whole = seeded.seeded_file().read_bytes()
    noise = bytes(range(255, 0, -1))
    contents = {"empty": b"", "noise": noise, "torn": whole[:1_000_000], "page": b"<html>"}
    for name, data in contents.items():
        for suffix in (".safetensors", ".pt", ".bin"):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(data)
            assert "cannot be read" in refusal("ViT-B-32", path, activation="quickgelu")
    not_by_name = tmp_path / "tensor.pt"
    torch.save(torch.zeros(3), not_by_name)
    assert "152 missing" in refusal("ViT-B-32", not_by_name, activation="quickgelu")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, options in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save({"visual.proj": Evil()}, path := tmp_path / name, **options)
        assert "nothing in it was run" in refusal("ViT-B-32", path, activation="gelu")
    assert not (tmp_path / "ran").exists()


def test_only_openais_own_torchscript_archives_are_opened(tmp_path, monkeypatch):
    class Archive(torch.nn.Module):
        def forward(self, x):
            return x

    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(Archive()), path)
    assert zipfile.is_zipfile(path)
    assert "none of OpenAI's own" in refusal("ViT-B-32", path)
    assert "none of OpenAI's own" in refusal("ViT-B-32", path, activation="quickgelu")
    assert "none of OpenAI's own" in refusal("RN50", path)
    monkeypatch.setattr(weights, "_check_archive", lambda path: None)
    assert weights._file_evidence(path) == {"OpenAI's archive": "quickgelu"}
    assert "152 missing" in refusal("ViT-B-32", path)


def test_an_unreachable_hub_is_an_error_and_never_replaced_by_random_weights(tmp_path):
    line = refusal("ViT-B-32", "openai", cache_dir=str(tmp_path))
    assert line.startswith("CLIP_PRETRAINED='openai' is neither in the hub cache")
    assert "https://huggingface.co/timm/vit_base_patch32_clip_224.openai:" in line


_NO_FILE = RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(("error", "last"), [(_NO_FILE, "bin"), (OSError("down"), "safetensors")])
def test_another_file_is_tried_if_the_hub_has_not_the_first(error, last, tmp_path, monkeypatch):
    names = []

    def download(filename: str, **options: object) -> None:
        names.append(filename)
        raise error

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    line = refusal("ViT-B-32", "openai", cache_dir=str(tmp_path))
    assert names[-1].endswith(last) and line.endswith(f"({type(error).__name__}: {error})")


def test_an_error_that_is_cut_ends_in_dots():
    assert weights.in_one_line(OSError("a\nb")) == "OSError: a b"
    assert weights.in_one_line(OSError("a" * 300)) == "OSError: " + "a" * 188 + "..."


def test_a_damaged_file_in_the_hub_cache_is_refused(tmp_path):
    repo = tmp_path / f"models--{seeded.REPO.replace('/', '--')}"
    file = repo / "snapshots" / seeded.REVISION / seeded.FILE
    file.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(seeded.REVISION)
    file.write_bytes(b"half a download")
    assert "cannot be read" in refusal("ViT-B-32", "openai", cache_dir=str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_and_auto_uses_the_cpu():
    assert refusal("ViT-B-32", "openai", device="cuda").startswith("CLIP_DEVICE='cuda'")
    assert str(embed.pick_device("auto")) == "cpu"


@pytest.mark.parametrize(
    ("model_name", "pretrained", "message"),
    [
        ("ViT-B/32", "openai", "CLIP_MODEL_NAME='ViT-B/32'.*did you mean ViT-B-32"),
        ("hf-hub:timm/x", "openai", "CLIP_MODEL_NAME='hf-hub:timm/x' is not a model"),
        ("ViT-B-32", "laion", "CLIP_PRETRAINED='laion'.*tags: openai, laion400m_e31"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "CLIP_PRETRAINED=.*is not a tag of"),
        ("ViT-M-32", "openai", r"its tags: none\); a checkpoint file is given by its path"),
        ("ViT-B-32", "/nowhere/w.pt", "CLIP_PRETRAINED='/nowhere/w.pt' is not a file"),
        ("ViT-B-32", "weights.onnx", "CLIP_PRETRAINED='weights.onnx' must end in"),
    ],
)
def test_a_wrong_name_is_found_before_loading(model_name, pretrained, message):
    (problem,) = check_model(model_name, pretrained, "auto")
    assert re.search(message, problem)


def test_every_published_tag_passes_the_check():
    assert [p for m, tag in open_clip.list_pretrained() for p in check_model(m, tag, "auto")] == []


# --- failures while running ---------------------------------------------------


class Broken(torch.nn.Module):
    """A tower that returns one value, or raises one error."""

    def __init__(self, outcome: float | Exception):
        super().__init__()
        self.outcome = outcome

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return torch.full((len(pixels), 4), self.outcome)


def failing(outcome: float | Exception) -> Embedder:
    transform = embed.make_transform({}, 8)
    return Embedder(Broken(outcome), transform, "fake", "fake", "fixed", 4, 8, "cpu")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_without_direction_is_never_returned(value, normalize):
    with pytest.raises(InferenceFailed) as caught:
        failing(value).embed([photo(0)], normalize)
    assert str(caught.value) == "Inference failed" and not caught.value.fatal


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu"), False),
        (torch.AcceleratorError("something that no list has"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.cuda.DeferredCudaCallError("CUDA call failed lazily with error: x"), True),
        (RuntimeError("CUDA driver error: invalid argument"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (RuntimeError("The NVIDIA driver on your system is too old"), True),
        (RuntimeError("Failed to initialize NVML: Driver/library version mismatch"), True),
    ],
)
def test_only_a_lost_device_is_fatal(error, fatal):
    with pytest.raises(InferenceFailed) as caught:
        failing(error).warm_up()
    assert caught.value.fatal is fatal and caught.value.detail.startswith(type(error).__name__)


@pytest.mark.parametrize(
    ("probe", "fatal"),
    [
        (None, False),
        (RuntimeError("words that no list has"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_device_that_computes_nothing_is_lost_whatever_it_said(monkeypatch, probe, fatal):
    def ones(size: int, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        if probe:
            raise probe
        return torch.full((size,), 1.0)

    monkeypatch.setattr(embed, "_move", lambda batch, device: batch)
    monkeypatch.setattr(torch, "ones", ones)
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(InferenceFailed) as caught:
        embed.run_tower(Broken(RuntimeError("some words of a driver")), pixels, "cuda")
    assert caught.value.fatal is fatal


SHAPES, ASSERT = "mat1 and mat2 shapes cannot be multiplied", "CUDA error: device-side assert"


@pytest.mark.parametrize("text, is_kept", [(SHAPES, False), (ASSERT, True)], ids=["shapes", "lost"])
def test_what_a_lost_device_held_is_never_freed(text, is_kept):
    seen = []

    class Holding(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> None:
            held = Image.new("RGB", (1, 1))  # in place of a tensor on the device
            seen.append(weakref.ref(held))
            raise RuntimeError(text)

    with pytest.raises(InferenceFailed) as caught:
        embed.run_tower(Holding(), torch.zeros(1, 3, 8, 8), "cpu")
    assert caught.value.fatal is is_kept
    del caught
    gc.collect()
    assert (seen[0]() is not None) is is_kept


ENDS = """
import os, torch
from heimdex_clip_worker.errors import InferenceFailed
from heimdex_clip_worker.model.image import run_tower

class Tensor:  # of a lost device: its destructor aborts the process
    __del__ = lambda self: os.abort()

def tower(pixels):
    held = Tensor()
    raise RuntimeError("CUDA error: device-side assert triggered")

try:
    run_tower(tower, torch.zeros(1, 3, 8, 8), "cpu")
except InferenceFailed as error:
    print(error.fatal)
"""


def test_a_process_that_lost_its_device_ends_as_any_other():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


def test_torch_without_its_accelerator_error_is_served_too(monkeypatch):
    monkeypatch.setattr(embed, "_ACCELERATOR_ERROR", ())
    with pytest.raises(InferenceFailed) as caught:
        failing(RuntimeError("CUDA error: misaligned address")).warm_up()
    assert caught.value.fatal


@pytest.mark.parametrize(("device", "count"), [("cuda:1", 1), ("cpu", 0)])
def test_tf32_is_forbidden_on_a_gpu_before_weights_are_read(monkeypatch, device, count):
    calls = []

    def stop(*arguments: object) -> None:
        raise ModelError("no weights are read here")

    monkeypatch.setattr(embed, "pick_device", torch.device)
    for name in ("forbid_tf32", "_forbid_cudnn_attention"):
        monkeypatch.setattr(embed, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(embed, "load_model", stop)
    with pytest.raises(ModelError, match="no weights"):
        Embedder.load("ViT-B-32", "openai", device=device)
    assert calls == ["forbid_tf32", "_forbid_cudnn_attention"] * count


def test_cudnns_attention_is_switched_off():
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        embed._forbid_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)
