"""Demonstrations in invented worlds that are hard to search: to teach a policy to read their passages.

It searches the names in turn; each passage needed is shown beside another one. Three in ten of those that
need several searches stop after one and guess, so that something is left for reinforcement learning to find.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from data.atlas.hard import hard_passages, steps
from data.atlas.invented import invent_world
from data.atlas.questions import make_questions, one_hop, put
from data.atlas.world import World
from data.records import Passage, Question

FULL_SHARE = 0.7
"""Share of the demonstrations of several searches that make them all; the others stop and guess."""
FOLLOW_UPS = 3
"""More questions about the passages shown last, answered without a search."""
COUNTS = {"one_hop": 5, "two_hop": 5, "three_hop": 1, "comparison": 1}
"""Questions of each kind in one world."""


def hard_demonstrations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield so many demonstrations, as `sleuth warm-start --demonstrations` reads them."""
    rng = random.Random(f"hard demonstrations:{seed}")
    made = 0
    while made < count:
        world = invent_world(rng)
        passages = hard_passages(world, made)
        for question in make_questions(world, None, COUNTS, seed=made)[: count - made]:
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
    text = put(ask, rng, True, "").text
    return {"question": text, "think": _told(passage["text"]), "answer": ask.gold_answers[0]}


def _told(text: str) -> str:
    return text.split(". Not far")[0].rstrip(".") + "."


def _guess(question: Question) -> str:
    """Return a name just read: one of the two compared, or where the way leads next."""
    return question.metadata["hops"][0 if question.metadata["kind"] == "comparison" else 1]
