"""What only a GPU can show: `make test ARGS="--gpu -m gpu"`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from heimdex_clip_worker.model import golden
from heimdex_clip_worker.model.image import forbid_tf32, pick_device

pytestmark = [pytest.mark.model, pytest.mark.gpu]

LOST = """
import torch
from heimdex_clip_worker.errors import InferenceFailed
from heimdex_clip_worker.model.image import run_tower

def beyond(rows):  # an index that does not exist: a device-side assert
    return torch.zeros(3, device=rows.device)[rows.long() + 1_000_000]

for _ in range(2):
    try:
        run_tower(beyond, torch.ones(2, 3), "cuda")
    except InferenceFailed as error:
        print(error.fatal)
"""


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return golden.seeded_state()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_the_vectors_are_open_clips(state, precision: str, quality: str) -> None:
    forbid_tf32()
    options = {"device": "cuda", "precision": precision, "quality": quality}
    images, texts = golden.seeded_worker(state, **options)
    distances = golden.distances(golden.embed_golden(images, texts))
    assert max(distances.values()) <= golden._allowed_drift(images)


def test_auto_takes_the_gpu() -> None:
    assert pick_device("auto").type == "cuda"


def test_a_device_that_is_lost_is_fatal_and_stays_so() -> None:
    run = [sys.executable, "-c", LOST]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\nTrue\n", done.stderr[-2000:]
