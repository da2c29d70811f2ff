"""Hard negatives: what a retriever finds for a query that is not one of its positives.

Killed and started again, `mine` goes on with the next whole batch; the file comes out as if never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.corpus import Corpus
from data.errors import ConfigError, DataError, require
from data.jsonl import append_in_batches, read_jsonl
from data.records import Example, Hit, Passage
from retriever_server.evaluation import has_answer
from retriever_server.retriever import Retriever, Scorer, Scores, texts_of
from retriever_server.training.examples import content_key, passage_key

Progress = Callable[[Any], Iterable[int]]


@dataclass(frozen=True)
class Rules:
    """Rules by which passages found become negatives. Ranks count from 1 and leave positives out."""

    first_rank: int = 1
    """Negatives are looked for from this rank on, not counting positives."""
    last_rank: int = 100
    """... to this one."""
    per_query: int = 15
    """The most negatives of a query."""
    pick: Literal["top", "random"] = "top"
    """The first of those allowed, or a random choice of them (BGE), the same in every run."""
    margin: float | None = None
    """A negative scores at least so much below the worst positive."""
    relative_margin: float | None = None
    """The same as a share of that positive's score: .05 is NV-Retriever's TopK-PercPos of 95 %."""
    keep_answers: bool = False
    """Keep passages that hold one of the query's answers; without it they are no negatives."""
    seed: int = 0
    """Seed of what is chosen at random."""

    @property
    def keeps_margin(self) -> bool:
        """Return whether scores decide."""
        return self.margin is not None or self.relative_margin is not None

    def __post_init__(self) -> None:
        if not 1 <= self.first_rank <= self.last_rank:
            ranks = f"first_rank = {self.first_rank}, last_rank = {self.last_rank}"
            raise ConfigError(f"{ranks}: must be 1 <= first <= last")
        require(self.per_query >= 1, "per_query", self.per_query, ">= 1")
        require(self.pick in ("top", "random"), "pick", self.pick, "top or random")


@dataclass(frozen=True)
class Mined:
    """Counts of a file of mined examples."""

    examples: int
    negatives: int
    without: int
    """Examples that got no negative."""


