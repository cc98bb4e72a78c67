"""`heimdex-clip` as people and programs use it: processes, exit statuses, pipes and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
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
from forks import Fork
from local_worker import FAKE, PHOTOS, SECRET, PhotoServer, WorkerProcess, plain_env
from pyarrow import parquet
from seeded import CACHE, hub_env

from heimdex_clip_worker import auth, client
from heimdex_clip_worker.cli import verify
from heimdex_clip_worker.cli.main import _COMMANDS, main
from heimdex_clip_worker.cli.vectors import open_writer
from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.model.golden import golden
from heimdex_clip_worker.remote.local import worker_settings
from heimdex_clip_worker.serving import process

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]
CLI = (sys.executable, "-m", "heimdex_clip_worker.cli.main")
NAMES = sorted(golden()["photos"])
KEY = "another-end-to-end-secret-8d2f6b1c"
FAKE_SPACE = "fa4e000000000000"


def start(*args: str, env: Mapping[str, str], **options: object) -> subprocess.Popen[str]:
    """Start a command in a home folder of its own."""
    defaults = {"cwd": env["HOME"], "stdin": subprocess.DEVNULL, "text": True, "errors": "replace"}
    defaults |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": dict(env)}
    return subprocess.Popen([*CLI, *args], **defaults | options)


def run(
    *args: str,
    env: Mapping[str, str],
    forked: bool = False,  # see forks.py
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; neither a traceback nor a secret may be printed."""
    if forked and sys.platform == "linux":
        process = Fork((*CLI[1:], *args), env, env["HOME"])
        out, err = process.communicate(timeout=110)
    else:
        with start(*args, env=env) as process:
            try:
                out, err = process.communicate(timeout=110)
            finally:
                process.kill()
    assert "Traceback" not in err, err
    assert SECRET not in out + err and KEY not in out + err
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Read the errors that a command printed."""
    return [line.removeprefix("[ERROR] ") for line in done.stderr.splitlines() if "[ERROR]" in line]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment without any of our variables."""
    env = plain_env(tmp_path)
    del env["EMBEDDING_HMAC_SECRET"], env["ALLOWED_PRIVATE_NETWORKS"]
    return env


def local_env(home: Path) -> dict[str, str]:
    """Make an environment that embeds on this machine, without a key."""
    env = plain_env(home, **hub_env(home), CLIP_INFERENCE_BACKEND="local")
    del env["EMBEDDING_HMAC_SECRET"]
    return env | {"CLIP_ARTIFACT_DIR": str(CACHE / "artifacts"), "CLIP_DEVICE": "cpu"}


@pytest.fixture
def local(tmp_path: Path) -> dict[str, str]:
    """An environment that embeds on this machine, without a key."""
    return local_env(tmp_path)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorServer]:
    """An emulator with a worker whose model is a fake one."""
    home = tmp_path_factory.mktemp("fake")
    with (
        EmulatorServer() as server,
        WorkerProcess(plain_env(home, **server.worker_env()), FAKE) as worker,
    ):
        workers = server.queue.workers
        worker.wait_until(lambda: bool(workers) and workers["pod-1"].polls, 60, "no jobs are taken")
        yield server


