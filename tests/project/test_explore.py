"""The exploration notebook: no picture is lost, every figure is described, every widget works."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import lab
import numpy as np
import pytest
import smoke
from local_worker import PhotoServer
from PIL import Image, ImageDraw, ImageStat

from heimdex_clip_worker.model.photos import PHOTOS

pytestmark = [
    pytest.mark.model, pytest.mark.process, pytest.mark.server,
    pytest.mark.timeout(300),  # a run takes a quarter of a minute on an idle machine
]  # fmt: skip
NOTEBOOK = smoke.ROOT / "nbs" / "21_explore.ipynb"
HOME = smoke.CACHE / "home"  # kept, with the serving artifact below it
DRAWING = {  # the cells that draw, one figure each
    "the-pictures", "search-shown", "copies-shown", "duplicates-shown", "labels-shown", "map-shown",
}  # fmt: skip


def explore(name: str, **parameters: object) -> smoke.Run:
    """Run the notebook with seeded weights."""
    HOME.mkdir(parents=True, exist_ok=True)
    env = smoke.caller_env(HOME, OMP_NUM_THREADS="1")
    parameters["pretrained"] = smoke.checkpoint()
    run = smoke.run_notebook(f"explore-{name}", env, parameters, NOTEBOOK)
    assert run.status == 0, run.output[-3000:]
    return run


def outputs(run: smoke.Run) -> dict[str, list[dict]]:
    """Collect the outputs of an executed notebook by cell."""
    return {cell["id"]: cell.get("outputs", []) for cell in json.loads(run.notebook)["cells"]}


def figures(run: smoke.Run) -> dict[str, tuple[Image.Image, str, dict]]:
    """Collect the figures by cell: image, description, everything."""
    drawn = {}
    for name, results in outputs(run).items():
        for output in results:
            for kind in ("image/png", "image/jpeg"):
                if data := output.get("data", {}).get(kind):
                    image = Image.open(io.BytesIO(base64.b64decode(data)))
                    drawn[name] = (image, output["metadata"][kind]["alt"], output["data"])
    return drawn


def printed(run: smoke.Run) -> str:
    """Join what the cells have printed."""
    return "".join(
        "".join(o["text"]) for all_ in outputs(run).values() for o in all_ if "text" in o
    )


def make_pictures(folder: Path) -> None:
    """Make 200 small pictures of four colours in subfolders, five damaged ones, and a text."""
    random = np.random.default_rng(0)
    for number in range(200):
        base = [(200, 40, 40), (40, 180, 60), (50, 60, 210), (220, 200, 60)][number % 4]
        pixels = np.clip(np.array(base) + random.normal(0, 25, (36, 48, 3)), 0, 255)
        path = folder / f"album {number % 7}" / f"IMG_20240817_{number:06}_HDR.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    photo = (PHOTOS / "chelsea.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(photo[:3000])
    (folder / "page.jpg").write_text("<!doctype html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("not a picture")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> smoke.Run:
    """Run the notebook on 200 pictures, five damaged ones and two bad URLs."""
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder)
    with PhotoServer() as server:
        urls = [f"{server.url}/missing?token=secret", f"{server.url}/page"]
        return explore("many", folder=folder, urls=urls)


def test_of_200_pictures_none_is_lost(many: smoke.Run):
    assert "200 pictures explored, 7 without a vector" in printed(many)


def test_what_has_no_vector_is_listed_with_its_reason(many: smoke.Run):
    text = printed(many)
    for line in (
        "half.jpg: Image could not be decoded", "page.jpg: Unsupported image format",
        "empty.png: Unsupported image format", "phone.heic: Unsupported image format",
        "gone.jpg: No such file or directory",
        "/missing: Image download failed: HTTP 404",
        "/page: Image download failed: Unsupported image format",
        "Skipped, because these are no pictures: 1 .txt",
    ):  # fmt: skip
        assert line in text
    assert "secret" not in text


def test_every_figure_is_drawn_and_described(many: smoke.Run):
    drawn = figures(many)
    assert set(drawn) == DRAWING
    for name, (image, alt, _) in drawn.items():
        deviation = max(ImageStat.Stat(image.convert("RGB")).stddev)
        assert image.width >= 700 and deviation > 10 and len(alt) > 20, name


def test_the_map_of_many_pictures_shows_their_clusters(many: smoke.Run):
    _, alt, data = figures(many)["map-shown"]
    count = re.match(r"200 pictures in (\d+) clusters: ", alt)
    assert count and 2 <= int(count[1]) <= 12
    assert "<iframe" in "".join(data["text/html"]) and "http" not in "".join(data["text/html"])


def test_no_cell_warns_and_no_widget_is_left_without_a_kernel(many: smoke.Run):
    assert "Warning" not in many.notebook
    assert "widget-view" not in many.notebook and "widgets" not in json.loads(many.notebook)[
        "metadata"
    ]


def test_it_says_that_seeded_weights_know_no_texts(many: smoke.Run):
    assert "THE REAL WEIGHTS CANNOT BE HAD" in printed(many)
    assert "(seeded) on cpu" in printed(many)
    assert "SEEDED WEIGHTS" in figures(many)["map-shown"][1]


def test_as_a_page_every_image_has_its_description(many: smoke.Run):
    import nbformat
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(nbformat.reads(many.notebook, as_version=4))
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) >= len(DRAWING) - 1  # the map is a frame
    assert [i[-200:] for i in images if 'alt="' not in i or "No description" in i] == []
    assert page.count("<iframe") == 1 and "widget-view" not in page


def make_video(path: Path, seconds_each: int = 6, rate: int = 8) -> None:
    """Make a video of 30 seconds with five scenes, in each of which a ball moves."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.bit_rate = 2_000_000
        for name in ("chelsea", "coffee", "rocket", "china", "hubble"):
            with Image.open(PHOTOS / f"{name}.jpg") as photo:
                still = photo.convert("RGB").resize((160, 120))
            for number in range(seconds_each * rate):
                image = still.copy()
                x = 10 + number
                ImageDraw.Draw(image).ellipse((x, 90, x + 10, 100), "white")
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def test_a_video_of_30_seconds_has_a_timeline_with_its_scenes(tmp_path: Path):
    make_video(tmp_path / "film.mp4")
    run = explore("video", video=tmp_path / "film.mp4", every_s=1.0)
    image, alt, _ = figures(run)["timeline-shown"]
    assert alt.startswith("30 frames, 5 scenes; “a person” is nearest at 0:")
    assert image.width >= 900
    assert "30 pictures explored, 0 without a vector" in printed(run)


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[lab.Browser, Path]]:
    """Open the notebook as `make lab` does, run all cells, and yield the browser and a folder."""
    if lab.PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with lab.notebook_in_browser(NOTEBOOK, tmp_path_factory.mktemp("lab")) as (tab, folder):
        yield tab, folder
        assert [u for u in tab.requested if re.match("https?://(?!127.0.0.1)", u)] == []


