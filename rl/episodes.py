"""The search environment for trainers that sample the turns themselves: episodes of questions, and rewards.

`examples/openenv`, `examples/verifiers` and `examples/trl` give it to others in their own dialects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agent.protocol import Protocol, get_protocol
from agent.rollout import Agent, Elsewhere, Episode
from agent.trajectory import StopReason
from data.errors import RetrieverError, RunStopped
from data.questions import load_questions
from data.records import Question
from retriever_server.client.search_client import SearchClient, connect
from rl.algorithm.rewards import check_questions, combine
from rl.config import JudgeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SearchEpisodes:
    """Questions, a retriever, a protocol and rewards; `begin` one episode a trajectory."""

    def __init__(
        self,
        questions: str | Sequence[Question],
        retriever: str | SearchClient,
        tokenizer: str | PreTrainedTokenizerBase,
        protocol: str | Protocol = "hermes",
        rewards: Mapping[str, float] | None = None,
        judge: JudgeConfig | None = None,
        deadline_seconds: float = 60.0,
    ) -> None:
        """questions: as `data.questions.load_questions` takes them. retriever: a URL or an index folder.

        tokenizer: the policy's, or its folder: budgets count in its tokens. rewards: weights by name, as a
        recipe has them; em alone by default. Raises ConfigError or DataError.
        """
        rewards = rewards or {"em": 1.0}
        self._reward = combine(rewards, judge or JudgeConfig())
        self.questions = load_questions(questions) if isinstance(questions, str) else list(questions)
        check_questions(rewards, self.questions)
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        if isinstance(tokenizer, str):
            from agent.policy import load_tokenizer

            tokenizer = load_tokenizer(tokenizer)
        client = connect(retriever, deadline_seconds) if isinstance(retriever, str) else retriever
        self.agent = Agent(Elsewhere(), tokenizer, client, self.protocol)

    def begin(self, question: Question) -> Episode:
        """Begin an episode of one question; what the policy reads first is its `text`."""
        return Episode(self.agent, question)

    def prompt(self, question: Question) -> str:
        """Return the instruction as the user's message of a chat, without the chat template around it."""
        return self.agent.spoken.prompt(self.agent.sanitize(question.text))

    def message(self, episode: Episode) -> str:
        """Return what was read last as the content of a message, without the marks around it."""
        said = episode.text.removesuffix(self.agent.frame.opening(self.protocol))
        return re.sub(r"<\|im_(start|end)\|>(\n|assistant\n|user\n)?", "", said).strip()

    def reward(self, episode: Episode) -> float:
        """Return the weighted sum of the rewards of an episode.

        Raises RetrieverError where a search failed, RunStopped where a judge did: neither is a 0.
        """
        trajectory = episode.trajectory
        if trajectory.stop_reason is StopReason.SEARCH_FAILED:
            raise RetrieverError(str(trajectory.searches[-1].error))
        [reward] = self._reward([trajectory])
        if reward.error:
            raise RunStopped(f"no reward: {reward.error}")
        return reward.total
