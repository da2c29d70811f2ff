"""The algorithm as pure functions in tables: presets, advantages, losses, credit, rewards."""

from data.objects.moved import take_name


def __getattr__(name: str) -> object:
    return take_name(__name__, name, ("AlgorithmConfig",))
