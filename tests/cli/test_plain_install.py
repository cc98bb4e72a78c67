"""Every command in an install without extras: it works, or one line names the extra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from local_worker import plain_env

from heimdex_clip_worker.cli import demo
from heimdex_clip_worker.cli.main import _COMMANDS

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"requests", "urllib3", "certifi", "charset_normalizer", "idna", "heimdex_clip_worker"}
RUNNER = """
import contextlib, importlib.abc, io, json, sys, traceback

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in PLAIN and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

PLAIN, LINES = json.loads(sys.argv[1])
sys.meta_path.insert(0, Missing())
from heimdex_clip_worker.cli.main import main

for line in LINES:
    streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main(line)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status = traceback.format_exc()
    texts = [stream.buffer.getvalue().decode() for stream in streams]
    print(json.dumps([status, *texts]), flush=True)
"""
NAMES = (
    r"\[ERROR\] .+ needs (the package )?\w+( \(.*\))?: "
    r"pip install 'heimdex-clip-worker\[{}\] @ git\+https://github.com/heimdex/heimdex-clip-worker'"
)
WORKER, BACKFILL = NAMES.format("worker"), NAMES.format("backfill")
CASES = {  # the command's words -> status, and a line on stderr
    "demo": (1, WORKER),
    "demo --photo none.jpg": (1, WORKER),
    "worker": (1, WORKER),
    "platform": (1, WORKER),
    "platform --seeded weights": (1, WORKER),
    "platform --workers 0 --seeded weights": (1, WORKER),
    "verify": (1, WORKER),
    "embed --text cat --backend local": (1, WORKER),
    "search cat --in vectors.parquet --backend local": (1, BACKFILL),
    "embed --text cat --backend local --out vectors.out": (1, BACKFILL),
    "embed --text cat --out vectors.out": (1, BACKFILL),
    "backfill rows.parquet --url-column url --out vectors.out": (1, BACKFILL),
    "backfill --table t --database postgresql://127.0.0.1:9/x": (1, BACKFILL),
    "search cat --database postgresql://127.0.0.1:9/x": (1, BACKFILL),
    "migrate --to x --database postgresql://127.0.0.1:9/x": (1, BACKFILL),
    "sign https://host/1.jpg": (0, r"\[INFO\] Signed, version 1: .*"),
    "deploy --image ghcr.io/a/b:1 --dry-run": (0, ""),
    "undeploy --dry-run": (0, ""),
    "health": (1, ""),
    "embed https://host/1.jpg": (1, r"\[ERROR\] 0 embedded, 1 failed in .*"),
}
USAGE = r"\[ERROR\] .+ \(`heimdex-clip \w+ --help` lists the options\)"
CASES |= {f"{name} --no-such-option": (2, USAGE) for name in _COMMANDS if name != "worker"}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | str, str, str]]:
    """Run all cases in one process that can import what a plain install has, and nothing else."""
    home = tmp_path_factory.mktemp("plain")
    (home / "vectors.parquet").write_bytes(b"PAR1")
    (home / "rows.parquet").write_bytes(b"PAR1")
    caller = {"RUNPOD_API_KEY": "rpa_an-example", "RUNPOD_CLIP_ENDPOINT_ID": "endpoint"}
    caller |= {"RUNPOD_BASE_URL": "http://127.0.0.1:9/v2", "RUNPOD_TIMEOUT_S": "0.2"}
    lines = [line.split() for line in CASES]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps([sorted(PLAIN), lines])],
        cwd=home, env=plain_env(home, **caller), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    results = map(json.loads, done.stdout.splitlines())
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("line", CASES)
def test_a_command_works_or_names_the_extra(line: str, ends: dict) -> None:
    (status, said), (ended, _, err) = CASES[line], ends[line]
    assert ended == status, (ended, err)
    assert any(re.fullmatch(said, text) for text in ["", *err.splitlines()]), err
    assert "Traceback" not in err and (status == 0 or "[INFO]" not in err)


@pytest.mark.parametrize("line", [line for line, (status, _) in CASES.items() if status])
def test_a_failed_command_says_so_in_one_style(line: str, ends: dict) -> None:
    _, out, err = ends[line]
    if not line.startswith(("health", "backfill")) or "--no-such-option" in line:
        assert (out, err.splitlines()[-1][:8]) == ("", "[ERROR] ") or "embed https" in line
    assert "usage:" not in err and ": error:" not in err


def test_every_command_is_tried() -> None:
    assert {line.split()[0] for line in CASES} == set(_COMMANDS)


def test_the_worker_s_packages_are_those_of_its_extra() -> None:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = config["DEFAULT"]["worker_requirements"].splitlines()
    names = {re.split("[><=;]", line)[0].strip() for line in lines if line and line[0] != "#"}
    modules = {"pillow": "PIL", "open_clip_torch": "open_clip"}
    assert {modules.get(name, name) for name in names if name} == set(demo._PACKAGES)
