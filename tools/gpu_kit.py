"""Gather the wheels that a bare CUDA machine lacks: `make gpu-kit`.

Such a machine has a Python with torch, torchvision and numpy, but no package index. The kit holds
the other packages of the worker, and those that its GPU tests and measurements need, pinned as in
the requirements files. `tools/gpu_check.sh` installs them there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "kit"  # git-ignored
WORKER, DEV = ROOT / "requirements.txt", ROOT / "requirements-dev.txt"
MOST_BYTES = 57 * 2**20  # 64 MiB can be brought along, with 6 or 7 of the checkout
PYTHON = "3.12"
PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014") + tuple(
    f"manylinux_2_{minor}"
    for minor in range(5, 35)  # pip takes no older one for a newer one
)

# The machine has torch and what torch needs. The others are large, and an import goes on without
# them: a faster event loop, compression, the hub's downloads, completion in a shell, uploads to S3.
LEFT_OUT = {
    "torch", "torchvision", "triton", "numpy", "sympy", "mpmath", "networkx", "setuptools",
    "uvloop", "brotli", "backports-zstd", "hf-xet", "jedi", "parso",
    "boto3", "botocore", "s3transfer", "jmespath",
}  # fmt: skip
ITS_LIBRARIES = ("nvidia-", "cuda-")  # how the names of torch's libraries begin

# Of the development requirements: what runs the tests marked `gpu`, and serves images over HTTPS.
MORE = {
    "pytest", "pytest-timeout", "pluggy", "iniconfig", "trustme",
    "execnb", "fastcore", "ipython", "ipython-pygments-lexers", "asttokens", "executing",
    "matplotlib-inline", "pexpect", "ptyprocess", "pure-eval", "stack-data", "traitlets",
}  # fmt: skip


def environment(python: str) -> dict[str, str]:
    """Describe the machine for environment markers."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.3",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": "",
    }


def is_left_out(name: str) -> bool:
    """True if a package does not come with the kit."""
    return name in LEFT_OUT or name.startswith(ITS_LIBRARIES)


def pinned(path: Path, python: str = PYTHON) -> dict[str, str]:
    """Read a requirements file: `name==version` with its hashes, by name, for one Python."""
    text = re.sub(r"^(#|-r ).*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        head, *hashes = (line.strip(" \\") for line in block.splitlines())
        requirement = Requirement(head)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            pin = f"{canonicalize_name(requirement.name)}{requirement.specifier}"
            found[canonicalize_name(requirement.name)] = " ".join([pin, *hashes])
    return found


def contents(python: str = PYTHON) -> dict[str, str]:  # by name, as `pinned` gives them
    """List the packages of the kit."""
    worker, dev = pinned(WORKER, python), pinned(DEV, python)
    kept = {name: pin for name, pin in worker.items() if not is_left_out(name)}
    return kept | {name: dev[name] for name in sorted(MORE) if name in dev}


def download(python: str, wheels: Path) -> None:
    """Download the wheels; raise CalledProcessError."""
    wheels.mkdir(parents=True, exist_ok=True)
    requirements = wheels.parent / "requirements.txt"
    requirements.write_text("\n".join(contents(python).values()) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    command += [f"--platform={name}_x86_64" for name in PLATFORMS]
    command += ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(wheels)]
    subprocess.run(command, check=True)


def remove_others(python: str, wheels: Path) -> None:
    """Remove wheels of an earlier kit: two versions of a package cannot be installed together."""
    wanted = {pin.split(" ")[0] for pin in contents(python).values()}
    for wheel in wheels.glob("*.whl"):
        name, version, *_ = parse_wheel_filename(wheel.name)
        if f"{name}=={version}" not in wanted:
            wheel.unlink()


def main(argv: list[str] | None = None) -> int:
    """Gather the kit, and print its size and what to do with it; return the exit status."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="make gpu-kit ARGS=...", description=about)
    parser.add_argument("--python", default=PYTHON, help="of the machine there, as 3.12")
    parser.add_argument("--out", type=Path, default=KIT, help="folder of the kit")
    args = parser.parse_args(argv)
    wheels = args.out / "wheels"
    try:
        download(args.python, wheels)
    except subprocess.CalledProcessError:
        print("[ERROR] pip could not download every wheel of the kit", file=sys.stderr)
        return 1
    remove_others(args.python, wheels)
    files = sorted(wheels.glob("*.whl"))
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} wheels for Python {args.python}, {size / 2**20:.1f} MiB, in {wheels}")
    if size > MOST_BYTES:
        print(f"[ERROR] {size:,} bytes > {MOST_BYTES:,} allowed", file=sys.stderr)
        return 1
    print("Copy this checkout with the kit to the machine, and run there:")
    print("\n    bash tools/gpu_check.sh OUT\n")
    print("OUT is the folder of the results; it takes up to 9 minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