@pytest.fixture
def caller(platform: EmulatorServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a caller of that emulator."""
    return plain_env(tmp_path, **platform.caller_env())


# Help


def test_help_takes_less_than_300_ms_and_imports_nothing_heavy(bare: dict[str, str]) -> None:
    heavy = ["torch", "requests", "aiohttp", "numpy", "pyarrow", "PIL", "runpod", "open_clip"]
    code = (
        "import sys; sys.argv = ['heimdex-clip', '--help']\n"
        "import heimdex_clip_worker.cli.main as c\n"
        f"try: c.main()\nexcept SystemExit: print([m for m in {heavy} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(5):
        start_s = time.monotonic()
        run("--help", env=bare)
        seconds.append(time.monotonic() - start_s)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_has_help_with_an_example(name: str, bare: dict[str, str]) -> None:
    done = run(name, "--help", env=bare)
    assert done.returncode == 0
    assert re.search(rf"(?s)example.*heimdex-clip {name}", done.stdout)


def test_without_a_command_help_is_printed_and_the_status_is_2(bare: dict[str, str]) -> None:
    done = run(env=bare)
    assert done.returncode == 2
    assert all(f"  {name} " in done.stdout for name in _COMMANDS)


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
        ("search cat", "Name a file of vectors with --in, or a --database"),
        ("search cat --like 1 --database x", "Give one query"),
        ("migrate add", "required: --to"),
        ("sign ftp://host/1.jpg", "URL must begin with http"),
        ("sign https://host/1.jpg", "EMBEDDING_HMAC_SECRET is missing"),
        ("health", "RUNPOD_API_KEY is missing"),
        ("verify --image none.jpg", "none.jpg: no such file"),
    ],
)
def test_wrong_usage_is_status_2_and_an_error_line(
    line: str, words: str, bare: dict[str, str]
) -> None:
    done = run(*line.split(), env=bare)
    assert done.returncode == 2
    assert any(words in error for error in errors(done)), done.stderr
    assert done.stdout == "" and "token=secret" not in done.stderr


def test_options_cannot_be_abbreviated(bare: dict[str, str]) -> None:
    assert run("embed", "--back", "local", "x.jpg", env=bare).returncode == 2


# Sign


def signed(*args: str, env: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """Run `sign`; return the request and the curl line that it printed."""
    done = run("sign", *args, env=env)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    job = json.loads(done.stderr.splitlines()[0])
    assert json.loads(shlex.split(line)[-1]) == job
    return job, line


@pytest.mark.parametrize(
    ("flags", "keys", "version", "kid"),
    [
        ([], "", 1, "v1"),
        (["--v2"], "", 2, "v1"),
        ([], f"new:{KEY},old:{SECRET}", 2, "new"),
        (["--v1"], f"new:{KEY}", 1, "v1"),
    ],
)
def test_the_worker_accepts_the_signature(
    flags: list[str], keys: str, version: int, kid: str, tmp_path: Path
) -> None:
    env = plain_env(tmp_path, EMBEDDING_HMAC_KEYS=keys)
    url = "https://host/1.jpg?token=it's $HOME `id` \"x\" \\ !! é"
    job, line = signed(url, "--request-id", "by-hand", *flags, env=env)
    ring = auth.Keyring(SECRET, {"new": KEY}, "heimdex-clip", window_s=120, max_lifetime_s=3600)
    credential = auth.verify(job["input"], keyring=ring, now=time.time())
    assert (credential.version, credential.kid) == (version, kid)
    assert (job["input"]["image_url"], job["input"]["request_id"]) == (url, "by-hand")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("version", ["--v1", "--v2"])
def test_the_printed_curl_line_returns_a_vector(
    version: str, caller: dict[str, str], photos: PhotoServer
) -> None:
    url = photos.photo("chelsea.jpg", "name=it's $HOME `id` \"x\"&é".replace(" ", "%20"))
    _, line = signed(url.replace("é", "%C3%A9"), version, "--request-id", "by-hand", env=caller)
    done = subprocess.run(["sh", "-c", line], env=caller, capture_output=True, timeout=60)
    job = json.loads(done.stdout)
    assert job["status"] == "COMPLETED", job
    assert job["output"]["request_id"] == "by-hand" and job["output"]["dim"] == 512


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_sign_can_be_piped_into_a_shell(caller: dict[str, str], photos: PhotoServer) -> None:
    command = " ".join([*CLI, "sign", photos.photo(), "--request-id", "piped", "| sh"])
    done = subprocess.run(["sh", "-c", command], env=caller, capture_output=True, timeout=60)
    job = json.loads(done.stdout)
    assert (job["status"], job["output"]["request_id"]) == ("COMPLETED", "piped"), job
    assert b"not found" not in done.stderr and done.returncode == 0


def test_body_prints_the_request_alone(tmp_path: Path) -> None:
    done = run("sign", "https://host/1.jpg", "--body", env=plain_env(tmp_path))
    assert json.loads(done.stdout)["input"]["image_url"] == "https://host/1.jpg"
    assert len(done.stdout.splitlines()) == 1 and "{" not in done.stderr


# Embed and search, through an endpoint


def test_urls_are_embedded_by_an_endpoint(
    caller: dict[str, str], photos: PhotoServer, tmp_path: Path
) -> None:
    urls = [photos.photo(name, "token=key-to-it") for name in ("chelsea.jpg", "coffee.jpg")]
    sources = [*urls, f"{photos.url}/missing?token=key-to-it", "--text", "a cat"]
    out = str(tmp_path / "vectors.parquet")
    done = run("embed", *sources, "--json", "--out", out, env=caller)
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


def test_a_file_without_the_local_backend_is_refused_with_advice(caller: dict[str, str]) -> None:
    done = run("embed", str(PHOTOS / "chelsea.jpg"), env=caller)
    assert done.returncode == 2
    assert "--backend local" in errors(done)[0]


def test_an_unreachable_endpoint_ends_with_status_1(caller: dict[str, str]) -> None:
    env = caller | {"RUNPOD_BASE_URL": "http://127.0.0.1:9/v2", "RUNPOD_TIMEOUT_S": "1"}
    done = run("search", "cat", "--in", write_vectors(caller, {"a": [1.0] * 512}), env=env)
    assert done.returncode == 1 and len(errors(done)) == 1


def test_a_refused_request_prints_no_head_without_rows(caller: dict[str, str]) -> None:
    wrong = caller | {"EMBEDDING_HMAC_SECRET": "another-secret-0123456789abcdef"}
    done = run("embed", "https://x/1.jpg", env=wrong)
    assert (done.returncode, done.stdout) == (1, "") and "AUTH_FAILED" in errors(done)[0]


def write_vectors(env: Mapping[str, str], rows: Mapping[str, list[float]], **facts: str) -> str:
    """Write a file of vectors of the fake worker's space; return its path."""
    path = Path(env["HOME"], "written.parquet")
    facts = {"space_id": FAKE_SPACE, "model": "ViT-B-32", "pretrained": "fake"} | facts
    with open_writer(path) as writer:
        for name, vector in rows.items():
            writer.add(name, vector, {"model_version": "1", **facts})
    return str(path)


def test_a_search_prints_the_best_match_first(caller: dict[str, str]) -> None:
    text = [3.0, *map(float, map(ord, "cat"))]  # the fake worker's vector of this text
    same, other = np.pad(text, (0, 508)), np.pad([1.0, -1.0], (0, 510))
    rows = {"other": other.tolist(), "same\x1b[2J": same.tolist(), "none": [0.0] * 512}
    done = run("search", "cat", "--in", write_vectors(caller, rows), "--top", "2", env=caller)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "image", "same\\x1b[2J", "other",
    ]  # fmt: skip
    assert "1.0000" in done.stdout


