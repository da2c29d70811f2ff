"""Puts policy, engine, retriever and protocol together, in the same way for every command.

What the caller got wrong is refused before torch, or a model, is loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.engines.base import Sampling
from agent.engines.config import EngineConfig
from agent.engines.open_engine import check_engine
from agent.mcp_tools import open_server, read_config
from agent.policy_folder import find_policy, own_protocol
from agent.prompt import make_frame
from agent.protocol import Protocol, get_protocol
from agent.rollout import Agent
from agent.tools import OPEN_PAGE
from data.errors import ConfigError, RetrieverRefused
from data.machine.device import check_device
from retriever_server.client.search_client import SearchClient, connect
from rl.config import ProtocolConfig
from scripts.console import waiting

if TYPE_CHECKING:
    from agent.policy import Policy
    from scripts.agent_options import AgentOptions


@dataclass(frozen=True)
class OpenedAgent:
    """An agent ready to roll out, and what it is made of. `async with opened:` closes it."""

    agent: Agent
    policy: Policy
    client: SearchClient
    engine: EngineConfig = field(default_factory=EngineConfig)

    async def __aenter__(self) -> OpenedAgent:
        await self.client.__aenter__()
        if OPEN_PAGE.name in self.agent.protocol.tools:
            await self._check_documents()
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            await self.agent.engine.close()
        finally:
            await self.client.__aexit__(*error)

    async def _check_documents(self) -> None:
        for hit in await self.client.search("a", 1):
            try:
                await self.client.document(hit.passage.id)
            except RetrieverRefused as error:
                needs = "open_page needs an index in this process or a Sleuth server of one"
                raise ConfigError(f"protocol.tools: {needs}: {error}") from error

    async def check(self) -> None:
        """See that its engine has the policy's weights; EngineError if not."""
        if not self.agent.engine.shares_model:
            from rl.weight_sync import check_engine

            await check_engine(self.agent, self.policy.model, self.engine)

    def settings(self) -> dict[str, Any]:
        """Return what decides its rollouts, for `evaluate`: protocol, weights, temperature."""
        spoken = self.agent.protocol
        limits = {key: value for key, value in vars(spoken).items() if type(value) is int or key == "chat"}
        # Left out where it is what it was before there was a choice.
        text: dict[str, Any] = {"titles": spoken.titles} if spoken.titles == "quoted" else {}
        if spoken.chat_template_kwargs:
            text["chat_template_kwargs"] = dict(spoken.chat_template_kwargs)
        if spoken.query_style != "query":
            text["query_style"] = spoken.query_style
        if len(spoken.tools) > 1:
            text["tools"] = list(spoken.tools)
        if spoken.answer_form != "short" or spoken.may_abstain:
            text |= {"answer_form": spoken.answer_form, "may_abstain": spoken.may_abstain}
        return {
            "weights": fingerprint(self.policy.model),
            "dtype": str(self.policy.model.dtype).removeprefix("torch."),
            "temperature": self.agent.sampling.temperature,
            **({} if self.agent.engine.shares_model else {"engine": self.engine.label}),
            "protocol": {"name": spoken.name, **limits, **text},
        }


def open_agent(
    policy: str,
    retriever: str,
    protocol: ProtocolConfig | None = None,
    temperature: float = 0.0,
    max_rows: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    deadline_seconds: float = 60.0,
    client: SearchClient | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    folder: Path | None = None,
) -> OpenedAgent:
    """Load the policy, put it behind its engine and connect it with its retriever.

    `protocol`: see `make_protocol`; `retriever`: see `open_client`, unless a `client` stands in for
    it; `folder`: for the logs of vLLM servers. Behind them the policy itself stays on the CPU unless
    `device` says otherwise. Raises ConfigError.
    """
    sampling = Sampling(temperature=temperature)
    sampling.check()
    spoken = check_agent(policy, protocol, device, engine)
    client = client or open_client(retriever, deadline_seconds)
    spoken = replace(spoken, query_style=_query_style(protocol, client, retriever))
    with waiting(f"loading {policy}"):
        from agent.engines.open_engine import open_engine
        from agent.policy import load_policy, load_tokenizer
        from data.machine.device import resolve_device

        if spoken.chat_template_kwargs:  # wrong ones are refused before the weights are read
            make_frame(spoken, load_tokenizer(policy))
        if device == "auto" and not engine.shares_model:
            dtype = "bfloat16" if dtype == "auto" and resolve_device(device) != "cpu" else dtype
            device = "cpu"
        loaded = load_policy(policy, device, dtype)
    sampler = open_engine(engine, loaded, policy, spoken, max_rows, folder)
    agent = Agent(
        sampler,
        loaded.tokenizer,
        client,
        spoken,
        sampling,
        max_live=2 * max_rows * sampler.replicas,
        vision=loaded.vision,
        prompt_frame=make_frame(spoken, loaded.tokenizer),
    )
    return OpenedAgent(agent, loaded, client, engine)


