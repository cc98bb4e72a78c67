"""The catalogue's rows for image files from untrusted servers, and how decoding them must end.

A row has an `id`, a function `build` that makes the file, and the wire `code` of the expected
error. With the code "OK", the result must equal `pixels` bit for bit. Where `pixels` is None, it
must equal the result of open_clip's reference pipeline: `Image.open` and `convert("RGB")`, without
regard to orientation, colour profile and alpha.
"""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import avifs as av
import images as im
from PIL import Image


@dataclass(frozen=True)
class Row:
    """One image file."""

    id: str
    code: str  # "OK", or the code of the error
    build: Callable[[], bytes]
    pixels: Callable[[], Image.Image] | None = None  # None: the reference pipeline's
    heavy: bool = False  # measured in a process of its own


def good(id: str, build: Callable[[], bytes], pixels=None, **more) -> Row:
    """A row whose file must be decoded."""
    return Row(id, "OK", build, pixels, **more)


def damaged(id: str, build: Callable[[], bytes], **more) -> Row:
    """A row that must end as DECODE_FAILED."""
    return Row(id, "DECODE_FAILED", build, **more)


def limited(id: str, build: Callable[[], bytes], **more) -> Row:
    """A row that must end as IMAGE_LIMITS."""
    return Row(id, "IMAGE_LIMITS", build, **more)


def unsupported(id: str, build: Callable[[], bytes], **more) -> Row:
    """A row that must end as UNSUPPORTED_FORMAT."""
    return Row(id, "UNSUPPORTED_FORMAT", build, **more)


def save(mode: str, format: str, **options) -> Callable[[], bytes]:
    """Make a builder of `picture(mode)` in a format."""
    return lambda: im.saved(im.picture(mode), format, **options)


@cache
def tables_only() -> bytes:
    """Make a JPEG without its scan."""
    data = im.ordinary("JPEG")
    return data[: data.index(b"\xff\xda")] + b"\xff\xd9"


def high_bytes() -> Image.Image:
    """Make the 8-bit picture of the high bytes of 16-bit grey."""
    wide = im.picture("I;16")
    return Image.frombytes("L", wide.size, wide.tobytes()[1::2]).convert("RGB")


