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
        values = [
            (x * 65535 // width + y * 257) % 65536 for y in range(height) for x in range(width)
        ]
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


ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


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


# JPEG

CODES = {0: "0", 1: "10", 2: "110"}  # of the three symbols in each table below


def segment(marker: int, body: bytes) -> bytes:
    """Return a JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def table(kind: int, symbols: Iterable[int]) -> bytes:
    """Return a Huffman table (kind 0x00 DC, 0x10 AC) with the codes 0, 10 and 110."""
    symbols = bytes(symbols)
    counts = bytes([1] * len(symbols) + [0] * (16 - len(symbols)))
    return segment(0xC4, bytes([kind]) + counts + symbols)


def coded(bits: str, blocks: int) -> bytes:
    """Return the bits of one block, as often as there are blocks, as a scan's data."""
    eight = int(bits * 8, 2).to_bytes(len(bits), "big")
    return (eight * -(-blocks // 8)).replace(b"\xff", b"\xff\x00")


def jpeg(
    size: tuple[int, int],
    scans: Iterable[tuple[tuple[int, ...], tuple[int, int, int, int], bytes]],
    *,
    frame: int = 0xC2,  # SOF marker: C0 baseline, C2 progressive
    sampling: tuple[int, ...] = (0x11, 0x11, 0x11),  # a component's horizontal, vertical
    tables: bytes = b"",  # more segments before the frame
) -> bytes:
    """Return a JPEG of scans: their components, their Ss, Se, Ah and Al, and their data."""
    parts = [b"\xff\xd8", tables, segment(0xDB, b"\0" + b"\x01" * 64)]
    numbered = b"".join(bytes([i, s, 0]) for i, s in enumerate(sampling, 1))
    parts.append(segment(frame, struct.pack(">BHHB", 8, *size[::-1], len(sampling)) + numbered))
    for components, (start, end, high, low), data in scans:
        chosen = b"".join(bytes([c + 1, 0]) for c in components)
        spectral = bytes([start, end, high << 4 | low])
        parts += [segment(0xDA, bytes([len(components)]) + chosen + spectral), data]
    return b"".join([*parts, b"\xff\xd9"])


def blocks_of(size: tuple[int, int]) -> int:
    """Return how many blocks of 8 x 8 pixels cover `size`."""
    return -(-size[0] // 8) * -(-size[1] // 8)


def baseline(size: tuple[int, int], coefficients: int = 15, components: int = 3) -> bytes:
    """Return a baseline JPEG, full resolution in every component, so many values in each block."""
    tables = table(0x00, [0]) + table(0x10, [0x01, 0x00])
    bits = CODES[0] + (CODES[0] + "1") * coefficients + CODES[1] * (coefficients < 63)
    data = coded(bits, blocks_of(size) * components)
    scan = (tuple(range(components)), (0, 63, 0, 0), data)
    return jpeg(size, [scan], frame=0xC0, sampling=(0x11,) * components, tables=tables)


def progressive(
    size: tuple[int, int], refinements: int, coefficients: int = 0, components: int = 3
) -> bytes:
    """Return a progressive JPEG of 2 + `refinements` scans, each of which touches every block."""
    tables = table(0x00, [0]) + table(0x10, [0x01, 0x00])
    first = (CODES[0] + "1") * coefficients + CODES[1] * (coefficients < 63)
    more = CODES[1] + "1" * coefficients  # no new values, a bit more of each old one
    blocks = blocks_of(size)
    scans = [
        (tuple(range(components)), (0, 0, 0, 1), coded("0", blocks * components)),
        ((0,), (1, 63, 0, 1), coded(first, blocks)),
        *[((0,), (1, 63, 1, 0), coded(more, blocks))] * refinements,
    ]
    return jpeg(size, scans, sampling=(0x11,) * components, tables=tables)


def apart(scans: int) -> bytes:
    """Return a baseline JPEG whose components have scans of their own, so many in all."""
    tables = table(0x00, [0]) + table(0x10, [0x01, 0x00])
    data = coded(CODES[0] + CODES[1], blocks_of((64, 48)))
    each = [((i % 3,), (0, 63, 0, 0), data) for i in range(scans)]
    return jpeg((64, 48), each, frame=0xC0, tables=tables)


def behind_the_scan(part: bytes) -> bytes:
    """Return a baseline JPEG that goes on after its pixels."""
    return baseline((64, 48))[:-2] + part + b"\xff\xd9"


def scan_bomb(scans: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a progressive JPEG of so many scans."""
    return progressive(size, scans - 2)


def with_segments(*segments: bytes, base: bytes | None = None) -> bytes:
    """Return an ordinary JPEG with more segments behind its first marker."""
    data = base or ordinary("JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def with_frame_size(data: bytes, size: tuple[int, int]) -> bytes:
    """Return a JPEG whose frame header tells another size."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at > 0:
            return data[: at + 5] + struct.pack(">HH", *size[::-1]) + data[at + 9 :]
    raise ValueError("no frame")


# GIF


def gif(
    screen: tuple[int, int], frame: tuple[int, int, int, int] | None = None, codes: bytes = b""
) -> bytes:
    """Return a GIF with one frame (left, top, width, height) of 8-bit LZW codes as given."""
    frame = frame or (0, 0, *screen)
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0xF7, 0, 0) + bytes(range(256)) * 3
    blocks = b"".join(
        bytes([len(codes[i : i + 255])]) + codes[i : i + 255] for i in range(0, len(codes), 255)
    )
    return head + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x08" + blocks + b"\0;"


def lzw(pixels: int, value: int = 7) -> bytes:
    """Return LZW codes of so many equal pixels: strings that grow by one each time."""
    accumulated = held = 0
    out = bytearray()

    def put(code: int, width: int) -> None:
        nonlocal accumulated, held
        accumulated |= code << held
        held += width
        while held >= 8:
            out.append(accumulated & 255)
            accumulated >>= 8
            held -= 8

    left = pixels
    while left > 0:
        put(256, 9 if left == pixels else 12)  # clear; the table is full at that point
        put(value, 9)
        left, following, length = left - 1, 258, 2
        while left > 0 and following < 4096:
            put(following, min(12, max(9, following.bit_length())))
            left, following, length = left - length, following + 1, length + 1
        if left > 0:  # the longest string, a few more times
            for _ in range(200):
                put(4095, 12)
                left -= length - 1
    put(257, 12)
    put(0, 8)
    return bytes(out)


# WebP and AVIF


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    """Return a WebP of chunks; `size`: what the header says, if not the truth."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def vp8x(canvas: tuple[int, int], flags: int = 0) -> tuple[bytes, bytes]:
    """Return the chunk of an extended WebP; flags 2 animation, 4 XMP, 8 EXIF, 16 alpha, 32 ICC."""
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in canvas)
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def webp_stream(**options: Any) -> tuple[bytes, bytes]:
    """Return the one chunk of pixels in a simple WebP of `picture()`."""
    data = saved(picture("RGB"), "WEBP", **options)
    return data[12:16], data[20 : 20 + struct.unpack("<I", data[16:20])[0]]


def vp8l_header(size: tuple[int, int]) -> tuple[bytes, bytes]:
    """Return a lossless chunk that promises a size and holds nothing else."""
    bits = (size[0] - 1) | (size[1] - 1) << 14
    return b"VP8L", b"\x2f" + struct.pack("<I", bits) + b"\0" * 16


def with_ispe(data: bytes, size: tuple[int, int]) -> bytes:
    """Return an AVIF whose container tells another size than its AV1 stream."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", *size) + data[at + 8 :]
