"""The backfill as a process: killed, twice at once, cut off, refused; against the real things."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from backfill_rig import Rig, ended, is_missing, is_right, rig, said, with_kills

SEED = int(os.environ.get("BACKFILL_SEED", time.time_ns() % 1_000_000))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("home")) as made:
        yield made


def leases(world: Rig, name: str) -> int:
    asked = f"SELECT count(*) FROM {name} WHERE visual_clip_metadata ? 'backfill_lease'"
    return world.admin.execute(asked).fetchone()[0]


def through(world: Rig, name: str) -> int:
    return world.admin.execute(f"SELECT count(*) FROM {name}_ends").fetchone()[0]


def wait_for(ready, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.timeout(180)
def test_two_processes_killed_at_random_leave_every_row_right_exactly_once(world: Rig) -> None:
    print(f"BACKFILL_SEED={SEED}")
    world.fill("killed", 2000)
    outcome = with_kills(
        lambda: world.on_table("killed", "--batch", 16, "--in-flight", 4), 2, 4, SEED, (0.5, 1.5)
    )
    assert world.mistakes("killed", 2000) == [], outcome["said"]
    assert set(outcome["statuses"]) <= {0, 3} and leases(world, "killed") == 0
    assert outcome["killed"] >= 2, "killed too late to show anything"


def test_a_file_of_vectors_survives_kills_at_any_moment(world: Rig, tmp_path: Path) -> None:
    source, target = tmp_path / "scenes.csv", tmp_path / "vectors.parquet"
    lines = [f"scene-{n},{world.url(n)}" for n in range(400)]
    lines += ["scene-0,again", ",no id", "scene-x,"]
    source.write_text("id,image_url\n" + "\n".join(lines))

    def start() -> subprocess.Popen[str]:
        return world.start(source, "--out", target, "--batch", 8, "--in-flight", 2)

    outcome = with_kills(start, 1, 3, SEED, (0.6, 1.6))
    assert outcome["statuses"] == [3] or outcome["statuses"] == [0], outcome["said"]
    table = pyarrow.parquet.read_table(target)
    ids = [int(i.removeprefix("scene-")) for i in table["id"].to_pylist()]
    assert ids == [n for n in range(400) if not is_missing(n)]
    pairs = zip(table["vector"].to_pylist(), ids, strict=True)
    assert all(is_right(values, number) for values, number in pairs)
    failures = [json.loads(line) for line in (tmp_path / "vectors.failures.jsonl").open()]
    codes = {(f["id"] or f["row"]): f["code"] for f in failures}
    assert codes == {f"scene-{n}": "SOURCE_HTTP" for n in range(400) if is_missing(n)} | {
        401: "DUPLICATE_ID", 402: "MISSING_ID", "scene-x": "MISSING_URL"
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir() if "vectors" in path.name) == [
        "vectors.failures.jsonl",
        "vectors.parquet",
    ]


def test_a_signal_ends_it_in_order(world: Rig) -> None:
    world.fill("asked", 1500)
    process = world.on_table("asked", "--batch", 8, "--in-flight", 2, "--json")
    wait_for(lambda: through(world, "asked") > 0)
    process.send_signal(signal.SIGTERM)
    assert ended(process, 30) == 130
    assert leases(world, "asked") == 0 and 0 < through(world, "asked") < 1500
    summary = json.loads(said(process).splitlines()[-1])
    assert summary["status"] == "interrupted" and "goes on from here" in said(process)
    assert summary["done"] + sum(summary["failed"].values()) == through(world, "asked")


def test_lost_connections_and_an_outage_of_the_platform_pass(world: Rig) -> None:
    world.fill("cut", 400)
    world.platform.behaviour.fail("caller", *[500] * 5)
    process = world.on_table("cut", "--batch", 8, "--in-flight", 4)
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'heimdex-clip backfill'"""
    times = 0
    while process.poll() is None and times < 100:
        times += bool(world.admin.execute(cut).fetchall())
        time.sleep(0.25)
    assert ended(process, 60) == 3 and times > 2
    assert "trying again" in said(process)
    assert world.mistakes("cut", 400) == []


