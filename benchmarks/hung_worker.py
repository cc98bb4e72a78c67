"""A worker whose model stops returning: from the moment on that the file BENCH_HANG exists.

On a GPU a kernel spins for a minute, and the model's thread waits for it inside the driver, as it
would for a driver that hangs. On a CPU the thread sleeps.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from heimdex_clip_worker import handler
from heimdex_clip_worker.model.image import Embedder

HANG_S = 60.0
CYCLES_PER_S = 2e9  # of a GPU, at most

encode = Embedder.encode


def hanging(self: Embedder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode, or hang."""
    if not Path(os.environ["BENCH_HANG"]).exists():
        return encode(self, pixels)
    if self.device == "cpu":
        time.sleep(HANG_S)
    else:
        torch.cuda._sleep(int(HANG_S * CYCLES_PER_S))
        torch.cuda.synchronize()
    return encode(self, pixels)


if __name__ == "__main__":
    Embedder.encode = hanging
    handler.main()
