"""The embedded world, hard to search: a passage a fact, told in words that no question uses.

A question names an entity and a relation. Its entity has a passage for each of its facts, and its neighbours'
passages name it, too; so the words of a question find passages about the entity, not the one that answers.
Which words tell which relation can be learned on some entities and holds for all others.

Demonstrations in invented worlds teach a policy to read such passages. They search the names in turn; each
passage needed is shown beside another one. Three in ten of those that need several searches stop after one
and guess, so that something is left for reinforcement learning to find.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from data.atlas.invented import invent_world
from data.atlas.phrasings import INDIRECT
from data.atlas.questions import make_questions, one_hop, phrase_question, phrased_as, wording
from data.atlas.world import Entity, World
from data.records import Passage, Question

COUNTS: dict[str, dict[str, int]] = {
    "train": {"one_hop": 1500, "two_hop": 1500, "three_hop": 750, "comparison": 750},
    "dev": {"one_hop": 120, "two_hop": 120, "three_hop": 80, "comparison": 80},
    "test": {"one_hop": 300, "two_hop": 300, "three_hop": 200, "comparison": 200},
}
"""Questions of each kind that are asked for."""
ALIAS_SHARE, NEIGHBOUR_SHARE = 0.3, 0.5
"""Shares of the passages whose text calls its entity by another name, and that name a neighbour."""
FULL_SHARE = 0.7
"""Share of the demonstrations of several searches that make them all; the others stop and guess."""
FOLLOW_UPS = 3
"""More questions about the passages shown last in a demonstration, answered without a search."""
PER_WORLD = {"one_hop": 5, "two_hop": 5, "three_hop": 1, "comparison": 1}
"""Demonstrations of each kind in one invented world."""


def hard_passages(world: World, seed: int = 0) -> list[Passage]:
    """Return a passage for each fact that a question can need, in the order of the world."""
    return [
        _card(world, entity, relation, value, seed)
        for entity in world.entities
        for relation, value in _facts(world, entity)
    ]


def hard_questions(world: World, split: str, seed: int = 0) -> list[Question]:
    """Return the questions of a split, each with the ids of the passages it needs as `supporting_ids`.

    Test questions use the phrasings that no training question has.
    """
    unseen = 1.0 if split == "test" else 0.0
    return [
        replace(question, metadata={**question.metadata, "supporting_ids": list(steps(world, question))})
        for question in make_questions(world, split, COUNTS[split], unseen, seed)
    ]


def steps(world: World, question: Question) -> dict[str, str]:
    """Return what the question needs, in order: the id of each passage, and a question of one hop for it."""
    metadata = question.metadata
    path = [world.by_id[id_] for id_ in metadata["entities"]]
    if metadata["kind"] == "comparison":
        asked = [(entity, metadata["relation"]) for entity in path]
    else:
        link = {"mountain": "highest_point"}
        asked = [(here, link.get(there.type, "country")) for here, there in pairwise(path)]
        asked.append((path[-1], metadata["relation"]))
    return {card_id(entity, relation): wording(entity, relation) for entity, relation in asked}


def card_id(entity: Entity, relation: str) -> str:
    """Return the id of the passage that tells this fact."""
    return f"{entity.id}#{relation}"


def _facts(world: World, entity: Entity) -> list[tuple[str, str]]:
    facts = [(relation, values[0]) for relation, values in entity.facts.items() if relation != "kind"]
    return facts + ([("country", world.by_id[entity.country].name)] if entity.country else [])


def _card(world: World, entity: Entity, relation: str, value: str, seed: int) -> Passage:
    rng = random.Random(f"{seed}:{entity.id}:{relation}")
    aliases = [alias for alias in entity.aliases if alias != value]
    name = rng.choice(aliases) if aliases and rng.random() < ALIAS_SHARE else entity.name
    text = rng.choice(INDIRECT[phrased_as(entity, relation)]).replace("{e}", name).replace("{v}", value)
    near = [world.by_id[id_].name for id_ in entity.nearby] or _siblings(world, entity)
    if near and rng.random() < NEIGHBOUR_SHARE:
        text += f". Not far from it is {rng.choice(near)}"
    return Passage(card_id(entity, relation), f"{text[0].upper()}{text[1:]}.", entity.name)


def _siblings(world: World, entity: Entity) -> list[str]:
    return [place.name for place in world.places.get(entity.country, ()) if place is not entity][:5]


def hard_demonstrations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield so many demonstrations, as `sleuth warm-start --demonstrations` reads them."""
    rng = random.Random(f"hard demonstrations:{seed}")
    made = 0
    while made < count:
        world = invent_world(rng)
        passages = hard_passages(world, made)
        for question in make_questions(world, None, PER_WORLD, seed=made)[: count - made]:
            yield _demonstration(question, world, passages, f"demonstration-{made}", rng)
            made += 1


def _demonstration(
    question: Question, world: World, passages: list[Passage], id: str, rng: random.Random
) -> dict[str, Any]:
    needed = list(steps(world, question))
    place = {passage.id: at for at, passage in enumerate(passages)}
    stops = len(needed) > 1 and rng.random() > FULL_SHARE
    shown = [passages[place[id_]] for id_ in needed[: 1 if stops else None]]
    done: list[dict[str, Any]] = []
    both: list[dict[str, str]] = []
    for name, passage in zip(question.metadata["hops"], shown, strict=False):
        near = passages[(place[passage.id] + rng.choice((-2, -1, 1, 2))) % len(passages)]
        both = [{"id": p.id, "title": p.title, "text": p.text} for p in rng.sample([passage, near], 2)]
        think = f"{'Now look up' if done else 'Look up'} {name}."
        done.append({"think": think, "search": name, "passages": both})
    done.append(
        {"think": _told(shown[-1].text), "answer": _guess(question) if stops else question.gold_answers[0]}
    )
    follow_ups = [_reading(world, rng.choice(both), rng) for _ in range(FOLLOW_UPS)]
    return {"id": id, "question": question.text, "steps": done, "follow_ups": follow_ups}


def _reading(world: World, passage: dict[str, str], rng: random.Random) -> dict[str, str]:
    """Return another question that a passage just shown answers: practice in choosing what to read."""
    entity, relation = passage["id"].split("#")
    ask = next(ask for ask in one_hop(world, world.by_id[entity]) if ask.relation == relation)
    text = phrase_question(ask, rng, True, "").text
    return {"question": text, "think": _told(passage["text"]), "answer": ask.gold_answers[0]}


def _told(text: str) -> str:
    return text.split(". Not far")[0].rstrip(".") + "."


def _guess(question: Question) -> str:
    """Return a name just read: one of the two compared, or where the way leads next."""
    return question.metadata["hops"][0 if question.metadata["kind"] == "comparison" else 1]
