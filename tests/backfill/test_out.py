"""A plain backfill to a file: what cannot be read or written is one line that names it."""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from heimdex_clip_worker.backfill.parquet import ParquetSink
from heimdex_clip_worker.backfill.rows import Row, Selection, success
from heimdex_clip_worker.cli.main import main

pytestmark: list[pytest.MarkDecorator] = []
ITEM = {"space_id": "5", "model": "m", "pretrained": "p", "normalized": True}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of rows, and name an endpoint that is not asked."""
    variables = {"RUNPOD_API_KEY": "key-of-a-test", "RUNPOD_CLIP_ENDPOINT_ID": "none"}
    variables |= {"EMBEDDING_HMAC_SECRET": secrets.token_hex(32), "RUNPOD_BASE_URL": "http://127.0.0.1:9"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "in.csv").write_text("id,image_url\n1,https://x/1\n2,https://x/2\n")
    return tmp_path / "in.csv"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run `heimdex-clip backfill`; return its status, and its one line about an error."""
    with pytest.raises(SystemExit) as ended:
        main(["backfill", *map(str, words)])
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("[INFO]")]
    assert len(errors) <= 1, lines
    return int(ended.value.code or 0), "".join(errors)


def write_vectors(path: Path, count: int = 2) -> None:
    """Write the file of a finished run, with an unfinished journal beside it."""
    sink = ParquetSink(path, Selection())
    claimed, _ = sink.claim([Row(number, f"https://x/{number}") for number in range(count + 1)])
    vector = ITEM | {"embedding": [0.6, 0.8]}
    sink.finish([success(row, vector, "v1") for row in claimed[:count]])
    sink.close(complete=True)


def test_a_place_that_cannot_be_written_is_named(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = run(capsys, rows, "--out", "/proc/v.parquet")
    assert status == 1
    assert "cannot open the journal /proc/.v.parquet.journal: unable to open database file" in line
    assert "is its folder writable" in line


def test_a_folder_is_no_file(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows.parent / "v.parquet").mkdir()
    status, line = run(capsys, rows, "--out", rows.parent / "v.parquet")
    assert status == 2 and "v.parquet: name a .parquet file in a folder that exists" in line


def test_a_name_that_is_not_utf_8_is_refused_before_the_first_job(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = run(capsys, rows, "--out", rows.parent / "\udcff.parquet")
    assert status == 2 and "is not UTF-8, so pyarrow cannot write it" in line


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database " * 999)


def _other_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal:
        journal.execute("DROP TABLE rows")
        journal.execute("CREATE TABLE rows (x)")
        journal.commit()


def _no_facts(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal:
        journal.execute("UPDATE rows SET facts = '{'")
        journal.commit()


def _list_of_facts(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal:
        journal.execute("UPDATE rows SET facts = '[1]'")
        journal.commit()


def _lost_pages(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal:
        journal.execute("PRAGMA journal_mode = DELETE")
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [_garbage, _other_table, _no_facts, _list_of_facts, _lost_pages]
)
@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_a_damaged_journal_is_named(
    rows: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    write_vectors(rows.parent / "v.parquet")
    journal = rows.parent / ".v.parquet.journal"
    damage(journal)
    status, line = run(capsys, rows, "--out", rows.parent / "v.parquet", *words)
    assert status == 1 and "journal" in line and str(journal) in line, line


def _damaged_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)


def _no_ids(path: Path) -> None:
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(0, "id", pyarrow.nulls(table.num_rows, pyarrow.int64()))
    pyarrow.parquet.write_table(table, path)


def _no_vectors(path: Path) -> None:
    table = pyarrow.parquet.read_table(path)
    kind = table.schema.field("vector").type
    table = table.set_column(1, "vector", pyarrow.nulls(table.num_rows, kind))
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("damage", [_damaged_page, _no_ids, _no_vectors])
def test_a_damaged_or_foreign_file_is_named_and_kept(
    rows: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    path = rows.parent / "v.parquet"
    write_vectors(path)
    (rows.parent / ".v.parquet.journal").unlink()
    damage(path)
    data = path.read_bytes()
    status, line = run(capsys, rows, "--out", path)
    assert status == 2 and str(path) in line and path.read_bytes() == data


@pytest.mark.parametrize("data", [b"\xff\n", b"[1]\n", b"{", b'"x"\n', b"{}\n"])
def test_damaged_failures_are_named(
    rows: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    path = rows.parent / "v.parquet"
    write_vectors(path)
    (rows.parent / ".v.parquet.journal").unlink()
    (rows.parent / "v.failures.jsonl").write_bytes(data)
    status, line = run(capsys, rows, "--out", path)
    assert status == 2 and "v.failures.jsonl has no failures of a backfill" in line


def test_a_dry_run_knows_the_model_and_the_bucket(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY")
    monkeypatch.setenv("SUPABASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "key-of-a-test")
    words = ("--path-column", "image_url", "--bucket", "scenes", "--dry-run", "--json")
    with pytest.raises(SystemExit) as ended:
        main(["backfill", str(rows), "--out", str(rows.parent / "v.parquet"), *words])
    assert not ended.value.code and json.loads(capsys.readouterr().out)["todo"] == 2
