"""Build the image and send it jobs: `make image-test` (root, 30 GB of disk, 10 to 30 minutes).

It needs no Docker engine. Debian's buildah builds the real Dockerfile, with chroot isolation, on a
base that mmdebstrap makes. The weights are seeded, and are a checkpoint in weights/, as on a closed
network. Then the image runs with as few rights as possible: as its own user, without privileges,
with a read-only root, in a network namespace that has only a loopback. There a stand-in for the
platform sends it signed jobs.

    apt-get install buildah mmdebstrap
    make image-test [ARGS="--keep --base localhost/my-python:3.11"]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BASE = "localhost/heimdex-python:bookworm"
IMAGE = "localhost/heimdex-clip-worker:image-test"
CHECKPOINT = "weights/seeded.safetensors"
COMMANDS = ("buildah", "mmdebstrap", "unshare", "chroot", "setpriv", "mount")
FREE_GB = 30
SITE = "opt/venv/lib/python3.11/site-packages"


class Failed(Exception):
    """The image fails a check."""


def check(holds: object, what: str) -> None:
    """Print `what` if the check holds; raise Failed if not."""
    if not holds:
        raise Failed(what)
    print(f"  ok: {what}", flush=True)


def run(*command: str, **options: object) -> str:
    """Run a command and return its output; raise Failed with the end of it."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip
    if done.returncode:
        message = f"{' '.join(command)[:200]} ended with {done.returncode}:"
        raise Failed(f"{message}\n{done.stdout[-3000:]}")
    return done.stdout


# --- the build --------------------------------------------------------------------------------


def make_base() -> None:
    """Make the base image: Debian with Python."""
    with tempfile.TemporaryDirectory(prefix="image-base-") as folder:
        tar = str(Path(folder, "base.tar"))
        run("mmdebstrap", "--variant=minbase", "--include=python3,python3-venv", "bookworm", tar)
        container = run("buildah", "from", "scratch").strip()
        try:
            run("buildah", "add", "--quiet", container, tar, "/")
            run("buildah", "commit", "--quiet", container, BASE)
        finally:
            run("buildah", "rm", container)


def make_context(folder: Path) -> None:
    """Copy what a fresh clone has, and add a checkpoint of seeded weights."""
    from seeded import seeded_state, write_checkpoint

    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".env").write_text("SECRET=that-no-image-may-hold\n")
    write_checkpoint(folder / CHECKPOINT, seeded_state(), "quickgelu")


def build(context: Path, base: str, tag: str, target: str = "", **arguments: str) -> str:
    """Build the image as a user would, through this machine's package index; return the log."""
    command = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers"]
    for path in ("/etc/ssl/certs", "/etc/pip.conf"):
        if os.path.exists(path):
            command += ["--volume", f"{path}:{path}:ro"]
    for name, value in {"BASE_IMAGE": base, **arguments}.items():
        command += ["--build-arg", f"{name}={value}"]
    command += ["--target", target] if target else []
    return run(*command, "--tag", tag, str(context))


@contextlib.contextmanager
def mounted(image: str) -> Iterator[Path]:
    """Mount a container of an image and yield its folder."""
    container = run("buildah", "from", "--pull-never", image).strip()
    try:
        yield Path(run("buildah", "mount", container).strip())
    finally:
        run("buildah", "umount", container)
        run("buildah", "rm", container)


def inspect(image: str) -> dict:
    """Read the configuration of an image, with its `size` and its `layers`."""
    info = json.loads(run("buildah", "inspect", "--type", "image", image))["OCIv1"]
    images = json.loads(run("buildah", "images", "--json", image))
    return info["config"] | {"size": images[0]["size"], "layers": info["rootfs"]["diff_ids"]}


# --- its contents -------------------------------------------------------------------------------


def megabytes(path: Path) -> int:
    """Measure a folder on disk, in MB."""
    return int(run("du", "-s", "--block-size=1000000", str(path)).split()[0])


