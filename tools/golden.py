"""Write the golden vectors of the package's photographs, for the smoke test to compare with.

They are open_clip's own: its model in float32 on the CPU, its preprocessing, one photograph at a
time. `python tools/golden.py golden.json` computes those of OpenAI's weights and needs the model
hub once; `--pretrained FILE` takes a checkpoint. The weights of a tag must be the pinned ones:
vectors of changed weights would pass for golden. The exit status is 3 if the hub does not answer,
and 1 for any other failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.model.photos import photographs

NO_HUB = "neither in the hub cache nor to be had"  # part of the error's message


def golden(
    model_name: str,
    pretrained: str,  # an open_clip tag, or a checkpoint file
    photos: list[Path],
    cache_dir: str | None = None,  # of the hub library
    sha256: str = "",  # of the weights' file; empty: the pinned one, or any for a checkpoint file
) -> dict[str, Any]:
    """Compute unit vectors by the photographs' names, and name their space; raise ModelError."""
    import torch
    from PIL import Image

    from heimdex_clip_worker.model.artifact import space_id
    from heimdex_clip_worker.model.golden import row_to_text
    from heimdex_clip_worker.model.image import make_transform
    from heimdex_clip_worker.model.weights import load_pinned

    loaded = load_pinned(model_name, pretrained, "auto", sha256, cache_dir)
    transform = make_transform(loaded.weights.facts, loaded.tower.image_size)

    def embed(path: Path) -> str:
        with Image.open(path) as image, torch.inference_mode():
            row = loaded.tower(transform(image.convert("RGB"))[None])[0]
        return row_to_text(row / row.norm())

    return {
        "model": model_name,
        "pretrained": loaded.weights.name,
        "space_id": space_id(loaded),
        "photos": {path.name: embed(path) for path in photos},
    }


def main(argv: list[str] | None = None) -> int:
    """Write the file; return the exit status."""
    parser = argparse.ArgumentParser(prog="golden.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model")
    parser.add_argument("--pretrained", default="openai", help="an open_clip tag, or a file")
    parser.add_argument("--sha256", default="", help="of the weights' file (a tag: the pinned one)")
    args = parser.parse_args(argv)
    try:
        photos = photographs()
        content = golden(args.model, args.pretrained, photos, sha256=args.sha256)
    except ModelError as problem:
        print(f"[ERROR] {problem}", file=sys.stderr)
        return 3 if NO_HUB in str(problem) else 1
    args.file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{args.file}: {len(content['photos'])} photographs, space {content['space_id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
