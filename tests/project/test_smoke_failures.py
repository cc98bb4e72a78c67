"""Every failure of the smoke test is one line, `FAILED: <what> ... <what to do>`.

The notebook's cells run in this process, up to the one that fails; papermill runs the whole
notebook in test_smoke.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_worker import SECRET, PhotoServer
from storage_standin import StorageServer

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(60)]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"
API_KEY = "rpa_OF_NOBODY_0123456789"
NOWHERE = "http://127.0.0.1:1"  # no server
CELLS = [
    (cell["id"], "".join(cell["source"]))
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


class Shell:
    """What the notebook uses of IPython's shell."""

    def __init__(self) -> None:
        self.failure: Any = None
        self.after: list[Callable[[Any], None]] = []
        self.events = SimpleNamespace(register=lambda event, act: self.after.append(act))

    def set_custom_exc(self, kinds: tuple[type, ...], handler: Callable[..., None]) -> None:
        self.handler = handler

    def showtraceback(self, triple: tuple[Any, ...]) -> None:
        self.failure = triple[1]


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the environment of an operator who has everything right, but no server."""
    for name, value in {
        "RUNPOD_API_KEY": API_KEY, "RUNPOD_CLIP_ENDPOINT_ID": "e1",
        "EMBEDDING_HMAC_SECRET": SECRET, "EMBEDDING_HMAC_KEYS": "", "AUTH_AUDIENCE": "",
        "SUPABASE_URL": NOWHERE, "SUPABASE_SERVICE_ROLE_KEY": "key-of-nobody",
        "SUPABASE_BUCKET": "scenes", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "summary.md"


def code(value: Any) -> str:
    """Write a parameter as papermill does."""
    return f"float({str(value)!r})" if isinstance(value, float) else repr(value)


def run(summary: Path, until: str = "", extra: str = "", **parameters: Any) -> str:
    """Run the cells up to `until`; return the failure's line."""
    shell, names = Shell(), {"__name__": "__main__", "In": [""]}
    names["get_ipython"] = lambda: shell
    cells = list(CELLS)
    if parameters:
        lines = [f"{name} = {code(value)}" for name, value in parameters.items()]
        cells.insert(1, ("injected", "\n".join(["# Parameters", *lines])))
    if extra:
        cells.insert([name for name, _ in cells].index(until) + 1, ("extra", extra))
        until = "extra"
    try:
        for name, source in cells:
            names["In"].append(source)
            try:
                exec(compile(source, name, "exec"), names)
                error = None
            except Exception as problem:
                error = problem
                shell.handler(shell, type(problem), problem, problem.__traceback__)
            for act in shell.after:
                act(SimpleNamespace(success=error is None))
            if error or name == until:
                break
    finally:
        if "clean_up" in names:
            names["atexit"].unregister(names["clean_up"])
    assert shell.failure, "nothing failed"
    line = str(shell.failure)
    assert line.startswith("FAILED: ") and line.count(" ... ") == 1 and "\n" not in line
    assert shell.failure._render_traceback_()[0] == line
    what, remedy = line.removeprefix("FAILED: ").split(" ... ")
    assert what and len(remedy) > 10
    text = summary.read_text(encoding="utf-8")
    assert text.splitlines()[0] == line
    for secret in (API_KEY, SECRET, "key-of-nobody", "service-role-", "token="):
        assert secret not in "\n".join(shell.failure._render_traceback_()) + text
    return line


