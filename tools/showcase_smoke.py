"""Run the smoke test and store what it shows: outputs in the notebook, pictures for the documents.

An emulator, seeded weights and a stand-in for Supabase Storage take the place of a deployment, as
in `make smoke`. tools/notebooks.py removes ports and paths. What was measured stays, and the test
that runs the notebook again leaves it out of its comparison.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import notebooks
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"
PLOT = ROOT / "docs" / "images" / "latencies.png"
HEALTH = PLOT.with_name("health.svg")
COMMAND = "heimdex-clip health"
COLOURS = 64  # of a plot; the file is a third of one with all colours
MEASURED = (  # what differs from run to run, or from CPU to CPU
    r"\d+(\.\d+)?(?= (ms|s)\b)",
    r'(?<=_ms": )\d+(\.\d+)?',
    r"(?<=\.jpg )[01]\.\d{4}",  # a cosine to a golden vector
    r"(?<=direction, of length )[\d.]+",
    r"(?<=deterministic, ).+",
)


def small(png: str) -> str:
    """Write a picture with few colours; both are PNG files in base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def with_outputs(
    text: str,  # of the notebook
    executed: str,  # the same one as papermill left it
) -> str:
    """Put the outputs of a run into the notebook."""
    outputs = {cell["id"]: cell.get("outputs", []) for cell in json.loads(executed)["cells"]}
    notebook = json.loads(text)
    notebook["metadata"]["showcase"] = {"weights": "seeded"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs[cell["id"]]
    return notebooks.cleaned(json.dumps(notebook))


def with_small_pictures(text: str) -> str:
    """Compress the pictures of a notebook."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = small(png)
    return notebooks.cleaned(json.dumps(notebook))


def deterministic(text: str) -> dict[str, str]:  # by cell
    """Collect the texts that a notebook shows, without what differs from run to run."""
    texts = {}
    for cell in json.loads(text)["cells"]:
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        if printed:
            texts[cell["id"]] = re.sub("|".join(MEASURED), "N", printed)
    return texts


def terminal(
    runs: list[tuple[str, str]],  # a command and its output
) -> str:
    """Draw a terminal as SVG."""
    lines: list[tuple[str, str]] = []  # class, text
    for command, output in runs:
        shown = [("output", line) for line in output.splitlines()]
        lines += [("command", f"$ {command}"), *shown, ("output", "")]
    lines.pop()
    texts = [
        f'<text x="16" y="{32 + 20 * row}" class="{kind}" '
        f'xml:space="preserve">{escape(text)}</text>'
        for row, (kind, text) in enumerate(lines)
        if text
    ]
    width, height = round(32 + 8.43 * max(len(text) for _, text in lines)), 32 + 20 * len(lines)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(lines[1][1])}</title>",
        "<style>text {font: 14px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; "
        "fill: #e6e6e6} .command {fill: #8ff0a4}</style>",
        '<rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>', *texts, "</svg>", "",
    ])  # fmt: skip


def health_runs() -> list[tuple[str, str]]:
    """Ask for the health of an endpoint that is ready, and of one whose jobs have no worker."""
    import smoke
    from local_worker import FAKE, PhotoServer, plain_env, signed

    from heimdex_clip_worker.emulator.server import EmulatorServer

    def ask(platform: EmulatorServer, home: Path) -> tuple[str, str]:
        env = smoke.caller_env(
            home, RUNPOD_API_KEY=platform.api_key, RUNPOD_BASE_URL=platform.base_url,
            RUNPOD_CLIP_ENDPOINT_ID=platform.endpoint_id,
        )  # fmt: skip
        words = [sys.executable, "-m", "heimdex_clip_worker.cli.main", *COMMAND.split()[1:]]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
        return COMMAND, done.stdout

    with tempfile.TemporaryDirectory() as folder, PhotoServer() as photos:
        home = Path(folder)
        with smoke.on_the_platform(plain_env(home), FAKE) as platform:
            for _ in range(2):
                post(platform, "runsync", signed(photos.photo()))
            runs = [ask(platform, home)]
        with EmulatorServer() as platform:
            post(platform, "run", signed(photos.photo()))
            return [*runs, ask(platform, home)]


def post(platform: Any, path: str, job_input: dict[str, Any]) -> None:
    """Send a job to an emulator."""
    import requests

    headers = {"Authorization": f"Bearer {platform.api_key}"}
    url = f"{platform.base_url}/{platform.endpoint_id}/{path}"
    requests.post(url, json={"input": job_input}, headers=headers, timeout=60).raise_for_status()


def main() -> int:
    """Run the notebook and store its outputs; return the exit status."""
    import smoke

    with tempfile.TemporaryDirectory() as home:
        run = smoke.on_platform(Path(home))
        if run.status:
            print(run.output)
            return 1
        PLOT.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(home) / "pictures" / PLOT.name, PLOT)
    HEALTH.write_text(terminal(health_runs()), encoding="utf-8")
    text = with_outputs(NOTEBOOK.read_text(encoding="utf-8"), run.notebook)
    text = with_small_pictures(text)
    NOTEBOOK.write_text(text, encoding="utf-8")
    print(f"{NOTEBOOK.name}: {len(text) // 1000} kB, {run.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
