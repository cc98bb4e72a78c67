"""Measure how well an audit tells kinds apart: the table in docs/how-to/audit-a-column.md.

    python tests/audit_kinds.py [--count 60] [PHOTO ...]

Without photographs it takes those of the package, of scikit-learn and, if it is installed, of
scikit-image. The weights are seeded. It takes a minute and a half of CPU time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import audit_lab as lab
import numpy as np
import seeded
from safetensors.torch import load_file

from heimdex_clip_worker.cli import audit as command
from heimdex_clip_worker.database import audit
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.settings import ClientSettings

DRAWINGS = ("chessboard", "logo", "multipage", "phantom", "microaneurysms", "color", "no_time")


def sources() -> list[Path]:
    """List the photographs that are at hand."""
    found = list(photographs())
    for package, folder in (("sklearn", "datasets/images"), ("skimage", "data")):
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            images = Path(spec.submodule_search_locations[0], folder)
            found += sorted(p for p in images.iterdir() if p.suffix in (".jpg", ".png"))
    return [path for path in found if not path.name.startswith(DRAWINGS)]


class Lab:
    """Pictures, the model that judges, and models that make wrong vectors."""

    def __init__(self, files: list[bytes]):
        self.files, model = files, command._Local(ClientSettings.from_env(backend="local"))
        self.eye, self.blind = lab.Kept(model), lab.Blind(model)
        weights = {
            name.removeprefix("visual."): tensor
            for name, tensor in load_file(seeded.seeded_file()).items()
            if name.startswith("visual.")
        }
        model = model._embedder
        self.right = lab.vectors(model, files)
        gelu = lab.variant(model, weights, activation="gelu")
        self.sets = {
            "this space, bf16, fast": self.made("right", lab.variant(
                model, weights, precision="bf16", quality="fast")),
            "GELU": self.made("activation", gelu),
            "GELU, thumbnailed to 256": self.made("activation", gelu, 256),
            "thumbnailed to 224": self.made("thumbnailed", model, 224),
            "thumbnailed to 256": self.made("thumbnailed", model, 256),
            "thumbnailed to 300 (not tried)": self.made("thumbnailed", model, 300),
            "thumbnailed to 512": self.made("thumbnailed", model, 512),
            "another model": self.made("other_model", lab.variant(model, lab.seeded_visual(1))),
            "picture of another row": ("other_picture", np.roll(self.right, 1, 0)),
            "picture of no row": ("other_picture", np.roll(self.right, 1, 0)),
            "not normalised": ("not_normalized", 3 * self.right),
        }  # fmt: skip

    def made(self, kind: str, model: Any, side: int = 0) -> tuple[str, np.ndarray]:
        return kind, lab.vectors(model, self.files, side)

    def judge(self, name: str, address: str, exact: bool) -> tuple[Counter[str], np.ndarray]:
        """Judge the even rows with vectors of a set, and the odd ones with right vectors."""
        _, rows = self.sets[name]
        stored = []
        for n in range(len(rows)):
            if name == "picture of no row" and n % 2:
                continue
            vector = rows[n] if n % 2 == 0 else self.right[n]
            stored.append(audit._Stored(n, f"{address}/{n}.jpg", vector))
        judge = audit.Judge(exact)
        eye = self.eye if exact else self.blind
        for at in range(0, len(stored), 64):
            command._judge_page(judge, stored[at : at + 64], eye, None)
        findings = [f for f in judge.findings if f.stored.id % 2 == 0]
        places = {f.stored.id: n for n, f in enumerate(judge.findings)}
        judge.finish()
        kinds = Counter(judge.findings[places[f.stored.id]].kind for f in findings)
        odd = [f for f in judge.findings if f.stored.id % 2]
        assert all(f.kind == "right" for f in odd), Counter(f.kind for f in odd)
        return kinds, np.array([f.distance for f in findings if f.distance is not None])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=60)
    args = parser.parse_args()
    photos = args.photos or sources()
    files = lab.pictures(args.count, photos)
    print(f"{len(files)} pictures of {len(photos)} photographs, {lab.SIZE[0]} x {lab.SIZE[1]}")
    os.environ |= {
        "CLIP_PRETRAINED": str(seeded.seeded_file()), "HF_HOME": tempfile.mkdtemp(),
        "ALLOW_HTTP": "true", "ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8",
    }  # fmt: skip
    seeded.seeded_hub()
    tested = Lab(files)
    pairs = 1 - (tested.right @ tested.right.T)[np.triu_indices(len(files), 1)]
    print(f"two pictures: 1 - cosine {pairs.min():.1e} to {pairs.max():.2f}, "
          f"median {np.median(pairs):.2f}")  # fmt: skip
    with lab.image_server(files) as address:
        for exact in (True, False):
            print("\nlocal" if exact else "\nan endpoint")
            for name, (kind, _) in tested.sets.items():
                kinds, distances = tested.judge(name, address, exact)
                low, middle, high = np.quantile(distances, (0, 0.5, 1))
                rest = {k: n for k, n in kinds.items() if k != kind}
                print(f"{name:<32} {kinds[kind]:>3} of {kinds.total()} {kind:<15} "
                      f"{low:.1e} {middle:.1e} {high:.1e}  {rest or ''}", flush=True)  # fmt: skip
    tested.eye.client.close()


if __name__ == "__main__":
    main()
