"""What is installed: exact pins in the locks, and the right files in the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"worker": ROOT / "requirements.txt", "dev": ROOT / "requirements-dev.txt"}
CHECK = ROOT / "requirements-check.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def normal(name: str) -> str:
    """Normalise a distribution's name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(*keys: str) -> list[Requirement]:
    """List the requirements in settings.ini under `keys`."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = "\n".join(config["DEFAULT"][key] for key in keys).splitlines()
    return [Requirement(line) for line in lines if line.strip()]


def blocks(path: Path) -> list[str]:
    """List the requirements of a lock, with continuation lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(path: Path) -> list[Requirement]:
    """List the pins of a lock."""
    lines = [line for line in blocks(path) if not line.startswith("-r ")]
    return [Requirement(line.split("--hash")[0].strip()) for line in lines]


def is_for(requirement: Requirement, python: str) -> bool:
    """True if a requirement applies to `python` on Linux."""
    env = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux"}
    return requirement.marker is None or requirement.marker.evaluate(env)


@pytest.mark.parametrize("path", [*LOCKS.values(), CHECK], ids=[*LOCKS, "check"])
def test_a_lock_pins_exactly_and_with_hashes(path: Path) -> None:
    assert len(pins(path)) > 50
    assert [str(p) for p in pins(path) if not re.fullmatch(r"==[^*,]+", str(p.specifier))] == []
    assert [b for b in blocks(path) if not b.startswith("-r ") and "--hash=sha256:" not in b] == []


@pytest.mark.parametrize("path", [*LOCKS.values(), CHECK], ids=[*LOCKS, "check"])
def test_a_lock_names_no_server(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"://|@ |^--(?!hash)", text, re.MULTILINE)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_fulfil_settings_ini(python: str) -> None:
    image = [p for p in pins(LOCKS["worker"]) if is_for(p, python)]
    both = image + [p for p in pins(LOCKS["dev"]) if is_for(p, python)]
    for lock, keys in (
        (image, ("requirements", "worker_requirements", "build_requirements")),
        (both, ("backfill_requirements", "check_requirements", "dev_requirements")),
    ):
        for want in wanted(*keys):
            found = [p for p in lock if normal(p.name) == normal(want.name)]
            if is_for(want, python):
                versions = {part.version for p in found for part in p.specifier}
                assert len(versions) == 1, f"{want} on {python}: {found}; run `make lock`"
                assert versions.pop() in want.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_no_distribution_is_pinned_twice(python: str) -> None:
    both = [p for path in LOCKS.values() for p in pins(path) if is_for(p, python)]
    names = [normal(p.name) for p in both]
    twice = {str(p.specifier) for p in both if names.count(normal(p.name)) > 1}
    assert len(twice) <= len({n for n in names if names.count(n) > 1}), twice


def test_the_lock_of_the_quick_check_agrees_with_the_others_and_has_no_torch() -> None:
    others = {(pin.name, pin.specifier) for path in LOCKS.values() for pin in pins(path)}
    assert [str(pin) for pin in pins(CHECK) if (pin.name, pin.specifier) not in others] == []
    names = {normal(pin.name) for pin in pins(CHECK)}
    assert not names & {"torch", "torchvision", "open-clip-torch", "runpod"}
    keys = ("requirements", "backfill_requirements", "check_requirements")
    assert {normal(want.name) for want in wanted(*keys)} <= names


def test_a_pin_with_extras_has_one_without_them() -> None:
    """Otherwise pip 23 takes the newest version of the missing one, and has no hash for it."""
    both = [p for path in LOCKS.values() for p in pins(path)]
    plain = {normal(p.name) for p in both if not p.extras}
    assert {normal(p.name) for p in both if p.extras} - plain == set()
    assert {"psycopg", "fastapi"} <= plain


def test_neither_the_image_nor_the_quick_check_has_ray() -> None:
    of_ray = {normal(want.name) for want in wanted("ray_requirements")}
    assert of_ray == {"ray"} <= {normal(pin.name) for pin in pins(LOCKS["dev"])}
    for path in (LOCKS["worker"], CHECK):
        assert not {normal(pin.name) for pin in pins(path)} & {"ray", "pandas", "msgpack"}
    others = wanted("requirements", "worker_requirements", "backfill_requirements")
    assert "ray" not in {want.name for want in others}


def test_torch_and_torchvision_belong_together() -> None:
    found = {r.name: str(r.specifier) for r in wanted("worker_requirements")}
    assert (found["torch"], found["torchvision"]) == ("==2.10.0", "==0.25.0")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy, to leave nothing in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    package = "heimdex_clip_worker"
    shutil.copytree(ROOT / package, source / package)
    (source / package / "_modidx.py").write_text("d = {}\n")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    build += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(build, check=True, timeout=100, stdin=subprocess.DEVNULL)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "heimdex_clip_worker"
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    modules = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    photos = {f"{package.name}/photos/{path.name}" for path in (package / "photos").iterdir()}
    extra = {n for n in names if n.startswith(f"{package.name}/vectors/")}
    assert f"{package.name}/vectors/seeded.json" in extra
    photos |= {f"{package.name}/explore/coins.jpg"}
    typed = {f"{package.name}/py.typed"}  # tells type checkers to read the annotations
    assert names - extra == (modules | photos | typed) - {f"{package.name}/_modidx.py"}


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    """Read a file of the wheel's metadata."""
    path = next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_a_plain_install_has_only_what_a_caller_needs(wheel: zipfile.ZipFile) -> None:
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    needs = [Requirement(line) for line in fields.get_all("Requires-Dist", [])]
    plain = {r.name for r in needs if r.marker is None}
    assert plain == {"requests", "urllib3"}
    extras = {"worker", "backfill", "ray", "explore", "dev"}
    assert set(fields.get_all("Provides-Extra", [])) == extras
    assert (fields["Requires-Python"], fields["License"]) == (">=3.10", "Apache-2.0")


def test_the_command_is_heimdex_clip(wheel: zipfile.ZipFile) -> None:
    lines = metadata(wheel, "entry_points.txt").split()
    assert {line for line in lines if "heimdex_clip_worker" in line} >= {
        "heimdex_clip_worker.cli.main:main",
    }
    assert "nbdev" not in " ".join(lines)
