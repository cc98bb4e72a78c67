"""A stand-in for `torch.cuda` on a CPU that does everything as late as CUDA allows.

What is given to a stream is not done until something waits for it: an event, another stream, or an
operation whose result is needed. So a program that reads a result too early, or overwrites memory
that a copy has yet to read, gets wrong numbers here every time, and not once in a thousand batches.

The names are those of `torch.cuda`. Copies with `Tensor.copy_` are put off, and replays of a graph;
every other operation first lets its stream do all that it was given. A graph records the operations
in it, and a replay does them again with the same memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_VIEWS = {torch.Tensor.__getitem__, torch.Tensor.unbind, torch.Tensor.__len__}
_thread = threading.local()
failures: deque[BaseException | None] = deque()  # of the next copies; None: that one succeeds


class Stream:
    """Work that is done in its order, as late as possible."""

    def __init__(self, device: Any = None):
        self._work: deque[Callable[[], object]] = deque()
        self.given = self.done = 0
        self._lock = threading.RLock()

    def give(self, work: Callable[[], object]) -> None:
        """Put off some work."""
        with self._lock:
            self._work.append(work)
            self.given += 1

    def do(self, number: int) -> None:
        """Do the first `number` pieces of work."""
        with self._lock:
            while self.done < number:
                work = self._work.popleft()
                self.done += 1
                with torch._C.DisableTorchFunction(), torch.inference_mode():
                    work()

    def synchronize(self) -> None:
        """Do everything."""
        self.do(self.given)

    def wait_event(self, event: Event) -> None:
        """Let the work that is given from now on wait for what is before the event."""
        if event.mark:
            stream, number = event.mark
            self.give(partial(stream.do, number))


class Event:
    """A place in a stream."""

    def __init__(self, blocking: bool = False):
        self.mark: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        """Mark where the stream is now."""
        self.mark = stream, stream.given

    def synchronize(self) -> None:
        """Wait for what is before the mark."""
        if self.mark:
            stream, number = self.mark
            stream.do(number)


class _PuttingOff(TorchFunctionMode):
    """Gives the copies of a block to a stream."""

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.copy_ and not is_recording():
            if failures and (error := failures.popleft()):
                raise error
            self.stream.give(partial(func, *args))
            return args[0]
        if func not in _VIEWS:
            self.stream.synchronize()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def stream(stream: Stream) -> Iterator[None]:
    """Give the copies of the block to a stream."""
    before, _thread.stream = current_stream(), stream
    try:
        with _PuttingOff(stream):
            yield
    finally:
        _thread.stream = before


class CUDAGraph:
    """Operations that were recorded."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        """Give the operations to the stream of the block."""
        self.replays += 1
        _thread.stream.give(self._again)

    def _again(self) -> None:
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        def keep(old: Any, new: Any) -> None:
            if isinstance(old, torch.Tensor):
                made[id(old)] = new
            elif isinstance(old, (list, tuple)):
                for one, other in zip(old, new, strict=True):
                    keep(one, other)

        for func, args, kwargs, result in self.operations:
            keep(result, func(*tree_map(now, args), **tree_map(now, kwargs)))


class _Recording(TorchDispatchMode):
    """Keeps every operation of a block."""

    def __init__(self, graph: CUDAGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, result))
        return result


@contextlib.contextmanager
def graph(
    cuda_graph: CUDAGraph,
    pool: object = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Record what the block does; after an error the thread's stream stays, as torch leaves it."""
    stream.synchronize()
    before, _thread.stream, _thread.recording = current_stream(), stream, True
    try:
        with _Recording(cuda_graph):
            yield
    finally:
        _thread.recording = False
    _thread.stream = before


def is_recording() -> bool:
    """True if this thread records a graph."""
    return getattr(_thread, "recording", False)


def current_stream() -> Stream | None:
    """Get the stream of this thread; None: the default one."""
    return getattr(_thread, "stream", None)


def graph_pool_handle() -> object:
    """Make a pool of memory for graphs."""
    return object()


def synchronize(device: Any = None) -> None:
    """Wait for the device: there is nothing outside the streams."""


def memory_reserved(device: Any = None) -> int:
    """Tell how much of the device's memory is taken."""
    return 0
