"""A backfill on Ray: an actor killed in its work, broken rows, shy servers, and images as bytes."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

pytestmark = [pytest.mark.model, pytest.mark.process]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")

from backfill_rig import make_png  # noqa: E402
from fake_worker import FakeEmbedder  # noqa: E402
from ray_rig import Images, cluster, write_table  # noqa: E402

from heimdex_clip_worker import handler  # noqa: E402
from heimdex_clip_worker import ray as engine  # noqa: E402
from heimdex_clip_worker.backfill.rows import BackfillError  # noqa: E402
from heimdex_clip_worker.backfill.shards import Folder, Layout, plan  # noqa: E402
from heimdex_clip_worker.cli import backfill  # noqa: E402
from heimdex_clip_worker.cli.vectors import blocks  # noqa: E402
from heimdex_clip_worker.errors import ClipInferenceError, InferenceFailed  # noqa: E402
from heimdex_clip_worker.ray import ClipEmbedder  # noqa: E402

FILES, ROWS = 20, 250  # rows in a file


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with cluster(tmp_path_factory.mktemp("home")) as images:
        yield images


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    """Run `heimdex-clip backfill` here; return its status, its summary, and what it says."""
    parser = argparse.ArgumentParser(prog="heimdex-clip backfill")
    backfill.add_arguments(parser)
    status = backfill.run(parser.parse_args([*map(str, words), "--json"]))
    said = capsys.readouterr()
    return status, json.loads(said.out.splitlines()[-1]), said.err


def write_rows(folder: Path, images: Images) -> None:
    """Write 20 files of 250 rows: the fourth is on a shy server, the last one is broken."""
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        urls: list[str | None] = [images.url(number, file == 3) for number in numbers]
        ids: list[str | None] = [f"scene-{number}" for number in numbers]
        if file == FILES - 1:
            ids[3], ids[7], urls[11], urls[13] = None, ids[6], None, "ftp://x/1.png"
            ids[17], urls[19] = "x" * 1001, "no url\0"
        write_table(folder / f"{file:02}.parquet", ids, urls)


class Killer(threading.Thread):
    """Kills an actor of Ray when some shards are whole and others are at work."""

    def __init__(self, out: Path):
        super().__init__(daemon=True)
        self.manifest, self.whole_at_kill = out / "_manifest", -1

    def run(self) -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            whole = len(list(self.manifest.glob("[0-9a-f]*.json")))
            at_work = list(self.manifest.glob("attempts/[0-9a-f]*"))
            if whole >= 3 and len(at_work) == 2:
                children = psutil.Process().children(recursive=True)
                actors = [p for p in children if "ray::MapWorker" in " ".join(name_of(p))]
                if actors:
                    os.kill(actors[0].pid, signal.SIGKILL)
                    self.whole_at_kill = whole
                    return
            time.sleep(0.005)


def name_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def parts(out: Path) -> pyarrow.Table:
    """Read the parts of a folder in the order of their rows."""
    entries = [json.loads(path.read_text()) for path in (out / "_manifest").glob("[0-9a-f]*.json")]
    entries.sort(key=lambda entry: (entry["source"], entry["first"]))
    tables = [pyarrow.parquet.read_table(out / entry["part"]) for entry in entries]
    return pyarrow.concat_tables(table.replace_schema_metadata() for table in tables)


def failures_of(path: Path) -> list[tuple[int, str | None, str]]:
    """Read the failures of a plain backfill: id, or the row's number, and code."""
    entries = [json.loads(line) for line in path.open()]
    return sorted((entry["id"] or f"row {entry['row']}", entry["code"]) for entry in entries)


