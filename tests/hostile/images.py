"""Image files for the catalogue: ordinary ones in every mode, and files that no encoder writes.

Pillow, zlib and arithmetic make all of them, the same bytes on every call.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF")


@functools.cache
def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Make a picture of gradients in `mode`; it is cached, so treat it as read-only."""
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
    """Encode `image` as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def ordinary(format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """Make an ordinary small file of a format."""
    return saved(picture("P" if format == "GIF" else "RGB", size), format)


def animation(format: str, frames: int = 3, size: tuple[int, int] = (64, 48)) -> bytes:
    """Make a file whose first frame is `picture()` and whose others are plain."""
    first = picture("RGB", size)
    others = [Image.new("RGB", size, (40 * i % 256, 0, 0)) for i in range(1, frames)]
    return saved(first, format, save_all=True, append_images=others, duration=50)


# PNG


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    """Make a PNG chunk; without `crc`, with the right checksum."""
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def ihdr(size: tuple[int, int], depth: int = 8, color: int = 2, interlace: int = 0) -> bytes:
    """Make a PNG's header chunk; colour 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, interlace))


def png(head: bytes, idat: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Make a PNG of a header, compressed data and the chunks around them."""
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", idat) + after + chunk(b"IEND")


def png_rows(
    size: tuple[int, int], depth: int = 8, color: int = 2, filter: int = 0, values: bytes = b"\x80"
) -> bytes:
    """Make a PNG whose every byte of pixels is the next of `values`, compressed."""
    width, height = size
    length = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8
    row = bytes([filter]) + (values * (length // len(values) + 1))[:length]
    return png(ihdr(size, depth, color), deflated([row] * height))


def deflated(parts: Iterable[bytes], level: int = 6) -> bytes:
    """Compress `parts`, one after the other."""
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
    """Make an interlaced PNG of one grey."""
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
    """Make an interlaced RGB PNG of `picture()` and that picture."""
    image = picture("RGB", size)
    pixels, (width, height) = image.load(), size
    lines = []
    for x, y, across, down in ADAM7:
        for row in range(y, height, down):
            values = b"".join(bytes(pixels[column, row]) for column in range(x, width, across))
            lines.append(b"\0" + values if values else b"")
    return png(ihdr(size, interlace=1), deflated(lines)), image


def png16(
    mode: str,
    size: tuple[int, int] = (16, 9),
    change: Callable[[bytes], bytes] = bytes,  # of the compressed data
) -> tuple[bytes, Image.Image]:
    """Make a PNG of 16 bits a channel, and the RGB picture of its high bytes."""
    image = picture({"RGB": "RGB", "RGBA": "RGBA", "LA": "LA"}[mode], size)
    raw, bands, width = image.tobytes(), len(mode), size[0]
    low = bytes((7 * i) % 256 for i in range(len(raw)))
    wide = b"".join(bytes(pair) for pair in zip(raw, low, strict=True))
    step = width * bands * 2
    rows = [b"\0" + wide[i : i + step] for i in range(0, len(wide), step)]
    color = {"RGB": 2, "LA": 4, "RGBA": 6}[mode]
    return png(ihdr(size, 16, color), change(deflated(rows))), image.convert("RGB")


# JPEG

CODES = {0: "0", 1: "10", 2: "110"}  # of the three symbols in each table below


def segment(marker: int, body: bytes) -> bytes:
    """Make a JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def table(kind: int, symbols: Iterable[int]) -> bytes:
    """Make a Huffman table (kind 0x00 DC, 0x10 AC) with the codes 0, 10 and 110."""
    symbols = bytes(symbols)
    counts = bytes([1] * len(symbols) + [0] * (16 - len(symbols)))
    return segment(0xC4, bytes([kind]) + counts + symbols)


def coded(bits: str, blocks: int) -> bytes:
    """Make a scan's data by repeating the bits of one block for each block."""
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
    """Make a JPEG of scans: for each its components, its Ss, Se, Ah and Al, and its data."""
    parts = [b"\xff\xd8", tables, segment(0xDB, b"\0" + b"\x01" * 64)]
    numbered = b"".join(bytes([i, s, 0]) for i, s in enumerate(sampling, 1))
    parts.append(segment(frame, struct.pack(">BHHB", 8, *size[::-1], len(sampling)) + numbered))
    for components, (start, end, high, low), data in scans:
        chosen = b"".join(bytes([c + 1, 0]) for c in components)
        spectral = bytes([start, end, high << 4 | low])
        parts += [segment(0xDA, bytes([len(components)]) + chosen + spectral), data]
    return b"".join([*parts, b"\xff\xd9"])


def blocks_of(size: tuple[int, int]) -> int:
    """Count the blocks of 8 x 8 pixels that cover `size`."""
    return -(-size[0] // 8) * -(-size[1] // 8)


def baseline(size: tuple[int, int], coefficients: int = 15, components: int = 3) -> bytes:
    """Make a baseline JPEG, each component in full resolution, with so many values in a block."""
    tables = table(0x00, [0]) + table(0x10, [0x01, 0x00])
    bits = CODES[0] + (CODES[0] + "1") * coefficients + CODES[1] * (coefficients < 63)
    data = coded(bits, blocks_of(size) * components)
    scan = (tuple(range(components)), (0, 63, 0, 0), data)
    return jpeg(size, [scan], frame=0xC0, sampling=(0x11,) * components, tables=tables)


def progressive(
    size: tuple[int, int], refinements: int, coefficients: int = 0, components: int = 3
) -> bytes:
    """Make a progressive JPEG of 2 + `refinements` scans, each of which changes every block."""
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
    """Make a baseline JPEG of `scans` scans, each with a single component."""
    tables = table(0x00, [0]) + table(0x10, [0x01, 0x00])
    data = coded(CODES[0] + CODES[1], blocks_of((64, 48)))
    each = [((i % 3,), (0, 63, 0, 0), data) for i in range(scans)]
    return jpeg((64, 48), each, frame=0xC0, tables=tables)


def behind_the_scan(part: bytes) -> bytes:
    """Make a baseline JPEG with more data after its pixels."""
    return baseline((64, 48))[:-2] + part + b"\xff\xd9"


def scan_bomb(scans: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Make a progressive JPEG of `scans` scans."""
    return progressive(size, scans - 2)


def with_segments(*segments: bytes, base: bytes | None = None) -> bytes:
    """Make an ordinary JPEG with more segments after its first marker."""
    data = base or ordinary("JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def with_frame_size(data: bytes, size: tuple[int, int]) -> bytes:
    """Write another size into the frame header of a JPEG."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at > 0:
            return data[: at + 5] + struct.pack(">HH", *size[::-1]) + data[at + 9 :]
    raise ValueError("no frame")


# GIF


def gif(
    screen: tuple[int, int], frame: tuple[int, int, int, int] | None = None, codes: bytes = b""
) -> bytes:
    """Make a GIF with one frame (left, top, width, height) of 8-bit LZW codes as given."""
    frame = frame or (0, 0, *screen)
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0xF7, 0, 0) + bytes(range(256)) * 3
    blocks = b"".join(
        bytes([len(codes[i : i + 255])]) + codes[i : i + 255] for i in range(0, len(codes), 255)
    )
    return head + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x08" + blocks + b"\0;"


def lzw(pixels: int, value: int = 7) -> bytes:
    """Make LZW codes of `pixels` equal pixels: strings that grow by one each time."""
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
    """Make a WebP of chunks; `size` is a false size for the header."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def vp8x(canvas: tuple[int, int], flags: int = 0) -> tuple[bytes, bytes]:
    """Make the chunk of an extended WebP; flags 2 animation, 4 XMP, 8 EXIF, 16 alpha, 32 ICC."""
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in canvas)
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def webp_stream(**options: Any) -> tuple[bytes, bytes]:
    """Make the chunk of pixels in a simple WebP of `picture()`."""
    data = saved(picture("RGB"), "WEBP", **options)
    return data[12:16], data[20 : 20 + struct.unpack("<I", data[16:20])[0]]


def vp8l_header(size: tuple[int, int]) -> tuple[bytes, bytes]:
    """Make a lossless chunk that declares a size and holds no pixels."""
    bits = (size[0] - 1) | (size[1] - 1) << 14
    return b"VP8L", b"\x2f" + struct.pack("<I", bits) + b"\0" * 16


def huffman_groups() -> bytes:
    """Make a lossless WebP of one megapixel in which each 4 x 4 pixels have tables of their own."""

    def number(value: int, count: int) -> str:
        return f"{value:0{count}b}"[::-1]  # the low bit comes first

    one = "1000"  # a table of one symbol, 0
    lengths = number(8, 4) + "000" * 11 + "100"  # all code lengths are 8
    some = "0" + lengths + "1" + number(3, 3) + number(254, 8)  # 256 of 280 symbols
    every = "0" + lengths + "0"
    tables = "0" + some + every + one * 3  # of the picture below; no cache of colours
    groups = "".join(number(i, 16) for i in range(65_536))  # 256 x 256 pixels of two bytes
    start = number(0x2F, 8) + number(1023, 14) * 2 + "0" + "000"
    bits = start + "0" + "0" + "1" + "000" + tables + groups + one * 5 * 65_536
    data = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8) + 16, "little")
    return riff((b"VP8L", data))


def with_ispe(data: bytes, size: tuple[int, int]) -> bytes:
    """Write another size into the boxes of an AVIF."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", *size) + data[at + 8 :]
