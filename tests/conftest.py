"""What the tests share: the seeded hub, an embedder loaded from it, and a server of photographs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests are imported by name


def pytest_configure(config: pytest.Config) -> None:
    """Keep the hub library off the network; it reads this when it is first imported."""
    if not config.getoption("--weights"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup; a backfill respects that
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """Give the package's log back to pytest, after a command or a worker has set it up."""
    log = logging.getLogger("heimdex_clip_worker")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt this process and those it starts, also where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def seeded_hub() -> Path:
    """The hub cache with seeded weights for the tag `openai`."""
    import seeded

    return seeded.seeded_hub()


@pytest.fixture(scope="module")
def photos() -> Iterator[object]:
    """A server of the package's photographs, on this machine."""
    from local_worker import PhotoServer

    with PhotoServer() as server:
        yield server


@pytest.fixture(scope="session")
def embedder(seeded_hub: Path) -> object:
    """ViT-B-32 as exact as it gets, loaded once through the real path of the tag `openai`."""
    from heimdex_clip_worker.model.image import Embedder

    exact = {"device": "cpu", "precision": "fp32", "preprocess": "exact"}
    return Embedder.load("ViT-B-32", "openai", **exact, cache_dir=str(seeded_hub))
