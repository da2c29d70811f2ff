"""`sleuth ask` shows each part of a trajectory in its order, and ends with the answer alone."""

import pytest

from agent.policy import Policy
from agent.protocol import COMPACT, HERMES
from agent.tools import Search
from scripts import __main__ as sleuth
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import build_small_index
from tests.scripted import ScriptedEngine


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Ask a policy that writes these turns -> (status, stdout, stderr)."""

    def run(turns, *options, retriever=None):
        index = build_small_index(tmp_path)
        policy = Policy(tiny_model("qwen2", 258), byte_tokenizer())
        monkeypatch.setattr("agent.policy.load_policy", lambda *_: policy)
        monkeypatch.setattr(
            "agent.engines.hf.HFEngine", lambda model, tokenizer, rows, **_: ScriptedEngine(tokenizer, turns)
        )
        argv = ["Which fox?", "--policy", "atlas", "--retriever", str(retriever or index), *options]
        status = sleuth.main(["ask", *argv, "--protocol.name", "compact"])
        return status, *capsys.readouterr()

    return run


def test_thoughts_searches_passages_and_answer_appear_in_order(ask):
    turns = [
        "<think> look</think><search> [bold]fox</search>",
        "no tags",
        "<think> now</think><answer> the red</answer>",
    ]
    status, out, _ = ask(turns, "--protocol.top_k", "1")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 0
    assert lines == [
        "thought look",
        "search [bold]fox",
        "found T0: red fox",
        "text no tags",
        "invalid no action that the protocol knows; it is told so",
        "thought now",
        "answer the red",
        "the red",
    ]


def test_a_search_without_hits_and_an_end_without_answer_are_said(ask):
    status, out, _ = ask(["<search> fox</search>"], "--protocol.max_turns", "1", retriever="none")
    assert status == 3 and "found  nothing" in out
    assert out.splitlines()[-1] == "no answer (turn_limit)"


def test_a_retriever_that_is_down_is_one_line(ask, monkeypatch):
    monkeypatch.setattr("retriever_server.client.http.delay_seconds", lambda *_: 60.0)  # past the deadline
    status, _, err = ask(["<search> fox</search>"], retriever="http://127.0.0.1:9")
    assert status == 2 and err.startswith("sleuth: http://127.0.0.1:9: gave up")


def test_a_turn_is_split_into_its_parts_and_a_tool_call_shows_its_query():
    turn = "so <think> a\n b</think> <search> c</search> <answer> cut off"
    parts = [("text", "so"), ("thought", "a b"), ("search", "c"), ("answer", "cut off")]
    assert COMPACT.split_turn(turn) == parts
    assert HERMES.split_turn(HERMES.render_turn("t", Search("who?"))) == [
        ("thought", "t"),
        ("search", "who?"),
    ]


def test_a_question_without_words_is_refused(capsys):
    assert sleuth.main(["ask", " ", "--policy", "atlas", "--retriever", "none"]) == 2
    assert capsys.readouterr().err == "sleuth: question = ' ': must hold a word\n"