def with_columns(path: str, **columns: list[object]) -> str:
    """Add columns to a file of vectors."""
    rows = parquet.read_table(path)
    for name, values in columns.items():
        rows = rows.append_column(name, [values])
    parquet.write_table(rows, path)
    return path


def test_a_search_shows_further_columns(caller: dict[str, str]) -> None:
    text = [3.0, *map(float, map(ord, "cat"))]
    same, other = np.pad(text, (0, 508)), np.pad([1.0, -1.0], (0, 510))
    path = write_vectors(caller, {"2": other.tolist(), "1": same.tolist()})
    titles = ["a dog", "a cat\x1b[2J\non a sofa"]
    urls = ["https://u:pass@a.co/2.jpg?token=t2", "https://a.co/1.jpg?token=t1#x"]
    with_columns(path, title=titles, url=urls, size=[7, None], score=[0.5, float("nan")])
    show = ["--show", "title", "--show", "url", "--show", "size"]
    done = run("search", "cat", "--in", path, *show, env=caller)
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["score", "image", "title", "url", "size"]
    assert first.split()[1:] == ["1", "a", "cat\\x1b[2J\\non", "a", "sofa", "https://a.co/1.jpg"]
    assert second.split()[1:] == ["2", "a", "dog", "https://a.co/2.jpg", "7"]
    done = run("search", "cat", "--in", path, "--show", "score", *show, "--json", env=caller)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["1", "2"] and lines[0]["score"] > 0.99
    assert lines[0]["columns"] == {
        "score": None, "title": titles[1], "url": "https://a.co/1.jpg", "size": None
    }  # fmt: skip
    assert "token=" not in done.stdout and "pass" not in done.stdout


