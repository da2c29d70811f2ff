"""Controls: what each shows, which questions they can be made of, and what leaks."""

import asyncio

import pytest

from agent.evaluation.controls import control_agent, control_names, leaks, make_world
from agent.protocol import COMPACT
from agent.rollout import Agent
from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import write_jsonl
from data.records import Hit, Passage, Question
from tests.fakes import byte_tokenizer

PASSAGES = [
    Passage("a1", "Nothing here.", "Rome"),
    Passage("a2", "It was founded by Romulus.", "Rome"),
    Passage("b", "A twin.", "Remus"),
    Passage("c", "Romulus again, elsewhere.", "Other"),
    *(Passage(f"d{i}", f"Filler {i}.", f"Filler {i}") for i in range(9)),
]
QUESTION = Question("q", "Who founded Rome?", ("Romulus",), {"supporting_titles": ["Rome", "Remus"]})


class Everything:
    """Finds all passages in their order."""

    async def search(self, query, k):
        self.query = query
        return [Hit(passage, 1.0, "g") for passage in PASSAGES[:k]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_jsonl(path, [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES])
    return make_world(Corpus(path), [QUESTION])


def found(name, world, k, searches=1):
    agent = Agent(None, byte_tokenizer(), Everything(), COMPACT)
    searcher = control_agent(name, agent, world, QUESTION).searcher

    async def ask():
        return [[hit.passage.id for hit in await searcher.search(f"query {i}", k)] for i in range(searches)]

    return asyncio.run(ask())


def test_the_oracle_shows_all_gold_passages_those_that_hold_the_answer_first_and_goes_on_with_each_search(
    world,
):
    assert found("oracle", world, 5) == [["b", "a2", "a1"]]
    assert found("oracle", world, 2, searches=3) == [["b", "a2"], ["a1"], ["b", "a2"]]
    assert found("closed_book", world, 3) == [[]]


def test_evidence_is_present_replaced_or_removed_and_the_others_hold_none(world):
    assert found("evidence_present", world, 4) == [["b", "a2", "d0", "d1"]]
    assert found("evidence_replaced", world, 4) == [["d0", "d1", "d2", "d3"]]
    assert found("evidence_removed", world, 4) == [["d0", "d1"]]


def test_random_passages_are_the_same_for_the_same_query_and_spread_over_the_corpus(world):
    first, second = found("random", world, 5, searches=2)
    assert found("random", world, 5) == [first] and first != second
    assert len(set(first)) == 5
    many = {id_ for ids in found("random", world, 5, searches=40) for id_ in ids}
    assert many == {p.id for p in PASSAGES}


def test_a_single_search_is_that_of_the_question_and_the_only_one(world):
    agent = Agent(None, byte_tokenizer(), Everything(), COMPACT)
    single = control_agent("single_search", agent, world, QUESTION)
    asyncio.run(single.searcher.search("something else", 1))
    assert (agent.searcher.query, single.protocol.max_turns) == (QUESTION.text, 1)
    assert control_agent("max_searches_2", agent, world, QUESTION).protocol.max_turns == 2


def test_controls_that_need_gold_or_a_corpus_are_made_only_where_there_is_one(world):
    other = Question("x", "?", ("y",), {"supporting_titles": ["Atlantis"]})
    nowhere = make_world(None, [QUESTION])
    assert world.allows("oracle", QUESTION) and not world.allows("oracle", other)
    assert not nowhere.allows("random", QUESTION) and not nowhere.allows("evidence_removed", QUESTION)
    assert nowhere.allows("closed_book", other)


def test_names_of_controls_stand_for_several_and_wrong_ones_are_refused():
    assert control_names("true") == ["closed_book", "random", "oracle", "single_search"]
    assert control_names("pairs, oracle,max_searches_3")[-2:] == ["oracle", "max_searches_3"]
    assert len(control_names("all")) == 7
    with pytest.raises(ConfigError, match="controls: 'orakel': must be one of true, standard"):
        control_names("orakel")


def test_leaks_are_counted():
    train = [Question("t", "who founded ROME", ("Remus",)), Question("u", "?", ("Rome",), {"cluster": "it"})]
    asked = [
        Question("1", "Who founded Rome?", ("Romulus",)),
        Question("2", "Is Paris Paris?", ("Paris",), {"cluster": "it"}),
        Question("3", "What capital?", ("rome",)),
        Question("4", "Why?", ("because",)),
    ]
    assert leaks(asked) == {"answer_in_question": 0.25}
    assert leaks(asked, train) == {
        "answer_in_question": 0.25,
        "question_in_training": 0.25,
        "answer_in_training": 0.25,
        "evidence_in_training": 0.25,
    }
