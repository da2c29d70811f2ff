"""Learn from a batch of trajectories: packing, log-probabilities, updates, processes."""

from data.objects.moved import take_name


def __getattr__(name: str) -> object:
    return take_name(__name__, name, ("Learner",))
