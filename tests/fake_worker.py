"""The real handler with a fake embedder, for tests of all but vectors: `python fake_worker.py`.

A vector here is the photograph's mean colour and size, so that replies that are mixed up show.
Two photographs are poison: on `rocket.jpg` (220 wide) the model fails, on `hubble.jpg` (353 wide)
it raises SystemExit. `FAKE_EMBEDDER=nan` makes every vector NaN; `FAKE_DIM=256` gives it another
length; `FAKE_AUTH=off` accepts every signature; with `FAKE_IMAGE_S=0.01` the model takes so many
seconds for each image of a batch, without using a CPU.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from PIL import Image, ImageStat

from heimdex_clip_worker import handler
from heimdex_clip_worker.auth import Credential
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.model.preprocess import Preparation


class FakeEmbedder(Embedder):
    """The real embedder with its load, its preprocessing and its forward pass replaced."""

    at_least = None

    @classmethod
    def load(cls, model_name: str, *args: Any, **kwargs: Any) -> FakeEmbedder:
        return cls(
            tower=torch.nn.Identity(),
            transform=mean_and_size,
            space_id="fa4e000000000000",
            model_name=model_name,
            pretrained="fake",
            activation="quickgelu",
            dim=int(os.environ.get("FAKE_DIM", "512")),
            image_size=224,
            device="cpu",
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return mean_and_size(image)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:  # (N, 5) -> (N, 512)
        if 220 in pixels[:, 3]:
            raise RuntimeError("the fake model fails on this photograph")
        if 353 in pixels[:, 3]:
            raise SystemExit(3)
        time.sleep(len(pixels) * float(os.environ.get("FAKE_IMAGE_S", "0")))
        if os.environ.get("FAKE_EMBEDDER") == "nan":
            pixels = pixels * float("nan")
        return torch.nn.functional.pad(pixels, (0, self.dim - pixels.shape[1]))


class PixelEmbedder(Embedder):
    """The real embedder with its load and its forward pass replaced: it takes real pixels.

    A vector is the picture in 4 by 4 squares.
    """

    @classmethod
    def load(cls, model_name: str, *args: Any, **kwargs: Any) -> PixelEmbedder:
        return cls(
            tower=torch.nn.Identity(),
            transform=None,
            quality="fast",
            preparation=Preparation(224, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
            space_id="fa4e000000000001",
            model_name=model_name,
            pretrained="fake",
            activation="quickgelu",
            dim=512,
            image_size=224,
            device="cpu",
        )

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:  # (N, 3, S, S) -> (N, 512)
        rows = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 4).flatten(1) + 1
        return torch.nn.functional.pad(rows, (0, self.dim - rows.shape[1]))


class FakeText:
    """A text embedder: a vector is the text's length and the codes of its first letters."""

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> FakeText:
        return cls()

    def tokenize(self, text: str) -> tuple[torch.Tensor, bool]:
        codes = [float(ord(c)) for c in text[:7]]
        return torch.tensor([len(text), *codes, *[0.0] * (7 - len(codes))]), len(text) > 300

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:  # (N, 8) -> (N, 512)
        return torch.nn.functional.pad(tokens, (0, 512 - tokens.shape[1]))


def mean_and_size(image: Image.Image) -> torch.Tensor:
    """Compute mean red, green, blue, width and height."""
    return torch.tensor([*ImageStat.Stat(image).mean, *image.size])  # (5,) float32


def main() -> None:
    """Run the handler's own `main` over the fakes."""
    handler.Embedder, handler.TextEmbedder = FakeEmbedder, FakeText
    handler.check_choice = lambda *names, **options: []
    if os.environ.get("FAKE_AUTH") == "off":
        handler.verify = lambda job_input, **options: Credential(version=2, kid="v1")
    handler.main()


if __name__ == "__main__":
    main()