def test_a_column_that_is_not_there_is_named_before_the_query_is_embedded(
    bare: dict[str, str],
) -> None:
    path = write_vectors(bare, {"1": [1.0] * 512})
    done = run("search", "cat", "--in", path, "--show", "title", env=bare)
    assert done.returncode == 2 and done.stdout == ""
    assert errors(done)[0].startswith("The file has no column 'title'; it has id, vector, ")


def test_vectors_of_another_space_are_refused(caller: dict[str, str]) -> None:
    file = write_vectors(caller, {"a": [1.0] * 512}, space_id="0123456789abcdef")
    done = run("search", "cat", "--in", file, env=caller)
    assert done.returncode == 1 and done.stdout == ""
    assert "0123456789abcdef" in done.stderr and FAKE_SPACE in done.stderr


def test_a_file_that_holds_no_vectors_is_refused(caller: dict[str, str]) -> None:
    Path(caller["HOME"], "notes.txt").write_text("nothing of the kind")
    done = run("search", "cat", "--in", "notes.txt", env=caller)
    assert done.returncode == 1 and "notes.txt cannot be read as vectors" in errors(done)[0]


# Health


def test_a_ready_endpoint_has_status_0(caller: dict[str, str]) -> None:
    done = run("health", env=caller)
    assert done.returncode == 0 and done.stdout.startswith("ready: "), done
    assert json.loads(run("health", "--json", env=caller).stdout)["status"] == "ready"


def test_an_endpoint_without_workers_has_status_1_if_jobs_wait(tmp_path: Path) -> None:
    with EmulatorServer() as server:
        env = plain_env(tmp_path, **server.caller_env())
        cold = run("health", env=env)
        server.submit({"text": "a cat"})
        done = run("health", env=env)
    assert cold.returncode == 0 and cold.stdout.startswith("cold: "), cold
    assert done.returncode == 1 and done.stdout.startswith("no workers: "), done


def test_no_advice_names_a_template() -> None:
    assert not [advice for advice in client._ADVICE.values() if "template" in advice]


# On this machine: the package's photographs, with seeded weights


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a file with the vectors of the package's photographs, embedded here."""
    env = local_env(tmp_path_factory.mktemp("embedded"))
    done = run("embed", str(PHOTOS), "--out", "vectors.parquet", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "10 embedded, 0 failed" in done.stderr
    return str(Path(env["HOME"], "vectors.parquet"))


def test_a_folder_of_photographs_gets_open_clips_vectors(embedded: str) -> None:
    table = parquet.read_table(embedded)
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[512]"
    assert set(table["model_version"].to_pylist()) == {"openai-vit-b-32-v1"}
    rows = {Path(row["id"]).name: row["vector"] for row in table.to_pylist()}
    assert sorted(rows) == NAMES
    apart = {name: 1 - np.dot(rows[name], row.numpy()) for name, row in golden()["photos"].items()}
    assert max(apart.values()) < 6e-4, apart  # of bf16, and of `fast` preprocessing


def test_an_image_is_its_own_best_match(local: dict[str, str], embedded: str) -> None:
    like = ["--image", str(PHOTOS / "coffee.jpg"), "--in", embedded, "--top", "3", "--json"]
    done = run("search", *like, env=local, forked=True)
    matches = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(matches), Path(matches[0]["id"]).name] == [3, "coffee.jpg"]
    assert matches[0]["score"] > 0.9999 > matches[1]["score"] >= matches[2]["score"]


def test_matches_of_a_text_come_in_order(local: dict[str, str], embedded: str) -> None:
    line = ("search", "a cup of coffee", "--in", embedded, "--top", "99")
    done = run(*line, env=local, forked=True)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split()[0]) for line in done.stdout.splitlines()[1:]]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)


