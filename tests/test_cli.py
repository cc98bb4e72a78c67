"""`heimdex-clip` as people and programs meet it: processes, exit statuses, pipes and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from local_worker import PHOTOS, SECRET, PhotoServer, WorkerProcess, plain_env
from pyarrow import parquet
from seeded import CACHE, hub_env

from heimdex_clip_worker.auth import Keyring, verify
from heimdex_clip_worker.cli import COMMANDS
from heimdex_clip_worker.golden import golden
from heimdex_clip_worker.platform import PlatformServer
from heimdex_clip_worker.vectors import Writer

CLI = (sys.executable, "-m", "heimdex_clip_worker.cli")
FAKE = str(Path(__file__).with_name("fake_worker.py"))
NAMES = sorted(golden()["photos"])
KEY = "another-end-to-end-secret-8d2f6b1c"
FAKE_SPACE = "fa4e000000000000"


def start(*args: str, env: Mapping[str, str], **options: object) -> subprocess.Popen[str]:
    """Start the command line in its own home."""
    told = {"cwd": env["HOME"], "stdin": subprocess.DEVNULL, "text": True, "errors": "replace"}
    told |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": dict(env)}
    return subprocess.Popen([*CLI, *args], **told | options)


def run(*args: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    with start(*args, env=env) as process:
        try:
            out, err = process.communicate(timeout=110)
        finally:
            process.kill()
    assert "Traceback" not in err, err
    assert SECRET not in out + err and KEY not in out + err
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the problems that it named."""
    return [line.removeprefix("[ERROR] ") for line in done.stderr.splitlines() if "[ERROR]" in line]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment that says nothing."""
    env = plain_env(tmp_path)
    del env["EMBEDDING_HMAC_SECRET"], env["ALLOWED_PRIVATE_NETWORKS"]
    return env


def local_env(home: Path) -> dict[str, str]:
    """Return the environment of somebody who embeds on this machine, without a key."""
    env = plain_env(home, **hub_env(home), CLIP_INFERENCE_BACKEND="local")
    del env["EMBEDDING_HMAC_SECRET"]
    return env | {"CLIP_ARTIFACT_DIR": str(CACHE / "artifacts"), "CLIP_DEVICE": "cpu"}


@pytest.fixture
def local(tmp_path: Path) -> dict[str, str]:
    """That environment."""
    return local_env(tmp_path)


@pytest.fixture(scope="module")
def photos() -> Iterator[PhotoServer]:
    with PhotoServer() as server:
        yield server


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlatformServer]:
    """A platform with a worker whose model is a fake one."""
    home = tmp_path_factory.mktemp("fake")
    with (
        PlatformServer() as server,
        WorkerProcess(plain_env(home, **server.worker_env()), FAKE) as worker,
    ):
        found = server.platform.workers
        worker.wait_until(lambda: bool(found) and found["pod-1"].polls, 60, "no jobs are taken")
        yield server


@pytest.fixture
def caller(platform: PlatformServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a caller of that platform."""
    return plain_env(tmp_path, **platform.caller_env())


# Help


def test_help_comes_at_once_and_imports_nothing_heavy(bare: dict[str, str]) -> None:
    heavy = ["torch", "requests", "aiohttp", "numpy", "pyarrow", "PIL", "runpod", "open_clip"]
    code = (
        "import sys; sys.argv = ['heimdex-clip', '--help']; import heimdex_clip_worker.cli as c\n"
        f"try: c.main()\nexcept SystemExit: print([m for m in {heavy} if m in sys.modules])"
    )
    run_it = [sys.executable, "-c", code]
    done = subprocess.run(run_it, env=bare, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"
    spent = []
    for _ in range(5):
        begun = time.monotonic()
        run("--help", env=bare)
        spent.append(time.monotonic() - begun)
    assert min(spent) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, bare: dict[str, str]) -> None:
    done = run(name, "--help", env=bare)
    assert done.returncode == 0
    assert re.search(rf"(?s)example.*heimdex-clip {name}", done.stdout)


