"""Shards and blocks: no row is lost, embedded twice, or given another row's vector."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import heimdex_clip_worker
from heimdex_clip_worker.backfill import shards as module
from heimdex_clip_worker.backfill.blocks import BlockEmbedder, embed_table
from heimdex_clip_worker.backfill.files import parquet_files
from heimdex_clip_worker.backfill.rows import BackfillError, UsageError
from heimdex_clip_worker.backfill.run import Options
from heimdex_clip_worker.backfill.shards import Folder, Layout, Shard, embed_shard, plan
from heimdex_clip_worker.cli import backfill, backfill_ray
from heimdex_clip_worker.cli.console import Progress

pytestmark: list[pytest.MarkDecorator] = []
LAYOUT = Layout(shard_rows=10, dim=2)


class FakeClient:
    """Makes a vector of the number in a URL; counts what it embeds."""

    def __init__(self, space: str = "5"):
        self.space, self.count = space, 0

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.count += len(items)
        facts = {"space_id": self.space, "model": "m", "pretrained": "p", "normalized": True}
        numbers = [float(item["image_url"].rpartition("/")[2]) for item in items]
        return [{"embedding": [number, 1.0], **facts} for number in numbers]


def embedder_of(client: FakeClient) -> BlockEmbedder:
    return BlockEmbedder(client, Options(batch=4), dim=2)


def write_rows(path: Path, count: int = 25, first: int = 0) -> Path:
    numbers = range(first, first + count)
    urls = [f"https://x/{number}" for number in numbers]
    table = pyarrow.table({"id": list(numbers), "image_url": urls})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.parquet")


def rows_of(folder: Path) -> list[Mapping[str, Any]]:
    tables = [pyarrow.parquet.read_table(path) for path in parquet_files(folder)]
    return [row for table in tables for row in table.to_pylist()]


def test_each_row_gets_its_vector_wherever_row_groups_end(source: Path, tmp_path: Path) -> None:
    shards, layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, shards)
    for shard in shards:
        embed_shard(shard, layout, out, embedder_of(FakeClient()))
    rows = rows_of(tmp_path / "out")
    assert {row["id"]: row["vector"] for row in rows} == {n: [n, 1.0] for n in range(25)}
    assert len(rows) == 25


def test_a_whole_shard_is_not_embedded_again(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    client = FakeClient()
    for _ in range(2):
        embed_shard(shard, layout, Folder(str(tmp_path / "out")), embedder_of(client))
    assert client.count == 10


def test_a_part_without_an_entry_is_not_read(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    embed_shard(shard, layout, Folder(str(tmp_path / "out")), embedder_of(FakeClient()))
    (tmp_path / "out" / "_manifest" / f"{shard.key}.json").unlink()
    assert parquet_files(tmp_path / "out") == []


def test_the_entry_is_written_last(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    out, names = Folder(str(tmp_path / "out")), []
    put, out.put = out.put, lambda name, data: (names.append(name), put(name, data))
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    assert names == [f"part-{shard.key}.parquet", f"_manifest/{shard.key}.json"]


def test_a_part_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Folder(str(tmp_path / "out"))
    out.put("part-1.parquet", b"old")

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        out.put("part-1.parquet", b"new")
    assert (tmp_path / "out" / "part-1.parquet").read_bytes() == b"old"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_another_layout_is_refused(source: Path, tmp_path: Path) -> None:
    shards, layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, shards)
    with pytest.raises(UsageError, match="was begun with shard_rows = 10, not 5: keep to it"):
        out.settle(replace(layout, shard_rows=5), shards)


def test_an_input_that_was_replaced_is_refused(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    write_rows(source, count=90)
    with pytest.raises(UsageError, match="in.parquet is another file than before"):
        out.settle(layout, plan([str(source)], LAYOUT)[0])


def test_a_file_that_became_shorter_loses_no_row_silently(source: Path) -> None:
    shard = Shard(str(source), source.stat().st_size, 20, 10)
    with pytest.raises(BackfillError, match="has fewer rows than it had"):
        list(module._read_batches(shard, LAYOUT))


def test_a_file_is_not_embedded_twice(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in.parquet is there twice in the input"):
        plan([str(source), str(tmp_path)], LAYOUT)


def test_a_kept_column_does_not_replace_ours() -> None:
    with pytest.raises(UsageError, match="--keep vector"):
        plan([], Layout(keep=("vector",)))


def test_vectors_of_two_spaces_are_not_put_into_one_part(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    table = out.part(shard.key)
    other = table.drop_columns("space_id").append_column("space_id", [["6"] * 10])
    both = pyarrow.concat_tables([table, other.select(table.schema.names)])
    with pytest.raises(BackfillError, match="spaces 5 and 6"):
        module._write_part(shard, out, both, "", 0.0, 0.0)


def test_vectors_of_two_spaces_are_not_put_into_one_folder() -> None:
    entry = {"problem": "", "space_id": "6", "part": "part-a.parquet", "rows": 1, "failed": {}}
    with pytest.raises(BackfillError, match="vectors of space 6 come after those of 5"):
        backfill_ray._collect([entry], "5", Progress("img"))


def test_the_key_of_a_store_is_written_nowhere() -> None:
    shard = Shard("s3://key:hidden-word@bucket/a.parquet?secret=hidden-word", 1, 0, 1)
    assert shard.source == "s3://bucket/a.parquet"
    with pytest.raises(UsageError) as refused:
        Folder("nowhere://key:hidden-word@host/x")
    assert "hidden-word" not in str(refused.value)


def test_a_row_of_bytes_that_is_text_is_no_image() -> None:
    embedder = BlockEmbedder(FakeClient(), held={}, dim=2)
    table = embed_table(embedder, pyarrow.table({"image": ["/etc/hosts"]}), "image", is_bytes=True)
    assert table["code"].to_pylist() == ["BAD_ROW"] and embedder.client.count == 0


def test_a_file_that_is_replaced_during_a_run_is_noticed(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout = plan([str(source)], LAYOUT)
    write_rows(source, count=40)
    with pytest.raises(BackfillError, match="was replaced while the run worked on it"):
        embed_shard(shard, layout, Folder(str(tmp_path / "out")), embedder_of(FakeClient()))


def test_a_file_with_two_names_is_noticed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link.parquet").symlink_to(source)
    with pytest.raises(UsageError, match="in.parquet is there twice in the input"):
        plan([str(source), str(tmp_path / "link.parquet")], LAYOUT)


@pytest.mark.parametrize(("out", "status"), [("parts", 2), ("file/parts", 1)])
def test_a_folder_of_parts_that_cannot_be_is_refused(
    source: Path, out: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    (source.parent / "file").touch()
    inputs = str(source.parent if status == 2 else source)
    words = [inputs, "--engine", "ray", "--out", str(source.parent / out), "--dry-run"]
    assert backfill.run(parser.parse_args(words)) == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_column_of_the_caller_is_not_replaced() -> None:
    table = pyarrow.table({"url": ["https://x/1"], "model": ["a car"]})
    with pytest.raises(BackfillError, match="has the column 'model' already"):
        embed_table(embedder_of(FakeClient()), table, "url")


def test_failed_rows_keep_their_place_when_they_are_retried(source: Path, tmp_path: Path) -> None:
    class Shy(FakeClient):
        def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
            bad = {"error": "HTTP 503", "code": "SOURCE_HTTP", "retryable": True}
            results = super().embed_image_batch(items)
            return [bad if result["embedding"][0] % 3 == 0 else result for result in results]

    (shard, *_), layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    entry = embed_shard(shard, layout, out, embedder_of(Shy()))
    assert (entry["done"], entry["retryable"]) == (6, 4)
    client = FakeClient()
    entry = embed_shard(shard, layout, out, embedder_of(client), run="2", mode="retry")
    assert (entry["done"], entry["failed"], client.count) == (10, {}, 4)
    assert [row["vector"] for row in rows_of(tmp_path / "out")] == [[n, 1.0] for n in range(10)]
    names = {path.name for path in (tmp_path / "out" / "_manifest").iterdir()}
    assert names == {f"{shard.key}.json"} and json.loads(json.dumps(entry)) == entry


def test_without_ray_the_command_names_the_extra(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "heimdex_clip_worker.ray", raising=False)
    monkeypatch.delattr(heimdex_clip_worker, "ray", raising=False)
    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    words = ["--engine", "ray", str(source), "--out", str(tmp_path / "out")]
    assert backfill.run(parser.parse_args(words)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[ERROR] heimdex_clip_worker.ray needs ray (")
    assert "pip install 'heimdex-clip-worker[ray] @ git+" in line
