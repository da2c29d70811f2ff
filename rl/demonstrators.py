"""Demonstrations out of questions with answers and any retriever: by rules, or by a teacher.

A shown passage must hold a gold answer (rules), or the teacher's answer be one by exact match (rejection
sampling). A query may be made poor afterwards; what is shown stays what the good one found, so that a warm
start leaves what to search to be found by RL.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.environment import Searcher
from agent.protocol import Answer, Protocol, get_protocol
from agent.search_tool import TagSanitizer
from agent.tools import Call
from data.metrics.answers import cover_em, exact_match
from data.records import Hit, Question
from retriever_server.client.chat import ChatClient, ChatError, ChatRefused
from retriever_server.indexes.analyzers import ENGLISH_STOP_WORDS

logger = logging.getLogger(__name__)

_ASKS = re.compile(
    r"who|whom|whose|what|which|when|where|why|how|many|much|do|does|did|has|have|had|were|can|could|would|from|"
    r"about|any|some|other|its|name|kind|type|used",
    re.IGNORECASE,
)
"""Words of a question that say nothing of what is asked for, beside English stop words."""
SEARCH_THOUGHT, READ_THOUGHT = "I search.", "I read."
MAX_ANSWER_WORDS = 8
Record = dict[str, Any]


def words_of(question: str) -> list[str]:
    """The words of a question, as they are written; all of it where it has none."""
    words = [word.strip(".'’") for word in re.findall(r"[\w'’.&-]+", question)]
    return [word for word in words if word] or [question]


def keywords(question: str) -> str:
    """All words of the question but those that say nothing; a good query for most retrievers.

    "Who painted the Mona Lisa?" -> "painted Mona Lisa"
    """
    words = words_of(question)
    return " ".join(
        [w for w in words if w.lower() not in ENGLISH_STOP_WORDS and not _ASKS.fullmatch(w)] or words
    )


def random_words(question: str, rng: random.Random) -> str:
    """Some of the question's words, from one to all, drawn at random, in their order."""
    words = words_of(question)
    count = rng.randint(1, len(words))
    return " ".join(words[at] for at in sorted(rng.sample(range(len(words)), count)))


def without_names(question: str, rng: random.Random) -> str:
    """The keywords without names: capitals and numbers after the first word; never empty.

    "Who painted the Mona Lisa?" -> "painted"
    """
    words, first = keywords(question).split(), words_of(question)[:1]
    plain = [w for w in words if [w] == first or not (w[0].isupper() or w[0].isdigit())]
    return " ".join(plain or words[:1])


POOR_QUERIES: dict[str, Callable[[str, random.Random], str]] = {
    "random_words": random_words,
    "without_names": without_names,
}
"""Queries that are poor on purpose, as `rl.demonstrations.POOR` says in words."""


def passages_of(hits: Sequence[Hit]) -> list[dict[str, str]]:
    """Return what a demonstration keeps of the passages found."""
    return [{"id": h.passage.id, "title": h.passage.title, "text": h.passage.text} for h in hits]


async def by_rules(question: Question, searcher: Searcher, top_k: int) -> Record | None:
    """One search of the question's keywords, then the shortest gold answer that a passage found says.

    None where no passage found says a gold answer of at most eight words.
    """
    query = keywords(question.text)
    shown = passages_of(await searcher.search(query, top_k))
    said = [
        gold
        for gold in question.gold_answers
        if len(gold.split()) <= MAX_ANSWER_WORDS
        and any(gold in p["text"] and cover_em(p["text"], [gold], question.normalizer) for p in shown)
    ]
    if not query or not said:
        return None
    search = {"think": SEARCH_THOUGHT, "search": query, "passages": shown}
    return _record(question, [search, {"think": READ_THOUGHT, "answer": min(said, key=len)}])


def _record(question: Question, steps: list[Record]) -> Record:
    golds = list(question.gold_answers)
    return {"id": question.id, "question": question.text, "golden_answers": golds, "steps": steps}


def with_queries(record: Record, kind: str, seed: int = 0) -> Record:
    """The demonstration with a query of this kind in place of each of its own; it says so in `queries`."""
    if kind == "as given":
        return record
    rng = random.Random(f"{seed}/{record['id']}")
    steps = [
        {**step, "search": POOR_QUERIES[kind](record["question"], rng)} if "search" in step else step
        for step in record["steps"]
    ]
    return {**record, "steps": steps, "queries": kind}


