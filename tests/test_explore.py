"""The exploration notebook runs top to bottom, draws its pictures, and names its weights."""

from __future__ import annotations

import base64
import io

import nbformat
import pytest
import smoke
from local_worker import PhotoServer
from PIL import Image, ImageStat

pytestmark = pytest.mark.timeout(300)  # the notebook takes half a minute, if nothing else runs
NOTEBOOK = smoke.ROOT / "nbs" / "21_explore.ipynb"
DRAWN = [  # the cells that draw, one picture each
    "grid", "variants-shown", "duplicates-drawn", "neighbours-drawn", "search-drawn",
    "labels-drawn", "map-drawn", "precisions-drawn", "normalisation-drawn", "preprocessing-drawn",
    "time-drawn",
]  # fmt: skip


@pytest.fixture(scope="module")
def run() -> smoke.Run:
    """Run the notebook with seeded weights, on the package's photographs and two bad URLs."""
    home = smoke.CACHE / "home"  # kept: the serving artifact lies below it
    home.mkdir(parents=True, exist_ok=True)
    env = smoke.caller_env(home, OMP_NUM_THREADS="1")
    with PhotoServer() as server:
        urls = [f"{server.url}/missing?token=secret", f"{server.url}/page"]
        parameters = {"pretrained": smoke.checkpoint(), "urls": urls}
        return smoke.run_notebook("explore", env, parameters, NOTEBOOK)


def pictures(run: smoke.Run) -> dict[str, Image.Image]:
    """Return what the cells drew, by their ids."""
    found = {}
    for cell in nbformat.reads(run.notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {}).get("image/png")
            if data:
                found[cell["id"]] = Image.open(io.BytesIO(base64.b64decode(data)))
    return found


def test_it_runs_top_to_bottom_on_the_photographs_that_come_with_the_package(run: smoke.Run):
    assert run.status == 0, run.said[-3000:]
    assert "10 pictures explored" in run.notebook


def test_every_drawing_cell_leaves_a_picture_with_something_on_it(run: smoke.Run):
    drawn = pictures(run)
    assert [*drawn] == DRAWN
    for name, picture in drawn.items():
        deviation = max(ImageStat.Stat(picture.convert("RGB")).stddev)
        assert picture.width >= 700 and deviation > 20, name


def test_no_cell_warns(run: smoke.Run):
    assert "Warning" not in run.notebook


def test_it_says_plainly_that_seeded_weights_know_no_texts(run: smoke.Run):
    assert "THE REAL WEIGHTS CANNOT BE HAD" in run.notebook
    assert "(seeded) on cpu" in run.notebook


def test_what_cannot_be_embedded_is_listed_and_the_rest_explored(run: smoke.Run):
    assert "/missing: Image download failed: HTTP 404" in run.notebook
    assert "/page: Image download failed: Unsupported image format" in run.notebook
