"""Entities -> questions with one short answer, each with the titles to search for in order.

one_hop     the passage of the entity named holds the answer
two_hop     the passage of the entity named names another, whose passage holds it
three_hop   place -> country -> its highest point -> how high that is
comparison  two entities named; both passages must be read
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data.atlas.phrasings import ASKED, COMPARED, LOCATORS, SUMMIT_OF, phrasing
from data.atlas.world import Entity, World, of_split
from data.records import Question

KINDS = ("one_hop", "two_hop", "three_hop", "comparison")
COUNTS: dict[str, dict[str, int]] = {
    "train": {"one_hop": 2400, "two_hop": 4800, "three_hop": 400, "comparison": 400},
    "dev": {"one_hop": 120, "two_hop": 240, "three_hop": 20, "comparison": 20},
    "test": {"one_hop": 390, "two_hop": 780, "three_hop": 65, "comparison": 65},
}
"""Questions of each kind that `build_atlas` asks for."""

UNSEEN_SHARE = 0.2
"""Share of the test questions whose phrasing no training question has."""


@dataclass(frozen=True)
class Ask:
    """A question before it is put into words: what is asked, of whom, and the way to the answer.

    path: the entities whose passages lead to the answer, the named one(s) first.
    """

    kind: str
    relation: str
    path: tuple[Entity, ...]
    gold_answers: tuple[str, ...]


def make_questions(
    world: World,
    split: str | None = None,
    counts: Mapping[str, int] | None = None,
    unseen_share: float = 0.0,
    seed: int = 0,
) -> list[Question]:
    """Up to `counts[kind]` questions of each kind over the entities of a split, no text twice.

    Clusters and relations are served in turn, so that large countries do not crowd out small ones.
    `unseen_share` of them use the phrasing kept for the test split. Deterministic.
    """
    rng = random.Random(f"{seed}:{split}")
    pool: dict[str, list[Ask]] = defaultdict(list)
    for ask in asks(world, split, rng):
        pool[ask.kind].append(ask)
    wanted = counts if counts is not None else COUNTS[split or "train"]
    questions: dict[str, Question] = {}
    for kind, count in wanted.items():
        chosen = _in_turn(pool[kind], rng)[:count]
        for ask in chosen:
            seen = rng.random() >= unseen_share
            question = phrase_question(ask, rng, seen, f"atlas-{split or 'all'}-{len(questions):05d}")
            questions.setdefault(question.text, question)
    return list(questions.values())


def asks(world: World, split: str | None, rng: random.Random) -> Iterator[Ask]:
    """Yield all questions about the entities of a split; comparisons are drawn at random."""
    entities = list(of_split(world, split))
    for entity in entities:
        yield from one_hop(world, entity)
        yield from _more_hops(world, entity)
    yield from _comparisons(entities, rng)


def one_hop(world: World, entity: Entity) -> Iterator[Ask]:
    """Yield the questions that the entity's own passage answers."""
    for relation, values in entity.facts.items():
        if relation != "kind":
            yield Ask("one_hop", relation, (entity,), values)
    if entity.country:
        yield Ask("one_hop", "country", (entity,), world.by_id[entity.country].names)


def _more_hops(world: World, entity: Entity) -> Iterator[Ask]:
    country = world.by_id.get(entity.country, entity)
    summit = world.mountains.get(country.id)
    if entity is country:
        if summit and "highest_point" in country.facts:
            yield Ask("two_hop", "elevation", (country, summit), summit.facts["elevation"])
        return
    for relation, values in country.facts.items():
        if not set(values) & set(entity.names):  # the place is the capital, the mountain the summit
            yield Ask("two_hop", relation, (entity, country), values)
    if summit and entity is not summit and "highest_point" in country.facts:
        yield Ask("three_hop", "elevation", (entity, country, summit), summit.facts["elevation"])


def _comparisons(entities: Sequence[Entity], rng: random.Random) -> Iterator[Ask]:
    for relation in COMPARED:
        able = [e for e in entities if relation in e.facts and e.type != "territory"]
        rng.shuffle(able)
        for shift in (1, 2, 3):
            for a, b in zip(able, able[shift:], strict=False):
                values = {e.id: float(e.facts[relation][0].replace(",", "")) for e in (a, b)}
                if values[a.id] != values[b.id]:
                    winner = max(a, b, key=lambda e: values[e.id])
                    yield Ask("comparison", relation, (a, b), winner.names)


def _in_turn(pool: Sequence[Ask], rng: random.Random) -> list[Ask]:
    """Shuffled, then the first of every (cluster, relation), the second of every one, ..."""
    shuffled = rng.sample(pool, len(pool))
    asked: Counter[tuple[str, str]] = Counter()
    clusters: Counter[str] = Counter()
    ranked = []
    for at, ask in enumerate(shuffled):
        cluster = ask.path[0].cluster
        ranked.append((asked[cluster, ask.relation], clusters[cluster], at))
        asked[cluster, ask.relation] += 1
        clusters[cluster] += 1
    return [shuffled[at] for _, _, at in sorted(ranked)]


def phrase_question(ask: Ask, rng: random.Random, seen: bool, id: str) -> Question:
    """Put a question into words. `seen`: as training questions are phrased; else one part is new."""
    # In more hops either the relation or the locator is put in a new way, not both.
    located = ask.kind in ("two_hop", "three_hop") and ask.path[0].country != ""
    new_locator = located and not seen and rng.random() < 0.5
    number = rng.randrange(64)
    first = ask.path[0]
    if ask.kind == "comparison":
        text = phrasing(COMPARED[ask.relation], number, seen)
        text = text.replace("{a}", first.name).replace("{b}", ask.path[1].name)
    else:
        x = first.name
        if located:
            x = phrasing(LOCATORS[first.type], rng.randrange(64), not new_locator).replace("{p}", x)
        if ask.relation == "elevation" and first.type != "mountain":
            x = SUMMIT_OF.replace("{x}", x)
        text = phrasing(ASKED[phrased_as(first, ask.relation)], number, seen or new_locator).replace("{x}", x)
    return Question(id, text, tuple(dict.fromkeys(ask.gold_answers)), {
        "kind": ask.kind,
        "cluster": first.cluster,
        "relation": ask.relation,
        "entities": [entity.id for entity in ask.path],
        "hops": [entity.name for entity in ask.path],
        "phrasing": "seen" if seen else "unseen",
    })  # fmt: skip


def wording(entity: Entity, relation: str) -> str:
    """Return the plainest question about one fact of an entity."""
    return ASKED[phrased_as(entity, relation)][0].replace("{x}", entity.name)


def phrased_as(entity: Entity, relation: str) -> str:
    """Return the key of the phrasings: a country's symbol is another relation than an element's."""
    return "element_symbol" if entity.type == "element" and relation == "symbol" else relation


def majority_baseline(train: Sequence[Question], test: Sequence[Question]) -> dict[str, float]:
    """Share of the test questions that the commonest training answer to their relation gets right.

    By kind, and "all". The floor below which nothing was searched or read.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in train:
        answers[_asked(question)][question.gold_answers[0]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for question in test:
        common = answers[_asked(question)].most_common(1)
        hit = bool(common) and common[0][0] in question.gold_answers
        right[str(question.metadata["kind"])].append(hit)
        right["all"].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def _asked(question: Question) -> tuple[str, str]:
    kind = "comparison" if question.metadata["kind"] == "comparison" else ""
    return kind, str(question.metadata["relation"])