@pytest.mark.timeout(300)
def test_the_output_is_that_of_a_plain_backfill_although_an_actor_is_killed(
    images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_rows(source, images)
    status, plain_summary, _ = run(capsys, source, "--out", tmp_path / "plain.parquet")
    assert status == 3
    images.forget()

    killer = Killer(out)
    killer.start()
    words = ("--engine", "ray", source, "--out", out, "--actors", 2, "--shard-rows", 250)
    status, summary, said = run(capsys, *words, "--in-flight", 2, "--batch", 32)
    killer.join(1)
    assert killer.whole_at_kill >= 3, "no actor was killed"
    assert status == 3 and summary["shards"] == {"whole": FILES, "total": FILES}, said

    table, plain = parts(out), pyarrow.parquet.read_table(tmp_path / "plain.parquet")
    assert table.num_rows == FILES * ROWS
    done = table.filter(table["vector"].is_valid())
    for name in ("id", "vector", "space_id", "model", "model_version", "pretrained", "normalized"):
        assert done[name].combine_chunks() == plain[name].combine_chunks(), name
    failed = [
        (row["id"] or f"row {number}", row["code"])
        for number, row in enumerate(table.select(["id", "code"]).to_pylist(), 1)
        if row["code"]
    ]
    assert sorted(failed) == failures_of(tmp_path / "plain.failures.jsonl")
    for name in ("done", "failed", "vector_bytes", "other_spaces"):
        assert summary[name] == plain_summary[name], name
    again = [number for number, count in images.fetched.items() if count > 1]
    assert len(again) <= 2 * ROWS, "more was embedded again than the shards of the killed actor"
    assert not list(out.rglob("*attempts/*")) and not list(out.rglob(".*"))

    images.forget()
    status, summary, _ = run(capsys, *words)
    assert (status, summary["done"], images.fetched) == (0, 0, {})
    vectors = sum(len(names) for names, _, _ in blocks(out))
    assert vectors == plain.num_rows, "search and audit read the folder"


def test_rows_that_may_succeed_now_are_retried_alone(
    images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "in.parquet", [1, 2, 3], [images.url(1), None, images.url(5)])
    words = ("--engine", "ray", tmp_path / "in.parquet", "--out", tmp_path / "out", "--actors", 1)
    status, summary, _ = run(capsys, *words, "--keep", "image_url")
    assert status == 3 and summary["failed"] == {"MISSING_URL": 1, "SOURCE_HTTP": 1}
    assert summary["failed_earlier"] == {"rows": 0, "retryable": 0}
    images.forget()
    status, summary, _ = run(capsys, *words, "--keep", "image_url")
    assert (status, summary["failed_earlier"]) == (0, {"rows": 2, "retryable": 1})
    status, summary, _ = run(capsys, *words, "--keep", "image_url", "--retry-failed")
    assert summary["failed_earlier"] == {"rows": 0, "retryable": 0}
    assert (summary["done"], images.fetched) == (0, {})
    rows = parts(tmp_path / "out").to_pylist()
    assert [row["code"] for row in rows] == [None, "MISSING_URL", "SOURCE_HTTP"]
    status, summary, _ = run(capsys, tmp_path / "out", "--out", tmp_path / "plain.parquet")
    assert summary["done"] == 1, "a plain backfill reads the folder"


def test_a_pipeline_of_one_s_own(images: Images) -> None:
    import ray.data

    tables = [
        pyarrow.table({"id": [*numbers], "image_url": [*map(images.url, numbers)]})
        for numbers in (range(100), range(100, 200))
    ]
    dataset = ray.data.from_arrow(tables).map_batches(
        ClipEmbedder, fn_constructor_kwargs={"in_flight": 2}, batch_format="pyarrow",
        batch_size=50, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1,
    )  # fmt: skip
    table = pyarrow.concat_tables(dataset.iter_batches(batch_format="pyarrow"))
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 512)
    codes = {row["id"]: row["code"] for row in table.select(["id", "code"]).to_pylist()}
    failed = {number: code for number, code in codes.items() if code}
    assert failed == dict.fromkeys((5, 102, 199), "SOURCE_HTTP")
    assert len(codes) == table.num_rows == 200


# The model in the actor, without Ray


@pytest.fixture
def in_actor(monkeypatch: pytest.MonkeyPatch) -> type[FakeEmbedder]:
    monkeypatch.setattr(handler, "Embedder", FakeEmbedder)
    monkeypatch.setattr(handler, "check_choice", lambda *names, **options: [])
    monkeypatch.setenv("MAX_IMAGE_SIZE_BYTES", "5000")
    return FakeEmbedder


def test_images_as_bytes_have_the_limits_of_a_download_and_reach_no_file(
    in_actor: object, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(make_png(7))
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), stream)
    images = [make_png(1), b"<svg/>", None, make_png(2) + b"\0" * 5000, stream.getvalue()]
    embedder = ClipEmbedder("actor", bytes_column="image")
    table = embedder(pyarrow.table({"image": images}))
    assert table["code"].to_pylist() == [
        None, "UNSUPPORTED_FORMAT", "MISSING_URL", "IMAGE_TOO_LARGE", "UNSUPPORTED_FORMAT"
    ]  # fmt: skip
    urls = [f"file:{tmp_path}/secret.png", str(tmp_path / "secret.png"), "held:0", "http://[::1]/"]
    embedder = ClipEmbedder("actor", url_column="url")
    table = embedder(pyarrow.table({"url": urls}))
    assert table["vector"].null_count == len(urls)
    assert set(table["code"].to_pylist()) <= {"INVALID_URL", "URL_NOT_ALLOWED"}


