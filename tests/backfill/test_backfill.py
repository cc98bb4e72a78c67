"""The backfill as a process, with real services: killed, in pairs, disconnected and refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from backfill_rig import Rig, exit_status, is_missing, is_vector_of, output_of, rig, run_with_kills

from heimdex_clip_worker.backfill.files import FileSource

pytestmark = [pytest.mark.postgres, pytest.mark.process]
SEED = int(os.environ.get("BACKFILL_SEED", time.time_ns() % 1_000_000))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("home")) as world:
        yield world


def count_leases(world: Rig, name: str) -> int:
    query = f"SELECT count(*) FROM {name} WHERE visual_clip_metadata ? 'backfill_lease'"
    return world.admin.execute(query).fetchone()[0]


def count_ends(world: Rig, name: str) -> int:
    return world.admin.execute(f"SELECT count(*) FROM {name}_ends").fetchone()[0]


def wait_until(is_ready: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.timeout(180)
def test_two_processes_killed_at_random_give_each_row_one_right_result(world: Rig) -> None:
    print(f"BACKFILL_SEED={SEED}")
    world.fill("killed", 2000)

    def start() -> subprocess.Popen[str]:
        return world.start_on_table("killed", "--batch", 16, "--in-flight", 4)

    outcome = run_with_kills(start, 2, 4, SEED, (0.5, 1.5))
    assert world.mistakes("killed", 2000) == [], outcome["outputs"]
    assert set(outcome["statuses"]) <= {0, 3} and count_leases(world, "killed") == 0
    assert outcome["killed"] >= 2, "the work was done before the kills"


def test_a_file_of_vectors_survives_kills_at_any_moment(world: Rig, tmp_path: Path) -> None:
    source, target = tmp_path / "scenes.csv", tmp_path / "vectors.parquet"
    lines = [f"scene-{n},{world.url(n)}" for n in range(400)]
    lines += ["scene-0,again", ",no id", "scene-x,"]
    source.write_text("id,image_url\n" + "\n".join(lines))

    def start() -> subprocess.Popen[str]:
        return world.start(source, "--out", target, "--batch", 8, "--in-flight", 2)

    outcome = run_with_kills(start, 1, 3, SEED, (0.6, 1.6))
    assert outcome["statuses"] == [3] or outcome["statuses"] == [0], outcome["outputs"]
    table = pyarrow.parquet.read_table(target)
    ids = [int(i.removeprefix("scene-")) for i in table["id"].to_pylist()]
    assert ids == [n for n in range(400) if not is_missing(n)]
    pairs = zip(table["vector"].to_pylist(), ids, strict=True)
    assert all(is_vector_of(values, number) for values, number in pairs)
    failures = [json.loads(line) for line in (tmp_path / "vectors.failures.jsonl").open()]
    codes = {(f["id"] or f["row"]): f["code"] for f in failures}
    assert codes == {f"scene-{n}": "SOURCE_HTTP" for n in range(400) if is_missing(n)} | {
        401: "DUPLICATE_ID", 402: "MISSING_ID", "scene-x": "MISSING_URL"
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir() if "vectors" in path.name) == [
        "vectors.failures.jsonl",
        "vectors.parquet",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_keeps_results_and_releases_leases(world: Rig, number: int) -> None:
    world.fill("stopped", 1500)
    process = world.start_on_table("stopped", "--batch", 8, "--in-flight", 2, "--json")
    wait_until(lambda: count_ends(world, "stopped") > 0)
    process.send_signal(number)
    assert exit_status(process, 30) == 130
    assert count_leases(world, "stopped") == 0 and 0 < count_ends(world, "stopped") < 1500
    summary = json.loads(output_of(process).splitlines()[-1])
    assert summary["status"] == "interrupted" and "goes on from here" in output_of(process)
    assert summary["done"] + sum(summary["failed"].values()) == count_ends(world, "stopped")


def test_lost_connections_and_an_outage_of_the_endpoint_are_survived(world: Rig) -> None:
    world.fill("cut", 400)
    world.platform.behaviour.fail("caller", *[500] * 5)
    process = world.start_on_table("cut", "--batch", 8, "--in-flight", 4)
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'heimdex-clip backfill'"""
    times = 0
    while process.poll() is None and times < 100:
        times += bool(world.admin.execute(cut).fetchall())
        time.sleep(0.25)
    assert exit_status(process, 60) == 3 and times > 2
    assert "trying again" in output_of(process)
    assert world.mistakes("cut", 400) == []


def test_a_wrong_secret_ends_the_run_and_fails_no_row(world: Rig) -> None:
    world.fill("refused", 100)
    wrong = {"EMBEDDING_HMAC_SECRET": "another-secret-0123456789abcdef"}
    process = world.start_on_table("refused", **wrong)
    assert exit_status(process, 60) == 1
    assert output_of(process).count("AUTH_FAILED") == 1
    assert "EMBEDDING_HMAC_SECRET" in output_of(process)
    assert count_ends(world, "refused") == 0 and count_leases(world, "refused") == 0


