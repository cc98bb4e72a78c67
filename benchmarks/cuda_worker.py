"""A worker with some of `model.cuda` switched off: BENCH_CUDA holds the options as JSON."""

from __future__ import annotations

import json
import os
from functools import partial

from heimdex_clip_worker import handler
from heimdex_clip_worker.model.cuda import CudaOptions

if __name__ == "__main__":
    options = CudaOptions(**json.loads(os.environ["BENCH_CUDA"]))
    handler.Embedder.load = partial(handler.Embedder.load, cuda_options=options)
    handler.main()
