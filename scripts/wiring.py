"""Puts policy, engine, retriever and protocol together, in the same way for every command.

Imports torch: commands import it late. What the caller got wrong is refused before a model loads.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.policy import Policy, default_protocol, load_policy
from agent.protocol import Protocol, get_protocol
from agent.rollout import Agent
from retriever_server.client import SearchClient, connect
from rl.config import ProtocolConfig


@dataclass(frozen=True)
class OpenedAgent:
    """An agent ready to roll out, and what it is made of. `async with opened.client:` closes it."""

    agent: Agent
    policy: Policy
    client: SearchClient

    def settings(self) -> dict[str, Any]:
        """What decides its rollouts, for `agent.evaluate.evaluate`: protocol, weights, temperature."""
        spoken = self.agent.protocol
        limits = {key: value for key, value in vars(spoken).items() if isinstance(value, int)}
        return {
            "weights": fingerprint(self.policy.model),
            "dtype": str(self.policy.model.dtype).removeprefix("torch."),
            "temperature": self.agent.sampling.temperature,
            "protocol": {"name": spoken.name, **limits},
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
) -> OpenedAgent:
    """Load the policy into the hf engine and connect it with its retriever.

    `protocol`: see `make_protocol`; `retriever`: see `open_client`, unless a `client` stands in for
    it. Raises ConfigError.
    """
    disable_progress_bar()
    sampling = Sampling(temperature=temperature)
    client = client or open_client(retriever, deadline_seconds)
    spoken = make_protocol(protocol or ProtocolConfig(), policy)
    loaded = load_policy(policy, device, dtype)
    engine = HFEngine(loaded.model, loaded.tokenizer, max_rows, vision=loaded.vision)
    live, vision = 2 * max_rows, loaded.vision
    agent = Agent(engine, loaded.tokenizer, client, spoken, sampling, max_live=live, vision=vision)
    return OpenedAgent(agent, loaded, client)


def make_protocol(config: ProtocolConfig, policy: str) -> Protocol:
    """The protocol that `config` names, or the policy's own, with the limits that `config` changes."""
    limits = {key: value for key, value in asdict(config).items() if key != "name" and value is not None}
    return replace(get_protocol(config.name or default_protocol(policy)), **limits)


def open_client(retriever: str, deadline_seconds: float = 60.0) -> SearchClient:
    """A client for a retriever: a URL, an index folder, a .yaml file, none or random:INDEX."""
    return connect(retriever, deadline_seconds)


async def retriever_generation(client: SearchClient, query: str, retriever: str) -> str:
    """What answers, by asking it; `retriever` itself where it does not say or finds nothing.

    So the same index behind another port is the same retriever. Raises RetrieverError as a search does.
    """
    hits = await client.search(query, 1)
    return (hits[0].generation if hits else "") or retriever


def fingerprint(model: PreTrainedModel) -> str:
    """Short hash of at most 256 values, evenly spread, of each parameter: a training step changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
