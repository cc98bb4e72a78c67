"""A complete worker with a fake model, for rows that go through the whole handler."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Network
from typing import Any

from fake_worker import FakeEmbedder, FakeText, PixelEmbedder
from rows_auth import Kit

from heimdex_clip_worker.auth import Keyring
from heimdex_clip_worker.contract import decode_vector
from heimdex_clip_worker.errors import error_table
from heimdex_clip_worker.handler import Authenticator, Worker
from heimdex_clip_worker.model.photos import PHOTOS
from heimdex_clip_worker.serving.children import Children
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.download import AddressPolicy, Fetcher, FetchLimits
from heimdex_clip_worker.serving.pipeline import Pipeline

CODES = frozenset(error_table())
SECRETS = re.compile(r"hostile-rows|[0-9a-f]{64}|token=|t0k3n|Traceback|File \"")


class Canned(Fetcher):
    """A fetcher without a network: every URL holds the same bytes."""

    def __init__(self, data: bytes, after: Callable[[], Any] | None = None):
        super().__init__(FetchLimits(), AddressPolicy())
        self.data, self.after, self.count = data, after, 0  # fetches so far

    async def __aenter__(self) -> Canned:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing is open."""

    async def fetch(self, url: str) -> bytes:
        self.count += 1
        if self.after:
            await self.after()
        return self.data


class Unresolved(Fetcher):
    """The real fetcher, over a resolver that records the names and knows none of them."""

    def __init__(self, limits: FetchLimits | None = None):
        super().__init__(limits or FetchLimits(timeout_s=5), AddressPolicy(), resolve=self.resolve)
        self.names: list[str] = []

    async def resolve(self, host: str) -> list[str]:
        self.names.append(host)
        raise OSError("no name is known here")


def photo(name: str = "chelsea.jpg") -> bytes:
    """Read a photograph's file."""
    return (PHOTOS / name).read_bytes()


def keyring(kit: Kit) -> Keyring:
    """Make a keyring of the keys that a kit signs with."""
    return Keyring(
        kit.v1_secret,
        kit.keys,
        audience=kit.audience,
        window_s=kit.window_s,
        max_lifetime_s=kit.max_lifetime_s,
    )


def make_worker(
    kit: Kit,
    fetcher: Fetcher,
    *,
    embedder: Any = None,
    on_fatal: Callable[[], None] = lambda: None,
    limits: PixelLimits | None = None,
    selftest: bool = True,
    max_batch: int = 64,
    decode_workers: int | None = None,  # None: as many as there are CPUs
    processes: bool = False,  # whether child processes fetch and decode
) -> Worker:
    """Make a worker whose clock stands at the kit's time."""
    embedder = embedder or (PixelEmbedder if processes else FakeEmbedder).load("ViT-B-32")
    limits, decode_workers = limits or PixelLimits(), decode_workers or os.cpu_count() or 1
    children = Children.fork() if processes else None
    if children:
        children.open(decode_workers + 1, embedder, fetcher.limits, fetcher.policy, limits)
    pipeline = Pipeline(
        embedder,
        fetcher,
        limits,
        decode_workers=decode_workers,
        children=children,
        max_batch=max_batch,
        load_text=FakeText.load,
    )
    authenticator = Authenticator(keyring(kit), clock=lambda: kit.now + 0.25)
    return Worker(authenticator, pipeline, selftest=selftest, on_fatal=on_fatal)


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[Worker]:
    """Close the worker's connections and threads at the end of the block."""
    try:
        yield worker
    finally:
        await worker.pipeline.close()


def loopback() -> AddressPolicy:
    """Make a policy that allows the servers of this machine."""
    return AddressPolicy(allowed_networks=(IPv4Network("127.0.0.0/8"),))


def code_of(reply: dict[str, Any]) -> str:
    """Check a reply's form; return its code, or OK for vectors, or SELFTEST for a self-test."""
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
