"""Well-known sets of questions, by name, and the rows of those that have columns of their own.

nq, triviaqa, popqa, hotpotqa, 2wiki, musique, bamboogle   the seven that Search-R1 reports; `search_r1`: all
frames, simpleqa                                           FRAMES, SimpleQA
BrowseComp-Plus is a file that its own script decrypts: {query_id, query, answer, evidence_docs, ...}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.formats.rows import first_of, id_of, list_of, object_of
from data.records import Question


class AnswerSet(NamedTuple):
    """The place of a set on the hub, and the metric of its own script (`answers.OFFICIAL`, or judge)."""

    source: str
    split: str
    metric: str = "em"


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
SEVEN = {
    "nq": AnswerSet(f"{_FLASHRAG}:nq", "test"),
    "triviaqa": AnswerSet(f"{_FLASHRAG}:triviaqa", "test", "triviaqa_em"),
    "popqa": AnswerSet(f"{_FLASHRAG}:popqa", "test", "contains"),
    "hotpotqa": AnswerSet(f"{_FLASHRAG}:hotpotqa", "dev", "hotpot_f1"),
    "2wiki": AnswerSet(f"{_FLASHRAG}:2wikimultihopqa", "dev", "hotpot_f1"),
    "musique": AnswerSet(f"{_FLASHRAG}:musique", "dev", "f1"),
    "bamboogle": AnswerSet(f"{_FLASHRAG}:bamboogle", "test"),
}
SETS = {
    **SEVEN,
    "frames": AnswerSet("google/frames-benchmark", "test", "judge"),
    "simpleqa": AnswerSet("basicv8vc/SimpleQA", "test", "judge"),
}
_COLUMNS = {
    **dict.fromkeys(("Question", "Prompt", "problem", "query", "input"), "question"),
    **dict.fromkeys(("Answer", "possible_answers"), "answer"),
}
_IDS = ("id", "_id", "query_id", "question_id", "QuestionId")
_ENCRYPTED = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
_ALIASES = {"2wikimultihopqa": "2wiki"}


def official_metric(data_source: str) -> str | None:
    """The metric of the set of that name; None for a set that is none of these."""
    name = data_source.lower()
    found = SETS.get(_ALIASES.get(name, name))
    return found.metric if found else None


def set_names(source: str) -> list[str]:
    """The names in a source that stands for several: `search_r1` for the seven."""
    return [*SEVEN] if source == "search_r1" else [source]


def common_row(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a well-known set, as its makers hand it out, in the columns of all others; any other as it is.

    PopQA, TriviaQA, HotpotQA, 2Wiki, KILT, FRAMES, SimpleQA, BrowseComp-Plus, whose evidence becomes
    `metadata.supporting_ids`. Raises ValueError for a set that is still encrypted.
    """
    row = {name: record[key] for key, name in _COLUMNS.items() if key in record and name not in record}
    if "input" in record and "question" in row and "output" in record:
        row["answer"] = _answers_of_kilt(record["output"])
    if "question" in row and "answer" not in {*row, *record}:
        return record  # what has a `query` and no answer is none of these
    if {"evidence_docs", "canary"} & record.keys() and _ENCRYPTED.fullmatch(str(row.get("question"))):
        raise ValueError("the question is encrypted: decrypt the set with the script of its makers first")
    if own := id_of(first_of(record, *_IDS)):
        row["id"] = own
    if more := _metadata_of(record):
        given = record.get("metadata")
        row["metadata"] = {**(given if isinstance(given, Mapping) else {}), **more}
    return {**record, **row}


def _answers_of_kilt(output: Any) -> list[Any]:
    answers = (object_of(each, "output").get("answer") for each in list_of(output, "output"))
    return [each for each in answers if each is not None]


def _metadata_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what columns beside `metadata` say, or what a text in it holds, as SimpleQA's table has it."""
    found: dict[str, Any] = {}
    if "problem" in record:
        found = object_of(record.get("metadata"), "metadata")
        found |= {"kind": found["topic"]} if "topic" in found else {}
    if evidence := record.get("evidence_docs"):
        docs = [object_of(each, "evidence_docs") for each in list_of(evidence, "evidence_docs")]
        found["supporting_ids"] = [id_of(doc.get("docid"), "docid") for doc in docs]
    if reasoning := record.get("reasoning_types"):
        found["kind"] = str(reasoning).split(" | ")[0]
    if "supporting_facts" in record and isinstance(record.get("type"), str):  # HotpotQA, 2Wiki
        found["kind"] = record["type"]
    return found


def slice_of_each(questions: Sequence[Question], count: int) -> list[Question]:
    """At most so many questions of each set, always the same: those whose ids have the smallest hashes."""
    by_set: dict[str, list[Question]] = {}
    for question in questions:
        by_set.setdefault(str(question.metadata.get("data_source")), []).append(question)
    kept = {
        question.id
        for of in by_set.values()
        for question in sorted(of, key=lambda q: hashlib.sha256(q.id.encode()).digest())[:count]
    }
    return [question for question in questions if question.id in kept]
