"""Shards and blocks: no row is lost, embedded twice, or given another row's vector."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
from heimdex_clip_worker.cli.console import CommandError, Progress
from heimdex_clip_worker.cli.vectors import blocks

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


def begin(source: Path, tmp_path: Path) -> tuple[list[Shard], Layout, Folder]:
    """Plan the rows of a file, and begin a folder for their parts."""
    shards, layout = plan([str(source)], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, shards)
    return shards, layout, out


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run `heimdex-clip backfill`; return its status, and its one line about an error."""
    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    try:
        status = backfill.run(parser.parse_args([*map(str, words)]))
    except (BackfillError, OSError) as error:  # that `heimdex-clip` itself makes a line of
        return 1, str(error)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[ERROR]")]
    assert len(errors) == 1, errors
    return status, errors[0]


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
    names = [name for name in names if "/." not in name]  # that of the space is created
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
    (shard, *_), layout, out = begin(source, tmp_path)
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    write_rows(source, count=90)
    with pytest.raises(UsageError, match="in.parquet is another file than before"):
        out.settle(layout, plan([str(source)], LAYOUT)[0])


@pytest.mark.parametrize("changes", ["time", "rows"])
def test_an_input_of_the_same_size_that_was_replaced_is_refused(
    source: Path, tmp_path: Path, changes: str
) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    before = source.stat()
    turned = pyarrow.parquet.read_table(source)
    urls = turned["image_url"].to_pylist()
    if changes == "rows":
        urls[0], urls[1] = urls[1], urls[0]
    columns = {"id": turned["id"], "image_url": urls}
    pyarrow.parquet.write_table(pyarrow.table(columns), source, row_group_size=7)
    time_ns = before.st_mtime_ns + (changes == "time")
    os.utime(source, ns=(time_ns, time_ns))
    assert source.stat().st_size == before.st_size
    shards, _ = plan([str(source)], LAYOUT)
    assert shards[0].key == shard.key
    with pytest.raises(UsageError, match="in.parquet is another file than before"):
        out.settle(layout, shards)
    client = FakeClient()
    with pytest.raises(UsageError, match="in.parquet is another file than before"):
        embed_shard(shards[0], layout, out, embedder_of(client))
    assert client.count == 0


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    batches = module._read_batches(shard, layout)
    next(batches)
    write_rows(tmp_path / "new.parquet", first=100).replace(source)
    with pytest.raises(BackfillError, match="in.parquet was replaced while the run worked on it"):
        list(batches)


def test_a_copy_with_its_time_is_the_same_file(source: Path, tmp_path: Path) -> None:
    shards, layout, out = begin(source, tmp_path)
    embed_shard(shards[0], layout, out, embedder_of(FakeClient()))
    shutil.copy2(source, tmp_path / "copy")
    (tmp_path / "copy").replace(source)
    assert list(out.settle(layout, plan([str(source)], LAYOUT)[0])) == [shards[0].key]


def test_a_file_that_became_shorter_loses_no_row_silently(source: Path) -> None:
    (shard, *_), _ = plan([str(source)], LAYOUT)
    with pytest.raises(BackfillError, match="has fewer rows than it had"):
        list(module._read_batches(replace(shard, first=20), LAYOUT))


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
    table = out.part(shard)
    other = table.drop_columns("space_id").append_column("space_id", [["6"] * 10])
    both = pyarrow.concat_tables([table, other.select(table.schema.names)])
    with pytest.raises(BackfillError, match="spaces 5 and 6"):
        module._describe(shard, both, "", {})


def test_vectors_of_two_spaces_are_not_put_into_one_folder() -> None:
    entry = {"problem": "", "space_id": "6", "part": "part-a.parquet", "rows": 1, "failed": {}}
    with pytest.raises(BackfillError, match="vectors of space 6 come after those of 5"):
        backfill_ray._collect([entry], "5", Progress("img"))


