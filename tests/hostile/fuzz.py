"""Decode mutated images: `python tests/hostile/fuzz.py --count 1000000 --seed 7`.

Each must end in an image or a declared code, within its CPU budget. An input that does not is
written to `regressions/`, which the suite replays in every run. So is one that crashes the process.
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

from heimdex_clip_worker.errors import (  # noqa: E402
    DecodeFailed,
    ImageLimits,
    UnsupportedFormat,
)
from heimdex_clip_worker.serving.decode import PixelLimits, decode  # noqa: E402

REGRESSIONS = HERE / "regressions"
LIMITS = PixelLimits(max_pixels=250_000, max_side=2048)  # small, for many images a second
DECLARED = (DecodeFailed, ImageLimits, UnsupportedFormat)
SLOW_S = 2.0
VALUES = (0, 1, 2, 0x7F, 0x80, 0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE, 0xFF)


def seeds() -> list[bytes]:
    """Make small valid files of every format and kind."""
    size = (24, 16)
    rgb, rgba, grey = (im.picture(mode, size) for mode in ("RGB", "RGBA", "L"))
    files = [
        im.saved(im.picture(mode, size), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    ]
    files += [im.saved(rgb, "JPEG", **o) for o in ({}, {"progressive": True}, {"subsampling": 0})]
    files += [im.saved(im.picture("CMYK", size), "JPEG"), im.saved(grey, "JPEG")]
    files += [im.saved(rgb, "WEBP"), im.saved(rgba, "WEBP"), im.saved(rgba, "WEBP", lossless=True)]
    files += [im.saved(rgb, "AVIF", speed=10), im.saved(rgba, "AVIF", speed=10)]
    files += [im.saved(im.picture("P", size), "GIF", interlace=i) for i in (0, 1)]
    files += [im.animation(format, 2, size) for format in ("PNG", "GIF", "WEBP", "AVIF")]
    files += [im.interlaced_picture(size)[0], im.png16("RGBA", size)[0], im.scan_bomb(5, size)]
    return [
        *files,
        im.saved(im.picture("I;16", size), "PNG"),
        im.riff(im.vp8x((64, 48)), im.webp_stream()),
        av.mosaic(1, 2, av.coded((64, 64))),
        av.avif(av.Item(b"av01", av.coded(size).data, av.coded(size).properties, method=1)),
    ]


def repaired(data: bytes) -> bytes:
    """Correct every checksum of a PNG, so that the decoder reads what they protect."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[at:end], zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")]
        at = end + 4
    return b"".join([*parts, data[at:]])


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Change `data` in one to six places; mix in parts of `other`."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, kind = rng.randrange(len(result) or 1), rng.randrange(8)
        if rng.random() < 0.4:  # headers matter most
            at = min(at, rng.randrange(120))
        length = rng.choice((1, 2, 4, 16, 64))
        if kind == 0 and result:
            result[min(at, len(result) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at : at + 1] = bytes([rng.choice(VALUES)])
        elif kind == 2:
            result[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            del result[at : at + length]
        elif kind == 4:
            result[at:at] = result[at : at + length] * rng.choice((1, 2, 30))
        elif kind == 5:
            result[at : at + 4] = rng.choice(
                (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)
            ).to_bytes(4, rng.choice(("big", "little")))
        elif kind == 6:
            start = rng.randrange(len(other))
            result[at : at + length] = other[start : start + length]
        else:
            del result[max(at, 8) :]
    mutant = bytes(result)
    return repaired(mutant) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else mutant


def outcome(data: bytes) -> str:
    """Decode; return OK, a declared code, or a text that begins with `BAD`."""
    start = time.process_time()
    try:
        image = decode(data, LIMITS)
        image.load()
        right = image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height
        end = "OK" if right else "BAD picture"
    except DECLARED as error:
        end = error.code
    except BaseException as error:  # this is what the fuzz run searches for
        end = f"BAD {type(error).__name__}: {error}"
    spent = time.process_time() - start
    return end if spent < SLOW_S else f"BAD {spent:.1f} s of CPU"


def keep(data: bytes) -> Path:
    """Write an input that failed to the folder that the suite replays."""
    path = REGRESSIONS / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def report(line: str) -> None:
    """Print a line in one write: `print` may use two, and several processes share the output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def fuzz(count: int, seed: int, note: Path | None = None) -> Counter[str]:
    """Decode `count` images; count the results."""
    files, rng, results = seeds(), random.Random(seed), Counter()
    for number in range(count):
        data = mutated(files[number % len(files)], rng.choice(files), rng)
        if note:
            note.write_bytes(data)  # still there after a crash
        end = outcome(data)
        results[end] += 1
        if end.startswith("BAD"):
            report(f"{end}  number {number}, seed {seed}: {keep(data).name}")
    return results


def main() -> int:
    """Share the work among processes, so that a crash in a codec is noticed and ends only one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        results = fuzz(args.count, args.seed, args.child)
        report(" ".join(f"{name}={n}" for name, n in sorted(results.items()) if " " not in name))
        return int(any(name.startswith("BAD") for name in results))
    notes = [REGRESSIONS / f".running-{os.getpid()}-{i}" for i in range(args.processes)]
    REGRESSIONS.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--count", str(-(-args.count // args.processes))]
    children = [
        subprocess.Popen([*command, "--seed", str(args.seed * 1000 + i), "--child", str(note)])
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
