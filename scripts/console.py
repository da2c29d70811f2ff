"""Bars with rate and ETA, tables, and the line of a training step, for terminals.

Bars are drawn on stderr, one below the other, with what is logged above them. Where stderr is no terminal, or
one whose cursor cannot move (TERM=dumb), a bar is a log line a minute instead.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from data.progress import Track

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_log = logging.getLogger(__name__)
_LOG_SECONDS = 60.0
_WIDEST_BAR, _NARROWEST_BAR, _NARROWEST_TITLE = 40, 8, 8
_WIDE = 10_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Bar:
    """Progress of some work. The rate leaves out what was `done` before; None: the first move tells it."""

    def __init__(
        self,
        title: str,
        total: float | None = None,
        done: float | None = 0,
        unit: Literal["count", "bytes"] = "count",
    ) -> None:
        self.title, self.total, self.done, self.unit = visible(title), total, done or 0, unit
        self._before = done
        self.began = time.monotonic()

    def begin(self, done: float, seconds: float = 0) -> None:
        """Take the rate from here on, or from so many seconds ago."""
        self._before, self.began = done, time.monotonic() - seconds

    @property
    def begun(self) -> bool:
        """Return whether it is known what was done before."""
        return self._before is not None

    def move(self, done: float, total: float | None = None) -> None:
        """Set how much is done, and of how much where that is known only now."""
        if not self.begun:
            self.begin(done)
        self.done, self.total = done, self.total if total is None else total

    def figures(self, now: float) -> list[str]:
        """Return how much is done, the time left (or gone), the rate: the most important first.

        37 of 100 after 10 s -> ["37/100", "ETA 0:17", "3.7/s"]
        """
        count = self._amount(self.done) if self.done or self.total is not None else ""
        count += "" if self.total is None else f"/{self._amount(self.total)}"
        since = self.done - (self.done if self._before is None else self._before)
        seconds = now - self.began
        rate = since / seconds if seconds > 0 and since > 0 else None
        if rate is None:
            return [*filter(None, [count]), clock(seconds)]
        left = None if self.total is None or self.done >= self.total else (self.total - self.done) / rate
        return [count, clock(seconds) if left is None else f"ETA {clock(left)}", self._rate(rate)]

    def _amount(self, value: float) -> str:
        from rich.filesize import decimal

        return decimal(int(value)) if self.unit == "bytes" else f"{value:,.0f}"

    def _rate(self, rate: float) -> str:
        """[0.05, 3.71, 1234] -> "20.0 s each", "3.7/s", "1,234/s" """
        if self.unit == "bytes" or rate >= 100:
            return f"{self._amount(rate)}/s"
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"

    def line(self, width: int) -> RenderableType:
        """Title, bar and figures in one line; what has no room is left out, the bar first."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        figures = self.figures(time.monotonic())
        while len(figures) > 1 and len(self.title) + len("  ".join(figures)) + 2 > width:
            figures.pop()
        said = "  ".join(figures)
        room = width - len(said) - 2  # for the title, and for the bar before it
        across = min(_WIDEST_BAR, room - len(self.title) - 2)
        cells: list[RenderableType] = [Text(said[:width], no_wrap=True)]
        if across >= _NARROWEST_BAR:
            cells.insert(0, ProgressBar(self.total, self.done, across, pulse=self.total is None))
        if room >= min(len(self.title), _NARROWEST_TITLE):
            title = self.title if len(self.title) <= room else f"{self.title[: room - 1]}…"
            cells.insert(0, Text(title, no_wrap=True))
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        line.add_row(*cells)
        return line


_bars: list[Bar] = []  # those of the moment, the outermost first
_live: list[Live] = []  # their display, where they are drawn
_last_line = [0.0]  # when a line last told how far a work is


@contextmanager
def bar(
    title: str,
    total: float | None = None,
    done: float | None = 0,
    unit: Literal["count", "bytes"] = "count",
    stays: bool = True,
) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs; yields what moves it. Unless inside another it `stays` to be read."""
    with _showing(Bar(title, total, done, unit), stays) as move:
        yield move


@contextmanager
def _showing(shown: Bar, stays: bool = True) -> Iterator[Callable[..., None]]:
    _bars.append(shown)
    try:
        if _live:
            _live[0].refresh()
            yield shown.move
        elif can_draw():
            with _display(stays):
                yield shown.move
        else:
            yield partial(_move_and_log, shown)
    finally:
        if shown in _bars:
            _bars.remove(shown)


def _move_and_log(moved: Bar, done: float, total: float | None = None) -> None:
    """Move a bar that cannot be drawn; log how far it is after a minute in which no line has told."""
    moved.move(done, total)
    if time.monotonic() - max(moved.began, _last_line[0]) >= _LOG_SECONDS:
        _last_line[0] = time.monotonic()
        _log.info("%s: %s", moved.title, "  ".join(moved.figures(time.monotonic())))


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show how long something takes that has no parts to count."""
    with bar(title, stays=False):
        yield


