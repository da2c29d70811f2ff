"""The interface of engines: token ids in, token ids and log-probs out.

An engine decodes only to find the stop strings. It keeps sampled ids whole: where a stop string ends
inside a token, that token stays as it was sampled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from data.errors import require, require_range

if TYPE_CHECKING:
    from torch import Tensor

    from agent.trajectory import Picture


@dataclass(frozen=True)
class Sampling:
    """Parameters of the sampling of one completion. `temperature=0` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    renormalise: bool = False
    """Give log-probs within what top_p and top_k leave, not within the whole vocabulary."""
    max_tokens: int = 500
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """Seed of this completion alone; None draws from the engine's generator."""

    def check(self) -> None:
        """Raise ConfigError for a value that means nothing."""
        require_range(self, "sampling.", ">= 0", "temperature", "top_k")
        require_range(self, "sampling.", ">= 1", "max_tokens")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")


class FinishReason(StrEnum):
    """The reason why a completion ended."""

    STOP = "stop"
    """A stop string, or the end-of-sequence token, was written."""
    LENGTH = "length"
    """`max_tokens` or the context of the model ran out."""


@dataclass(frozen=True)
class Completion:
    """Sampled tokens; `logprobs` of exactly these tokens under its `Sampling`, None where one was
    given instead of sampled."""

    token_ids: list[int]
    logprobs: list[float | None]
    finish_reason: FinishReason
    weights_version: int
    """Version of the weights of its first token, where new weights came in between: the oldest of all."""


class Engine(ABC):
    """Serves many trajectories at once; each awaits only its own completion."""

    shares_model: bool = False
    """True if it samples from the model in the trainer's memory. Then each process of a run has its own, and
    it stands still during an update. Else it is handed weights, by the leading process alone."""
    replicas: int = 1
    """Servers behind it: so many times more trajectories are kept alive."""
    weights_version: int = 0
    """Version of the weights that it samples with."""

    @abstractmethod
    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, trajectory_id: str, pictures: Sequence[Picture] = ()
    ) -> Completion:
        """Continue `prompt_ids`, all tokens of the trajectory so far; the id lets it keep its KV cache.

        pictures: those among the tokens, for a policy that reads images.
        """

    def watch(self, trajectory_id: str, tell: Callable[[list[int]], None]) -> None:  # noqa: B027
        """Tell the tokens of each of its completions as they grow, until its release.

        An engine that knows them only once they are whole tells nothing.
        """

    async def release(self, trajectory_id: str) -> None:  # noqa: B027 (an engine may keep nothing)
        """Forget the trajectory; its place is free for another."""

    @abstractmethod
    async def update_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        """Sample with new weights from here on; None: with those of the model as it is.

        Completions under way go on with the new weights. Raises EngineError where they cannot be loaded.
        """

    async def probe(
        self, prompts: Sequence[list[int]], sampling: Sampling
    ) -> Mapping[str, Sequence[Completion]]:
        """Complete the same prompts on each server: by its name, for the trainer to compare log-probs.

        {} where there is nothing to compare.
        """
        return {}

    async def close(self) -> None:  # noqa: B027 (an engine may hold nothing open)
        """Close connections, and end what was started for this engine."""
