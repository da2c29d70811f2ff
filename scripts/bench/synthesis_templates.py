"""Generators whose truth is known, with planted faults, and the judges that know it."""

from __future__ import annotations

import json
import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

from data.atlas.invented import invent_world
from data.atlas.passages import render_passage
from data.atlas.phrasings import ASKED, LOCATORS, SUMMIT_OF
from data.atlas.questions import Ask, asks, phrase_question
from data.atlas.world import World, load_world
from data.corpus import Corpus
from data.errors import ConfigError
from data.metrics.answers import normalize_unicode
from data.records import Passage
from retriever_server.retriever import Scorer
from retriever_server.training.synthesis.drafts import Call, Written, draw_seed
from retriever_server.training.synthesis.filters import content_words
from retriever_server.training.synthesis.generators import Generator

FAULTS = ("wrong_seed", "duplicate", "quote", "unanswerable")
_NAME = re.compile(r"(?<=[a-z,] )(?:[A-Z][\w'-]+(?: (?:of |the )?[A-Z][\w'-]+)*|\d[\d,.]*\d)\b")
_UNTOLD = ("anthem", "national sport", "oldest bridge", "largest museum", "founder", "tallest tower")


def open_world(invented: int | None, seed: int = 0) -> World:
    """The embedded world, or an invented one of so many countries."""
    if invented is None:
        return load_world()
    return invent_world(random.Random(seed), (invented, invented), (3, 6), (invented, invented))


class _OfWorld:
    """The questions of a world and the passages that answer them, by entity id."""

    def __init__(self, invented: int | None = None, world_seed: int = 0) -> None:
        self.world = open_world(invented, world_seed)

    @cached_property
    def asks(self) -> dict[str, list[Ask]]:
        """Entity -> questions that its own passage answers, and those that begin at it."""
        found: dict[str, list[Ask]] = {}
        for ask in asks(self.world, None, random.Random(0)):
            if ask.kind in ("one_hop", "two_hop"):
                found.setdefault(ask.path[-1].id, []).append(ask)
        return found


class Planted(Generator):
    """Writes {"task", "query", "answer", "kind"} for passages, with shares of faults.

    wrong_seed: about another passage like it, that answers it as the seed does not. duplicate: what the call
    before asked, where it was for the same passage. quote: a sentence of the passage. unanswerable:
    something that no passage tells.
    """

    def __init__(self, faults: dict[str, float] | None, name: str) -> None:
        self.faults = faults or {}
        if wrong := [name for name in self.faults if name not in FAULTS]:
            raise ConfigError(f"faults: {wrong[0]!r}: must be of {', '.join(FAULTS)}")
        self.name = f"{name} {self.faults}"

    @abstractmethod
    def question(self, passage: Passage, wrong: bool, rng: random.Random) -> dict[str, str]:
        """Return task, query, answer, kind, subject; `wrong`: of another passage. {} if there is none."""

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """A JSON object for each call, and beside, where no recipe reads, the fault (a copy's is its own)."""
        records: list[dict[str, str]] = []
        for before, call in zip([None, *calls], calls, strict=False):
            record = self.record(call.passage, call.seed) if call.passage else {}
            again = before is not None and before.passage == call.passage and records[-1]
            if again and record.get("fault") == "duplicate":
                record = {**records[-1], "query": records[-1]["query"].lower()}
            records.append(record)
        return [
            Written(
                text := json.dumps(record),
                len(call.prompt.split()),
                len(text.split()),
                refused="" if record else "nothing to ask of it",
            )
            for call, record in zip(calls, records, strict=True)
        ]

    def record(self, passage: Passage, seed: int) -> dict[str, str]:
        """Return the text written for a passage with its planted fault; {} where there is nothing to ask."""
        rng = random.Random(seed)
        fault = rng.choices([*self.faults, ""], [*self.faults.values(), 1 - sum(self.faults.values())])[0]
        made = self.question(passage, fault == "wrong_seed", rng)
        if not made:
            return {}
        subject = made.pop("subject")
        if fault == "quote":
            made["query"] = rng.choice(passage.text.rstrip(".").split(". "))
        if fault == "unanswerable":
            made |= {"query": f"What is the {rng.choice(_UNTOLD)} of {subject}?", "answer": ""}
        return {**made, "fault": fault}


