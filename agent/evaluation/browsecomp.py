"""BrowseComp-Plus (Chen et al. 2025, arXiv 2508.06600): run files that its own script reads, and its summary.

    run_QUERY.json             {query_id, tool_call_counts, status, retrieved_docids, result, metadata}
    evaluation_summary.json    the keys of its script, and under "sleuth" what is measured without its faults

Judge with `--judge.rubric browsecomp`, ask with `--protocol.answer_form cited`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from agent.evaluation.records import Record, clusters_of, iterate_records, response_of
from data.errors import DataError
from data.formats.rows import ids_of
from data.jsonl import read_json, write_json
from data.metrics.calibration import expected_calibration_error, published_calibration_error
from data.metrics.significance import estimate
from data.records import Question
from data.run_dir import check_free

_SUMMARY = "evaluation_summary.json"
_CONFIDENCE = re.compile(r"\bconfidence\**:\**\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


def write_run_files(evaluation: Path, out: Path) -> dict[str, Any]:
    """Write a run file for each question of an evaluation into `out`, and the summary, which it returns."""
    settings = read_json(evaluation / "evaluation.json")
    rows = []
    for record in iterate_records(evaluation):
        run = run_file(record, settings)
        write_json(out / _file_name(record["id"]), run)
        rows.append(_row(record, run))
    found = summary(rows, settings)
    write_json(out / _SUMMARY, found)
    return found


def check_run_files(out: Path, questions: Iterable[Question]) -> None:
    """Raise ConfigError where `out` can be no folder, or holds files of others, which the script counts."""
    check_free(out, {_SUMMARY, *(_file_name(question.id) for question in questions)})


def _file_name(id_: str) -> str:
    """The run file of a question; a hash stands for an id that is no safe name."""
    safe = re.fullmatch(r"[A-Za-z0-9._-]{1,200}", id_)
    return f"run_{id_ if safe else hashlib.sha256(id_.encode()).hexdigest()[:16]}.json"


def run_file(record: Record, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run of one question as BrowseComp-Plus' clients write it."""
    calls = Counter(search.get("tool", "search") for search in record["searches"])
    found = {_document_of(hit) for search in record["searches"] for hit in search["hits"]}
    response = response_of(record) or (record["answer"] or "")
    return {
        "metadata": {"model": settings.get("policy"), "retriever": settings.get("retriever")},
        "query_id": record["id"],
        "tool_call_counts": dict(calls),
        "status": "completed" if record["answer"] is not None else str(record["stop_reason"]),
        "retrieved_docids": sorted(found),
        "result": [{"type": "output_text", "output": response}],
    }


def _document_of(hit: Mapping[str, Any]) -> str:
    """The document that a passage was cut from, where its metadata names it; else the passage is one."""
    return str((hit.get("metadata") or {}).get("document", hit["id"]))


def _row(record: Record, run: Mapping[str, Any]) -> dict[str, Any]:
    evidence = set(ids_of(record["metadata"].get("supporting_ids"), "supporting_ids"))
    judged = record.get("judge", {})
    said = _CONFIDENCE.search(judged.get("reply") or "")
    return {
        "record": {"id": record["id"], "metadata": record["metadata"]},
        "correct": judged.get("verdict") == "correct" if judged else bool(record["em"]),
        "judged": judged.get("verdict") is not None and bool(judged.get("reply")),
        "judge_confidence": min(float(said[1]), 100.0) / 100 if said else None,
        "confidence": record.get("confidence"),
        "recall": len(evidence & set(run["retrieved_docids"])) / len(evidence) if evidence else None,
        "cited": _cited(run["result"][-1]["output"]),
        "evidence": evidence,
        "calls": run["tool_call_counts"],
    }


def _cited(response: str) -> set[str]:
    """The ids in square brackets, plain or full width.   "so [12], [3; 4]" -> {"12", "3", "4"}"""
    inside = re.findall(r"\[([^\[\]]*)\]|【([^【】]*)】", response)
    return {id_ for pair in inside for text in pair for id_ in re.findall(r"\d+", text)}


def summary(rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary that is sent in, in percent, and under `sleuth` our own.

    sleuth: accuracy and recall with intervals, the calibration error over bins of equal mass with every
    answer in one, citations. Raises DataError where there is no run.
    """
    rows = list(rows)
    if not rows:
        raise DataError("no run to summarise")
    theirs = [row for row in rows if row["judged"] and row["judge_confidence"] is not None]
    ours = [row for row in rows if row["confidence"] is not None]
    recalled = [row for row in rows if row["recall"] is not None]
    calls = sum((Counter(row["calls"]) for row in rows), Counter[str]())
    published = published_calibration_error(*_pairs(theirs, "judge_confidence")) if theirs else 0.0
    return {
        "LLM": settings.get("policy"),
        "Accuracy (%)": _percent(np.mean([row["correct"] for row in rows])),
        "Recall (%)": _percent(np.mean([row["recall"] for row in recalled])) if recalled else None,
        "avg_tool_stats": {tool: count / len(rows) for tool, count in calls.items()},
        "Calibration Error (%)": _percent(published),
        "Retriever": settings.get("retriever"),
        "Link": "change me when submitting",
        "Evaluation Date": date.today().isoformat(),
        "per_query_metrics": [
            {
                "query_id": row["record"]["id"],
                "correct": row["correct"],
                "recall": None if row["recall"] is None else _percent(row["recall"]),
            }
            for row in rows
        ],
        "sleuth": {
            "accuracy": _estimate(rows, "correct"),
            "recall": _estimate(recalled, "recall"),
            "answers_with_confidence": len(ours),
            "calibration_error_percent": (
                _percent(expected_calibration_error(*_pairs(ours, "confidence"), norm=2)) if ours else None
            ),
            "citations": _citations(rows),
        },
    }


def _pairs(rows: list[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[key] for row in rows]), np.array([float(row["correct"]) for row in rows])


def _estimate(rows: list[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    if not rows:
        return None
    values = np.array([[float(row[key])] for row in rows])
    return estimate(values, clusters_of(row["record"] for row in rows))[0]


def _citations(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of responses that cite, and of those precision and recall of the cited against the evidence."""
    citing = [row for row in rows if row["cited"]]
    shared = [len(row["cited"] & row["evidence"]) for row in citing]
    precision = [n / len(row["cited"]) for n, row in zip(shared, citing, strict=True)]
    recall = [n / max(len(row["evidence"]), 1) for n, row in zip(shared, citing, strict=True)]
    return {
        "coverage": len(citing) / len(rows),
        "precision": float(np.mean(precision)) if citing else None,
        "recall": float(np.mean(recall)) if citing else None,
    }


def _percent(value: Any) -> float:
    return round(100 * float(value), 2)