def test_without_a_command_there_is_help_and_status_2(bare: dict[str, str]) -> None:
    done = run(env=bare)
    assert done.returncode == 2
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("serach cats", "did you mean search?"),
        ("embed none.jpg other.jpg", "none.jpg: no such file or folder"),
        ("embed ftp://host/1.jpg?token=secret", "ftp://host/1.jpg: only http and https"),
        ("embed .", "no images in this folder"),
        ("embed", "Nothing to embed"),
        ("embed --text cat", "RUNPOD_API_KEY is missing"),
        ("search cat --in none.parquet", "none.parquet: no such file"),
        ("sign ftp://host/1.jpg", "URL must begin with http"),
        ("sign https://host/1.jpg", "EMBEDDING_HMAC_SECRET is missing"),
        ("health", "RUNPOD_API_KEY is missing"),
        ("verify --image none.jpg", "none.jpg: no such file"),
    ],
)
def test_wrong_usage_is_status_2_and_a_line(line: str, words: str, bare: dict[str, str]) -> None:
    done = run(*line.split(), env=bare)
    assert done.returncode == 2
    assert any(words in error for error in errors(done)), done.stderr
    assert done.stdout == "" and "token=secret" not in done.stderr


def test_options_are_not_abbreviated(bare: dict[str, str]) -> None:
    assert run("embed", "--back", "local", "x.jpg", env=bare).returncode == 2


# Sign


