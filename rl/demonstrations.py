"""Demonstrations read from their files, without torch.

A demonstration is a trajectory written down without tokens: thoughts, searches with the passages they
found, an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.protocol import Answer, Protocol
from agent.search_tool import TagSanitizer
from agent.tools import Search
from agent.trajectory import SegmentKind
from data.errors import DataError
from data.jsonl import numbered_jsonl
from data.records import Passage

Span = tuple[SegmentKind, str]


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
            raise DataError(f"{path}:{number}: not a demonstration: {error!r}") from error
    if not demonstrations:
        raise DataError(f"{path}: holds no demonstration")
    return demonstrations