def test_a_refusal_in_the_middle_of_a_run_releases_the_rows_of_its_job(world: Rig) -> None:
    world.fill("broken_off", 1500)
    process = world.start_on_table("broken_off", "--batch", 8, "--in-flight", 2)
    wait_until(lambda: count_ends(world, "broken_off") > 0)
    world.platform.behaviour.fail("caller", *[401] * 50)
    assert exit_status(process, 60) == 1 and "goes on from here" in output_of(process)
    world.platform.behaviour.faults.clear()
    assert count_leases(world, "broken_off") == 0 and 0 < count_ends(world, "broken_off") < 1500


def test_without_a_backend_there_is_nothing_to_run(world: Rig) -> None:
    world.fill("off", 5)
    process = world.start_on_table("off", CLIP_INFERENCE_BACKEND="off")
    assert exit_status(process, 30) == 2
    assert "CLIP_INFERENCE_BACKEND is off" in output_of(process)


def test_a_run_in_which_every_row_failed_has_failed(world: Rig, tmp_path: Path) -> None:
    world.fill("hopeless", 0)
    source = tmp_path / "scenes.csv"
    source.write_text(f"id,u\n5,{world.url(5)}\n102,{world.url(102)}\n")
    process = world.start_on_table("hopeless", source, "--url-column", "u", "--json")
    assert exit_status(process, 30) == 1 and "all 2 failed" in output_of(process)
    *errors, summary = output_of(process).splitlines()
    assert all(line.startswith("[") for line in errors)
    assert json.loads(summary)["failed"] == {"SOURCE_HTTP": 2}
    urls = world.admin.execute("SELECT thumbnail_url FROM hopeless ORDER BY id").fetchall()
    assert urls == [(world.url(5),), (world.url(102),)]


def test_retry_failed_selects_retryable_failures_and_a_dry_run_writes_nothing(world: Rig) -> None:
    world.fill("retried", 50)
    facts = '{"code": "X", "error": "e", "failed_at": "2020", "retryable": %s}'
    world.admin.execute("UPDATE retried SET visual_clip_metadata = %s", [facts % "true"])
    world.admin.execute(
        "UPDATE retried SET visual_clip_metadata = %s WHERE id >= 40", [facts % "false"]
    )
    before = world.admin.execute("SELECT id, xmin FROM retried ORDER BY id").fetchall()
    dry = world.start_on_table("retried", "--retry-failed", "--dry-run", "--json")
    assert exit_status(dry, 30) == 0 and json.loads(output_of(dry))["todo"] == 40
    assert world.admin.execute("SELECT id, xmin FROM retried ORDER BY id").fetchall() == before
    assert exit_status(world.start_on_table("retried"), 30) == 0
    assert count_ends(world, "retried") == 0
    assert exit_status(world.start_on_table("retried", "--retry-failed"), 30) == 3
    assert count_ends(world, "retried") == 40


def test_a_query_fills_a_file_and_a_file_fills_a_table(world: Rig, tmp_path: Path) -> None:
    world.fill("origin", 30)
    query = "SELECT id, thumbnail_url FROM origin WHERE thumbnail_url LIKE '%1.png'"
    target = tmp_path / "v.parquet"
    words = ("--query", query, "--url-column", "thumbnail_url", "--out", target)
    assert exit_status(world.start("--database", world.uri, *words), 30) == 0
    assert pyarrow.parquet.read_table(target)["id"].to_pylist() == [1, 11, 21]
    world.fill("target", 0)
    source = tmp_path / "s.jsonl"
    entries = [{"id": n, "thumbnail_url": world.url(n)} for n in (7, 8)] + [{"id": "x"}]
    source.write_text("\n".join(map(json.dumps, entries)))
    process = world.start_on_table("target", source, "--url-column", "thumbnail_url")
    assert exit_status(process, 30) == 3 and "row 3: BAD_ROW" in output_of(process)
    assert world.mistakes("target", 2) == []


