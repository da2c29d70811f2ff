"""Controls: the same questions and policy, but searches answered in a way that tells what search is worth.

closed_book        every search finds nothing
random             passages drawn at random from the corpus
oracle             the gold passages, whatever is asked
single_search      one search, by the question itself
evidence_present   gold passages among what the question finds; the same with them
evidence_replaced  replaced by others that hold no answer, and
evidence_removed   left out: who answers all the same, answers without evidence
max_searches_N     so many searches at most
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from agent.evaluation.measures import gold_passages
from data.corpus import Corpus
from data.errors import ConfigError
from data.metrics.answers import cover_em, normalize_answer
from data.records import Hit, Passage, Question

if TYPE_CHECKING:
    from agent.environment import Searcher
    from agent.rollout import Agent

STANDARD = ("closed_book", "random", "oracle", "single_search")
PAIRS: tuple[str, ...] = ("evidence_present", "evidence_replaced", "evidence_removed")
_OTHERS = 20
"""Passages looked through for those that hold no evidence."""


def control_names(given: bool | str) -> list[str]:
    """The controls that a word or a list of names stands for; ConfigError for a name that is none."""
    groups = {"true": STANDARD, "standard": STANDARD, "pairs": PAIRS, "all": (*STANDARD, *PAIRS)}
    parts = [part.strip() for part in str(given).lower().split(",")]
    names = [name for part in parts for name in groups.get(part, (part,))]
    for name in names:
        if name not in (*STANDARD, *PAIRS) and not name.removeprefix("max_searches_").isdecimal():
            allowed = ", ".join([*groups, *STANDARD, *PAIRS, "max_searches_N"])
            raise ConfigError(f"controls: {name!r}: must be one of {allowed}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class World:
    """The sources of controls: the corpus, where one is known, and the gold passages of questions."""

    corpus: Corpus | None
    gold: Mapping[str, Sequence[Sequence[Passage]]]
    """By question: of each title or id that names gold its passages, first those that hold an answer."""

    def allows(self, name: str, question: Question) -> bool:
        """Return whether the control can be made of the question."""
        if name == "random":
            return self.corpus is not None
        return bool(self.gold.get(question.id)) or name not in ("oracle", *PAIRS)


def make_world(corpus: Corpus | None, questions: Sequence[Question]) -> World:
    """Look up the gold passages of all questions in one pass over the corpus."""
    wanted: dict[str, set[str]] = {"id": set(), "title": set()}
    for question in questions:
        names, field = gold_passages(question)
        wanted[field] |= names
    found: dict[tuple[str, str], list[Passage]] = defaultdict(list)
    for passage in corpus or () if any(wanted.values()) else ():
        for field, names in wanted.items():
            if (name := getattr(passage, field)) in names:
                found[field, name].append(passage)
    return World(corpus, {question.id: _gold_of(question, found) for question in questions})


def _gold_of(question: Question, found: Mapping[tuple[str, str], list[Passage]]) -> list[list[Passage]]:
    names, field = gold_passages(question)
    return [
        sorted(found[field, name], key=lambda passage: -_holds_answer(passage, question))
        for name in sorted(names)
        if (field, name) in found
    ]


def control_agent(name: str, agent: Agent, world: World, question: Question, seed: int = 0) -> Agent:
    """The agent, with what its searches find exchanged as the control has it."""
    if name.startswith("max_searches_"):
        limit = int(name.removeprefix("max_searches_"))
        return replace(agent, protocol=replace(agent.protocol, max_turns=limit))
    if name == "single_search":
        once = replace(agent.protocol, max_turns=min(1, agent.protocol.max_turns))
        return replace(agent, protocol=once, searcher=_Asks(agent.searcher, question))
    gold = list(world.gold.get(question.id, ()))
    in_turn = [passage for rank in zip_longest(*gold) for passage in rank if passage]
    searchers: dict[str, Callable[[], Searcher]] = {
        "closed_book": lambda: _Shows([]),
        "random": lambda: _Draws(world.corpus, f"{seed}/{question.id}"),  # type: ignore[arg-type]
        "oracle": lambda: _Shows(_hits(in_turn)),
        **dict.fromkeys(PAIRS, lambda: _Without(agent.searcher, question, gold, name)),
    }
    return replace(agent, searcher=searchers[name]())


class _Shows:
    """A searcher with one list, of which each search shows the next k, again from the start at its end."""

    def __init__(self, hits: list[Hit]) -> None:
        self._hits, self._at = hits, 0

    async def search(self, query: Any, k: int) -> list[Hit]:
        shown = self._hits[self._at : self._at + k]
        self._at = self._at + k if self._at + k < len(self._hits) else 0
        return shown


class _Draws:
    """A searcher that draws passages at random, the same for the same question and query."""

    def __init__(self, corpus: Corpus, seed: str) -> None:
        self._corpus, self._seed = corpus, seed

    async def search(self, query: Any, k: int) -> list[Hit]:
        drawn = random.Random(f"{self._seed}/{query}").sample(
            range(len(self._corpus)), min(k, len(self._corpus))
        )
        return _hits([self._corpus[place] for place in drawn])


class _Asks:
    """A searcher that asks the question, whatever the query."""

    def __init__(self, searcher: Searcher, question: Question) -> None:
        self._searcher, self._question = searcher, question

    async def search(self, query: Any, k: int) -> list[Hit]:
        return await self._searcher.search(self._question.text, k)


class _Without:
    """A searcher that shows what the question finds, with the evidence present, replaced or removed (PAIRS).

    Evidence is the first passage of each gold title or id; the others are none of gold and hold no answer.
    Present: evidence first, k in all; replaced: so many others; removed: the same less the evidence.
    """

    def __init__(
        self, searcher: Searcher, question: Question, gold: Sequence[Sequence[Passage]], control: str
    ) -> None:
        self._searcher, self._question, self._gold, self._control = searcher, question, gold, control
        self._list: _Shows | None = None

    async def search(self, query: Any, k: int) -> list[Hit]:
        self._list = self._list or _Shows(await self._make(k))
        return await self._list.search(query, k)

    async def _make(self, k: int) -> list[Hit]:
        evidence = _hits(passages[0] for passages in self._gold)
        gold = {passage.id for passages in self._gold for passage in passages}
        others = [
            hit
            for hit in await self._searcher.search(self._question.text, _OTHERS + k)
            if hit.passage.id not in gold and not _holds_answer(hit.passage, self._question)
        ]
        total = max(k, len(evidence))
        beside = others[: total - len(evidence)]
        return dict(zip(PAIRS, (evidence + beside, others[:total], beside), strict=True))[self._control]


def _hits(passages: Iterable[Passage]) -> list[Hit]:
    return [Hit(passage, 0.0, "control") for passage in passages]


def _holds_answer(passage: Passage, question: Question) -> float:
    return cover_em(passage.contents, question.gold_answers, question.normalizer)


def leaks(questions: Sequence[Question], training: Sequence[Question] = ()) -> dict[str, float]:
    """Shares of the questions that say their answer, and that training has seen.

    answer_in_question: a gold answer stands in the question. With `training`: question_in_training (the same
    in normal form), answer_in_training, evidence_in_training (a gold passage of it, or its cluster).
    """

    def share(is_so: Callable[[Question], bool]) -> float:
        return sum(map(is_so, questions)) / max(1, len(questions))

    def answers(question: Question) -> set[str]:
        return {normalize_answer(gold) for gold in question.gold_answers}

    def evidence(question: Question) -> set[str]:
        cluster = question.metadata.get("cluster")
        return gold_passages(question)[0] | ({f"cluster:{cluster}"} if cluster is not None else set())

    found = {"answer_in_question": share(lambda q: cover_em(q.text, q.gold_answers, q.normalizer) > 0)}
    if not training:
        return found
    texts = {normalize_answer(question.text) for question in training}
    seen_answers = set[str]().union(*map(answers, training))
    seen_evidence = set[str]().union(*map(evidence, training))
    return found | {
        "question_in_training": share(lambda q: normalize_answer(q.text) in texts),
        "answer_in_training": share(lambda q: bool(answers(q) & seen_answers)),
        "evidence_in_training": share(lambda q: bool(evidence(q) & seen_evidence)),
    }
