"""The second baseline: what a good engineer writes in a day.

Its handler is asynchronous, and 64 jobs run at a time. It keeps one aiohttp session, decodes and
preprocesses in a pool of threads, and runs open_clip in bfloat16 on batches of up to 32 images that
it collects for a few milliseconds. It checks the same signature as the first baseline, takes one
image per job, and gives the same reply. It uses nothing of this repository's package.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import open_clip
import runpod
import torch
from PIL import Image

from benchmarks.baseline_worker import (
    DEVICE,
    MAX_BYTES,
    MODEL_NAME,
    PRETRAINED,
    TIMEOUT_S,
    check_signature,
)  # fmt: skip

CONCURRENCY, BATCH, COLLECT_S = 64, 32, 0.004


class Model:
    """The model in a thread of its own, and the images that wait for it."""

    def __init__(self) -> None:
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            MODEL_NAME, pretrained=PRETRAINED, precision="bf16", device=DEVICE,
            force_quick_gelu=True,
        )  # fmt: skip
        self.model.eval()
        self.thread = ThreadPoolExecutor(1, "model")
        self.waiting: asyncio.Queue = asyncio.Queue()  # of (pixels, future)

    def encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Encode a batch."""
        with torch.inference_mode():
            pixels = torch.stack(images).to(DEVICE, torch.bfloat16)
            return self.model.encode_image(pixels).float().cpu()

    async def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Encode an image in a batch with others."""
        future = asyncio.get_running_loop().create_future()
        await self.waiting.put((image, future))
        return await future

    async def collect(self) -> list[tuple[torch.Tensor, asyncio.Future]]:
        """Wait for an image, and for more of them for a few milliseconds."""
        batch = [await self.waiting.get()]
        deadline = time.perf_counter() + COLLECT_S
        while len(batch) < BATCH and (left := deadline - time.perf_counter()) > 0:
            try:
                batch.append(await asyncio.wait_for(self.waiting.get(), left))
            except asyncio.TimeoutError:
                break
        while len(batch) < BATCH and not self.waiting.empty():
            batch.append(self.waiting.get_nowait())
        return batch

    async def run(self) -> None:
        """Encode batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            images, futures = zip(*await self.collect(), strict=True)
            try:
                rows = await loop.run_in_executor(self.thread, self.encode, list(images))
                for future, row in zip(futures, rows, strict=True):
                    future.set_result(row)
            except Exception as error:
                for future in futures:
                    future.set_exception(error)


class Handler:
    """Answer jobs; whatever belongs to the event loop is opened by the first one."""

    def __init__(self) -> None:
        self.model, self.session = Model(), None
        self.decoders = ThreadPoolExecutor(os.cpu_count(), "decode")

    def open(self) -> None:
        """Open the session, and start to encode."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONCURRENCY),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )
        self.running = asyncio.create_task(self.model.run())

    async def download(self, url: str) -> bytes:
        """Download an image."""
        async with self.session.get(url) as response:
            response.raise_for_status()
            body = await response.read()
        if len(body) > MAX_BYTES:
            raise ValueError("Image too large")
        return body

    def decode(self, data: bytes) -> torch.Tensor:
        """Decode and preprocess an image."""
        return self.model.preprocess(Image.open(io.BytesIO(data)).convert("RGB"))

    async def __call__(self, job: dict) -> dict:
        """Answer a job."""
        start = time.perf_counter()
        job_input = job["input"]
        if self.session is None:
            self.open()
        try:
            check_signature(job_input)
            data = await self.download(job_input["image_url"])
            loop, downloaded = asyncio.get_running_loop(), time.perf_counter()
            pixels = await loop.run_in_executor(self.decoders, self.decode, data)
            vector = await self.model.embed(pixels)
        except Exception as error:
            return {"error": str(error)}
        if job_input.get("normalize", True):
            vector = vector / vector.norm()
        end = time.perf_counter()
        seconds = {"download": downloaded - start, "inference": end - downloaded}
        return {
            "request_id": job_input.get("request_id", "unknown"),
            "embedding": vector.tolist(),
            "dim": len(vector),
            "model": MODEL_NAME,
            "pretrained": PRETRAINED,
            "normalized": job_input.get("normalize", True),
            "timings": {
                **{f"{name}_ms": round(1e3 * s, 2) for name, s in seconds.items()},
                "total_ms": round(1e3 * (end - start), 2),
            },
        }


def main() -> None:
    """Load the model, then serve."""
    handler = Handler()

    async def answer(job: dict) -> dict:  # the SDK looks for a coroutine function
        return await handler(job)

    runpod.serverless.start(
        {"handler": answer, "concurrency_modifier": lambda current: CONCURRENCY}
    )


if __name__ == "__main__":
    main()
