"""The decoder compared with the reference pipeline, and its budget: bombs in fresh processes."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from forks import Fork
from PIL import Image

from heimdex_clip_worker.errors import DownloadError
from heimdex_clip_worker.model.image import trim
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.serving.decode import PixelLimits, decode

pytestmark = [pytest.mark.model, pytest.mark.process]

PHOTOS = photographs()
CPU_S, MEMORY_MIB = 2.0, 400
SIDE = 7_071  # its square is just under 50 million


def encoded(image: Image.Image, format: str, **options) -> bytes:
    """Encode an image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def code_of(data: bytes) -> str:
    """Decode a file; return the code of the error, or `ok`."""
    try:
        decode(data, PixelLimits())
    except DownloadError as error:
        return error.code
    return "ok"


@pytest.fixture(scope="module")
def transform():
    """Make open_clip's own preprocessing for ViT-B-32."""
    from open_clip.transform import image_transform

    return image_transform(224, is_train=False)


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_a_photograph_is_preprocessed_as_by_open_clip(path, transform):
    with Image.open(path) as image:
        expected = transform(image)
    result = transform(decode(path.read_bytes(), PixelLimits()))
    assert (result == expected).all()


@pytest.mark.parametrize("size", [(2, 600), (601, 3), (1, 333), (7, 900), (901, 8)])
def test_trimming_a_very_long_image_keeps_what_open_clip_keeps(size, transform):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = transform(Image.fromarray(noise)).numpy()
    image = decode(encoded(Image.fromarray(noise), "PNG"), PixelLimits())
    result = transform(trim(image)).numpy()
    cosine = (result * expected).sum() / np.linalg.norm(result) / np.linalg.norm(expected)
    assert cosine > 0.9999, cosine


