"""Preprocessing against open_clip's own: equal if exact, and close enough if fast."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import heimdex_clip_worker
from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.errors import ImageLimits
from heimdex_clip_worker.preprocess import (
    LARGE,
    Preparation,
    draft_size,
    exact,
    fast,
    one_torch_thread,
    to_model,
    trim,
)

PHOTOS = sorted((Path(heimdex_clip_worker.__file__).parent / "photos").glob("*.[jp][pn]g"))
OPENAI = Preparation(
    224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
LIMITS = PixelLimits()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, values)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def enlarged(path: Path, size: tuple[int, int]) -> bytes:
    """Return a photograph as a large camera's JPEG, its proportions kept."""
    with Image.open(path) as image:
        width, height = image.size
        longest = max(size) / max(width, height)
        size = (round(width * longest), round(height * longest))
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grain = Image.effect_noise(size, 40).convert("RGB")
    return encoded(Image.blend(large, grain, 0.1), quality=85)


def reference(preparation: Preparation):
    """Return open_clip's own transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(
        size=preparation.size, mean=preparation.mean, std=preparation.std, mode="RGB"
    )
    return image_transform_v2(config, is_train=False)


# Exact


@pytest.mark.parametrize("seed", range(24))
def test_exact_is_open_clips_at_any_size(seed):
    choose = random.Random(seed)
    size = choose.randint(1, 700), choose.randint(7, 700)
    image = noise(size, seed)
    preparation = Preparation(choose.choice((224, 336, 225, 63)), (0.5,) * 3, (0.25, 0.5, 0.3))
    got = to_model(exact(image, preparation)[None], preparation, torch.float32)[0]
    assert torch.equal(got, reference(preparation)(trim(image))), size


@pytest.mark.parametrize("size", [(3, 500), (1, 16_384), (9000, 40)])
def test_the_middle_of_a_very_long_image_is_exact(size):
    image = noise(size)
    got = to_model(exact(image, OPENAI), OPENAI, torch.float32)
    assert torch.equal(got, reference(OPENAI)(trim(image)))


def test_the_models_precision_comes_last():
    pixels = exact(noise((300, 200)), OPENAI)[None]
    whole = to_model(pixels, OPENAI, torch.float32)
    assert torch.equal(to_model(pixels, OPENAI, torch.bfloat16), whole.bfloat16())
    assert pixels.dtype == torch.uint8


# Fast


def vectors(embedder, pixels: list[torch.Tensor]) -> torch.Tensor:
    """Return what the seeded model makes of pixels, in rows of length 1."""
    rows = embedder.encode(to_model(torch.stack(pixels), OPENAI, torch.float32))
    return torch.nn.functional.normalize(rows.double(), dim=1)


@pytest.mark.parametrize("size", [None, (1920, 1920), (4000, 4000)], ids=["native", "2k", "4k"])
def test_the_model_cannot_tell_fast_from_exact(embedder, size):
    files = [enlarged(path, size) if size else path.read_bytes() for path in PHOTOS]
    small = {"at_least": draft_size(OPENAI)}
    slow = vectors(embedder, [exact(decode(data, LIMITS), OPENAI) for data in files])
    quick = vectors(embedder, [fast(decode(data, LIMITS, **small), OPENAI) for data in files])
    cosines = (slow * quick).sum(dim=1)
    print(*(f"{p.stem} {1 - c:.1e}" for p, c in zip(PHOTOS, cosines.tolist(), strict=True)))
    assert cosines.min() >= 0.9999  # what makes it the default


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (one.float() - other.float()).square().mean()))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [(4000, 2669), (3593, 2411), (7000, 4689), (2001, 898)])
def test_a_scaled_jpeg_is_not_shifted(size, turned):
    """Sizes that no scale divides, in a photograph with fine detail."""
    with Image.open(next(p for p in PHOTOS if p.stem == "china")) as image:
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    large = large.transpose(Image.Transpose.TRANSPOSE) if turned else large
    data = encoded(large, quality=90)
    scaled = decode(data, LIMITS, at_least=448)
    assert scaled.size != large.size
    assert psnr(fast(scaled, OPENAI), exact(decode(data, LIMITS), OPENAI)) > 48


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 9), (100, 1), (40, 4000), (223, 224)])
def test_small_images_are_enlarged_alike(size):
    image = noise(size)
    assert (fast(image, OPENAI).int() - exact(image, OPENAI).int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(400, 300), (4001, 2003)], ids=["torch", "pillow"])
def test_grey_stays_grey(size):
    red, green, blue = fast(noise(size).convert("L").convert("RGB"), OPENAI)
    assert torch.equal(red, green) and torch.equal(green, blue)


@pytest.mark.parametrize("turned", [False, True])
def test_both_ways_of_fast_take_the_same_middle(turned):
    """A cross in the middle stays in the middle, on either side of the bound."""
    for long in (3600, 5201):
        size = (2001, long) if turned else (long, 2001)
        image = Image.new("RGB", size)
        image.paste("white", (size[0] // 2 - 150, 0, size[0] // 2 + 151, size[1]))
        image.paste("white", (0, size[1] // 2 - 150, size[0], size[1] // 2 + 151))
        slow, quick = exact(image, OPENAI).int(), fast(image, OPENAI).int()
        assert (slow - quick).abs().max() <= 12, (size, size[0] * size[1] > LARGE)


MEASURE = """
import re, sys, time
from pathlib import Path
from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.preprocess import *
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def measured(what):
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    found = what()
    print((memory("VmHWM") - before) // 1024, time.process_time() - start)
    return found
preparation = Preparation(224, (0.5,) * 3, (0.5,) * 3)
from PIL import Image
fast(Image.new("RGB", (300, 300)), preparation)
data = Path(sys.argv[1]).read_bytes()
def whole():
    way = sys.argv[2]
    if way == "fast":
        return fast(decode(data, PixelLimits(), at_least=draft_size(preparation)), preparation)
    return exact(decode(data, PixelLimits()), preparation)
measured(whole)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["png-50-megapixels", "png-just-below-the-bound", "jpeg-12"])
def test_no_picture_costs_more_than_its_budget(way, kind, tmp_path):
    size = {"png-50-megapixels": (8191, 6100), "jpeg-12": (4000, 3000)}.get(kind, (16_384, 488))
    format = "JPEG" if kind.startswith("jpeg") else "PNG"
    (tmp_path / "image").write_bytes(encoded(Image.new("RGB", size, "teal"), format))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "image"), way],
        capture_output=True,
        text=True,
        check=True,
    )
    mib, cpu_s = done.stdout.split()
    print(f"{kind} {way}: {mib} MiB, {cpu_s} s")
    assert int(mib) < 400 and float(cpu_s) < 2
    if kind == "jpeg-12" and way == "fast":
        assert int(mib) < 40  # decoded at a quarter of its size


