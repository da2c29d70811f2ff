"""Entities -> passages: short, several sentences, every fact told once among true facts about others.

Order and phrasing vary by entity and seed, so that position does not give an answer away. A place's
passage names its country and nothing that the country's own passage is for; the country's passage
names its highest mountain but not how high it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.atlas.phrasings import CLAUSES
from data.atlas.world import Entity, World
from data.records import Passage

Clauses = list[tuple[str, str]]
"""The statements of a passage, in order: the relation (or "" where it is about others) and the words."""


@dataclass(frozen=True)
class Rendered:
    """A passage, the other entities it names that have passages of their own, and its own facts in words."""

    passage: Passage
    named: list[Entity]
    told: dict[str, str]
    """relation -> the words in the passage that tell it."""


def render_passages(world: World, seed: int = 0) -> list[Passage]:
    """One passage an entity, in the order of the world."""
    return [render_passage(world, entity, seed).passage for entity in world.entities]


def render_passage(world: World, entity: Entity, seed: int = 0) -> Rendered:
    """The passage of an entity; the same world, entity and seed give the same words."""
    rng = random.Random(f"{seed}:{entity.id}")
    compose = {"place": _place, "mountain": _mountain}.get(entity.type, _own_facts)
    clauses, named = compose(world, entity, rng)
    # The first clause of a passage carries the name.
    words = [text.replace("{of}", "" if at else f" of {entity.name}") for at, (_, text) in enumerate(clauses)]
    told = {relation: text for (relation, _), text in zip(clauses, words, strict=True) if relation}
    passage = Passage(entity.id, _sentences(words, rng), entity.name)
    return Rendered(passage, [o for o in {o.id: o for o in named}.values() if o is not entity], told)


def _sentences(clauses: list[str], rng: random.Random) -> str:
    """Clauses as sentences, of more than four some in pairs."""
    sentences, at = [], 0
    while at < len(clauses):
        size = 2 if len(clauses) > 4 and rng.random() < 0.5 else 1
        text = " and ".join(clauses[at : at + size])
        sentences.append(text[0].upper() + text[1:] + ".")
        at += size
    return " ".join(sentences)


def _own_facts(world: World, entity: Entity, rng: random.Random) -> tuple[Clauses, list[Entity]]:
    """Country, territory or element: every fact of its own, and one clause about each kind of company."""
    table = CLAUSES["element" if entity.type == "element" else "country"]
    named: list[Entity] = []
    clauses: Clauses = []
    for relation, values in entity.facts.items():
        clauses.append((relation, rng.choice(table[relation]).replace("{v}", values[0])))
        if relation in ("capital", "highest_point") and values[0] in world.by_name:
            named.append(world.by_name[values[0]])
    rng.shuffle(clauses)
    company = []
    siblings = [p for p in world.places.get(entity.id, ()) if p not in named]
    if siblings:
        chosen = _some(siblings, 2, rng)
        company.append(rng.choice(table["places"]).replace("{v}", _join(chosen)) if len(chosen) > 1
                       else f"{chosen[0].name} is a place in it")  # fmt: skip
        named += chosen
    if entity.nearby:
        other = world.by_id[rng.choice(entity.nearby)]
        named.append(other)
        company.append(rng.choice(table["nearby"]).replace("{v}", other.name))
    for clause in company:
        clauses.insert(rng.randint(1, len(clauses)), ("", clause))
    return clauses, named


def _place(world: World, entity: Entity, rng: random.Random) -> tuple[Clauses, list[Entity]]:
    table = CLAUSES["place"]
    country = world.by_id[entity.country]
    kind = " and ".join(entity.facts["kind"][:2])
    words = {"{n}": entity.name, "{c}": country.name, "{kind}": kind}
    clauses: Clauses = [("country", _fill(rng.choice(table["is_in"]), words))]
    named = [country]
    siblings = [p for p in world.places[entity.country] if p is not entity]
    if siblings:
        chosen = _some(siblings, rng.randint(2, 3), rng)
        named += chosen
        words["{s}"] = _join(chosen)
        one_fits = table["siblings"][-1:] if len(chosen) == 1 else table["siblings"]
        clauses.append(("", _fill(rng.choice(one_fits), words)))
    if len(country.nearby) > 1:
        near = [world.by_id[i] for i in rng.sample(country.nearby, 2)]
        named += near
        words["{v}"] = _join(near)
        clauses.append(("", _fill(rng.choice(table["nearby"]), words)))
    rng.shuffle(clauses)
    return clauses, named


def _mountain(world: World, entity: Entity, rng: random.Random) -> tuple[Clauses, list[Entity]]:
    table = CLAUSES["mountain"]
    country = world.by_id[entity.country]
    words = {"{n}": entity.name, "{c}": country.name, "{v}": entity.facts["elevation"][0]}
    clauses: Clauses = [
        (relation, _fill(rng.choice(table[part]), words))
        for relation, part in (("country", "is_in"), ("elevation", "elevation"))
    ]
    named = [country]
    others = [world.mountains[i] for i in country.nearby if i in world.mountains]
    for other in _some(others, 1, rng):
        home = world.by_id[other.country]
        named += [other, home]
        words = {"{o}": other.name, "{c}": home.name, "{v}": other.facts["elevation"][0]}
        clauses.append(("", _fill(rng.choice(table["other"]), words)))
    siblings = world.places.get(entity.country, [])
    if len(siblings) > 1:
        chosen = _some(siblings, 2, rng)
        named += chosen
        words = {"{n}": entity.name, "{s}": _join(chosen)}
        clauses.append(("", _fill(rng.choice(table["siblings"]), words)))
    rng.shuffle(clauses)
    return clauses, named


def _fill(template: str, words: dict[str, str]) -> str:
    for slot, word in words.items():
        template = template.replace(slot, word)
    return template


def _some(items: Sequence[Entity], count: int, rng: random.Random) -> list[Entity]:
    return rng.sample(list(items), min(count, len(items)))


def _join(entities: Sequence[Entity]) -> str:
    """'A', 'A and B', 'A, B and C'."""
    names = [entity.name for entity in entities]
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
