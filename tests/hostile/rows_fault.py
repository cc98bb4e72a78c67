"""The catalogue's rows for faults inside: an embedder that fails in one way each.

A row is data: its `id`, `fail`, which is called with the batch in the place of the model, the
`code` that the reply must carry, and whether the process is lost with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from heimdex_clip_worker.errors import InferenceFailed

OOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.6 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
)
STICKY = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: misaligned address",
    "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA driver error: unknown error",
    "no CUDA-capable device is detected",
    "cudaErrorLaunchFailure: unspecified launch failure",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "NVRM: Xid (PCI:0000:65:00): 79, pid=123, GPU has fallen off the bus.",
    "NCCL error in: NCCLUtils.hpp:317, unhandled cuda error",
    "Triton Error [CUDA]: context is destroyed",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
)


@dataclass(frozen=True)
class Row:
    """One way to fail."""

    id: str
    code: str
    fail: Callable[[torch.Tensor], Any]  # (N, 5) -> rows, or raises
    fatal: bool = False
    in_tower: bool = True  # below the embedder's own error handling, else in its place


def raises(error: BaseException) -> Callable[[torch.Tensor], Any]:
    """Make a model that raises."""

    def fail(pixels: torch.Tensor) -> Any:
        raise error

    return fail


def gives(value: Any) -> Callable[[torch.Tensor], Any]:
    """Make a model that returns `value` for every batch."""
    return lambda pixels: value


def inference(id: str, fail: Callable[[torch.Tensor], Any], **more: Any) -> Row:
    """Make a row that must end as INFERENCE_FAILED."""
    return Row(id, "INFERENCE_FAILED", fail, **more)


def internal(id: str, fail: Callable[[torch.Tensor], Any], **more: Any) -> Row:
    """Make a row that must end as INTERNAL."""
    return Row(id, "INTERNAL", fail, **more)


def one(position: int, value: float) -> torch.Tensor:
    """Make a vector of ones with one other value."""
    row = torch.ones(1, 512)
    row[0, position] = value
    return row


SECRET = "https://images.example.com/a.jpg?token=t0k3n"
ROWS = [
    inference("runtime-error", raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))),
    internal("runtime-error-in-its-place", raises(RuntimeError(SECRET)), in_tower=False),
    internal("memory-error", raises(MemoryError())),
    internal("system-exit", raises(SystemExit(3))),
    internal("keyboard-interrupt", raises(KeyboardInterrupt())),
    internal("value-error", raises(ValueError(SECRET))),
    internal("stop-iteration", raises(StopIteration(SECRET))),
    internal("recursion-error", raises(RecursionError(SECRET)), in_tower=False),
    internal("timeout-error", raises(TimeoutError(SECRET))),
    internal("os-error-with-a-url", raises(OSError(2, "No such file", SECRET))),
    internal("unicode-error", raises(UnicodeDecodeError("utf-8", b"\xff", 0, 1, SECRET))),
    inference("inference-failed", raises(InferenceFailed(detail="no")), in_tower=False),
    inference(
        "inference-failed-for-good",
        raises(InferenceFailed(detail="no", fatal=True)),
        in_tower=False,
        fatal=True,
    ),
    *[inference(f"out-of-memory-{i}", raises(RuntimeError(text))) for i, text in enumerate(OOM)],
    inference("out-of-memory-of-torch", raises(torch.OutOfMemoryError(OOM[0]))),
    *[
        inference(f"sticky-{i}", raises(RuntimeError(text)), fatal=True)
        for i, text in enumerate(STICKY)
    ],
    inference("nan", gives(torch.full((1, 512), float("nan")))),
    inference("one-nan", gives(one(77, float("nan")))),
    inference("infinity", gives(one(0, float("inf")))),
    inference("minus-infinity", gives(one(511, float("-inf")))),
    inference("zeros", gives(torch.zeros(1, 512))),
    inference("minus-zeros", gives(-torch.zeros(1, 512))),
    inference("two-rows-for-one", gives(torch.ones(2, 512))),
    inference("no-row", gives(torch.ones(0, 512))),
    inference("too-short-a-row", gives(torch.ones(1, 7))),
    inference("no-dimension", gives(torch.tensor(1.0))),
    inference("three-dimensions", gives(torch.ones(1, 512, 2))),
    internal("no-tensor", gives(None)),
    internal("text", gives("vector"), in_tower=False),
    internal("a-list", gives([[1.0] * 512]), in_tower=False),
]