def test_the_key_of_a_store_is_written_nowhere() -> None:
    shard = Shard("s3://key:hidden-word@bucket/a.parquet?secret=hidden-word", 1, 0, 1, "v")
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
    assert names == {f"{shard.key}.json", "space.json"} and json.loads(json.dumps(entry)) == entry


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


# Names


NAMES = ["a b", "a%20b", "a#b", "a?b", "100%", "\u00fc", "[x]", "a%23b?c=d"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_and_its_uri_are_the_same_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for other in ("a", "other"):
        write_rows(tmp_path / name / f"{name} {other}.parquet")
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "a" / "x.parquet")
    uri = f"file://{quote(str(tmp_path))}/{quote(name)}"
    for text in (tmp_path / name, uri, f"{uri}/", f"{uri}/{quote(name)}%20a.parquet"):
        shards, layout = plan([str(text)], LAYOUT)
        out = Folder(f"{uri}%20out")
        entries = out.settle(layout, shards)
        for shard in shards:
            embed_shard(shard, layout, out, embedder_of(FakeClient()))
        assert not entries or {shard.key for shard in shards} <= {*entries}
        assert shards[0].source == os.path.realpath(tmp_path / name / f"{name} a.parquet")
    assert len(rows_of(tmp_path / f"{name} out")) == 50
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name} out", "a"}


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("file:///in/a#b", "'#' is written as %23 (or name a path)"),
        ("file:///in/a?b", "'?' is written as %3F (or name a path)"),
        ("file:///in/100%", "'%' is written as %25 (or name a path)"),
        ("file:///in/a b", "' ' is written as %20 (or name a path)"),
        ("file://host/in/a", "file://host/in/a is on another machine: name a path"),
        ("file:///in/%FF", "is not UTF-8"),
        ("s3://bucket/a#b", "'#' is written as %23"),
        ("s3://bucket/a b", "' ' is written as %20"),
        ("s3://bucket/\u00fc", "cannot be opened (ArrowInvalid): is it a URI, with %20 for a"),
    ],
    ids=["fragment", "query", "percent", "space", "host", "bytes", "s3-hash", "s3-space", "s3-raw"],
)
def test_a_uri_that_means_another_file_is_refused(
    source: Path, uri: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dry-run", "--engine", "ray")
    for line in (
        run(capsys, *words, uri, "--out", source.parent / "out"),
        run(capsys, *words, source, "--out", uri),
    ):
        assert line[0] == 2 and problem in line[1], line


def test_a_name_that_is_not_utf_8_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.parquet")).touch()
    words = ("--dry-run", "--engine", "ray", tmp_path / "in", "--out", tmp_path / "out")
    status, line = run(capsys, *words)
    assert status == 1 and f"{tmp_path}/in cannot be listed" in line


@pytest.mark.parametrize("out", ["in", "in/out", "./in/../in"])
def test_parts_are_not_written_among_the_input(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "a.parquet")
    for prefix in ("", "file://"):
        words = (f"file://{tmp_path}/in", "--out", f"{prefix}{tmp_path}/{out}")
        status, line = run(capsys, "--engine", "ray", "--dry-run", *words)
        assert status == 2 and "its parts would be input, too" in line


# Several runs at the same time


def test_of_several_first_runs_one_decides_the_layout(source: Path, tmp_path: Path) -> None:
    count = 8
    barrier, results = threading.Barrier(count), list[str]()

    class Slow(Folder):
        def get(self, name: str) -> bytes | None:
            data = super().get(name)
            if name.endswith("settings.json") and data is None:
                barrier.wait(30)  # all of them have seen that there is none
            return data

    def first_run(number: int) -> None:
        shards, layout = plan([str(source)], replace(LAYOUT, shard_rows=number))
        try:
            Slow(str(tmp_path / "out")).settle(layout, shards)
            results.append("begun")
        except UsageError as error:
            results.append(str(error))

    threads = [threading.Thread(target=first_run, args=(n,)) for n in range(1, count + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("begun") == 1 and len(results) == count
    assert sum("was begun with shard_rows = " in result for result in results) == count - 1
    assert [path.name for path in (tmp_path / "out" / "_manifest").iterdir()] == ["settings.json"]


def test_a_run_that_begins_a_moment_later_keeps_to_the_layout(
    source: Path, tmp_path: Path
) -> None:
    class Late(Folder):
        def get(self, name: str) -> bytes | None:
            data = super().get(name)
            if name.endswith("settings.json") and data is None:
                begin(source, tmp_path)  # another run, after this one has seen no layout
            return data

    shards, layout = plan([str(source)], replace(LAYOUT, shard_rows=7))
    with pytest.raises(UsageError, match="was begun with shard_rows = 10, not 7: keep to it"):
        Late(str(tmp_path / "out")).settle(layout, shards)


def test_without_links_the_layout_is_created_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*names: Path) -> None:
        raise PermissionError("the file system has no links")

    monkeypatch.setattr(os, "link", no_link)
    shards, layout, out = begin(source, tmp_path)
    out.create("_manifest/settings.json", b"another")
    assert out.settle(layout, shards) == {}


def test_where_the_last_run_decides_the_layout_the_others_embed_nothing(
    source: Path, tmp_path: Path
) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    other = replace(layout, shard_rows=7)
    out.put("_manifest/settings.json", json.dumps(asdict(other)).encode())  # as in a store
    client = FakeClient()
    with pytest.raises(UsageError, match="was begun with shard_rows = 7, not 10"):
        embed_shard(shard, layout, out, embedder_of(client))
    assert client.count == 0 and rows_of(tmp_path / "out") == []


class Meanwhile(FakeClient):
    """Does something in the middle of its first job."""

    def __init__(self, space: str, work: Callable[[], Any]):
        super().__init__(space)
        self.work: Callable[[], Any] | None = work

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        work, self.work = self.work, None
        if work:
            work()
        return super().embed_image_batch(items)


def test_a_layout_that_changes_during_a_shard_is_noticed(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    other = json.dumps(asdict(replace(layout, shard_rows=7))).encode()
    client = Meanwhile("5", lambda: out.put("_manifest/settings.json", other))
    with pytest.raises(UsageError, match="was begun with shard_rows = 7, not 10"):
        embed_shard(shard, layout, out, embedder_of(client))
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_second_space_is_refused_at_its_first_job(source: Path, tmp_path: Path) -> None:
    shards, layout, out = begin(source, tmp_path)
    embed_shard(shards[0], layout, out, embedder_of(FakeClient("5")))
    client = FakeClient("6")
    embedder = BlockEmbedder(client, Options(batch=4, in_flight=1), dim=2)
    with pytest.raises(BackfillError, match="vectors of space 6 come after those of 5"):
        embed_shard(shards[1], layout, out, embedder)
    assert client.count <= 8 and len(rows_of(tmp_path / "out")) == 10


@pytest.mark.parametrize("place", [0, 1])  # of the other run's shard
def test_two_spaces_at_the_same_time_give_a_folder_of_one(
    source: Path, tmp_path: Path, place: int
) -> None:
    shards, layout, out = begin(source, tmp_path)

    def other_run() -> None:
        embed_shard(shards[place], layout, out, embedder_of(FakeClient("6")))

    with pytest.raises(UsageError, match="vectors of space 6, so none of space 5 is added"):
        embed_shard(shards[0], layout, out, embedder_of(Meanwhile("5", other_run)))
    assert {row["space_id"] for row in rows_of(tmp_path / "out")} == {"6"}
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
    assert out.entries().keys() == {shards[place].key}


def test_a_space_that_changes_after_the_part_takes_the_entry_back(
    source: Path, tmp_path: Path
) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    put = out.put

    def put_as_a_store_does(name: str, data: bytes) -> None:
        put(name, data)
        if name.startswith("part-"):
            put("_manifest/space.json", b'{"space_id": "6"}')

    out.put = put_as_a_store_does
    with pytest.raises(UsageError, match="has vectors of space 6"):
        embed_shard(shard, layout, out, embedder_of(FakeClient("5")))
    assert out.entries() == {} and rows_of(tmp_path / "out") == []


def test_the_first_of_two_runs_keeps_its_part(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    made = list[Any]()

    def other_run() -> None:
        made.append(embed_shard(shard, layout, out, embedder_of(FakeClient()), run="other"))
        made.append((tmp_path / "out" / made[0]["part"]).read_bytes())

    embedder = embedder_of(Meanwhile("5", other_run))
    assert embed_shard(shard, layout, out, embedder, run="mine") == made[0]
    assert (tmp_path / "out" / made[0]["part"]).read_bytes() == made[1]


def test_an_entry_is_never_left_with_the_part_of_another_run(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    other, put = Folder(out.uri), out.put

    def put_slowly(name: str, data: bytes) -> None:
        put(name, data)
        if name.startswith("part-"):
            embed_shard(shard, layout, other, embedder_of(FakeClient()), run="other")

    out.put = put_slowly
    with pytest.raises(BackfillError, match="rows 0 to 9: another run writes this shard, too"):
        embed_shard(shard, layout, out, embedder_of(FakeClient()), run="mine")
    assert out.entries() == {}, "so the shard is repeated"


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        ((), 2, "has vectors of space 5, and CLIP_SPACE_ID is 6: use another folder, or --reembed"),
        (("--reembed", "--dry-run"), 0, ""),
    ],
    ids=["plain", "reembed"],
)
def test_a_folder_of_another_space_is_refused_before_ray_starts(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], status: int, problem: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "heimdex_clip_worker.ray", None)
    monkeypatch.setenv("CLIP_SPACE_ID", "6")
    shards, layout = plan([str(source)], replace(LAYOUT, dim=512))
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, shards)
    out.claim_space("5")
    words = ("--engine", "ray", "--shard-rows", "10", str(source), "--out", out.uri, *words)
    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    assert backfill.run(parser.parse_args(words)) == status
    assert problem in capsys.readouterr().err
    assert out.space() == "5"


def test_the_model_of_the_environment_is_that_of_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    variables = {"MODEL_NAME": "ViT-L-14", "MODEL_VERSION": "v9", "SPACE_ID": "5"}
    for name, value in variables.items():
        monkeypatch.setenv(f"CLIP_{name}", value)
    (shard, *_), layout = plan([str(source)], replace(LAYOUT, dim=768, shard_rows=25))
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, [shard])
    entry = valid_entry(shard) | {"done": 25, "failed": {}, "retryable": 0, "model_version": "v9"}
    out.put(f"_manifest/{shard.key}.json", json.dumps(entry).encode())
    out.put(f"part-{shard.key}.parquet", b"")
    words = ["--engine", "ray", "--shard-rows", "25", "--reembed", "--json", str(source)]
    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    assert backfill.run(parser.parse_args([*words, "--out", out.uri])) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["status"], summary["other_spaces"]) == ("done", [])


