"""A thousand jobs of every kind at once, through the production loop: one right reply each."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from fake_worker import FakeText, mean_and_size
from local_worker import FAKE, PHOTOS, SECRET, PhotoServer, WorkerProcess, plain_env
from PIL import Image

from heimdex_clip_worker.auth import new_nonce, sign, sign_v2
from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.emulator.server import EmulatorServer

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.server]

GOOD = ["chelsea.jpg", "coffee.jpg", "astronaut.jpg", "camera.jpg", "china.jpg", "flower.jpg"]
POISON = ["rocket.jpg", "hubble.jpg"]  # the fake model fails on one, and asks for exit on the other


def expected(name: str) -> list[float]:
    """Compute the fake model's vector of a photograph: mean colour, width, height."""
    with Image.open(PHOTOS / name) as image:
        return mean_and_size(image.convert("RGB")).tolist()


VECTORS = {name: expected(name) for name in GOOD}


@dataclass
class MixedJob:
    """One job, and a check of its reply."""

    kind: str
    input: dict
    right: Callable[[dict], bool]  # over the job's public state
    cancel: bool = False
    id: str = field(default="", compare=False)


def signed_v1(url: str, age: int = 0, **fields: object) -> dict:
    ts = int(time.time()) - age
    return {"image_url": url, **fields, "auth": sign(url, secret=SECRET, ts=ts)}


def signed_v2(**fields: object) -> dict:
    now = int(time.time())
    about = {"audience": "heimdex-clip", "ts": now, "exp": now + 600, "nonce": new_nonce()}
    return {**fields, "auth": sign_v2(fields, kid="v1", secret=SECRET, **about)}


def is_vector(result: dict, values: list[float], normalize: bool, request_id: str) -> bool:
    """True if a result is this vector, for this request."""
    length = math.hypot(*values) if normalize else 1.0
    vector = decode_vector(result["embedding"])
    pairs = zip(vector, [v / length for v in values], strict=False)
    close = all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
    facts = (result["normalized"], result["request_id"], result["dim"])
    return close and len(vector) == 512 and not any(vector[len(values) :]) and facts == (
        normalize, request_id, 512,
    )  # fmt: skip


def has_failed(code: str) -> Callable[[dict], bool]:
    return lambda job: job["status"] == "FAILED" and job["output"]["code"] == code