def exif(orientation: int) -> bytes:
    """Make EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def plain() -> Image.Image:
    """Make the picture that most rows hold."""
    return im.picture("RGB")


HUGE_EXIF = b"Exif\0\0" + b"MM\0*" + b"\0" * 65_000
ICC = b"\0\0\1\0lcms" + b"\2" * 200_000

MODES = [
    *[
        good(f"png-{mode.lower().replace(';', '')}", save(mode, "PNG"))
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    ],
    *[
        good(f"jpeg-{mode.lower()}", save(mode, "JPEG", quality=90))
        for mode in ("L", "RGB", "CMYK", "YCbCr")
    ],
    *[good(f"webp-{mode.lower()}", save(mode, "WEBP")) for mode in ("RGB", "RGBA", "L", "LA")],
    *[good(f"avif-{mode.lower()}", save(mode, "AVIF")) for mode in ("RGB", "RGBA", "L", "LA")],
    *[good(f"gif-{mode.lower()}", save(mode, "GIF")) for mode in ("1", "L", "P", "RGB", "RGBA")],
    good("png-p-transparent-index", save("P", "PNG", transparency=3)),
    good("png-p-transparent-bytes", save("P", "PNG", transparency=bytes(range(32)))),
    good("png-rgb-transparent-colour", save("RGB", "PNG", transparency=(1, 2, 3))),
    good("png-16-bit-grey", save("I;16", "PNG"), high_bytes),
    good("png-16-bit-rgb", lambda: im.png16("RGB")[0], lambda: im.png16("RGB")[1]),
    good("png-16-bit-rgba", lambda: im.png16("RGBA")[0], lambda: im.png16("RGBA")[1]),
    good("png-16-bit-grey-alpha", lambda: im.png16("LA")[0], lambda: im.png16("LA")[1]),
    good("png-2-bit-grey", lambda: im.png_rows((37, 21), 2, 0, values=b"\x1b\xe4")),
    good("png-4-bit-grey", lambda: im.png_rows((37, 21), 4, 0, values=b"\x1b\xe4\x09")),
    good("png-interlaced", lambda: im.interlaced_picture()[0], lambda: im.interlaced_picture()[1]),
    good(
        "png-16-bit-grey-interlaced",
        lambda: im.interlaced((9, 9), 16, 0),
        lambda: Image.new("L", (9, 9), 0x40),
    ),
    good("png-interlaced-1-pixel", lambda: im.interlaced((1, 1), 8, 6)),
    good("jpeg-progressive", save("RGB", "JPEG", progressive=True)),
    good("jpeg-4-4-4", save("RGB", "JPEG", subsampling=0)),
    good("jpeg-4-2-0", save("RGB", "JPEG", subsampling=2)),
    good("jpeg-restart-markers", save("RGB", "JPEG", restart_marker_rows=1)),
    good("jpeg-by-hand-progressive", lambda: im.progressive((64, 48), 8, 2)),
    good("jpeg-by-hand-4-components", lambda: im.baseline((64, 48), 5, 4)),
    good("webp-lossless", save("RGB", "WEBP", lossless=True)),
    good("webp-lossless-alpha", save("RGBA", "WEBP", lossless=True, exact=True)),
    good("webp-extended", lambda: im.riff(im.vp8x((64, 48)), im.webp_stream())),
    good("avif-4-4-4", save("RGB", "AVIF", subsampling="4:4:4")),
    good("avif-4-0-0", save("RGB", "AVIF", subsampling="4:0:0")),
    good("gif-interlaced", save("P", "GIF", interlace=1)),
    good("gif-transparent", save("P", "GIF", transparency=3)),
    good("one-pixel-png", lambda: im.png_rows((1, 1))),
    good("one-pixel-gif", lambda: im.gif((1, 1), None, im.lzw(1))),
]

BESIDES = [
    *[good(f"jpeg-orientation-{n}", save("RGB", "JPEG", exif=exif(n)), None) for n in range(1, 9)],
    good("png-orientation-6", save("RGB", "PNG", exif=exif(6)), plain),
    good("webp-orientation-6", save("RGB", "WEBP", exif=exif(6))),
    good(
        "avif-orientation-6-in-its-exif",
        lambda: im.saved(plain(), "AVIF", exif=b"Exif\0\0" + exif(1)[6:]),
        lambda: Image.open(im.io.BytesIO(im.ordinary("AVIF"))),
    ),
    good("jpeg-icc", save("RGB", "JPEG", icc_profile=ICC)),
    good("png-icc", save("RGB", "PNG", icc_profile=ICC), plain),
    good("webp-icc", save("RGB", "WEBP", icc_profile=ICC)),
    good("jpeg-huge-exif", lambda: im.with_segments(im.segment(0xE1, HUGE_EXIF))),
    good(
        "jpeg-exif-of-nothing-but-loops",
        lambda: im.with_segments(
            im.segment(
                0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x87\x69\0\4\0\0\0\1\0\0\0\x08" * 5000
            )
        ),
        lambda: Image.open(im.io.BytesIO(im.ordinary("JPEG"))),
    ),
    good(
        "jpeg-of-100-app-segments",
        lambda: im.with_segments(*[im.segment(0xE5, b"x" * 1000)] * 100),
    ),
    good("jpeg-comment-of-64-kb", lambda: im.with_segments(im.segment(0xFE, b"c" * 65_000))),
    good("jpeg-motion-photo", lambda: im.ordinary("JPEG") + b"\0\0\0\x18ftypmp42" + b"m" * 90_000),
    good("jpeg-then-zip", lambda: im.ordinary("JPEG") + b"PK\3\4" + b"z" * 5000),
    good("png-then-html", lambda: im.ordinary("PNG") + b"<script>alert(1)</script>"),
    good("gif-then-javascript", lambda: im.ordinary("GIF") + b"*/=1;alert(1)//"),
    good("webp-then-trash", lambda: im.ordinary("WEBP") + b"\xff" * 3333),
    good(
        "jpeg-mpo",
        lambda: im.saved(
            plain(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), "red")]
        ),
    ),
    *[good(f"{f.lower()}-animated", lambda f=f: im.animation(f)) for f in ("PNG", "GIF", "WEBP")],
    good("avif-animated", lambda: im.animation("AVIF")),
    good("gif-of-1000-frames", lambda: im.animation("GIF", 1000, (8, 8))),
    good("png-of-300-frames", lambda: im.animation("PNG", 300, (8, 8))),
    good(
        "apng-that-claims-a-million-frames",
        lambda: im.png(
            im.ihdr((8, 8)),
            zlib.compress(b"\0" * 200),
            before=im.chunk(b"acTL", struct.pack(">II", 10**6, 0)),
        ),
        lambda: Image.new("RGB", (8, 8)),
    ),
    *[
        good(
            f"png-{kind.decode().lower()}-bomb",
            lambda kind=kind, head=head: im.png(
                im.ihdr((64, 48)),
                im.deflated([b"\0" + bytes(192)] * 48),
                before=im.chunk(kind, head + zlib.compress(bytes(50_000_000), 9)),
            ),
            lambda: Image.new("RGB", (64, 48)),
        )
        for kind, head in {
            b"zTXt": b"k\0\0",
            b"iTXt": b"k\0\1\0\0\0",
            b"iCCP": b"k\0\0",
        }.items()
    ],
    good(
        "png-of-10000-text-chunks",
        lambda: im.png(
            im.ihdr((64, 48)),
            im.deflated([b"\0" + bytes(192)] * 48),
            before=im.chunk(b"tEXt", b"k\0v") * 10_000,
        ),
        lambda: Image.new("RGB", (64, 48)),
    ),
]


def cut(format: str, share: float) -> Callable[[], bytes]:
    """Make a builder of the first part of an ordinary file."""
    return lambda: (data := im.ordinary(format))[: int(len(data) * share)]


def flipped(format: str, at: float) -> Callable[[], bytes]:
    """Make a builder of an ordinary file with 40 bytes inverted."""

    def build() -> bytes:
        data = bytearray(im.ordinary(format))
        start = int(len(data) * at)
        data[start : start + 40] = bytes(b ^ 0xFF for b in data[start : start + 40])
        return bytes(data)

    return build


def wrong_crc(kind: bytes) -> Callable[[], bytes]:
    """Make a builder of a PNG whose chunk of a kind has a wrong checksum."""

    def build() -> bytes:
        data = im.ordinary("PNG")
        at = data.index(kind)
        end = at + 4 + struct.unpack(">I", data[at - 4 : at])[0]
        return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]

    return build


DAMAGED = [
    *[
        damaged(f"{format.lower()}-first-{share:.0%}", cut(format, share))
        for format in im.FORMATS
        for share in (0.25, 0.5, 0.8, 0.97)
        if (format, share) not in {("GIF", 0.97)}
    ],
    *[damaged(f"{f.lower()}-of-its-magic", lambda f=f: im.ordinary(f)[:12]) for f in im.FORMATS],
    damaged("avif-inverted-in-its-boxes", flipped("AVIF", 0.1)),
    damaged("webp-inverted-at-its-start", flipped("WEBP", 0.05)),
    damaged("png-inverted-in-the-middle", flipped("PNG", 0.5)),
    damaged("jpeg-without-scan", tables_only),
    damaged("jpeg-of-two-markers", lambda: b"\xff\xd8\xff\xd9"),
    damaged("jpeg-of-fill-bytes", lambda: b"\xff\xd8" + b"\xff" * 100_000),
    damaged("jpeg-of-zeros", lambda: b"\xff\xd8\xff" + bytes(100_000)),
    damaged("jpeg-frame-of-0-pixels", lambda: im.with_frame_size(im.ordinary("JPEG"), (0, 48))),
    damaged("jpeg-0-components", lambda: im.jpeg((8, 8), [((), (0, 63, 0, 0), b"")], sampling=())),
    damaged(
        "jpeg-sampling-of-0",
        lambda: im.jpeg((8, 8), [((0,), (0, 63, 0, 0), b"")], frame=0xC0, sampling=(0x00,)),
    ),
    damaged("png-wrong-crc-of-ihdr", wrong_crc(b"IHDR")),
    good("png-wrong-crc-of-idat", wrong_crc(b"IDAT")),  # Pillow does not read the last one
    damaged("png-without-idat", lambda: b"\x89PNG\r\n\x1a\n" + im.ihdr((8, 8)) + im.chunk(b"IEND")),
    damaged("png-idat-not-zlib", lambda: im.png(im.ihdr((8, 8)), b"not zlib at all")),
    damaged("png-depth-of-3", lambda: im.png(im.ihdr((8, 8), 3), zlib.compress(bytes(500)))),
    damaged("png-filter-of-9", lambda: im.png_rows((8, 8), filter=9)),
    damaged("png-0-pixels-wide", lambda: im.png(im.ihdr((0, 8)), zlib.compress(bytes(500)))),
    good(
        "png-of-3-rows-of-8-then-black", lambda: im.png(im.ihdr((8, 8)), zlib.compress(bytes(75)))
    ),
    good(
        "png-of-2-rows-of-8-then-black-rgba",
        lambda: im.png(im.ihdr((8, 8), 8, 6), zlib.compress(b"\0" + b"\x90" * 32 + b"\1" * 33)),
    ),
    *[
        damaged(f"png-16-bit-rgba-{name}", lambda change=change: im.png16("RGBA", change=change)[0])
        for name, change in {
            "cut-in-a-row": lambda idat: idat[:-200],
            "inverted-in-the-middle": lambda idat: idat[:300] + bytes(9) + idat[309:],
            "of-a-wrong-checksum": lambda idat: idat[:-1] + bytes([idat[-1] ^ 1]),
            "not-zlib": lambda idat: b"not zlib at all",
            "of-no-rows": lambda idat: zlib.compress(b""),
            "of-half-a-row": lambda idat: zlib.compress(bytes(64)),
        }.items()
    ],
    damaged(
        "png-16-bit-rgba-wrong-crc-of-ihdr",
        lambda: im.png(im.ihdr((8, 8), 16, 6)[:-1] + b"x", zlib.compress(bytes(65 * 8))),
    ),
    damaged("png-16-bit-rgba-filter-of-9", lambda: im.png_rows((8, 8), 16, 6, filter=9)),
    damaged("png-chunk-of-2-gb", lambda: im.ordinary("PNG")[:33] + b"\x7f\xff\xff\xffIDATxyz"),
    damaged("png-of-4-gb-text", lambda: im.ordinary("PNG")[:33] + b"\xff\xff\xff\xfftEXtxyz"),
    damaged("gif-without-frame", lambda: im.gif((8, 8))[:781] + b";"),
    damaged("gif-of-0-pixels", lambda: im.gif((0, 0), (0, 0, 0, 0), im.lzw(1))),
    damaged("gif-lzw-of-trash", lambda: im.gif((64, 48), None, b"\xff" * 600)),
    damaged("webp-canvas-lie", lambda: im.riff(im.vp8x((5000, 4000)), im.webp_stream())),
    damaged("webp-without-frame", lambda: im.riff(im.vp8x((64, 48)))),
    damaged("webp-lossless-header-alone", lambda: im.riff(im.vp8l_header((4000, 4000)))),
    damaged("webp-animation-without-frames", lambda: im.riff(im.vp8x((64, 48), 2))),
    damaged("webp-riff-of-0-bytes", lambda: im.riff(im.webp_stream(), size=0)),
    damaged("avif-box-of-2-bytes", lambda: im.ordinary("AVIF")[:32] + b"\0\0\0\2meta"),
    damaged("avif-of-nothing-but-ftyp", lambda: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1"),
]


def png_of(*parts: bytes) -> Callable[[], bytes]:
    """Make a builder of a PNG of chunks."""
    return lambda: b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cut_by(count: int, build: Callable[[], bytes]) -> Callable[[], bytes]:
    """Make a builder of a file without its last bytes."""
    return lambda: build()[:-count]


def cut_png(name: str, count: int, build: Callable[[], bytes]) -> Row:
    """A row whose PNG lost its last bytes, none of which are pixels."""
    return good(
        f"png-{name}-without-its-last-{count}", cut_by(count, build), lambda: opened(build())
    )


def opened(data: bytes) -> Image.Image:
    """Open a file with Pillow, and keep the high bytes of 16-bit grey."""
    image = Image.open(im.io.BytesIO(data))
    return (
        Image.frombytes("L", image.size, image.tobytes()[1::2]) if image.mode == "I;16" else image
    )


HEAD, END = im.ihdr((8, 8)), im.chunk(b"IEND")
COLORS, OTHERS = im.chunk(b"PLTE", bytes(range(6))), im.chunk(b"PLTE", b"\xff" * 6)
INDICES = im.chunk(b"IDAT", zlib.compress(b"\0\0\1\0\1\0\1\0\1" * 8))
ROWS_OF_8 = b"".join(b"\1" + bytes(range(i, i + 24)) for i in range(8))
DATA = zlib.compress(ROWS_OF_8, 0)
IDAT, FIRST, SECOND = (im.chunk(b"IDAT", part) for part in (DATA, DATA[:99], DATA[99:]))
TEXT, LARGER = im.chunk(b"tEXt", b"k\0v"), im.ihdr((7000, 7000))


def whole() -> Image.Image:
    """Open the PNG that lies behind those below."""
    return opened(png_of(HEAD, IDAT, END)())


PNG_CHUNKS = [
    *[
        cut_png(name, count, build)
        for name, build in {
            "rgb": save("RGB", "PNG"),
            "palette": save("P", "PNG"),
            "rgba": save("RGBA", "PNG"),
            "16-bit-grey": save("I;16", "PNG"),
            "interlaced": lambda: im.interlaced_picture()[0],
        }.items()
        for count in (1, 4, 5, 8, 12, 14, 16)
    ],
    *[
        damaged(f"png-{mode.lower()}-cut-in-its-pixels", cut_by(60, save(mode, "PNG")))
        for mode in ("RGB", "RGBA", "P")
    ],
    good("png-with-half-a-text-instead-of-its-end", png_of(HEAD, IDAT, TEXT[:9]), whole),
    good("png-with-zeros-instead-of-its-end", png_of(HEAD, IDAT, bytes(99))),
    good(
        "png-with-html-instead-of-its-end",
        png_of(HEAD, IDAT, b"<!doctype html><p>x</p>" * 9),
        whole,
    ),
    good("png-whose-last-chunk-claims-2-gb", png_of(HEAD, IDAT, b"\x7f\xff\xff\xfftEXtxyz"), whole),
    damaged("png-two-headers", png_of(HEAD, LARGER, IDAT, END)),
    damaged("png-two-headers-the-larger-first", png_of(im.ihdr((9, 9)), HEAD, IDAT, END)),
    damaged("png-two-equal-headers", png_of(HEAD, HEAD, IDAT, END)),
    damaged("png-a-header-behind-its-palette", png_of(HEAD, COLORS, LARGER, IDAT, END)),
    damaged("png-a-header-between-its-pixels", png_of(HEAD, FIRST, LARGER, SECOND, END)),
    damaged("png-a-header-behind-its-pixels", png_of(HEAD, IDAT, LARGER, END)),
    damaged("png-a-text-before-its-header", png_of(TEXT, HEAD, IDAT, END)),
    damaged("png-apples-chunk-before-its-header", png_of(im.chunk(b"CgBI"), HEAD, IDAT, END)),
    damaged("png-pixels-before-its-header", png_of(IDAT, HEAD, END)),
    damaged("png-without-a-header", png_of(IDAT, END)),
    damaged("png-header-of-14-bytes", png_of(im.chunk(b"IHDR", HEAD[8:21] + b"x"), IDAT, END)),
    damaged("png-header-of-12-bytes", png_of(im.chunk(b"IHDR", HEAD[8:20]), IDAT, END)),
    damaged("png-pixels-apart", png_of(HEAD, FIRST, TEXT, SECOND, END)),
    good("png-pixels-in-two-chunks", png_of(HEAD, FIRST, SECOND, END)),
    good("png-more-pixels-than-it-needs", png_of(HEAD, IDAT, TEXT, IDAT, END)),
    damaged("png-two-palettes", png_of(im.ihdr((8, 8), 8, 3), COLORS, OTHERS, INDICES, END)),
    good(
        "png-a-palette-behind-its-pixels",
        png_of(im.ihdr((8, 8), 8, 3), COLORS, INDICES, OTHERS, END),
    ),
    good("png-an-unknown-chunk-that-it-needs", png_of(HEAD, im.chunk(b"MUST"), IDAT, END)),
    good("png-an-unknown-chunk", png_of(HEAD, im.chunk(b"caNt", b"x" * 99), IDAT, END)),
]
FRAME = im.segment(0xC0, struct.pack(">BHHB", 8, 2000, 2000, 1) + b"\1\x11\0")
TWICE = [
    damaged("jpeg-two-frames", lambda: im.with_segments(FRAME)),
    damaged(
        "jpeg-two-frames-the-larger-last",
        lambda: (
            (data := im.ordinary("JPEG"))[: data.index(b"\xff\xda")]
            + FRAME
            + data[data.index(b"\xff\xda") :]
        ),
    ),
    damaged(
        "webp-two-extensions",
        lambda: im.riff(im.vp8x((64, 48)), im.vp8x((4000, 4000)), im.webp_stream()),
    ),
    damaged(
        "webp-two-extensions-the-larger-first",
        lambda: im.riff(im.vp8x((4000, 4000)), im.vp8x((64, 48)), im.webp_stream()),
    ),
    good("webp-two-pictures", lambda: im.riff(im.webp_stream(), im.vp8l_header((4000, 4000)))),
]

REFUSED = [
    unsupported("empty", lambda: b""),
    *[unsupported(f"one-byte-{b:02x}", lambda b=b: bytes([b])) for b in (0x00, 0x89, 0xFF)],
    unsupported("spaces", lambda: b" " * 4096),
    unsupported("zeros", lambda: bytes(1_000_000)),
    unsupported("html", lambda: b"<!doctype html><title>Sign in</title>"),
    unsupported("json-error", lambda: b'{"statusCode":"404","error":"not_found"}'),
    unsupported("svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    unsupported(
        "svg-with-an-entity-bomb",
        lambda: b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>',
    ),
    unsupported("pdf", lambda: im.saved(plain(), "PDF")),
    unsupported("zip", lambda: b"PK\3\4" + bytes(400)),
    unsupported("elf", lambda: b"\x7fELF" + bytes(400)),
    unsupported("mp4", lambda: b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(400)),
    unsupported("heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)),
    unsupported("riff-wave", lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(400)),
    unsupported("jpeg-xl", lambda: b"\xff\x0a" + bytes(400)),
    *[
        unsupported(f.lower().replace(" ", "-"), save("RGB", f))
        for f in ("BMP", "TIFF", "ICO", "EPS", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "QOI")
    ],
    unsupported("psd", lambda: b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x30\0\0\0\x40\0\x08\0\3"),
    unsupported("png-magic-with-unix-line-end", lambda: b"\x89PNG\n\x1a\n" + bytes(99)),
    unsupported("png-behind-a-space", lambda: b" " + im.ordinary("PNG")),
    unsupported("jpeg-behind-a-byte-order-mark", lambda: b"\xef\xbb\xbf" + im.ordinary("JPEG")),
    unsupported("gif-88a", lambda: b"GIF88a" + im.ordinary("GIF")[6:]),
    unsupported("webp-in-rifx", lambda: b"RIFX" + im.ordinary("WEBP")[4:]),
    unsupported("base64-of-a-jpeg", lambda: b"/9j/4AAQSkZJRgABAQ" * 20),
    unsupported("jpeg-arithmetic", lambda: im.ordinary("JPEG").replace(b"\xff\xc0", b"\xff\xc9")),
    unsupported("jpeg-lossless", lambda: im.ordinary("JPEG").replace(b"\xff\xc0", b"\xff\xc3")),
]

POLYGLOTS = [
    damaged("gif-of-javascript", lambda: b"GIF89a=1;alert(document.domain)//" + b" " * 900),
    damaged("jpeg-magic-then-html", lambda: b"\xff\xd8\xff<html><script>alert(1)</script>"),
    damaged("jpeg-magic-then-png", lambda: b"\xff\xd8\xff" + im.ordinary("PNG")),
    damaged("png-magic-then-jpeg", lambda: b"\x89PNG\r\n\x1a\n" + im.ordinary("JPEG")),
    damaged("webp-header-then-png", lambda: b"RIFF\0\1\0\0WEBP" + im.ordinary("PNG")),
    damaged("avif-brand-then-svg", lambda: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1<svg/>"),
    good("jpeg-with-php-in-a-comment", lambda: im.with_segments(im.segment(0xFE, b"<?php 1;?>"))),
    good(
        "jpeg-with-a-png-in-a-segment",
        lambda: im.with_segments(im.segment(0xEF, im.ordinary("PNG"))),
    ),
    good(
        "jpeg-with-a-jpeg-thumbnail",
        lambda: im.with_segments(im.segment(0xE1, b"Exif\0\0" + im.ordinary("JPEG"))),
    ),
    good(
        "jpeg-with-scan-markers-in-a-segment",
        lambda: im.with_segments(im.segment(0xEF, b"\xff\xda\0\2" * 10_000)),
    ),
]

LIMITED = [
    *[
        limited(f"{name}-{width}x{height}", lambda make=make, s=(width, height): make(s))
        for name, make in {
            "png": lambda size: im.png(im.ihdr(size), zlib.compress(b"")),
            "jpeg": lambda size: im.with_frame_size(im.ordinary("JPEG"), size),
            "gif": lambda size: im.gif(size, None, im.lzw(9)),
        }.items()
        for width, height in ((1, 60_000), (60_000, 1), (65_535, 65_535), (7100, 7100))
    ],
    limited("png-2-to-31-wide", lambda: im.png(im.ihdr((2**31 - 1, 1)), zlib.compress(b""))),
    limited("png-2-to-31-square", lambda: im.png(im.ihdr((2**31 - 1,) * 2), zlib.compress(b""))),
    limited("png-16385-wide", lambda: im.png_rows((16_385, 1))),
    limited("png-real-1x60000", lambda: im.png_rows((1, 60_000))),
    limited("webp-canvas-2-to-24-wide", lambda: im.riff(im.vp8x((2**24, 200)), im.webp_stream())),
    limited("webp-canvas-16-thousand", lambda: im.riff(im.vp8x((16_000,) * 2), im.webp_stream())),
    limited("webp-lossless-16384", lambda: im.riff(im.vp8l_header((16_384, 16_384)))),
    limited("webp-lossless-26-megapixels", lambda: im.riff(im.vp8l_header((5200, 5000)))),
    limited("avif-ispe-20000x8", lambda: im.with_ispe(im.ordinary("AVIF"), (20_000, 8))),
    limited("avif-ispe-26-megapixels", lambda: im.with_ispe(im.ordinary("AVIF"), (5200, 5000))),
    limited("gif-frame-beyond-its-screen", lambda: im.gif((10, 10), (0, 0, 65_535, 65_535), b"")),
    limited("gif-frame-far-off", lambda: im.gif((10, 10), (60_000, 60_000, 9, 9), im.lzw(81))),
    limited("gif-frame-wider-than-its-screen", lambda: im.gif((10, 10), (0, 0, 20_000, 8), b"")),
    limited("jpeg-101-scans", lambda: im.scan_bomb(101)),
    limited("jpeg-101-scans-of-a-baseline", lambda: im.apart(101)),
    good("jpeg-3-scans-of-a-baseline", lambda: im.apart(3)),
    limited("jpeg-60000-scans", lambda: im.scan_bomb(60_000, (8, 8))),
    limited("jpeg-30-scans-of-40-megapixels", lambda: im.scan_bomb(30, (8192, 4880))),
    limited(
        "jpeg-100000-segments",
        lambda: im.with_segments(b"\xff\xe5\0\2" * 100_000),
    ),
    limited(
        "png-a-million-empty-chunks",
        lambda: im.ordinary("PNG")[:33] + im.chunk(b"teXt") * 800_000,
    ),
    limited(
        "gif-a-million-extensions", lambda: im.ordinary("GIF")[:13] + b"!\xfe\1x\0" * 2_000_000
    ),
    limited("avif-100000-boxes", lambda: im.ordinary("AVIF")[:32] + b"\0\0\0\x08free" * 100_000),
    good("jpeg-100-scans", lambda: im.scan_bomb(100)),
    *[
        kind(f"jpeg-{name}-behind-its-only-scan", lambda part=part: im.behind_the_scan(part))
        for kind, name, part in (
            (good, "2-million-comments", b"\xff\xfe\0\2" * 2_000_000),
            (good, "300000-tables", im.table(0x00, [0]) * 300_000),
            (damaged, "600000-scans", im.segment(0xDA, b"\1\1\0\0\x3f\0") * 600_000),
            (damaged, "2-million-frames", im.segment(0xC2, b"") * 2_000_000),
        )
    ],
]

FILES = Path(__file__).with_name("files")


def file(name: str) -> Callable[[], bytes]:
    """Make a reader of a stored file, which would take too long to encode."""
    return lambda: (FILES / name).read_bytes()


def noise(mode: str, size: tuple[int, int], format: str, **options) -> Callable[[], bytes]:
    """Make a builder of an image of seeded noise, in tiles."""

    def build() -> bytes:
        side = 777
        values = random.Random(1).randbytes(side * side * len(mode))
        tile, image = Image.frombytes(mode, (side, side), values), Image.new(mode, size)
        for at in itertools.product(range(0, size[0], side), range(0, size[1], side)):
            image.paste(tile, at)
        return im.saved(image, format, **options)

    return build


def paeth(size: tuple[int, int], depth: int, color: int) -> Callable[[], bytes]:
    """Make a builder of a PNG whose filter takes the longest to undo."""
    return lambda: im.png_rows(size, depth, color, 4, random.Random(1).randbytes(4099))


LARGE = (8191, 6100)  # 49,965,100 pixels
HEAVY = [
    good("jpeg-50-megapixels-baseline", lambda: im.baseline(LARGE, 15), heavy=True),
    good("jpeg-50-megapixels-cmyk", lambda: im.baseline(LARGE, 10, 4), heavy=True),
    good("jpeg-50-megapixels-grey-scans", lambda: im.progressive(LARGE, 18, 3, 1), heavy=True),
    good("jpeg-40-megapixels-25-scans", lambda: im.progressive((8192, 4880), 23, 2), heavy=True),
    good("jpeg-33-megapixels-cmyk", lambda: im.progressive((8192, 4060), 22, 3, 4), heavy=True),
    good("jpeg-10-megapixels-100-scans", lambda: im.progressive((4096, 2440), 98, 3), heavy=True),
    good("png-50-megapixels-rgba-paeth", paeth(LARGE, 8, 6), heavy=True),
    good("png-50-megapixels-16-bit-grey-paeth", paeth(LARGE, 16, 0), heavy=True),
    limited("png-50-megapixels-16-bit-rgba-paeth", paeth(LARGE, 16, 6), heavy=True),
    limited("png-50-megapixels-16-bit-rgb-paeth", paeth(LARGE, 16, 2), heavy=True),
    good("png-31-megapixels-16-bit-rgba-paeth", paeth((8191, 3800), 16, 6), heavy=True),
    good("png-50-megapixels-1-bit-interlaced", lambda: im.interlaced(LARGE, 1, 0), heavy=True),
    good("gif-50-megapixels", lambda: im.gif(LARGE, None, im.lzw(8191 * 6100)), heavy=True),
    good(
        "webp-25-megapixels-lossless",
        noise("RGBA", (5000, 4999), "WEBP", lossless=True, quality=0, method=0),
        heavy=True,
    ),
    good("webp-1-megapixel-of-65536-groups", im.huffman_groups, heavy=True),
    good(
        "webp-20-megapixels", noise("RGB", (5000, 4000), "WEBP", quality=40, method=0), heavy=True
    ),
    good(
        "avif-20-megapixels",
        noise("RGB", (5000, 4000), "AVIF", quality=35, speed=10, subsampling="4:4:4"),
        heavy=True,
    ),
    good("avif-20-megapixels-with-alpha", file("20-megapixels-with-alpha.avif"), heavy=True),
    limited(
        "avif-268-megapixels-as-64x48",
        file("268-megapixels-as-64x48.avif"),
        heavy=True,
    ),
    limited(
        "avif-100-megapixels-in-a-track-as-64x48",
        file("100-megapixels-in-a-track-as-64x48.avif"),
        heavy=True,
    ),
    limited(
        "avif-67-megapixels-as-4096x4096",
        file("67-megapixels-as-4096x4096.avif"),
        heavy=True,
    ),
]


# AVIF: boxes and AV1 that contradict each other


def cell(**options) -> av.Item:
    """Make 64 x 64 pixels in AV1, the smallest cell of a grid."""
    return av.coded((64, 64), **options)


def alpha(item: av.Item) -> av.Item:
    """Mark an item as the transparency of another."""
    return replace(item, properties=(*item.properties, av.ALPHA))


def with_alpha(item: av.Item, transparency: av.Item, *more: tuple) -> bytes:
    """Make an AVIF of two items."""
    return av.avif(item, alpha(transparency), links=[(b"auxl", 2, [1]), *more])


def of(item: av.Item, **changes) -> Callable[[], bytes]:
    """Make a builder of an AVIF of one item, with changes."""
    return lambda: av.avif(replace(item, **changes))


def also(*properties: bytes) -> Callable[[], bytes]:
    """Make a builder of an AVIF with more properties."""
    return lambda: av.avif(replace(cell(), properties=(*cell().properties, *properties)))


def grey() -> av.Item:
    """Make 64 x 64 pixels of grey in AV1."""
    return cell(mode="L", subsampling="4:0:0")


def grid(rows: int = 1, columns: int = 2, item: av.Item | None = None) -> list[av.Item]:
    """Make a grid and its cells."""
    head = av.grid(rows, columns, 64 * columns, 64 * rows)
    return [head, *[item or cell()] * (rows * columns)]


def in_another_item() -> bytes:
    """Make an AVIF that claims that its bytes are inside another item."""
    data = av.avif(cell())
    at = data.index(b"iloc") + 18  # version, sizes, count, number
    return data[:at] + b"\0\2" + data[at + 2 :]


def extents_of_no_bytes(items: int) -> bytes:
    """Make an AVIF whose table of places is short, and lists millions of extents."""
    rows = struct.pack(">HHH", 1, 0, 65_535) * items
    iloc = av.box(b"iloc", struct.pack(">IBBH", 0, 0, 0, items), rows)
    return av.avif(cell(), more=iloc)


def two_grids() -> bytes:
    """Make a picture and its transparency, both of them grids."""
    (color, *cells), (mask, *masks) = grid(), grid(item=grey())
    links = [(b"dimg", 1, [2, 3]), (b"dimg", 4, [5, 6]), (b"auxl", 4, [1])]
    return av.avif(color, *cells, alpha(mask), *masks, links=links)


def video(*parts: bytes, size: tuple[int, int] = (64, 48)) -> Callable[[], bytes]:
    """Make a builder of an AVIF around units written by hand."""
    item = replace(av.coded(), data=b"".join(parts))
    return lambda: av.avif(av.sized(item, *size))


def without(kind: bytes) -> Callable[[], bytes]:
    """Make a builder of an AVIF in which one box of a kind has another kind."""
    return lambda: av.avif(cell()).replace(kind, b"free", 1)


def save_flat(mode: str, size: tuple[int, int], **options) -> Callable[[], bytes]:
    """Make a builder of one colour as an AVIF, encoded in one thread."""
    image = Image.new(mode, (1, 1), 90)
    return lambda: im.saved(image.resize(size), "AVIF", speed=10, max_threads=1, **options)


def crowded(count: int, headers: Callable[[int], list[bytes]]) -> Callable[[], bytes]:
    """Make a builder of a grid of different cells, each with more sequence headers."""

    def build() -> bytes:
        rows, data = count // 32, cell().data
        cells = [replace(cell(), data=b"".join(headers(i)) + data) for i in range(count)]
        links = [(b"dimg", 1, list(range(2, count + 2)))]
        return av.avif(av.grid(rows, 32, 64 * 32, 64 * rows), *cells, links=links)

    return build


def header_of(i: int) -> bytes:
    """Make one of many sequence headers."""
    return av.long_sequence(1 + i % 60_000, 1 + i // 60_000)


def first_header() -> bytes:
    """Take the sequence header out of a cell."""
    data = cell().data
    return data[data.index(b"\x0a") : data.index(b"\x32")]


def padding(i: int) -> bytes:
    """Make one of many units that say nothing."""
    return av.unit(15, struct.pack(">I", i))


def many_items(count: int) -> bytes:
    """Make an AVIF of very many pictures, each the transparency of the first."""
    links = [(b"auxl", 2 + i, [1]) for i in range(count)]
    masks = [alpha(grey())] * count
    return av.avif(cell(), *masks, links=links)


def nested(depth: int) -> bytes:
    """Make boxes within boxes."""
    data = b""
    for _ in range(depth):
        data = av.box(b"meta", bytes(4), data)
    return data


def one_cell_a_thousand_times(**changes) -> bytes:
    """Make a grid whose cells are all one item."""
    head = av.grid(32, 32, 64 * 32, 64 * 32)
    return av.avif(head, replace(cell(), **changes), links=[(b"dimg", 1, [2] * 1024)])


def mosaic() -> Image.Image:
    """Open the same grid of as many items as it has cells."""
    return Image.open(im.io.BytesIO(av.mosaic(32, 32, cell())))


LONG, OWN = av.long_sequence, av.frame_of_its_own_size
AVIFS = [
    good("avif-10-bit", file("10-bit.avif")),
    good("avif-12-bit-with-alpha", file("12-bit-with-alpha.avif")),
    good("avif-film-grain", save("RGB", "AVIF", advanced={"film-grain-test": "1"})),
    good("avif-premultiplied", save("RGBA", "AVIF", alpha_premultiplied=True)),
    good("avif-limited-range", save("RGB", "AVIF", range="limited", subsampling="4:2:2")),
    good("avif-icc-and-xmp", save("RGB", "AVIF", icc_profile=ICC, xmp=b"<x/>" * 9999)),
    good("avif-grid", lambda: av.mosaic(2, 3, cell())),
    good("avif-grid-of-1024-cells", lambda: av.mosaic(32, 32, cell())),
    good("avif-grid-with-a-grid-of-alpha", two_grids),
    good(
        "avif-grid-with-alpha-on-each-cell",
        lambda: av.avif(
            *grid(),
            alpha(grey()),
            alpha(grey()),
            links=[(b"dimg", 1, [2, 3]), (b"auxl", 4, [2]), (b"auxl", 5, [3])],
        ),
    ),
    good("avif-alpha", lambda: with_alpha(cell(), grey())),
    good("avif-alpha-multiplied", lambda: with_alpha(cell(), grey(), (b"prem", 1, [2]))),
    good("avif-alpha-of-another-alpha", lambda: with_alpha(cell(), grey(), (b"auxl", 1, [2]))),
    good("avif-in-its-boxes", of(cell(), method=1)),
    good(
        "avif-in-pieces",
        lambda: of(cell(), extents=tuple((i, 1) for i in range(len(cell().data))))(),
    ),
    good("avif-turned-and-mirrored", also(b"!irot\1", b"!imir\0")),
    good("avif-operating-point", also(b"!a1op\0")),
    good("avif-layer", also(b"!lsel\0\0")),
    good("avif-primary-is-the-last", lambda: av.avif(av.flat((8192, 8192)), cell(), primary=2)),
    good("avif-behind-it-trash", lambda: av.avif(cell(), behind=b"\xff" * 999)),
    good(
        "avif-with-a-gain-map-of-67-megapixels",
        lambda: av.avif(
            cell(),
            av.flat((8192, 8192)),
            av.Item(b"tmap", bytes(62), (av.ispe(64, 64),)),
            links=[(b"dimg", 3, [1, 2])],
            ftyp=av.FTYP + b"tmap",
        ),
        lambda: Image.open(im.io.BytesIO(av.avif(cell()))),
    ),
    good("avif-two-frames", of(cell(), data=cell().data * 2)),
    limited("avif-3072-pixels-as-20-megapixels", lambda: av.avif(av.sized(cell(), 5000, 4000))),
    limited(
        "avif-25-megapixels-as-64x48", lambda: av.avif(av.sized(av.flat((5000, 5000)), 64, 48))
    ),
    limited(
        "avif-20-megapixels-on-their-side",
        lambda: av.avif(av.sized(av.flat((5000, 4000)), 4000, 5000)),
    ),
    limited("avif-alpha-of-25-megapixels", lambda: with_alpha(cell(), av.flat((5000, 5000)))),
    limited(
        "avif-alpha-of-20-megapixels-in-colour",
        lambda: with_alpha(av.flat((5000, 4000)), av.flat((5000, 4000))),
    ),
    limited(
        "avif-alpha-that-is-told-to-be-large",
        lambda: with_alpha(cell(), av.sized(grey(), 5000, 5000)),
    ),
    limited("avif-grid-of-1056-cells", lambda: av.mosaic(33, 32, cell())),
    limited("avif-grid-of-65280-cells", lambda: av.mosaic(255, 256, cell())),
    limited("avif-grid-of-24-megapixels", lambda: av.mosaic(2, 3, av.flat((2000, 2000)))),
    limited(
        "avif-grid-whose-cells-are-told-to-be-large",
        lambda: av.avif(*grid(item=av.sized(cell(), 16_000, 16_000)), links=[(b"dimg", 1, [2, 3])]),
    ),
    limited(
        "avif-six-frames-of-4-megapixels",
        lambda: av.avif(replace(av.flat((2000, 2000)), data=av.flat((2000, 2000)).data * 6)),
    ),
    limited(
        "avif-a-small-sequence-before-a-large-one",
        lambda: av.avif(replace(cell(), data=cell().data + av.flat((5000, 5000)).data)),
    ),
    limited("avif-frame-of-its-own-size", video(LONG(64, 48), OWN(16_000, 16_000))),
    limited(
        "avif-20-megapixels-of-film-grain",
        lambda: av.avif(av.flat((5000, 4000), advanced={"film-grain-test": "1"})),
    ),
    limited("avif-18-megapixels-of-12-bits", file("18-megapixels-of-12-bits.avif")),
    *[
        limited(
            f"avif-16000-by-16000-of-equal-intervals-{zeros}",
            video(LONG(16_000, 16_000, av.equal_intervals(zeros)), OWN(64, 48)),
        )
        for zeros in (0, 1, 2, 7, 13, 31)
    ],
    good(
        "avif-1024-cells-of-95-equal-sequence-headers",
        lambda: av.mosaic(32, 32, replace(cell(), data=first_header() * 95 + cell().data)),
    ),
    limited(
        "avif-1024-cells-of-96-sequence-headers",
        crowded(1024, lambda i: [header_of(95 * i + n) for n in range(95)]),
    ),
    limited(
        "avif-32-cells-of-10-sequence-headers",
        crowded(32, lambda i: [header_of(10 * i + n) for n in range(10)]),
    ),
    limited(
        "avif-1024-cells-of-96-other-units",
        crowded(1024, lambda i: [padding(95 * i + n) for n in range(95)]),
    ),
    good("avif-1024-different-cells", crowded(1024, lambda i: [padding(i), padding(i)])),
    good("avif-one-cell-1024-times", one_cell_a_thousand_times, mosaic),
    good(
        "avif-one-cell-of-3000-extents-1024-times",
        lambda: one_cell_a_thousand_times(extents=(*((0, 0),) * 3000, (0, len(cell().data)))),
        mosaic,
    ),
    good(
        "avif-one-cell-of-250-properties-1024-times",
        lambda: one_cell_a_thousand_times(
            properties=(
                *cell().properties,
                b"pixi\0\0\0\0\3\10\10\10",
                *[b"pixi\0\0\0\0\1" + bytes([i]) for i in range(240)],
            )
        ),
        mosaic,
    ),
    good("avif-of-2000-transparencies", lambda: many_items(2000)),
    good("avif-beside-boxes-in-boxes", lambda: av.avif(cell(), behind=nested(3000))),
    limited("avif-1000-units", of(cell(), data=av.unit(15, b"") * 1000 + cell().data)),
    limited(
        "avif-the-same-bytes-20-times",
        lambda: of(cell(), extents=((0, len(cell().data)),) * 20)(),
    ),
    limited(
        "avif-table-of-100000-bytes", lambda: av.avif(*[replace(cell(), properties=())] * 6000)
    ),
    limited("avif-30000-properties", lambda: av.avif(cell(), more=av.box(b"free") * 30_000)),
    damaged("avif-box-of-no-length", lambda: av.box(av.FTYP) + b"\0\0\0\1free" + bytes(8)),
    damaged("avif-in-another-item", in_another_item),
    damaged("avif-6-million-extents-of-no-bytes", lambda: extents_of_no_bytes(100)),
    damaged("avif-grid-of-itself", lambda: av.avif(*grid(), links=[(b"dimg", 1, [1, 1])])),
    damaged(
        "avif-grid-of-grids",
        lambda: av.avif(*grid()[:1] * 3, links=[(b"dimg", i, [i % 3 + 1] * 2) for i in (1, 2, 3)]),
    ),
    damaged("avif-grid-of-too-few", lambda: av.avif(*grid(), links=[(b"dimg", 1, [2])])),
    damaged("avif-grid-of-nothing", lambda: av.avif(*grid())),
    damaged(
        "avif-grid-of-items-that-are-not-there",
        lambda: av.avif(*grid(), links=[(b"dimg", 1, [8, 9])]),
    ),
    damaged("avif-primary-that-is-not-there", lambda: av.avif(cell(), primary=9)),
    damaged("avif-of-another-codec", of(cell(), kind=b"hvc1")),
    damaged("avif-bytes-beyond-its-end", lambda: of(cell(), extents=((0, 10**6),))()),
    damaged("avif-bytes-2-to-32-away", lambda: of(cell(), extents=((2**31, 100),))()),
    damaged("avif-without-bytes", of(cell(), extents=())),
    damaged("avif-essential-and-unknown", also(b"!what\0\0\0\0")),
    damaged("avif-without-a-size", lambda: of(cell(), properties=cell().properties[1:])()),
    damaged("avif-without-a-configuration", lambda: of(cell(), properties=cell().properties[:1])()),
    damaged("avif-frame-without-a-sequence", video(OWN(64, 48))),
    damaged("avif-sequence-without-a-frame", video(LONG(64, 48))),
    damaged("avif-unit-longer-than-the-rest", video(LONG(64, 48), b"\x32\xff\xff\x03")),
    damaged("avif-of-zeros", of(cell(), data=bytes(999))),
    unsupported("avif-film-without-a-still", lambda: av.film(im.animation("AVIF"))),
    unsupported("avif-film-without-a-primary", lambda: av.without_primary(im.animation("AVIF"))),
    *[
        damaged(f"avif-without-{kind.decode()}", without(kind))
        for kind in (b"meta", b"pitm", b"iloc", b"iinf", b"iprp", b"ipco", b"ipma")
    ],
    good(
        "avif-2500-by-4000-film-grain-and-alpha",
        save_flat("RGBA", (2500, 3999), subsampling="4:4:4", advanced={"film-grain-test": "1"}),
        heavy=True,
    ),
    good(
        "avif-20-megapixels-in-4096-tiles-with-alpha",
        save_flat("RGBA", (4000, 4999), subsampling="4:4:4", tile_rows=6, tile_cols=6),
        heavy=True,
    ),
    good(
        "avif-16-megapixels-of-12-bits-with-alpha",
        file("16-megapixels-of-12-bits-with-alpha.avif"),
        heavy=True,
    ),
]

ROWS = [
    *MODES,
    *BESIDES,
    *DAMAGED,
    *PNG_CHUNKS,
    *TWICE,
    *REFUSED,
    *POLYGLOTS,
    *LIMITED,
    *AVIFS,
    *HEAVY,
]