def mine(
    examples: Sequence[Example],
    retriever: Retriever,
    corpus: Corpus,
    out: str | Path,
    rules: Rules | None = None,
    teacher: Scorer | Retriever | None = None,
    progress: Progress = iter,
    queries_at_once: int = 64,
) -> Mined:
    """Write the examples to `out` with mined negatives and with scores.

    The scores, which are kept and held against the margins, are the teacher's (a scorer's, or another
    retriever's); without a teacher the retriever's own. `provenance.scores` says whose. A retriever scores
    what it finds and, where it can (`Retriever.score`), any other passage. A positive without a score is
    below all that have one: nothing keeps a margin to it. No negative is a positive of an example that asks
    the same, or has the text of one.

    Raises ConfigError where `out` comes from other queries or settings, DataError for a hit that is not in
    the corpus, or has another text there, and where the retriever changes meanwhile.
    """
    rules = rules or Rules()
    generation = retriever.generation
    differing = {key: value for key, value in asdict(rules).items() if value != getattr(Rules, key)}
    provenance = {"corpus": corpus.content_hash, "generation": generation, "rules": differing}
    provenance["scores"] = _name(teacher) if teacher else generation
    positives: dict[int, dict[str, None]] = {}  # of all examples that ask the same
    for example in examples:
        positives.setdefault(content_key(example.asked), {}).update(dict.fromkeys(example.positives))

    def rows(batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        known = [positives[content_key(example.asked)] for example in batch]
        depth = rules.last_rank + max(map(len, known))
        rankings = search_checked(retriever, batch, depth, corpus, generation)
        goods = [[corpus_passage(corpus, id_) for id_ in ids] for ids in known]
        found = [_candidates(*each, rules) for each in zip(batch, rankings, goods, strict=True)]
        if isinstance(teacher, Scorer) and not rules.keeps_margin:  # no need to score them all
            found = [_pick(example, passages, rules) for example, passages in zip(batch, found, strict=True)]
        judged = ([()] * len(batch), teacher, depth) if teacher else (rankings, retriever, None)
        scores = _scores(batch, goods, found, *judged)
        for example, passages, of in zip(batch, found, scores, strict=True):
            if rules.keeps_margin:
                limit = _limit(example, of, rules)
                passages = [passage for passage in passages if of.get(passage.id, -math.inf) <= limit]
            chosen = tuple(passage.id for passage in _pick(example, passages, rules))
            kept = {id_: round(of[id_], 6) for id_ in (*example.positives, *chosen) if id_ in of}
            mined = replace(example, negatives=chosen, scores=kept or None)
            yield replace(mined, provenance={**example.provenance, **provenance}).as_record()

    return write_in_batches(examples, rows, Path(out), provenance, progress, queries_at_once)


def search_checked(
    retriever: Retriever, examples: Sequence[Example], depth: int, corpus: Corpus, generation: str
) -> list[list[Hit]]:
    """The best `depth` hits of each query; raises as `mine` does."""
    rankings = retriever.search([example.asked for example in examples], depth)
    if retriever.generation != generation:
        raise DataError(f"the retriever changed from {generation} to {retriever.generation} meanwhile")
    if retriever.corpus is not None and retriever.corpus.content_hash == corpus.content_hash:
        return rankings
    for hit in {hit.passage.id: hit for ranking in rankings for hit in ranking}.values():
        if corpus_passage(corpus, hit.passage.id).text != hit.passage.text:
            where = f"passage {hit.passage.id!r} of {generation}"
            raise DataError(f"{where} has another text in {corpus.path}: one of the two has changed")
    return rankings


def corpus_passage(corpus: Corpus, passage_id: str) -> Passage:
    """The passage of this id; DataError where there is none."""
    passage = corpus.get(passage_id)
    if passage is None:
        raise DataError(f"passage {passage_id!r} is not in {corpus.path}: is it the retriever's corpus?")
    return passage


def _candidates(
    example: Example, hits: Sequence[Hit], positives: Sequence[Passage], rules: Rules
) -> list[Passage]:
    """Select what was found between the ranks, each text once, without positives and what has their text."""
    ids = {passage.id for passage in positives}
    others = [hit.passage for hit in hits if hit.passage.id not in ids]
    seen = {passage_key(passage) for passage in positives}
    found = []
    for passage in others[rules.first_rank - 1 : rules.last_rank]:
        answers = not rules.keep_answers and has_answer(passage.text, example.answers)
        if not answers and (number := passage_key(passage)) not in seen:
            seen.add(number)
            found.append(passage)
    return found


def _scores(
    batch: Sequence[Example],
    goods: Sequence[Sequence[Passage]],
    found: Sequence[Sequence[Passage]],
    rankings: Sequence[Sequence[Hit]],
    judge: Scorer | Retriever,
    depth: int | None,
) -> Scores:
    """The scores by which each query's passages are judged, by id.

    rankings: what the judge has found already; depth: how deep it is asked for what it cannot score.
    """
    queries = [example.asked for example in batch]
    scores = [{hit.passage.id: float(hit.score) for hit in hits} for hits in rankings]
    wanted = [
        [passage for passage in (*good, *passages) if passage.id not in known]
        for good, passages, known in zip(goods, found, scores, strict=True)
    ]
    if isinstance(judge, Scorer):
        given = judge.score_each(texts_of(queries, judge.name), wanted)
    else:
        given = judge.score(queries, wanted)
    scores = [known | more for known, more in zip(scores, given, strict=True)]
    if depth and any(p.id not in known for each, known in zip(wanted, scores, strict=True) for p in each):
        rankings = judge.search(queries, depth)  # type: ignore[union-attr]
        searched = [{hit.passage.id: float(hit.score) for hit in hits} for hits in rankings]
        scores = [more | known for known, more in zip(scores, searched, strict=True)]
    for query, known in zip(queries, scores, strict=True):
        if not all(map(math.isfinite, known.values())):
            raise DataError(f"{_name(judge)}: gives no number for query {str(query)[:60]!r}")
    return scores


def _limit(example: Example, scores: Mapping[str, float], rules: Rules) -> float:
    """The highest score of a negative: so much below the worst positive."""
    worst = min(scores.get(id_, -math.inf) for id_ in example.positives)
    if math.isinf(worst):
        return -math.inf if scores else math.inf
    return min(worst - (rules.margin or 0.0), worst - abs(worst) * (rules.relative_margin or 0.0))


def _pick(example: Example, found: Sequence[Passage], rules: Rules) -> Sequence[Passage]:
    if rules.pick == "top" or len(found) <= rules.per_query:
        return found[: rules.per_query]
    rng = random.Random(f"{rules.seed} {example.query_id} {example.query}")
    return [found[i] for i in sorted(rng.sample(range(len(found)), rules.per_query))]


def write_in_batches(
    examples: Sequence[Example],
    rows: Callable[[Sequence[Example]], Iterable[dict[str, Any]]],
    out: Path,
    settings: Mapping[str, Any],
    progress: Progress = iter,
    size: int = 64,
) -> Mined:
    """Write a row an example, batch by batch, into `out`.part, which becomes `out` when all are there.

    Started again it goes on after the last whole batch, so that each batch is asked for together, as in a
    run that was never stopped. A finished `out` of the same examples and settings is left as it is.
    """
    run = _run_name(examples, settings, size)
    if out.exists():
        _check_run(out, run)
        return _summary(out)
    part = out.with_name(f"{out.name}.part")
    if part.exists():
        _check_run(part, run)

    def named(batch: range) -> list[dict[str, Any]]:
        found = rows([examples[i] for i in batch])
        return [{**row, "provenance": {**row["provenance"], "run": run}} for row in found]

    append_in_batches(out, len(examples), size, named, progress)
    return _summary(out)


def _run_name(examples: Sequence[Example], settings: Mapping[str, Any], size: int) -> str:
    digest = hashlib.sha256(json.dumps([size, settings], sort_keys=True).encode())
    for example in examples:
        digest.update(json.dumps(example.as_record(), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _check_run(path: Path, run: str) -> None:
    first = next(read_jsonl(path, tolerate_cut_tail=True), None)
    if first is not None and (first.get("provenance") or {}).get("run") != run:
        raise ConfigError(
            f"{path}: comes from other queries, another retriever or other settings; "
            "remove it, or give another --out"
        )


def _summary(path: Path) -> Mined:
    counts = [len(record.get("negatives") or ()) for record in read_jsonl(path)]
    return Mined(len(counts), sum(counts), counts.count(0))


def _name(teacher: Scorer | Retriever) -> str:
    return teacher.name if isinstance(teacher, Scorer) else teacher.generation