def names(root: Path, *pattern: str) -> list[str]:
    """Run `find` below an image's root; the paths are relative to it."""
    paths = run("find", str(root), "-xdev", *pattern).splitlines()
    return [str(Path(path).relative_to(root)) for path in paths]


def look_inside(root: Path, config: dict) -> None:
    """Check what is in the image, and what is not."""
    check(config["User"] not in ("", "root", "0"), f"its user is {config['User']}")
    check(config["Cmd"][:2] == ["python", "-u"], "its command is " + " ".join(config["Cmd"]))
    tools = r"gcc|cc|g\+\+|c\+\+|clang|ld|make|cmake|nvcc|ptxas|git|curl|wget|pip[0-9.]*"
    found = names(root, "-regextype", "posix-extended", "-regex", rf".*/bin/({tools})")
    check(not found, f"no build tools {found[:5]}")
    ours = root / "opt"
    found = names(ours, "-type", "d", "(", "-name", "tests", "-o", "-name", "test", ")")
    check(not found, f"no tests {found[:5]}")
    found = names(ours, "(", "-name", "*.a", "-o", "-name", "*.h", "-o", "-name", "*.ipynb", ")")
    check(not found, f"no headers, static libraries or notebooks {found[:5]}")
    caches = [root / "root/.cache", root / "build", root / "tmp/pip-build", root / "app"]
    check(not any(path.exists() for path in caches), "no caches, sources or build folders")
    check(not list((root / "var/cache/apt/archives").glob("*.deb")), "no packages of Debian's")
    found = names(root, "(", "-name", ".env", "-o", "-name", "seeded.safetensors", ")")
    check(not found, f"no secrets, no checkpoint {found}")
    found = names(ours, "(", "-perm", "/o+w", "-o", "-user", "10001", ")", "!", "-type", "l")
    check(not found, f"nothing in /opt that the worker could write to {found[:5]}")
    for path in ("opt/venv", "opt/clip", "opt/worker"):
        print(f"  /{path}: {megabytes(root / path):,} MB")
    site = root / SITE
    sizes = {path: megabytes(path) for path in [*site.iterdir(), *(site / "nvidia").iterdir()]}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:14]
    print("  " + ", ".join(f"{p.relative_to(site)} {sizes[p]:,} MB" for p in largest))


# --- the running image, in a namespace of its own -----------------------------------------------


def loopback_up() -> None:
    """Bring up this network namespace's loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


@contextlib.contextmanager
def container(root: Path, config: dict, change: Path | None = None) -> Iterator[list[str]]:
    """Yield the words before a command that runs in the image: read-only, as its own user.

    `change` is a folder of files that replace files of the image.
    """
    place = Path(tempfile.mkdtemp(prefix="image-root-"))
    user = next(
        line.split(":") for line in (root / "etc/passwd").read_text().splitlines()
        if config["User"] in (line.split(":")[0], line.split(":")[2])
    )  # fmt: skip
    lower = f"{change}:{root}" if change else None
    try:
        if lower:
            run("mount", "-t", "overlay", "-o", f"ro,lowerdir={lower}", "overlay", str(place))
        else:
            run("mount", "--bind", str(root), str(place))
            run("mount", "-o", "remount,bind,ro", str(place))
        run("mount", "-t", "proc", "-o", "ro", "proc", str(place / "proc"))
        run("mount", "--rbind", "/dev", str(place / "dev"))
        inside = ["setpriv", f"--reuid={user[2]}", f"--regid={user[3]}", "--clear-groups"]
        inside += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        where = ["env", "-i", "-C", config["WorkingDir"], *config["Env"], f"HOME={user[5]}"]
        yield ["chroot", str(place), *inside, *where]
    finally:
        for path in (place / "dev", place / "proc", place):
            subprocess.run(["umount", "--lazy", str(path)], capture_output=True)
        place.rmdir()


def check_isolation(begin: list[str]) -> None:
    """Check that the container can write nowhere, has no rights and no network."""
    code = """