def text_of(tab: lab.Browser) -> str:
    """Read the sentence of the search panel."""
    return tab.evaluate(f"{PANEL}.querySelector('.widget-html b').innerText")


FIND, PANEL, BUTTON = lab.FIND, lab.PANEL, lab.BUTTON
ALT = "document.querySelector('{}').closest('.widget-vbox').querySelector('img').alt"


def test_make_lab_opens_the_notebook_itself(page):
    tab, _ = page
    open_tab = "document.querySelector('#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current')"
    assert tab.evaluate(f"{open_tab}.innerText").strip() == "21_explore.ipynb"


def test_a_text_that_is_typed_finds_pictures(page):
    tab, _ = page
    tab.click(FIND)
    tab.evaluate(f"{FIND}.select()")
    tab.type("a red flower")
    tab.press("Enter", 13)
    tab.wait(f"{PANEL}.querySelector('.widget-html b').innerText.includes('a red flower')")
    assert text_of(tab).startswith("Nearest to “a red flower”")


def test_a_click_on_a_picture_finds_more_like_it(page):
    tab, _ = page
    tile = f"{PANEL}.querySelectorAll('button[title^=\"more like\"]')[3]"
    name = tab.evaluate(f"{tile}.title").removeprefix("more like ")
    tab.click(tile)
    tab.wait(f"{PANEL}.querySelector('.widget-html b').innerText == 'More like {name}'")
    first = tab.evaluate(f"{PANEL}.querySelector('button[title^=\"more like\"]').innerText")
    assert first.split() == [name, "1.000"]


