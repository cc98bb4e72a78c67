"""AVIF files that no encoder writes: boxes by hand around AV1 that an encoder made.

An item has a kind, bytes, properties, and the places that the boxes declare for its bytes.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import images as im
from PIL import Image

FTYP = b"ftypavif\0\0\0\0avifmif1miaf"
ALPHA = b"auxC" + bytes(4) + b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"


def box(*parts: bytes) -> bytes:
    """Make a box of its kind and body."""
    return struct.pack(">I", 4 + sum(map(len, parts))) + b"".join(parts)


def ispe(width: int, height: int) -> bytes:
    """Make the property that declares a size."""
    return b"ispe" + struct.pack(">3I", 0, width, height)


@dataclass(frozen=True)
class Item:
    """One item of a file."""

    kind: bytes
    data: bytes
    properties: tuple[bytes, ...] = ()  # kind and body; "!" before it: essential
    method: int = 0  # 0: in the file, 1: in the box idat, 2: in another item
    extents: tuple[tuple[int, int], ...] | None = None  # offset in `data`, length; None: all of it


@functools.cache
def coded(size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> Item:
    """Encode `picture()` in AV1; options are Pillow's."""
    data = im.saved(im.picture(mode, size), "AVIF", speed=10, **options)
    at = data.index(b"av1C") + 4
    config = b"av1C" + data[at : at + 4]
    return Item(b"av01", data[data.index(b"mdat") + 4 :], (ispe(*size), b"!" + config))


def sized(item: Item, width: int, height: int) -> Item:
    """Make a copy of an item that declares another size."""
    return Item(item.kind, item.data, (ispe(width, height), *item.properties[1:]))


def grid(rows: int, columns: int, width: int, height: int) -> Item:
    """Make a grid's own item."""
    data = struct.pack(">4B2I", 0, 1, rows - 1, columns - 1, width, height)
    return Item(b"grid", data, (ispe(width, height),))


def avif(
    *items: Item,  # numbered from 1
    links: Iterable[tuple[bytes, int, list[int]]] = (),  # kind, from, to
    primary: int = 1,
    ftyp: bytes = FTYP,
    more: bytes = b"",  # boxes in meta, before the others
    behind: bytes = b"",  # boxes behind everything
) -> bytes:
    """Make an AVIF in which equal bytes are stored once."""
    kinds = [
        box(b"infe", struct.pack(">IIH4sx", 3 << 24, number, 0, item.kind))
        for number, item in enumerate(items, 1)
    ]
    there: list[bytes] = []
    rows = []
    for number, item in enumerate(items, 1):
        indices = []
        for one in item.properties:
            made = box(one.removeprefix(b"!"))
            there += [] if made in there else [made]
            indices.append(one.startswith(b"!") << 15 | there.index(made) + 1)
        rows.append(struct.pack(f">IB{len(indices)}H", number, len(indices), *indices))
    refs = [box(k, struct.pack(f">IH{len(to)}I", a, len(to), *to)) for k, a, to in links]
    bodies = {
        method: list(dict.fromkeys(i.data for i in items if i.method == method))
        for method in (0, 1, 2)
    }

    owners = struct.pack(">II", 1 << 24 | 1, len(items))

    def iloc(start: int) -> bytes:
        table = [struct.pack(">IBBI", 2 << 24, 0x44, 0, len(items))]
        for number, item in enumerate(items, 1):
            before = bodies[item.method]
            at = sum(map(len, before[: before.index(item.data)])) + start * (item.method == 0)
            extents = ((0, len(item.data)),) if item.extents is None else item.extents
            table.append(struct.pack(">IHHH", number, item.method, 0, len(extents)))
            table += [struct.pack(">II", at + offset, length) for offset, length in extents]
        return box(b"iloc", *table)

    def meta(start: int) -> bytes:
        return box(
            b"meta", bytes(4), more,
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", struct.pack(">II", 1 << 24, primary)),
            iloc(start),
            box(b"iinf", struct.pack(">II", 1 << 24, len(items)), *kinds),
            *([box(b"iref", struct.pack(">I", 1 << 24), *refs)] if refs else []),
            box(b"iprp", box(b"ipco", *there), box(b"ipma", owners, *rows)),
            *([box(b"idat", *bodies[1])] if bodies[1] else []),
        )  # fmt: skip

    head = len(box(ftyp)) + len(meta(0)) + 8
    return b"".join([box(ftyp), meta(head), box(b"mdat", *bodies[0]), behind])


def mosaic(rows: int, columns: int, cell: Item, **options) -> bytes:
    """Make a grid that shows one cell again and again."""
    width, height = struct.unpack(">2I", cell.properties[0][8:])
    head = grid(rows, columns, columns * width, rows * height)
    cells = [cell] * (rows * columns)
    return avif(head, *cells, links=[(b"dimg", 1, list(range(2, len(cells) + 2)))], **options)


def flat(size: tuple[int, int], **options) -> Item:
    """Encode a single grey in AV1: a large picture of few bytes."""
    data = im.saved(Image.new("RGB", size, (90, 90, 90)), "AVIF", speed=10, **options)
    at = data.index(b"av1C") + 4
    config = b"av1C" + data[at : at + 4]
    return Item(b"av01", data[data.index(b"mdat") + 4 :], (ispe(*size), b"!" + config))


# AV1 by hand


def bits(*fields: str) -> bytes:
    """Pack fields of binary digits into bytes, padded with zeros."""
    text = "".join(fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def unit(kind: int, data: bytes) -> bytes:
    """Make a unit (OBU): 1 a sequence header, 6 a frame, 15 padding."""
    low, high = len(data) & 0x7F, len(data) >> 7
    return bytes([kind << 3 | 2] + ([low | 0x80, high] if high else [low])) + data


def long_sequence(width: int, height: int, timing: str = "0") -> bytes:
    """Make a sequence header that leaves every choice to the frames, with 16 bits for a side."""
    size = f"{width - 1:016b}{height - 1:016b}"
    timing, points, level = timing + "0", "00000" + "0" * 12, "00111"
    tools = ("0", "000", "0000", "0", "1", "1", "000")  # no frame numbers, nothing, screen: ask
    colour = ("0", "0", "0", "0", "00", "0")  # 8 bits, not grey, undescribed, 4:2:0
    fields = ("000", "0", "0", timing, points, level, "1" * 8, size, *tools, *colour, "0", "1")
    return unit(1, bits(*fields))


def equal_intervals(zeros: int) -> str:
    """Make the timing of pictures that follow each other after 2 ** zeros ticks or more."""
    ticks = "1" + "0" * zeros + "1" + ("10" * zeros)[:zeros]
    return "1" + f"{1:032b}{25:032b}" + ticks + "0"  # and no model of a decoder


def film(data: bytes) -> bytes:
    """Take the still picture out of a film: its track stays, and the box meta goes."""
    return data.replace(b"meta", b"free", 1)


def without_primary(data: bytes) -> bytes:
    """Take out the box that names the still picture of a film."""
    return data.replace(b"pitm", b"free", 1)


def frame_of_its_own_size(width: int, height: int) -> bytes:
    """Make a key frame of zeros for `long_sequence` that has a size of its own."""
    size = f"{width - 1:016b}{height - 1:016b}"
    return unit(6, bits("0", "00", "1", "0", "0", "1", size) + bytes(200))