def signed(*args: str, env: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """Return the request that was printed, and the curl line."""
    done = run("sign", *args, env=env)
    assert done.returncode == 0, done.stderr
    body, _, line = done.stdout.splitlines()
    return json.loads(body), line


@pytest.mark.parametrize(
    ("flags", "keys", "version", "kid"),
    [
        ([], "", 1, "v1"),
        (["--v2"], "", 2, "v1"),
        ([], f"new:{KEY},old:{SECRET}", 2, "new"),
        (["--v1"], f"new:{KEY}", 1, "v1"),
    ],
)
def test_a_signature_is_one_the_worker_accepts(
    flags: list[str], keys: str, version: int, kid: str, tmp_path: Path
) -> None:
    env = plain_env(tmp_path, EMBEDDING_HMAC_KEYS=keys)
    url = "https://host/1.jpg?token=it's $HOME `id` \"x\" \\ !! é"
    job, line = signed(url, "--request-id", "by-hand", *flags, env=env)
    ring = Keyring(SECRET, {"new": KEY}, "heimdex-clip", window_s=120, max_lifetime_s=3600)
    credential = verify(job["input"], keyring=ring, now=time.time())
    assert (credential.version, credential.kid) == (version, kid)
    assert (job["input"]["image_url"], job["input"]["request_id"]) == (url, "by-hand")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("version", ["--v1", "--v2"])
def test_the_printed_line_brings_a_vector(
    version: str, caller: dict[str, str], photos: PhotoServer
) -> None:
    url = photos.photo("chelsea.jpg", "name=it's $HOME `id` \"x\"&é".replace(" ", "%20"))
    job, line = signed(url.replace("é", "%C3%A9"), version, "--request-id", "by-hand", env=caller)
    done = subprocess.run(["sh", "-c", line], env=caller, capture_output=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"]["request_id"] == "by-hand" and answer["output"]["dim"] == 512


def test_the_body_alone_can_be_piped(tmp_path: Path) -> None:
    done = run("sign", "https://host/1.jpg", "--body", env=plain_env(tmp_path))
    assert json.loads(done.stdout)["input"]["image_url"] == "https://host/1.jpg"


# Embed and search, through an endpoint


def test_urls_are_embedded_by_an_endpoint(
    caller: dict[str, str], photos: PhotoServer, tmp_path: Path
) -> None:
    urls = [photos.photo(name, "token=key-to-it") for name in ("chelsea.jpg", "coffee.jpg")]
    asked = [*urls, f"{photos.url}/missing?token=key-to-it", "--text", "a cat"]
    out = str(tmp_path / "vectors.parquet")
    done = run("embed", *asked, "--json", "--out", out, env=caller)
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [
        photos.photo("chelsea.jpg"), photos.photo("coffee.jpg"), f"{photos.url}/missing", "a cat",
    ]  # fmt: skip
    assert [line.get("code") for line in lines] == [None, None, "SOURCE_HTTP", None]
    assert "key-to-it" not in done.stdout + done.stderr
    rows = parquet.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == [lines[i]["id"] for i in (0, 1, 3)]
    assert np.allclose(rows[0]["vector"], lines[0]["embedding"])


def test_a_file_needs_the_local_backend_and_that_is_said(caller: dict[str, str]) -> None:
    done = run("embed", str(PHOTOS / "chelsea.jpg"), env=caller)
    assert done.returncode == 2
    assert "--backend local" in errors(done)[0]


def test_an_endpoint_that_is_not_there_is_status_1(caller: dict[str, str]) -> None:
    env = caller | {"RUNPOD_BASE_URL": "http://127.0.0.1:9/v2", "RUNPOD_TIMEOUT_S": "1"}
    done = run("search", "cat", "--in", write_vectors(caller, {"a": [1.0] * 512}), env=env)
    assert done.returncode == 1 and len(errors(done)) == 1


def write_vectors(env: Mapping[str, str], rows: Mapping[str, list[float]], **facts: str) -> str:
    """Write a file of vectors, of the fake worker's space, and return its path."""
    path = Path(env["HOME"], "written.parquet")
    told = {"space_id": FAKE_SPACE, "model": "ViT-B-32", "pretrained": "fake"}
    told |= {"model_version": "1"} | facts
    with Writer(path) as writer:
        for name, vector in rows.items():
            writer.add(name, {"embedding": vector, **told})
    return str(path)


def test_a_search_shows_the_best_first(caller: dict[str, str]) -> None:
    text = [3.0, *map(float, map(ord, "cat"))]  # what the fake worker makes of a text
    same, other = np.pad(text, (0, 508)), np.pad([1.0, -1.0], (0, 510))
    rows = {"other": other.tolist(), "same\x1b[2J": same.tolist(), "none": [0.0] * 512}
    done = run("search", "cat", "--in", write_vectors(caller, rows), "--top", "2", env=caller)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "image", "same\\x1b[2J", "other",
    ]  # fmt: skip
    assert "1.0000" in done.stdout


def test_vectors_of_another_space_are_not_compared(caller: dict[str, str]) -> None:
    file = write_vectors(caller, {"a": [1.0] * 512}, space_id="0123456789abcdef")
    done = run("search", "cat", "--in", file, env=caller)
    assert done.returncode == 1 and done.stdout == ""
    assert "0123456789abcdef" in done.stderr and FAKE_SPACE in done.stderr


def test_what_is_no_file_of_vectors_is_said(caller: dict[str, str]) -> None:
    Path(caller["HOME"], "notes.txt").write_text("nothing of the kind")
    done = run("search", "cat", "--in", "notes.txt", env=caller)
    assert done.returncode == 1 and "notes.txt cannot be read as vectors" in errors(done)[0]


# Health


def test_health_of_an_endpoint_that_is_ready(caller: dict[str, str]) -> None:
    done = run("health", env=caller)
    assert done.returncode == 0 and done.stdout.startswith("ready: "), done
    assert json.loads(run("health", "--json", env=caller).stdout)["status"] == "ready"


def test_health_of_an_endpoint_without_workers(tmp_path: Path) -> None:
    with PlatformServer() as server:
        done = run("health", env=plain_env(tmp_path, **server.caller_env()))
    assert done.returncode == 1 and done.stdout and not done.stdout.startswith("ready")


# On this machine: the package's photographs, with seeded weights


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the vectors of the package's photographs, embedded on this machine."""
    env = local_env(tmp_path_factory.mktemp("embedded"))
    done = run("embed", str(PHOTOS), "--out", "vectors.parquet", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "10 embedded, 0 failed" in done.stderr
    return str(Path(env["HOME"], "vectors.parquet"))


def test_a_folder_of_photographs_is_embedded_as_open_clip_would(embedded: str) -> None:
    table = parquet.read_table(embedded)
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[512]"
    assert set(table["model_version"].to_pylist()) == {"openai-vit-b-32-v1"}
    rows = {Path(row["id"]).name: row["vector"] for row in table.to_pylist()}
    assert sorted(rows) == NAMES
    apart = {name: 1 - np.dot(rows[name], row.numpy()) for name, row in golden()["photos"].items()}
    assert max(apart.values()) < 6e-4, apart  # of bf16, and of `fast` preprocessing


def test_images_like_this_one_are_found(local: dict[str, str], embedded: str) -> None:
    like = ["--image", str(PHOTOS / "coffee.jpg"), "--in", embedded, "--top", "3", "--json"]
    done = run("search", *like, env=local)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(found), Path(found[0]["id"]).name] == [3, "coffee.jpg"]
    assert found[0]["score"] > 0.9999 > found[1]["score"] >= found[2]["score"]


def test_a_text_is_looked_for(local: dict[str, str], embedded: str) -> None:
    done = run("search", "a cup of coffee", "--in", embedded, "--top", "99", env=local)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split()[0]) for line in done.stdout.splitlines()[1:]]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)


