"""JPEGs that are hard to decode at half their size: made from a seed, always the same.

Screens of printed pictures, fine lines, chirps, noise, text, checks, dithered pictures, photographs
and mixtures of them; faint or strong; grey, RGB, CMYK and YCCK; every usual sampling of colours;
baseline and progressive; odd sides, and sides that hide other pixels, as after a lossless crop.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps

from heimdex_clip_worker.model.photos import photographs

Random = np.random.Generator
Size = tuple[int, int]  # width and height
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1")
SHARES = (0.25, 0.1, 0.45, 0.1, 0.1)


def bytes_of(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def grid(size: Size) -> tuple[np.ndarray, np.ndarray]:  # x and y of each pixel
    y, x = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float32)
    return x, y


def phases(size: Size, angle: float, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the phase along and across a direction, of a pattern of so many pixels a period."""
    x, y = grid(size)
    cos, sin = np.cos(angle), np.sin(angle)
    return (x * cos + y * sin) * (2 * np.pi / period), (y * cos - x * sin) * (2 * np.pi / period)


def source(random: Random, size: Size) -> Image.Image:
    """Choose a photograph of the package, enlarged without noise."""
    path = photographs()[random.integers(10)]
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)


def photo(random: Random, size: Size) -> Image.Image:
    values = np.asarray(source(random, size), np.float32)
    noise = random.normal(0, random.choice([0, 6, 25]), values.shape)
    return Image.fromarray(bytes_of(values + noise))


def screened(tone: np.ndarray, size: Size, angle: float, period: float) -> Image.Image:
    along, across = phases(size, angle, period)
    dots = np.sin(along) * np.sin(across) * 0.5 + 0.5 < tone
    return Image.fromarray((dots * 255).astype(np.uint8))


def screen(random: Random, size: Size) -> Image.Image:
    """Print a photograph, a ramp or a plain tone with dots: black, or four inks at four angles."""
    period = random.uniform(2.5, 12)
    if random.random() < 0.4:
        inks = source(random, size).convert("CMYK").split()
        tones = [np.asarray(ink, np.float32) / 255 for ink in inks]
        angles = np.radians((15, 75, 0, 45))
        plates = [screened(t, size, a, period) for t, a in zip(tones, angles, strict=True)]
        return Image.merge("CMYK", plates)
    grey = np.asarray(source(random, size).convert("L"), np.float32) / 255
    ramp = grid(size)[0] / size[0]
    tone = (grey, ramp, np.full_like(ramp, random.uniform(0.1, 0.9)))[random.integers(3)]
    return screened(tone, size, random.uniform(0, np.pi / 2), period)


def lines(random: Random, size: Size) -> Image.Image:
    """Draw waves or stripes, most of them of less than four pixels, some of colour alone."""
    period = random.choice([random.uniform(2, 2.6), random.uniform(2.6, 4), random.uniform(4, 20)])
    angle = random.choice([0, np.pi / 2, 0.02, random.uniform(0, np.pi)])
    wave = np.sin(phases(size, angle, period)[0] + random.uniform(0, 6))
    wave = np.sign(wave) if random.random() < 0.3 else wave
    if random.random() < 0.7:
        return Image.fromarray(bytes_of(128 + 127 * wave))
    colour = random.uniform(-127, 127, 3)
    return Image.fromarray(bytes_of(128 + wave[..., None] * colour))


def chirp(random: Random, size: Size) -> Image.Image:
    """Draw rings that become finer outwards, down to two pixels or a little more."""
    x, y = grid(size)
    squares = (x - random.uniform(0, size[0])) ** 2 + (y - random.uniform(0, size[1])) ** 2
    return Image.fromarray(
        bytes_of(128 + 127 * np.cos(np.pi * random.uniform(0.1, 0.6) * squares / max(size)))
    )


