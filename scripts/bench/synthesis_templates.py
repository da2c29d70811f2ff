"""A generator whose truth is known: questions about an embedded world, with planted faults; its judges."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cached_property

from data.answers import normalize_unicode
from data.atlas.invented import invent_world
from data.atlas.passages import render_passage
from data.atlas.phrasings import ASKED, LOCATORS, SUMMIT_OF
from data.atlas.questions import Ask, asks, put
from data.atlas.world import Entity, World, load_world
from data.errors import ConfigError
from data.records import Passage
from retriever_server.retriever import Scorer
from retriever_server.training.synthesis.drafts import Call, Written, draw_seed
from retriever_server.training.synthesis.generators import Generator

FAULTS = ("wrong_seed", "duplicate", "quote", "unanswerable")
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


class AtlasTemplates(_OfWorld, Generator):
    """Writes {"task", "query", "answer", "kind"} for passages of a world, with shares of faults.

    wrong_seed: about another entity of the type: its passage answers it, the seed's does not. duplicate:
    what the call before asked, where it was for the same passage. quote: a sentence of the passage.
    unanswerable: something that no passage tells.
    """

    def __init__(
        self,
        faults: dict[str, float] | None = None,
        kinds: list[str] | None = None,
        invented: int | None = None,
        world_seed: int = 0,
    ) -> None:
        super().__init__(invented, world_seed)
        self.faults, self.kinds = faults or {}, kinds or ["one_hop"]
        if wrong := [name for name in self.faults if name not in FAULTS]:
            raise ConfigError(f"faults: {wrong[0]!r}: must be of {', '.join(FAULTS)}")
        self.name = f"templates {self.kinds} {self.faults} {invented} {world_seed}"

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """A JSON object for each call; the fault stands beside, under "fault", where recipes do not read."""
        records: list[dict[str, str]] = []
        for before, call in zip([None, *calls], calls, strict=False):
            record = self.record(call.passage, call.seed) if call.passage else {}
            again = before is not None and before.passage == call.passage
            if record.get("fault") == "duplicate" and again:
                record = {**records[-1], "query": records[-1]["query"].lower(), "fault": "duplicate"}
            records.append(record)
        texts = [json.dumps(record) for record in records]
        return [
            Written(
                text,
                len(call.prompt.split()),
                len(text.split()),
                refused="" if record else "not of this world",
            )
            for text, call, record in zip(texts, calls, records, strict=True)
        ]

    def record(self, passage: Passage, seed: int) -> dict[str, str]:
        """Return the text written for a passage with its planted fault; {} of a passage of another world."""
        rng = random.Random(seed)
        fault = rng.choices([*self.faults, ""], [*self.faults.values(), 1 - sum(self.faults.values())])[0]
        entity = self.world.by_id.get(passage.id)
        if entity is None:
            return {}
        entity = self._other(entity, rng) if fault == "wrong_seed" else entity
        ask = self._ask(entity, rng)
        query = put(ask, rng, True, "").text
        if fault == "quote":
            query = rng.choice(passage.text.rstrip(".").split(". "))
        if fault == "unanswerable":
            query = f"What is the {rng.choice(_UNTOLD)} of {entity.name}?"
        task = f"Given a question about a {entity.type}, find the passage that answers it"
        answer = "" if fault == "unanswerable" else ask.gold_answers[0]
        return {"task": task, "query": query, "answer": answer, "kind": ask.kind, "fault": fault}

    def _ask(self, entity: Entity, rng: random.Random) -> Ask:
        known = [ask for ask in self.asks.get(entity.id, ()) if ask.kind in self.kinds]
        return rng.choice(known or self.asks[entity.id])

    def _other(self, entity: Entity, rng: random.Random) -> Entity:
        same = [e for e in self.world.entities if e.type == entity.type and e.id != entity.id]
        return rng.choice([e for e in same if self.asks.get(e.id)] or [entity])


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
