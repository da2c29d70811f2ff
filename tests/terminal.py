"""A terminal to run commands in: a pseudo-terminal, and an emulator (pyte) that says what a person sees."""

from __future__ import annotations

import codecs
import fcntl
import gc
import logging
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyte

from scripts import __main__ as sleuth

LINES = 400
SETTINGS = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Terminal:
    """The picture of a terminal of so many columns, once `attached` is over."""

    def __init__(self, columns: int, term: str = "xterm-256color") -> None:
        self.columns, self.term, self.raw = columns, term, ""
        self._master = -1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the terminal in the place of this process's stdin, stdout and stderr, and of its log."""
        gc.collect()  # asyncio complains of a failed task of an earlier test when it is collected: not here
        self._master, slave = pty.openpty()
        self.resize(self.columns)
        saved = [os.dup(fd) for fd in range(3)], sys.stdout, sys.stderr, logging.root.handlers
        environment = {name: os.environ.pop(name, None) for name in (*SETTINGS, "TERM")}
        os.environ["TERM"] = self.term
        for fd in range(3):
            os.dup2(slave, fd)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(slave), "w", 1, "utf-8") for _ in range(2))
        logging.root.handlers = []
        reader = threading.Thread(target=self._read)
        reader.start()
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            fds, sys.stdout, sys.stderr, logging.root.handlers = saved
            for fd, old in enumerate(fds):
                os.dup2(old, fd)
                os.close(old)
            os.environ.pop("TERM")
            os.environ.update({name: value for name, value in environment.items() if value is not None})
            os.close(slave)
            reader.join()
            os.close(self._master)

    def resize(self, columns: int) -> None:
        """Make the window this wide."""
        self.columns = columns
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def run(self, *arguments: object) -> int:
        """The exit status of `sleuth ARGUMENTS` in this terminal."""
        with self.attached():
            return sleuth.main([str(argument) for argument in arguments])

    @property
    def lines(self) -> list[str]:
        """The lines that it shows in the end, were it as high as needed, down to the cursor's."""
        screen = pyte.Screen(self.columns, LINES)
        pyte.Stream(screen).feed(self.raw)
        assert not screen.cursor.hidden
        return [line.rstrip() for line in screen.display[: screen.cursor.y + 1]]

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end within a character
        with suppress(OSError):  # EIO once nobody has the other end open
            while piece := os.read(self._master, 1 << 16):
                self.raw += decoder.decode(piece)
