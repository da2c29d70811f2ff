"""A policy before it is loaded: where its folder is, and which protocol it was trained to speak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from agent.protocol import Protocol, get_protocol
from data.errors import DataError
from data.jsonl import read_json
from data.models.hub import find_model
from data.models.packaged import SHORT_NAMES

PROTOCOL_FILE = "sleuth.json"


def find_policy(name: str) -> str:
    """Return the folder of a policy, or its hub name, seen to be there; raises ConfigError."""
    return find_model(name, "policy", ("config.json",))


def own_protocol(policy: str) -> Protocol:
    """The protocol that the policy was trained to speak, from its folder's sleuth.json; else search_r1."""
    path = Path(SHORT_NAMES[policy]() if policy in SHORT_NAMES else policy) / PROTOCOL_FILE
    if not path.is_file():
        return get_protocol("search_r1")
    try:
        record = read_json(path)
        told = (record.get("titles"), record.get("chat_template_kwargs"), record.get("tools", ["search"]))
        asked = {key: record[key] for key in ("answer_form", "may_abstain") if key in record}
        return replace(get_protocol(record["protocol"], *told), **asked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: must be like {{"protocol": "compact"}}') from error
