"""The `vllm` engine: one or many vLLM servers (0.32) over HTTP, each in a process of its own.

Token ids go out and come back by `/inference/v1/generate`, whose answer also says which weights wrote which
tokens. Prefix caching across turns is the server's own: a trajectory stays where its prefix is cached.
Weights travel by a transport (agent/engines/transport.py): each server takes them while it is paused, with
what it was writing kept and its cache made anew. A restarted completion has its seed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from agent.engines.base import Completion, Engine, FinishReason, Sampling
from agent.engines.transport import Transport
from agent.trajectory import Picture
from data.errors import ConfigError, EngineError
from retriever_server.client.pool import Server, ServerLost, ServerPool

GENERATE = "/inference/v1/generate"
FRESH = "default"
"""A server's name for the weights that it was started with."""


class VLLMEngine(Engine):
    """Serves many trajectories from vLLM servers. See the head of this file."""

    def __init__(
        self,
        servers: Sequence[Server],
        stop_ids: Sequence[int] = (),
        transport: Transport | None = None,
        deadline_seconds: float = 600.0,
        max_restarts: int = 3,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """stop_ids: the tokens that end a completion, as for the hf engine.

        transport: how weights are handed over; without, the servers keep theirs. max_restarts: in a row, of
        each server that was started for us; those end with `close`.
        """
        self.pool = ServerPool("engine vllm", servers, deadline_seconds, self._catch_up)
        self._max_restarts = max_restarts
        self.replicas = len(servers)
        self.stop_ids, self.deadline_seconds = list(stop_ids), deadline_seconds
        self.weights_version = 0
        self.max_length = 0
        self.transport = transport
        self._model: dict[str, str] = {}
        self._on_close = on_close
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait until the servers answer, at most the deadline; raises EngineError if none does."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        await self.pool.start()
        self.pool.max_restarts = self._max_restarts  # one that cannot even start is not tried again
        models = await self.pool.on_all(lambda server: server.get("/v1/models"))
        # The shortest context: a trajectory may move.
        try:
            self.max_length = min(int(answer["data"][0]["max_model_len"]) for answer in models.values())
        except (LookupError, TypeError, ValueError) as error:
            names = ", ".join(server.name for server in models)
            raise EngineError(f"engine vllm: {names}: no vLLM server by /v1/models") from error

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, trajectory_id: str, pictures: Sequence[Picture] = ()
    ) -> Completion:
        """Continue the trajectory where it is cached; elsewhere if that server is lost."""
        if pictures:
            raise EngineError("engine vllm: it is not shown pictures; allowed: engine hf")
        if not prompt_ids:
            raise EngineError(f"{trajectory_id}: an empty prompt cannot be continued")
        await self.start()
        room = self.max_length - len(prompt_ids)
        if room <= 0:
            return Completion([], [], FinishReason.LENGTH, self.weights_version)
        sampled = self._parameters(sampling, room)
        try:
            async with asyncio.timeout(self.deadline_seconds):
                while True:
                    server = await self.pool.choose(trajectory_id)
                    wanted = self.weights_version
                    body = {"token_ids": prompt_ids, "sampling_params": sampled} | self._model
                    try:
                        completion = parse_completion(await server.ask(GENERATE, body), self.weights_version)
                    except ServerLost as loss:
                        self.pool.mark_down(server, loss)
                        continue
                    if completion.weights_version >= wanted:
                        return completion
                    self.pool.mark_down(
                        server, f"wrote with weights {completion.weights_version}, not {wanted}"
                    )
        except TimeoutError:
            raise EngineError(
                f"engine vllm: no completion within engine.deadline_seconds = {self.deadline_seconds:g}"
            ) from None

    async def release(self, trajectory_id: str) -> None:
        """Forget where the trajectory was; its server forgets its cache when it needs the room."""
        self.pool.release(trajectory_id)

    async def update_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        """New weights from here on, what is being written included; None: those of the model as it is.

        Raises EngineError where no server could load them.
        """
        if self.transport is None:
            raise EngineError("engine vllm: was opened without a transport to hand weights over with")
        await self.start()
        await self.transport.stage(state, version)
        await self.pool.on_all(self._load)
        self.weights_version = version  # not before: a completion may begin while a server has yet to pause
        self._model = {"model": self.transport.model} if self.transport.model else {}
        self.transport.settle()

    async def probe(
        self, prompts: Sequence[list[int]], sampling: Sampling
    ) -> Mapping[str, Sequence[Completion]]:
        """Complete the same prompts on each live server, by its URL; the same seed for each."""

        async def on(server: Server) -> list[Completion]:
            parameters = [self._parameters(sampling, self.max_length - len(ids)) for ids in prompts]
            asked = (
                server.ask(GENERATE, {"token_ids": ids, "sampling_params": each} | self._model)
                for ids, each in zip(prompts, parameters, strict=True)
            )
            return [parse_completion(answer, self.weights_version) for answer in await asyncio.gather(*asked)]

        await self.start()
        return {server.url: found for server, found in (await self.pool.on_all(on)).items()}

    async def close(self) -> None:
        try:
            if self._starting is not None:
                self._starting.cancel()
                await asyncio.gather(self._starting, return_exceptions=True)
                self._starting = None
            await self.pool.close()
        finally:
            if self.transport is not None:
                self.transport.close()
            self._on_close()

    def _parameters(self, sampling: Sampling, room: int) -> dict[str, Any]:
        if not sampling.renormalise and (sampling.top_p < 1 or sampling.top_k) and sampling.temperature:
            raise ConfigError(
                "engine vllm: top_p and top_k need renormalise, which is what its log-probs are"
            )
        seed = {} if sampling.seed is None else {"seed": sampling.seed}
        return seed | {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_tokens, room),
            "stop": list(sampling.stop),
            "stop_token_ids": self.stop_ids,
            "skip_special_tokens": False,  # a stop string may be a token that is called special
            "include_stop_str_in_output": True,
            "logprobs": 0,  # of the sampled tokens alone
        }

    async def _load(self, server: Server) -> int:
        """The newest weights, whose version is returned; what the server is writing waits for them."""
        assert self.transport is not None and self.transport.staged is not None
        staged = self.transport.staged
        await server.ask("/pause", mode="keep")
        await self.transport.load(server, staged)
        await server.ask("/update_weight_version", {"new_version": str(staged.version)})
        reset = await server.ask("/reset_prefix_cache", reset_running_requests="true")
        if not reset["success"]:
            raise EngineError("its prefix cache could not be reset")
        await server.ask("/resume")
        return staged.version

    async def _catch_up(self, server: Server) -> None:
        """Give a server that is back the weights of the others, newer ones too that come meanwhile."""
        loaded = None
        while self.transport and (staged := self.transport.staged) and staged.version != loaded:
            loaded = await self._load(server)


def parse_completion(answer: Any, newest: int) -> Completion:
    """Parse the answer of a server. The version is the oldest that wrote any of it; `newest` if it has none.

    Raises EngineError where the answer is not that of `/inference/v1/generate`.
    """
    try:
        (choice,) = answer["choices"]
        sampled = choice["logprobs"]["content"] or []
        token_ids = choice["token_ids"]
        if [each["token_id"] for each in sampled] != token_ids:
            raise ValueError("its log-probs are of other tokens than those that it wrote")
        spans = choice.get("weight_versions") or []
        versions = [0 if s["version"] == FRESH else int(s["version"]) for s in spans] or [newest]
        reason = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}[choice["finish_reason"]]
        return Completion(token_ids, [each["logprob"] for each in sampled], reason, min(versions))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"engine vllm: no completion of vLLM 0.32: {type(error).__name__} {error}"
        ) from error
