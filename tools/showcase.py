"""Run the notebooks that are committed with their outputs, and store these: `make showcase`.

They run without a network: with the real weights if the hub's cache has them, else with seeded
ones, which the outputs then say. What belongs to this machine is taken out by tools/notebooks.py,
and images are compressed. The pictures of the documents come from the same run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from notebooks import IMAGES, cleaned
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Notebooks, and their parameters; WEIGHTS stands for those at hand. CPUs differ in what they
# multiply in: fp32 gives nearly the same figures on all of them.
WEIGHTS = "..."
SHOWCASE: dict[str, dict[str, str]] = {
    "05b_batcher": {},
    "21_explore": {"pretrained": WEIGHTS, "precision": "fp32"},
    "index": {},
}
SMOKE = "20_smoke_test"  # runs against an emulator: see showcase_smoke.py
MOST_BYTES = 60_000  # of an image that is stored as it is


def load(name: str) -> dict[str, Any]:
    """Read a notebook."""
    return json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))


def weights(real: bool | None) -> tuple[str, str]:  # None: if they are there
    """Choose the weights: their name, and the value of a notebook's parameter."""
    from huggingface_hub import try_to_load_from_cache
    from seeded import FILE, REPO

    if real is None:
        real = isinstance(try_to_load_from_cache(REPO, FILE), str)
    if real:
        return "openai", "openai"
    import smoke

    return "seeded", str(smoke.checkpoint())


def execute(name: str, real: bool | None = False) -> dict[str, Any]:
    """Run a notebook in a kernel of its own; return it with its outputs; raise its error."""
    import nbformat
    from nbclient import NotebookClient
    from smoke import caller_env

    parameters = SHOWCASE[name]
    chosen, value = weights(real) if WEIGHTS in parameters.values() else ("none", "")
    notebook = load(name)
    running = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in running.cells:
        source = cell.source = "".join(cell.source)
        if "nbdev_export(" in source:
            cell.source = ""
        if "parameters" in cell.metadata.get("tags", []):
            for parameter, given in parameters.items():
                cell.source += f"\n{parameter} = {value if given == WEIGHTS else given!r}"
    home = ROOT / ".cache" / "smoke" / "home"  # keeps the serving artifact from run to run
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        env = caller_env(home, OMP_NUM_THREADS=str(os.cpu_count() or 1))
        env |= {k: v for k, v in os.environ.items() if k.startswith("HF_") and chosen == "openai"}
        beside = str(ROOT / "nbs") if name == "index" else folder  # it imports from tests/
        resources = {"metadata": {"path": beside}}
        client = NotebookClient(running, timeout=300, kernel_name="python3", resources=resources)
        client.execute(env=env)
    for cell, run in zip(notebook["cells"], running.cells, strict=True):
        if cell["cell_type"] == "code":
            cell["outputs"] = json.loads(json.dumps(run.outputs))
    notebook["metadata"]["showcase"] = {"weights": chosen}
    return json.loads(cleaned(json.dumps(notebook)))


def compressed(kind: str, data: str) -> str:
    """Compress an image that is large: fewer colours, or a lower quality."""
    raw = base64.b64decode(data)
    if len(raw) <= MOST_BYTES:
        return data
    file, image = io.BytesIO(), Image.open(io.BytesIO(raw)).convert("RGB")
    if kind == "image/png":
        image.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=72, optimize=True, progressive=True)
    small = file.getvalue()
    return base64.b64encode(small).decode() if len(small) < len(raw) else data


def images(notebook: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """List the images of a notebook: id of the cell, output, kind."""
    return [
        (cell["id"], output, kind)
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for kind in IMAGES
        if kind in output.get("data", {})
    ]


def texts(notebook: dict[str, Any]) -> dict[str, list[str]]:
    """Collect the text outputs by cell, without the cells whose tag says `timing`."""
    return {
        cell["id"]: [
            "".join(output.get("text") or output["data"].get("text/plain", ""))
            for output in cell["outputs"]
        ]
        for cell in notebook["cells"]
        if cell.get("outputs") and "timing" not in cell["metadata"].get("tags", [])
    }


def documents_pictures() -> None:
    """Draw the search panel and the map for the documents, as JupyterLab shows them."""
    import lab
    from browser import PROGRAM

    if PROGRAM is None:
        print("docs/images: left as they are, because there is no Chromium")
        return
    notebook, images_of = ROOT / "nbs" / "21_explore.ipynb", ROOT / "docs" / "images"
    images_of.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        lab.notebook_in_browser(notebook, Path(folder)) as (tab, _),
    ):
        tab.click(f"{lab.PANEL}.querySelector('button[title=\"more like chelsea\"]')")
        tab.wait(f"{lab.PANEL}.innerText.includes('More like chelsea')")
        area = "document.querySelector('.jp-OutputArea textarea')"
        tab.click(area)  # no labels: those of seeded weights would mean nothing
        tab.evaluate(f"{area}.select()")
        tab.press("Backspace", 8)
        tab.click(lab.BUTTON.format("Label the pictures"))
        tab.wait("document.querySelector('.jp-Notebook iframe').title.includes('group 1')")
        parts = {"search": lab.PANEL, "map": "document.querySelector('.jp-Notebook iframe')"}
        for name, element in parts.items():
            image = Image.open(io.BytesIO(tab.screenshot(element))).convert("RGB")
            path = images_of / f"{name}.png"
            image.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"docs/images/{name}.png: {path.stat().st_size:,} bytes")


def main() -> int:
    """Run and store the notebooks that are named, or all."""
    import showcase_smoke

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*SHOWCASE, SMOKE]
    parser.add_argument("names", nargs="*", choices=[*every, []], help="notebooks; none: all")
    for name in parser.parse_args().names or every:
        if name == SMOKE:
            if showcase_smoke.main():
                return 1
            continue
        notebook = execute(name, None)
        for _, output, kind in images(notebook):
            output["data"][kind] = compressed(kind, output["data"][kind])
        text = cleaned(json.dumps(notebook))
        (ROOT / "nbs" / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} bytes, {len(images(notebook))} images")
        if name == "21_explore":
            documents_pictures()
    return 0


if __name__ == "__main__":
    sys.exit(main())