class Mixture:
    """Jobs of every kind, drawn by a seeded generator."""

    def __init__(self, photos: PhotoServer, rng: random.Random):
        self.photos, self.rng = photos, rng
        self.kinds = {
            self.single: 40, self.batch: 15, self.text: 10, self.texts: 10, self.bad: 15,
            self.cancelled: 10,
        }  # fmt: skip

    def draw(self, n: int) -> MixedJob:
        kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        return kind(f"job-{n}")

    def single(self, name: str) -> MixedJob:
        photo, unit = self.rng.choice(GOOD), self.rng.random() < 0.7
        make = self.rng.choice([signed_v1, lambda url, **more: signed_v2(image_url=url, **more)])
        job = make(self.photos.photo(photo), request_id=name, normalize=unit)
        right = lambda job: is_vector(job["output"], VECTORS[photo], unit, name)  # noqa: E731
        return MixedJob("single", job, right)

    def batch(self, name: str) -> MixedJob:
        chosen = self.rng.choices([*GOOD, *POISON, "missing"], [8] * len(GOOD) + [1, 1, 3], k=7)
        images = [
            {"image_url": self.photos.photo(photo), "request_id": f"{name}.{i}"}
            if photo != "missing"
            else {"image_url": f"{self.photos.url}/missing", "request_id": f"{name}.{i}"}
            for i, photo in enumerate(chosen)
        ]
        codes = {"missing": "SOURCE_HTTP"} | dict.fromkeys(POISON, "INTERNAL")

        def right(job: dict) -> bool:
            reply = job["output"]
            fine = [
                result.get("code") == codes[photo] and result["request_id"] == f"{name}.{i}"
                if photo in codes
                else is_vector(result, VECTORS[photo], True, f"{name}.{i}")
                for i, (photo, result) in enumerate(zip(chosen, reply["results"], strict=True))
            ]
            failed = sum(photo in codes for photo in chosen)
            return all(fine) and (reply["count"], reply["failed"]) == (len(chosen), failed)

        encoding = self.rng.choice(["float", "base64"])
        return MixedJob("batch", signed_v2(images=images, encoding_format=encoding), right)

    def text(self, name: str) -> MixedJob:
        values = FakeText().tokenize(name)[0].tolist()
        right = lambda job: is_vector(job["output"], values, True, name)  # noqa: E731
        return MixedJob("text", signed_v2(text=name, request_id=name), right)

    def texts(self, name: str) -> MixedJob:
        texts = [f"{name} {'x' * self.rng.randrange(400)}" for _ in range(5)]
        tokens = [FakeText().tokenize(text) for text in texts]

        def right(job: dict) -> bool:
            results = job["output"]["results"]
            return all(
                is_vector(result, values.tolist(), False, "unknown")
                and result["truncated"] is cut
                for result, (values, cut) in zip(results, tokens, strict=True)
            )

        return MixedJob("texts", signed_v2(texts=texts, normalize=False), right)

    def bad(self, name: str) -> MixedJob:
        url, photo = self.photos.url, self.photos.photo()
        job, code = self.rng.choice([
            (signed_v1(f"{url}/missing"), "SOURCE_HTTP"),
            (signed_v1(f"{url}/status/503"), "SOURCE_HTTP"),
            (signed_v1(f"{url}/page"), "UNSUPPORTED_FORMAT"),
            (signed_v1(f"{url}/truncated.jpg"), "DECODE_FAILED"),
            (signed_v1("http://10.0.0.1/x.jpg"), "URL_NOT_ALLOWED"),
            (signed_v1(photo, age=1000), "AUTH_EXPIRED"),
            ({**signed_v1(photo), "image_url": photo + "?x=1"}, "AUTH_FAILED"),
            (signed_v1(photo, images=[]), "AUTH_FAILED"),
            (signed_v2(texts=[]), "INVALID_REQUEST"),
            (signed_v1(self.photos.photo("rocket.jpg")), "INTERNAL"),
            (signed_v1(self.photos.photo("hubble.jpg")), "INTERNAL"),
        ])  # fmt: skip
        return MixedJob(f"bad: {code}", job, has_failed(code))

    def cancelled(self, name: str) -> MixedJob:
        url = f"{self.photos.url}/held/{self.rng.choice(GOOD)}"
        job = signed_v2(images=[{"image_url": url}] * 3) if self.rng.random() < 0.5 else None
        right = lambda job: job["status"] == "CANCELLED"  # noqa: E731
        return MixedJob("cancelled", job or signed_v1(url), right, cancel=True)


@pytest.mark.timeout(180)
def test_a_thousand_mixed_jobs_get_one_right_reply_each(tmp_path):
    rng = random.Random(20261124)
    with PhotoServer() as photos, EmulatorServer() as platform:
        mixture = Mixture(photos, rng)
        jobs = [mixture.draw(n) for n in range(1000)]
        env = plain_env(tmp_path, **platform.worker_env(), MAX_CONCURRENCY="64")
        with WorkerProcess(env, FAKE) as worker:
            canceller = threading.Thread(target=cancel_all, args=(platform, jobs), daemon=True)
            for job in jobs:
                job.id = platform.submit(job.input)
            canceller.start()
            states = platform.wait([job.id for job in jobs], 120)
            canceller.join(30)
            wrong = [(w.kind, s) for w, s in zip(jobs, states, strict=True) if not w.right(s)]
            platform.until(lambda state: not busy(state), 10, "jobs are still running")
        replies = {job.id: platform.job(job.id).replies for job in jobs}

    assert wrong == []
    assert not platform.queue.strays
    assert {replies[job.id] for job in jobs if not job.cancel} == {1}
    assert {replies[job.id] for job in jobs if job.cancel} <= {0, 1}
    kinds = Counter(job.kind.split(":")[0] for job in jobs)
    assert min(kinds.values()) >= 60 and len(kinds) == 6, kinds
    assert "Traceback" not in worker.stderr and SECRET not in worker.stderr + worker.stdout


def cancel_all(platform: EmulatorServer, jobs: list[MixedJob]) -> None:
    """Cancel the jobs that are to be cancelled, most of them while they are in progress."""
    waiting = {job.id: n for n, job in enumerate(jobs) if job.cancel}
    deadline = time.monotonic() + 100
    while waiting and time.monotonic() < deadline:
        for job_id, n in list(waiting.items()):
            if n % 3 == 0 or platform.job(job_id).status == "IN_PROGRESS":
                platform.cancel(job_id)
                del waiting[job_id]
        time.sleep(0.1)


def busy(state) -> bool:
    return any(job.status == "IN_PROGRESS" for job in state.jobs.values())
