"""An audit of files of vectors, whichever command has written them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from heimdex_clip_worker.backfill.blocks import BlockEmbedder
from heimdex_clip_worker.backfill.files import FileSource
from heimdex_clip_worker.backfill.parquet import ParquetSink
from heimdex_clip_worker.backfill.rows import Selection
from heimdex_clip_worker.backfill.run import Options, Run
from heimdex_clip_worker.backfill.shards import Folder, Layout, embed_shard, plan
from heimdex_clip_worker.cli import audit
from heimdex_clip_worker.cli.vectors import open_writer
from heimdex_clip_worker.settings import ClientSettings

FACTS = {"space_id": "5", "model": "m", "pretrained": "p", "model_version": "v1"}
URLS = [f"https://x/{number}" for number in range(12)]


class Client:
    """Embeds every image as [3, 4], divided by 5."""

    def embed_image_batch(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"embedding": [0.6, 0.8], "normalized": True, **FACTS} for _ in items]


class Eye:
    """Gives each picture the vector of `Client`, or the code of a failure."""

    exact, space_id, name = True, "5", "m (p)"

    def __init__(self, code: str = ""):
        self.code, self.settings = code, ClientSettings.from_env(backend="off")

    def fresh(self, urls: list[Any]) -> list[Any]:
        return [self.code or ([0.6, 0.8] if str(url) in URLS else "MISSING_URL") for url in urls]

    def distances(self, units: Any, right: Any) -> dict[int, Any]:
        return {place: {} for place in units}

    def close(self) -> None:
        pass


def write_rows(path: Path) -> Path:
    table = {"id": list(range(12)), "image_url": URLS, "url": URLS}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def by_embed(folder: Path) -> list[str]:
    with open_writer(folder / "v.parquet") as writer:
        for url in URLS:
            writer.add(url, [0.6, 0.8], FACTS)
    return [str(folder / "v.parquet")]


def by_backfill(folder: Path) -> list[str]:
    rows = pyarrow.table({"url": URLS})
    pyarrow.parquet.write_table(rows, folder / "in.parquet")
    source = FileSource(folder / "in.parquet", id_column="url", url_column="url")
    sink = ParquetSink(folder / "v.parquet", Selection())
    Run(source, sink, Client(), Options()).drive()
    sink.close(complete=True)
    return [str(folder / "v.parquet")]


def by_ray(folder: Path) -> list[str]:
    layout = Layout(shard_rows=5, dim=2, keep=("url",))
    shards, layout = plan([str(write_rows(folder / "in.parquet"))], layout)
    out = Folder(str(folder / "out"))
    out.settle(layout, shards)
    for shard in shards:
        embed_shard(shard, layout, out, BlockEmbedder(Client(), Options(batch=4), dim=2))
    return [str(folder / "out"), "--url-column", "url"]


def by_ray_one_part(folder: Path) -> list[str]:
    out, *words = by_ray(folder)
    return [str(max(Path(out).glob("*.parquet"))), *words]


def run(monkeypatch: pytest.MonkeyPatch, eye: Eye, *words: str) -> int:
    monkeypatch.setattr(audit, "_open_eye", lambda args: eye)
    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    return audit.run(parser.parse_args(["--in", *words]))


@pytest.mark.parametrize("write", [by_embed, by_backfill, by_ray, by_ray_one_part])
def test_a_file_of_each_command_is_audited(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    status = run(monkeypatch, Eye(), *write(tmp_path))
    assert status == 0 and "this space" in capsys.readouterr().out


def test_the_day_of_a_row_is_that_of_its_time(tmp_path: Path) -> None:
    path, *_ = by_backfill(tmp_path)
    ((_, day),) = audit._File(Path(path), {}, "2026", None).counts()
    assert len(day) == 10


def test_without_a_judged_row_there_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    status = run(monkeypatch, Eye("SOURCE_HTTP"), *by_embed(tmp_path))
    report = capsys.readouterr()
    assert (status, "nothing wrong" in report.out, "e+02" in report.out) == (1, False, False)
    assert "no row could be judged: no picture could be fetched (SOURCE_HTTP)" in report.err


def test_pictures_at_private_addresses_are_named_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run(monkeypatch, Eye("URL_NOT_ALLOWED"), *by_embed(tmp_path))
    message = capsys.readouterr().err
    assert "ALLOWED_PRIVATE_NETWORKS" in message and "--backend runpod" in message


def test_ids_that_are_no_pictures_need_the_column_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, *_ = by_ray(tmp_path)
    status = run(monkeypatch, Eye(), path)
    assert status == 1 and "name the --url-column" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_day_is_a_day(option: str, capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([option, "yesterday"])
    assert stop.value.code == 2 and "not a day: write 2026-01-31" in capsys.readouterr().err