# Decoding to a fraction


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(3000, 2000), (1801, 3597), (449, 448), (448, 100), (900, 897)])
def test_a_jpeg_is_never_smaller_than_asked(size, progressive):
    data = encoded(Image.new("RGB", size, "teal"), progressive=progressive)
    image = decode(data, LIMITS, at_least=448)
    assert min(image.size) >= min(448, *size) and image.info == {"size": size}
    assert min(image.size) < 2 * 448 or image.size == size


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "AVIF"])
def test_other_formats_come_whole(format):
    data = encoded(Image.new("RGB", (900, 1000), "teal"), format)
    image = decode(data, LIMITS, at_least=100)
    assert image.size == (900, 1000) and image.info == {"size": (900, 1000)}


def test_limits_are_on_the_size_in_the_file():
    data = encoded(Image.new("RGB", (1000, 1000)))
    with pytest.raises(ImageLimits):
        decode(data, PixelLimits(max_pixels=999_999), at_least=100)


# Threads


def test_a_pool_of_single_threads_leaves_the_default_alone():
    default = torch.get_num_threads()
    together = threading.Barrier(8, timeout=20)

    def count(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with ThreadPoolExecutor(8, initializer=one_torch_thread) as pool:
        assert list(pool.map(count, range(8))) == [1] * 8
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == default
    assert torch.get_num_threads() == default


def test_the_module_needs_neither_torchvision_nor_open_clip():
    code = "import sys, heimdex_clip_worker.preprocess; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not re.search(r"\b(torchvision|open_clip|numpy\.testing)\b", done.stdout)