def test_a_dropped_file_joins_the_collection(page, tmp_path: Path):
    tab, _ = page
    shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / "second cat.jpg")
    tab.choose_file(BUTTON.format("Drop in pictures"), tmp_path / "second cat.jpg")
    tab.wait(f"{PANEL}.querySelector('.widget-html b').innerText.includes('dropped in')")
    names = tab.evaluate(
        f"[...{PANEL}.querySelectorAll('button[title^=\"more like\"]')].map(e=>e.title)"
    )
    assert sorted(names[:2]) == ["more like chelsea", "more like second cat"]
    assert len(names) == 11 and text_of(tab).startswith("More like second cat")


def test_what_is_seen_is_exported(page):
    from heimdex_clip_worker.cli.vectors import blocks

    tab, folder = page
    tab.click(BUTTON.format("Export"))
    tab.wait(f"{PANEL}.querySelector('.widget-html b').innerText.includes('explored.parquet')")
    ((ids, vectors, _),) = blocks(folder / "explored.parquet")
    assert "chelsea.jpg" in ids and vectors.shape == (len(ids), 512)
    assert (folder / "explored.csv").read_text(encoding="utf-8").count("\n") == len(ids) + 1


def test_the_slider_moves_the_threshold(page):
    tab, _ = page
    alt, handle = ALT.format(".noUi-handle"), "document.querySelector('.noUi-handle')"
    before = tab.evaluate(alt)
    tab.click(handle)
    tab.evaluate(f"{handle}.focus()")
    tab.press("PageDown", 34)
    tab.wait(f"{alt} != {json.dumps(before)}")
    old, new = (float(re.search(r"cosine of ([\d.]+)", t)[1]) for t in (before, tab.evaluate(alt)))
    assert new < old


def test_labels_are_edited_and_name_the_map(page):
    tab, _ = page
    area = "document.querySelector('.jp-OutputArea textarea')"
    tab.click(area)
    tab.evaluate(f"{area}.select()")
    tab.type("a riddle\na joke")
    tab.click(BUTTON.format("Label the pictures"))
    tab.wait("/a riddle|a joke/.test(document.querySelector('.jp-Notebook iframe').title)")
    assert re.search("a riddle|a joke|unsure", tab.evaluate(ALT.format(".jp-OutputArea textarea")))


def grey(png: bytes) -> np.ndarray:
    """Read a picture as numbers from 0, black, to 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), int)


def test_the_map_can_be_zoomed(page):
    tab, _ = page
    frame = "document.querySelector('.jp-Notebook iframe')"
    for _ in range(50):  # until the map is drawn
        one = grey(tab.screenshot(frame))
        if one.std() > 10:
            break
        time.sleep(0.2)
    tab.scroll(frame, -240)
    other = grey(tab.screenshot(frame))
    assert one.std() > 10 and np.abs(one - other).mean() > 2


def test_no_cell_and_no_click_has_failed(page):
    tab, _ = page
    kinds = "[data-mime-type$='error'],[data-mime-type$='stderr']"
    shown = tab.evaluate(f'[...document.querySelectorAll("{kinds}")].map(e=>e.innerText)')
    assert [text for text in shown if text.strip() and "picture" not in text] == []  # a bar
