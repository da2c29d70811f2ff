"""Queries in, ranked passages out: the retriever interface, its indexes, the server and its client."""

from data.objects.moved import find_moved_modules

find_moved_modules()
