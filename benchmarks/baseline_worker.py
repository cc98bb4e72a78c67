"""The baseline worker: the specification in its simplest form, against which all is measured.

Its handler is synchronous: check the HMAC, `requests.get` the image, decode it with Pillow, run
open_clip in float32, reply. It takes one image per job, and uses nothing of this repository's
package. It reads the same environment variables and gives the same reply for one image.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import time

import open_clip
import requests
import runpod
import torch
from PIL import Image

SECRET = os.environ.get("EMBEDDING_HMAC_SECRET", "")
WINDOW_S = int(os.environ.get("AUTH_TIME_WINDOW_SECONDS", "120"))
TIMEOUT_S = float(os.environ.get("IMAGE_DOWNLOAD_TIMEOUT", "30"))
MAX_BYTES = int(os.environ.get("MAX_IMAGE_SIZE_BYTES", "10485760"))
MODEL_NAME = os.environ.get("CLIP_MODEL_NAME", "ViT-B-32")
PRETRAINED = os.environ.get("CLIP_PRETRAINED", "openai")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("CLIP_DEVICE", "auto") != "auto":
    DEVICE = os.environ["CLIP_DEVICE"]


def load():
    """Load the model and its preprocessing; OpenAI's weights were trained with QuickGELU."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        MODEL_NAME, pretrained=PRETRAINED, precision="fp32", device=DEVICE, force_quick_gelu=True
    )
    return model.eval(), preprocess


def check_signature(job_input: dict) -> None:
    """Raise ValueError unless the request has a valid, recent version 1 signature."""
    auth = job_input["auth"]
    message = f"{job_input['image_url']}|{auth['ts']}".encode()
    expected = hmac.new(SECRET.encode(), message, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, auth["sig"]) or abs(time.time() - auth["ts"]) > WINDOW_S:
        raise ValueError("Authentication failed")


def download(url: str) -> Image.Image:
    """Download an image and decode it as RGB."""
    response = requests.get(url, timeout=TIMEOUT_S)
    response.raise_for_status()
    if len(response.content) > MAX_BYTES:
        raise ValueError("Image too large")
    return Image.open(io.BytesIO(response.content)).convert("RGB")


def make_handler(model, preprocess):
    """Make the handler of one job."""

    def handler(job: dict) -> dict:
        start = time.perf_counter()
        job_input = job["input"]
        try:
            check_signature(job_input)
            image = download(job_input["image_url"])
            downloaded = time.perf_counter()
            with torch.no_grad():
                vector = model.encode_image(preprocess(image).unsqueeze(0).to(DEVICE))
                if job_input.get("normalize", True):
                    vector = vector / vector.norm(dim=-1, keepdim=True)
            embedding = vector[0].cpu().tolist()
        except Exception as error:
            return {"error": str(error)}
        end = time.perf_counter()
        seconds = {"download": downloaded - start, "inference": end - downloaded}
        return {
            "request_id": job_input.get("request_id", "unknown"),
            "embedding": embedding,
            "dim": len(embedding),
            "model": MODEL_NAME,
            "pretrained": PRETRAINED,
            "normalized": job_input.get("normalize", True),
            "timings": {
                **{f"{name}_ms": round(1e3 * s, 2) for name, s in seconds.items()},
                "total_ms": round(1e3 * (end - start), 2),
            },
        }

    return handler


def main() -> None:
    """Load the model, then serve."""
    runpod.serverless.start({"handler": make_handler(*load())})


if __name__ == "__main__":
    main()