def test_another_secret_stops_it_and_marks_no_row(world: Rig) -> None:
    world.fill("refused", 100)
    other = {"EMBEDDING_HMAC_SECRET": "another-secret-0123456789abcdef"}
    process = world.on_table("refused", **other)
    assert ended(process, 60) == 1
    assert "AUTH_FAILED" in said(process) and "EMBEDDING_HMAC_SECRET" in said(process)
    assert through(world, "refused") == 0 and leases(world, "refused") == 0


def test_retry_failed_takes_only_what_can_pass_and_dry_run_writes_nothing(world: Rig) -> None:
    world.fill("again", 50)
    facts = '{"code": "X", "error": "e", "failed_at": "2020", "retryable": %s}'
    world.admin.execute("UPDATE again SET visual_clip_metadata = %s", [facts % "true"])
    world.admin.execute(
        "UPDATE again SET visual_clip_metadata = %s WHERE id >= 40", [facts % "false"]
    )
    before = world.admin.execute("SELECT id, xmin FROM again ORDER BY id").fetchall()
    dry = world.on_table("again", "--retry-failed", "--dry-run", "--json")
    assert ended(dry, 30) == 0 and json.loads(said(dry))["todo"] == 40
    assert world.admin.execute("SELECT id, xmin FROM again ORDER BY id").fetchall() == before
    assert ended(world.on_table("again"), 30) == 0 and through(world, "again") == 0
    assert ended(world.on_table("again", "--retry-failed"), 30) == 3
    assert through(world, "again") == 40


def test_a_query_goes_to_a_file_and_a_file_to_a_table(world: Rig, tmp_path: Path) -> None:
    world.fill("origin", 30)
    query = "SELECT id, thumbnail_url FROM origin WHERE thumbnail_url LIKE '%1.png'"
    target = tmp_path / "v.parquet"
    words = ("--query", query, "--url-column", "thumbnail_url", "--out", target)
    assert ended(world.start("--database", world.uri, *words), 30) == 0
    assert pyarrow.parquet.read_table(target)["id"].to_pylist() == [1, 11, 21]
    world.fill("target", 0)
    source = tmp_path / "s.jsonl"
    entries = [{"id": n, "thumbnail_url": world.url(n)} for n in (7, 8)] + [{"id": "x"}]
    source.write_text("\n".join(map(json.dumps, entries)))
    process = world.on_table("target", source, "--url-column", "thumbnail_url")
    assert ended(process, 30) == 3 and "row 3: BAD_ROW" in said(process)
    assert world.mistakes("target", 2) == []


def test_vectors_of_another_space_are_reported_and_redone(world: Rig) -> None:
    world.fill("stale", 4)
    facts = json.dumps({"space_id": "old", "model_version": "openai-vit-b-32-v1"})
    old = [json.dumps([1.0, *[0.0] * 511]), facts]
    world.admin.execute(
        "UPDATE stale SET embedding_visual_clip = %s, visual_clip_metadata = %s WHERE id < 3", old
    )
    plain = world.on_table("stale", "--json")
    assert ended(plain, 30) == 0
    (other,) = json.loads(said(plain).splitlines()[-1])["other_spaces"]
    assert (other["space_id"], other["count"]) == ("old", 3)
    again = world.on_table("stale", "--json", "--reembed")
    assert ended(again, 30) == 0
    summary = json.loads(said(again).splitlines()[-1])
    assert (summary["done"], summary["other_spaces"]) == (3, [])
    assert world.mistakes("stale", 4) == []


def test_a_terminal_gets_a_bar(world: Rig) -> None:
    world.fill("shown", 20)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = world.on_table("shown", "--batch", 4, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert ended(process, 30) == 3
    assert b"20/20" in seen and b"img/s" in seen and b"failed 1" in seen


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ["torch", "runpod", "aiohttp", "PIL", "pyarrow", "psycopg", "tqdm", "storage3"]
    code = f"import sys, heimdex_clip_worker.backfill as b; print(set(sys.modules) & set({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
