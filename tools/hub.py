"""Write `.runpod/hub.json` and `.runpod/tests.json`: `python tools/hub.py`.

Their form is that of RunPod's page *Hub publishing guide* (August 2026). The environment's inputs
come from the worker's own settings; GPUs and CUDA from the deployment's.
"""

from __future__ import annotations

import json
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from heimdex_clip_worker.deploy import LEFT_OUT, MIN_CUDA, POOLS
from heimdex_clip_worker.settings import VARIABLES, Variable, flag

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".runpod"
CUDA = ["13.0", "12.9", "12.8"]  # what the platform has from MIN_CUDA on; here it takes no floor
SHOWN = {"EMBEDDING_HMAC_SECRET", "ALLOWED_IMAGE_HOSTS"}  # the others are "advanced"


def baked() -> set[str]:
    """Return the variables that the image sets, and that an input's default would undo."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"([A-Z][A-Z0-9_]*)[= ]", line)}


def form(variable: Variable) -> dict[str, Any]:
    """Return what kind of input a variable is, with its default."""
    parse, default = variable.parse, variable.default
    if default is None:
        return {"type": "string", "required": True}
    if parse is flag:
        said = {"trueValue": "true", "falseValue": "false"}
        return {"type": "boolean", **said, "default": parse(default)}
    if hasattr(parse, "low"):
        bounds = {"min": parse.low, "max": parse.high}
        return {"type": "number", **bounds, "default": parse(default)}
    if hasattr(parse, "allowed"):
        options = [{"label": word, "value": word} for word in parse.allowed]
        return {"type": "string", "options": options, "default": default}
    return {"type": "string", "default": default}


def inputs() -> list[dict[str, Any]]:
    """Return an input for each of the worker's variables that the image leaves open."""
    left = [variable for variable in VARIABLES.values() if variable.name not in baked()]
    return [
        {
            "key": variable.name,
            "input": {
                "name": variable.name.replace("_", " ").capitalize(),
                "description": variable.meaning.replace("`", ""),
                **form(variable),
                "advanced": variable.name not in SHOWN,
            },
        }
        for variable in left
    ]


def hub() -> dict[str, Any]:
    """Return the listing."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return {
        "title": "CLIP ViT-B-32 embeddings",
        "description": settings["DEFAULT"]["description"],
        "type": "serverless",
        "category": "embedding",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": 20,
            "gpuCount": 1,
            "gpuIds": ",".join([*POOLS, *(f"-{name}" for name in LEFT_OUT)]),
            "allowedCudaVersions": CUDA,
            "env": inputs(),
        },
    }


def tests() -> dict[str, Any]:
    """Return the hub's tests: static, so the one request that needs no signature."""
    secret = {"key": "EMBEDDING_HMAC_SECRET", "value": "of-the-hub-tests-and-nothing-else"}
    return {
        "tests": [{"name": "selftest", "input": {"selftest": True}, "timeout": 60_000}],
        "config": {
            "gpuTypeId": "NVIDIA GeForce RTX 4090",
            "gpuCount": 1,
            "env": [secret],
            "allowedCudaVersions": CUDA,
        },
    }


def main() -> None:
    """Write both files."""
    assert CUDA[-1] == MIN_CUDA
    for name, told in {"hub.json": hub(), "tests.json": tests()}.items():
        (FOLDER / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