@pytest.mark.parametrize(
    ("parameters", "what", "remedy"),
    [
        ({"timeut_s": 5}, "there is no parameter timeut_s", "timeout_s is meant?"),
        ({"secret": "x"}, "there is no parameter secret", "leave it out; The parameters are base"),
        ({"n": "16"}, "the parameter n is '16', not a whole number", "-p n"),
        ({"n": 2.5}, "the parameter n is 2.5, not a whole number", "-p n"),
        ({"n": True}, "the parameter n is True, not a whole number", "-p n"),
        ({"n": None}, "the parameter n is None, not a whole number", "-p n"),
        ({"n": 0}, "the parameter n is 0", "from 1 to 511"),
        ({"n": 100_000}, "the parameter n is 100000", "from 1 to 511"),
        ({"dim": "512"}, "the parameter dim is '512'", "-p dim"),
        ({"dim": -1}, "the parameter dim is -1", "from 1"),
        ({"timeout_s": "soon"}, "the parameter timeout_s is 'soon', not a number", "-p timeout_s"),
        ({"timeout_s": 0}, "the parameter timeout_s is 0", "from 1 to 3600"),
        ({"timeout_s": math.nan}, "the parameter timeout_s is nan", "from 1 to 3600"),
        ({"timeout_s": math.inf}, "the parameter timeout_s is inf", "from 1 to 3600"),
        ({"timeout_s": 10**9}, "the parameter timeout_s is 1000000000", "from 1 to 3600"),
        ({"endpoint_id": 1e5}, "the parameter endpoint_id is 100000.0, not text", "-r endpoint_id"),
        ({"endpoint_id": "a/b"}, "the parameter endpoint_id is 'a/b', it must be an endp", "-r"),
        ({"base_url": 1}, "the parameter base_url is 1, not text", "-r base_url"),
        ({"base_url": "http://api.runpod.ai/v2"}, "the parameter base_url is", "-r"),
        ({"base_url": "api.runpod.ai"}, "the parameter base_url is", "-r"),
        ({"storage": "s3"}, "the parameter storage is 's3'", "supabase or url"),
        ({"storage": "url"}, "the parameter image is no URL", "-r"),
        ({"image": "nothing.jpg"}, "the parameter image names no file: nothing.jpg", "-r"),
        ({"image": "https://a.example/b.jpg"}, "the parameter image names no file", "-r"),
        ({"golden": "nothing.json"}, "the parameter golden names no file", "tools/golden.py"),
        ({"caption": 5}, "the parameter caption is 5, not text", "-r caption"),
    ],
)  # fmt: skip
def test_a_mistaken_parameter(summary, parameters, what, remedy) -> None:
    line = run(summary, "credentials", **parameters)
    assert line.startswith(f"FAILED: {what}") and remedy in line


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        *[(name, "", f"{name} is missing") for name in (
            "RUNPOD_API_KEY", "RUNPOD_CLIP_ENDPOINT_ID", "EMBEDDING_HMAC_SECRET", "SUPABASE_URL",
            "SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_BUCKET",
        )],
        ("RUNPOD_API_KEY", "with a space", "RUNPOD_API_KEY must be 8 to 512"),
        ("RUNPOD_CLIP_ENDPOINT_ID", "a/b", "RUNPOD_CLIP_ENDPOINT_ID='a/b' must be"),
        ("EMBEDDING_HMAC_SECRET", "short", "EMBEDDING_HMAC_SECRET is too short"),
        ("EMBEDDING_HMAC_SECRET", f"{SECRET}\n", "EMBEDDING_HMAC_SECRET has white space"),
        ("EMBEDDING_HMAC_KEYS", SECRET, "EMBEDDING_HMAC_KEYS must be kid:secret"),
        ("AUTH_AUDIENCE", "two words", "AUTH_AUDIENCE='two words' must be"),
        ("SUPABASE_URL", "abc.supabase.co", "SUPABASE_URL='abc.supabase.co' must be https"),
        ("SUPABASE_SERVICE_ROLE_KEY", "a b", "SUPABASE_SERVICE_ROLE_KEY must be printable"),
    ],
)  # fmt: skip
def test_a_variable_that_is_missing_or_wrong(summary, monkeypatch, variable, value, what) -> None:
    monkeypatch.setenv(variable, value)
    line = run(summary, "credentials")
    assert line.startswith(f"FAILED: {what}") and "set the variables in the environment" in line


def test_a_missing_package(summary, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    line = run(summary, "imports")
    assert line.startswith("FAILED: ModuleNotFoundError: ") and "requests" in line
    assert "make .venv/.dev" in line


# The storage


def test_a_storage_that_cannot_be_reached(summary) -> None:
    line = run(summary, "upload")
    assert line.startswith("FAILED: Supabase Storage cannot be reached (ConnectError")
    assert "check SUPABASE_URL" in line


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"SUPABASE_BUCKET": "films"}, "(404, Bucket not found)"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "another-key"}, "(403, Invalid Compact JWS)"),
    ],
)
def test_a_wrong_bucket_or_key(summary, monkeypatch, change, what) -> None:
    with StorageServer() as storage:
        for name, value in {**storage.env(), **change}.items():
            monkeypatch.setenv(name, value)
        line = run(summary, "upload")
    assert line.startswith(f"FAILED: Supabase Storage refuses the upload {what} ... check SUPABASE")


def test_a_storage_that_loses_what_was_uploaded(summary, monkeypatch) -> None:
    with StorageServer() as storage:
        for name, value in storage.env().items():
            monkeypatch.setenv(name, value)
        line = run(summary, "upload", "files.remove(list(uploaded))\nphotos[0].make_url()")
    assert "is not in the bucket" in line


def test_uploads_that_cannot_be_removed_are_named(summary, monkeypatch) -> None:
    with StorageServer() as storage:
        for name, value in storage.env().items():
            monkeypatch.setenv(name, value)
        run(summary, "upload", "files.remove = None\nraise SmokeFailure('x', 'do something')")
    lines = [line for line in summary.read_text().splitlines() if line.startswith("FAILED")]
    assert lines[1].startswith("FAILED: 10 uploads may still be in the bucket (TypeError) ... rem")
    assert "smoke-test/" in lines[1]


