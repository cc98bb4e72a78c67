"""The photographs of the benchmark: the package's own, in the sizes that services really see.

40 % are 1080p, 30 % 640x360, 25 % as they are, 5 % of 12 megapixels. The larger ones are enlarged
and given the noise of a sensor, so that their files are as heavy as a camera's.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks import CACHE, ROOT

SOURCES = sorted(
    path for path in (ROOT / "heimdex_clip_worker" / "photos").iterdir() if path.suffix != ".md"
)
FOLDER = CACHE / "photos-1"  # another number when something here changes
SIZES = {"1080p": (1920, 1080), "360p": (640, 360), "native": None, "12mp": (4000, 3000)}
MIX = {"1080p": 8, "360p": 6, "native": 5, "12mp": 1}  # of every 20
NOISE = 6.0  # standard deviation, of 255
QUALITY = 85  # JPEG, colour at half resolution


def enlarge(source: Path, size: tuple[int, int], seed: int) -> Image.Image:
    """Return a photograph cut and enlarged to `size`, with noise."""
    with Image.open(source) as image:
        large = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, NOISE, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8))


def make(kind: str, number: int) -> Path:
    """Return the `number`-th photograph of a kind, written on first use."""
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


def pool(blocks: int = 2) -> list[Path]:  # 20 a block
    """Return the photographs in the order they are asked for: every 20 in a row hold the mix."""
    found, made = [], dict.fromkeys(MIX, 0)
    for block in range(blocks):
        kinds = [kind for kind, count in MIX.items() for _ in range(count)]
        random.Random(block).shuffle(kinds)
        for kind in kinds:
            found.append(make(kind, made[kind]))
            made[kind] += 1
    return found
