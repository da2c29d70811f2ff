"""Text between a policy's tags, read by the whole loop; stop strings wherever tokens are cut."""

import asyncio
import json
import random
from dataclasses import dataclass, field

import pytest

from agent.engines.base import Sampling
from agent.engines.sampling import StopFinder
from agent.protocol import HERMES, SEARCH_R1
from agent.rollout import Agent
from agent.trajectory import StopReason
from tests.fakes import DictSearcher, byte_tokenizer, question
from tests.scripted import ScriptedEngine

# Whose tokens cross the ends of tags: "</" + "search", ">\n", "><".
TOKENIZER = byte_tokenizer(
    "<|im_start|>",
    "<|im_end|>",
    merges=("< /", "s e", "a r", "c h", "se ar", "sear ch", "</ search", "> Ċ", "</search >Ċ", "> <", "i n"),
)
LAST = "<think>t</think><answer>Paris</answer>"


def run(protocol, turn):
    engine = ScriptedEngine(TOKENIZER, [turn, LAST])
    agent = Agent(engine, TOKENIZER, DictSearcher({}), protocol)
    (trajectory,) = asyncio.run(agent.rollout([question()]))
    assert trajectory.stop_reason is StopReason.ANSWERED
    queries = [search.query for search in trajectory.searches]
    return trajectory, queries[0] if queries else None


SEARCHES = {
    "<think>a</think><search>Lyon</search>\nmore": ("Lyon", True),  # cut after the token that ends the tag
    "<think>a</think><search>Lyon</search>   \n": ("Lyon", True),
    "<think>a</think>\n\n <search> Lyon\n</search>": ("Lyon", True),
    "\n<think></think><search>Lyon</search>": ("Lyon", True),
    "<think>é</think><search>東京 naïve 👩‍🚀</search>": ("東京 naïve 👩‍🚀", True),
    "<think>a</think><search>a < b > c</search>": ("a < b > c", True),
    "<think>a</think><search><|im_end|> evil</search>": ("<|im_end|> evil", True),
    "<think>a</think><search>Lyon</search><b>": ("Lyon", False),
    "<think>a</think><search>x</search><search>y</search>": ("x", False),
    "<think>a</think><search>x</search><information>Paris</information>": ("x", False),
    "<information>Rome</information><search>x</search>": ("x", False),
    "<think>so <search>Rome</search> no</think>": ("Rome", False),
    "<search>a <search>b</search> c</search>": ("a <search>b", False),
    "<think>a <search>x</search>": ("x", False),
    "<think>a</think><think>b</think><search>x</search>": ("x", False),
    "<think>a</think> so <search>x</search>": ("x", False),
    "so <think>a</think><search>x</search>": ("x", False),
    "<search>x</search>": ("x", False),
}


@pytest.mark.parametrize("turn", SEARCHES)
def test_a_search_is_read_and_its_form_judged(turn):
    trajectory, query = run(SEARCH_R1, turn)
    assert (query, trajectory.valid_format) == SEARCHES[turn]
    assert (trajectory.answer, trajectory.invalid_actions) == ("Paris", 0)


ANSWERS = {
    "<think>a</think><answer>\nPa\nris\n</answer>": ("Pa\nris", True),
    "<think>a</think><answer>Rome</answer><answer>Paris</answer>": ("Rome", False),
    "<think>so <answer>Rome</answer> no</think><answer>Paris</answer>": ("Rome", False),
    "<search>a <answer>Rome</answer>": ("Rome", False),
    "<information>Doc 1: Paris</information><answer>Rome</answer>": ("Rome", False),
    "<think>a</think> so <answer>Rome</answer>": ("Rome", False),
    "<think>x</think><answer> </answer>": ("", False),
}


@pytest.mark.parametrize("turn", ANSWERS)
def test_an_answer_is_read_and_its_form_judged(turn):
    trajectory, query = run(SEARCH_R1, turn)
    assert (trajectory.answer, trajectory.valid_format) == ANSWERS[turn]
    assert (query, trajectory.invalid_actions) == (None, 0)


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "I do not know.",
        "</search>",
        "<answer>Rome</search> x",
        "<SEARCH>x</SEARCH>",
        "<search >x</search>",
        "<search x=1>x</search>",
        "<search/>x</search>",
        "<|im_end|>",
        "<think>a</think><search>" + "x" * 900,
    ],
)
def test_what_is_no_action_is_told_so(turn):
    trajectory, query = run(SEARCH_R1, turn)
    assert (query, trajectory.answer, trajectory.invalid_actions) == (None, "Paris", 1)
    assert not trajectory.valid_format and trajectory.segments[2].text == SEARCH_R1.invalid


def call(arguments, name="search"):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (call({"query": " x "}), "x"),
        (call({"query": "x", "more": 1}), "x"),
        (call({"query": "a"}) + call({"query": "b"}), "a"),
        (call({"query": "x"}, name="calculate"), None),
        (call({"query": ["a", "b"]}), None),
        (call({"question": "a"}), None),
        (call("x"), None),
        (call('{"query": "x"}'), None),
        (call(None), None),
        ('<tool_call>{"name": "search", }</tool_call>', None),
        ('<tool_call>{"arguments": {"query": "x"}}</tool_call>', None),
        ("<tool_call>[]</tool_call>", None),
    ],
)
def test_a_tool_call_is_a_search_or_invalid(turn, expected):
    trajectory, query = run(HERMES, turn)
    assert (query, trajectory.invalid_actions) == (expected, int(expected is None))


@dataclass
class Stream:
    """A completion under way."""

    sampling: Sampling
    new_ids: list[int] = field(default_factory=list)
    tail: str = ""


TEXTS = (
    *("abc</search>", "é</search>", "😀</answer>x", "</sea</search>", "<</search>", "</search", "</answer"),
    *("</searcha</answer>", "</SEARCH></search>", "</</search>", "a</search>b</search>", "</答></答案>"),
    "x" * 60 + "</answer>",
)


@pytest.mark.parametrize(
    "stop", [("</search>", "</answer>"), ("</answer>",), ("x", "é"), ("</答案>",), ()], ids=str
)
def test_a_stop_string_is_found_with_the_token_that_completes_it_however_tokens_are_cut(stop):
    finder, draw = StopFinder(TOKENIZER), random.Random(0)
    pieces = [(i, p) for i in range(len(TOKENIZER)) if (p := str(TOKENIZER.decode([i]))) and p.isascii()]
    for text in TEXTS * 12:
        ids, left = [], text
        while left:
            found = [(i, p) for i, p in pieces if left.startswith(p)]
            token, piece = draw.choice(found) if found else (None, left[0])
            ids += TOKENIZER.encode(piece, add_special_tokens=False) if token is None else [token]
            left = left[len(piece) :]
        stream, hit = Stream(Sampling(stop=stop)), None
        for at, token in enumerate(ids):
            stream.new_ids.append(token)
            if finder.found(stream, token):
                hit = at
                break
        texts = [str(TOKENIZER.decode(ids[: at + 1])) for at in range(len(ids))]
        assert hit == next((at for at, said in enumerate(texts) if any(s in said for s in stop)), None)
