"""The worker's log: a record is a line, no line has a secret, and a busy worker logs less."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import rows_auth
import stand
from local_worker import FAKE, SECRET, PhotoServer, WorkerProcess, plain_env, signed

from heimdex_clip_worker.emulator.server import EmulatorServer
from heimdex_clip_worker.handler import _Pace
from heimdex_clip_worker.serving import process

pytestmark = [pytest.mark.model, pytest.mark.process]

KIT = rows_auth.Kit(now=1_764_000_000)
LOG = logging.getLogger("heimdex_clip_worker")
TOKEN = "t0k3n-of-a-signed-url"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(LOG.name, logging.INFO, "", 0, message, args, None)


# --- lines ------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[None]:
    """Put the log's handlers back afterwards."""
    before = LOG.handlers, LOG.propagate, LOG.level
    yield
    LOG.handlers, LOG.propagate = before[:2]
    LOG.setLevel(before[2])


@pytest.mark.parametrize("form", ["", "text", "json"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_record_is_one_line(form: str, end: str, capsys, log) -> None:
    process.set_up_logging("INFO", form)
    LOG.info("Request %s failed: a%s[INFO] forged", "s-1", end)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and text.endswith(
        "forged" + ('"}' * (form == "json")) + "\n"
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_one_line(form: str, capsys, log) -> None:
    process.set_up_logging("INFO", form)
    try:
        raise ValueError(f"https://a.example/1.jpg?token={TOKEN}\nmore")
    except ValueError:
        LOG.exception("an error")
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and "ValueError" in text and TOKEN not in text


@pytest.mark.parametrize("form", ["", "text", "json"])
@pytest.mark.parametrize(
    "url",
    [
        f"https://a.example/1.jpg?token={TOKEN}",
        f"https://a.example/1.jpg#token={TOKEN}",
        f"https://a.example?token={TOKEN}",
        f"HTTPS://a.example/1.jpg?a=b&token={TOKEN},",
        f"https://user:{TOKEN}@a.example/1.jpg",
        f"postgresql://user:{TOKEN}@db.example/table",
    ],
)
def test_a_line_has_no_query_and_no_password_of_a_url(form: str, url: str, capsys, log) -> None:
    process.set_up_logging("INFO", form)
    LOG.info("got %s and %r", url, url, extra={"request_id": url})
    text = capsys.readouterr().err
    assert TOKEN not in text and ("//a.example" in text or "//db.example" in text)
    if form == "json":
        assert json.loads(text)["request_id"].partition("://")[0] == url.partition("://")[0]


def test_text_has_the_time_where_the_platform_adds_none(capsys, log, monkeypatch) -> None:
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    process.set_up_logging("INFO", "text")
    LOG.info("Processing request: %s", "s-1")
    monkeypatch.setenv("RUNPOD_POD_ID", "pod-1")
    process.set_up_logging("INFO", "text")
    LOG.info("Processing request: %s", "s-1")
    stamped, plain = capsys.readouterr().err.splitlines()
    assert re.fullmatch(TIME + r" \[INFO\] Processing request: s-1", stamped)
    assert plain == "[INFO] Processing request: s-1"


def test_json_has_what_is_known_of_the_record(capsys, log) -> None:
    process.set_up_logging("INFO", "json")
    facts = {"request_id": "s-1", "code": "FETCH_TIMEOUT", "timings": {"total_ms": 1.5}}
    LOG.warning("Request %s failed", "s-1", extra=facts)
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "WARNING", "message": "Request s-1 failed", **facts}


# --- a busy worker ------------------------------------------------------------------


class Moments:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_eleventh_job_of_a_second_is_one_too_many() -> None:
    clock = Moments()
    pace = _Pace(clock)
    levels = [pace.level(many=False) for _ in range(12)]
    assert levels == [logging.INFO] * 10 + [logging.DEBUG] * 2
    clock.now += 0.999
    assert pace.level(many=False) == logging.DEBUG
    clock.now += 1.0
    assert pace.level(many=False) == logging.INFO


async def answered(jobs: list[dict]) -> list[dict]:
    """Send jobs to one worker at the same moment, as its log sees it."""
    async with stand.running(stand.make_worker(KIT, stand.Canned(stand.photo()))) as worker:
        worker._pace = _Pace(Moments())
        return [await worker.handle({"input": job}) for job in jobs]


def logged(jobs: list[dict], level: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Answer jobs; return the log's lines."""
    caplog.set_level(level, LOG.name)
    assert [stand.code_of(reply) for reply in asyncio.run(answered(jobs))] == ["OK"] * len(jobs)
    return [one.getMessage() for one in caplog.records if "accepted by" not in one.getMessage()]


DONE = r"Request s-\d+ completed in [\d.]+s \(download: [\d.]+s, inference: [\d.]+s\)"


def test_a_busy_worker_has_one_line_for_a_job(caplog) -> None:
    lines = logged([KIT.v1(request_id=f"s-{n}") for n in range(14)], "INFO", caplog)
    assert len(lines) == 10 * 4 + 4
    assert lines[36:40][0] == "Processing request: s-9" and re.fullmatch(DONE, lines[39])
    brief = DONE + r": \(451, 300\), 512 dimensions"
    assert [line for line in lines[40:] if not re.fullmatch(brief, line)] == []


def test_with_debug_each_job_has_all_its_lines(caplog) -> None:
    lines = logged([KIT.v1(request_id=f"s-{n}") for n in range(14)], "DEBUG", caplog)
    assert sum(line.startswith("Processing request: ") for line in lines) == 14


def test_a_job_of_many_images_has_one_line(caplog) -> None:
    images = [{"image_url": KIT.url, "request_id": f"s-1.{n}"} for n in range(3)]
    lines = logged([KIT.v2({"images": images, "request_id": "s-1"})], "INFO", caplog)
    assert len(lines) == 1 and lines[0].endswith("(3 images, 0 failed)")


# --- a worker in its process ----------------------------------------------------------


def test_each_line_of_a_worker_is_json_without_a_secret(tmp_path: Path) -> None:
    with PhotoServer() as photos, EmulatorServer() as platform:
        env = plain_env(tmp_path, **platform.worker_env(), LOG_FORMAT="json", LOG_LEVEL="DEBUG")
        query = f"token={TOKEN}"
        jobs = [
            signed(photos.photo(query=query), request_id="s-1"),
            signed(f"{photos.url}/missing?{query}", request_id="s-2"),
            signed(photos.photo(query=query), secret="x" * 32, request_id="s-3"),
        ]
        with WorkerProcess(env, FAKE) as worker:
            platform.wait([platform.submit(job) for job in jobs], 60)
            worker.terminate()
            assert worker.wait_for_exit(15) == 0
    assert [w for w in (SECRET, TOKEN, "token=", platform.worker_key) if w in worker.output] == []
    lines = [json.loads(line) for line in worker.stderr.splitlines()]
    assert all(re.fullmatch(TIME, line["time"]) for line in lines)
    by_id = Counter(line.get("request_id") for line in lines)
    assert by_id["s-1"] == 2 and by_id["s-2"] == 2 and by_id["s-3"] == 1
    codes = {line["request_id"]: line["code"] for line in lines if "code" in line}
    assert codes == {"s-2": "SOURCE_HTTP", "s-3": "AUTH_FAILED"}
    [done] = [line for line in lines if "timings" in line]
    assert done["request_id"] == "s-1" and done["timings"].keys() >= {"total_ms", "download_ms"}