def test_a_bad_file_harms_none_of_the_others(local: dict[str, str], photos: PhotoServer) -> None:
    folder = Path(local["HOME"], "images")
    folder.mkdir()
    shutil.copy(PHOTOS / "chelsea.jpg", folder / "a.jpg")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    os.mkfifo(folder / "c.jpg")
    (folder / "d.jpg").write_bytes((PHOTOS / "chelsea.jpg").read_bytes().ljust(200_001, b"\0"))
    (folder / "e.gif").symlink_to("nowhere.gif")
    Path(os.fsdecode(bytes(folder) + b"/f\xff\x1b.jpg")).symlink_to(PHOTOS / "coffee.jpg")
    env = local | {"MAX_IMAGE_SIZE_BYTES": "200000"}
    texts = ["--text", "a cat", "--text", "x" * 10_001]
    done = run("embed", "images", photos.photo(), *texts, "--json", env=env)
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("code", "") for line in lines] == [
        "", "DECODE_FAILED", "FETCH_FAILED", "IMAGE_TOO_LARGE", "FETCH_FAILED", "", "", "",
        "INVALID_REQUEST",
    ]  # fmt: skip
    assert len({line["space_id"] for line in lines if "embedding" in line}) == 1
    assert lines[0]["embedding"] == pytest.approx(lines[6]["embedding"], abs=1e-6)
    assert "200,000" in lines[3]["error"] and "\x1b" not in done.stdout + done.stderr


def test_the_worker_says_why_it_does_not_start(bare: dict[str, str]) -> None:
    done = run("worker", "--test_input", "{}", env=bare)
    assert done.returncode == 1 and "EMBEDDING_HMAC_SECRET is missing" in errors(done)[0]


def test_the_demo_says_why_it_does_not_start(bare: dict[str, str]) -> None:
    done = run("demo", "--photo", "nowhere.jpg", env=bare)
    assert done.returncode == 1 and "there is no file nowhere.jpg" in errors(done)[0]


# Verify


@pytest.fixture(scope="module")
def towers(seeded_hub: Path) -> tuple[object, object]:
    """The seeded model as the worker loads it."""
    from heimdex_clip_worker.embed import Embedder
    from heimdex_clip_worker.text import TextEmbedder

    options = {"device": "cpu", "artifact_dir": str(CACHE / "artifacts")}
    images = Embedder.load("ViT-B-32", "openai", cache_dir=str(seeded_hub), **options)
    return images, TextEmbedder.load(images)


def test_weights_that_are_not_openais_are_found_out(local: dict[str, str]) -> None:
    done = run("verify", "--json", "--image", str(PHOTOS / "chelsea.jpg"), env=local)
    told = json.loads(done.stdout)
    assert [(check["name"], check["status"]) for check in told["checks"]] == [
        ("this machine", "OK"), ("weights in use", "OK"), ("published values", "FAILED"),
    ]  # fmt: skip
    assert done.returncode == 1 and told["ok"] is False


