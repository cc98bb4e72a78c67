"""Write the vectors that the package's photographs should have, as the smoke test compares them.

They are open_clip's own: its model in 32-bit floats on the CPU, its preprocessing, one photograph
at a time. `python tools/golden.py golden.json` makes those of OpenAI's weights and needs the model
hub once; `--pretrained FILE` takes a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import heimdex_clip_worker
from heimdex_clip_worker.errors import ModelError

PHOTOS = Path(heimdex_clip_worker.__file__).parent / "photos"


def golden(
    model_name: str,
    pretrained: str,  # an open_clip tag, or a checkpoint file
    photos: list[Path],
    cache_dir: str | None = None,  # of the hub library
) -> dict[str, Any]:
    """Return unit vectors by the photographs' names, and whose they are; raise ModelError."""
    import torch
    from PIL import Image

    from heimdex_clip_worker.artifact import space_id, text_of
    from heimdex_clip_worker.embed import make_transform
    from heimdex_clip_worker.weights import load_model

    loaded = load_model(model_name, pretrained, "auto", cache_dir)
    transform = make_transform(loaded.weights.facts, loaded.tower.image_size)

    def embed(path: Path) -> str:
        with Image.open(path) as image, torch.inference_mode():
            row = loaded.tower(transform(image.convert("RGB"))[None])[0]
        return text_of(row / row.norm())

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
    args = parser.parse_args(argv)
    try:
        photos = sorted(PHOTOS.glob("*.[jp][pn]g"))
        told = golden(args.model, args.pretrained, photos)
    except ModelError as problem:
        print(f"[ERROR] {problem}", file=sys.stderr)
        return 1
    args.file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"{args.file}: {len(told['photos'])} photographs, space {told['space_id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
