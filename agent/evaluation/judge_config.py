"""The settings of a judge, for every command that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.errors import require_range


@dataclass(frozen=True)
class JudgeConfig:
    """The language model that judges answers: any server that speaks OpenAI's chat completions."""

    url: str | None = None
    """Base URL, such as http://127.0.0.1:8001/v1."""
    model: str = "judge"
    """Name that the server knows it by."""
    api_key_file: str | None = None
    """File whose first line is the key; none: no key is sent."""
    timeout_seconds: float = 30.0
    """Seconds of one request; it is tried three times."""
    max_concurrent: int = 8
    """Requests at once."""
    max_calls: int = 100_000
    """Requests in all; the run stops when they are spent."""
    rubric: Literal["yes_no", "simpleqa", "browsecomp"] = "yes_no"
    """yes_no; simpleqa: correct, incorrect or not attempted; browsecomp: the whole response, as
    BrowseComp-Plus judges it."""
    prompt_file: str | None = None
    """File of another prompt for this rubric, with {case}, or {question}, {response}, {correct_answer}."""

    def __post_init__(self) -> None:
        require_range(self, "judge.", "> 0", "timeout_seconds", "max_concurrent", "max_calls")
