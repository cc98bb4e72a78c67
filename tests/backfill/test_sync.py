"""`heimdex-clip sync` as a process: kills, poolers, outages, and an end in order."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
import sync_goals
from backfill_rig import Rig, exit_status, is_vector_of, output_of, rig
from sync_goals import count, kill_under_load, make_table, start_sync, wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.process]
SEED = int(os.environ.get("BACKFILL_SEED", time.time_ns() % 1_000_000))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("home")) as world:
        yield world


@contextlib.contextmanager
def syncing(world: Rig, name: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Keep a table in step for the time of this block."""
    process = start_sync(world, name, *words)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def insert(world: Rig, name: str, *numbers: int) -> None:
    for number in numbers:
        world.admin.execute(f"INSERT INTO {name} (thumbnail_url) VALUES (%s)", [world.url(number)])


def has_vector_of(world: Rig, name: str, row_id: int, number: int) -> bool:
    query = f"SELECT embedding_visual_clip::real[] FROM {name} WHERE id = %s"
    (vector,) = world.admin.execute(query, [row_id]).fetchone()
    return vector is not None and is_vector_of(vector, number)


def wait_for_vector(world: Rig, name: str, row_id: int, number: int) -> None:
    wait_until(lambda: has_vector_of(world, name, row_id, number), 60, f"image {number}")


@pytest.mark.timeout(240)
def test_rows_are_right_after_kills_under_inserts_changes_and_deletes(world: Rig) -> None:
    print(f"BACKFILL_SEED={SEED}")
    found = kill_under_load(world, "killed", 2, SEED, (0.5, 1.5))
    assert found["mistakes"] == [] and found["statuses"] == [0, 0] and found["inserted"]


def test_a_notification_ends_the_wait_and_sigterm_ends_the_process_in_order(world: Rig) -> None:
    make_table(world, "woken")
    with syncing(world, "woken", "--poll", 3000, "--json") as process:
        for row_id in (1, 2):
            insert(world, "woken", row_id)
            wait_for_vector(world, "woken", row_id, row_id)
        world.admin.execute("UPDATE woken SET thumbnail_url = %s WHERE id = 1", [world.url(3)])
        wait_for_vector(world, "woken", 1, 3)
        process.send_signal(signal.SIGTERM)
        assert exit_status(process, 60) == 0
    summary = json.loads(output_of(process).splitlines()[-1])
    assert (summary["status"], summary["done"]) == ("interrupted", 3)


def test_once_takes_what_is_there_and_ends_without_triggers(world: Rig) -> None:
    world.admin.execute(sync_goals.TABLE.format(name="single"))
    insert(world, "single", 1, 2)
    world.admin.execute("INSERT INTO single (thumbnail_url) VALUES (NULL)")
    process = start_sync(world, "single", "--once", "--json")
    assert exit_status(process, 60) == 0
    assert json.loads(output_of(process).splitlines()[-1])["done"] == 2
    ((facts,),) = world.admin.execute("SELECT visual_clip_metadata FROM single WHERE id = 3")
    assert facts is None


@pytest.mark.parametrize("words", [("--once",), ("--poll", 1)])
def test_vectors_of_another_space_do_not_come_into_a_column(
    world: Rig, words: tuple[object, ...]
) -> None:
    name = f"other_{len(words)}"
    make_table(world, name)
    world.admin.execute(f"""INSERT INTO {name} (embedding_visual_clip, visual_clip_metadata)
        VALUES (array_fill(1, ARRAY[512])::vector, '{{"space_id": "5"}}')""")
    insert(world, name, 1, 2)
    process = start_sync(world, name, *words)
    assert exit_status(process, 60) == 1
    said = output_of(process)
    assert "1 of space 5. Nothing was written" in said and "heimdex-clip migrate" in said
    assert count(world, f"SELECT count(embedding_visual_clip) FROM {name}") == 1
    space = "fa4e000000000000"
    process = start_sync(world, name, *words, CLIP_SPACE_ID=space)  # before any image is sent
    assert exit_status(process, 60) == 1 and f"space {space}" in output_of(process)
    world.admin.execute(f"""UPDATE {name} SET visual_clip_metadata =
        '{{"model_name": "ViT-B-32", "pretrained": "fake"}}' WHERE id = 1""")
    assert exit_status(start_sync(world, name, "--once"), 60) == 0
    assert count(world, f"SELECT count(embedding_visual_clip) FROM {name}") == 3


