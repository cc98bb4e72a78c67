"""Image files for the catalogue: honest ones in every mode, and files that no encoder writes.

Everything is made from nothing but Pillow, zlib and arithmetic, and is the same on every call.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF")


@functools.cache
def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Return a picture of gradients in `mode`; treat it as read-only."""
    width, height = size
    across = Image.linear_gradient("L").rotate(90).resize(size)
    down = Image.linear_gradient("L").resize(size)
    circle = Image.radial_gradient("L").resize(size)
    if mode == "I;16":
        values = [(x * 65535 // width + y * 257) % 65536 for y in range(height) for x in range(width)]
        return Image.frombytes("I;16", size, struct.pack(f"<{len(values)}H", *values))
    if mode in ("RGBA", "LA"):
        bands = [across, down, circle, down] if mode == "RGBA" else [circle, across]
        return Image.merge(mode, bands)
    image = Image.merge("RGB", [across, down, circle])
    return image.quantize(32) if mode == "P" else image.convert(mode)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return `image` as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def ordinary(format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return an ordinary small file of a format."""
    return saved(picture("P" if format == "GIF" else "RGB", size), format)


def animation(format: str, frames: int = 3, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a file whose first frame is `picture()` and whose others are plain."""
    first = picture("RGB", size)
    others = [Image.new("RGB", size, (40 * i % 256, 0, 0)) for i in range(1, frames)]
    return saved(first, format, save_all=True, append_images=others, duration=50)


# PNG


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    """Return a PNG chunk; `crc` None: the right one."""
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def ihdr(size: tuple[int, int], depth: int = 8, color: int = 2, interlace: int = 0) -> bytes:
    """Return a PNG's header chunk; colour 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, interlace))


def png(head: bytes, idat: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG of a header, compressed data and the chunks around them."""
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", idat) + after + chunk(b"IEND")


def png_rows(
    size: tuple[int, int], depth: int = 8, color: int = 2, filter: int = 0, values: bytes = b"\x80"
) -> bytes:
    """Return a PNG whose every byte of pixels is the next of `values`, compressed."""
    width, height = size
    length = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8
    row = bytes([filter]) + (values * (length // len(values) + 1))[:length]
    return png(ihdr(size, depth, color), deflated([row] * height))


def deflated(parts: Iterable[bytes], level: int = 6) -> bytes:
    """Return what zlib makes of `parts`, one after the other."""
    compress = zlib.compressobj(level)
    return b"".join([compress.compress(part) for part in parts] + [compress.flush()])


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def interlaced(size: tuple[int, int], depth: int, color: int, filter: int = 0, level=1) -> bytes:
    """Return an interlaced PNG of one grey."""
    width, height = size
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]

    def rows() -> Iterable[bytes]:
        for x, y, across, down in ADAM7:
            columns, lines = -(-(width - x) // across), -(-(height - y) // down)
            if columns > 0 and lines > 0:
                row = bytes([filter]) + b"\x40" * ((columns * bits + 7) // 8)
                yield from [row] * lines

    return png(ihdr(size, depth, color, interlace=1), deflated(rows(), level))


def interlaced_picture(size: tuple[int, int] = (61, 47)) -> tuple[bytes, Image.Image]:
    """Return an interlaced RGB PNG of `picture()` and that picture."""
    image = picture("RGB", size)
    pixels, (width, height) = image.load(), size
    lines = []
    for x, y, across, down in ADAM7:
        for row in range(y, height, down):
            values = b"".join(bytes(pixels[column, row]) for column in range(x, width, across))
            lines.append(b"\0" + values if values else b"")
    return png(ihdr(size, interlace=1), deflated(lines)), image


def png16(mode: str, size: tuple[int, int] = (16, 9)) -> tuple[bytes, Image.Image]:
    """Return a PNG of 16 bits a channel, and what its high bytes show as RGB."""
    image = picture({"RGB": "RGB", "RGBA": "RGBA", "LA": "LA"}[mode], size)
    raw, bands, width = image.tobytes(), len(mode), size[0]
    low = bytes((7 * i) % 256 for i in range(len(raw)))
    wide = b"".join(bytes(pair) for pair in zip(raw, low, strict=True))
    step = width * bands * 2
    rows = [b"\0" + wide[i : i + step] for i in range(0, len(wide), step)]
    color = {"RGB": 2, "LA": 4, "RGBA": 6}[mode]
    return png(ihdr(size, 16, color), deflated(rows)), image.convert("RGB")
