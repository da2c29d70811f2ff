"""Trajectories on disk: one JSON object each, back and forth without loss.

The full form is the whole token ledger. The compact form (`tokens=False`), which evaluations write,
leaves out token ids and log-probs and keeps how many there were: enough to read and to score, not to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.tools import SEARCH
from agent.trajectory import Picture, SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import DataError
from data.records import FORMAT_VERSION, Hit, Passage, Question


def to_record(trajectory: Trajectory, tokens: bool = True) -> dict[str, Any]:
    """The trajectory as plain JSON values; `tokens=False` gives the compact form."""
    question = trajectory.question
    return {
        "format_version": FORMAT_VERSION,
        "id": question.id,
        "question": question.text,
        "gold_answers": list(question.gold_answers),
        "metadata": dict(question.metadata),
        "answer": trajectory.answer,
        **({} if trajectory.confidence is None else {"confidence": trajectory.confidence}),
        "stop_reason": str(trajectory.stop_reason),
        "valid_format": trajectory.valid_format,
        "invalid_actions": trajectory.invalid_actions,
        "segments": [_segment_record(segment, tokens) for segment in trajectory.segments],
        "searches": [_search_record(search) for search in trajectory.searches],
    }


def from_record(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory that `to_record` wrote; other keys of the record are ignored.

    Raises DataError for the compact form, a newer format, or a field that is missing or wrong.
    """
    check_format(record, f"trajectory {record.get('id')!r}")
    try:
        return Trajectory(
            question=Question(
                id=record["id"],
                text=record["question"],
                gold_answers=tuple(record["gold_answers"]),
                metadata=dict(record["metadata"]),
            ),
            segments=[_segment(segment) for segment in record["segments"]],
            stop_reason=StopReason(record["stop_reason"]),
            answer=record["answer"],
            searches=[_search(search) for search in record["searches"]],
            invalid_actions=record["invalid_actions"],
            valid_format=record["valid_format"],
            confidence=record.get("confidence"),
        )
    except KeyError as error:
        compact = " (a compact record holds no tokens: sleuth evaluate --keep_tokens)"
        hint = compact if error.args[0] == "token_ids" else ""
        raise DataError(f"trajectory {record.get('id')!r}: no field {error}{hint}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"trajectory {record.get('id')!r}: {error}") from error


def trajectory_file(path: str | Path) -> Path:
    """Return the file of trajectories: in the folder of an evaluation its own."""
    return Path(path) / "trajectories.jsonl" if Path(path).is_dir() else Path(path)


def check_format(record: Mapping[str, Any], place: str) -> None:
    """Raise DataError, which names the place, for what is no trajectory, or one in another format."""
    version = record.get("format_version")
    if version is None:
        writers = "`sleuth evaluate` into trajectories.jsonl, or `sleuth train --keep_rollouts_every 1`"
        found = ", ".join(record)[:80] or "nothing"
        raise DataError(f"{place}: no trajectory, as written by {writers}; it has the fields {found}")
    if version != FORMAT_VERSION:
        raise DataError(f"{place}: format_version {version!r}, not {FORMAT_VERSION}")


def _segment_record(segment: Segment, tokens: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": str(segment.kind), "text": segment.text}
    if tokens:
        record |= {"token_ids": segment.token_ids, "logprobs": segment.logprobs}
    else:
        record["tokens"] = len(segment.token_ids)
    if segment.pictures:
        record["pictures"] = [vars(picture) for picture in segment.pictures]
    return record | {"weights_version": segment.weights_version}


def _segment(record: Mapping[str, Any]) -> Segment:
    return Segment(
        kind=SegmentKind(record["kind"]),
        token_ids=list(record["token_ids"]),
        text=record["text"],
        logprobs=None if record["logprobs"] is None else list(record["logprobs"]),
        weights_version=record["weights_version"],
        pictures=tuple(Picture(**picture) for picture in record.get("pictures", ())),
    )


def _search_record(search: SearchRecord) -> dict[str, Any]:
    hits = [
        {
            "id": hit.passage.id,
            "title": hit.passage.title,
            "text": hit.passage.text,
            **({"metadata": dict(hit.passage.metadata)} if hit.passage.metadata else {}),
            **({"image": hit.passage.image} if hit.passage.image else {}),
            "score": hit.score,
            "generation": hit.generation,
        }
        for hit in search.hits
    ]
    return {
        "query": search.query,
        "hits": hits,
        "seconds": search.seconds,
        "error": search.error,
        "turn": search.turn,
        **({} if search.tool == SEARCH.name else {"tool": search.tool}),
    }


def _search(record: Mapping[str, Any]) -> SearchRecord:
    hits = [
        Hit(
            Passage(hit["id"], hit["text"], hit["title"], hit.get("metadata") or {}, hit.get("image", "")),
            hit["score"],
            hit["generation"],
        )
        for hit in record["hits"]
    ]
    turn, tool = record.get("turn", 0), record.get("tool", SEARCH.name)
    return SearchRecord(record["query"], hits, record["seconds"], record["error"], turn, tool)
