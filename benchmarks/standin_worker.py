"""A worker whose model is a sleep: `python -m benchmarks.standin_worker plain|ours`, then flags.

It stands in for an accelerator so fast that everything around the model decides the rate. All else
is unchanged. Both workers sleep equally long for a batch, and the baseline has one image in each.
The "vector" is 512 of the pixels that the model would get, so replies can still be compared.
"""

from __future__ import annotations

import sys
import time

import numpy as np

SLEEP_S = 0.003  # a batch, whatever its size
DIM = 512
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


def sampled(pixels):  # (N, 3, S, S) uint8, or float32 as open_clip prepares it -> (N, 512) float32
    """Sleep as long as a batch would take, and return some of its pixels."""
    import torch

    time.sleep(SLEEP_S)
    flat = pixels.reshape(len(pixels), -1)
    step = flat.shape[1] // DIM  # spread over the three colours
    values = flat[:, : DIM * step : step].float()  # no indexing: its threads would spin
    if pixels.dtype == torch.uint8:
        colour = np.arange(DIM) * step // (flat.shape[1] // 3)
        mean, std = (torch.from_numpy(np.float32(of)[colour]) for of in (MEAN, STD))
        values = (values / 255 - mean) / std
    return values


def baseline() -> None:
    """Run the baseline worker with the sleep as its model."""
    from types import SimpleNamespace

    import open_clip

    from benchmarks import baseline_worker

    preprocess = open_clip.image_transform(224, is_train=False, mean=MEAN, std=STD)
    baseline_worker.load = lambda: (SimpleNamespace(encode_image=sampled), preprocess)
    baseline_worker.main()


def ours() -> None:
    """Run this repository's worker with the sleep as its model."""
    from heimdex_clip_worker import handler
    from heimdex_clip_worker.model.image import Embedder

    Embedder.encode = lambda self, pixels: sampled(pixels)
    handler.main()


if __name__ == "__main__":
    {"plain": baseline, "ours": ours}[sys.argv.pop(1)]()
