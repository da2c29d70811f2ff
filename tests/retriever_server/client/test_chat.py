"""The client of chat endpoints: what is asked once, what again, and what is not asked at all."""

import json
import time

import pytest

from data.errors import ConfigError, DataError
from retriever_server.client import retries
from retriever_server.client.chat import ChatClient, ChatError
from tests.retriever_server.answering import answering


def completion(text, tokens=5):
    return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}}


def bodies(*texts):
    return [{"model": "m", "messages": [{"role": "user", "content": text}]} for text in texts]


def echo(body):
    return 200, completion(body["messages"][0]["content"].upper())


def test_replies_come_in_order_and_equal_requests_are_asked_once():
    with answering(v1__chat__completions=echo) as server:
        client = ChatClient(f"{server.url}/v1")
        assert client.ask(bodies("a", "b", "a"), str) == ["A", "B", "A"]
        assert client.ask(bodies("b"), str) == ["B"]
        assert len(server.seen) == 2


def test_replies_are_kept_by_address_and_request(tmp_path):
    with answering(v1__chat__completions=echo, v2__chat__completions=echo) as server:
        for path, many in (("v1", 1), ("v1", 1), ("v2", 2)):
            client = ChatClient(f"{server.url}/{path}", cache=tmp_path / "chat.jsonl")
            assert client.ask(bodies("a"), str) == ["A"]
            assert len(server.seen) == many


def test_a_reply_that_cannot_be_parsed_is_an_error_and_asked_again():
    with answering(v1__chat__completions=echo) as server:
        client = ChatClient(f"{server.url}/v1", "teller")
        [error, number] = client.ask(bodies("a", "7"), int)
        assert isinstance(error, ChatError) and str(error).startswith(
            f"teller {server.url}/v1/chat/completions: "
        )
        assert number == 7
        client.ask(bodies("a", "7"), int)
        assert len(server.seen) == 3


def test_tokens_read_and_written_are_told_apart_and_kept(tmp_path):
    told = [
        {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}, {"total_tokens": 9}, {},
        {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 12}, {"prompt_tokens": 7}, None,
        {"prompt_tokens": "many", "completion_tokens": float("inf")}, {"total_tokens": -5}, "none",
    ]  # fmt: skip
    usages, requests = iter(told), bodies(*"abcdefghi")

    def answer(body):
        return 200, {"choices": [{"message": {"content": "x"}}], "usage": next(usages)}

    with answering(v1__chat__completions=answer) as server:
        for _ in range(2):  # the second time from the file
            client = ChatClient(f"{server.url}/v1", max_concurrent=1, cache=tmp_path / "chat.jsonl")
            client.ask(requests, str)
            took = [client.tokens_of(request) for request in requests]
            assert took == [(7, 2), (9, 0), (0, 0), (10, 2), (7, 0), (0, 0), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        (None, ""),
        (
            [
                {"type": "thinking", "thinking": []},
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b"},
            ],
            "ab",
        ),
        ({"text": "a"}, None),
        ([{"text": "a"}], None),
        (["a"], None),
    ],
)
def test_parts_of_a_message_are_joined_and_what_is_no_text_is_an_error(content, reply):
    with answering(v1__chat__completions=lambda _: (200, completion(content))) as server:
        [outcome] = ChatClient(f"{server.url}/v1").ask(bodies("a"), str)
        assert outcome == reply if reply is not None else "not a chat completion" in str(outcome)


def test_tokens_are_a_budget_too_after_a_restart_as_well(tmp_path):
    with answering(v1__chat__completions=echo) as server:
        settings = {"max_tokens": 8, "max_concurrent": 1, "cache": tmp_path / "chat.jsonl"}
        outcomes = ChatClient(f"{server.url}/v1", **settings).ask(bodies("a", "b", "c"), str)
        assert (
            outcomes[:2] == ["A", "B"]
            and str(outcomes[2]) == "chat: all 8 tokens of chat.max_tokens are spent"
        )
        [kept, spent] = ChatClient(f"{server.url}/v1", **settings).ask(bodies("a", "c"), str)
        assert kept == "A" and isinstance(spent, ChatError)
        assert len(server.seen) == 2