def test_a_run_is_not_done_while_a_shard_is_not_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(backfill_ray, "_drive", lambda *words: {"status": "done"})
    words = ("--engine", "ray", "--shard-rows", 10, source, "--out", tmp_path / "out")
    status, line = run(capsys, *words)
    assert status == 1 and "3 shards are not whole: another run works on them" in line


# Columns


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string_view(), pyarrow.binary_view(), pyarrow.list_(pyarrow.string_view())],
    ids=str,
)
def test_a_kept_column_that_no_part_can_hold_is_refused_before_the_first_job(
    tmp_path: Path, kind: pyarrow.DataType, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"id": [1], "image_url": ["https://x/1"], "title": pyarrow.nulls(1, kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    words = ("--engine", "ray", "--dry-run", tmp_path / "in.parquet", "--out", tmp_path / "out")
    status, line = run(capsys, *words, "--keep", "title")
    assert status == 2 and "in.parquet: column 'title' is " in line and "_view" in line
    assert "which no part can hold: leave out --keep title, or write the column as another" in line


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.binary_view()], ids=str)
def test_ids_and_urls_may_be_views(tmp_path: Path, kind: pyarrow.DataType) -> None:
    texts = {"id": ["a", "b"], "image_url": ["https://x/1", "https://x/2"]}
    texts = {
        name: pyarrow.array([text.encode() for text in column], pyarrow.binary()).cast(kind)
        if kind == pyarrow.binary_view() else pyarrow.array(column, kind)
        for name, column in texts.items()
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(texts), tmp_path / "in.parquet")
    (shard,), layout, out = begin(tmp_path / "in.parquet", tmp_path)
    assert embed_shard(shard, layout, out, embedder_of(FakeClient()))["done"] == 2