def test_weights_that_are_not_there_fail_and_the_rest_is_skipped(
    local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from heimdex_clip_worker import verify as command
    from heimdex_clip_worker.embedding import worker_settings

    monkeypatch.setattr(command, "this_machine", lambda settings: command.Check("", "OK", ""))
    monkeypatch.setenv("CLIP_PRETRAINED", str(Path(local["HOME"], "none.safetensors")))
    found = [check.status for check in command.checks(worker_settings(), None)]
    assert found == ["OK", "FAILED", "skipped"]


@pytest.mark.parametrize(("last", "status"), [("OK", 0), ("skipped", 0), ("FAILED", 1)])
def test_only_what_failed_counts(
    last: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from heimdex_clip_worker import cli
    from heimdex_clip_worker import verify as command

    found = [command.Check("this machine", "OK", ""), command.Check("the other", last, "why\x1b")]
    monkeypatch.setattr(command, "checks", lambda settings, image: iter(found))
    monkeypatch.setattr("heimdex_clip_worker.handler.set_up_logging", lambda level: None)
    assert cli.ended(["verify"]) == status
    assert capsys.readouterr().out.splitlines()[1].split() == [last, "the", "other", "why\\x1b"]


def test_golden_vectors_that_are_not_met_fail(towers: tuple[object, object]) -> None:
    from heimdex_clip_worker.verify import weights_in_use

    images, texts = towers
    assert weights_in_use(images, texts).status == "OK"
    other = replace(images, photos=images.photos.roll(1, 0))
    assert weights_in_use(other, texts).status == "FAILED"


def test_published_values_are_judged(
    towers: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from heimdex_clip_worker import verify as command
    from heimdex_clip_worker.embedding import worker_settings

    monkeypatch.setenv("ALLOWED_IMAGE_HOSTS", "nowhere.invalid")
    monkeypatch.delenv("CLIP_PRETRAINED", raising=False)
    settings, photo = worker_settings(), PHOTOS / "chelsea.jpg"
    skipped = command.published_values(*towers, settings, None)
    assert skipped.status == "skipped" and "could not be fetched" in skipped.said
    found = command.cosines(*towers, photo.read_bytes())
    for shift, status in ((0.002, "OK"), (0.004, "FAILED")):
        said = {text: x + shift for text, x in zip(command.PUBLISHED, found, strict=True)}
        monkeypatch.setattr(command, "PUBLISHED", said)
        assert command.published_values(*towers, settings, photo).status == status


# Ctrl-C, pipes and terminals


@contextlib.contextmanager
def waiting(env: Mapping[str, str], *args: str, **options: object) -> Iterator[subprocess.Popen]:
    """Start a command that will not end by itself."""
    with start(*args, env=env, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_cancels_the_job_and_leaves_no_file(tmp_path: Path, photos: PhotoServer) -> None:
    with PlatformServer() as server:  # nobody takes the job
        env = plain_env(tmp_path, **server.caller_env())
        with waiting(env, "embed", photos.photo(), "--out", "v.parquet") as process:
            server.until(lambda platform: bool(platform.jobs), 30, "no job was sent")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        states = {job.status for job in server.platform.jobs.values()}
    assert process.returncode == 130
    assert err.splitlines()[-1] == "[ERROR] interrupted" and "Traceback" not in err
    assert states == {"CANCELLED"}
    assert not list(tmp_path.glob("*.p*")) + list(tmp_path.glob(".*.part"))


def test_ctrl_c_while_a_download_hangs(local: dict[str, str], photos: PhotoServer) -> None:
    with waiting(local, "embed", f"{photos.url}/endless", "--text", "a cat") as process:
        deadline = time.monotonic() + 90
        while not photos.hits["/endless"] and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "[ERROR] interrupted" and "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(caller: dict[str, str]) -> None:
    texts = [part for n in range(200) for part in ("--text", f"text {n}")]
    with waiting(caller, "embed", *texts, "--json") as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert process.returncode == 141 and "Traceback" not in err and "Error" not in err, err


def read_terminal(master: int) -> str:
    """Return all that was written to a terminal."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed
        while part := os.read(master, 65536):
            shown += part
    return shown.decode(errors="replace")


def test_a_bar_for_people_and_none_for_a_file(caller: dict[str, str], photos: PhotoServer) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    line = ("embed", photos.photo(), "--out", "v.parquet")
    with waiting(caller, *line, stderr=slave, stdout=subprocess.DEVNULL) as process:
        os.close(slave)
        shown = read_terminal(master)
        process.wait(60)
    os.close(master)
    bar = re.compile(r"\d+%\|.*\| \d/1 \[")
    assert process.returncode == 0 and bar.search(shown), shown
    assert not bar.search(run(*line, env=caller).stderr)
