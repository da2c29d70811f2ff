"""What a run folder holds, as one object for the page. Whatever is missing stays empty."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.evaluate import METRICS, paired_difference, read_records, score
from data.errors import ConfigError, DataError
from data.images import read_image, thumbnail
from data.jsonl import read_json
from data.run_dir import read_metrics, read_run

TEXT_LIMITS = (1_000, 300, 120)
"""Characters of a passage that the page shows; the next smaller one is taken if the page gets too big."""
PICTURES, PICTURE_SIDE = 300, 240
"""How many passages are shown with a small copy of their picture, and its size in pixels. A page that got
too big has none."""


@dataclass(frozen=True)
class Evaluation:
    """One folder of evaluations/: its name, its scores, its records by question id."""

    name: str
    scores: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    finished: bool


@dataclass(frozen=True)
class Run:
    """All that the report shows of a run."""

    name: str
    info: Mapping[str, Any]
    config: str
    metrics: Sequence[Mapping[str, Any]]
    phases: Mapping[str, float]
    evaluations: Sequence[Evaluation]


def read_run_folder(path: Path | str) -> Run:
    """Everything the folder holds. Raises DataError where it is no run folder or a file is malformed."""
    path = Path(path)
    info = read_run(path)
    config = path / "config.yaml"
    return Run(
        name=path.resolve().name,
        info=info,
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        metrics=read_metrics(path),
        phases=_read_phases(path / "phases.json"),
        evaluations=_read_evaluations(path / "evaluations"),
    )


def compare(run: Run) -> tuple[Evaluation, Evaluation, dict[str, Any]] | str:
    """The evaluations before and after with their paired difference, or why there is none."""
    named = {evaluation.name: evaluation for evaluation in run.evaluations}
    if not {"before", "after"} <= set(named):
        return "A difference needs the evaluations “before” and “after”."
    before, after = named["before"], named["after"]
    try:
        return before, after, paired_difference(before.records.values(), after.records.values())
    except DataError as error:
        return f"No paired difference: {error}."


def browser_payload(run: Run, limit_bytes: int) -> dict[str, Any]:
    """Curves and trajectories for the scripts of the page, as JSON values of about `limit_bytes` at most.

    Each passage, prompt and protocol message is stored once. A payload that is too big first gets
    shorter passages, then fewer questions; `left_out` says how many are missing.
    """
    questions = list(dict.fromkeys(id_ for e in run.evaluations for id_ in e.records))
    kept = len(questions)
    limits = iter(TEXT_LIMITS)
    limit = next(limits)
    while True:
        payload = _payload(run, questions[:kept], limit) | {"left_out": len(questions) - kept}
        size = len(json.dumps(payload, ensure_ascii=False).encode())
        if size <= limit_bytes or kept <= 1:
            return payload
        shorter = next(limits, None)
        if shorter is None:
            kept = max(1, min(kept - 1, int(kept * 0.95 * limit_bytes / size)))
        limit = shorter or limit


class _Table:
    """Distinct values in the order in which they were first seen; `add` gives the place of a value."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._places: dict[Any, int] = {}

    def __contains__(self, key: Any) -> bool:
        return key in self._places

    def add(self, key: Any, row: Any) -> int:
        if key not in self._places:
            self._places[key] = len(self.rows)
            self.rows.append(row)
        return self._places[key]


