"""Preprocessing compared with open_clip's: `exact` is equal, `fast` is close enough."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import jpegs
import numpy as np
import pytest
import torch
from PIL import Image

from heimdex_clip_worker.errors import ImageLimits
from heimdex_clip_worker.model import preprocess
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.model.preprocess import Preparation, exact, fast, to_model, trim
from heimdex_clip_worker.serving.decode import PixelLimits, decode

pytestmark = pytest.mark.model

PHOTOS = photographs()
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


@cache
def grain() -> Image.Image:
    """Make a camera's noise once, for pictures of up to 4000 by 4000 pixels."""
    return Image.effect_noise((4000, 4000), 40).convert("RGB")


def enlarged(path: Path, size: tuple[int, int]) -> bytes:
    """Enlarge a photograph to a camera's JPEG, with the same proportions."""
    with Image.open(path) as image:
        width, height = image.size
        longest = max(size) / max(width, height)
        size = (round(width * longest), round(height * longest))
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return encoded(Image.blend(large, grain().crop((0, 0, *size)), 0.1), quality=85)


def reference(preparation: Preparation):
    """Build open_clip's own transform."""
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
    result = to_model(exact(image, preparation)[None], preparation, torch.float32)[0]
    assert torch.equal(result, reference(preparation)(trim(image))), size


@pytest.mark.parametrize("size", [(3, 500), (1, 16_384), (9000, 40)])
def test_the_middle_of_a_very_long_image_is_exact(size):
    image = noise(size)
    result = to_model(exact(image, OPENAI), OPENAI, torch.float32)
    assert torch.equal(result, reference(OPENAI)(trim(image)))


def test_the_models_precision_comes_last():
    pixels = exact(noise((300, 200)), OPENAI)[None]
    whole = to_model(pixels, OPENAI, torch.float32)
    assert torch.equal(to_model(pixels, OPENAI, torch.bfloat16), whole.bfloat16())
    assert pixels.dtype == torch.uint8


# Fast


def vectors(embedder, pixels: list[torch.Tensor]) -> torch.Tensor:
    """Embed pixels with the seeded model, as rows of length 1."""
    rows = embedder.encode(to_model(torch.stack(pixels), OPENAI, torch.float32))
    return torch.nn.functional.normalize(rows.double(), dim=1)


@pytest.mark.parametrize("size", [None, (1920, 1920), (4000, 4000)], ids=["native", "2k", "4k"])
def test_fast_gives_the_vectors_of_exact(embedder, size):
    files = [enlarged(path, size) if size else path.read_bytes() for path in PHOTOS]
    small = {"at_least": OPENAI.draft_size}
    slow = vectors(embedder, [exact(decode(data, LIMITS), OPENAI) for data in files])
    quick = vectors(embedder, [fast(decode(data, LIMITS, **small), OPENAI) for data in files])
    cosines = (slow * quick).sum(dim=1)
    print(*(f"{p.stem} {1 - c:.1e}" for p, c in zip(PHOTOS, cosines.tolist(), strict=True)))
    assert cosines.min() >= 0.9999  # which makes it the default


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (one.float() - other.float()).square().mean()))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [(4001, 2670), (3593, 2412), (7001, 4690), (3001, 2002)])
def test_a_scaled_jpeg_is_not_shifted(size, turned):
    """Sizes of which the long side has no half, in a photograph."""
    with Image.open(next(p for p in PHOTOS if p.stem == "china")) as image:
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    large = large.transpose(Image.Transpose.TRANSPOSE) if turned else large
    data = encoded(large, quality=90)
    scaled = decode(data, LIMITS, at_least=448)
    assert scaled.size == tuple(-(-side // 2) for side in large.size)
    assert psnr(fast(scaled, OPENAI), exact(decode(data, LIMITS), OPENAI)) > 48


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 9), (100, 1), (40, 4000), (223, 224)])
def test_small_images_are_enlarged_alike(size):
    image = noise(size)
    assert (fast(image, OPENAI).int() - exact(image, OPENAI).int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(400, 300), (4001, 2003)], ids=["whole", "strips"])
