"""The data for the scripts of the page: curves, and the trajectories that were chosen."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agent.evaluation.records import verdict_of
from agent.evaluation.report.choice import Choice, choose, describe, every_question
from agent.evaluation.report.folders import Run, read_full
from agent.protocol import PROTOCOLS
from agent.tools import TOOLS
from data.errors import ConfigError, DataError
from data.pages.images import read_image, thumbnail

Record = Mapping[str, Any]

TEXT_LIMITS = (1_000, 300, 120)
"""Characters of a passage that the page shows; the next smaller one is taken if the page gets too big."""
_TRIAL = 50
"""Questions from whose size it is told how many may fit; no more are read."""
PICTURES, PICTURE_SIDE = 300, 240
"""Number of passages shown with a small copy of their picture, and its size in pixels. A page that got
too big has none."""


def browser_payload(run: Run, choice: Choice) -> dict[str, Any]:
    """Curves and trajectories for the scripts of the page, as JSON values of about `choice.megabytes`.

    Each passage, prompt and protocol message is stored once. A payload that is too big first gets shorter
    passages, then fewer questions; `left_out` says how many are missing, and `chosen` which are there.
    """
    limit_bytes = choice.megabytes * 1_000_000
    asked = choose(run, choice)
    candidates = asked[: _most(run, asked, limit_bytes)]
    full = {e.name: read_full(e, set(candidates)) for e in run.evaluations}
    order = {id_: place for place, id_ in enumerate(every_question(run))}
    kept, limits = len(candidates), iter(TEXT_LIMITS)
    limit = next(limits)
    while True:
        payload = _payload(run, full, sorted(candidates[:kept], key=order.__getitem__), limit)
        payload |= {"left_out": len(order) - kept, "chosen": describe(run, choice, kept, len(asked))}
        size = len(json.dumps(payload, ensure_ascii=False).encode(errors="surrogatepass"))
        if size <= limit_bytes or kept <= 1:
            return payload
        shorter = next(limits, None)
        if shorter is None:
            kept = max(1, min(kept - 1, int(kept * 0.95 * limit_bytes / size)))
        limit = shorter or limit


def _most(run: Run, asked: Sequence[str], limit_bytes: float) -> int:
    """Count the questions that could fit at all, as the first of them take room: the others are not read."""
    trial = list(asked[:_TRIAL])
    full = {e.name: read_full(e, set(trial)) for e in run.evaluations} if trial else {}
    size = len(json.dumps(_payload(run, full, trial, TEXT_LIMITS[-1])["questions"], ensure_ascii=False))
    return max(1, len(trial), int(1.5 * limit_bytes * len(trial) / max(size, 1)))


def _tags() -> dict[str, str]:
    """The tags of all protocols, each with its label; thought and answer are those of every protocol."""
    tags: dict[str, str] = {}
    for protocol in PROTOCOLS.values():
        calls = replace(protocol, tools=tuple(TOOLS)).call_tags
        tags |= {protocol.think_tag: "thought", protocol.answer_tag: "answer"}
        tags |= {tag: tag.replace("_", " ") for tag in calls}
    return tags


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


def _payload(
    run: Run, full: Mapping[str, Mapping[str, Record]], questions: Iterable[str], text_limit: int
) -> dict[str, Any]:
    texts, passages = _Table(), _Table()

    def one(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if record is None else _run_of(record, texts, passages, text_limit)

    rows = []
    for id_ in questions:
        records = [full[evaluation.name].get(id_) for evaluation in run.evaluations]
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
        "tags": _tags(),
        "evaluations": [evaluation.name for evaluation in run.evaluations],
        "metrics": {
            f"{key} ({name})" if name else key: points
            for name, rows in run.metrics.items()
            for key, points in _series(rows).items()
        },
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
    kept = {key: record[key] for key in ("answer", "stop_reason", "valid_format", "f1")}
    judged = record.get("judge", {}).get("verdict")
    return kept | {"right": verdict_of(record) > 0, "judged": judged, "prompt": prompt, "parts": parts}


def _asks(text: str, query: str) -> bool:
    """Return whether a turn asks this query, in plain text or inside the JSON of a tool call."""
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