def test_a_page_instead_of_a_storage(summary, monkeypatch) -> None:
    with answering(200, "<h1>Welcome</h1>") as url:
        monkeypatch.setenv("SUPABASE_URL", url)
        line = run(summary, "first-answer")
    assert "Supabase Storage" in line and "check SUPABASE_URL" in line


@pytest.mark.parametrize("path", ["/missing.jpg", "/status/403"])
def test_an_image_that_nobody_can_fetch(summary, path) -> None:
    with PhotoServer() as photos:
        line = run(summary, "public-urls", storage="url", image=f"{photos.url}{path}?token=secret")
    assert line.startswith("FAILED: HTTP 40") and "check the parameter image" in line


def test_an_image_server_that_cannot_be_reached(summary) -> None:
    line = run(summary, "public-urls", storage="url", image=f"{NOWHERE}/a.jpg")
    assert line.startswith("FAILED: http://127.0.0.1:1/a.jpg does not answer (ConnectionError)")


# The endpoint


@contextlib.contextmanager
def answering(status: int, body: Any, **headers: str) -> Iterator[str]:
    """Serve one response to every request, except for photographs."""
    data = body if isinstance(body, str) else json.dumps(body)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data.encode())

        do_GET = do_DELETE = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def photo() -> Iterator[str]:
    with PhotoServer() as server:
        yield server.photo()


def in_base64(row: list[float]) -> str:
    """Write a vector as a golden file does."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


def at(base_url: str, image: str) -> dict[str, Any]:
    """Name an endpoint and an image by the notebook's parameters."""
    return {"base_url": base_url, "endpoint_id": "e1", "storage": "url", "image": image,
            "timeout_s": 1}  # fmt: skip


def done(**output: Any) -> dict[str, Any]:
    return {"id": "j1", "status": "COMPLETED", "output": output}


def failed(error: Any, **output: Any) -> dict[str, Any]:
    return {"id": "j1", "status": "FAILED", "error": error, "output": output}


TIMES = dict.fromkeys(["download_ms", "decode_ms", "queue_ms", "inference_ms", "total_ms"], 0.0)
GOOD = {
    "embedding": [1.0] + [0.0] * 511, "dim": 512, "normalized": True, "space_id": "ab",
    "request_id": "smoke-chelsea.jpg", "timings": TIMES, "model": "ViT-B-32", "pretrained": "x",
}  # fmt: skip
NAN = {**GOOD, "embedding": [math.nan] * 512}
LONG = {**GOOD, "embedding": [1.0] * 512}
OTHER = {**GOOD, "request_id": "of-another"}
OLD = {**GOOD, "timings": {"total_ms": 1}}
NEGATIVE = {**GOOD, "timings": {**TIMES, "queue_ms": -1.0}}


@pytest.mark.parametrize(
    ("status", "body", "what", "remedy"),
    [
        (401, "no", "HTTP 401 from", "RUNPOD_API_KEY is not valid"),
        (403, "no", "HTTP 403 from", "check the key's permissions"),
        (404, "no", "HTTP 404 from", "there is no such endpoint: check endpoint_id"),
        (429, "no", "HTTP 429 from", "lower n"),
        (400, "bad\nrequest", "HTTP 400 from", "check base_url"),
        (302, "moved", "HTTP 302 from", "check base_url"),
        (500, "oh", "HTTP 500 from", "try again"),
        (502, "<html>", "HTTP 502 from", "try again"),
        (200, "<h1>Welcome</h1>", "http://127.0.0.1:", "check base_url"),
        (200, [1], "http://127.0.0.1:", "check base_url"),
        (200, {"detail": "?"}, "http://127.0.0.1:", "check base_url"),
        (200, {"id": "j", "status": "TIMED_OUT"}, "the job is TIMED_OUT", "execution timeout"),
        (200, {"id": "j", "status": "CANCELLED"}, "the job is CANCELLED", "run the test again"),
        (200, {"id": "j", "status": "STRANGE"}, "the job is STRANGE", "the worker's log"),
        (200, {"status": "COMPLETED", "output": "text"}, "a job's output is no", "image"),
        (200, failed("Traceback:\n  line 1\nno memory"), "the job is FAILED: Trace", "log"),
        (200, failed({"error_type": "x"}), "the job is FAILED: {'error_type'", "log"),
        (200, failed("x", code="AUTH_FAILED"), "the job is FAILED: x [AUTH_FAILED]", "AUDIENCE"),
        (200, failed("x", code="AUTH_EXPIRED"), "the job is FAILED: x [AUTH_EXPIRED]", "clocks"),
        (200, failed("x", code="URL_NOT_ALLOWED"), "the job is FAILED: x", "ALLOWED_IMAGE"),
        (200, failed("x", code="DNS_FAILED"), "the job is FAILED: x", "does not reach the storage"),
        (200, failed("x", code="SOURCE_HTTP"), "the job is FAILED: x", "was it removed"),
        (200, failed("x", code="INTERNAL"), "the job is FAILED: x [INTERNAL]", "worker's log"),
        (200, done(), "the answer has no dim, embedding", "image of another version"),
        (200, done(**NAN), "the vector holds NaN", "take the endpoint down"),
        (200, done(**LONG), "the vector's length is 22.6", "take the endpoint down"),
        (200, done(**OTHER), "the answer belongs to another request", "take the endpoint down"),
        (200, done(**OLD), "the answer's timings are", "image of another version"),
        (200, done(**NEGATIVE), "impossible timings", "image of another version"),
    ],
)  # fmt: skip
def test_an_endpoint_that_answers_wrongly(summary, photo, status, body, what, remedy) -> None:
    with answering(status, body, Location="/elsewhere") as url:
        line = run(summary, "timings", **at(f"{url}/v2", photo))
    assert line.startswith(f"FAILED: {what}") and remedy in line.partition(" ... ")[2]


