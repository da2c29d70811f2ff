"""Open the engine that a configuration describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.engines.base import Engine
from agent.engines.config import EngineConfig
from agent.protocol import Protocol
from data.errors import EngineError, require
from data.machine.listening import why_silent
from data.objects.class_path import Plan, Reader

if TYPE_CHECKING:
    from agent.policy import Policy

GIVEN = ("policy", "source", "protocol", "max_rows", "folder")
"""Parameters that an engine of one's own may have besides its `init_args`; see `open_engine`."""


def check_engine(config: EngineConfig) -> None:
    """Raise ConfigError or EngineError where the engine could not be opened; nothing is loaded or started."""
    if config.class_path is not None:
        _plan(config, dict.fromkeys(GIVEN))
    elif config.urls is not None:
        silent = {url: why_silent(url.strip()) for url in config.urls.split(",")}
        if all(silent.values()):
            reasons = "; ".join(f"{url}: {reason}" for url, reason in silent.items())
            raise EngineError(f"engine.urls: no vLLM server listens ({reasons})")
    elif config.servers_to_start:
        from agent.engines.vllm_process import find_python

        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        require(not several, "engine.urls", None, "given where several processes train")
        find_python(config.python)


def open_engine(
    config: EngineConfig, policy: Policy, source: str, protocol: Protocol, max_rows: int, folder: Path | None
) -> Engine:
    """Open the engine that samples from `policy`, which was loaded from `source`.

    max_rows: trajectories that it, or each of its servers, decodes at once. folder: for logs of servers;
    None: a temporary one. An engine of one's own gets those of these that its constructor has parameters
    for. Raises ConfigError.
    """
    if config.class_path is not None:
        values = (policy, source, protocol, max_rows, folder)
        return _plan(config, dict(zip(GIVEN, values, strict=True)))()
    if config.name == "vllm":
        from agent.engines.open_vllm import open_vllm

        return open_vllm(config, policy, source, protocol, max_rows, folder)
    from agent.engines.hf import HFEngine

    return HFEngine(policy.model, policy.tokenizer, max_rows, vision=policy.vision)


def _plan(config: EngineConfig, given: dict[str, Any]) -> Plan:
    node = {"class_path": config.class_path, "init_args": config.init_args}
    return Reader(given=given).plan(node, (Engine,), "engine.")
