"""Scores of the passages of searches, which only a model can give, kept in a file beside the trajectories.

    {"line": 3, "call": 0, "id": "q7", "query": "...", "scores": {"12": {"fork": 0.25}}, "cost": {...}}

A search is named by the line of its trajectory and its number there; cost: [tokens, seconds] of each scorer.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.environment import Searcher
from agent.query_styles import QUERY_STYLES
from agent.tools import SEARCH
from data.errors import DataError
from data.jsonl import append_jsonl
from data.records import Hit
from rl.co_training.searches import Searched, Searches, read_scores, read_searches

AT_ONCE = 16


@dataclass(frozen=True)
class Candidates:
    """A search and the passages that it might have shown: those it did, then further hits of its query."""

    searches: Searches
    at: int
    hits: tuple[Hit, ...]

    @property
    def call(self) -> Searched:
        """Return the search."""
        return self.searches.calls[self.at]


@dataclass(frozen=True)
class Scored:
    """Scores of one search by passage id, and the tokens that they took."""

    scores: Mapping[str, float]
    tokens: int


Scorer = Callable[[Sequence[Candidates]], Awaitable[Sequence[Scored]]]
"""Scores the candidates of some searches."""


async def score_file(
    path: str | Path,
    out: str | Path,
    scorers: Mapping[str, Scorer],
    searcher: Searcher,
    pool: int,
    style: str = "query",
    mixed: bool = False,
    bar: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Counter[str]:
    """Score the searches of a trajectory file into `out`, those that stand there already apart; the costs.

    pool: so many hits of a query are candidates. mixed: only searches of questions that some samples answer
    and others do not. -> {"searches": n, "NAME tokens": n, "NAME seconds": n, ...} of all that stands there.
    Raises DataError where `out` holds other scores, or of another file.
    """
    append_jsonl(out, [])  # there is a file where there is nothing to score, too
    done, total = read_scores(out), Counter[str]()
    for record in done.values():
        if missing := scorers.keys() - record["cost"].keys():
            raise DataError(f"{out}: holds scores without {', '.join(sorted(missing))}; choose another file")
        _count(total, record["cost"])
    every = list(_searches(path, mixed, out))
    parts = [every[at : at + AT_ONCE] for at in range(0, len(every), AT_ONCE)]
    is_done = [[(searches.number, at) in done for searches, at in part] for part in parts]
    # One that was begun is scored again as a whole: what else is in a batch moves the last digits.
    todo = [each for each in zip(parts, is_done, strict=True) if not all(each[1])]
    for part, known in bar(todo):
        candidates = [await _candidates(searches, at, searcher, pool, style) for searches, at in part]
        rows: list[dict[str, Any]] = [{"scores": defaultdict(dict), "cost": {}} for _ in part]
        for name, scorer in scorers.items():
            started = time.monotonic()
            found = await scorer(candidates)
            seconds = (time.monotonic() - started) / len(part)
            for row, scored in zip(rows, found, strict=True):
                row["cost"][name] = [scored.tokens, round(seconds, 3)]
                for id_, score in scored.scores.items():
                    row["scores"][id_][name] = round(score, 6)
        for row, each in ((r, c) for r, c, there in zip(rows, candidates, known, strict=True) if not there):
            place = {"line": each.searches.number, "call": each.at, "id": each.searches.question.id}
            append_jsonl(out, [place | {"query": each.call.query} | row])
            _count(total, row["cost"])
    return total


def _count(total: Counter[str], cost: Mapping[str, Sequence[float]]) -> None:
    total["searches"] += 1
    for name, (tokens, seconds) in cost.items():
        total.update({f"{name} tokens": tokens, f"{name} seconds": seconds})


def _searches(path: str | Path, mixed: bool, scores: str | Path) -> Iterator[tuple[Searches, int]]:
    """Every search of the file and its number, of mixed groups alone if so asked; `scores` must be of it."""
    verdicts = defaultdict[str, set[bool]](set)
    if mixed:
        for searches in read_searches(path):
            verdicts[searches.group].add(searches.is_correct)
    for searches in read_searches(path, scores):
        if not mixed or len(verdicts[searches.group]) == 2:
            for at, call in enumerate(searches.calls):
                if call.tool == SEARCH.name and call.query.strip():
                    yield searches, at


async def _candidates(searches: Searches, at: int, searcher: Searcher, pool: int, style: str) -> Candidates:
    call = searches.calls[at]
    shown = [Hit(passage, 0.0, "") for passage in call.passages]
    if len(shown) < pool:
        history = [each.query for each in searches.calls[:at] if each.tool == SEARCH.name]
        found = await searcher.search(QUERY_STYLES[style](searches.question.text, history, call.query), pool)
        known = {passage.id for passage in call.passages}
        shown += [hit for hit in found if hit.passage.id not in known]
    return Candidates(searches, at, tuple(shown[: max(pool, len(call.passages))]))
