"""A worker of a few lines under the SDK's loop, for tests of the platform: `python sdk_worker.py`.

It does what a job's input says: `sleep` so many seconds, `exit` with a status, `fail` with a
message, return `large` characters, ask for a `refresh` of the worker. The answer has its process.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Do as the input says."""
    asked = job["input"]
    await asyncio.sleep(asked.get("sleep", 0))
    if "exit" in asked:
        os._exit(asked["exit"])
    if "fail" in asked:
        return {"error": asked["fail"], "code": "TEST"}
    more = {"refresh_worker": True} if asked.get("refresh") else {}
    return {
        "echo": asked.get("echo"),
        "pid": os.getpid(),
        "text": "x" * asked.get("large", 0),
        **more,
    }


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda current: 8})