@pytest.mark.parametrize("change", [
    "embedding_visual_clip = NULL", "visual_clip_metadata = visual_clip_metadata - 'code'",
])  # fmt: skip
def test_a_result_that_a_trigger_takes_back_is_a_failed_row(world: Rig, change: str) -> None:
    name = f"taken_{len(change)}"
    make_table(world, name)
    world.admin.execute(f"""CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE {name} SET {change} WHERE id = NEW.id; RETURN NULL; END $$;
        CREATE TRIGGER taken AFTER UPDATE ON {name} FOR EACH ROW
        WHEN (NEW.id = 1 AND pg_trigger_depth() = 0) EXECUTE FUNCTION {name}()""")
    insert(world, name, 5, 2)  # there is no image 5
    if "NULL" in change:
        world.admin.execute(f"UPDATE {name} SET thumbnail_url = %s WHERE id = 1", [world.url(1)])
    process = start_sync(world, name, "--once", "--json")
    assert exit_status(process, 60) == 3 and "does not stay" in output_of(process)
    summary = json.loads(output_of(process).splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (1, {"NOT_WRITABLE": 1})
    assert has_vector_of(world, name, 2, 2)
    query = f"SELECT count(*) FROM {name} WHERE visual_clip_metadata->>'code' = 'NOT_WRITABLE'"
    assert count(world, query) == ("NULL" in change)  # where the row keeps it


def test_lost_connections_are_replaced_for_ever(world: Rig) -> None:
    make_table(world, "cut")
    with syncing(world, "cut", "--poll", 1, "--patience", 0):
        for row_id in range(1, 4):
            insert(world, "cut", row_id)
            wait_for_vector(world, "cut", row_id, row_id)
            world.admin.execute("""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE application_name LIKE 'heimdex-clip%'""")


class Pooler:
    """A pgbouncer in transaction mode before the rig's server."""

    def __init__(self, world: Rig, folder: Path):
        server = parse_qs(urlsplit(world.uri).query)["host"][0]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config, users = folder / "pgbouncer.ini", folder / "users.txt"
        users.write_text('"postgres" ""\n')
        config.write_text(f"""[databases]
postgres = host={server} dbname=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
""")
        command = ["pgbouncer", str(config)]
        if getpass.getuser() == "root":  # it refuses to run as root
            owner = Path(server).owner()
            shutil.chown(folder, owner)
            command[1:1] = ["-u", owner]
        self.log = folder / "log"
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=2)
        self.uri = f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def is_up(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.uri):
            return True
        return False


@pytest.fixture
def pooler(world: Rig, tmp_path: Path) -> Iterator[Pooler]:
    if not shutil.which("pgbouncer"):
        pytest.skip("needs pgbouncer: apt-get install pgbouncer")
    pooler = Pooler(world, tmp_path)
    wait_until(pooler.is_up, 30, "pgbouncer")
    yield pooler
    pooler.process.kill()
    pooler.process.wait()


def test_behind_a_pooler_in_transaction_mode_polling_suffices(world: Rig, pooler: Pooler) -> None:
    make_table(world, "pooled")
    behind = Rig.__new__(Rig)
    vars(behind).update(vars(world) | {"uri": pooler.uri})
    with syncing(behind, "pooled", "--poll", 1) as process:
        for row_id in (1, 2):
            insert(world, "pooled", row_id)
            wait_for_vector(world, "pooled", row_id, row_id)
        wait_until(lambda: "notifications do not arrive" in output_of(process), 60, "the message")
        insert(world, "pooled", 3)
        wait_for_vector(world, "pooled", 3, 3)
        assert output_of(process).count("notifications do not arrive") == 1
        assert count(world, "SELECT count(*) FROM pooled_ends") == 3
