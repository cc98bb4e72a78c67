"""Write requirements.txt and requirements-dev.txt from settings.ini: exact pins with hashes.

Run by `make lock`, which provides uv. The locks are universal: environment markers pick, for each
Python from the oldest supported one on, the newest versions that still support it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"pywinpty", "colorama", "appnope", "brotlicffi", "httpx2-jsfetch"}  # unless unmarked

HEAD = """\
# Written by `make lock` from settings.ini; do not edit. {what}
# Linux, CPython {oldest} or later: where an older Python needs an older version, markers choose it.
"""


def wanted(*keys: str) -> str:
    """Return the requirements listed in settings.ini under `keys`, a line each."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return "\n".join(config["DEFAULT"][key] for key in keys)


def pin(block: str) -> str:
    """Return `name==version`, with its marker if it has one, without the hashes."""
    return block.splitlines()[0].rstrip("\\ ")


def plain(block: str) -> str:
    """Return `name==version`, without its extras and its marker."""
    return re.sub(r"\[.*?\]", "", pin(block).split(" ;")[0])


def elsewhere(block: str) -> bool:
    """Tell whether a pin is only for systems or interpreters other than CPython on Linux."""
    return " ; " in pin(block) and block.split("==")[0] in ELSEWHERE


def both(block: str) -> list[str]:
    """Return a pin of `name[extra]` beside one of `name`.

    For pip 23 these are two things: it takes the newest version of the one that is not pinned,
    finds no hash for it, and stops.
    """
    name, extras, rest = re.match(r"([^\[=]+)(\[.*?\])?(.*)", block, re.DOTALL).groups()
    return [block, name + rest] if extras else [block]


def compile_lock(
    requirements: str,  # a line each
    constraint: Path | None = None,  # a lock that the new one must agree with
) -> list[str]:
    """Resolve `requirements` and return one block of text per pinned distribution."""
    command = ["uv", "pip", "compile", "-", "--universal", "--generate-hashes", "--no-annotate"]
    command += ["--python-version", wanted("min_python"), "--no-header", "--quiet", "--no-config"]
    command += ["--no-strip-extras"]
    if constraint:
        command += ["--constraint", str(constraint)]
    done = subprocess.run(
        command, input=requirements, text=True, stdout=subprocess.PIPE, check=True
    )
    blocks = re.split(r"\n(?=\S)", done.stdout.strip())
    return [one for block in blocks if not elsewhere(block) for one in both(block)]


def write(path: Path, blocks: list[str], what: str, first: str = "") -> None:
    """Write a lock file."""
    head = HEAD.format(what=what, oldest=wanted("min_python"))
    path.write_text(head + first + "\n".join(blocks) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(blocks)} pins")


def main() -> None:
    """Write both locks; the second one adds to the first and agrees with it."""
    image, dev = ROOT / "requirements.txt", ROOT / "requirements-dev.txt"
    blocks = compile_lock(wanted("requirements", "worker_requirements", "build_requirements"))
    write(image, blocks, "What the image installs.")
    have = {pin(block) for block in blocks} | {plain(block) for block in blocks}
    more = compile_lock(wanted("backfill_requirements", "dev_requirements"), constraint=image)
    more = [block for block in more if not {pin(block), pin(block).split(" ;")[0]} & have]
    write(dev, more, "What notebooks and tests need besides.", first="-r requirements.txt\n")


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        sys.exit(f"lock: {error}")
