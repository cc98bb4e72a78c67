"""The fake worker with a part that never returns, or a lost device: `python hung_worker.py`.

`HANG` names the part: `model`, `lock` (the model, which holds the interpreter lock), `decoder` (at
`clock.png` alone) or `check` (before the first job). With `HANG=device` the model loses its device
instead, and holds something whose destructor aborts the process, as a tensor's would.
`HANG_AFTER=3` lets three runs of the model return before. A line says when it begins.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import fake_worker
import torch
from PIL import Image

from heimdex_clip_worker.model.image import run_tower
from heimdex_clip_worker.serving import pipeline, process, watchdog

HANG = os.environ.get("HANG", "")
HANG_AFTER = int(os.environ.get("HANG_AFTER", "0"))
CLOCK = (400, 300)  # the size of clock.png


def hang(part: str) -> None:
    """Return never if `part` is the one that hangs."""
    if part == HANG:
        print(f"{part} hangs", file=sys.stderr, flush=True)
        if part == "lock":
            ctypes.PyDLL(None).sleep(100_000)
        time.sleep(100_000)


class Tensor:
    """On a lost device: it cannot be freed."""

    def __del__(self) -> None:
        os.abort()


def on_a_lost_device(pixels: torch.Tensor) -> None:
    """Fail as a tower does."""
    held = Tensor()
    raise RuntimeError(f"CUDA error: device-side assert triggered, with {type(held)} in hand")


class Embedder(fake_worker.FakeEmbedder):
    """The fake embedder, whose model hangs after some runs, or whose decoder does."""

    runs = [0]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        if image.size == CLOCK:
            hang("decoder")
        return super().preprocess(image)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.runs[0] += 1
        if self.runs[0] > HANG_AFTER:
            hang("model")
            hang("lock")
            if HANG == "device":
                return run_tower(on_a_lost_device, pixels, "cpu")
        return super().encode(pixels)


def check(*args: Any) -> None:
    """Check nothing, or hang."""
    hang("check")


if __name__ == "__main__":
    fake_worker.FakeEmbedder = Embedder
    pipeline._DECODE_TIMEOUT_S, watchdog._FIRST_TIMES = 0.5, 2
    process._check_fitness = check
    fake_worker.main()
