"""Take each guard out in turn and see that a test notices: `make guards`.

Every entry names a guard, the line it is and what stands there without it. The package is copied
aside with that one change, and the test that the table in `nbs/06a_guards.ipynb` names is run
against the copy; if it does not fail, so are all the tests of the module. Prints the table anew and
exits 1 when a guard can go unnoticed. `test_guards.py` holds in every run that each entry still
finds its line, and that the table has every entry.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "heimdex_clip_worker"
NOTEBOOK = ROOT / "nbs" / "06a_guards.ipynb"  # its table names the test that notices each guard
HOSTILE = "tests/hostile"
TESTS = {
    "auth": [f"{HOSTILE}/test_auth_rows.py", "tests/test_auth.py"],
    "contract": [f"{HOSTILE}/test_payload_rows.py", f"{HOSTILE}/test_many_rows.py"],
    "download": [f"{HOSTILE}/test_network_rows.py", "tests/test_download.py"],
    "avif": ["-k", "avif", f"{HOSTILE}/test_image_rows.py"],
    "decode": [f"{HOSTILE}/test_image_rows.py", "tests/test_decode.py"],
    "preprocess": [f"{HOSTILE}/test_image_rows.py", "tests/test_decode.py"],
    "embed": ["tests/test_decode.py", "tests/test_embed.py"],
    "batch": [f"{HOSTILE}/test_fault_rows.py", f"{HOSTILE}/test_many_rows.py"],
    "handler": [
        f"{HOSTILE}/test_payload_rows.py",
        f"{HOSTILE}/test_fault_rows.py",
        f"{HOSTILE}/test_many_rows.py",
    ],
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
    (
        "printable, no backslash",
        'if not re.fullmatch(r"[!-~]+", url) or "\\\\" in url:',
        "if False:",
    ),
    ("length of a URL", "not 0 < len(url) <= 4096", "not 0 < len(url)"),
    ("plain host names", "if len(host) > 253 or not all(", "if False and not all("),
    ("plain dotted quads", "if not _NUMBER.fullmatch(labels[-1]):", "if True:"),
    ("http and https", 'if one.scheme not in ("http", "https"):', "if False:"),
    ("two parsers agree, no user", "if not same or not one.hostname or", "if False and"),
    (
        "the host list",
        "if policy.allowed_hosts and not _is_listed(",
        "if False and not _is_listed(",
    ),
    (
        "a suffix begins with a dot",
        "host.endswith(entry[1:].lower())",
        "host.endswith(entry[2:].lower())",
    ),
    ("http can be switched off", 'if scheme == "http" and not policy.allow_http:', "if False:"),
    (
        "every answer of a look-up",
        "            check_address(address, self._policy, port=port)\n",
        "            pass\n",
    ),
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
    (
        "codings besides gzip",
        'raise BadResponse(detail="a content coding besides gzip")',
        'return ""',
    ),
    (
        "bytes on the wire and unpacked",
        "if max(self._wire, self._size) > self._max:",
        "if False:",
    ),
    (
        "tiny chunks are put together",
        "if len(self._part) >= _PART:",
        "if True:",
    ),
    (
        "gzip ends where it should",
        "if self._gzip and (not self._gzip.eof",
        "if False and (not self._gzip.eof",
    ),
    ("status 200", "if response.status != 200:", "if False:"),
    ("no fall back to http", '== ("https", "http"):', '== ("https", "gopher"):'),
    ("one Location", "if len(locations) != 1:", "if not locations:"),
    ("connections are not kept", "        force_close=True,\n", ""),
    ("nothing from the environment", "trust_env=False,", "trust_env=True,"),
    ("no cookies", "        cookie_jar=aiohttp.DummyCookieJar(),\n", ""),
    ("bodies stay as they came", "        auto_decompress=False,\n", ""),
]
DECODE = [
    (
        "an AVIF is written anew",
        "        data = still(data, max_pixels=_allowed(limits, COSTLY[name]))\n",
        "        pass\n",
    ),
    ("parts of a file", "MAX_PARTS = 20_000 ", "MAX_PARTS = 20_000_000 "),
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
CONTRACT = [
    ("an id can be printed", " and value.isprintable():", ":"),
    ("an id is short", "len(value) <= MAX_REQUEST_ID and ", ""),
    (
        "a source is text",
        '    if not isinstance(value, str):\n        raise InvalidRequest(f"{name} must be a',
        '    if False:\n        raise InvalidRequest(f"{name} must be a',
    ),
    ("length of a text", 'if name == "text" and len(value) > MAX_TEXT:', "if False:"),
    ("length of a URL", 'if name == "image_url" and len(value) > MAX_URL:', "if False:"),
    ("normalize is true or false", "    if not isinstance(value, bool):", "    if False:"),
    ("an image is an object", "        if not isinstance(entry, dict):", "        if False:"),
    ("unknown fields of an image are told", "        if unknown:\n", "        if False:\n"),
    ("many are a list", "    if not isinstance(value, list) or not value:", "    if False:"),
    ("a job has so many items", "    if len(value) > bounds.max_items:", "    if False:"),
    ("the input is an object", "    if not isinstance(job_input, dict):", "    if False:"),
    ("a model's name is text", "    if model is not None and not (", "    if False and not ("),
    ("encodings are known", "    if encoding not in ENCODINGS:", "    if False:"),
    ("an answer fits", "    check_answer_size(request, bounds)\n", ""),
    ("unknown fields are told", "unknown = len(job_input.keys() - FIELDS)", "unknown = 0"),
    ("one form at once", "    if len(given) > 1:", "    if False:"),
]
AVIF = [
    (
        "a box has its length",
        "if not start <= end - position <=",
        "if False and not start <= end - position <=",
    ),
    ("boxes side by side", "MAX_BOXES = 20_000", "MAX_BOXES = 20_000_000"),
    ("tables are short", "if len(found[kind]) > MAX_TABLE:", "if False:"),
    ("a place takes bytes", " or length not in (4, 8):", ":"),
    ("no bytes in another item", "        if method > 1:", "        if False:"),
    (
        "unknown and essential",
        "            elif essential and kind not in",
        "            elif False and kind not in",
    ),
    ("units of a picture", "MAX_UNITS = 100 ", "MAX_UNITS = 100_000 "),
    ("a frame may bring its size", "return kind == SWITCH or bool(reader.bits(1))", "return False"),
    ("deep colours cost more", "(1.25 if deep else 1)", "1"),
    ("film grain costs double", "(2 if reader.bits(1) else 1)", "1"),
    ("scaling costs too", "        pixels += told[0] * told[1]\n", "        pass\n"),
    ("alpha in colour costs double", "(2 if alpha and not sequence.grey else 1)", "1"),
    ("every frame counts", "            frames += 1\n", "            frames = 1\n"),
    (
        "the bytes are there",
        "            if any(offset + length > len(source)",
        "            if False and any(offset + length > len(source)",
    ),
    (
        "the bytes are taken once",
        "            if sum(taken) > len(self.data):",
        "            if False:",
    ),
    ("cells of a grid", "    if len(cells) > MAX_CELLS:", "    if False:"),
    ("pixels of all cells", "        if pixels > max_pixels:", "        if False:"),
]
PREPROCESS = [("very long images are cut", "    if long <= keep:", "    if True:")]
EMBED = [("vectors have a length", "    if bad:", "    if False:")]
BATCH = [
    (
        "a thread's exit stays in its job",
        "(StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit)",
        "()",
    ),
    ("a bad batch is halved", "        if len(batch) > 1 and not", "        if False and not"),
    ("a fatal fault is not tried again", ' and not getattr(error, "fatal", False):', ":"),
    (
        "as many rows as items",
        "        if tuple(rows.shape) !=",
        "        if False and tuple(rows.shape) !=",
    ),
    ("bytes in flight", "line[0][0] <= self.free and ", ""),
    ("images in hand", "max_bytes_in_flight // in_hand", "0"),
    ("no job takes it all", " and self._held[job] < self.free:", ":"),
    (
        "no job has all the threads",
        "        async with Hold(pipeline.turns, 1, job):",
        "        if True:",
    ),
]
HANDLER = [
    (
        "who asks",
        "credential = verify(job_input, keyring=self.keyring, now=self.clock())",
        "from heimdex_clip_worker.auth import Credential; credential = Credential(1, 'v1')",
    ),
    ("fields that nobody reads", "        refuse_unknown_fields(job_input)\n", ""),
    ("replies are plain", "        return sealed(await self.service", "        return (await self.service"),
    ("SystemExit stays in its job", "    except BaseException as error:", "    except Exception as error:"),
    ("a fault stays with its item", "[guarded(one, item.request_id) for one, item in pairs]", "[one for one, _ in pairs]"),
    ("a bad item has a fault", "    if item.fault:", "    if False:"),
    ("a lost device stays lost", "        if self.lost:\n            raise", "        if False:\n            raise"),
    ("a lost device ends the worker", "            self.on_fatal()\n", ""),
    ("one lost item loses the worker", "if any(lost) else reply", "if False else reply"),
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
        ("contract", CONTRACT),
        ("avif", AVIF),
        ("decode", DECODE),
        ("preprocess", PREPROCESS),
        ("embed", EMBED),
        ("batch", BATCH),
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


def known() -> dict[tuple[str, str], str]:
    """Return the test that notices each guard, by module and name, as the notebook's table says."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    rows = re.findall(r"^\| (\w+) \| (.+?) \| `(.+?)` \|$", text, re.MULTILINE)
    return {(module, name): test for module, name, test in rows}


