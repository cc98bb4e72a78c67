"""Mutated images against `decode.decode`: `python tests/hostile/fuzz.py --count 1000000 --seed 7`.

Only a picture or a declared code may come out, within the budget of CPU. What fails is written to
`regressions/`, which the suite replays for ever; a crash of the process leaves its seed and number.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE)]

import avifs as av  # noqa: E402
import images as im  # noqa: E402

from heimdex_clip_worker.decode import PixelLimits, decode  # noqa: E402
from heimdex_clip_worker.errors import (  # noqa: E402
    DecodeFailed,
    ImageLimits,
    UnsupportedFormat,
)

REGRESSIONS = HERE / "regressions"
LIMITS = PixelLimits(max_pixels=250_000, max_side=2048)  # small ones, for many images a second
DECLARED = (DecodeFailed, ImageLimits, UnsupportedFormat)
SLOW_S = 2.0
VALUES = (0, 1, 2, 0x7F, 0x80, 0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE, 0xFF)


def seeds() -> list[bytes]:
    """Return honest small files of every format and kind."""
    size = (24, 16)
    rgb, rgba, grey = (im.picture(mode, size) for mode in ("RGB", "RGBA", "L"))
    found = [
        im.saved(im.picture(mode, size), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    ]
    found += [im.saved(rgb, "JPEG", **o) for o in ({}, {"progressive": True}, {"subsampling": 0})]
    found += [im.saved(im.picture("CMYK", size), "JPEG"), im.saved(grey, "JPEG")]
    found += [im.saved(rgb, "WEBP"), im.saved(rgba, "WEBP"), im.saved(rgba, "WEBP", lossless=True)]
    found += [im.saved(rgb, "AVIF", speed=10), im.saved(rgba, "AVIF", speed=10)]
    found += [im.saved(im.picture("P", size), "GIF", interlace=i) for i in (0, 1)]
    found += [im.animation(format, 2, size) for format in ("PNG", "GIF", "WEBP", "AVIF")]
    found += [im.interlaced_picture(size)[0], im.png16("RGBA", size)[0], im.scan_bomb(5, size)]
    return [
        *found,
        im.saved(im.picture("I;16", size), "PNG"),
        im.riff(im.vp8x((64, 48)), im.webp_stream()),
        av.mosaic(1, 2, av.coded((64, 64))),
        av.avif(av.Item(b"av01", av.coded(size).data, av.coded(size).properties, method=1)),
    ]


def repaired(data: bytes) -> bytes:
    """Return a PNG with every check sum right, so that what lies behind them is reached."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[at:end], zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")]
        at = end + 4
    return b"".join([*parts, data[at:]])


def mutated(data: bytes, other: bytes, choose: random.Random) -> bytes:
    """Return `data` with one to six changes."""
    found = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 6))):
        at, kind = choose.randrange(len(found) or 1), choose.randrange(8)
        if choose.random() < 0.4:  # headers matter most
            at = min(at, choose.randrange(120))
        length = choose.choice((1, 2, 4, 16, 64))
        if kind == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << choose.randrange(8)
        elif kind == 1:
            found[at : at + 1] = bytes([choose.choice(VALUES)])
        elif kind == 2:
            found[at : at + length] = choose.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length] * choose.choice((1, 2, 30))
        elif kind == 5:
            found[at : at + 4] = choose.choice(
                (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)
            ).to_bytes(4, choose.choice(("big", "little")))
        elif kind == 6:
            start = choose.randrange(len(other))
            found[at : at + length] = other[start : start + length]
        else:
            del found[max(at, 8) :]
    done = bytes(found)
    return repaired(done) if data[:4] == b"\x89PNG" and choose.random() < 0.7 else done


def outcome(data: bytes) -> str:
    """Return how decoding ends: OK or a declared code; anything else begins with `BAD`."""
    start = time.process_time()
    try:
        image = decode(data, LIMITS)
        image.load()
        right = image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height
        end = "OK" if right else "BAD picture"
    except DECLARED as error:
        end = error.code
    except BaseException as error:  # whatever it is, it is what is looked for
        end = f"BAD {type(error).__name__}: {error}"
    spent = time.process_time() - start
    return end if spent < SLOW_S else f"BAD {spent:.1f} s of CPU"


def keep(data: bytes) -> Path:
    """Write an input that failed where the suite replays it."""
    path = REGRESSIONS / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def tell(line: str) -> None:
    """Print a line in one piece: `print` may write its end separately, and others write, too."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def fuzz(count: int, seed: int, note: Path | None = None) -> Counter[str]:
    """Try `count` images; return how many ended how."""
    files, choose, found = seeds(), random.Random(seed), Counter()
    for number in range(count):
        data = mutated(files[number % len(files)], choose.choice(files), choose)
        if note:
            note.write_bytes(data)  # there after a crash
        end = outcome(data)
        found[end] += 1
        if end.startswith("BAD"):
            tell(f"{end}  number {number}, seed {seed}: {keep(data).name}")
    return found


def main() -> int:
    """Share the work among processes, so that a crash in a codec is seen and does not end all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        warnings.simplefilter("ignore")
        found = fuzz(given.count, given.seed, given.child)
        tell(" ".join(f"{name}={n}" for name, n in sorted(found.items()) if " " not in name))
        return int(any(name.startswith("BAD") for name in found))
    notes = [REGRESSIONS / f".running-{os.getpid()}-{i}" for i in range(given.processes)]
    REGRESSIONS.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--count", str(-(-given.count // given.processes))]
    children = [
        subprocess.Popen([*command, "--seed", str(given.seed * 1000 + i), "--child", str(note)])
        for i, note in enumerate(notes)
    ]
    failed = 0
    for child, note in zip(children, notes, strict=True):
        status = child.wait()
        failed |= status != 0
        if status < 0:
            print(f"CRASH with signal {-status}: {keep(note.read_bytes()).name}")
        note.unlink(missing_ok=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