def test_images_as_bytes_need_a_column_of_bytes(source: Path) -> None:
    with pytest.raises(UsageError, match="'image_url' is string: a column of image files has byt"):
        plan([str(source)], replace(LAYOUT, is_bytes=True))


def test_a_kept_column_has_one_type_in_all_files(source: Path, tmp_path: Path) -> None:
    tables = {"text": ["1"], "number": [1]}
    for name, values in tables.items():
        columns = {"id": [name], "image_url": ["https://x/1"], "n": values}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    layout = replace(LAYOUT, keep=("n",))
    paths = [str(tmp_path / f"{name}.parquet") for name in tables]
    with pytest.raises(UsageError, match="int64 in .*number.parquet, and string in .*text.parquet"):
        plan(paths, layout)
    out = Folder(str(tmp_path / "out"))
    shards, of_text = plan(paths[:1], layout)
    out.settle(of_text, shards)
    shards, of_numbers = plan(paths[1:], layout)
    with pytest.raises(UsageError, match=r"was begun with kept_types = \['string'\]"):
        out.settle(of_numbers, shards)


# Damage


def valid_entry(shard: Shard) -> dict[str, Any]:
    return {
        "source": shard.source, "size": shard.size, "version": shard.version,
        "first": shard.first, "rows": shard.rows,
        "part": f"part-{shard.key}.parquet", "space_id": "5", "model": "m",
        "model_version": "v", "done": 9, "failed": {"SOURCE_HTTP": 1}, "retryable": 1, "run": "",
    }  # fmt: skip


