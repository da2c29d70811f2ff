"""The scripted engine: says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agent.engines.base import Completion, Engine, FinishReason, Sampling
from agent.engines.sampling import StopFinder
from agent.trajectory import Picture


class ScriptedEngine(Engine):
    """Writes the next turn of a script for each trajectory, cut at stop strings like a real engine.

    script: the turns of every trajectory, or a function of the text so far to the next turn.
    Log-probs are -1.0 a token. After the last turn of a script the last one is repeated.
    """

    shares_model = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, script: Sequence[str] | Callable[[str], str]
    ) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.weights_version = 0
        self.prompts: list[list[int]] = []
        self.released: list[str] = []
        self._turns: dict[str, int] = {}

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        trajectory_id: str,
        pictures: Sequence[Picture] = (),
    ) -> Completion:
        """The next scripted turn, up to its first stop string or `max_tokens`."""
        self.prompts.append(list(prompt_ids))
        turn = self._turns[trajectory_id] = self._turns.get(trajectory_id, -1) + 1
        if callable(self.script):
            text = self.script(str(self.tokenizer.decode(prompt_ids)))
        else:
            text = self.script[min(turn, len(self.script) - 1)]
        token_ids, reason = self._until_stop(text, sampling)
        return Completion(token_ids, [-1.0] * len(token_ids), reason, self.weights_version)

    def _until_stop(self, text: str, sampling: Sampling) -> tuple[list[int], FinishReason]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        finder, stream = StopFinder(self.tokenizer), _Stream(sampling)
        for token in ids[: sampling.max_tokens]:
            stream.new_ids.append(token)
            if finder.found(stream, token):
                return stream.new_ids, FinishReason.STOP
        cut = len(ids) > sampling.max_tokens
        return stream.new_ids, FinishReason.LENGTH if cut else FinishReason.STOP

    async def release(self, trajectory_id: str) -> None:
        """Note that the trajectory is over."""
        self.released.append(trajectory_id)

    async def update_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        """Only the version changes."""
        self.weights_version = version


class _Stream:
    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.new_ids, self.tail = sampling, [], ""