def test_replies_that_cannot_be_parsed_are_paid_for_too_after_a_restart_as_well(tmp_path):
    with answering(v1__chat__completions=echo) as server:
        settings = {"max_tokens": 8, "max_calls": 3, "max_concurrent": 1, "cache": tmp_path / "chat.jsonl"}
        outcomes = ChatClient(f"{server.url}/v1", **settings).ask(bodies("a", "b", "c"), int)
        assert "invalid literal" in str(outcomes[1]) and "all 8 tokens" in str(outcomes[2])
        [spent] = ChatClient(f"{server.url}/v1", **settings).ask(bodies("a"), str)
        assert "all 8 tokens" in str(spent)
        [text, spent] = ChatClient(f"{server.url}/v1", **settings | {"max_tokens": 99}).ask(
            bodies("a", "b"), str
        )
        assert text == "A" and "all 3 requests" in str(spent) and len(server.seen) == 3


@pytest.fixture
def saying_when(monkeypatch):
    """A server that is busy once and says for how long."""
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.001)
    from tests.retriever_server.client.test_search_client import FlakyServer

    def serve(seconds):
        return FlakyServer((429, {"retry-after": seconds}, "busy"), (200, {}, json.dumps(completion("A"))))

    return serve


def test_retry_after_is_honoured_where_it_is_worth_it(saying_when):
    import asyncio

    async def ask(seconds):
        async with saying_when(seconds).running() as server:
            client = ChatClient(server.url, timeout_seconds=5.0)
            return await asyncio.to_thread(client.ask, bodies("a"), str), server

    start = time.monotonic()
    assert asyncio.run(ask("1"))[0] == ["A"] and time.monotonic() - start >= 1
    [[error], server] = asyncio.run(ask("3600"))
    assert "1 try failed (answered 429, to wait 3600 s)" in str(error) and len(server.requests) == 1


@pytest.mark.parametrize("busy, outcome", [(4, "A"), (5, "5 tries failed (answered 429, to wait 1 s)")])
def test_a_server_that_says_when_is_asked_for_the_time_of_a_request(monkeypatch, busy, outcome):
    import asyncio

    from tests.retriever_server.client.test_search_client import FlakyServer

    async def ask():
        full = (429, {"retry-after": "1"}, "busy")
        async with FlakyServer(*[full] * busy, (200, {}, json.dumps(completion("A")))).running() as server:
            client = ChatClient(server.url, timeout_seconds=4.0)
            monkeypatch.setattr(time, "sleep", lambda seconds: None)
            return await asyncio.to_thread(client.ask, bodies("a"), str)

    assert outcome in str(asyncio.run(ask())[0])


@pytest.mark.parametrize("url", [None, "", "localhost:8000", "http://x:99999/v1"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"chat\.url = .*needs one like http://"):
        ChatClient(url)


@pytest.mark.parametrize(
    "limit", [{"max_concurrent": 0}, {"timeout_seconds": 0}, {"max_calls": -1}, {"max_tokens": 0}]
)
def test_a_limit_that_lets_nothing_through_is_refused(limit):
    with pytest.raises(ConfigError, match=rf"judge\.{next(iter(limit))} = .*must be >"):
        ChatClient("http://127.0.0.1:1/v1", "judge", **limit)


@pytest.mark.parametrize(
    "line", ['{"reply": "a"}', '{"key": "a", "reply": 1}', '{"key": "a", "read": "many"}']
)
def test_a_cache_of_something_else_is_named_with_its_line(tmp_path, line):
    (tmp_path / "chat.jsonl").write_text(f'{{"key": "a", "reply": "b"}}\n{line}\n')
    with pytest.raises(DataError, match=r"chat\.jsonl:2: not a kept reply"):
        ChatClient("http://127.0.0.1:9/v1", cache=tmp_path / "chat.jsonl")
