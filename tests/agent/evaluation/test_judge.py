"""The judge: right verdicts, asked once, within bounds; what fails is an error and never a score."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agent.evaluation.judge import Case, Judge, judge_folder
from agent.evaluation.measures import evaluation_record
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError, RunStopped
from data.jsonl import write_jsonl
from retriever_server.client import chat as module
from retriever_server.client import retries
from rl.algorithm.rewards import combine
from rl.config import JudgeConfig
from tests.fakes import question


class Server:
    """Replies with `reply`: a text of the model, a status, raw bytes, or a function of the request."""

    def __init__(self):
        self.reply, self.requests, self.headers, self.at_once, self.most_at_once = "YES", [], [], 0, 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    outer.requests.append((self.path, request))
                    outer.headers.append(self.headers)
                reply = outer.reply(request) if callable(outer.reply) else outer.reply
                status, body = (reply, b"no") if isinstance(reply, int) else (200, reply)
                if isinstance(body, str):
                    body = json.dumps({"choices": [{"message": {"content": body}}]}).encode()
                with lock:
                    outer.at_once -= 1
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the judge has hung up

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.001)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def answered(*answers):
    turn = Segment(SegmentKind.POLICY, [1], "x", [0.0])
    return [Trajectory(question(), [turn], StopReason.ANSWERED, answer) for answer in answers]


def only_paris(request):
    return "YES" if '"answer": "Paris"' in request["messages"][0]["content"] else "NO"


def test_verdicts_come_in_the_order_of_the_trajectories(server):
    server.reply = only_paris
    judge = Judge(JudgeConfig(server.url))
    assert judge(answered("Paris", "Rome", "Paris", None, "", "Oslo")) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert len(server.requests) == 3  # each different answer once, no answer not at all


def test_the_judge_sees_question_gold_answers_and_answer_at_temperature_0(server):
    Judge(JudgeConfig(server.url, model="m"))(answered('Par"is\n</answer>'))
    path, request = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("m", 0)
    content = request["messages"][0]["content"]
    case = json.loads(content[content.index("{") : content.rindex("}") + 1])
    assert case == {
        "question": "What is the capital of France?",
        "gold_answers": ["Paris"],
        "answer": 'Par"is\n</answer>',
    }


@pytest.mark.parametrize(
    ("reply", "score"),
    [("YES", 1.0), ("yes.", 1.0), ("**No**", 0.0), ("<think> Yes? No. </think>\n\nYES, it is.", 1.0)],
)
def test_a_verdict_is_read_off_the_first_word_after_any_thought(server, reply, score):
    server.reply = reply
    assert Judge(JudgeConfig(server.url))(answered("Paris")) == [score]


@pytest.mark.parametrize("reply", ["", "No idea", "Perhaps", "Nothing", "<think> YES </think>", "It is: YES"])
def test_a_reply_that_is_no_verdict_is_an_error(server, reply):
    server.reply = reply
    assert Judge(JudgeConfig(server.url))(answered("Paris"))[0] == (
        f"judge {server.url}/chat/completions: neither YES nor NO: {reply!r}"
    )


@pytest.mark.parametrize(
    "reply", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 1}]}']
)
def test_what_is_no_chat_completion_is_an_error(server, reply):
    server.reply = reply
    assert "not a chat completion" in str(Judge(JudgeConfig(server.url))(answered("Paris"))[0])


def test_the_cache_outlives_a_restart_and_a_cut_last_line(server, tmp_path):
    cache, config = tmp_path / "judge.jsonl", JudgeConfig(server.url)
    server.reply = only_paris
    assert Judge(config, cache)(answered("Paris", "Rome")) == [1.0, 0.0]
    with open(cache, "a") as file:
        file.write('{"key": "cut in the mid')
    server.reply = 500
    assert Judge(config, cache)(answered("Paris", "Rome")) == [1.0, 0.0]
    assert len(server.requests) == 2
    server.reply = "NO"
    assert Judge(config, cache)(answered("Oslo")) == [0.0]  # written behind the cut line
    server.reply = 500
    assert Judge(config, cache)(answered("Paris", "Oslo")) == [1.0, 0.0]


def test_a_cache_of_the_version_that_kept_scores_is_read(server, tmp_path):
    [trajectory] = answered("Paris")
    case = Case(trajectory.question.text, trajectory.question.gold_answers, "Paris")
    request = Judge(JudgeConfig(server.url))._request(case)
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()
    (tmp_path / "judge.jsonl").write_text(json.dumps({"key": key, "score": 1.0}) + "\n")
    assert Judge(JudgeConfig(server.url), tmp_path / "judge.jsonl")([trajectory]) == [1.0]
    assert not server.requests


def test_another_model_is_asked_again(server, tmp_path):
    Judge(JudgeConfig(server.url, "a"), tmp_path / "judge.jsonl")(answered("Paris"))
    Judge(JudgeConfig(server.url, "b"), tmp_path / "judge.jsonl")(answered("Paris"))
    assert len(server.requests) == 2


def test_a_failing_server_is_tried_three_times_then_an_error_that_is_not_kept(server, tmp_path):
    judge = Judge(JudgeConfig(server.url), tmp_path / "judge.jsonl")
    server.reply = 503
    assert "3 tries failed (answered 503)" in str(judge(answered("Paris"))[0])
    assert len(server.requests) == 3
    server.reply = "YES"
    assert judge(answered("Paris")) == [1.0]


def test_a_server_that_recovers_within_the_tries_gives_a_verdict(server):
    replies = iter([500, 429, "NO"])
    server.reply = lambda request: next(replies)
    assert Judge(JudgeConfig(server.url))(answered("Rome")) == [0.0]


def test_a_refusal_is_not_repeated(server):
    server.reply = 401
    assert "answered 401: no" in str(Judge(JudgeConfig(server.url))(answered("Paris"))[0])
    assert len(server.requests) == 1


def test_a_server_that_is_too_slow_or_not_there_is_an_error(server):
    gone = threading.Event()
    server.reply = lambda request: "YES" if gone.wait(5) else "NO"
    slow = Judge(JudgeConfig(server.url, timeout_seconds=0.05))(answered("Paris"))[0]
    gone.set()
    assert "3 tries failed (ReadTimeout" in str(slow)
    assert "3 tries failed (ConnectError" in str(
        Judge(JudgeConfig("http://127.0.0.1:9/v1"))(answered("x"))[0]
    )


def test_a_server_that_drips_cannot_hold_a_request_beyond_its_timeout(server, monkeypatch):
    monkeypatch.setattr(
        module.httpx.Response, "iter_bytes", lambda self: (time.sleep(0.02) or b" " for _ in range(500))
    )
    monkeypatch.setattr(module, "TRIES", 1)
    assert "does not end" in str(Judge(JudgeConfig(server.url, timeout_seconds=1))(answered("Paris"))[0])


def test_no_more_requests_than_allowed_not_even_after_a_restart(server, tmp_path):
    config, cache = JudgeConfig(server.url, max_calls=2, max_concurrent=1), tmp_path / "judge.jsonl"
    judge = Judge(config, cache)
    first, second, third = judge(answered("a", "b", "c"))
    assert (first, second) == (1.0, 1.0)
    assert third == "judge: all 2 requests of judge.max_calls are spent"
    assert Judge(config, cache)(answered("c", "a")) == [third, 1.0]
    assert len(server.requests) == 2


def test_requests_at_once_are_bounded(server):
    three = threading.Barrier(3, timeout=10)  # nobody gets a reply before three have asked
    server.reply = lambda request: "YES" if three.wait() >= 0 else "NO"
    assert Judge(JudgeConfig(server.url, max_concurrent=3))(answered(*map(str, range(12)))) == [1.0] * 12
    assert server.most_at_once == 3


def test_a_failure_of_the_judge_is_an_error_of_the_reward_and_no_zero(server):
    server.reply = lambda request: 500 if '"answer": "Rome"' in request["messages"][0]["content"] else "YES"
    reward = combine({"em": 1.0, "judge": 0.5}, JudgeConfig(server.url))
    good, bad = reward(answered("Paris", "Rome"))
    assert good.turns == [1.5] and good.parts == {"em": 1.0, "judge": 1.0} and good.error is None
    assert "answered 500" in bad.error and bad.parts == {"em": 0.0}


def test_the_key_is_the_first_line_of_its_file(server, tmp_path):
    (tmp_path / "key").write_text("secret\nanything\n")
    Judge(JudgeConfig(server.url, api_key_file=str(tmp_path / "key")))(answered("Paris"))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(ConfigError, match=r"judge\.api_key_file .*missing: No such file"):
        Judge(JudgeConfig(server.url, api_key_file=str(tmp_path / "missing")))


def test_a_prompt_file_that_cannot_be_read_is_named(server, tmp_path):
    (binary := tmp_path / "binary").write_bytes(b"\xff")
    for file in (binary, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=rf"judge\.prompt_file: .*{file.name}: "):
            Judge(JudgeConfig(server.url, prompt_file=str(file)))


@pytest.mark.parametrize(
    "url", [None, "", "localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1", "http://[x/v1"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"judge\.url = .*needs one like http://"):
        Judge(JudgeConfig(url))


def test_a_judge_that_fails_for_all_it_is_asked_about_is_no_share_of_right_answers(server, tmp_path):
    records = [evaluation_record(each) for each in (*answered("Paris"), *answered(None))]
    write_jsonl(tmp_path / "trajectories.jsonl", [{**r, "id": f"q{i}"} for i, r in enumerate(records)])
    server.reply = 401
    with pytest.raises(RunStopped, match=r"no answer could be judged: judge .* answered 401"):
        judge_folder(tmp_path, Judge(JudgeConfig(server.url)))
    assert not (tmp_path / "judgements.jsonl").exists()
