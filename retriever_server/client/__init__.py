"""The asynchronous search client, what goes over the wire, and the servers behind a URL."""

from data.objects.moved import take_name


def __getattr__(name: str) -> object:
    return take_name(__name__, name, ("SearchClient", "connect"))
