"""Write `.runpod/hub.json` and `.runpod/tests.json`: `python tools/hub.py`.

Their form follows RunPod's page *Hub publishing guide* (August 2026). The inputs for variables come
from the worker's settings; GPUs and CUDA versions come from `heimdex-clip deploy`.
"""

from __future__ import annotations

import json
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from heimdex_clip_worker.cli.deploy import _EXCLUDED_GPUS, _GPU_POOLS, _MIN_CUDA, _OF_A_GPU
from heimdex_clip_worker.settings import _OF_THE_HUB, VARIABLES, Variable, flag

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".runpod"
CUDA = ["13.0", "12.9", "12.8"]  # from _MIN_CUDA on: the hub takes no lower bound
BASIC = {"EMBEDDING_HMAC_SECRET", "ALLOWED_IMAGE_HOSTS"}  # the others are "advanced"


def image_variables() -> set[str]:
    """List the variables that the image sets; the default of an input would override them."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"([A-Z][A-Z0-9_]*)[= ]", line)}


def input_type(variable: Variable) -> dict[str, Any]:
    """Describe the type and the default of a variable's input."""
    parse, default = variable.parse, _OF_A_GPU.get(variable.name, variable.default)
    if default is None:
        return {"type": "string", "required": True}
    if parse is flag:
        values = {"trueValue": "true", "falseValue": "false"}
        return {"type": "boolean", **values, "default": parse(default)}
    if hasattr(parse, "low"):
        bounds = {"min": parse.low, "max": parse.high}
        return {"type": "number", **bounds, "default": parse(default)}
    if hasattr(parse, "allowed"):
        options = [{"label": word, "value": word} for word in parse.allowed]
        return {"type": "string", "options": options, "default": default}
    return {"type": "string", "default": default}


def inputs() -> list[dict[str, Any]]:
    """Describe an input for each of the worker's variables that the image does not set."""
    set_by_image = image_variables()
    return [
        {
            "key": variable.name,
            "input": {
                "name": variable.name.replace("_", " ").capitalize(),
                "description": variable.meaning.replace("`", ""),
                **input_type(variable),
                "advanced": variable.name not in BASIC,
            },
        }
        for variable in VARIABLES.values()
        if variable.name not in set_by_image
    ]


def hub() -> dict[str, Any]:
    """Build the listing."""
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
            "gpuIds": ",".join([*_GPU_POOLS, *(f"-{name}" for name in _EXCLUDED_GPUS)]),
            "allowedCudaVersions": CUDA,
            "env": inputs(),
        },
    }


def tests() -> dict[str, Any]:
    """Build the hub's tests: static files, so the one request that needs no signature."""
    env = {
        "EMBEDDING_HMAC_SECRET": _OF_THE_HUB,  # accepted only with the next one
        "ALLOWED_IMAGE_HOSTS": "hub-tests.invalid",
        **_OF_A_GPU,
    }
    return {
        "tests": [{"name": "selftest", "input": {"selftest": True}, "timeout": 60_000}],
        "config": {
            "gpuTypeId": "NVIDIA GeForce RTX 4090",
            "gpuCount": 1,
            "env": [{"key": name, "value": value} for name, value in env.items()],
            "allowedCudaVersions": CUDA,
        },
    }


def main() -> None:
    """Write both files."""
    assert CUDA[-1] == _MIN_CUDA
    for name, content in {"hub.json": hub(), "tests.json": tests()}.items():
        (FOLDER / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