@dataclass(frozen=True)
class Teacher:
    """A language model behind a chat endpoint that searches and answers as it thinks best."""

    client: ChatClient
    model: str
    temperature: float = 0.7
    max_turns: int = 4
    top_k: int = 3
    samples: int = 1
    """Tries for a question; the first whose answer is right is kept."""
    seed: int = 0

    @property
    def protocol(self) -> Protocol:
        """Return how it is asked: Search-R1's instruction, in one message."""
        return replace(get_protocol("search_r1"), max_turns=self.max_turns, top_k=self.top_k)

    async def demonstrate(self, questions: Sequence[Question], searcher: Searcher) -> list[Record | None]:
        """One demonstration for each question, None where no try ended in a gold answer.

        Raises ChatError where no request is answered; a prompt that is refused ends its try alone.
        """
        kept: dict[int, Record] = {}
        for sample in range(self.samples):
            tries = [
                _Try(q, at, self.seed + sample, self.protocol)
                for at, q in enumerate(questions)
                if at not in kept
            ]
            for _ in range(self.max_turns + 1):
                await self._one_turn([each for each in tries if not each.over], searcher)
            kept |= {each.place: _record(each.question, each.steps) for each in tries if each.right}
            errors = [each.error for each in tries if each.error]
            refused = self.client.answered and all(isinstance(each, ChatRefused) for each in errors)
            if errors and len(errors) == len(tries) and not refused:
                raise errors[0]
            if errors:
                logger.warning("%d of %d tries had no reply: %s", len(errors), len(tries), errors[0])
        return [kept.get(at) for at in range(len(questions))]

    async def _one_turn(self, live: Sequence[_Try], searcher: Searcher) -> None:
        requests = [each.request(self.model, self.temperature) for each in live]
        try:
            replies = await asyncio.to_thread(self.client.ask, requests, str) if requests else []
        except asyncio.CancelledError:  # the thread would ask all the others first
            self.client.stop()
            raise
        for each, reply in zip(live, replies, strict=True):
            query = each.take(reply)
            if query is not None:
                each.show(await searcher.search(query, self.top_k))


class _Try:
    """One attempt of the teacher at one question."""

    def __init__(self, question: Question, place: int, seed: int, protocol: Protocol) -> None:
        self.question, self.place, self.seed, self.protocol = question, place, seed, protocol
        self.sanitize = TagSanitizer(protocol)
        self.messages = [{"role": "user", "content": protocol.prompt(question.text)}]
        self.steps: list[Record] = []
        self.over = self.right = False
        self.error: ChatError | None = None

    def request(self, model: str, temperature: float) -> Record:
        limits = {"max_tokens": self.protocol.max_response_tokens, "stop": list(self.protocol.stop)}
        asked = {"model": model, "messages": self.messages, "temperature": temperature, "seed": self.seed}
        return {**asked, **limits}

    def take(self, reply: str | ChatError) -> str | None:
        """Read a reply; the query where it searches. Whatever is no action ends the attempt."""
        if isinstance(reply, ChatError):
            self.over, self.error = True, reply
            return None
        turn = next((turn for turn in self._readings(reply) if self.protocol.is_well_formed(turn)), None)
        action = self.protocol.parse(turn) if turn else None
        thought = turn and turn.partition(f"</{self.protocol.think_tag}>")[0].partition(">")[2].strip()
        if isinstance(action, Call) and len(self.steps) < self.protocol.max_turns:
            self.messages = [*self.messages, {"role": "assistant", "content": turn or ""}]
            self.steps.append({"think": thought, "search": action.argument})
            return action.argument
        self.over = True
        if isinstance(action, Answer):
            self.steps.append({"think": thought, "answer": action.text})
            golds, normalizer = self.question.gold_answers, self.question.normalizer
            searched = len(self.steps) > 1
            self.right = searched and bool(exact_match(action.text, golds, normalizer))
        return None

    def _readings(self, reply: str) -> Iterator[str]:
        """The reply as it is, and with the closing tag that servers take off where they stop at it."""
        yield reply
        yield from (reply + tag for tag in self.protocol.stop)

    def show(self, hits: Sequence[Hit]) -> None:
        """Tell the teacher what its search found."""
        self.steps[-1]["passages"] = passages_of(hits)
        shown = [replace(h.passage, text=self.sanitize(h.passage.text), verbatim="") for h in hits]
        told = self.protocol.render_observation(self.protocol.render_passages(shown))
        self.messages = [*self.messages, {"role": "user", "content": told}]
