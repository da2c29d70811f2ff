"""Replies of generators: what can be read is read, what cannot is rejected with its reason."""

import json
import random

import pytest

from retriever_server.training.synthesis.parsing import Unparsable, parse_fields, parse_line, parse_list

GOOD = {"task": "Find lengths", "query": "How long is the Rhine?"}
WHOLE = json.dumps(GOOD)

READ = {
    "as it is": WHOLE,
    "fenced": f"Here you are:\n```json\n{WHOLE}\n```\nAnything else?",
    "among words": f"Sure! {WHOLE} I hope this helps.",
    "after a thought": f"<think>{{not this}}</think>{WHOLE}",
    "comma at the end": '{"task": "Find lengths", "query": "How long is the Rhine?",}',
    "single quotes": "{'task': 'Find lengths', 'query': 'How long is the Rhine?'}",
    "keys in capitals": '{"Task": "Find lengths", "QUERY": "How long is the Rhine?"}',
    "a line break in a text": '{"task": "Find lengths", "query": "How long is\nthe Rhine?"}',
    "wrapped": json.dumps({"result": GOOD}),
    "a list of one": json.dumps([GOOD]),
    "more keys": json.dumps({**GOOD, "note": 7}),
    "lines": "Task: Find lengths\n**Query:** How long is the Rhine?",
    "the same object twice": f"{WHOLE}\n{WHOLE}",
    "braces in a text": WHOLE.replace("Find lengths", "Find lengths").replace("}", ' , "note": "a } b"}'),
}
REJECTED = {
    "": "empty",
    "  \n\t ": "empty",
    "<think>only a thought": "cut off",
    "<think>a thought</think>": "empty",
    "I'm sorry, but I cannot help with that.": "refusal",
    "As an AI model I have no access.": "refusal",
    "no braces at all": "no JSON object",
    '{"task": "Find lengths", "query": "How long is': "cut off",
    '{"task": "Find lengths", "query": "How long is the Rhine?"': "cut off",
    '["Find lengths", "How long is the Rhine?"]': "no JSON object",
    '"How long is the Rhine?"': "no JSON object",
    "42": "no JSON object",
    "null": "no JSON object",
    json.dumps({"task": "Find lengths"}): "no query",
    json.dumps({"task": "Find lengths", "question": "How long?"}): "no query",
    json.dumps({"task": "t", "query": ""}): "query is empty",
    json.dumps({"task": "t", "query": "?!"}): "query is empty",
    json.dumps({"task": "t", "query": ["How long?", "How wide?"]}): "query is no text",
    json.dumps({"task": "t", "query": {"text": "How long?"}}): "query is no text",
    json.dumps({"task": "t", "query": None}): "query is no text",
    json.dumps({"task": "t", "query": 7}): "query is no text",
    json.dumps({"task": "t", "query": "<query>"}): "query is a placeholder",
    json.dumps({"task": "t", "query": "..."}): "query is empty",
    json.dumps({"task": "{task}", "query": "How long?"}): "task is a placeholder",
    json.dumps([GOOD, {**GOOD, "query": "How wide?"}]): "several objects",
    WHOLE + json.dumps({**GOOD, "query": "How wide?"}): "several objects",
    '{"query": "How long?", "query": "How wide?", "task": "t"}': "a key given twice",
    "Query: How long?\nQuery: How wide?\nTask: t": "a key given twice",
    "the river the river " * 30: "repeats itself",
    json.dumps({"task": "t", "query": "how long " * 60}): "repeats itself",
    "x" * 30_000: "too long",
    '{"task": "t" "query": "How long?"}': "no JSON object",
    "{" * 5000: "repeats itself",
    "<html><body>502 Bad Gateway</body></html>": "no JSON object",
}


@pytest.mark.parametrize("name", READ)
def test_a_json_object_is_found_in_many_shapes(name):
    assert parse_fields(READ[name], ("task", "query")) == GOOD


@pytest.mark.parametrize("text", REJECTED, ids=range(len(REJECTED)))
def test_a_malformed_reply_is_rejected_with_its_reason(text):
    assert len(REJECTED) >= 20
    with pytest.raises(Unparsable) as caught:
        parse_fields(text, ("task", "query"))
    assert str(caught.value) == REJECTED[text]


def test_any_piece_of_a_reply_is_read_rightly_or_rejected():
    rng = random.Random(0)
    shapes = [*READ.values(), *list(REJECTED)[:30]]
    for _ in range(600):
        text = rng.choice(shapes)[:400]
        at = sorted(rng.sample(range(len(text) + 1), 2)) if len(text) > 1 else [0, 0]
        broken = text[: at[0]] + rng.choice(["", "{", "}", '"', "\\", "\x00", "\ud800"]) + text[at[1] :]
        try:
            assert all(isinstance(value, str) for value in parse_fields(broken, ("query",)).values())
        except Unparsable as error:
            assert str(error)


def test_an_optional_field_may_be_absent_or_empty_but_no_list():
    assert parse_fields('{"query": "How long?", "answer": ""}', ("query",), ("answer",)) == {
        "query": "How long?"
    }
    with pytest.raises(Unparsable, match="answer is no text"):
        parse_fields('{"query": "How long?", "answer": [1]}', ("query",), ("answer",))


@pytest.mark.parametrize(
    "text", ["How long?", '"How long?"', "Query: How long?\nPassage: x", "\n Q: “How long?” "]
)
def test_a_line_loses_its_label_and_quotes(text):
    assert parse_line(text) == "How long?"


@pytest.mark.parametrize("text", ['{"query": "How long?"}', "```\nx", "<p>x", "", "***"])
def test_a_line_that_is_markup_is_rejected(text):
    with pytest.raises(Unparsable):
        parse_line(text)


@pytest.mark.parametrize(
    "text",
    [
        '["a b", "c d", "a b"]',
        "1. a b\n2. c d",
        "- a b\n* c d",
        'say "a b" or "c d"',
        '```json\n["a b", "c d",]\n```',
    ],
)
def test_a_list_is_json_or_bullets_or_quoted(text):
    assert parse_list(text) == ["a b", "c d"]


def test_a_list_of_nothing_is_rejected():
    with pytest.raises(Unparsable, match="no list"):
        parse_list("There are none")
