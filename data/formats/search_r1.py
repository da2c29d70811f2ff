"""Rows of questions as Search-R1 has them, and FlashRAG, from which it made them.

FlashRAG    {id, question, golden_answers, metadata}; also our own form
Search-R1   {data_source, prompt, ability, reward_model.ground_truth.target, extra_info}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.formats.rows import answers_of, id_of, ids_of, list_of, object_of, shown
from data.formats.squad import is_impossible
from data.formats.tables import at, read_rows
from data.formats.training import Items
from data.records import Example

GOLD_KEYS = ("golden_answers", "gold_answers", "answers", "answer")
"""MuSiQue has further ones as `answer_aliases`."""
_MARKER = re.compile(r"(?:^|\s)Question: ")


def extra_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `extra_info`."""
    return object_of(record.get("extra_info"), "extra_info")


def question_text(record: Mapping[str, Any]) -> str:
    """The question of a row: its own, or what follows the last "Question: " of the prompt."""
    for value in (record.get("question"), extra_of(record).get("question")):
        if value is not None and not isinstance(value, str):
            raise ValueError(f'"question" must be a string, found {shown(value)}')
        if value and value.strip():
            return value.strip()
    *before, text = _MARKER.split(_prompt_text(record.get("prompt")))
    if not before or not text.strip():
        raise ValueError('no question: "question" is missing or empty, and no prompt holds "Question: ..."')
    return text.strip()


def gold_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The gold answers of a row, under the first name that holds any, and their aliases."""
    truth = object_of(record.get("reward_model"), "reward_model").get("ground_truth")
    named = ((key, record.get(key)) for key in GOLD_KEYS)
    found = (answers_of(value, name) for name, value in (*named, ("ground_truth", truth)))
    golds = next(filter(None, found), ())
    return golds and tuple(dict.fromkeys(golds + answers_of(record.get("answer_aliases"), "answer_aliases")))


def read(path: Path, split: str, images: Path) -> Items:
    """An example of each question, whose positives are its `metadata.supporting_ids`."""
    for place, row in read_rows(path):
        if is_impossible(row):
            continue
        with at(place):
            metadata = object_of(row.get("metadata"), "metadata")
            ids = ids_of(metadata.get("supporting_ids"), "supporting_ids")
            id_, golds = id_of(row.get("id")), gold_answers(row)
            yield place, Example(question_text(row), ids, query_id=id_, answers=golds)


def _prompt_text(prompt: Any) -> str:
    """The text of the last user message of a prompt; a prompt may be one string too."""
    if isinstance(prompt, str):
        if not prompt.lstrip().startswith("[{"):
            return prompt
        try:
            prompt = json.loads(prompt)
        except ValueError as error:
            raise ValueError('"prompt" must be a text, or messages as a list or as JSON') from error
    messages = [m for m in list_of(prompt, "prompt") if isinstance(m, Mapping) and m.get("role") == "user"]
    return str(messages[-1].get("content") or "") if messages else ""