def test_grey_stays_grey(size):
    red, green, blue = fast(noise(size).convert("L").convert("RGB"), OPENAI)
    assert torch.equal(red, green) and torch.equal(green, blue)


@pytest.mark.parametrize("turned", [False, True])
def test_both_ways_of_fast_cut_out_the_same_middle(turned):
    """A cross in the middle stays in the middle, in one pass and in strips."""
    for long in (2001, 5201):
        size = (2001, long) if turned else (long, 2001)
        image = Image.new("RGB", size)
        image.paste("white", (size[0] // 2 - 150, 0, size[0] // 2 + 151, size[1]))
        image.paste("white", (0, size[1] // 2 - 150, size[0], size[1] // 2 + 151))
        slow, quick = exact(image, OPENAI).int(), fast(image, OPENAI).int()
        assert (slow - quick).abs().max() <= 2, (size, size[0] * size[1] > preprocess._PIECE)


MEASURE = """
import os, re, sys, time
from pathlib import Path
from PIL import Image
from heimdex_clip_worker.serving.decode import PixelLimits, decode
from heimdex_clip_worker.model.preprocess import Preparation, exact, fast
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def measure(what):
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    result = what()
    seconds = time.process_time() - start
    print(file.name, way, (memory("VmHWM") - before) // 1024, seconds, flush=True)
    return result
preparation = Preparation(224, (0.5,) * 3, (0.5,) * 3)
def whole():
    if way == "fast":
        return fast(decode(data, PixelLimits(), at_least=preparation.draft_size), preparation)
    return exact(decode(data, PixelLimits()), preparation)
for file in map(Path, sys.argv[1:]):
    for way in ("exact", "fast"):
        if not os.fork():  # each in a process of its own, of which no other has changed the heap
            fast(Image.new("RGB", (300, 300)), preparation)
            data = file.read_bytes()
            measure(whole)
            os._exit(0)
        assert os.wait()[1] == 0
"""
LARGE = {
    "png-50-megapixels": (8191, 6100), "png-just-below-the-bound": (16_384, 488),
    "jpeg-12": (4000, 3000),
}  # fmt: skip


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, float]]:
    """Measure MiB and seconds of CPU of every large image, both ways."""
    folder = tmp_path_factory.mktemp("large")
    for kind, size in LARGE.items():
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        (folder / kind).write_bytes(encoded(image, "JPEG" if kind.startswith("jpeg") else "PNG"))
    run = [sys.executable, "-c", MEASURE, *(str(folder / kind) for kind in LARGE)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(kind, way): (int(mib), float(cpu_s)) for kind, way, mib, cpu_s in rows}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["exact", "fast"])
@pytest.mark.parametrize("kind", LARGE)
def test_no_image_costs_more_than_its_budget(way, kind, costs):
    mib, cpu_s = costs[kind, way]
    print(f"{kind} {way}: {mib} MiB, {cpu_s} s")
    assert mib < 400 and cpu_s < 2
    if kind == "jpeg-12" and way == "fast":
        assert mib < 40  # decoded to half its size


# Decoding to half the size


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(3000, 2000), (1801, 3597), (449, 448), (448, 100), (900, 897)])
def test_a_jpeg_is_never_smaller_than_requested(size, progressive):
    gradient = Image.linear_gradient("L").resize(size)
    image = decode(encoded(gradient, progressive=progressive), LIMITS, at_least=448)
    half = min(size) >= 2 * 448 and min(size) % 2 == 0
    assert image.info == {"size": size}
    assert image.size == (tuple(-(-side // 2) for side in size) if half else size)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "AVIF"])
def test_other_formats_are_decoded_at_full_size(format):
    data = encoded(Image.new("RGB", (900, 1000), "teal"), format)
    image = decode(data, LIMITS, at_least=100)
    assert image.size == (900, 1000) and image.info == {"size": (900, 1000)}


def test_limits_apply_to_the_size_in_the_file():
    data = encoded(Image.new("RGB", (1000, 1000)))
    with pytest.raises(ImageLimits):
        decode(data, PixelLimits(max_pixels=999_999), at_least=100)


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_no_jpeg_gives_another_vector(embedder, kind):
    """`tests/draft_2000.py` does the same with many more, and larger ones."""
    files = [jpegs.make(kind, seed, largest=1000).data for seed in range(3)]
    slow = vectors(embedder, [exact(decode(data, LIMITS), OPENAI) for data in files])
    quick = vectors(
        embedder, [fast(decode(data, LIMITS, at_least=OPENAI.draft_size), OPENAI) for data in files]
    )
    assert (slow * quick).sum(dim=1).min() >= 0.9999


def ramp() -> bytes:
    """Print a ramp from black to white with dots of seven pixels."""
    y, x = np.mgrid[0:1000, 0:1500]
    u, v = (x + y) / 2**0.5, (y - x) / 2**0.5
    dots = np.sin(u * np.pi / 3.5) * np.sin(v * np.pi / 3.5) * 127 + 128 < x * 255 / 1500
    return encoded(Image.fromarray((dots * 255).astype("uint8")), quality=90)


def lines(period: float, **options) -> bytes:
    """Draw upright waves whose means of two pixels are coarse waves."""
    wave = 128 + 100 * np.sin(2 * np.pi * np.arange(1200) / period)
    return encoded(Image.fromarray(np.tile(wave.astype("uint8"), (900, 1))), **options)


def coloured(sampling: str) -> bytes:
    """Draw slanting waves of equally bright colours, in a JPEG of this sampling of colours."""
    y, x = np.mgrid[0:1200, 0:1200]
    wave = (128 + 40 * np.sin(2 * np.pi * (x + y) / 4.2)).astype("uint8")
    grey = np.full_like(wave, 128)
    image = Image.merge("YCbCr", [Image.fromarray(p) for p in (grey, grey, wave)]).convert("RGB")
    if sampling in ("4:4:0", "4:1:1"):
        return bytes(jpegs.resampled(image, sampling, quality=90))
    return encoded(image, quality=90, subsampling=sampling)


def cropped(side: int) -> bytes:
    """Crop a JPEG without decoding it, so that white is hidden behind the edges of a photograph."""
    with Image.open(PHOTOS[0]) as image:
        large = image.convert("RGB").resize((1808, 1808), Image.Resampling.BICUBIC)
    large.paste("white", (0, side, 1808, 1808))
    large.paste("white", (side, 0, 1808, 1808))
    data = bytearray(encoded(large, quality=95))
    start = jpegs.frame(data) + 5
    data[start : start + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)


HARD = {
    "ramp": ramp,
    "flat": lambda: jpegs.make("checks", 203).data,
    "ink": lambda: encoded(Image.open(io.BytesIO(ramp())).convert("CMYK"), quality=80),
    **{f"lines-of-{p}": partial(lines, p, quality=80) for p in (2.05, 2.2, 2.4, 3.1)},
    **{f"colours-{s}": partial(coloured, s) for s in jpegs.SAMPLINGS},
    **{f"crop-to-{side}": partial(cropped, side) for side in (1801, 1796, 1794)},
}


@pytest.mark.parametrize("name", HARD)
def test_a_hard_jpeg_gives_no_other_vector(embedder, name):
    data, small = HARD[name](), {"at_least": OPENAI.draft_size}
    slow, quick = vectors(
        embedder, [exact(decode(data, LIMITS), OPENAI), fast(decode(data, LIMITS, **small), OPENAI)]
    )
    assert slow @ quick >= 0.9999


def test_an_enlarged_photograph_is_decoded_to_half_its_size():
    data = enlarged(PHOTOS[2], (1804, 1804))
    assert decode(data, LIMITS, at_least=448).size == (902, 600)


# Threads


def test_a_pool_of_single_threads_does_not_change_the_default():
    default = torch.get_num_threads()
    together = threading.Barrier(8, timeout=20)

    def count(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with ThreadPoolExecutor(8, initializer=preprocess.one_torch_thread) as pool:
        assert list(pool.map(count, range(8))) == [1] * 8
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == default
    assert torch.get_num_threads() == default


def test_the_module_needs_neither_torchvision_nor_open_clip():
    code = "import sys, heimdex_clip_worker.model.preprocess; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not re.search(r"\b(torchvision|open_clip|numpy\.testing)\b", done.stdout)
