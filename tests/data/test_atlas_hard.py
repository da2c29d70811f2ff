"""The hard world: the passages that a question needs are there, and share no words with it."""

import re

import pytest

from data.atlas.hard import COUNTS, hard_demonstrations, hard_passages, hard_questions, steps
from data.atlas.phrasings import ASKED, INDIRECT
from data.atlas.world import load_world


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def passages(world):
    return {passage.id: passage for passage in hard_passages(world)}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_passages_that_a_question_needs_are_there_and_the_last_holds_the_answer(world, passages, split):
    questions = hard_questions(world, split)
    assert {q.metadata["kind"] for q in questions} == set(COUNTS[split])
    for question in questions:
        needed = question.metadata["supporting_ids"]
        assert set(needed) <= set(passages) and needed == list(steps(world, question))
        if question.metadata["kind"] != "comparison":
            assert any(answer in passages[needed[-1]].text for answer in question.gold_answers)


def test_test_questions_have_new_entities_and_new_phrasings(world):
    train, test = hard_questions(world, "train"), hard_questions(world, "test")
    clusters = [{q.metadata["cluster"] for q in questions} for questions in (train, test)]
    assert not clusters[0] & clusters[1]
    assert not {e for q in test for e in q.metadata["entities"]} & {
        e for q in train for e in q.metadata["entities"]
    }
    phrasings = [{_without_names(q) for q in questions} for questions in (train, test)]
    assert not phrasings[0] & phrasings[1] and min(map(len, phrasings)) > 100


def _without_names(question):
    names = sorted(question.metadata["hops"], key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})(?!\w)", "@", question.text)


def test_no_word_of_a_relation_is_in_a_passage_that_tells_it():
    small = set(re.findall(r"\w+", "a an the of in is are was to that for by and on at it has s"))
    for relation, phrases in INDIRECT.items():
        told = {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase.lower())}
        asked = {word for phrase in ASKED[relation] for word in re.findall(r"[a-z]+", phrase.lower())}
        assert not (told & asked) - small - {"e", "x", "v"}, relation


def test_the_same_seed_gives_the_same_world(world):
    assert hard_passages(world, 1) == hard_passages(world, 1) != hard_passages(world, 2)


def test_demonstrations_read_the_answer_in_invented_worlds(world):
    names = {entity.name for entity in world.entities}
    made = list(hard_demonstrations(200))
    assert made == list(hard_demonstrations(200))
    whole = 0
    for demonstration in made:
        *searches, last = demonstration["steps"]
        shown = [passage["text"] for step in searches for passage in step["passages"]]
        assert all(len(step["passages"]) == 2 for step in searches)
        assert not {step["search"] for step in searches} & names
        whole += last["answer"] in " ".join(shown)
        for more in demonstration["follow_ups"]:
            assert more["answer"] in " ".join(shown)
    assert whole > 150  # comparisons answer with a name
