"""Images and texts of many jobs at once, through the real model and the production loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from local_worker import HANDLER, PHOTOS, SECRET, WorkerProcess, plain_env
from PIL import Image
from seeded import hub_env

from heimdex_clip_worker.auth import new_nonce, sign_v2
from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.emulator.server import EmulatorServer

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

NAMES = sorted(p.name for p in PHOTOS.iterdir() if p.suffix in (".jpg", ".png"))
TEXTS = ["a photo of a cat", "a rocket", "a cup of coffee on a table", "word " * 100]
CLOSE = 0.9995  # cosine to open_clip's float32, whatever the precision of this machine


def signed(**fields: object) -> dict:
    """Make a job's input, signed now."""
    now = int(time.time())
    about = {"audience": "heimdex-clip", "ts": now, "exp": now + 600, "nonce": new_nonce()}
    return {**fields, "auth": sign_v2(fields, kid="v1", secret=SECRET, **about)}


@pytest.fixture(scope="module")
def expected(seeded_hub: Path) -> dict[str, torch.Tensor]:  # file name or text -> (512,) unit
    """open_clip's vector of every photograph and text, in float32."""
    model, _, transform = open_clip.create_model_and_transforms(
        "ViT-B-32", "openai", force_quick_gelu=True, cache_dir=str(seeded_hub)
    )
    pixels = [transform(Image.open(PHOTOS / name).convert("RGB")) for name in NAMES]
    with torch.inference_mode():
        rows = model.eval().encode_image(torch.stack(pixels), normalize=True)
        words = model.encode_text(open_clip.tokenize(TEXTS), normalize=True)
    return dict(zip([*NAMES, *TEXTS], [*rows, *words], strict=True))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorServer]:
    """A platform with one worker as deployed: seeded weights, this machine's precision."""
    home = tmp_path_factory.mktemp("many")
    with EmulatorServer() as platform:
        env = plain_env(home, **platform.worker_env(), **hub_env(home))
        with WorkerProcess(env, *HANDLER) as worker:
            taking = lambda: platform.queue.calls["job-take"] > 0  # noqa: E731
            worker.wait_until(taking, 90, "the worker takes no jobs")
            yield platform


def cosine(result: dict, expected: torch.Tensor) -> float:
    row = torch.tensor(decode_vector(result["embedding"]))
    return torch.cosine_similarity(row, expected, dim=0).item()


def test_every_item_gets_the_vector_of_its_own_image(platform, photos, expected):
    """Jobs of one and of many images at once, each in another order, are not mixed up."""
    orders = [NAMES[i:] + NAMES[:i] for i in range(0, len(NAMES), 3)]
    many = [signed(images=[{"image_url": photos.photo(n)} for n in order]) for order in orders]
    alone = [signed(image_url=photos.photo(n), encoding_format="base64") for n in NAMES]
    done = platform.wait([platform.submit(job) for job in [*many, *alone]], 90)
    results = [r for job in done[: len(many)] for r in job["output"]["results"]]
    results += [job["output"] for job in done[len(many) :]]
    names = [name for order in orders for name in order] + NAMES
    cosines = [cosine(r, expected[n]) for r, n in zip(results, names, strict=True)]
    assert min(cosines) >= CLOSE


def test_texts_share_the_images_space_and_say_when_they_are_truncated(platform, photos, expected):
    jobs = [signed(texts=TEXTS), signed(text=TEXTS[0]), signed(image_url=photos.photo())]
    many, one, image = (job["output"] for job in platform.wait(map(platform.submit, jobs), 90))
    assert [r["truncated"] for r in many["results"]] == [False, False, False, True]
    assert min(cosine(r, expected[t]) for r, t in zip(many["results"], TEXTS, strict=True)) >= CLOSE
    assert cosine(one, expected[TEXTS[0]]) >= CLOSE
    assert many["space_id"] == one["space_id"] == image["space_id"]


def test_each_item_has_its_own_normalize(platform, photos):
    images = [{"image_url": photos.photo(), "normalize": unit} for unit in (True, False)]
    (job,) = platform.wait([platform.submit(signed(images=images))], 60)
    unit, raw = job["output"]["results"]
    lengths = [torch.tensor(r["embedding"]).norm().item() for r in (unit, raw)]
    assert lengths[0] == pytest.approx(1, abs=1e-5) and abs(lengths[1] - 1) > 0.1
    assert [unit["normalized"], raw["normalized"]] == [True, False]
