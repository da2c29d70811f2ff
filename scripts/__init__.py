"""Command lines: parse, wire, call. The only floor that prints."""

from data.objects.moved import find_moved_modules

find_moved_modules()