@pytest.mark.parametrize("mode", ["I;16", "RGB", "LA", "RGBA"])
def test_sixteen_bits_keep_their_high_byte(mode):
    """A PNG of 16 bits a channel decodes like the same picture with 8 bits."""
    channels = {"I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    eight = np.random.default_rng(1).integers(0, 256, (20, 30 * channels), dtype=np.uint8)
    kind = {"I;16": 0, "LA": 4, "RGB": 2, "RGBA": 6}[mode]
    files = [
        png(30, 20, depth, kind, b"".join(b"\0" + row.tobytes() for row in rows))
        for depth, rows in ((8, eight), (16, (eight.astype(">u2") << 8 | 77).astype(">u2")))
    ]
    one, other = (decode(data, PixelLimits()).tobytes() for data in files)
    assert one == other


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """Make a PNG of filtered rows."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0),
        b"IDAT" + zlib.compress(rows, 1),
        b"IEND",
    ]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


PNG_KINDS = [
    *((depth, 0) for depth in (1, 2, 4, 8, 16)),
    *((depth, 3) for depth in (1, 2, 4, 8)),
    *((depth, color) for depth in (8, 16) for color in (2, 4, 6)),
]


def random_png(rng: np.random.Generator, depth: int, color: int) -> bytes:
    """Make a PNG of noise: any size, any filter in each row, its data in several chunks."""
    width, height = (int(side) for side in rng.integers(1, 41, 2))
    length = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8
    rows = b"".join(bytes([rng.integers(5)]) + rng.bytes(length) for _ in range(height))
    data = zlib.compress(rows, int(rng.integers(10)))
    cuts = [0, *sorted(int(cut) for cut in rng.integers(0, len(data) + 1, rng.integers(4)))]
    parts = [data[i:j] for i, j in zip(cuts, [*cuts[1:], len(data)], strict=True)]
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0),
        *([b"PLTE" + rng.bytes(3 << depth)] if color == 3 else []),
        *(b"IDAT" + part for part in parts),
        b"IEND",
    ]
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(("depth", "color"), PNG_KINDS)
def test_a_png_of_any_kind_has_the_pixels_that_pillow_gives_it(depth, color):
    rng = np.random.default_rng([depth, color])
    for _ in range(40):
        data = random_png(rng, depth, color)
        image = Image.open(io.BytesIO(data))
        if image.mode == "I;16":
            image = Image.frombytes("L", image.size, image.tobytes()[1::2])
        result = decode(data, PixelLimits())
        assert result.mode == "RGB" and result.size == image.size
        assert result.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_orientation_is_ignored_as_in_the_reference(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.effect_noise((40, 30), 60).convert("RGB"), format, exif=exif)
    result, expected = decode(data, PixelLimits()), Image.open(io.BytesIO(data)).convert("RGB")
    assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_decodes_to_its_first_frame(format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    red, _, blue = decode(data, PixelLimits()).getpixel((16, 16))
    assert red > 240 and blue < 15


def test_metadata_reaches_neither_pillow_nor_the_log(recwarn):
    """5,000 EXIF tags that point nowhere would cause 5,000 warnings."""
    tags = b"".join(struct.pack("<HHII", n, 7, 1 << 20, 0) for n in range(1, 5_000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 4_999) + tags + bytes(4)
    small = Image.effect_noise((40, 30), 60).convert("RGB")
    files = [encoded(small, name, exif=exif) for name in ("JPEG", "PNG", "WEBP", "AVIF")]
    recwarn.clear()  # Pillow reads the tags when it writes them
    assert [code_of(data) for data in files] == ["ok"] * 4
    assert not recwarn.list


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA, 0xCF])
def test_lossless_and_arithmetic_jpegs_are_refused(marker):
    data = encoded(Image.new("RGB", (16, 16)), "JPEG")
    assert code_of(data.replace(b"\xff\xc0", bytes([0xFF, marker]), 1)) == "UNSUPPORTED_FORMAT"


def test_a_file_of_too_many_parts_is_refused():
    small = Image.new("RGB", (16, 16))
    whole = encoded(small, "PNG")
    assert code_of(whole[:33] + b"\0\0\0\0abCdcrc!" * 30_000 + whole[33:]) == "IMAGE_LIMITS"
    whole = encoded(small, "GIF")
    at = whole.index(b",")
    assert code_of(whole[:at] + b"!\xfe\x01a\0" * 30_000 + whole[at:]) == "IMAGE_LIMITS"


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_a_decoders_canvases_are_freed_after_decoding(format):
    image = decode(encoded(Image.new("RGB", (16, 16)), format), PixelLimits())
    assert image._decoder is None


# Budgets


def progressive(subsampling: int, side: int, repeat: int) -> bytes:
    """Make a progressive JPEG that repeats its first luma AC scan `repeat` times."""
    data = encoded(
        Image.new("RGB", (side, side), (200, 30, 40)), "JPEG",
        progressive=True, subsampling=subsampling, quality=20,
    )  # fmt: skip
    scans = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    return data[:-2] + data[scans[5] : scans[6]] * repeat + b"\xff\xd9"


def flat(depth: int, kind: int, channels: int) -> bytes:
    """Make a PNG of the most pixels allowed, with the most expensive filter."""
    return png(SIDE, SIDE, depth, kind, (b"\4" + bytes(SIDE * channels * depth // 8)) * SIDE)


def webp_canvas(side: int) -> bytes:
    """Make an animated WebP of a huge canvas and one tiny frame."""
    frame = encoded(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    area = (side - 1).to_bytes(3, "little") * 2
    parts = [
        b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + area,
        b"ANIM" + struct.pack("<I", 6) + bytes(6),
        b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(6) + b"\1\0\0" * 2 + bytes(4) + frame,
    ]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_canvas() -> bytes:
    """Make a GIF of a huge canvas and one tiny frame."""
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", SIDE, SIDE)
    return bytes(data)


def comments() -> bytes:
    """Make a JPEG of 2.5 million empty comments."""
    data = encoded(Image.new("RGB", (16, 16)), "JPEG")
    return data[:2] + b"\xff\xfe\0\x02" * 2_500_000 + data[2:]


def fill() -> bytes:
    """Make a JPEG of 10 million fill bytes."""
    data = encoded(Image.new("RGB", (16, 16)), "JPEG")
    return data[:2] + b"\xff" * 10_000_000 + data[2:]


def webp_lossless() -> bytes:
    """Make a lossless WebP of the most pixels allowed."""
    image = Image.new("RGBA", (5_000, 5_000), (200, 30, 40, 128))
    return encoded(image, "WEBP", lossless=True, method=0, quality=0, exact=True)


def avif(mode: str, side: int, **options) -> bytes:
    """Make an AVIF of noise."""
    image = Image.effect_noise((side, side), 60)
    image = Image.merge(mode, [image] * len(mode))
    return encoded(image, "AVIF", speed=10, quality=30, subsampling="4:4:4", **options)


BOMBS = {
    "png-rgba-16": (lambda: flat(16, 6, 4), "IMAGE_LIMITS"),  # 31 million pixels are allowed
    "png-grey-16": (lambda: flat(16, 0, 1), "ok"),
    "png-palette": (lambda: png(SIDE, SIDE, 1, 3, bytes((SIDE + 15) // 8 * SIDE)), None),
    "gif-canvas": (gif_canvas, "ok"),
    "jpeg-scans-20": (lambda: progressive(2, SIDE, 10), "ok"),
    "jpeg-scans-100": (lambda: progressive(2, 3_000, 90), "ok"),
    "jpeg-scans-of-50-million": (lambda: progressive(2, SIDE, 90), "IMAGE_LIMITS"),
    "jpeg-coefficients": (lambda: progressive(0, SIDE, 0), "IMAGE_LIMITS"),
    "jpeg-most-coefficients": (lambda: progressive(0, 6_300, 0), "ok"),
    "jpeg-comments": (comments, "IMAGE_LIMITS"),
    "jpeg-fill": (fill, "ok"),
    "webp-canvas": (lambda: webp_canvas(4_990), "ok"),
    "webp-canvas-too-large": (lambda: webp_canvas(7_000), "IMAGE_LIMITS"),
    "webp-lossless": (webp_lossless, "ok"),
    "avif-alpha": (lambda: avif("RGBA", 4_400), "ok"),
    "avif-too-large": (lambda: avif("L", 4_500), "IMAGE_LIMITS"),
}
MEASURE = """
import re, sys, time
from pathlib import Path
from heimdex_clip_worker.serving.decode import PixelLimits, decode
from heimdex_clip_worker.model.image import trim
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.errors import DownloadError
def memory(name):  # KiB
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
data = Path(sys.argv[1]).read_bytes()
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
before, start, code = memory("VmRSS"), time.process_time(), "ok"
try: decode(data, PixelLimits())
except DownloadError as error: code = error.code
print(code, time.process_time() - start, (memory("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_no_image_costs_more_than_its_budget(name, tmp_path):
    build, expected = BOMBS[name]
    file = tmp_path / name
    file.write_bytes(build())
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    process = Fork((str(script), str(file)), os.environ, tmp_path)
    out, err = process.communicate(60)
    assert process.returncode == 0, err
    code, cpu_s, mib = out.split()
    print(f"{name}: {file.stat().st_size:,} bytes, {code}, {float(cpu_s):.2f} s, {mib} MiB")
    assert expected in (code, None)
    assert float(cpu_s) < CPU_S and int(mib) < MEMORY_MIB
