"""Limits of `sleuth serve-agent`."""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import require_range


@dataclass(frozen=True, kw_only=True)
class AgentLimits:
    """The most that one request, and all of them together, may ask for."""

    concurrency: int = 16
    """Questions worked on at once; they share the engine."""
    max_waiting: int = 64
    """Questions that may wait for a place; beyond it 429."""
    max_tokens: int = 4096
    """The most tokens that the policy writes for one question; a client may ask for fewer."""
    max_question_chars: int = 8192
    """The longest question."""
    max_deadline_seconds: int = 300
    """The longest that a question may take; then it gets 504."""

    def __post_init__(self) -> None:
        at_least_one = ("concurrency", "max_tokens", "max_question_chars", "max_deadline_seconds")
        require_range(self, "", ">= 1", *at_least_one)
        require_range(self, "", ">= 0", "max_waiting")
