"""Demonstrations out of questions: what rules and a teacher keep, and what a poor query changes."""

# pyright: reportOptionalSubscript=false, reportArgumentType=false

import asyncio
import random
import time
from dataclasses import replace

import pytest

from data.records import Hit, Passage, Question
from retriever_server.client.chat import ChatClient, ChatError
from rl.demonstrations import POOR, demonstration_spans
from rl.demonstrators import POOR_QUERIES, Teacher, by_rules, keywords, with_queries, without_names, words_of
from tests.retriever_server.answering import answering

ROME = Passage("0", "Rome is the capital of Italy. <answer>x</answer>", "Rome")
ASKED = Question("q", "What is the capital of Italy?", ("the city of Rome", "Rome"))


class Shelf:
    """Finds one passage, whatever is asked, and keeps what was asked."""

    def __init__(self, passage=ROME):
        self.passage, self.asked = passage, []

    async def search(self, query, k):
        self.asked.append((query, k))
        return [Hit(self.passage, 1.0, "shelf")]


def test_rules_search_the_keywords_and_answer_with_the_gold_answer_that_the_passage_says():
    shelf = Shelf()
    record = asyncio.run(by_rules(ASKED, shelf, 2))
    assert shelf.asked == [("capital Italy", 2)]
    search, answer = record["steps"]
    assert (search["search"], answer["answer"]) == ("capital Italy", "Rome")
    assert search["passages"] == [{"id": "0", "title": "Rome", "text": ROME.text}]
    assert list(demonstration_spans(record, Teacher(None, "m").protocol))


@pytest.mark.parametrize(
    ("text", "golds"),
    [
        ("Paris is in France.", ("Rome",)),
        ("Of Romeo and Juliet.", ("Rome",)),
        ("one two three four five six seven eight nine", ("one two three four five six seven eight nine",)),
    ],
)
def test_rules_keep_nothing_that_does_not_say_a_short_gold_answer(text, golds):
    assert asyncio.run(by_rules(Question("q", "What?", golds), Shelf(Passage("0", text)), 1)) is None


def test_names_and_numbers_are_left_out_but_never_all_words():
    assert without_names("Who painted the Mona Lisa in 1503?", random.Random()) == "painted"
    assert without_names("Where is Rome?", random.Random()) == "Rome"
    assert keywords("What is it?") == "What is it"


def test_a_poor_query_has_some_of_the_words_in_their_order_and_leaves_the_rest_as_it_was():
    record = asyncio.run(by_rules(ASKED, Shelf(), 1))
    seen = set()
    for seed in range(40):
        poor = with_queries(record, "random_words", seed)
        assert poor == with_queries(record, "random_words", seed)
        words, at = poor["steps"][0]["search"].split(), iter(words_of(ASKED.text))
        assert 1 <= len(words) <= 6 and all(word in at for word in words)
        assert poor["queries"] == "random_words" and poor["steps"][1:] == record["steps"][1:]
        assert poor["steps"][0] | {"search": ""} == record["steps"][0] | {"search": ""}
        seen.add(tuple(words))
    assert len(seen) > 10
    assert with_queries(record, "as given") == record and POOR.keys() == POOR_QUERIES.keys()


def teach(replies, samples=1, questions=(ASKED,)):
    """Return what a teacher of these replies makes, by the number of messages it was told and its seed."""

    def reply(body):
        assert body["stop"] == ["</search>", "</answer>"]
        text = replies[body["seed"]][len(body["messages"]) // 2]
        return 200, {"choices": [{"message": {"content": text}}]}

    shelf = Shelf()
    with answering(v1__chat__completions=reply) as server:
        teacher = Teacher(ChatClient(f"{server.url}/v1"), "m", max_turns=2, samples=samples)
        return asyncio.run(teacher.demonstrate(questions, shelf)), shelf, server.seen


def test_a_teacher_that_answers_rightly_is_kept_with_its_own_queries():
    # The server took the closing tags off, where it stopped.
    turns = ["<think>look</think><search>Italy capital", "<think>read</think>\n<answer> rome"]
    [record], shelf, seen = teach([turns])
    assert record["steps"] == [
        {"think": "look", "search": "Italy capital", "passages": [{**vars_of(ROME)}]},
        {"think": "read", "answer": "rome"},
    ]
    assert shelf.asked == [("Italy capital", 3)] and len(seen) == 2


def vars_of(passage):
    return {"id": passage.id, "title": passage.title, "text": passage.text}


@pytest.mark.parametrize(
    "turns",
    [
        ["<think>look</think><search>a</search>", "<think>t</think><answer>Paris</answer>"],
        ["<think>I know</think><answer>Rome</answer>"],
        ["no form at all"],
        ["<think>t</think><search>a</search>"] * 3,
    ],
    ids=["a wrong answer", "an answer without a search", "no action", "too many searches"],
)
def test_a_teacher_is_rejected_for(turns):
    assert teach([turns])[0] == [None]


def test_a_teacher_has_as_many_tries_as_it_was_given():
    wrong = ["<think>t</think><answer>Paris</answer>"]
    right = ["<think>t</think><search>a</search>", "<think>t</think><answer>Rome</answer>"]
    [record], _, seen = teach([wrong, right], samples=2)
    assert record["steps"][-1]["answer"] == "Rome" and len(seen) == 3


def test_a_teacher_that_is_not_there_is_an_error(monkeypatch):
    from retriever_server.client import retries

    monkeypatch.setattr(retries, "delay_seconds", lambda failures: 0.0)
    with pytest.raises(ChatError, match="teacher http"):
        client = ChatClient("http://127.0.0.1:9/v1", "teacher", timeout_seconds=1)
        asyncio.run(Teacher(client, "m").demonstrate([ASKED], Shelf()))


def test_tries_without_a_reply_are_told_of(caplog):
    right = ["<think>t</think><search>a</search>", "<think>t</think><answer>Rome</answer>"]
    other = replace(ASKED, id="2", text="Which?")

    def reply(request):
        if "Which?" in request["messages"][0]["content"]:
            return 400, {"error": "too long"}
        return 200, {"choices": [{"message": {"content": right[len(request["messages"]) // 2]}}]}

    with answering(v1__chat__completions=reply) as server:
        teacher = Teacher(ChatClient(f"{server.url}/v1", "teacher"), "m", samples=2)
        with pytest.raises(ChatError, match="answered 400"):  # nothing was ever answered
            asyncio.run(teacher.demonstrate([other], Shelf()))
        first, second = asyncio.run(teacher.demonstrate([ASKED, other], Shelf()))
    assert first and second is None
    assert "1 of 2 tries had no reply: teacher http" in caplog.text and "answered 400" in caplog.text


def test_a_teacher_that_is_interrupted_asks_nothing_more():
    """The requests under way end, those that would come after them are not sent."""
    asked = []

    def reply(request):
        asked.append(request)
        time.sleep(0.4)
        return 200, {"choices": [{"message": {"content": "no form"}}]}

    async def interrupted(teacher):
        questions = [replace(ASKED, id=str(n), text=f"Who is {n}?") for n in range(20)]
        task = asyncio.create_task(teacher.demonstrate(questions, Shelf()))
        while not asked:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    with answering(v1__chat__completions=reply) as server:
        asyncio.run(interrupted(Teacher(ChatClient(f"{server.url}/v1", max_concurrent=2), "m")))
    assert 1 <= len(asked) <= 2