def _payload(run: Run, questions: Iterable[str], text_limit: int) -> dict[str, Any]:
    texts, passages = _Table(), _Table()

    def one(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if record is None else _run_of(record, texts, passages, text_limit)

    rows = []
    for id_ in questions:
        records = [evaluation.records.get(id_) for evaluation in run.evaluations]
        first = next(record for record in records if record is not None)
        rows.append(
            {
                "id": id_,
                "text": first["question"],
                "gold": first["gold_answers"],
                "kind": str(first["metadata"].get("kind", "all")),
                "runs": [one(record) for record in records],
            }
        )
    return {
        "evaluations": [evaluation.name for evaluation in run.evaluations],
        "metrics": _series(run.metrics),
        "questions": rows,
        "texts": texts.rows,
        "passages": passages.rows,
    }


def _run_of(record: Mapping[str, Any], texts: _Table, passages: _Table, text_limit: int) -> dict[str, Any]:
    """One trajectory for the page: its parts in order, [kind, content] each.

    policy: text; search: {query, hits, seconds, error}; message: place in texts. The observation of a
    search is shown as its hits.
    """
    searches = [_search(search, passages, text_limit) for search in record["searches"]]
    parts: list[list[Any]] = []
    prompt = None
    for segment in record["segments"]:
        text = segment["text"]
        if segment["kind"] == "prompt":
            template = text.replace(record["question"].strip(), "{question}")
            prompt = texts.add(template, template)
        elif segment["kind"] == "policy":
            parts.append(["policy", text])
            if searches and _asks(text, searches[0]["query"]):
                parts.append(["search", searches.pop(0)])
        elif not (parts and parts[-1][0] == "search"):
            parts.append(["message", texts.add(text, text)])
    parts += [["search", search] for search in searches]
    keys = ("answer", "stop_reason", "valid_format", "em", "f1")
    return {key: record[key] for key in keys} | {"prompt": prompt, "parts": parts}


def _asks(text: str, query: str) -> bool:
    """Whether a turn asks this query, in plain text or inside the JSON of a tool call."""
    return any(q in text for q in (query, json.dumps(query)[1:-1], query.replace('"', '\\"')))


def _search(search: Mapping[str, Any], passages: _Table, text_limit: int) -> dict[str, Any]:
    hits = []
    for hit in search["hits"]:
        key, text = (hit["generation"], hit["id"]), hit.get("text", "")
        cut = text if len(text) <= text_limit else text[:text_limit].rstrip() + " …"
        row = [hit["id"], hit["title"], cut]
        pictured = hit.get("image") and text_limit == TEXT_LIMITS[0] and len(passages.rows) < PICTURES
        if pictured and key not in passages:
            row += _small_copy(hit["image"])
        hits.append([passages.add(key, row), round(hit["score"], 4)])
    return {
        "query": search["query"],
        "hits": hits,
        "seconds": round(search["seconds"], 4),
        "error": search["error"],
    }


def _small_copy(image: str) -> list[str]:
    """The picture as a data URL; nothing where it is no longer there, or no file of this machine."""
    try:
        small = thumbnail(read_image(image), PICTURE_SIDE)
    except (DataError, ConfigError):
        return []
    return [f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"]


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Rows of metrics -> {key: [[step, value], ...]}; a null (it was NaN) leaves a gap."""
    series: dict[str, list[list[float]]] = {}
    for row in metrics:
        for key, value in row.items():
            if key != "step" and value is not None:
                series.setdefault(key, []).append([row["step"], float(f"{value:.6g}")])
    return series


def _read_phases(path: Path) -> dict[str, float]:
    """{"seconds": {phase: seconds}}; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        seconds = read_json(path)["seconds"]
        return {str(phase): float(value) for phase, value in seconds.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: must be {{"seconds": {{phase: seconds}}}}') from error


def _read_evaluations(path: Path) -> list[Evaluation]:
    """All evaluations: before, after, then by name; not those of training on dev, which are a curve."""
    first = {"before": 0, "after": 1}
    found = (mark.parent for mark in path.glob("*/trajectories.jsonl"))
    folders = [folder for folder in found if not re.fullmatch(r"dev-\d+", folder.name)]
    folders.sort(key=lambda folder: (first.get(folder.name, 2), folder.name))
    return [found for folder in folders if (found := _read_evaluation(folder)) is not None]


def _read_evaluation(folder: Path) -> Evaluation | None:
    records = {record["id"]: _judged(record) for record in read_records(folder)}
    path = folder / "scores.json"
    if path.exists():
        return Evaluation(folder.name, read_json(path), records, True)
    return Evaluation(folder.name, score(records.values()), records, False) if records else None


def _judged(record: Mapping[str, Any]) -> Mapping[str, Any]:
    missing = [key for key in ("id", "segments", "searches", *METRICS) if key not in record]
    if missing:
        raise DataError(f"trajectory {record.get('id')!r}: no field {', '.join(missing)}")
    return record