@contextmanager
def going_on(out: object, kept: str = "what is done is kept") -> Iterator[None]:
    """Say at Ctrl-C what is kept in `out`, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {kept} in {out}: start the same command again to go on"
        ) from None


def end_bars() -> None:
    """Take down what an error has left drawn, so that what is printed next is the last of it."""
    for live in _live:
        live.stop()
    _live.clear()
    _bars.clear()


def track(title: str) -> Track:
    """Return what passes items on under a bar."""
    return Track(title, bar)


class StepLines:
    """Prints a line for each step of a training: how far it is, some of its metrics, the time left.

    shown: how metrics are written, {"time/step_seconds": "{:.1f} s"}; where a step has none of them, all that
    it has is. On a terminal the last parts go where the line would be wrapped.
    """

    def __init__(self, shown: Mapping[str, str], steps: int | None = None) -> None:
        self._shown, self._steps = shown, Bar("", steps, done=None)

    @contextmanager
    def bar(self, title: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Show a bar of the steps, which each line moves; yields what is told the step and their number."""
        self._steps.title, self._steps.done = title, done
        with _showing(self._steps) as move:
            yield move

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a step; time/step_seconds, where it is there, counts in the time left."""
        if not self._steps.begun and (seconds := metrics.get("time/step_seconds")):
            self._steps.begin(step - 1, seconds)
        self._steps.move(step)
        count = f"{step:,}/{self._steps.total:,}" if self._steps.total else f"{step:,}"
        parts = [form.format(metrics[key]) for key, form in self._shown.items() if key in metrics]
        parts = parts or [f"{key} {value:.4g}" for key, value in metrics.items()]
        parts = [f"step {count}", *parts, *self._left()]
        while len(parts) > 1 and len("  ".join(parts)) >= _columns():
            parts.pop()
        say("  ".join(parts))

    def _left(self) -> list[str]:
        return [each for each in self._steps.figures(time.monotonic()) if each.startswith("ETA")]


def say(line: str) -> None:
    """Print a line on stderr: a sign of life, which puts off the next one of a bar that is not drawn."""
    _last_line[0] = time.monotonic()
    print(visible(line), file=_Enduring(sys.stderr), flush=True)


def _columns() -> int:
    from rich.console import Console

    return Console(stderr=True).width if sys.stderr.isatty() else _WIDE


def stdout_console(width: int | None = None, **options: Any) -> Console:
    """Return a console of stdout, `width` wide where that is no terminal; a closed pipe is an error."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end the process

    return Piped(width=None if sys.stdout.isatty() else width, **options)


def can_draw() -> bool:
    """Return whether stderr is a terminal whose lines can be drawn anew."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")


@contextmanager
def _display(stays: bool) -> Iterator[None]:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(file=_Enduring(sys.stderr), force_terminal=True)  # type: ignore[arg-type]

    def draw() -> RenderableType:
        return Group(*(each.line(console.width - 1) for each in list(_bars)))

    # stdout goes through the display only where both are the terminal: a pipe is to get its own lines.
    with (
        Live(
            console=console,
            transient=not stays,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            get_renderable=draw,
        ) as live,
        _handlers_write_above(),
    ):
        _live.append(live)
        try:
            yield
        finally:
            _live.clear()


class _Enduring:
    """A stream whose terminal may go away: that somebody closes a window does not end the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _handlers_write_above() -> Iterator[None]:
    """Let the log handlers that hold the terminal's stderr write above the bars meanwhile."""
    above, terminal = sys.stderr, getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for each in loggers for handler in getattr(each, "handlers", ())}
    moved = [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream is terminal]
    for handler in moved:
        handler.setStream(above)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(terminal)


def clock(seconds: float) -> str:
    """[17.2, 3700, 1000000] -> "0:17", "1:01:40", "11d 13h" """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def visible(text: str) -> str:
    """The text without characters that would steer a terminal: whatever it says, it is only read."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout: figures to the right, text to the left; "" heads a note.

    Only notes are wrapped. Where the terminal is too narrow for that, a row is a block of lines instead: no
    figure is ever cut. What is no terminal is as wide as the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells = [[visible(str(cell)) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        widest = max(cell_len(row[number]) for row in [columns, *cells]) if name else None
        figures = number and name and all(re.match(r"[-+–.\d\[]|nan|$", row[number]) for row in cells)
        table.add_column(Text(name), justify="right" if figures else "left", min_width=widest)
    for row in cells:
        table.add_row(*map(Text, row))
    console = stdout_console(_WIDE)
    needed = Measurement.get(console, console.options.update(width=_WIDE), table).minimum
    if title:
        console.print(Text(visible(title)), soft_wrap=True)
    if needed <= console.width:
        console.print(table)
        return
    for row in cells:
        for name, cell in zip(columns, row, strict=True):
            if not cell and name:
                continue
            console.print(Text(f"{name}: {cell}" if name else cell), soft_wrap=True)
        console.print()
