"""Write the requirements files from settings.ini: exact pins with hashes.

`make lock` runs it and provides uv. The locks are universal: for each Python from the oldest
supported one on, environment markers select the newest versions that still support it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"pywinpty", "colorama", "appnope", "brotlicffi", "httpx2-jsfetch"}  # with a marker

HEAD = """\
# Written by `make lock` from settings.ini; do not edit. {what}
# Linux, CPython {oldest} or later: where an older Python needs an older version, markers choose it.
"""


def wanted(*keys: str) -> str:
    """List the requirements in settings.ini under `keys`, one for each line."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return "\n".join(config["DEFAULT"][key] for key in keys)


def pin(block: str) -> str:
    """Read `name==version`, with its marker if there is one, without the hashes."""
    return block.splitlines()[0].rstrip("\\ ")


def plain(block: str) -> str:
    """Read `name==version`, without its extras and its marker."""
    return re.sub(r"\[.*?\]", "", pin(block).split(" ;")[0])


def is_elsewhere(block: str) -> bool:
    """True if a pin is only for systems or interpreters other than CPython on Linux."""
    return " ; " in pin(block) and block.split("==")[0] in ELSEWHERE


def with_and_without_extras(block: str) -> list[str]:
    """Add a pin of `name` to one of `name[extra]`.

    To pip 23 these are two things. If one is not pinned, pip takes its newest version, finds no
    hash for it, and stops.
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
    kept = [block for block in blocks if not is_elsewhere(block)]
    return [one for block in kept for one in with_and_without_extras(block)]


def write(path: Path, blocks: list[str], what: str, first: str = "") -> None:
    """Write a lock file."""
    head = HEAD.format(what=what, oldest=wanted("min_python"))
    path.write_text(head + first + "\n".join(blocks) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(blocks)} pins")


def main() -> None:
    """Write the locks; the second adds to the first, and all agree."""
    image, dev = ROOT / "requirements.txt", ROOT / "requirements-dev.txt"
    blocks = compile_lock(wanted("requirements", "worker_requirements", "build_requirements"))
    write(image, blocks, "What the image installs.")
    have = {pin(block) for block in blocks} | {plain(block) for block in blocks}
    dev_keys = ("backfill_requirements", "ray_requirements", "explore_requirements")
    dev_keys += ("check_requirements", "dev_requirements")
    more = compile_lock(wanted(*dev_keys), constraint=image)
    more = [block for block in more if not {pin(block), pin(block).split(" ;")[0]} & have]
    write(dev, more, "What notebooks and tests need besides.", first="-r requirements.txt\n")
    check_keys = ("requirements", "backfill_requirements", "check_requirements")
    quick = compile_lock(wanted(*check_keys, "build_requirements"), constraint=dev)
    write(ROOT / "requirements-check.txt", quick, "What `make check` needs, without torch.")


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        sys.exit(f"lock: {error}")