def test_what_is_skipped_in_a_folder_is_said(local: dict[str, str]) -> None:
    folder = Path(local["HOME"], "mixed")
    (folder / "deep" / "deeper").mkdir(parents=True)
    for name in ("a.jfif", "b.JPE", "c.heic", "deep/d.jpg", "deep/deeper/e.jpg", ".DS_Store"):
        shutil.copy(PHOTOS / "chelsea.jpg", folder / name)
    done = run("embed", "mixed", "--no-recursive", "--json", env=local, forked=True)
    names = [json.loads(line)["id"] for line in done.stdout.splitlines()]
    assert (done.returncode, names) == (0, ["mixed/a.jfif", "mixed/b.JPE"])
    said = "mixed: skipped 1 .heic, 1 hidden, 1 subfolder(s) (--recursive reads them)"
    assert f"[INFO] {said}" in done.stderr.splitlines()
    done = run("embed", "mixed", "--recursive", "--json", env=local, forked=True)
    assert len(done.stdout.splitlines()) == 4
    assert "[INFO] mixed: skipped 1 .heic, 1 hidden" in done.stderr.splitlines()


def test_a_bad_file_fails_alone(local: dict[str, str], photos: PhotoServer) -> None:
    folder = Path(local["HOME"], "images")
    folder.mkdir()
    shutil.copy(PHOTOS / "chelsea.jpg", folder / "a.jpg")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    os.mkfifo(folder / "c.jpg")
    (folder / "d.jpg").write_bytes((PHOTOS / "chelsea.jpg").read_bytes().ljust(200_001, b"\0"))
    (folder / "e.gif").symlink_to("nowhere.gif")
    Path(os.fsdecode(bytes(folder) + b"/f\xff\x1b.jpg")).symlink_to(PHOTOS / "coffee.jpg")
    # In fp32 a vector does not depend on which other images are in its batch.
    env = local | {"MAX_IMAGE_SIZE_BYTES": "200000", "CLIP_PRECISION": "fp32"}
    texts = ["--text", "a cat", "--text", "x" * 10_001]
    done = run("embed", "images", photos.photo(), *texts, "--json", env=env, forked=True)
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("code", "") for line in lines] == [
        "", "DECODE_FAILED", "FETCH_FAILED", "IMAGE_TOO_LARGE", "FETCH_FAILED", "", "", "",
        "INVALID_REQUEST",
    ]  # fmt: skip
    assert len({line["space_id"] for line in lines if "embedding" in line}) == 1
    assert lines[0]["embedding"] == pytest.approx(lines[6]["embedding"], abs=1e-6)
    assert "200,000" in lines[3]["error"] and "\x1b" not in done.stdout + done.stderr


def test_the_worker_says_why_it_cannot_start(bare: dict[str, str]) -> None:
    done = run("worker", "--test_input", "{}", env=bare, forked=True)
    assert done.returncode == 1 and "EMBEDDING_HMAC_SECRET is missing" in errors(done)[0]


def test_the_demo_says_why_it_cannot_start(bare: dict[str, str]) -> None:
    done = run("demo", "--photo", "nowhere.jpg", env=bare)
    assert done.returncode == 1 and "there is no file nowhere.jpg" in errors(done)[0]


# Verify


@pytest.fixture(scope="module")
def towers(seeded_hub: Path) -> tuple[object, object]:
    """The seeded model as the worker loads it."""
    from heimdex_clip_worker.model.image import Embedder
    from heimdex_clip_worker.model.text import TextEmbedder

    options = {"device": "cpu", "artifact_dir": str(CACHE / "artifacts")}
    images = Embedder.load("ViT-B-32", "openai", cache_dir=str(seeded_hub), **options)
    return images, TextEmbedder.load(images)


def test_weights_that_are_not_openais_fail(local: dict[str, str]) -> None:
    line = ("verify", "--json", "--image", str(PHOTOS / "chelsea.jpg"))
    done = run(*line, env=local, forked=True)
    output = json.loads(done.stdout)
    assert [(check["name"], check["status"]) for check in output["checks"]] == [
        ("this machine", "OK"), ("weights in use", "OK"), ("published values", "FAILED"),
    ]  # fmt: skip
    assert done.returncode == 1 and output["ok"] is False


