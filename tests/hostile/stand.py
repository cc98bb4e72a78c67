"""A worker with all of its parts but the weights, for rows that go through the whole handler."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from fake_worker import FakeEmbedder, FakeText
from rows_auth import Kit

import heimdex_clip_worker
from heimdex_clip_worker.auth import Keyring
from heimdex_clip_worker.batch import Downloads, Pipeline
from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.decode import PixelLimits
from heimdex_clip_worker.download import Fetcher, Limits, Policy
from heimdex_clip_worker.errors import error_table
from heimdex_clip_worker.handler import Door, Service, Worker

PHOTOS = Path(heimdex_clip_worker.__file__).with_name("photos")
CODES = frozenset(error_table())
SECRETS = re.compile(r"hostile-rows|[0-9a-f]{64}|token=|t0k3n|Traceback|File \"")


class Canned(Downloads):
    """Downloads without a network: every URL holds the same bytes."""

    def __init__(self, data: bytes, after: Callable[[], Any] | None = None):
        super().__init__(Limits(), Policy())
        self.data, self.after, self.asked = data, after, 0

    async def fetch(self, url: str) -> bytes:
        self.asked += 1
        if self.after:
            await self.after()
        return self.data

    async def close(self) -> None:
        """Nothing is open."""


class Asking(Downloads):
    """The real Fetcher, over a resolver that writes down who asked and knows nobody."""

    def __init__(self, limits: Limits | None = None):
        super().__init__(limits or Limits(timeout_s=5), Policy())
        self.names: list[str] = []

    async def _keep_open(self, ready: Any) -> None:
        async def resolve(host: str) -> list[str]:
            self.names.append(host)
            raise OSError("nobody is known here")

        async with Fetcher(self.limits, self.policy, resolve=resolve) as fetcher:
            ready.set_result(fetcher)
            await ready.get_loop().create_future()


def photo(name: str = "chelsea.jpg") -> bytes:
    """Return a photograph's file."""
    return (PHOTOS / name).read_bytes()


def keyring(kit: Kit) -> Keyring:
    """Return the keys that a kit signs with."""
    return Keyring(
        kit.v1_secret,
        kit.keys,
        audience=kit.audience,
        window_s=kit.window_s,
        max_lifetime_s=kit.max_lifetime_s,
    )


def make_worker(
    kit: Kit,
    downloads: Downloads,
    *,
    embedder: Any = None,
    on_fatal: Callable[[], None] = lambda: None,
    limits: PixelLimits | None = None,
    selftest: bool = True,
    max_batch: int = 64,
) -> Worker:
    """Return a worker whose clock stands at the kit's time."""
    pipeline = Pipeline(
        embedder or FakeEmbedder.load("ViT-B-32"),
        downloads,
        limits or PixelLimits(),
        decode_workers=os.cpu_count() or 1,
        max_batch=max_batch,
        load_text=FakeText.load,
    )
    door = Door(keyring(kit), clock=lambda: kit.now + 0.25)
    return Worker(Service(door, pipeline, selftest=selftest), on_fatal=on_fatal)


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[Worker]:
    """Close what the worker opened, its threads too, when the block is left."""
    try:
        yield worker
    finally:
        await worker.service.pipeline.close()


def loopback() -> Policy:
    """Return a policy under which servers of this machine can be reached."""
    return Policy(allowed_networks=(IPv4Network("127.0.0.0/8"),))


def code_of(reply: dict[str, Any]) -> str:
    """Check a reply's form; return its code: OK for a vector or many results, SELFTEST for that."""
    text = json.dumps(reply, allow_nan=False, ensure_ascii=False).encode().decode()
    assert not SECRETS.search(text), text[:300]
    if "results" in reply:
        codes = [code_of(result) for result in reply["results"]]
        assert (reply["count"], reply["failed"]) == (len(codes), len(codes) - codes.count("OK"))
        assert not reply.keys() & {"error", "code"}
        return "OK"
    if "embedding" in reply:
        assert not reply.keys() & {"error", "code"}
        assert len(decode_vector(reply["embedding"])) == reply["dim"]
        assert all(type(value) is float for value in decode_vector(reply["embedding"]))
        return "OK"
    if "selftest" in reply:
        known = "request_id selftest dim model pretrained space_id cosine timings"
        assert reply.keys() == set(known.split()) and reply["selftest"] == "ok"
        assert all(type(value) is float for value in reply["timings"].values())
        return "SELFTEST"
    assert reply["code"] in CODES
    assert type(reply["error"]) is str and type(reply["retryable"]) is bool
    assert reply.keys() <= {"error", "code", "retryable", "request_id", "refresh_worker"}
    return reply["code"]
