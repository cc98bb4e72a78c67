"""The catalogue's rows for image bytes against `decode.decode`: one row, one test with its id."""

from __future__ import annotations

import io
import resource
import sys

import cost
import pytest
import rows_image
from PIL import Image

from heimdex_clip_worker.decode import PixelLimits, decode
from heimdex_clip_worker.embed import make_transform, trim
from heimdex_clip_worker.errors import WorkerError

LIGHT = [row for row in rows_image.ROWS if not row.heavy]
HEAVY = [row for row in rows_image.ROWS if row.heavy]


def reference(data: bytes) -> Image.Image:
    """Return what open_clip's pipeline sees: no orientation, no profile, no alpha."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row.id)
def test_row(row):
    data, image = row.build(), None
    before = resource.getrusage(resource.RUSAGE_SELF)
    with cost.peak() as peak:
        try:
            image = decode(data, PixelLimits())
            code, detail = "OK", ""
        except WorkerError as error:
            code, detail = error.code, error.detail
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert code == row.code, detail
    assert spent < cost.CPU_S and peak.mib < cost.MEMORY_MIB
    if row.code == "OK":
        expected = row.pixels().convert("RGB") if row.pixels else reference(data)
        assert image.mode == "RGB" and image.size == expected.size
        assert image.tobytes() == expected.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="measures by /proc")
@pytest.mark.parametrize("row", HEAVY, ids=lambda row: row.id)
def test_heavy_row(row, tmp_path):
    file = tmp_path / "image"
    file.write_bytes(row.build())
    took = cost.cost(file)
    if took["cpu_s"] >= cost.CPU_S:  # neighbours on the same core make CPU seconds longer
        took = min(took, cost.cost(file), cost.cost(file), key=lambda once: once["cpu_s"])
    assert took["code"] == row.code
    assert took["cpu_s"] < cost.CPU_S and took["mib"] < cost.MEMORY_MIB, took


@pytest.mark.parametrize("size", [(1, 16_384), (16_384, 1), (16_384, 3), (30, 16_000)])
def test_long_images_cost_no_memory_before_the_model_either(size):
    image = decode(rows_image.im.png_rows(size), PixelLimits())
    prepare = make_transform({}, 224)
    with cost.peak() as peak:
        assert prepare(trim(image)).shape == (3, 224, 224)
    assert peak.mib < 100


def test_rows_have_ids_of_their_own():
    ids = [row.id for row in rows_image.ROWS]
    assert len(set(ids)) == len(ids)