def open_asked(options: AgentOptions, max_rows: int, folder: Path | None = None) -> OpenedAgent:
    """Open the agent that a command is asked for."""
    place = (options.device, options.dtype, options.deadline_seconds)
    asked = (options.policy, options.retriever, options.protocol, options.temperature, max_rows)
    return open_agent(*asked, *place, engine=options.engine, folder=folder)


def check_agent(policy: str, protocol: ProtocolConfig | None, device: str, engine: EngineConfig) -> Protocol:
    """The protocol to speak, once policy, device and engine are seen to be there; nothing is loaded.

    Raises ConfigError, and EngineError where no server of `engine.urls` listens.
    """
    find_policy(policy)
    spoken = make_protocol(protocol or ProtocolConfig(), policy)
    check_device(device)
    check_engine(engine)
    return spoken


def make_protocol(config: ProtocolConfig, policy: str) -> Protocol:
    """The protocol that `config` names, or the policy's own, with what `config` changes of it."""
    own = own_protocol(policy)
    chosen = own if config.name in (None, own.name) else get_protocol(config.name)
    told = {**chosen.chat_template_kwargs, **(config.chat_template_kwargs or {})}
    asked_tools = chosen.tools if config.tools is None else config.tools
    tools = [tool for tool in asked_tools if isinstance(tool, str)]
    servers = tuple(open_server(read_config(tool)) for tool in asked_tools if isinstance(tool, dict))
    asked, chosen = chosen, get_protocol(chosen.name, config.titles or chosen.titles, told, tools)
    apart = ("name", "titles", "chat_template_kwargs", "tools")
    limits = {key: value for key, value in asdict(config).items() if key not in apart and value is not None}
    chosen = replace(chosen, servers=servers, tools=(*chosen.tools, *(n for s in servers for n in s.names)))
    return replace(chosen, **({"answer_form": asked.answer_form, "may_abstain": asked.may_abstain} | limits))


def _query_style(protocol: ProtocolConfig | None, client: SearchClient, retriever: str) -> str:
    """The style that the retriever was trained in, else the one asked for; ConfigError if these differ."""
    asked, trained = protocol and protocol.query_style, client.query_style()
    if asked and trained and asked != trained:
        raise ConfigError(
            f"protocol.query_style = {asked!r}: {retriever} is to be asked in the style {trained!r}, "
            "which is taken if none is given (docs/closed-loop.md)"
        )
    return trained or asked or "query"


def open_client(retriever: str, deadline_seconds: float = 60.0, deterministic: bool = False) -> SearchClient:
    """A client for a retriever: a URL, an index folder, a .yaml file, none or random:INDEX.

    Raises ConfigError where it waits for a server and must not (deterministic), and RetrieverError,
    within seconds, where a server does not listen or answers what is no ranking.
    """
    client = connect(retriever, deadline_seconds)
    if deterministic and client.waits:
        raise ConfigError(f"deterministic: {retriever} waits for a server; needs an index in process")
    asyncio.run(client.probe())
    return client


async def retriever_generation(client: SearchClient, query: str, retriever: str) -> str:
    """Ask the retriever for its generation; `retriever` itself where it names none or finds nothing.

    So the same index behind another port is the same retriever. Raises RetrieverError as a search does.
    """
    hits = await client.search(query, 1)
    return (hits[0].generation if hits else "") or retriever


def fingerprint(model: Any) -> str:
    """Short hash of at most 256 values, evenly spread, of each parameter: a training step changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