def test_missing_weights_fail_and_the_last_check_is_skipped(
    local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_check_machine", lambda settings: verify._Result("", "OK", ""))
    monkeypatch.setenv("CLIP_PRETRAINED", str(Path(local["HOME"], "none.safetensors")))
    results = verify._checks(worker_settings(), None)
    assert [result.status for result in results] == ["OK", "FAILED", "skipped"]


@pytest.mark.parametrize(("last", "status"), [("OK", 0), ("skipped", 0), ("FAILED", 1)])
def test_only_a_failed_check_ends_with_status_1(
    last: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = verify._Result("one", "OK", ""), verify._Result("the other", last, "why\x1b")
    monkeypatch.setattr(verify, "_checks", lambda settings, image: iter([good, other]))
    monkeypatch.setattr(process, "set_up_logging", lambda level: None)
    with pytest.raises(SystemExit) as ended:
        main(["verify"])
    assert ended.value.code == status
    assert capsys.readouterr().out.splitlines()[1].split() == [last, "the", "other", "why\\x1b"]


def test_weights_that_miss_their_golden_vectors_fail(towers: tuple[object, object]) -> None:
    images, texts = towers
    assert verify._check_weights(images, texts).status == "OK"
    other = replace(images, photos=images.photos.roll(1, 0))
    assert verify._check_weights(other, texts).status == "FAILED"


def test_published_values_are_compared_within_a_tolerance(
    towers: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLOWED_IMAGE_HOSTS", "nowhere.invalid")
    monkeypatch.delenv("CLIP_PRETRAINED", raising=False)
    settings, photo = worker_settings(), PHOTOS / "chelsea.jpg"
    skipped = verify._check_published(*towers, settings, None)
    assert skipped.status == "skipped" and "could not be fetched" in skipped.said
    cosines = verify._caption_cosines(*towers, photo.read_bytes())
    for shift, status in ((0.002, "OK"), (0.004, "FAILED")):
        published = {text: x + shift for text, x in zip(verify._PUBLISHED, cosines, strict=True)}
        monkeypatch.setattr(verify, "_PUBLISHED", published)
        assert verify._check_published(*towers, settings, photo).status == status


# Ctrl-C, pipes and terminals


@contextlib.contextmanager
def waiting(env: Mapping[str, str], *args: str, **options: object) -> Iterator[subprocess.Popen]:
    """Start a command that does not end by itself."""
    with start(*args, env=env, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_cancels_the_job_and_leaves_no_file(tmp_path: Path, photos: PhotoServer) -> None:
    with EmulatorServer() as server:  # without a worker
        env = plain_env(tmp_path, **server.caller_env())
        with waiting(env, "embed", photos.photo(), "--out", "v.parquet") as process:
            server.until(lambda platform: bool(platform.jobs), 30, "no job was sent")
            interrupted_at = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert time.monotonic() - interrupted_at < 5  # the end of Python on a busy machine included
        states = {job.status for job in server.queue.jobs.values()}
    assert process.returncode == 130
    assert err.splitlines()[-1] == "[ERROR] interrupted" and "Traceback" not in err
    assert states == {"CANCELLED"}
    assert not list(tmp_path.glob("*.p*")) + list(tmp_path.glob(".*.part"))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_download_that_hangs(local: dict[str, str], photos: PhotoServer) -> None:
    with waiting(local, "embed", f"{photos.url}/endless", "--text", "a cat") as process:
        deadline = time.monotonic() + 90
        while not photos.hits["/endless"] and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "[ERROR] interrupted" and "Traceback" not in err


def test_a_reader_that_leaves_causes_no_error(caller: dict[str, str]) -> None:
    texts = [part for n in range(200) for part in ("--text", f"text {n}")]
    with waiting(caller, "embed", *texts, "--json") as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert process.returncode == 141 and "Traceback" not in err and "Error" not in err, err


def read_terminal(master: int) -> str:
    """Read all that was written to a terminal."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed
        while part := os.read(master, 65536):
            shown += part
    return shown.decode(errors="replace")


def test_a_bar_is_shown_on_a_terminal_only(caller: dict[str, str], photos: PhotoServer) -> None:
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
