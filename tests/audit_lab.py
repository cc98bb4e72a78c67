"""Pictures, and vectors of them that are wrong in known ways, for the tests of `audit`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.model.tower import DTYPES, VisionTower, from_open_clip
from heimdex_clip_worker.serving.decode import PixelLimits, decode

SIZE = (960, 540)


def pictures(
    count: int,
    sources: list[Path] | None = None,  # None: the photographs of the package
    size: tuple[int, int] = SIZE,
) -> list[bytes]:  # JPEG files
    """Cut frames out of photographs, each from another place, with the noise of a sensor."""
    rng, files = np.random.default_rng(0), []
    sources = sources or photographs()
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as file:
            image = file.convert("RGB")
        width, height = image.size
        part = 1.0 if number < len(sources) else 0.7
        w, h = int(part * width), int(part * height)
        left, top = (int(rng.integers(0, n + 1)) for n in (width - w, height - h))
        frame = image.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(frame) + rng.normal(0, 6, (size[1], size[0], 3))
        memory = io.BytesIO()
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(memory, "JPEG", quality=85)
        files.append(memory.getvalue())
    return files


def seeded_visual(seed: int) -> dict[str, torch.Tensor]:
    """Make the image tower's weights of another seed, in the way of `golden.seeded_state`."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model("ViT-B-32", pretrained_text=False)
    for name, weight in model.visual.named_parameters():
        if name.endswith("mlp.c_fc.bias"):
            weight.data -= 2
        elif name.endswith("mlp.c_proj.weight"):
            weight.data *= 4
    return model.visual.state_dict()


def variant(
    embedder: Any,  # with a tower of plain torch
    weights: dict[str, torch.Tensor],  # open_clip's, of the image tower
    *,
    activation: str = "quickgelu",
    precision: str = "fp32",
    quality: str = "exact",
) -> Any:
    """Build an embedder of other weights, another activation or precision."""
    shape = replace(embedder.tower.shape, activation=activation)
    tensors = {n: t.to(DTYPES[precision]) for n, t in from_open_clip(weights, shape).items()}
    tower = VisionTower.load(shape, tensors)
    return replace(embedder, tower=tower, precision=precision, quality=quality)


def vectors(embedder: Any, files: list[bytes], side: int = 0) -> np.ndarray:  # (n, dim)
    """Embed files, or thumbnails of them; the rows have the length 1."""
    images = []
    for data in files:
        if side:
            image = Image.open(io.BytesIO(data))
            image.thumbnail((side, side))
            images.append(image.convert("RGB"))
        else:
            images.append(decode(data, PixelLimits(), at_least=embedder.at_least))
    rows = []
    for n in range(0, len(images), 32):
        pixels = [embedder.preprocess(image) for image in images[n : n + 32]]
        rows.append(embedder.encode(torch.stack(pixels)))
    matrix = torch.cat(rows).double().numpy()
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


class Kept:
    """The model of an audit, kept for many of them: a picture is embedded once."""

    def __init__(self, eye: Any):
        self._eye, self._known = eye, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._eye, name)

    def fresh(self, urls: list[str]) -> list[Any]:
        new = [url for url in urls if url not in self._known]
        made = zip(self._eye.fresh(new), self._eye._files, strict=True)
        self._known |= dict(zip(new, made, strict=True))
        self._eye._files = [self._known[url][1] for url in urls]
        return [self._known[url][0] for url in urls]

    def close(self) -> None:
        """Leave it open."""


class Blind(Kept):
    """The same without variants, as an endpoint is."""

    exact = False

    def distances(self, units: Any, right: Any) -> Any:
        return {place: {} for place in units}


@contextmanager
def image_server(files: list[bytes]) -> Iterator[str]:
    """Serve files as /0.jpg, /1.jpg and so on; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.strip("/").removesuffix(".jpg")
            body = files[int(name)] if name.isdigit() and int(name) < len(files) else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
