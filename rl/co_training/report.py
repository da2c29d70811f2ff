"""The page of a loop: its rounds, drift of the policy's searches, searches that changed; then the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from agent.tools import SEARCH
from data.jsonl import read_json
from data.metrics.answers import normalize_unicode
from data.metrics.significance import format_estimate
from rl.co_training.gate import Asked
from rl.co_training.searches import Searches, read_searches

COLUMNS = ("round", "EM on dev, at its start", "dev searches that find", "plain questions", "gate")
DRIFT = ("round", "searches a question", "words a query", "queries that copy the question", "that find")
CHANGED = ("question", "in the first round", "in the last", "")
MOST_EXAMPLES = 5
"""Number of searches shown that gained, and as many that lost."""


def round_rows(history: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """A row of COLUMNS for each round."""
    rows = []
    for entry in history:
        gate = entry.get("gate") or {}
        refused = entry.get("refused")
        verdict = f"refused: {refused}" if refused else "passed" if gate else ""
        recall = f"{gate['old_found']:.3f} -> {gate['new_found']:.3f}" if gate else ""
        plain = format_estimate(gate["plain"], signed=True) if gate.get("plain") else ""
        rows.append([str(entry["round"]), format_estimate(entry["em"]), recall, plain, verdict])
    return rows


def drift(searches: Iterable[Searches]) -> list[str]:
    """The row of DRIFT for the trajectories of one evaluation, but for the round."""
    count, words, copies, found, queries = 0, 0, 0, 0, 0
    for each in searches:
        count += 1
        question = normalize_unicode(each.question.text)
        for call in each.calls:
            if call.tool == SEARCH.name:
                queries += 1
                words += len(call.query.split())
                copies += question in normalize_unicode(call.query)
                found += any(map(Asked(call.query, each.question).finds, call.passages))
    shares = [f"{value / max(1, queries):.3f}" for value in (copies, found)]
    return [f"{queries / max(1, count):.2f}", f"{words / max(1, queries):.1f}", *shares]


def changed_searches(before: Path, after: Path) -> Iterator[list[str]]:
    """Yield questions whose first search finds what it did not, or no longer does, with both searches."""
    first = {each.question.id: each for each in read_searches(before) if each.calls}
    for now in read_searches(after):
        then = first.get(now.question.id)
        if then and now.calls:
            found = [_finds(each) for each in (then, now)]
            if found[0] != found[1]:
                yield [now.question.text, _shown(then), _shown(now), "gained" if found[1] else "lost"]


def write_report(out: str | Path, page: Path | None = None) -> Path:
    """Write OUT/report.html, or another `page`, of a loop from what OUT holds so far."""
    from agent.evaluation.report.choice import Choice
    from agent.evaluation.report.page import write_report as write_page

    out = Path(out)
    history = read_json(out / "state.json")["state"]["history"]
    files = sorted(out.glob("round-*/dev/trajectories.jsonl"), key=lambda file: (len(file.parts[-3]), file))
    drifts = [[file.parts[-3].removeprefix("round-"), *drift(read_searches(file))] for file in files]
    changed = list(changed_searches(files[0], files[-1])) if len(files) > 1 else []
    gained, lost = ([row for row in changed if row[-1] == way] for way in ("gained", "lost"))
    title = f"First searches that changed: {len(gained)} gained, {len(lost)} lost"
    sections = (
        _table("Rounds", COLUMNS, round_rows(history))
        + _table("Searches on dev", DRIFT, drifts)
        + _table(title, CHANGED, gained[:MOST_EXAMPLES] + lost[:MOST_EXAMPLES])
    )
    return write_page(out, Choice(evaluations="round-*/dev"), out=page, sections=sections)


def _finds(searches: Searches) -> bool:
    call = searches.calls[0]
    return any(map(Asked(call.query, searches.question).finds, call.passages))


def _shown(searches: Searches) -> str:
    call = searches.calls[0]
    return f"{call.query}: " + "; ".join(passage.contents[:160] for passage in call.passages)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="rounds"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h3>{escape(title)}</h3><div class="scroll">{table}</div>'
