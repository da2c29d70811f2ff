"""Progress of long work: told by the floors, shown by the command line (scripts/console.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Bar = Callable[..., AbstractContextManager[Callable[[int], object]]]
"""Shows some work while a `with` lasts: given its title, its total and what was done before. What the `with`
yields is then called with how much is done."""


@contextmanager
def no_bar(title: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A `Bar` that shows nothing."""
    yield lambda done: None


class Track:
    """Passes items on while a bar shows how many have been; `used` tells whether it was called for any.

    A range counts what its steps stand for: range(0, 100, 32) goes to 100.
    """

    def __init__(self, title: str, bar: Bar = no_bar) -> None:
        self.title, self.bar, self.used = title, bar, False

    def __call__(self, items: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        """Each item; `total` is their number where they have no length."""
        self.used = True
        begin, step = (items.start, items.step) if isinstance(items, range) else (0, 1)
        if isinstance(items, range):
            total = items.stop
        elif total is None and isinstance(items, Sized):
            total = len(items)
        with self.bar(self.title, total, begin) as move:
            for number, item in enumerate(items, start=1):
                yield item
                there = begin + number * step
                move(there if total is None else min(there, total))
