"""Take each guard out in turn and see that a test notices: `make guards`.

Every entry names a guard, the line it is and what stands there without it. The package is copied
aside with that one change and the tests named run against the copy until the first failure. Prints
a table in Markdown (the notebooks quote it) and exits 1 when a guard can go unnoticed.
`test_guards.py` holds in every run that each entry still finds its line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "heimdex_clip_worker"
HOSTILE = "tests/hostile"
TESTS = {
    "auth": [f"{HOSTILE}/test_auth_rows.py", "tests/test_auth.py"],
    "download": [f"{HOSTILE}/test_network_rows.py", "tests/test_download.py"],
    "decode": [f"{HOSTILE}/test_image_rows.py", "tests/test_decode.py"],
    "embed": ["tests/test_decode.py", "tests/test_embed.py"],
    "handler": [f"{HOSTILE}/test_payload_rows.py", f"{HOSTILE}/test_fault_rows.py"],
    "selftest": [f"{HOSTILE}/test_selftest_rows.py"],
}


class Guard(NamedTuple):
    """A line that keeps something out."""

    module: str
    name: str
    line: str  # found exactly once in the module
    without: str  # what stands there when the guard is gone


AUTH = [
    ("the signature itself, v1", '_require(_same(mac, sig), "wrong', '_require(True, "wrong'),
    ("v1 covers no other field", "all(name in V1_FIELDS for name in job_input)", "True"),
    ("a time is a plain whole number", "type(value) is not int or not 0", "not 0"),
    ("the window, past", "if not ts - keyring.window_s <= now <=", "if not now <="),
    ("the window, future", "<= now <= ts + keyring.window_s:", "<= now:"),
    ("a sig is 64 hex digits", '    _check_text("sig", sig, _SIG)\n', ""),
    ("v2 has exactly its keys", "_require(auth.keys() == V2_AUTH,", "_require(True,"),
    ("exp after ts", "if exp <= ts:", "if False:"),
    ("depth", "if depth == MAX_DEPTH:", "if False:"),
    (
        "whole numbers JSON can hold",
        "if type(value) is int and not -MAX_INT",
        "if False and not -MAX_INT",
    ),
]
DOWNLOAD = [
    ("public addresses only", "(NEVER if allowed else DENIED)", "(NEVER if allowed else ())"),
    ("the metadata service never", "(NEVER if allowed else DENIED)", "(() if allowed else DENIED)"),
    ("ports 80 and 443", "if port not in PORTS and not allowed:", "if False:"),
    ("printable, no backslash", 'if not re.fullmatch(r"[!-~]+", url) or "\\\\" in url:', "if False:"),
    ("length of a URL", "not 0 < len(url) <= 4096", "not 0 < len(url)"),
    ("plain host names", "if len(host) > 253 or not all(", "if False and not all("),
    ("plain dotted quads", "if not _NUMBER.fullmatch(labels[-1]):", "if True:"),
    ("http and https", 'if one.scheme not in ("http", "https"):', "if False:"),
    ("two parsers agree, no user", "if not same or not one.hostname or", "if False and"),
    ("the host list", "if policy.allowed_hosts and not _is_listed(", "if False and not _is_listed("),
    ("a suffix begins with a dot", "host.endswith(entry[1:].lower())", "host.endswith(entry[2:].lower())"),
    ("http can be switched off", 'if scheme == "http" and not policy.allow_http:', "if False:"),
    ("every answer of a look-up", "            check_address(address, self._policy, port=port)\n", ""),
    ("the address at the socket", "    check_address(address[0], policy, port=address[1])\n", ""),
    (
        "a look-up ends",
        "asyncio.wait_for(self._look_up(host), self._timeout_s)",
        "self._look_up(host)",
    ),
    (
        "a fetch ends",
        "asyncio.wait_for(self._follow(url), self.limits.timeout_s)",
        "self._follow(url)",
    ),
    ("interim answers are few", "    if left < 0:", "    if False:"),
    ("one request a hop", "        middlewares=(_send_once,),\n", ""),
    ("codings besides gzip", 'raise BadResponse(detail="a content coding besides gzip")', 'return ""'),
    ("bytes on the wire and unpacked", "if max(self._wire, len(self._data)) > self._max:", "if False:"),
    ("gzip ends where it should", "if self._gzip and (not self._gzip.eof", "if False and (not self._gzip.eof"),
    ("status 200", "if response.status != 200:", "if False:"),
    ("no fall back to http", '== ("https", "http"):', '== ("https", "gopher"):'),
    ("one Location", "if len(locations) != 1:", "if not locations:"),
    ("connections are not kept", "        force_close=True,\n", ""),
    ("nothing from the environment", "trust_env=False,", "trust_env=True,"),
    ("no cookies", "        cookie_jar=aiohttp.DummyCookieJar(),\n", ""),
    ("bodies stay as they came", "        auto_decompress=False,\n", ""),
]
DECODE = [
    ("a scan limit", "    if scans > most:", "    if False:"),
    ("a side limit", "    if side > limits.max_side:", "    if False:"),
    ("a pixel limit", "    if pixels > allowed:", "    if False:"),
    ("16 bits are scaled", '    if image.mode == "I;16":', "    if False:"),
    ("decoded to the end", "        image.load()\n", ""),
    (
        "only these formats",
        '    raise UnsupportedFormat(detail=f"{len(data):,} bytes of',
        '    return "JPEG"\n    raise UnsupportedFormat(detail=f"{len(data):,} bytes of',
    ),
]
EMBED = [
    ("very long images are cut", "    if long <= keep:", "    if True:"),
    ("vectors have a length", "    if bad:", "    if False:"),
]
HANDLER = [
    ("an id can be printed", "and given.isprintable():", ":"),
    ("an id is short", "len(given) <= MAX_REQUEST_ID and", ""),
    ("normalize is true or false", "    if not isinstance(normalize, bool):", "    if False:"),
    ("a URL is text", "    if not isinstance(url, str):", "    if False:"),
    ("unknown fields are told", "        refuse_unknown_fields(job_input)\n", ""),
    (
        "who asks",
        "credential = verify(job_input, keyring=self.keyring, now=self.clock())",
        "from heimdex_clip_worker.auth import Credential; credential = Credential(1, 'v1')",
    ),
    (
        "replies are plain",
        "return sealed(await self.service.answer(job_input))",
        "return await self.service.answer(job_input)",
    ),
    ("SystemExit stays in its job", "except BaseException as error:", "except Exception as error:"),
    ("a lost device stays lost", "            if self.lost:", "            if False:"),
]  # fmt: skip
SELFTEST = [
    ("true is true", 'job_input.get("selftest") is True', 'job_input.get("selftest")'),
    ("nothing beside it", "len(job_input) == 1 and ", ""),
    ("once in ten seconds", "self.clock() - self._ended >= EVERY_S", "True"),
    ("one run for all", "old = last and last.done() and", "old ="),
    ("a run belongs to nobody", "await asyncio.wait([task])", "await task"),
    ("the golden rows", "if not turned <= ", "if not 0 <= "),
]
GUARDS = [
    Guard(module, *entry)
    for module, entries in (
        ("auth", AUTH),
        ("download", DOWNLOAD),
        ("decode", DECODE),
        ("embed", EMBED),
        ("handler", HANDLER),
        ("selftest", SELFTEST),
    )
    for entry in entries
]


def without(guard: Guard, folder: Path) -> None:
    """Copy the package into `folder`, less one guard; raise ValueError unless it is found once."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = copy / f"{guard.module}.py"
    text = module.read_text(encoding="utf-8")
    if text.count(guard.line) != 1:
        raise ValueError(f"{guard.module}: {guard.line!r} is there {text.count(guard.line)} times")
    module.write_text(text.replace(guard.line, guard.without), encoding="utf-8")


