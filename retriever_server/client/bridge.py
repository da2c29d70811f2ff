"""Coroutines for callers that have no event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Value = TypeVar("_Value")


class Bridge:
    """An event loop in a thread of its own, which starts with the first call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, _Value]) -> _Value:
        """Return what the coroutine returns; raises as it does."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run the last coroutine, where any ran before it, and end the thread."""
        loop = self._loop
        if loop is None or not loop.is_running():
            last.close()
            return
        self.run(last)
        loop.call_soon_threadsafe(loop.stop)