def test_an_endpoint_that_cannot_be_reached(summary, photo) -> None:
    line = run(summary, "first-answer", **at(NOWHERE, photo))
    assert line.startswith(f"FAILED: {NOWHERE}/e1 does not answer (ConnectionError) ... check base")


@pytest.mark.parametrize(
    ("status", "remedy"), [("IN_QUEUE", "Does a worker start?"), ("IN_PROGRESS", "stuck or slow")]
)
def test_an_endpoint_without_a_worker_or_with_a_slow_one(summary, photo, status, remedy) -> None:
    with answering(200, {"id": "j", "status": status, "workers": {"ready": 0}}) as url:
        line = run(summary, "first-answer", **at(url, photo))
    assert line.startswith(f"FAILED: the job is still {status} after 1 s (workers: {{'ready': 0}}")
    assert remedy in line


@pytest.mark.parametrize(
    ("row", "space", "what"),
    [
        ([0.0] * 511 + [1.0], "ab", "THE VECTORS ARE WRONG. Cosines to the golden vectors: chel"),
        ([1.0] + [0.0] * 511, "cd", "THE VECTORS ARE WRONG. Cosines to the golden vectors: chel"),
        ([1.0] + [0.0] * 255, "ab", "the golden vectors have {256} numbers, not 512"),
    ],
)
def test_vectors_unlike_the_golden_ones(summary, photo, tmp_path, row, space, what) -> None:
    golden = {"photos": {"chelsea.jpg": in_base64(row)}, "space_id": space}
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    with answering(200, done(**GOOD)) as url:
        parameters = at(url, photo) | {"golden": str(tmp_path / "golden.json")}
        line = run(summary, "agrees-with-the-golden-vectors", **parameters)
    assert line.startswith(f"FAILED: {what}")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"photos": {"chelsea.jpg": 5}}', "\x00"])
def test_a_golden_file_without_golden_vectors(summary, photo, tmp_path, text) -> None:
    (tmp_path / "golden.json").write_text(text)
    with answering(200, done(**GOOD)) as url:
        parameters = at(url, photo) | {"golden": str(tmp_path / "golden.json")}
        line = run(summary, "agrees-with-the-golden-vectors", **parameters)
    assert line.startswith("FAILED: the parameter golden names a file without golden vectors")


# What nobody foresees


def test_an_exception_that_nobody_foresees(summary) -> None:
    line = run(summary, "imports", "raise ZeroDivisionError('one\\ntwo')")
    assert line.startswith("FAILED: ZeroDivisionError: one two ... ")


def test_an_answer_without_a_field(summary) -> None:
    line = run(summary, "imports", "ok('x')\n{}['embedding']")
    assert line.startswith("FAILED: an answer has another form than is expected (KeyError: 'embed")
    assert "image of another version" in line


def test_a_message_with_a_secret_and_a_signed_url(summary) -> None:
    text = f"GET https://abc/sign/a.jpg?token=eyJ0.x&a=b of {API_KEY} by {SECRET}"
    line = run(summary, "imports", f"raise RuntimeError({text!r})")
    assert "https://abc/sign/a.jpg?[hidden] of [hidden] by [hidden]" in line


def test_a_summary_that_cannot_be_written_changes_nothing(summary, monkeypatch) -> None:
    shell = Shell()
    names: dict[str, Any] = {"get_ipython": lambda: shell}
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary.parent / "none" / "x"))
    for name, source in CELLS:
        if name in ("failures", "explain"):
            exec(source, names)
    problem = names["SmokeFailure"]("what", "to do")
    shell.handler(shell, type(problem), problem, None)
    assert str(shell.failure) == "FAILED: what ... to do"
