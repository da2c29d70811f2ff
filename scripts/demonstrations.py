"""`sleuth demonstrations`: what a warm start learns from, out of questions with answers and a retriever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.errors import ConfigError, DataError, require, require_range
from data.jsonl import write_jsonl
from data.questions import load_questions
from data.settings import ChatConfig
from data.text import counted
from scripts.console import bar

if TYPE_CHECKING:
    from data.records import Question

BATCH = 64
"""Questions that are searched, or asked of the teacher, at once."""


@dataclass(frozen=True)
class TeacherConfig(ChatConfig):
    """The language model that demonstrates: any server that speaks OpenAI's chat completions."""

    url: str | None = None
    """Base URL, such as http://127.0.0.1:8001/v1; none: rules demonstrate."""
    model: str = "teacher"
    timeout_seconds: float = 120.0
    temperature: float = 0.7
    """Temperature of its sampling."""
    samples: int = 1
    """Tries for a question, until one ends in a gold answer by exact match."""
    max_turns: int = 4
    """Searches that a demonstration may make."""

    def __post_init__(self) -> None:
        require_range(self, "teacher.", ">= 1", "samples", "max_turns", "max_concurrent", "max_calls")
        require_range(self, "teacher.", ">= 0", "temperature")
        require_range(self, "teacher.", "> 0", "timeout_seconds")


def main(
    questions: str,
    retriever: str,
    out: str,
    rest: str | None = None,
    split: str | None = None,
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None,
    take: int | None = None,
    top_k: int = 1,
    queries: Literal["as given", "random_words", "without_names"] = "as given",
    teacher: TeacherConfig = TeacherConfig(),
    deadline_seconds: float = 60.0,
    seed: int = 0,
) -> None:
    """Make demonstrations of searching out of questions with answers, for `sleuth warm-start`.

    Rules search a question's keywords and keep it where a passage found says a gold answer. A teacher
    (`--teacher.url`) searches and answers by itself, and is kept where it is right. Its replies lie beside
    `out`: the same command asks nothing twice.

    Args:
        questions: JSONL, parquet, folder or hub name; several separated by commas.
        retriever: URL of a server, folder of an index or .yaml file.
        out: JSONL file of the demonstrations (docs/data-formats.md).
        rest: JSONL file for the questions beyond `take`, to train or test on.
        split: Split of the questions, where there are several.
        normalizer: Normal form of answers: squad, or unicode for scripts without spaces; none: as each
            question's metadata say, else squad.
        take: Only so many of the questions, drawn at random; none: all of them.
        top_k: Passages shown a search.
        queries: as given: those that found the passages; random_words or without_names: poor ones in their
            place, on purpose, so that reinforcement learning has to find what to search.
        teacher: Who demonstrates.
        deadline_seconds: How long a search is retried.
        seed: Of the draw, of the poor queries and of the teacher.
    """
    from retriever_server.open_retriever import check_retriever
    from rl.demonstrators import with_queries

    _check(out, rest, take, top_k, teacher)
    check_retriever(retriever, deadline_seconds)
    asked, left = _draw(load_questions(questions, split, normalizer=normalizer), take, rest, seed)
    try:
        found = asyncio.run(_demonstrate(asked, retriever, Path(out), top_k, teacher, deadline_seconds, seed))
    except KeyboardInterrupt:
        kept = f": {out}.replies keeps the replies, the same command goes on" if teacher.url else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    kept = [with_queries(record, queries, seed) for record in found if record is not None]
    if not kept:
        raise DataError(f"none of {len(asked):,} questions gave a demonstration: {_why(teacher, retriever)}")
    write_jsonl(out, kept)
    if rest is not None:
        write_jsonl(rest, (question.as_record() for question in left))
    over = f"; {counted(len(left), 'question')} left over in {rest}" if rest is not None else ""
    made = f"{counted(len(kept), 'demonstration')} of {counted(len(asked), 'question')}"
    print(f"{out}: {made}, queries {queries}{over}")


def _draw(
    every: list[Question], take: int | None, rest: str | None, seed: int
) -> tuple[list[Question], list[Question]]:
    """Return `take` questions and those left over; ConfigError where `rest` would get none."""
    random.Random(seed).shuffle(every)
    asked, left = every[:take], every[len(every) if take is None else take :]
    if rest is not None and not left:
        raise ConfigError(f"take = {take}: leaves none of the {len(every):,} questions for rest = {rest}")
    return asked, left


def _check(out: str, rest: str | None, take: int | None, top_k: int, teacher: TeacherConfig) -> None:
    require(take is None or take >= 1, "take", take, ">= 1, or none for all")
    require(top_k >= 1, "top_k", top_k, ">= 1")
    if rest is not None and take is None:
        raise ConfigError(f"rest = {rest}: needs take, which leaves questions over")
    if teacher.url is None and teacher != TeacherConfig():
        raise ConfigError("teacher: has options but no url; without --teacher.url rules demonstrate")
    require(not Path(out).is_dir(), "out", out, "a file, not a folder")


def _why(teacher: TeacherConfig, retriever: str) -> str:
    if teacher.url:
        return f"{teacher.model} searched and answered none of them rightly in the form that it was told"
    return f"no passage that {retriever} finds by a question's keywords says its answer"


async def _demonstrate(
    asked: Sequence[Question],
    retriever: str,
    out: Path,
    top_k: int,
    config: TeacherConfig,
    deadline_seconds: float,
    seed: int,
) -> list[dict[str, Any] | None]:
    """A demonstration or None for each question, while a bar shows how far it is."""
    from retriever_server.client.search_client import connect
    from rl.demonstrators import by_rules

    teacher = _teacher(config, out, top_k, seed) if config.url else None
    found: list[dict[str, Any] | None] = []
    async with connect(retriever, deadline_seconds) as client:
        await client.probe()
        with bar("demonstrating", len(asked)) as move:
            for start in range(0, len(asked), BATCH):
                part = asked[start : start + BATCH]
                if teacher is None:
                    found += await asyncio.gather(*(by_rules(each, client, top_k) for each in part))
                else:
                    found += await teacher.demonstrate(part, client)
                move(len(found))
    return found


def _teacher(config: TeacherConfig, out: Path, top_k: int, seed: int) -> Any:
    from retriever_server.client.chat import open_chat
    from rl.demonstrators import Teacher

    client = open_chat(config, "teacher", out.with_name(f"{out.name}.replies"))
    return Teacher(client, config.model, config.temperature, config.max_turns, top_k, config.samples, seed)
