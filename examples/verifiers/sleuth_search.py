"""The search environment as a package of verifiers: `load_environment` finds it by the id "sleuth-search".

The environment plays the user: each turn of the policy is answered by what it finds, as a message. prime-rl
and whatever else trains on environments of verifiers takes it by that id. Written against verifiers 0.4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
from verifiers.v1.dialects.chat import message_to_wire  # pyright: ignore[reportMissingImports]

from rl.episodes import SearchEpisodes

__all__ = ["SearchEnv", "SearchTaskset", "TurnHarness"]


class SearchConfig(vf.TasksetConfig):
    """Arguments of `SearchEpisodes`."""

    questions: str = ""
    """A file, a folder or a data set, as `sleuth train` takes them."""
    retriever: str = ""
    """URL of a server, or an index folder."""
    tokenizer: str = ""
    """The policy's folder or name: budgets count in its tokens."""
    protocol: str = "hermes"
    rewards: dict[str, float] = {"em": 1.0}  # noqa: RUF012 (pydantic copies it)


class SearchData(vf.TaskData):
    """A question."""

    question: int
    """Place in the file."""


class SearchTask(vf.Task[SearchData]):
    """A question; what it earns is in SearchEnv.run."""


class SearchTaskset(vf.Taskset[SearchTask, SearchConfig]):
    """Return the questions of a file."""

    @property
    def episodes(self) -> SearchEpisodes:
        """Opened once a process."""
        names = ("questions", "retriever", "tokenizer", "protocol")
        return _open(*(getattr(self.config, name) for name in names), tuple(self.config.rewards.items()))

    def load(self) -> Iterator[SearchTask]:
        """Return a task a question; its prompt is the instruction of the protocol."""
        for number, question in enumerate(self.episodes.questions):
            asked = self.episodes.prompt(question)
            data = SearchData(id=question.id, question=number, prompt=asked)  # pyright: ignore[reportCallIssue]
            yield SearchTask(data, self.config.task)


@cache
def _open(*settings: Any) -> SearchEpisodes:
    *given, rewards = settings
    return SearchEpisodes(*given, rewards=dict(rewards))


class TurnHarness(vf.Harness[vf.HarnessConfig]):
    """One completion a turn, asked for in this process: nothing is installed or started."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Ask for the next message of the conversation."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        told = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt or []
        body = {"model": ctx.model, "messages": messages + [message_to_wire(message) for message in told]}
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as client:
            response = await client.post(f"{endpoint}/chat/completions", json=body)
        return vf.ProgramResult(int(response.is_error), "", response.text if response.is_error else "")


class SearchEnvConfig(vf.EnvConfig):
    """Role of the one who searches."""

    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())


class SearchEnv(vf.Env[SearchEnvConfig]):
    """One episode a task. A search that fails is an error of the episode, never an observation."""

    async def run(self, task: SearchTask, agents: Any) -> None:
        """Answer turn after turn, until the episode is over."""
        taskset: Any = self.taskset
        episodes: SearchEpisodes = taskset.episodes
        episode = episodes.begin(episodes.questions[task.data.question])
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                await episode.write(_sampled(interaction.trace))
                if episode.outcome:
                    break
                segment = await interaction.turn(episodes.message(episode))
        reward = await asyncio.to_thread(episodes.reward, episode)
        interaction.trace.record_reward("sleuth", reward)
        for name, count in episode.trajectory.counts.items():
            interaction.trace.record_metric(name, count)


def _sampled(trace: vf.Trace) -> str | list[int]:
    """Return the policy's last turn: the tokens sampled, where the client carries them, else its text."""
    node = next(node for node in reversed(trace.nodes) if node.sampled)
    message: Any = node.message
    thought = message.reasoning_content
    text = (f"<think>{thought}</think>" if thought else "") + (message.content or "")
    return [token for token, mine in zip(node.token_ids, node.mask, strict=True) if mine] or text
