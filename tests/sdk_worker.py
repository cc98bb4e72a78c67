"""A small worker under the SDK's loop, for tests of the emulator: `python sdk_worker.py`.

A job's input controls it: `sleep` for some seconds, `exit` with a status, `fail` with a message,
return `large` characters, or `refresh` the worker. The output holds the id of the process.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Do what the input asks for."""
    job_input = job["input"]
    await asyncio.sleep(job_input.get("sleep", 0))
    if "exit" in job_input:
        os._exit(job_input["exit"])
    if "fail" in job_input:
        return {"error": job_input["fail"], "code": "TEST"}
    refreshing = {"refresh_worker": True} if job_input.get("refresh") else {}
    return {
        "echo": job_input.get("echo"),
        "pid": os.getpid(),
        "text": "x" * job_input.get("large", 0),
        **refreshing,
    }


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda current: 8})
