"""Well-known sets of questions, by name, and the rows of those that have columns of their own.

nq, triviaqa, popqa, hotpotqa, 2wiki, musique, bamboogle   the seven that Search-R1 reports; `search_r1`: all
frames, simpleqa                                           FRAMES, SimpleQA
BrowseComp-Plus is a file that its own script decrypts: {query_id, query, answer, evidence_docs, ...}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.formats.rows import id_of, list_of, object_of
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
_COLUMNS = {**dict.fromkeys(("Question", "Prompt", "problem", "query"), "question"), "Answer": "answer"}
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
    """A row of FRAMES, SimpleQA or BrowseComp-Plus in the columns of all others; any other as it is.

    BrowseComp-Plus' evidence becomes `metadata.supporting_ids`.
    """
    if "question" in record or not (
        named := {_COLUMNS[key]: record[key] for key in record if key in _COLUMNS}
    ):
        return record
    if not {"answer", "Answer"} & record.keys():
        return record
    row: dict[str, Any] = {"id": id_of(record.get("query_id")) or record.get("id"), **record, **named}
    given = row.pop("metadata", None)
    metadata = dict(given) if isinstance(given, Mapping) else {}
    if evidence := record.get("evidence_docs"):
        docs = [object_of(each, "evidence_docs") for each in list_of(evidence, "evidence_docs")]
        metadata["supporting_ids"] = [id_of(doc.get("docid"), "docid") for doc in docs]
    if reasoning := record.get("reasoning_types"):
        metadata["kind"] = str(reasoning).split(" | ")[0]
    return row | {"metadata": metadata}


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
