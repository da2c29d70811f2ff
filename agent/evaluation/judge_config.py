"""The settings of a judge, for every command that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.errors import require_range
from data.settings import ChatConfig


@dataclass(frozen=True)
class JudgeConfig(ChatConfig):
    """The language model that judges answers: any server that speaks OpenAI's chat completions."""

    model: str = "judge"
    rubric: Literal["yes_no", "simpleqa", "browsecomp"] = "yes_no"
    """yes_no; simpleqa: correct, incorrect or not attempted; browsecomp: the whole response, as
    BrowseComp-Plus judges it."""
    prompt_file: str | None = None
    """File of another prompt for this rubric, with {case}, or {question}, {response}, {correct_answer}."""

    def __post_init__(self) -> None:
        require_range(self, "judge.", "> 0", "timeout_seconds", "max_concurrent", "max_calls")
