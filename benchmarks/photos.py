"""The photographs of the benchmark: the package's own, in a mix of sizes as services get them.

40 % are 1080p, 30 % 640x360, 25 % unchanged, 5 % of 12 megapixels. Enlarged ones get the noise of a
sensor, so that their files are as large as a camera's. Beside them there are thumbnails of 640x360:
most of what a service gets.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks import CACHE
from heimdex_clip_worker.model.photos import photographs

SOURCES = photographs()
FOLDER = CACHE / "photos-1"  # another number when something here changes
SIZES = {"1080p": (1920, 1080), "360p": (640, 360), "native": None, "12mp": (4000, 3000)}
MIX = {"1080p": 8, "360p": 6, "native": 5, "12mp": 1}  # of every 20
NOISE = 6.0  # standard deviation, of 255
QUALITY = 85  # JPEG, colour at half resolution
THUMBNAIL, THUMBNAILS = (640, 360), 24
THUMBNAIL_BYTES = (30_000, 60_000)


def enlarge(source: Path, size: tuple[int, int], seed: int) -> Image.Image:
    """Crop and scale a photograph to `size`, and add noise."""
    with Image.open(source) as image:
        large = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, NOISE, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8))


def make(kind: str, number: int) -> Path:
    """Make the `number`-th photograph of a kind, unless it is there already."""
    source, size = SOURCES[number % len(SOURCES)], SIZES[kind]
    suffix = source.suffix if size is None else ".jpg"
    path = FOLDER / f"{kind}-{number}-{source.stem}{suffix}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        if size is None:
            part.write_bytes(source.read_bytes())
        else:
            image = enlarge(source, size, seed=number)
            image.save(part, "JPEG", quality=QUALITY, subsampling="4:2:0")
        part.rename(path)
    return path


def pool(blocks: int = 2) -> list[Path]:  # 20 for each block
    """List the photographs in the order of their use; every 20 in a row have the mix."""
    paths, made = [], dict.fromkeys(MIX, 0)
    for block in range(blocks):
        kinds = [kind for kind, count in MIX.items() for _ in range(count)]
        random.Random(block).shuffle(kinds)
        for kind in kinds:
            paths.append(make(kind, made[kind]))
            made[kind] += 1
    return paths


def thumbnail(source: Path, number: int) -> bytes:  # JPEG of 30 to 60 KB
    """Reduce a photograph to a thumbnail; every number has noise of its own."""
    least, most = THUMBNAIL_BYTES
    image = enlarge(source, THUMBNAIL, seed=number)
    for quality in (QUALITY, 80, 75, 70, 65):  # rich pictures need less of it
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
        if least <= file.tell() <= most:
            return file.getvalue()
    raise ValueError(f"{source.name}: no quality gives {least} to {most} bytes")


def thumbnails(count: int = THUMBNAILS) -> list[Path]:
    """List the thumbnails in the order of their use, and make those that are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        source = SOURCES[number % len(SOURCES)]
        path = FOLDER / f"thumb-{number}-{source.stem}.jpg"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(thumbnail(source, number))
            part.rename(path)
        paths.append(path)
    return paths