def noticed_by(guard: Guard, limit_s: float = 240) -> str:
    """Return the first test that fails without `guard`, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        without(guard, Path(folder))
        for name in ("tests", "tools"):  # pytest puts its own root first: so the tests move too
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("conftest.py", "pyproject.toml", "settings.ini", "test_vectors.json"):
            shutil.copy(ROOT / name, folder)
        (ROOT / ".cache").mkdir(exist_ok=True)
        (Path(folder) / ".cache").symlink_to(ROOT / ".cache")
        command = [str(Path(sys.executable).parent / "pytest"), "-x", "-q", "-p", "no:cacheprovider"]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                [*command, *TESTS[guard.module]],
                cwd=folder,
                env=env,
                text=True,
                capture_output=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return "(the tests hang)"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", ran.stdout, re.M)
    return failed[1] if ran.returncode == 1 and failed else ""


def main() -> None:
    """Print the table; exit with status 1 when a guard can go unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=sorted(TESTS), help="only this module's guards")
    parser.add_argument("--name", default="", help="only guards whose name contains this")
    args = parser.parse_args()
    chosen = [g for g in GUARDS if args.module in (None, g.module) and args.name in g.name]
    print("| module | guard | without it fails | s |\n| --- | --- | --- | --- |", flush=True)
    unnoticed = 0
    for guard in chosen:
        start = time.monotonic()
        test = noticed_by(guard)
        unnoticed += not test
        where = f"`{test.split('::', 1)[-1]}`" if test else "**nothing**"
        took = time.monotonic() - start
        print(f"| {guard.module} | {guard.name} | {where} | {took:.0f} |", flush=True)
    print(f"\n{len(chosen)} guards, {unnoticed} unnoticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