def test_quotes_in_captions_put_no_vector_under_another_id(world: Rig, tmp_path: Path) -> None:
    captions = {11: "a cat", 12: '"Hello', 13: 'world"', 14: "last", 15: '"never closed'}
    lines = [f"{n}\t{text}\t{world.url(n)}" for n, text in captions.items()]
    (tmp_path / "c.tsv").write_text("\n".join(["id\tcaption\timage_url", *lines]))
    target = tmp_path / "v.parquet"
    assert exit_status(world.start(tmp_path / "c.tsv", "--out", target), 30) == 0
    rows = {row["id"]: row["vector"] for row in pyarrow.parquet.read_table(target).to_pylist()}
    assert [n for n in captions if is_vector_of(rows[str(n)], n)] == [*captions] and len(rows) == 5
    commas = [line.replace("\t", ",") for line in ["id\tcaption\timage_url", *lines]]
    (tmp_path / "c.csv").write_text("\n".join(commas))
    broken = world.start(tmp_path / "c.csv", "--out", tmp_path / "w.parquet")
    assert exit_status(broken, 30) == 1
    assert "c.csv, line 3: " in output_of(broken) and not (tmp_path / "w.parquet").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text.tsv", "FORMAT text, HEADER"),
        ("plain.csv", "FORMAT csv, HEADER"),
        ("quoted.csv", "FORMAT csv, HEADER, FORCE_QUOTE *"),
    ],
)
def test_what_copy_writes_is_read_back(
    world: Rig, tmp_path: Path, name: str, options: str
) -> None:
    choose = random.Random(14)
    alphabet = [*map(chr, range(1, 48)), "\\", "\\N", "\\.", '"', '""', "\r\n", "é", "\u2028", "😀"]
    world.admin.execute('CREATE TEMP TABLE copied (id text, "a\tb\\c" text, image_url text)')
    expected: dict[str, str | None] = {}
    with world.admin.cursor() as cursor:
        for number in range(500):
            cells = ["".join(choose.choices(alphabet, k=choose.randrange(8))) for _ in range(3)]
            url = choose.choice([None, "", f"{cells[2]}{number}"])
            expected[f"{number}{cells[0]}."] = url or None
            row = [f"{number}{cells[0]}.", choose.choice([None, cells[1]]), url]
            cursor.execute("INSERT INTO copied VALUES (%s, %s, %s)", row)
        with cursor.copy(f"COPY copied TO STDOUT ({options})") as copy:
            (tmp_path / name).write_bytes(b"".join(map(bytes, copy)))
        cursor.execute("DROP TABLE copied")
    rows = [row for page in FileSource(tmp_path / name).pages(64) for row in page]
    assert {row.id: row.source or None for row in rows} == expected
    assert all(row.error is None or row.error.code == "MISSING_URL" for row in rows)


def test_the_database_is_that_of_the_environment_unless_named(world: Rig) -> None:
    world.fill("named", 5)
    words = ("--table", "named", "--json")
    counted = world.start(*words, "--dry-run", DATABASE_URL=world.uri)
    assert exit_status(counted, 30) == 0 and json.loads(output_of(counted))["todo"] == 5
    elsewhere = {"DATABASE_URL": "postgresql://app:hidden-word@127.0.0.1:1/x"}
    refused = world.start(*words, **elsewhere)
    assert exit_status(refused, 30) == 1 and "no connection to the database" in output_of(refused)
    assert "hidden-word" not in output_of(refused)
    assert exit_status(world.start(*words, "--database", world.uri, **elsewhere), 30) == 0
    assert world.mistakes("named", 5) == []


def test_vectors_of_another_space_are_reported_and_replaced(world: Rig) -> None:
    world.fill("stale", 4)
    facts = json.dumps({"space_id": "old", "model_version": "openai-vit-b-32-v1"})
    old = [json.dumps([1.0, *[0.0] * 511]), facts]
    world.admin.execute(
        "UPDATE stale SET embedding_visual_clip = %s, visual_clip_metadata = %s WHERE id < 3", old
    )
    plain = world.start_on_table("stale", "--json")
    assert exit_status(plain, 30) == 0
    (other,) = json.loads(output_of(plain).splitlines()[-1])["other_spaces"]
    assert (other["space_id"], other["count"]) == ("old", 3)
    again = world.start_on_table("stale", "--json", "--reembed")
    assert exit_status(again, 30) == 0
    summary = json.loads(output_of(again).splitlines()[-1])
    assert (summary["done"], summary["other_spaces"]) == (3, [])
    assert world.mistakes("stale", 4) == []


def test_a_terminal_shows_a_progress_bar(world: Rig) -> None:
    world.fill("shown", 20)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = world.start_on_table("shown", "--batch", 4, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the read that follows the end of a terminal
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert exit_status(process, 30) == 3
    assert b"20/20" in seen and b"img/s" in seen and b"failed 1" in seen


def test_importing_the_command_loads_no_heavy_package() -> None:
    heavy = ["torch", "runpod", "aiohttp", "PIL", "pyarrow", "psycopg", "tqdm", "storage3"]
    code = "import sys, heimdex_clip_worker.cli.backfill; "
    code += f"print(set(sys.modules) & set({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_second_signal_releases_all_leases_at_once(world: Rig) -> None:
    world.fill("hurried", 40)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/1.png"
        world.admin.execute("UPDATE hurried SET thumbnail_url = %s", [url])
        process = world.start_on_table("hurried", "--batch", 8, "--in-flight", 2)
        wait_until(lambda: count_leases(world, "hurried") > 0)
        for _ in range(2):
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        assert exit_status(process, 5) == -signal.SIGTERM
    assert count_leases(world, "hurried") == 0
