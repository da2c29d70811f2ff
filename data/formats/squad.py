"""SQuAD's own files, 1.1 and 2.0: {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_START = re.compile(r'\s*\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


class Squad(NamedTuple):
    """A file as rows of a corpus and of a question set, in which a paragraph is the gold passage."""

    passages: list[dict[str, Any]]
    questions: list[dict[str, Any]]


def is_squad(start: str) -> bool:
    """Return whether a file that starts so has SQuAD's form."""
    return _START.match(start) is not None


def parse_squad(content: Any) -> Squad:
    """Return the rows in the content of a file. Raises ValueError."""
    made = Squad([], [])
    try:
        for article in content["data"]:
            title = (article.get("title") or "").replace("_", " ")
            for paragraph in article["paragraphs"]:
                id_ = f"{title}#{len(made.passages)}"  # titles may repeat
                made.passages.append({"id": id_, "title": title, "text": paragraph["context"]})
                made.questions.extend(_question(asked, id_) for asked in paragraph["qas"])
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"paragraph {len(made.passages)}: {wrong}") from error
    return made


def is_impossible(row: Mapping[str, Any]) -> bool:
    """Return whether it has no answer, as SQuAD 2.0 says it in its own file or on the hub, or MuSiQue."""
    unanswerable = str(row.get("answerable")).lower() == "false"
    no_answer = row.get("answers") == {"text": [], "answer_start": []}
    return bool(row.get("is_impossible")) or unanswerable or no_answer


def _question(asked: Mapping[str, Any], passage_id: str) -> dict[str, Any]:
    answers = [answer["text"] for answer in asked["answers"]]
    row = {"id": asked["id"], "question": asked["question"], "answers": answers}
    if asked.get("is_impossible"):
        return {**row, "is_impossible": True}
    return {**row, "metadata": {"supporting_ids": [passage_id]}}
