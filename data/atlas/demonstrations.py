"""Demonstrations by a half-taught searcher in invented worlds: to warm a policy up, not to solve its task.

It searches the entity that the question names and reads one passage: the one with that title. One-hop
questions it answers rightly. Where the answer needs another passage it does NOT reason: it either stops
and guesses a name just read, or searches a name drawn at random among those just read and answers from
what that passage says. So a policy learns the format, to read and to copy, and sometimes a second search;
which name to search, and that it pays, is left for reinforcement learning to find.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.atlas.invented import invent_world
from data.atlas.passages import render_passage
from data.atlas.questions import KINDS, Ask, asks, one_hop, phrase_question
from data.atlas.world import Entity, World
from data.errors import ConfigError

FIRST = ("Look up {n}.", "Search for {n}.", "Read about {n}.")
NEXT = ("Now look up {n}.", "Next, search for {n}.", "Also read about {n}.")
LAST = ("I can answer.", "Now answer.", "Time to answer.")


@dataclass(frozen=True)
class Demonstrator:
    """Settings of the half-taught searcher: its behaviour and its questions."""

    p_stop: float = 0.6
    """Chance that it stops after one search where the answer needs more."""
    p_third: float = 0.1
    """Chance that it searches a third time after a second."""
    p_right: float = 0.0
    """Chance that the name it searches next is the one that leads to the answer, not one drawn at random."""
    compares: bool = False
    """Read both passages of a comparison, saying the first value before the second search, then both."""
    tells: bool = False
    """Tell both values of a comparison in its question, so that no search is needed: practice."""
    kinds: dict[str, float] = field(
        default_factory=lambda: {"one_hop": 0.6, "two_hop": 0.32, "three_hop": 0.04, "comparison": 0.04}
    )
    """Share of each kind of question."""
    questions_per_world: int = 4
    """Demonstrations made in one invented world."""
    follow_ups: int = 6
    """More questions about the passage of a one-hop question: practice in reading."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            raise ConfigError(f"kinds of questions are {wrong or 'none'}, allowed are {', '.join(KINDS)}")


def demonstrations(
    n: int, seed: int = 0, demonstrator: Demonstrator = Demonstrator()
) -> Iterator[dict[str, Any]]:
    """n demonstrations, deterministic in the seed; each one JSON line in no protocol's words.

    -> {"id", "kind", "question", "golden_answers", "steps", "follow_ups"}; a step is {"think", "search",
    "passages": [{"id", "title", "text"}]}, the last one {"think", "answer"}; a follow-up is {"question",
    "think", "answer"}. The thought before a right answer quotes the words that hold it.
    """
    rng = random.Random(f"demonstrations:{seed}")
    kinds, shares = zip(*demonstrator.kinds.items(), strict=True)
    made = 0
    while made < n:
        world = invent_world(rng)
        pool: dict[str, list[Ask]] = defaultdict(list)
        for ask in asks(world, None, rng):
            pool[ask.kind].append(ask)
        reader = _Reader(world, rng)
        for kind in rng.choices(kinds, shares, k=min(demonstrator.questions_per_world, n - made)):
            if pool[kind]:
                yield _demonstration(_draw(pool[kind], rng), reader, demonstrator, f"{seed}-{made}")
                made += 1


def _draw(pool: list[Ask], rng: random.Random) -> Ask:
    """Half the time any of the pool, half the time any relation first: rare relations are asked too."""
    if rng.random() < 0.5:
        return rng.choice(pool)
    relation = rng.choice(sorted({ask.relation for ask in pool}))
    return rng.choice([ask for ask in pool if ask.relation == relation])