DAMAGE: dict[str, Any] = {
    "empty": b"", "half": b'{"source": "x', "a-list": b"[]", "no-object": b"3", "bytes": b"\xff\0",
    "deep": b"[" * 100_000, "nothing-in-it": b"{}", "another-shard": {"first": 20},
    "text-for-a-number": {"done": "9"}, "a-sum": {"done": 10}, "a-part": {"part": "x"},
    "a-field": {"version": None},
    "a-negative": {"done": 11, "failed": {"SOURCE_HTTP": -1}}, "counts": {"failed": {"A": "1"}},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_one_line_with_its_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shards, layout = plan([str(source)], replace(LAYOUT, dim=512))
    out = Folder(str(tmp_path / "out"))
    out.settle(layout, shards)
    path = tmp_path / "out" / "_manifest" / f"{shards[0].key}.json"
    path.write_text(json.dumps(valid_entry(shards[0])))
    out.put(f"part-{shards[0].key}.parquet", b"")
    assert out.settle(layout, shards)
    data = DAMAGE[damage]
    data = data if isinstance(data, bytes) else json.dumps(valid_entry(shards[0]) | data).encode()
    path.write_bytes(data)
    words = ("--engine", "ray", "--shard-rows", 10, "--dry-run", source, "--out", out.uri)
    status, line = run(capsys, *words)
    assert status == 1 and str(path) in line
    assert line.endswith(": delete it, and the shard is embedded again")


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"3"])
@pytest.mark.parametrize("name", ["settings.json", "space.json"])
def test_a_damaged_manifest_is_one_line_with_its_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes
) -> None:
    _, _, out = begin(source, tmp_path)
    (tmp_path / "out" / "_manifest" / name).write_bytes(data)
    words = ("--engine", "ray", "--shard-rows", 10, "--dry-run", source, "--out", out.uri)
    status, line = run(capsys, *words)
    if name == "space.json":
        assert "was begun with dim = 2, not 512" in line  # that comes first
        with pytest.raises(BackfillError, match="space.json is damaged: delete it, if all parts"):
            out.space()
    else:
        assert status == 1 and f"out/_manifest/{name} is damaged: restore it, or begin" in line


