"""Notebooks that are committed with their outputs: they show nothing private, and can be re-run."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import cache
from typing import Any

import notebooks
import pytest
import readme
import showcase
from PIL import Image

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.timeout(300)]
NAMES = [*showcase.SHOWCASE]
MOST_BYTES = {"21_explore": 1_000_000}
ALL_BYTES = 2_000_000


def text(name: str) -> str:
    """Read a notebook as text."""
    return (showcase.ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")


@cache
def executed(name: str) -> dict[str, Any]:
    """Run a notebook once for all tests."""
    return showcase.execute(name)


def assert_same_texts(new: Any, old: Any) -> None:
    """Compare word for word; fractions may differ by one hundredth, as CPUs round differently."""
    fraction = r"\b\d+\.\d+\b"
    new, old = json.dumps(new, indent=1), json.dumps(old, indent=1)
    assert re.sub(fraction, "#", new) == re.sub(fraction, "#", old), "run `make showcase`"
    pairs = zip(re.findall(fraction, new), re.findall(fraction, old), strict=True)
    wrong = [(a, b) for a, b in pairs if abs(float(a) - float(b)) > 0.01]
    assert wrong == [], "run `make showcase`"


def test_fractions_may_differ_a_little_and_words_and_counts_may_not() -> None:
    assert_same_texts({"a": ["of 10 a cosine of 0.9745"]}, {"a": ["of 10 a cosine of 0.9750"]})
    for other in ("of 10 a cosine of 0.9545", "of 11 a cosine of 0.9745", "of 10 the 0.9745"):
        with pytest.raises(AssertionError):
            assert_same_texts({"a": ["of 10 a cosine of 0.9745"]}, {"a": [other]})


def test_only_the_showcase_is_committed_with_outputs() -> None:
    paths = (showcase.ROOT / "nbs").glob("*.ipynb")
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    marked = {name for name, notebook in read.items() if notebook["metadata"].get("showcase")}
    assert marked == {*NAMES, showcase.SMOKE}


def test_together_they_are_small() -> None:
    sizes = {name: len(text(name).encode()) for name in [*NAMES, showcase.SMOKE]}
    assert [n for n, size in sizes.items() if size > MOST_BYTES.get(n, ALL_BYTES)] == []
    assert sum(sizes.values()) < ALL_BYTES


@pytest.mark.parametrize("name", [*NAMES, showcase.SMOKE])
def test_a_picture_is_shown_and_nothing_failed(name: str) -> None:
    notebook = showcase.load(name)
    drawn = [
        Image.open(io.BytesIO(base64.b64decode(output["data"][kind])))
        for _, output, kind in showcase.images(notebook)
    ]
    linked = "](../docs/images/" in text(name)
    assert (drawn or linked) and all(image.width >= 400 for image in drawn)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_name_no_path_port_or_secret(name: str) -> None:
    cells = showcase.load(name)["cells"]
    shown = "\n".join(
        "".join(lines)
        for cell in cells
        for output in cell.get("outputs", [])
        for kind, lines in [("text", output.get("text", "")), *output.get("data", {}).items()]
        if not kind.startswith("image/")
    )
    private = r"/(?:home|root|tmp|work|Users|usr|opt|var)/|(?:127\.0\.0\.1|localhost):\d"
    private += r"|token=|0x[0-9a-f]{6}"
    assert re.findall(private, shown) == []
    assert "widget-view" not in text(name)


def test_every_figure_of_the_exploration_is_described() -> None:
    found = showcase.images(showcase.load("21_explore"))
    assert {cell for cell, *_ in found} >= {"the-pictures", "search-shown", "map-shown"}
    assert [cell for cell, output, kind in found if not output["metadata"][kind]["alt"]] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_gives_the_same_texts(name: str) -> None:
    committed = showcase.load(name)
    if committed["metadata"]["showcase"]["weights"] == "openai":
        pytest.skip("the committed outputs are of the real weights: `make showcase` compares them")
    new = executed(name)
    assert_same_texts(showcase.texts(new), showcase.texts(committed))
    before, after = showcase.images(committed), showcase.images(new)
    assert [cell for cell, *_ in before] == [cell for cell, *_ in after]


# What is taken out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("wrote /home/ann/my-pictures/a.png", "wrote a.png"),
        ("http://127.0.0.1:45255/page", "http://127.0.0.1:PORT/page"),
        ("<Figure at 0x7f3bfbf8c10>", "<Figure>"),
        ("10 %\r20 %\rdone\n", "done\n"),
        ("https://example.com/a/b.jpg and 3/4", "https://example.com/a/b.jpg and 3/4"),
    ],
)
def test_what_belongs_to_one_machine_is_scrubbed(before: str, after: str) -> None:
    assert "".join(notebooks.scrubbed(before)) == after


def test_a_showcase_keeps_its_outputs_and_folded_cells_and_others_do_not() -> None:
    view = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": ["VBox()"]}
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "a\n"},
        {"output_type": "stream", "name": "stderr", "text": "a warning\n"},
        {"output_type": "execute_result", "data": view, "metadata": {}, "execution_count": 3},
    ]
    metadata = {"jupyter": {"source_hidden": True, "outputs_hidden": True}, "collapsed": True}
    cell = {"cell_type": "code", "id": "a", "source": "1", "metadata": metadata, "outputs": outputs}
    for mark in ({}, {"showcase": {"weights": "seeded"}}):
        clean = notebooks.cleaned(json.dumps({"cells": [cell], "metadata": mark}))
        (after,) = json.loads(clean)["cells"]
        assert after["metadata"] == {"jupyter": {"source_hidden": True}}
        assert len(after["outputs"]) == (2 if mark else 0)
        assert "widget-view" not in clean and "warning" not in clean
        assert notebooks.cleaned(clean) == clean


def test_the_readme_is_the_index_notebook() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.render(executed("index")), "run `make readme`"