class _Reader:
    """The passages of one world as they are read: each the same whenever it is found."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng, self.seed = world, rng, rng.getrandbits(32)
        self.steps: list[dict[str, Any]] = []
        self.searched: list[Entity] = []
        self.named: list[Entity] = []
        self.told: dict[str, str] = {}

    def begin(self) -> None:
        self.steps, self.searched, self.named = [], [], []

    def search(self, entity: Entity, noted: str = "") -> None:
        """Search an entity; its thought begins with what is `noted` of the passage read last."""
        rendered = render_passage(self.world, entity, self.seed)
        think = noted + self.rng.choice(NEXT if self.steps else FIRST).replace("{n}", entity.name)
        passage, self.told = rendered.passage, rendered.told
        found = {"id": passage.id, "title": passage.title, "text": passage.text}
        self.steps.append({"think": think, "search": entity.name, "passages": [found]})
        self.searched.append(entity)
        self.named = [other for other in rendered.named if other not in self.searched]

    def answer(self, text: str, relation: str = "", think: str = "") -> None:
        """End with an answer; the thought quotes what the passage says of the relation."""
        self.steps.append({"think": think or self.thought(relation), "answer": text})

    def thought(self, relation: str) -> str:
        """The words of the passage read last that tell the relation; without any, a plain thought."""
        told = self.told.get(relation)
        return f"{told[0].upper()}{told[1:]}." if told else self.rng.choice(LAST)


def _demonstration(ask: Ask, reader: _Reader, how: Demonstrator, number: str) -> dict[str, Any]:
    rng = reader.rng
    question = phrase_question(ask, rng, True, f"demonstration-{number}")
    reader.begin()
    told = how.tells and ask.kind == "comparison"
    if not told:
        reader.search(ask.path[0])
    if told:
        reader.answer(ask.gold_answers[0], think=_values(ask))
    elif ask.kind == "comparison":
        _compare(ask, reader, how)
    elif ask.kind == "one_hop":
        reader.answer(ask.gold_answers[0], ask.relation)
    elif rng.random() < how.p_stop or not reader.named:
        reader.answer(_guess(ask, reader, wrong=True))
    else:
        _wander(ask, reader, how)
    return {
        "id": question.id,
        "kind": ask.kind,
        "question": f"{question.text} {_values(ask)}" if told else question.text,
        "golden_answers": list(question.gold_answers),
        "steps": reader.steps,
        "follow_ups": _follow_ups(ask, reader, how) if ask.kind == "one_hop" else [],
    }


def _follow_ups(ask: Ask, reader: _Reader, how: Demonstrator) -> list[dict[str, str]]:
    """Other questions that the passage just read answers, each with its answer."""
    others = [o for o in one_hop(reader.world, ask.path[0]) if o.relation != ask.relation]
    chosen = reader.rng.sample(others, min(how.follow_ups, len(others)))
    return [
        {
            "question": phrase_question(other, reader.rng, True, "").text,
            "think": reader.thought(other.relation),
            "answer": other.gold_answers[0],
        }
        for other in chosen
    ]


def _wander(ask: Ask, reader: _Reader, how: Demonstrator) -> None:
    """Search one or two of the names read, then answer from the last passage."""
    rng = reader.rng
    reader.search(_next(ask, reader, how))
    p_more = how.p_third if ask.kind == "two_hop" else 1 - how.p_stop
    if reader.named and rng.random() < p_more:
        reader.search(_next(ask, reader, how))
    read = reader.searched[-1].facts.get(ask.relation)
    reader.answer(read[0] if read else _guess(ask, reader, wrong=False), ask.relation)


def _next(ask: Ask, reader: _Reader, how: Demonstrator) -> Entity:
    """Draw a name of the passage read last; with p_right the next on the way, if the passage names it."""
    ahead = [entity for entity in ask.path if entity in reader.named]
    right = bool(how.p_right and ahead) and reader.rng.random() < how.p_right
    return ahead[0] if right else reader.rng.choice(reader.named)


def _compare(ask: Ask, reader: _Reader, how: Demonstrator) -> None:
    """Read the other one, too, and answer rightly; where it does not compare, or stop after one and guess."""
    stops = reader.rng.random() < how.p_stop
    if how.compares:
        reader.search(ask.path[1], f"{_values(ask, 1)} ")
        reader.answer(ask.gold_answers[0], think=_values(ask))
    elif stops:
        reader.answer(reader.rng.choice(ask.path).name)
    else:
        reader.search(ask.path[1])
        reader.answer(ask.gold_answers[0])


def _values(ask: Ask, count: int = 2) -> str:
    """Say of both entities of a comparison, or of the first, what is compared."""
    return f"{', '.join(f'{entity.name} {entity.facts[ask.relation][0]}' for entity in ask.path[:count])}."


def _guess(ask: Ask, reader: _Reader, wrong: bool) -> str:
    """A name or value of the passage read last; not the right one if `wrong`."""
    last = reader.searched[-1]
    own = [values[0] for relation, values in last.facts.items() if relation != "kind"]
    options = [entity.name for entity in reader.named] or own or [last.name]
    allowed = [text for text in options if not (wrong and text in ask.gold_answers)]
    return reader.rng.choice(allowed or [last.name])