def test_a_part_that_was_deleted_is_missed(source: Path, tmp_path: Path) -> None:
    shards, layout, out = begin(source, tmp_path)
    embed_shard(shards[0], layout, out, embedder_of(FakeClient()))
    out.remove(f"part-{shards[0].key}.parquet")
    cure = f"delete _manifest/{shards[0].key}.json to embed the shard again"
    with pytest.raises(BackfillError, match=f"part-{shards[0].key}.parquet is not there: .*{cure}"):
        out.settle(layout, shards)


def test_settings_of_another_program_are_refused(source: Path, tmp_path: Path) -> None:
    shards, layout, out = begin(source, tmp_path)
    out.put("_manifest/settings.json", b'{"format": "delta"}')
    with pytest.raises(UsageError, match="was begun with id_column = None, not 'id'"):
        out.settle(layout, shards)


def test_a_layout_that_was_lost_is_not_invented(source: Path, tmp_path: Path) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    embed_shard(shard, layout, out, embedder_of(FakeClient()))
    out.remove("_manifest/settings.json")
    shards, layout = plan([str(source)], replace(LAYOUT, shard_rows=7))
    with pytest.raises(BackfillError, match="_manifest/settings.json is not there: restore it"):
        out.settle(layout, shards)


@pytest.mark.parametrize("damage", ["cut", "rows", "columns"])
def test_a_damaged_part_is_named_when_it_is_retried(
    source: Path, tmp_path: Path, damage: str
) -> None:
    (shard, *_), layout, out = begin(source, tmp_path)
    part = tmp_path / "out" / embed_shard(shard, layout, out, embedder_of(FakeClient()))["part"]
    table = pyarrow.parquet.read_table(part)
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        table = table.slice(1) if damage == "rows" else table.drop_columns("retryable")
        pyarrow.parquet.write_table(table, part)
    cure = f"delete {tmp_path}/out/_manifest/{shard.key}.json, and the shard is embedded again"
    with pytest.raises(BackfillError) as refused:
        embed_shard(shard, layout, out, embedder_of(FakeClient()), run="2", mode="retry")
    assert cure in str(refused.value) and part.name in str(refused.value)


def damage_page(path: Path) -> None:
    """Damage the first page of data of a file, and not its footer."""
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)


def test_a_damaged_page_names_its_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "a.parquet")
    damage_page(write_rows(tmp_path / "in" / "b.parquet", first=25))
    shards, layout = plan([str(tmp_path / "in")], LAYOUT)
    out = Folder(str(tmp_path / "out"))
    with pytest.raises(BackfillError, match="in/b.parquet cannot be read as Parquet: "):
        embed_shard(shards[3], layout, out, embedder_of(FakeClient()))
    words = ("--dry-run", tmp_path / "in", "--out", tmp_path / "v.parquet")
    status, line = run(capsys, *words)
    assert status == 1 and f"{tmp_path}/in/b.parquet cannot be read as Parquet" in line
    embed_shard(shards[0], layout, out, embedder_of(FakeClient()))
    part = tmp_path / "out" / f"part-{shards[0].key}.parquet"
    damage_page(part)
    with pytest.raises(CommandError, match=f"{part.name} cannot be read as vectors"):
        list(blocks(tmp_path / "out"))