def test_a_model_that_fails_its_golden_check_embeds_nothing(
    in_actor: type[FakeEmbedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drifted(self: object) -> None:
        raise InferenceFailed(detail="golden answers differ")

    monkeypatch.setattr(in_actor, "warm_up", drifted, raising=False)
    with pytest.raises(InferenceFailed):
        ClipEmbedder("actor")


def test_the_device_is_ray_s_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(gpus: list[str]) -> dict[str, str]:
        context = SimpleNamespace(
            get_actor_id=lambda: "a", get_accelerator_ids=lambda: {"GPU": gpus},
            get_assigned_resources=lambda: {"CPU": 2.0},
        )  # fmt: skip
        monkeypatch.setattr(engine.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(engine.ray, "get_runtime_context", lambda: context)
        return engine._share()

    monkeypatch.setenv("CLIP_DEVICE", "cuda:7")
    assert (share([])["CLIP_DEVICE"], share(["3"])["CLIP_DEVICE"]) == ("cpu", "cuda")
    assert share([])["DECODE_WORKERS"] == "3"


def test_a_ray_of_its_own_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(engine.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(engine.ray, "shutdown", lambda: None)

    def init(**options: Any) -> None:
        told.append((os.environ.get("RAY_USAGE_STATS_ENABLED"), options["include_dashboard"]))

    monkeypatch.setattr(engine.ray, "init", init)
    with engine._connected(engine.Cluster()):
        pass
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    assert told == [("0", False)]


class Away:
    """A client whose endpoint does not respond."""

    def embed_image_batch(self, items: list[Any]) -> list[Any]:
        raise ClipInferenceError("no connection", code="UNREACHABLE")


def ask(
    folder: Path,
    note: int | bytes | None = None,
    failures: int = 0,
    after: int | None = None,
    client: type = Away,
) -> list[dict[str, Any]]:
    """Let a task embed a shard; with `note`, as many processes have died in it.

    `failures`: of its task, before; `after`: what they must be then.
    """
    write_table(folder / "in.parquet", [1], ["https://x/1"])
    (shard,), layout = plan([str(folder / "in.parquet")], Layout())
    out = Folder(str(folder / "out"))
    if note is not None:
        data = note if isinstance(note, bytes) else f"r {note}".encode()
        out.put(engine._attempts(shard), data)
    task = engine._ShardTask(layout, out.uri, "r", {"client": client, "patience_s": 0})
    task.failures = failures
    row = {"shard": json.dumps(asdict(shard)), "mode": "new"}
    rows = task(pyarrow.Table.from_pylist([row])).to_pylist()
    assert after is None or task.failures == after
    return rows


def test_a_lost_endpoint_fails_the_task_so_that_ray_repeats_it(tmp_path: Path) -> None:
    with pytest.raises(BackfillError, match="no job has succeeded"):
        ask(tmp_path)


def test_an_endpoint_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    (row,) = ask(tmp_path, failures=3)
    assert row["is_fatal"] and "shard after shard failed" in row["problem"]


def test_a_shard_that_kills_its_processes_is_left_out(tmp_path: Path) -> None:
    (row,) = ask(tmp_path, note=5, failures=2, after=2)  # the task itself did not fail
    assert "in.parquet, rows 0 to 0: 5 processes died in this shard" in row["problem"]
    assert not row["is_fatal"]


class Embeds:
    """A client that makes a vector for each image."""

    def embed_image_batch(self, items: list[Any]) -> list[Any]:
        facts = {"space_id": "5", "model": "m", "pretrained": "p", "normalized": True}
        return [{"embedding": [1.0] * 512, **facts} for _ in items]


@pytest.mark.parametrize("note", [b"", b"\xff", b"{", b"r", b"r x", b"other 5", b"[]"])
def test_a_damaged_note_of_attempts_stops_no_shard(tmp_path: Path, note: bytes) -> None:
    (row,) = ask(tmp_path, note=note, client=Embeds)
    assert json.loads(row["entry"])["done"] == 1


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("settings.json", json.dumps(asdict(Layout(shard_rows=7))), "begun with shard_rows = 7"),
        ("space.json", '{"space_id": "6"}', "vectors of space 6, so none of space 5 is added"),
    ],
    ids=["settings", "space"],
)
def test_a_folder_of_another_run_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: str, problem: str
) -> None:
    class Meanwhile(Embeds):
        def embed_image_batch(self, items: list[Any]) -> list[Any]:
            Folder(str(tmp_path / "out")).put(f"_manifest/{name}", data.encode())
            return super().embed_image_batch(items)

    (row,) = ask(tmp_path, client=Meanwhile)
    assert row["is_fatal"] and problem in row["problem"] and row["entry"] == "{}"


def test_the_actors_know_the_model_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_MODEL_VERSION", "v9")
    assert ClipEmbedder(client=Embeds).blocks.options.model_version == "v9"


def test_bytes_need_the_model_in_the_actor() -> None:
    class Anything:
        def embed_image_batch(self, items: list[Any]) -> list[Any]:
            raise AssertionError("a job was sent")

    embedder = ClipEmbedder(bytes_column="image", client=Anything)
    with pytest.raises(BackfillError, match="an endpoint takes URLs"):
        embedder(pyarrow.table({"image": [b"x"]}))
