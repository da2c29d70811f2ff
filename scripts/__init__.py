"""Command lines: parse, wire, call. The only floor that prints."""

from data.moved import find_moved_modules

find_moved_modules()
