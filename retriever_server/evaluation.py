"""Evaluation of retrievers: rank metrics against qrels, gold answers in the passages, two side by side."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import regex

from data.errors import ConfigError, DataError
from data.formats.trec import MAX_GRADE
from data.metrics.answers import separate_characters
from data.metrics.significance import bootstrap, randomisation_p
from data.records import Hit, Qrels, Question
from data.text import one_i
from retriever_server.retriever import Filter, Retriever

METRICS = "nDCG@10,R@10,R@100,RR@10,AP,P@10"
ANSWER_CUTOFFS = (1, 5, 20, 100)
_OTHER_NAMES = {"mrr": "RR", "map": "AP", "recall": "R"}
_QUERIES_AT_ONCE = 64

Rankings = dict[str, list[Hit]]
"""Query id -> its hits, best first."""
Values = dict[str, dict[str, float]]
"""Metric -> query id -> value."""


def rank_all(
    retriever: Retriever,
    queries: Sequence[Question],
    top_k: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    where: Filter | None = None,
) -> Rankings:
    """Return the best `top_k` hits of every query among what `where` allows; `progress` wraps the batches."""
    rankings: Rankings = {}
    for start in progress(range(0, len(queries), _QUERIES_AT_ONCE)):
        batch = queries[start : start + _QUERIES_AT_ONCE]
        found = retriever.search([query.asked for query in batch], top_k, where)
        rankings |= {query.id: hits for query, hits in zip(batch, found, strict=True)}
    return rankings


def parse_metrics(names: str, top_k: int) -> list[Any]:
    """Return the ir-measures of names with commas between them; recall@k, MRR@k and MAP are understood too.

    Raises ConfigError for a name that is none, and for a cutoff that lies beyond `top_k`.
    """
    listed = re.findall(r"(?:[^,(]|\([^)]*\))+", names)  # a metric may have commas in brackets
    if not (stripped := [name.strip() for name in listed if name.strip()]):
        raise ConfigError(f"metrics {names!r}: name one, such as nDCG@10")
    return [_parse_metric(name, top_k) for name in stripped]


def _parse_metric(name: str, top_k: int) -> Any:
    import ir_measures

    known = re.sub(r"^\w+", lambda word: _OTHER_NAMES.get(word[0].lower(), word[0]), name)
    try:
        measure = ir_measures.parse_measure(known)
        measure.validate_params()
    except (NameError, ValueError, SyntaxError, TypeError, KeyError, AssertionError):
        allowed = "nDCG@k, recall@k, MRR@k, MAP, P@k or another name of ir-measures"
        raise ConfigError(f"metric {name!r}: must be {allowed}") from None
    if measure.params.get("cutoff", 1) > top_k:
        raise ConfigError(f"metric {name!r}: looks at more than top_k = {top_k} hits")
    for value in measure.params.values():  # trec_eval ends the process on what is out of range
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= MAX_GRADE:
                raise ConfigError(f"metric {name!r}: {number} must be 1 to {MAX_GRADE:,}")
    try:
        list(ir_measures.iter_calc([measure], {"0": {"1": 1, "2": 0}}, {"0": {"1": 2.0, "2": 1.0}}))
    except Exception as error:  # each of its providers raises of its own kinds
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"metric {name!r}: ir-measures cannot compute it here ({reason})") from error
    return measure


def judge(rankings: Rankings, qrels: Qrels, measures: Sequence[Any]) -> Values:
    """Score each query that has qrels by each measure; one without hits gets 0.

    Hits count in their order, whatever their scores. Raises DataError where no query has qrels.
    """
    import ir_measures

    judged = {id_: qrels[id_] for id_ in rankings if id_ in qrels}
    if not judged:
        example = f"{next(iter(rankings), '')!r} and {next(iter(qrels), '')!r}"
        raise DataError(f"none of the queries ({len(rankings)}) has qrels: their ids are such as {example}")
    names: dict[str, str] = {}  # some of the providers want numbers, or write tables with blanks

    def numbered(passage: str) -> str:
        return names.setdefault(passage, str(len(names)))

    asked, truth, run = list(judged), {}, {}
    for number, id_ in enumerate(asked):
        # trec_eval crashes on a query whose grades are all below 0; where none is above 0, 0 says the same.
        lowest = 0 if max(qrels[id_].values()) < 0 else -MAX_GRADE
        truth[str(number)] = {numbered(passage): max(lowest, grade) for passage, grade in qrels[id_].items()}
        ranked = reversed(list(enumerate(rankings[id_])))
        run[str(number)] = {numbered(hit.passage.id): -float(rank) for rank, hit in ranked}
    values: Values = {str(measure): dict.fromkeys(judged, 0.0) for measure in measures}
    try:
        for found in ir_measures.iter_calc(measures, truth, run):
            value = 0.0 if math.isnan(found.value) else found.value
            values[str(found.measure)][asked[int(found.query_id)]] = value
    except ArithmeticError as error:  # of some where nothing is relevant
        raise DataError(f"ir-measures cannot compute {', '.join(values)} here ({error})") from error
    return values


def judge_answers(rankings: Rankings, queries: Sequence[Question], top_k: int) -> Values:
    """DPR's accuracy, answer@k: 1 where one of the best k passages holds a gold answer.

    Karpukhin et al. 2020; only queries with gold answers count. Raises DataError where none has.
    """
    answerable = [query for query in queries if query.gold_answers]
    if not answerable:
        raise DataError(f"none of the queries ({len(queries)}) has gold answers")
    first = {query.id: _first_with_answer(rankings[query.id], query.gold_answers) for query in answerable}
    cutoffs = [k for k in ANSWER_CUTOFFS if k <= top_k]
    return {f"answer@{k}": {id_: float(rank < k) for id_, rank in first.items()} for k in cutoffs}


def has_answer(text: str, gold_answers: Iterable[str]) -> bool:
    """Return whether the words of a gold answer stand side by side in the text, as DPR looks for them."""
    words = f" {' '.join(_words(text))} "
    return any(bool(gold := _words(answer)) and f" {' '.join(gold)} " in words for answer in gold_answers)


def means(values: Values) -> dict[str, float]:
    """Return the mean of each metric over its queries."""
    return {metric: float(np.mean(list(of.values()))) for metric, of in values.items()}


def compare(ours: Values, other: Values) -> dict[str, dict[str, float]]:
    """Ours minus the other's for each metric: mean, 95 % interval (bootstrap), p (paired randomisation)."""
    compared = {}
    for metric in ours:
        ids = list(ours[metric])
        differences = np.array([[ours[metric][id_] - other[metric][id_]] for id_ in ids])
        low, high = bootstrap(differences, ids)[:, 0].tolist()
        p = float(randomisation_p(differences)[0])
        compared[metric] = {"difference": float(differences.mean()), "low": low, "high": high, "p": p}
    return compared


def _first_with_answer(hits: Sequence[Hit], gold_answers: Sequence[str]) -> float:
    """Return the rank, from 0, of the first passage that holds an answer; infinity without one."""
    ranks = (rank for rank, hit in enumerate(hits) if has_answer(hit.passage.text, gold_answers))
    return next(ranks, float("inf"))


@lru_cache(1 << 14)
def _words(text: str) -> list[str]:
    """DPR's words: runs of letters, digits and marks, and every other sign but spaces; decomposed, lower.

    Where a script writes no spaces, a character is a word.
    """
    decomposed = unicodedata.normalize("NFD", separate_characters(text))
    return regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", one_i(decomposed.lower()))
