"""What the batcher promises when many items come at the same moment."""

from __future__ import annotations

import asyncio
import threading

from heimdex_clip_worker.serving.batcher import Batcher
from heimdex_clip_worker.serving.watchdog import Watchdog


def test_a_batch_is_filled_when_the_model_is_free_not_before():
    batches: list[list[str]] = []
    begun, release = threading.Event(), threading.Event()

    def run(items: list[str]) -> list[str]:
        batches.append(items)
        begun.set()
        assert release.wait(30)
        return items

    async def both() -> None:
        batcher = Batcher(run, Watchdog().threads(1, "model"), max_batch=2)
        large = [asyncio.ensure_future(batcher.submit(f"l{i}", "large")) for i in range(6)]
        assert await asyncio.to_thread(begun.wait, 30)
        small = asyncio.ensure_future(batcher.submit("s", "small"))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*large, small)

    asyncio.run(both())
    assert batches == [["l0", "l1"], ["l2", "s"], ["l3", "l4"], ["l5"]]