class AtlasTemplates(_OfWorld, Planted):
    """Questions about the entities of a world."""

    def __init__(
        self,
        faults: dict[str, float] | None = None,
        kinds: list[str] | None = None,
        invented: int | None = None,
        world_seed: int = 0,
    ) -> None:
        _OfWorld.__init__(self, invented, world_seed)
        self.kinds = kinds or ["one_hop"]
        Planted.__init__(self, faults, f"templates {self.kinds} {invented} {world_seed}")

    def question(self, passage: Passage, wrong: bool, rng: random.Random) -> dict[str, str]:
        """As `Planted.question`; a wrong one is about another entity of the type."""
        entity = self.world.by_id.get(passage.id)
        if entity is None:
            return {}
        if wrong:
            same = [e for e in self.world.entities if e.type == entity.type and e.id != entity.id]
            entity = rng.choice([e for e in same if self.asks.get(e.id)] or [entity])
        known = [ask for ask in self.asks.get(entity.id, ()) if ask.kind in self.kinds]
        ask = rng.choice(known or self.asks[entity.id])
        task = f"Given a question about a {entity.type}, find the passage that answers it"
        query = phrase_question(ask, rng, True, "").text
        return {
            "task": task, "query": query, "answer": ask.gold_answers[0],
            "kind": ask.kind, "subject": entity.name,
        }  # fmt: skip


class Extracts(Planted):
    """Asks for a name or number of a sentence by a part of its other words: cloze queries of any text."""

    def __init__(self, corpus: str, faults: dict[str, float] | None = None, share: float = 0.6) -> None:
        """share: of the sentence's content words, how many a query has."""
        self.corpus, self.share = Corpus(corpus), share
        super().__init__(faults, f"extracts {self.corpus.content_hash} {share}")

    def question(self, passage: Passage, wrong: bool, rng: random.Random) -> dict[str, str]:
        """As `Planted.question`; a wrong one is about another passage of the same title."""
        if wrong:
            known = self._by_title[passage.title]
            passage = self.corpus[rng.choice(known)] if len(known) > 1 else passage
        found = [
            (sentence, answer)
            for sentence in re.split(r"(?<=[.!?]) ", passage.text)
            for answer in _NAME.findall(sentence)
            if len(content_words(sentence) - content_words(answer)) >= 5
        ]
        if not found:
            return {}
        sentence, answer = rng.choice(found)
        number, year = answer[0].isdigit(), answer.isdigit() and len(answer) == 4
        asked = "when" if year else "how many" if number else "what"
        words = normalize_unicode(sentence.replace(answer, " ")).split()
        words = [word for word in words if content_words(word)]
        chosen = sorted(rng.sample(range(len(words)), max(4, round(self.share * min(12, len(words))))))
        query = f"{asked} {' '.join(words[i] for i in chosen)}"
        return {
            "task": "Given a question, find the paragraph that answers it",
            "query": query, "answer": answer, "kind": "extract", "subject": passage.title,
        }  # fmt: skip

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        table: dict[str, list[int]] = {}
        for position, passage in enumerate(self.corpus):
            table.setdefault(passage.title, []).append(position)
        return table


class HasAllWords(Scorer):
    """The truth about `Extracts`: 1 for passages with all content words of the query."""

    name = "has all words"

    def score(self, pairs: list[tuple[str, Passage]]) -> list[float]:
        """1.0 or 0.0."""
        return [float(content_words(q) <= content_words(f"many {p.title} {p.text}")) for q, p in pairs]


class RandomJudge(Scorer):
    """Random numbers: the control that must fail."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.name = seed, f"random {seed}"

    def score(self, pairs: list[tuple[str, Passage]]) -> list[float]:
        """A number drawn for each pair, the same each time."""
        return [random.Random(draw_seed(self.seed, query, p.id)).random() for query, p in pairs]


class AtlasOracle(_OfWorld, Scorer):
    """1 for the passage that answers a question of the world, however it is put; else 0."""

    name = "atlas oracle"

    @cached_property
    def _truth(self) -> dict[str, set[str]]:
        table: dict[str, set[str]] = {}
        for id_, of in self.asks.items():
            for ask in of:
                for text in _wordings(ask):
                    table.setdefault(normalize_unicode(text), set()).add(id_)
        return table

    def score(self, pairs: list[tuple[str, Passage]]) -> list[float]:
        """1.0 or 0.0; a sentence of a passage is answered by it."""
        return [float(self._answers(query, passage)) for query, passage in pairs]

    def _answers(self, query: str, passage: Passage) -> bool:
        gold = self._truth.get(normalize_unicode(query))
        return passage.id in gold if gold else normalize_unicode(query) in normalize_unicode(passage.text)


def _wordings(ask: Ask) -> list[str]:
    """All texts of a question: every phrasing, with every locator of the place that it begins at."""
    first = ask.path[0]
    located = ask.kind == "two_hop" and first.country != ""
    places = (
        [locator.replace("{p}", first.name) for locator in LOCATORS[first.type]] if located else [first.name]
    )
    if ask.relation == "elevation" and first.type != "mountain":
        places = [SUMMIT_OF.replace("{x}", place) for place in places]
    key = "element_symbol" if first.type == "element" and ask.relation == "symbol" else ask.relation
    return [phrasing.replace("{x}", place) for phrasing in ASKED[key] for place in places]


def corpus_rows(world: World, seed: int = 0) -> list[dict[str, str]]:
    """The passages of a world as rows of a corpus; ids are those of its entities."""
    passages = [render_passage(world, entity, seed).passage for entity in world.entities]
    return [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