def noticed_by(guard: Guard, tests: list[str], limit_s: float = 240) -> str:
    """Return the first of `tests` that fails without `guard`, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        without(guard, Path(folder))
        for name in ("tests", "tools"):  # pytest puts its own root first: so the tests move too
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("conftest.py", "pyproject.toml", "settings.ini", "test_vectors.json"):
            shutil.copy(ROOT / name, folder)
        (ROOT / ".cache").mkdir(exist_ok=True)
        (Path(folder) / ".cache").symlink_to(ROOT / ".cache")
        command = [
            str(Path(sys.executable).parent / "pytest"),
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                [*command, *tests],
                cwd=folder,
                env=env,
                text=True,
                capture_output=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return tests[0].removeprefix("tests/") if len(tests) == 1 else "(the tests hang)"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", ran.stdout, re.M)
    return failed[1].removeprefix("tests/") if ran.returncode == 1 and failed else ""


def main() -> None:
    """Print the table; exit with status 1 when a guard can go unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=sorted(TESTS), help="only this module's guards")
    parser.add_argument("--name", default="", help="only guards whose name contains this")
    parser.add_argument("--search", action="store_true", help="do not try the known test first")
    args = parser.parse_args()
    chosen = [g for g in GUARDS if args.module in (None, g.module) and args.name in g.name]
    print("| module | guard | without it fails |\n| --- | --- | --- |", flush=True)
    unnoticed, tests = 0, known()
    for guard in chosen:
        test = tests.get((guard.module, guard.name))
        found = noticed_by(guard, [f"tests/{test}"]) if test and not args.search else ""
        found = found or noticed_by(guard, TESTS[guard.module])
        unnoticed += not found
        where = f"`{found}`" if found else "**nothing**"
        print(f"| {guard.module} | {guard.name} | {where} |", flush=True)
    print(f"\n{len(chosen)} guards, {unnoticed} unnoticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