import os, socket
print(os.getuid(), os.getgroups())
for attempt in (lambda: open("/opt/x", "w"), lambda: open("/tmp/x", "w"),
                lambda: socket.create_connection(("192.0.2.1", 443), 2)):
    try:
        attempt()
        print("possible")
    except OSError as error:
        print(error.strerror)
"""
    lines = run(*begin, "python", "-c", code).splitlines()
    check(not lines[0].startswith("0 "), f"it runs as the user {lines[0]}")
    check(lines[1:3] == ["Read-only file system"] * 2, "it can write nowhere, /tmp included")
    check(lines[3] == "Network is unreachable", "it has no network")


def check_bytecode(begin: list[str]) -> None:
    """Check that all modules that a start imports are compiled."""
    code = "import heimdex_clip_worker.handler, heimdex_clip_worker.model.text, runpod"
    log = run(*begin, "python", "-v", "-c", code)
    loaded = [line.split("'")[1] for line in log.splitlines() if line.startswith("# code object")]
    compiled = [path for path in loaded if path.endswith(".pyc")]
    sources = sorted({path for path in loaded if not path.endswith(".pyc")})
    check(compiled and not sources, f"{len(compiled)} modules, all of them compiled {sources[:4]}")
    check("import 'triton'" not in log, "nothing imports triton")
    times = {"with its bytecode": [], "without": []}
    for _ in range(3):
        for kind, more in (("with its bytecode", []), ("without", ["PYTHONPYCACHEPREFIX=/none"])):
            start = time.perf_counter()
            run(*begin, *more, "python", "-c", code)
            times[kind].append(time.perf_counter() - start)
    shown = ", ".join(f"{kind} {statistics.median(t):.2f} s" for kind, t in times.items())
    print(f"  importing all that a start imports: {shown}")


class Worker:
    """The image's own command in the container; a context manager that ends it."""

    def __init__(self, begin: list[str], command: list[str], env: dict[str, str], log: Path):
        self.log, self.start = log, time.perf_counter()
        with log.open("w") as file:
            variables = [f"{name}={value}" for name, value in env.items()]
            self.process = subprocess.Popen(
                [*begin, *variables, *command], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait(10)

    def text(self) -> str:
        """Read the log."""
        return self.log.read_text(errors="replace")


def ask(platform: object, job_input: dict) -> dict:
    """Run a job and return its output."""
    job = platform.runsync(job_input, wait_s=120)
    if job.get("status") != "COMPLETED":
        raise Failed(f"the job ended as {job.get('status')}: {job.get('error')}")
    return job["output"]


def check_replies(begin: list[str], root: Path, config: dict, folder: Path) -> None:
    """Check that the image replies to signed jobs under the platform's loop; measure how soon."""
    from local_worker import SECRET, PhotoServer

    from heimdex_clip_worker.auth import sign
    from heimdex_clip_worker.emulator.server import EmulatorServer

    golden = json.loads((root / "opt/clip/manifest.json").read_text())["manifest"]["golden"]
    golden = {photo["name"]: photo["row"] for photo in golden["photos"]}
    seconds = []
    for number in range(4):
        with PhotoServer() as photos, EmulatorServer() as platform:
            url, now = photos.photo("chelsea.jpg"), int(time.time())
            job = {"image_url": url, "auth": sign(url, secret=SECRET, ts=now)}
            env = platform.worker_env() | {"EMBEDDING_HMAC_SECRET": SECRET}
            env |= {"ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8"}
            with Worker(begin, config["Cmd"], env, folder / f"worker-{number}.log") as worker:
                try:
                    output = ask(platform, job)
                    seconds.append(time.perf_counter() - worker.start)
                    if number == 0:
                        facts = check_vector_and_text(platform, output, golden["chelsea.jpg"])
                except Failed as error:
                    raise Failed(f"{error}\n{worker.text()[-3000:]}") from None
                fit = next(line for line in worker.text().splitlines() if "Fit to serve" in line)
    print(f"  {facts}\n  {fit}")
    check(len(seconds) == 4, "it replies to a signed image and a signed text, offline")
    first, warm = seconds[0], statistics.median(seconds[1:])
    print(f"  start to first reply: {first:.2f} s the first time, {warm:.2f} s then (median of 3)")


def check_vector_and_text(platform: object, output: dict, golden: str) -> str:
    """Compare a vector with the golden one, and check that a text is in the same space."""
    from local_worker import SECRET

    from heimdex_clip_worker.auth import new_nonce, sign_v2

    row = struct.unpack("<512f", base64.b64decode(golden))
    turned = 1 - math.fsum(a * b for a, b in zip(row, output["embedding"], strict=True))
    check(turned < 6e-4, f"its vector is the golden one: 1 - cosine {turned:.1e}")
    now, text = int(time.time()), {"text": "a photo of a cat"}
    signing = {"kid": "v1", "secret": SECRET, "audience": "heimdex-clip"}
    auth = sign_v2(text, **signing, ts=now, exp=now + 300, nonce=new_nonce())
    words = ask(platform, {**text, "auth": auth})
    check((words["dim"], words["space_id"]) == (512, output["space_id"]), "texts share its space")
    return f"space {output['space_id']}, {output['pretrained']}"


def check_selftest(begin: list[str]) -> None:
    """Check the job that needs no caller, no network and no signature."""
    env = [f"EMBEDDING_HMAC_SECRET={secrets.token_hex(32)}"]
    job = ["--test_input", json.dumps({"input": {"selftest": True}})]
    run(*begin, *env, "python", "-u", "-m", "heimdex_clip_worker.handler", *job)
    check(True, "it passes its selftest")


def check_damage(root: Path, config: dict, folder: Path) -> None:
    """Check that a changed artifact stops the worker, with one line."""
    from local_worker import SECRET

    weights = bytearray((root / "opt/clip/image.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    manifest = (root / "opt/clip/manifest.json").read_bytes().replace(b"quickgelu", b"gelu")
    for name, data in {"image.safetensors": weights, "manifest.json": manifest}.items():
        change = folder / name.partition(".")[0]
        (change / "opt/clip").mkdir(parents=True)
        (change / "opt/clip" / name).write_bytes(data)
        with container(root, config, change) as begin:
            env, log = {"EMBEDDING_HMAC_SECRET": SECRET}, folder / f"{name}.log"
            with Worker(begin, config["Cmd"], env, log) as worker:
                status = worker.process.wait(60)
                lines = [line for line in worker.text().splitlines() if "[ERROR]" in line]
        check(status == 1 and len(lines) == 1 and "damaged" in lines[0], f"{name}: {lines}")


def check_at_work(root: Path, config: dict) -> None:
    """Make all checks that run the image; called in namespaces of our own."""
    loopback_up()
    with tempfile.TemporaryDirectory(prefix="image-work-") as name:
        with container(root, config) as begin:
            check_isolation(begin)
            check_bytecode(begin)
            check_selftest(begin)
            check_replies(begin, root, config, Path(name))
        check_damage(root, config, Path(name))


# --- all of it ----------------------------------------------------------------------------------


def check_rebuild(context: Path, base: str) -> None:
    """Check that a change of the code makes one new layer, and reinstalls and bakes nothing."""
    handler = context / "heimdex_clip_worker" / "handler.py"
    handler.write_text(handler.read_text() + "\n# changed\n")
    start = time.perf_counter()
    log = build(context, base, IMAGE + "-changed", CLIP_PRETRAINED=CHECKPOINT)
    print(f"  built again after a change of the code: {time.perf_counter() - start:.0f} s")
    for step in ("RUN pip install --quiet -r", "RUN HF_HUB_OFFLINE=1 python -m"):
        after = log[log.index(step) :].splitlines()[1:3]
        check(any("Using cache" in line for line in after), f"from the cache: {step}")
    before, after = (inspect(image)["layers"] for image in (IMAGE, IMAGE + "-changed"))
    kept = [layer in before for layer in after]
    check(kept == [*[True] * (len(before) - 1), False], f"only the code's layer is new: {kept}")


def check_unknown_weights(context: Path, base: str) -> None:
    """Check that unknown weights give no image."""
    for wrong in ("no-such-tag", "weights/nowhere.safetensors", "openai"):
        try:
            build(context, base, IMAGE + "-wrong", target="weights", CLIP_PRETRAINED=wrong)
        except Failed as failed:
            lines = [line for line in str(failed).splitlines() if "ModelError: " in line]
            why = lines[-1].partition("ModelError: ")[2] if lines else str(failed)
            check(why.startswith("CLIP_PRETRAINED"), f"no image: {why[:150]}")
        else:
            check(wrong == "openai", f"no image of {wrong}")
            print("  the hub was reached: the real weights were baked")
    try:
        other = {"CLIP_PRETRAINED": CHECKPOINT, "CLIP_SHA256": "0" * 64}
        build(context, base, IMAGE + "-wrong", target="weights", **other)
    except Failed as failed:
        check(f"{'0' * 64} is pinned" in str(failed), "no image of weights with another digest")
    else:
        raise Failed("an image of weights with another digest than the given one")


def remove(*images: str) -> None:
    """Remove the images that this run made, and their intermediate layers."""
    for image in images:
        subprocess.run(["buildah", "rmi", "--force", image], capture_output=True)
    subprocess.run(["buildah", "rmi", "--prune"], capture_output=True)


def image_test(base: str | None, keep: bool) -> None:
    """Build the image and make all checks; raise Failed."""
    if not base:
        print("The base: Debian's Python, by mmdebstrap", flush=True)
        start = time.perf_counter()
        make_base()
        print(f"  made in {time.perf_counter() - start:.0f} s")
    with tempfile.TemporaryDirectory(prefix="image-context-") as name:
        context = Path(name)
        make_context(context)
        print("The build", flush=True)
        start = time.perf_counter()
        build(context, base or BASE, IMAGE, CLIP_PRETRAINED=CHECKPOINT)
        config = inspect(IMAGE)
        print(f"  built in {time.perf_counter() - start:.0f} s, {config['size']}")
        with mounted(IMAGE) as root:
            print("Inside", flush=True)
            look_inside(root, config)
            print("At work", flush=True)
            command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable]
            command += [__file__, "--inside", str(root), "--config", json.dumps(config)]
            if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
                raise Failed("the image failed a check: see above")
        print("Built again, and with other weights", flush=True)
        check_rebuild(context, base or BASE)
        check_unknown_weights(context, base or BASE)
    if not keep:
        remove(IMAGE, IMAGE + "-changed", IMAGE + "-wrong", *([] if base else [BASE]))


def main() -> int:
    """Exit with 0 if all checks pass, 1 if one fails, 2 if this machine cannot build the image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="a base image to build on, instead of one made here")
    parser.add_argument("--keep", action="store_true", help="leave the images in buildah's storage")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [command for command in COMMANDS if not shutil.which(command)]
    free = shutil.disk_usage("/var/lib").free / 1e9
    if os.geteuid() or missing or free < FREE_GB:
        needs = f"root, {', '.join(COMMANDS)} and {FREE_GB} GB free below /var/lib"
        lacks = f"missing: {', '.join(missing) or 'none'}; free: {free:.0f} GB; uid {os.geteuid()}"
        print(f"The image test needs {needs} ({lacks})", file=sys.stderr)
        return 2
    try:
        if args.inside:
            check_at_work(args.inside, args.config)
        else:
            image_test(args.base, args.keep)
    except Failed as failed:
        print(f"FAILED: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
