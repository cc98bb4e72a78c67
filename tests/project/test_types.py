"""Type checkers accept a caller's correct script, and point at the mistakes in a wrong one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CORRECT = """
import asyncio

from typing_extensions import assert_type

from heimdex_clip_worker.client import AsyncClipClient, ClipClient, Health, ImageResult, ItemFailure
from heimdex_clip_worker.client import TextResult
from heimdex_clip_worker.errors import (
    ClipInferenceAuthError,
    ClipInferenceError,
    ClipInferenceNetworkError,
    ClipInferenceSetupError,
    ClipInferenceTimeoutError,
)

URL = "https://abc.supabase.co/storage/v1/object/sign/scenes/1.jpg?token=t"


class OwnClient(ClipClient):
    def embed_scene(self, url: str) -> list[float]:
        return self.embed_image_url(url)["embedding"]


def sign_url() -> str:
    return URL


def show_progress(done: int, failed: int) -> None:
    print(done, failed)


def main() -> None:
    assert_type(ClipClient.from_env(), ClipClient)
    with OwnClient.from_env() as own:
        assert_type(own, OwnClient)
        assert_type(own.embed_scene(URL), list[float])
    with ClipClient.from_env() as client:
        assert_type(client, ClipClient)
        assert_type(client.embed_image_url(URL), ImageResult)
        assert_type(client.embed_texts([""]), list[TextResult | ItemFailure])
        one: ImageResult = client.embed_image_url(URL, request_id="scene-1", normalize=False)
        vector: list[float] = one["embedding"]
        late = client.embed_image_url(sign_url)["space_id"] == client.space_id
        truncated: bool = client.embed_text("a red car in the rain")["truncated"]
        rows = [{"image_url": url, "request_id": "a"} for url in (URL, URL)]
        results: list[ImageResult | ItemFailure] = client.embed_image_batch(rows, show_progress)
        for result in results:
            if "error" in result:
                code: str = result["code"]
                print(result["request_id"], code, result["retryable"])
            else:
                vector += result["embedding"]
        for text in client.embed_texts(["a cat", "a dog"]):
            print(text.get("error", "fine"))
        client.embed_image_batch([{"image_url": sign_url, "normalize": True}])
        health: Health = client.health_check()
        print(health["status"] == "ready", health["workers"]["idle"], health["message"])
        print(late, truncated)
    with OwnClient.from_env({"RUNPOD_API_KEY": "k"}, parallel=2, timeout_s=30) as own:
        own.embed_scene(URL)


async def main_async() -> None:
    async with AsyncClipClient.from_env() as client:
        assert_type(client, AsyncClipClient)
        assert_type(await client.embed_text(""), TextResult)
        calls = [client.embed_image_url(URL), client.embed_image_url(sign_url)]
        print([result["dim"] for result in await asyncio.gather(*calls)])
        print((await client.embed_text("a cat"))["truncated"])
        for result in await client.embed_image_batch([{"image_url": URL}], show_progress):
            print(result["code"] if "error" in result else result["embedding"])
        print(await client.embed_texts(["a cat"]), (await client.health_check())["jobs"])


try:
    main()
    asyncio.run(main_async())
except (ClipInferenceAuthError, ClipInferenceSetupError) as error:
    print(error.code)
except (ClipInferenceNetworkError, ClipInferenceTimeoutError) as error:
    print(error.retryable)
except ClipInferenceError as error:
    print(error.code, error.retryable, error.request_id)
"""

WRONG = """
from heimdex_clip_worker.client import AsyncClipClient, ClipClient

with ClipClient.from_env() as client:
    client.embed_image_url(7)  # arg-type
    client.embed_image_url("https://a/1.jpg", normalize="no")  # arg-type
    client.embed_image_url(lambda: 7)  # arg-type, return-value
    client.embed_text(["a cat"])  # arg-type
    client.embed_texts([7])  # list-item
    client.embed_image_batch(["https://a/1.jpg"])  # list-item
    client.embed_image_batch([], on_progress=lambda done: None)  # arg-type, misc
    client.embed_text("a cat")["vector"]  # typeddict-item
    client.embed_texts(["a cat"])[0]["embedding"]  # typeddict-item
    client.health_check()["status"] == "fine"  # comparison-overlap
    number: int = client.embed_image_url("https://a/1.jpg")["embedding"]  # assignment
    client.embed("a cat")  # attr-defined


async def main() -> None:
    async with AsyncClipClient.from_env() as client:
        client.embed_text("a cat")["dim"]  # index
        await client.embed_text(7)  # arg-type
"""


def check(script: Path) -> str:
    """Run mypy as strictly as it goes on a script that imports this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"MYPYPATH": str(ROOT)}
    config, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache")
    options = ["--strict", "--config-file", config, "--cache-dir", cache]
    command = [sys.executable, "-m", "mypy", *options, str(script)]
    run = subprocess.run(
        command, cwd=script.parent, env=env, capture_output=True, text=True, timeout=100
    )
    assert not run.stderr, run.stderr
    return run.stdout


def test_mypy_accepts_a_correct_script_and_the_modules_that_it_uses(tmp_path):
    script = tmp_path / "correct.py"
    script.write_text(CORRECT)
    assert check(script) == "Success: no issues found in 1 source file\n"


def test_mypy_points_at_each_mistake_of_a_wrong_script(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    expected = {
        number: set(line.partition("  # ")[2].split(", "))
        for number, line in enumerate(WRONG.splitlines(), 1)
        if "  # " in line
    }
    errors = re.findall(r"^wrong.py:(\d+): error: .*\[(.+)\]$", check(script), re.M)
    codes: dict[int, set[str]] = {}
    for line, code in errors:
        codes.setdefault(int(line), set()).add(code)
    assert codes == expected
