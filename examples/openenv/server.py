"""The search environment as an OpenEnv server (reset, step, state), and its client.

An action is the policy's turn, as text or as the token ids that were sampled; an observation is what it
reads next. One WebSocket session is one episode after the other. Written against openenv 0.10.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

from fastapi import FastAPI
from openenv.core.client_types import StepResult  # pyright: ignore[reportMissingImports]
from openenv.core.env_client import EnvClient  # pyright: ignore[reportMissingImports]
from openenv.core.env_server import (  # pyright: ignore[reportMissingImports]
    Action,
    Environment,
    Observation,
    State,
    create_app,
)

from agent.rollout import Episode
from data.errors import ConfigError
from rl.episodes import SearchEpisodes


class Turn(Action):
    """A turn of the policy, up to the tag that ends it: its token ids, else its text."""

    text: str = ""
    token_ids: list[int] | None = None


class Reading(Observation):
    """The prompt, or the reply to a turn; empty where the episode is over."""

    text: str = ""
    token_ids: list[int] = []  # noqa: RUF012 (pydantic copies it)


class Progress(State):
    """Progress of an episode."""

    question: str = ""
    searches: int = 0
    stop_reason: str | None = None


class SearchWorld(Environment[Turn, Reading, Progress]):
    """Episodes of questions, one after the other. A search that fails is an error, not an observation."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, episodes: SearchEpisodes) -> None:
        super().__init__()
        self.episodes, self.episode, self.episode_id = episodes, None, None
        self.episode: Episode | None
        self.episode_id: str | None

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, index: int | None = None, **_: Any
    ) -> Reading:
        """Begin with the question of this index, else with one drawn by `seed`."""
        count = len(self.episodes.questions)
        if index is not None and not 0 <= index < count:
            raise ConfigError(f"index = {index}: must be in [0, {count})")
        at = random.Random(seed).randrange(count) if index is None else index
        self.episode, self.episode_id = self.episodes.begin(self.episodes.questions[at]), episode_id
        return self._read()

    async def step_async(self, action: Turn, timeout_s: float | None = None, **_: Any) -> Reading:
        """Take a turn; the reward comes with the last one."""
        if self.episode is None or self.episode.outcome:
            raise ConfigError(f"step: needs reset first ({'over' if self.episode else 'no episode'})")
        await asyncio.wait_for(
            self.episode.write(action.text if action.token_ids is None else action.token_ids), timeout_s
        )
        if self.episode.outcome is None:
            return self._read()
        return Reading(done=True, reward=await asyncio.to_thread(self.episodes.reward, self.episode))

    def step(self, action: Turn, timeout_s: float | None = None, **_: Any) -> Reading:
        """As `step_async`, where no event loop runs."""
        return asyncio.run(self.step_async(action, timeout_s))

    @property
    def state(self) -> Progress:
        """Return the progress of the episode; no gold answer is in it."""
        if self.episode is None:
            return Progress()
        done = self.episode.trajectory
        steps = sum(segment.logprobs is not None for segment in done.segments)
        told = {"question": done.question.text, "searches": len(done.searches)}
        return Progress(
            episode_id=self.episode_id, step_count=steps, stop_reason=self.episode.outcome, **told
        )

    def _read(self) -> Reading:
        assert self.episode is not None
        last = self.episode.ledger.segments[-1]
        return Reading(text=last.text, token_ids=last.token_ids)


class SearchWorldClient(EnvClient[Turn, Reading, Progress]):
    """`async with SearchWorldClient(base_url=URL) as env: await env.reset(index=0)`."""

    def _step_payload(self, action: Turn) -> dict[str, Any]:
        return action.model_dump()

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Reading]:
        given = {key: payload.get(key) for key in ("reward", "done")}
        return StepResult(Reading(**payload["observation"], **given), **given)  # type: ignore[arg-type]

    def _parse_state(self, payload: dict[str, Any]) -> Progress:
        return Progress(**payload)


def make_app(episodes: SearchEpisodes, max_sessions: int = 256) -> FastAPI:
    """The server; each session has an episode of its own."""
    world = partial(SearchWorld, episodes)
    return create_app(world, Turn, Reading, "sleuth_search", max_sessions, state_cls=Progress)


def main(
    questions: str,
    retriever: str,
    policy: str,
    protocol: str = "hermes",
    rewards: dict[str, float] = {"em": 1.0},  # noqa: B006 (only read)
    host: str = "127.0.0.1",
    port: int = 8010,
    max_sessions: int = 256,
) -> None:
    """Serve the search environment; `policy` is the folder or name whose tokenizer counts the tokens."""
    import uvicorn

    app = make_app(SearchEpisodes(questions, retriever, policy, protocol, rewards), max_sessions)
    uvicorn.run(app, host=host, port=port)


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