def noise(random: Random, size: Size) -> Image.Image:
    shape = (size[1], size[0], 3)[: random.integers(2, 4)]
    if random.random() < 0.3:
        return Image.fromarray(random.integers(0, 2, shape, np.uint8) * 255)
    return Image.fromarray(bytes_of(random.normal(128, random.uniform(3, 90), shape)))


def text(random: Random, size: Size) -> Image.Image:
    coloured = random.random() < 0.4
    paper, ink = random.integers(0, 256, (2, 3)) if coloured else ((255,) * 3, (0,) * 3)
    image = Image.new("RGB", size, tuple(map(int, paper)))
    draw, height = ImageDraw.Draw(image), int(random.integers(8, 40))
    font = ImageFont.load_default(height)
    for top in range(0, size[1], int(height * random.uniform(1.1, 3))):
        letters = random.integers(97, 123, int(size[0] / height * 2))
        words = "".join(map(chr, letters)).replace("q", " ")
        draw.text((5, top), words, fill=tuple(map(int, ink)), font=font)
    return image


def checks(random: Random, size: Size) -> Image.Image:
    side = int(random.integers(1, 13))
    x, y = grid(size)
    field = ((x // side + y // side) % 2)[..., None]
    coloured = random.random() < 0.5
    one, other = random.integers(0, 256, (2, 3)) if coloured else (np.zeros(3), np.full(3, 255))
    return Image.fromarray(bytes_of(field * one + (1 - field) * other))


def dither(random: Random, size: Size) -> Image.Image:
    """Show a photograph in black and white pixels, by error diffusion or by a matrix."""
    grey = source(random, size).convert("L")
    if random.random() < 0.5:
        return grey.convert("1").convert("L")
    matrix = np.array([[0, 2], [3, 1]])
    for _ in range(2):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    tiles = np.tile(matrix * 4 + 2, (size[1] // 8 + 1, size[0] // 8 + 1))[: size[1], : size[0]]
    return Image.fromarray(((np.asarray(grey) > tiles) * 255).astype(np.uint8))


PATTERNS: tuple[Callable[[Random, Size], Image.Image], ...] = (
    screen, lines, chirp, noise, text, checks, dither,
)  # fmt: skip


def patch(random: Random, size: Size) -> Image.Image:
    """Paste a pattern into a photograph."""
    image = photo(random, size)
    part = tuple(int(side * random.uniform(0.05, 0.6)) for side in size)
    place = tuple(int(random.uniform(0, s - p)) for s, p in zip(size, part, strict=True))
    image.paste(PATTERNS[random.integers(len(PATTERNS))](random, part).convert("RGB"), place)
    return image


def faint(random: Random, size: Size) -> Image.Image:
    """Make a pattern with little contrast, on grey."""
    pattern = PATTERNS[random.integers(len(PATTERNS))](random, size).convert("RGB")
    values = np.asarray(pattern, np.float32) - 128
    return Image.fromarray(bytes_of(random.uniform(50, 200) + values * random.uniform(0.02, 0.4)))


def crop(random: Random, size: Size) -> Image.Image:
    """Make what `make` then crops without decoding it."""
    return (photo, noise, text, lines, patch)[random.integers(5)](random, size)


KINDS = {f.__name__: f for f in (*PATTERNS, photo, patch, faint, crop)}


# Files


def frame(data: bytes) -> int:
    """Find the frame header of a JPEG."""
    position = 2
    while data[position + 1] not in (0xC0, 0xC1, 0xC2):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def saved(image: Image.Image, **options: object) -> bytearray:
    ImageFile.MAXBLOCK = 1 << 26  # a progressive JPEG of noise is one block, larger than the pixels
    image.save(file := io.BytesIO(), "JPEG", **options)
    return bytearray(file.getvalue())


def resampled(image: Image.Image, sampling: str, **options: object) -> bytearray:
    """Save with a sampling that Pillow cannot write, by another order of the same blocks.

    4:4:0 has the blocks of 4:2:2 below each other, and 4:1:1 those of 4:2:0 in one row.
    """
    high, (wide, tall) = sampling == "4:4:0", (8, 16) if sampling == "4:4:0" else (32, 8)
    width, height = image.size
    more = (0, -height % tall), (0, -width % wide), (0, 0)
    values = np.pad(np.asarray(image.convert("YCbCr")), more, "edge")
    h, w = values.shape[:2]
    light, colours = values[..., 0], values[..., 1:].astype(np.uint16)
    if high:
        light = light.reshape(h // 16, 2, 8, w // 8, 8).transpose(0, 2, 3, 1, 4)
        light = light.reshape(h // 2, 2 * w)
        colours = (colours.reshape(h // 2, 2, w, 2).sum(1) // 2).repeat(2, axis=1)
    else:
        light = light.reshape(h // 8, 8, w // 32, 2, 2, 8).transpose(0, 3, 1, 2, 4, 5)
        light = light.reshape(2 * h, w // 2)
        colours = (colours.reshape(h, w // 4, 4, 2).sum(2) // 4).repeat(2, axis=1).repeat(2, axis=0)
    planes = np.concatenate([light[..., None], colours.astype(np.uint8)], axis=2)
    options["subsampling"] = "4:2:2" if high else "4:2:0"
    data = saved(Image.frombytes("YCbCr", planes.shape[1::-1], planes.tobytes()), **options)
    start = frame(data)
    data[start + 11] = 0x12 if high else 0x41
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return data


@dataclass(frozen=True)
class Jpeg:
    """A file, and how it was made."""

    data: bytes
    kind: str
    seed: int
    about: str


def choose_size(random: Random, largest: int) -> Size:
    """Choose a size of which most have a usable half: the short side is at least 896 then."""
    ranges = (300, 896), (896, 1000), (1000, 1700), (1700, 3700)
    low, high = ranges[random.choice(4, p=(0.04, 0.75, 0.18, 0.03))]
    short = min(int(random.integers(low, high)), largest)
    long = int(short * random.choice([1, 1.06, 5 / 4, 3 / 2, 16 / 9], p=(0.4, 0.1, 0.2, 0.2, 0.1)))
    if random.random() < 0.75:
        step = int(random.choice([2, 16]))
        short, long = -(-short // step) * step, -(-long // step) * step
    return (long, short) if random.random() < 0.6 else (short, long)


def make(kind: str, seed: int, largest: int = 4000) -> Jpeg:  # pixels of the short side
    """Make one JPEG."""
    random = np.random.default_rng(seed)
    size = choose_size(random, largest)
    image, sampling = KINDS[kind](random, size), str(random.choice(SAMPLINGS, p=SHARES))
    ranges = (5, 60), (60, 90), (90, 101)
    quality = int(random.integers(*ranges[random.integers(3)]))
    options = {"quality": quality, "progressive": bool(random.random() < 0.2)}
    mode = image.mode
    if mode == "CMYK":
        mode = str(random.choice(["CMYK", "YCCK", "RGB"]))
        image = image.convert("RGB") if mode == "RGB" else image
    elif mode == "L" and random.random() < 0.5:
        mode, image = "RGB", image.convert("RGB")
    if mode == "RGB" and sampling in ("4:4:0", "4:1:1"):
        data = resampled(image, sampling, **options)
    else:
        sampling = sampling if mode == "RGB" else ""
        data = saved(image, **options, **({"subsampling": sampling} if sampling else {}))
    if mode == "YCCK":
        data[data.index(b"Adobe") + 11] = 2
    if kind == "crop":
        cut = random.integers(1, 16, 2)
        start = frame(data) + 5
        size = size[0] - int(cut[0]), size[1] - int(cut[1])
        data[start : start + 4] = struct.pack(">HH", size[1], size[0])
    about = f"{size[0]}x{size[1]} {mode} {sampling} quality {quality}"
    return Jpeg(bytes(data), kind, seed, about + " progressive" * options["progressive"])
