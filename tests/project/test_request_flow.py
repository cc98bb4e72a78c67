"""`docs/how-a-request-flows.md` is true: one job passes the functions it names, in its order."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest
import torch
from fake_worker import FakeEmbedder
from local_worker import PhotoServer

import heimdex_clip_worker
from heimdex_clip_worker.auth import Keyring, sign
from heimdex_clip_worker.handler import Authenticator, Worker
from heimdex_clip_worker.model.image import Embedder
from heimdex_clip_worker.serving.decode import PixelLimits
from heimdex_clip_worker.serving.download import AddressPolicy, Fetcher, FetchLimits
from heimdex_clip_worker.serving.pipeline import Pipeline

pytestmark = [pytest.mark.model, pytest.mark.server]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-a-request-flows.md").read_text(encoding="utf-8")
PACKAGE = str(Path(heimdex_clip_worker.__file__).parent)
ROWS = re.findall(r"^\| (\d+) \| `([\w.]+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE)
NAMES = [name for _, name, _ in ROWS]
SECRET = "of-these-tests-4f1c9be27d03a856"


class Entered(NamedTuple):
    """A named function that was entered."""

    name: str
    callers: list[str]  # functions of the package on the stack, outermost first


class TowerEmbedder(FakeEmbedder):
    """The fake embedder with the real `encode`, which runs its tower."""

    encode = Embedder.encode


def code_of(name: str, module: str) -> CodeType:
    """Find the code of a function, by its name and its module within the package."""
    value: Any = importlib.import_module(f"{heimdex_clip_worker.__name__}.{module}")
    for part in name.split("."):
        value = getattr(value, part)
    return value.__code__


def package_functions(frame: FrameType | None) -> list[str]:
    """Name the functions of the package on the stack, outermost first."""
    names: list[str] = []
    while frame:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.insert(0, frame.f_code.co_name)
        frame = frame.f_back
    return names


@contextmanager
def traced(names: dict[CodeType, str]) -> Iterator[list[Entered]]:
    """Record when each of these functions is entered first, in all threads started meanwhile."""
    entered: dict[str, Entered] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name = names.get(frame.f_code) if event == "call" else None
        if name is not None and name not in entered:
            entered[name] = Entered(name, package_functions(frame.f_back))

    seen: list[Entered] = []
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        seen.extend(entered.values())


async def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Send a job to a worker that is real but for its model."""
    model = TowerEmbedder.load("ViT-B-32")
    pad = torch.nn.ConstantPad1d((0, model.dim - 5), 1.0)  # (N, 5) -> (N, dim)
    object.__setattr__(model, "tower", pad)
    loopback = AddressPolicy(allowed_networks=(IPv4Network("127.0.0.0/8"),))
    pipeline = Pipeline(model, Fetcher(FetchLimits(), loopback), PixelLimits(), decode_workers=1)
    keyring = Keyring(SECRET, {}, audience="heimdex-clip", window_s=120, max_lifetime_s=3600)
    try:
        return await Worker(Authenticator(keyring), pipeline).handle(job)
    finally:
        await pipeline.close()


@pytest.fixture(scope="module")
def entered() -> list[Entered]:
    """Send one job; record the functions of the page that it enters."""
    with PhotoServer() as photos, traced({code_of(n, m): n for _, n, m in ROWS}) as seen:
        url = photos.photo()
        auth = sign(url, secret=SECRET, ts=int(time.time()))
        reply = asyncio.run(answer({"input": {"image_url": url, "auth": auth}}))
    assert "embedding" in reply, reply
    return seen


def test_at_most_seven_functions_lie_between_a_job_and_its_reply() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, len(ROWS) + 1))
    assert 1 < len(ROWS) <= 7


def test_a_job_enters_them_in_the_order_of_the_page(entered: list[Entered]) -> None:
    assert [function.name for function in entered] == NAMES


def test_no_other_function_stands_between_them_on_the_event_loop(entered: list[Entered]) -> None:
    named = {name.rpartition(".")[2] for name in NAMES}
    on_the_loop = [function for function in entered if "handle" in function.callers]
    # authenticate, embed_item, embed_url, fetch
    assert len(on_the_loop) == 4
    own = {"_fetch"}  # a part of embed_url: it stops a download whose memory another job needs
    for function in on_the_loop:
        assert set(function.callers) <= named | own, function


def test_the_diagram_has_the_same_functions_in_the_same_order() -> None:
    diagram = PAGE.partition("```mermaid")[2].partition("```")[0]
    assert re.findall(r'\["(\d+) ([\w.]+)"\]', diagram) == [(n, name) for n, name, _ in ROWS]


def test_the_picture_has_the_same_functions_in_the_same_order() -> None:
    picture = (ROOT / "docs" / "images" / "flow.svg").read_text(encoding="utf-8")
    assert re.findall(r">(\d+) ([\w.]+)</text>", picture) == [(n, name) for n, name, _ in ROWS]


def test_every_function_and_class_on_the_page_exists() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(PACKAGE).rglob("*.py")]
    defined = {name for text in sources for name in re.findall(r"(?:def|class) (\w+)", text)}
    modules = {path.stem for path in Path(PACKAGE).rglob("*.py")}
    modules |= {path.parent.name for path in Path(PACKAGE).rglob("*.py")}
    quoted = re.findall(r"`([A-Za-z_][\w.]*)`", PAGE)
    words = {part for name in quoted for part in name.split(".") if not name.isupper()}
    known = defined | modules | {"refresh_worker"}
    assert sorted(words - known) == []
