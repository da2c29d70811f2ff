"""The search environment for TRL's `environment_factory`, by `make_factory(...)` (docs/trl.md).

TRL renders the tools into the chat template and runs the loop; passages, limits and rewards are ours.
Written against TRL 1.16, whose `environment_factory` is experimental.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent.protocol import Answer
from agent.tools import Call, Search
from agent.trajectory import StopReason
from data.errors import ConfigError
from rl.episodes import SearchEpisodes

if TYPE_CHECKING:
    from datasets import Dataset

_OVER = "The question is over."


class ToolEnvironment:
    """One trajectory after the other: the public methods are the tools of the policy."""

    def __init__(self, episodes: SearchEpisodes) -> None:
        self._episodes = episodes
        self._by_id = {question.id: question for question in episodes.questions}

    def reset(self, question_id: str, **_: Any) -> None:
        """Begin with the question of a row."""
        self._episode = self._episodes.begin(self._by_id[question_id])

    async def search(self, query: str) -> str:
        """Find passages.

        Args:
            query: The words to search.
        """
        return await self._call(Search(query))

    async def answer(self, answer: str) -> str:
        """Give the final answer, in a few words.

        Args:
            answer: The answer.
        """
        return await self._call(Answer(answer))

    async def get_reward(self) -> float | None:
        """Return the reward; None, which TRL leaves out of the mean of the group, where a search failed."""
        if self._episode.outcome is StopReason.SEARCH_FAILED:
            return None
        return await asyncio.to_thread(self._episodes.reward, self._episode)

    async def _call(self, action: Call | Answer) -> str:
        if self._episode.outcome:
            return _OVER
        await self._episode.write(self._episodes.protocol.render_turn("", action))
        if self._episode.outcome:
            return _OVER
        tag = self._episodes.protocol.observation_tag
        return (
            self._episodes.message(self._episode).removeprefix(f"<{tag}>").removesuffix(f"</{tag}>").strip()
        )


def make_factory(episodes: SearchEpisodes) -> tuple[Callable[[], ToolEnvironment], Dataset]:
    """Return the `environment_factory` and the `train_dataset` of a GRPOTrainer."""
    from datasets import Dataset

    if len({question.id for question in episodes.questions}) < len(episodes.questions):
        raise ConfigError("questions: each must have an id of its own")
    asked = "Search as often as you need, then answer.\nQuestion: "
    prompts = [[{"role": "user", "content": asked + question.text}] for question in episodes.questions]
    ids = [question.id for question in episodes.questions]
    return lambda: ToolEnvironment(episodes), Dataset.from_dict({"prompt": prompts, "question_id": ids})
