"""Compare `fast` preprocessing with open_clip's own, over 2,000 JPEGs that are hard to halve.

    python tests/draft_2000.py [--files 2000] [--seed 0] [--processes 1]

In float32, with the seeded weights, each cosine must be 0.9999 or more. With weights that react
more strongly (all two-dimensional ones times 1.6) an ordinary enlarged photograph showed 0.99987,
and no file may be further away than three times that. Takes half an hour on two CPUs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import copy
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jpegs
import torch
from PIL import Image

from heimdex_clip_worker.model.golden import seeded_state
from heimdex_clip_worker.model.preprocess import Preparation, fast, to_model
from heimdex_clip_worker.serving.decode import PixelLimits, decode

OPENAI = Preparation(
    224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
BOUNDS = (1e-4, 3.9e-4)  # of 1 - cosine: seeded weights, and those times 1.6
BATCH = 16


def towers() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Build open_clip's tower with the seeded weights, and with the larger ones."""
    import open_clip

    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained_text=False)
    model.load_state_dict(seeded_state())
    seeded = model.visual.eval()
    strong = copy.deepcopy(seeded)
    with torch.no_grad():
        for weight in strong.parameters():
            weight.mul_(1.6 if weight.dim() == 2 else 1)
    return seeded, strong


def prepared(data: bytes, transform) -> tuple[bool, torch.Tensor]:  # halved?, (2, 3, S, S) float32
    """Prepare a file as open_clip does, and as the worker does."""
    theirs = transform(Image.open(io.BytesIO(data)))
    image = decode(data, PixelLimits(), at_least=OPENAI.draft_size)
    ours = to_model(fast(image, OPENAI)[None], OPENAI, torch.float32)[0]
    return image.size != image.info["size"], torch.stack([theirs, ours])


def distances(pairs: Sequence[torch.Tensor], tower: torch.nn.Module) -> list[float]:
    """Compute 1 - cosine of each pair's two vectors."""
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(tower(torch.cat(pairs)).double(), dim=1)
    return (1 - (rows[::2] * rows[1::2]).sum(dim=1)).tolist()


def compare(seeds: range, output: Path | None) -> list[dict]:
    """Make and compare some files; print each that is beyond a bound, and the progress."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.set_num_threads(1)
    (seeded, strong), kinds, results = towers(), list(jpegs.KINDS), []
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    began = time.monotonic()
    for start in range(0, len(seeds), BATCH):
        batch = seeds[start : start + BATCH]
        files = [jpegs.make(kinds[seed % len(kinds)], seed) for seed in batch]
        halved, pairs = zip(*(prepared(file.data, transform) for file in files), strict=True)
        both = zip(distances(pairs, seeded), distances(pairs, strong), strict=True)
        for file, half, away in zip(files, halved, both, strict=True):
            result = {"kind": file.kind, "seed": file.seed, "about": file.about}
            results.append(result | {"halved": half, "away": away})
            line = json.dumps(results[-1])
            if any(d > bound for d, bound in zip(away, BOUNDS, strict=True)):
                print("BEYOND", line, flush=True)
            if output:
                with output.open("a") as lines:
                    lines.write(line + "\n")
        print(f"{len(results)} of {len(seeds)}, {time.monotonic() - began:.0f} s", flush=True)
    return results


def summary(results: list[dict]) -> str:
    """Summarise the results by kind, as a table."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[result["kind"]].append(result)
        groups["all"].append(result)
    rows = ["kind      files  halved  worst 1 - cosine, seeded  times 1.6"]
    for kind, group in groups.items():
        share = sum(result["halved"] for result in group) / len(group)
        worst = [max(result["away"][i] for result in group) for i in range(2)]
        rows.append(f"{kind:9} {len(group):5} {share:7.0%} {worst[0]:25.1e} {worst[1]:10.1e}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file (0)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file for all results, as JSON lines")
    args = parser.parse_args()
    parts = [
        range(args.seed + i, args.seed + args.files, args.processes) for i in range(args.processes)
    ]
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(compare, part, args.output) for part in parts]
        results = [result for job in jobs for result in job.result()]
    print(summary(results))
    return int(any(d > b for r in results for d, b in zip(r["away"], BOUNDS, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
