"""Endpoints that fail: one line, nothing lost, and the run goes on when they are well again."""

import errno
import json
import os

import pytest

from data.errors import ConfigError, RunStopped, SleuthError, StorageError
from retriever_server.client import retries
from retriever_server.client.chat import ChatError
from retriever_server.training.synthesis.generators import Chat, Scripted
from retriever_server.training.synthesis.judges import ChatJudge
from tests.retriever_server.answering import answering
from tests.retriever_server.training.synthesis.rivers import NAMES, run, synthesize
from tests.samples import quick


@pytest.fixture(autouse=True)
def retried_at_once(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.001)


class Endpoint:
    """Writes a query for the river named in the prompt; `fails(n)` may answer the n-th request instead."""

    def __init__(self, fails=lambda number: None):
        self.asked, self.fails = 0, fails

    def __call__(self, body):
        self.asked += 1
        if failure := self.fails(self.asked):
            return failure
        title = body["messages"][-1]["content"].split("Title: ")[1].split("\n")[0]
        reply = json.dumps({"task": "Find lengths", "query": f"How many miles has river {title}?"})
        return 200, {"choices": [{"message": {"content": reply}}], "usage": {"total_tokens": 50}}


def chat(server, tmp_path, **settings):
    return Chat(f"{server.url}/v1", cache=str(tmp_path / "replies.jsonl"), max_concurrent=1, **settings)


def examples(folder):
    return (folder / "out" / "examples.jsonl").read_bytes()


@pytest.mark.parametrize(
    "failure, message",
    quick(
        [((503, {}), r"3 tries failed \(answered 503\)")],
        [((503, {}), r"3 tries failed \(answered 503\)"), ((429, {}), "answered 429"),
         ((401, {}), "answered 401"), ((200, "<html>Bad gateway</html>"), "not a chat completion"),
         ((200, {"choices": []}), "not a chat completion")],
    ),
)  # fmt: skip
def test_an_endpoint_that_fails_stops_in_one_line_and_the_run_goes_on_later(tmp_path, failure, message):
    sick, well = Endpoint(lambda number: failure if number > 10 else None), Endpoint()
    with answering(v1__chat__completions=sick) as server:
        with pytest.raises(ChatError, match=message) as caught:
            synthesize(run(tmp_path, chat(server, tmp_path)))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("generator http://")
        server.routes["/v1/chat/completions"] = well
        synthesize(run(tmp_path, chat(server, tmp_path)))
        assert well.asked == len(NAMES) - 10  # what was answered is not asked again
        (tmp_path / "healthy").mkdir()
        synthesize(run(tmp_path / "healthy", chat(server, tmp_path / "healthy")))
    assert examples(tmp_path) == examples(tmp_path / "healthy")


def test_an_endpoint_that_is_down_or_slow_is_one_line(tmp_path):
    with pytest.raises(ChatError, match="ConnectError"):
        synthesize(run(tmp_path, Chat("http://127.0.0.1:9/v1")))
    import time

    slow = answering(v1__chat__completions=lambda body: time.sleep(0.5))
    with slow as server, pytest.raises(ChatError, match=r"tries failed .*Timeout"):
        synthesize(run(tmp_path, Chat(f"{server.url}/v1", timeout_seconds=0.05, max_concurrent=1)))


def test_a_budget_that_is_spent_can_be_raised(tmp_path):
    with answering(v1__chat__completions=Endpoint()) as server:
        with pytest.raises(ChatError, match=r"all 7 requests of generator.max_calls are spent"):
            synthesize(run(tmp_path, chat(server, tmp_path, max_calls=7)))
        with pytest.raises(ChatError, match=r"all 500 tokens of generator.max_tokens are spent"):
            synthesize(run(tmp_path, chat(server, tmp_path, max_tokens=500)))
        assert synthesize(run(tmp_path, chat(server, tmp_path)))["examples"] == len(NAMES)
        assert len(server.seen) == len(NAMES)


def test_a_prompt_that_the_endpoint_refuses_is_rejected_alone(tmp_path):
    once = Endpoint(lambda number: (400, {"error": "too long"}) if number == 3 else None)
    with answering(v1__chat__completions=once) as server:
        summary = synthesize(run(tmp_path, chat(server, tmp_path)))
        assert summary["rejected"] == [
            {"stage": "generated", "reason": "refused by the endpoint", "count": 1}
        ]
    with answering(
        v1__chat__completions=Endpoint(lambda number: (400, {"error": "no such model"}))
    ) as server:
        (tmp_path / "all").mkdir()
        with pytest.raises(ChatError, match="answered 400"):
            synthesize(run(tmp_path / "all", chat(server, tmp_path / "all")))


def test_a_generator_that_repeats_itself_for_ever_is_stopped(tmp_path):
    loop, same = "the river " * 40, json.dumps({"task": "t", "query": "how long is it"})
    for number, (text, said) in enumerate(
        [(loop, "repeats itself"), (same, "the same query again"), ("", "empty")]
    ):
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises(RunStopped, match=f"of 2.. texts . can be used .mostly: {said}"):
            synthesize(run(folder, Scripted([text]), per_passage=40, batch=50))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    from tests.retriever_server.training.synthesis.rivers import Lengths

    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        synthesize(run(tmp_path, Lengths()))
    monkeypatch.undo()
    assert synthesize(run(tmp_path, Lengths()))["examples"] == len(NAMES)


def test_a_chat_judge_scores_or_abstains_and_stops_where_the_endpoint_fails(tmp_path):
    from data.records import Passage

    replies = iter(['{"score": 80}', "I cannot say"])

    def answer(body):
        return 200, {"choices": [{"message": {"content": next(replies)}}]}

    pairs = [("q", Passage("1", "a")), ("q", Passage("2", "b"))]
    with answering(v1__chat__completions=answer) as server:
        first, second = ChatJudge(f"{server.url}/v1", max_concurrent=1).score(pairs)
        assert first == 80 and second != second
    with pytest.raises(SleuthError, match="judge http"):
        ChatJudge("http://127.0.0.1:9/v1").score(pairs)


def test_tokens_are_counted_as_read_and_written_and_a_moved_endpoint_is_said(tmp_path, caplog):
    def answer(body):
        status, reply = Endpoint()(body)
        return status, {**reply, "usage": {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}}

    with answering(v1__chat__completions=answer, v2__chat__completions=answer) as server:
        summary = synthesize(run(tmp_path, chat(server, tmp_path), limit=8))
        assert summary["tokens"] == {"read": 320, "written": 80}
        assert not caplog.records
        moved = Chat(f"{server.url}/v2", cache=str(tmp_path / "replies.jsonl"))
        synthesize(run(tmp_path, moved))
    [said] = [record.message for record in caplog.records]
    assert said == f"chat default: is asked at {server.url}/v2; what {server.url}/v1 wrote before stays"


def test_another_model_refuses_what_the_first_one_wrote(tmp_path):
    with answering(v1__chat__completions=Endpoint()) as server:
        synthesize(run(tmp_path, chat(server, tmp_path, model="a"), limit=8))
        with pytest.raises(ConfigError, match=r"generated\.jsonl: was made by other settings"):
            synthesize(run(tmp_path, chat(server, tmp_path, model="b")))


def test_another_system_prompt_or_option_is_another_generator():
    told = [{}, {"system": "Be brief."}, {"options": {"top_k": 5}}, {"system": "Be long."}]
    assert len({Chat("http://127.0.0.1:1/v1", **given).name for given in told}) == 4
    assert Chat("http://127.0.0.1:1/v1").name == Chat("http://127.0.0.1:2/v1").name
