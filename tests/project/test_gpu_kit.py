"""The wheels for a bare CUDA machine: their list is whole and agrees with the locks. No network."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import gpu_kit
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_package import LOCKS, is_for, pins

ROOT = Path(__file__).resolve().parents[2]
NAMES = gpu_kit.contents()


def test_the_kit_has_the_versions_of_the_locks() -> None:
    locked = {
        f"{canonicalize_name(pin.name)}{pin.specifier}"
        for path in LOCKS.values()
        for pin in pins(path)
        if is_for(pin, "3.12")
    }
    kit = {pin.split(" ")[0] for pin in NAMES.values()}
    assert kit <= locked and len(kit) == len(NAMES) > 100
    assert all(" --hash=sha256:" in pin for pin in NAMES.values())


def test_every_package_of_the_worker_comes_along_or_is_left_out_by_name() -> None:
    worker = gpu_kit.pinned(gpu_kit.WORKER)
    assert worker.keys() - NAMES.keys() == {name for name in worker if gpu_kit.is_left_out(name)}
    assert {"runpod", "open-clip-torch", "ftfy", "aiodns", "trustme", "pytest"} <= NAMES.keys()


def test_no_name_in_the_lists_is_stale() -> None:
    known = gpu_kit.pinned(gpu_kit.WORKER) | gpu_kit.pinned(gpu_kit.DEV)
    assert (gpu_kit.LEFT_OUT | gpu_kit.MORE) - known.keys() == set()


@pytest.mark.model  # reads what is installed
def test_nothing_that_the_kit_needs_is_missing() -> None:
    env, missing = gpu_kit.environment("3.12"), []
    for name in NAMES:
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(env):
                other = canonicalize_name(need.name)
                if other not in NAMES and not gpu_kit.is_left_out(other):
                    missing.append((name, other))
    assert missing == []


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_another_python_gets_the_versions_for_it(python: str) -> None:
    kit = gpu_kit.contents(python)
    assert ("async-timeout" in kit, "tomli" in kit) == ("async-timeout" in NAMES, "tomli" in NAMES)
    assert gpu_kit.pinned(gpu_kit.WORKER, "3.10")["pillow"] != kit["pillow"]


def test_wheels_of_an_earlier_kit_are_removed(tmp_path: Path) -> None:
    version = NAMES["runpod"].split(" ")[0].partition("==")[2]
    kept = tmp_path / f"runpod-{version}-py3-none-any.whl"
    for wheel in (
        kept,
        tmp_path / "runpod-0.0.1-py3-none-any.whl",
        tmp_path / "x-1-py3-none-any.whl",
    ):
        wheel.touch()
    gpu_kit.remove_others("3.12", tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_kit_that_is_too_large_is_an_error(tmp_path: Path, monkeypatch, capsys) -> None:
    def download(python: str, wheels: Path) -> None:
        wheels.mkdir(parents=True)
        version = NAMES["runpod"].split(" ")[0].partition("==")[2]
        (wheels / f"runpod-{version}-py3-none-any.whl").write_bytes(b"12345")

    monkeypatch.setattr(gpu_kit, "download", download)
    assert gpu_kit.main(["--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "1 wheels for Python 3.12, 0.0 MiB" in out and "bash tools/gpu_check.sh OUT" in out
    monkeypatch.setattr(gpu_kit, "MOST_BYTES", 4)
    assert gpu_kit.main(["--out", str(tmp_path / "b")]) == 1
    assert "5 bytes > 4 allowed" in capsys.readouterr().err


def test_the_command_is_a_shell_script_that_needs_a_folder() -> None:
    script = ROOT / "tools" / "gpu_check.sh"
    assert subprocess.run(["sh", "-n", str(script)], timeout=10).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and "gpu_check.sh OUT" in done.stderr


def test_git_ignores_the_kit() -> None:
    assert "/kit/\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")
