"""A question in, a trajectory out. Sees of `retriever_server` only the client, the wire and the interface."""

from data.objects.moved import find_moved_modules

find_moved_modules()
