"""`Local`: a language model on this machine as a generator, by the agent's engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from agent.engines.base import Completion, Sampling
from agent.engines.config import EngineConfig
from agent.engines.open_engine import check_engine, open_engine
from agent.policy_folder import find_policy
from agent.protocol import get_protocol
from retriever_server.training.synthesis.drafts import Call, Written
from retriever_server.training.synthesis.generators import Generator


class Local(Generator):
    """A policy's model behind the engine hf or vllm; its chat template, if any, frames the prompt."""

    def __init__(
        self,
        policy: str,
        engine: dict[str, Any] | None = None,
        chat: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        max_rows: int = 64,
        most_prompt_tokens: int = 4096,
    ) -> None:
        """policy: folder, hub name or short name. engine: fields of `sleuth train`'s engine."""
        config = EngineConfig(**(engine or {}))
        find_policy(policy)
        check_engine(config)
        from agent.policy import load_policy

        loaded = load_policy(policy, device, dtype)
        self.name = f"local {policy} {loaded.model.dtype} chat={chat}"
        self._tokenizer: Any = loaded.tokenizer
        self._chat = chat and bool(self._tokenizer.chat_template)
        self._most = most_prompt_tokens
        self._engine = open_engine(config, loaded, policy, get_protocol("search_r1"), max_rows, None)
        self._runner = asyncio.Runner()  # one for all calls: engines keep connections

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """As `Generator.write`; a prompt that is too long is refused."""
        return self._runner.run(self._all(calls))

    async def _all(self, calls: Sequence[Call]) -> list[Written]:
        return list(await asyncio.gather(*(self._one(i, call) for i, call in enumerate(calls))))

    async def _one(self, number: int, call: Call) -> Written:
        ids = self._ids(call.prompt)
        if len(ids) > self._most:
            return Written("", refused="prompt too long")
        sampling = Sampling(
            call.temperature, call.top_p, max_tokens=call.max_tokens, stop=tuple(call.stop), seed=call.seed
        )
        name = f"synthesis-{number}"
        try:
            done = await self._engine.generate(ids, sampling, name)
        finally:
            await self._engine.release(name)
        return self._written(ids, done, call.stop)

    def _ids(self, prompt: str) -> list[int]:
        if not self._chat:
            return self._tokenizer(prompt)["input_ids"]
        turns = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _written(self, ids: list[int], done: Completion, stop: Sequence[str]) -> Written:
        text = self._tokenizer.decode(done.token_ids, skip_special_tokens=True)
        for each in stop:
            text = text.partition(each)[0]
        sure = [value for value in done.logprobs if value is not None]
        mean = sum(sure) / len(sure) if sure else None
        return Written(text, len(ids), len(done.token_ids), mean)
