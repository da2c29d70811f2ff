"""Demonstrations read from their files, without torch.

A demonstration is a trajectory written down without tokens: thoughts, searches with the passages they
found, an answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.protocol import Answer, Protocol
from agent.search_tool import TagSanitizer
from agent.tools import Search
from agent.trajectory import SegmentKind
from data.errors import ConfigError, DataError
from data.jsonl import numbered_jsonl, read_json
from data.records import Passage

Span = tuple[SegmentKind, str]
RECORD_FILE = "warm_start.json"
"""File in the folder of a warm-started policy: what it was taught from, and how."""
CHECKPOINTS = "checkpoints"
"""Folder beside it, until the policy is there."""
POOR = {
    "random_words": "some of the question's words, from one to all, drawn at random",
    "without_names": "the names of the question left out",
}
"""Kinds of queries that leave something to learn, and how they are made."""


def demonstration_spans(record: Mapping[str, Any], protocol: Protocol) -> Iterator[Span]:
    """The segments of a demonstration as text, the prompt first (see docs/data-formats.md).

    Passages are neutralised as in a rollout, but for the tokenizer's own special tokens. Raises
    KeyError or TypeError where the record lacks a field: the caller knows file and line.
    """
    sanitize = TagSanitizer(protocol)
    yield SegmentKind.PROMPT, protocol.prompt(record["question"])
    for step in record["steps"]:
        if "answer" in step:
            yield SegmentKind.POLICY, protocol.render_turn(step["think"], Answer(step["answer"]))
            continue
        yield SegmentKind.POLICY, protocol.render_turn(step["think"], Search(step["search"]))
        passages = [
            Passage(p["id"], sanitize(p["text"]), sanitize(p.get("title", ""))) for p in step["passages"]
        ]
        rendered = protocol.render_passages(passages[: protocol.top_k])
        yield SegmentKind.OBSERVATION, protocol.render_observation(rendered)
    if protocol.chat:
        return  # a follow-up would be another user turn, which no rollout has
    for more in record.get("follow_ups", ()):
        yield SegmentKind.PROMPT, protocol.prompt(more["question"])
        yield SegmentKind.POLICY, protocol.render_turn(more["think"], Answer(more["answer"]))


def load_demonstrations(path: str | Path, protocol: Protocol) -> list[list[Span]]:
    """All demonstrations of a JSONL file as spans. Raises DataError naming the line that is malformed."""
    demonstrations = []
    for number, record in numbered_jsonl(path):
        try:
            demonstrations.append(list(demonstration_spans(record, protocol)))
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}:{number}: not a demonstration: {wrong}") from error
    if not demonstrations:
        raise DataError(f"{path}: holds no demonstration")
    return demonstrations


def describe_demonstrations(path: str | Path) -> dict[str, Any]:
    """Describe a file for a warm start's record: name, content, and how many queries are of which kind."""
    kinds = Counter(str(record.get("queries", "as given")) for _, record in numbered_jsonl(path))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return {"demonstrations": str(path), "sha256": digest, "queries": dict(kinds)}


def check_out(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where `out` holds anything but the beginning of this very warm start."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CHECKPOINTS).exists():
        raise ConfigError(f"out = {out}: is not empty; a policy is never written over another")
    began = read_json(out / RECORD_FILE) if (out / RECORD_FILE).exists() else {}
    changed = sorted(key for key in settings if settings[key] != began.get(key))
    if changed:
        raise ConfigError(f"out = {out}: holds the beginning of another warm start ({', '.join(changed)})")


def warm_start_notes(policy: str) -> list[str]:
    """Note what a reader of results must know of how the policy in this folder was warm-started."""
    file = Path(policy) / RECORD_FILE
    kinds = read_json(file).get("queries", {}) if file.exists() else {}
    poor = {kind: count for kind, count in kinds.items() if kind in POOR}
    return [
        f"{count} of the {sum(kinds.values())} demonstrations of its warm start have queries poor on "
        f"purpose ({POOR[kind]}); their passages are those of a good query."
        for kind, count in poor.items()
    ]
