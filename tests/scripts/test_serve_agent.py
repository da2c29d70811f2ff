"""OpenAI's clients and a browser ask a policy that searches; many share its engine."""

import asyncio
import json

import httpx
import pytest
from fastapi.testclient import TestClient

from agent.policy import Policy
from data.errors import ConfigError, RetrieverUnavailable
from scripts import __main__ as sleuth
from scripts.serve_agent import ServeAgentConfig, build_app
from scripts.wiring import open_agent
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import assert_as_described, build_small_index, serving, wait_until
from tests.retriever_server.server.test_search_page import CHROMIUM, Browser
from tests.scripted import ScriptedEngine

TURNS = ["<think> look</think><search> fox</search>", "<think> now</think><answer> red</answer>"]
CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which fox?"}]}


class Held(ScriptedEngine):
    """Holds its completions back until `go` is set."""

    def __init__(self, tokenizer, turns) -> None:
        super().__init__(tokenizer, turns)
        self.go, self.begun = asyncio.Event(), 0

    async def generate(self, *arguments):
        self.begun, self.loop = self.begun + 1, asyncio.get_running_loop()
        await self.go.wait()
        return await super().generate(*arguments)


@pytest.fixture
def agent_app(tmp_path, monkeypatch):
    """Build the application of a policy that writes these turns; its engine is `opened.agent.engine`."""

    def build(turns=TURNS, engine=ScriptedEngine, searcher=None, **options):
        index = str(build_small_index(tmp_path))
        policy = Policy(tiny_model("qwen2", 258), byte_tokenizer())
        monkeypatch.setattr("agent.policy.load_policy", lambda *_: policy)
        monkeypatch.setattr(
            "agent.engines.hf.HFEngine", lambda model, tokenizer, *_, **__: engine(tokenizer, turns)
        )
        config = ServeAgentConfig(policy="atlas", retriever=index, **options)
        opened = open_agent(config.policy, index, config.protocol)
        if searcher:
            monkeypatch.setattr(opened.client, "search", searcher)
        return build_app(config, opened, []), opened

    return build


def ask(app, path=CHAT, headers=None, **more):
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post(path, json={**ASKED, **more}, headers=headers)
    if not more.get("stream"):
        assert_as_described(app, answer)
    return answer


def test_an_answer_comes_with_its_thoughts_searches_and_citations(agent_app):
    app, opened = agent_app()
    answer = ask(app).json()
    [choice] = answer["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"], answer["model"]) == ("red", "stop", "atlas")
    assert message["reasoning_content"] == "look\nnow"
    [search] = message["searches"]
    found = [passage["id"] for passage in search["passages"]]
    assert search["query"] == "fox" and "0" in found and search["passages"][0]["generation"]
    assert message["citations"] == ["0"]  # "red fox" alone holds the answer
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 0 < usage["completion_tokens"] < usage["total_tokens"]
    assert len(opened.agent.engine.released) == 1


def test_ids_in_square_brackets_are_citations(agent_app):
    cited = "<answer> Explanation: so it is [1; 7].\nExact Answer: red\nConfidence: 80%</answer>"
    app, _ = agent_app([TURNS[0], cited], protocol=cited_protocol())
    message = ask(app).json()["choices"][0]["message"]
    assert (message["content"], message["citations"], message["confidence"]) == ("red", ["1"], 0.8)


def cited_protocol():
    from rl.config import ProtocolConfig

    return ProtocolConfig(answer_form="cited", max_response_tokens=200, top_k=3)


def test_a_stream_tells_each_part_as_it_comes(agent_app):
    app, _ = agent_app()
    lines = ask(app, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert [next(iter(delta), "") for delta in deltas] == [
        *("role", "reasoning_content", "searches", "reasoning_content", "content", ""),
    ]
    assert deltas[4]["content"] == "red" and deltas[4]["citations"] == ["0"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["total_tokens"] > 0


class Telling(ScriptedEngine):
    """Tells each token as it is written."""

    tell = staticmethod(lambda ids: None)

    def watch(self, trajectory_id, tell):
        self.tell = tell

    async def generate(self, *arguments):
        completion = await super().generate(*arguments)
        for count in range(1, len(completion.token_ids) + 1):
            self.tell(completion.token_ids[:count])
        return completion


@pytest.mark.parametrize(
    "turns",
    [
        TURNS,
        [
            "look é</think><search> 狐 fox</search>",
            "a < b > c",
            "no <think> now <b>x</b></think> <answer> r",
        ],
    ],
)
def test_thoughts_are_streamed_as_they_are_written(agent_app, turns):
    app, _ = agent_app(turns, Telling)
    message = ask(app).json()["choices"][0]["message"]
    app, _ = agent_app(turns, Telling)
    frames = ask(app, stream=True).text.split("\n\n")[1:-2]
    deltas = [json.loads(frame.removeprefix("data: "))["choices"][0]["delta"] for frame in frames]
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert "".join(thoughts).rstrip("\n") == message["reasoning_content"] and len(thoughts) > 6
    assert "<think" not in "".join(thoughts) and "\ufffd" not in "".join(thoughts)


@pytest.mark.slow
def test_openais_package_reads_answers_streams_models_and_errors(agent_app):
    openai = pytest.importorskip("openai")
    app, _ = agent_app()
    with serving(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == ["atlas"]
        assert client.models.retrieve("atlas").id == "atlas"
        with pytest.raises(openai.NotFoundError, match="model 'gpt': there is atlas"):
            client.models.retrieve("gpt")
        messages = ASKED["messages"]
        answer = client.chat.completions.create(model="atlas", messages=messages)
        assert answer.choices[0].message.content == "red"
        assert answer.choices[0].message.citations == ["0"]
        stream = client.chat.completions.create(model="atlas", messages=messages, stream=True)
        chunks = [chunk.choices[0].delta for chunk in stream]
        assert "".join(delta.content or "" for delta in chunks) == "red"
        assert any(getattr(delta, "searches", None) for delta in chunks)
        with pytest.raises(openai.BadRequestError, match="is of role 'assistant'"):
            client.chat.completions.create(model="atlas", messages=[{"role": "assistant", "content": "x"}])
        with pytest.raises(openai.NotFoundError, match="there is atlas"):
            client.chat.completions.create(model="gpt", messages=messages)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": " "}]}, "a question of 0 characters"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "a question of 9000 characters"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be a valid string",
        ),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content.0.type: Field required"),
        ({"n": 2}, "n: Input should be less than or equal to 1"),
        ({"tools": [{}]}, "tools: is not taken: the policy has its own tools"),
        ({"stop": ["x"]}, "stop: is not taken"),
        ({"logprobs": True}, "logprobs: is not taken"),
        ({"presence_penalty": 0.5, "frequency_penalty": 0}, "presence_penalty: is not taken"),
        ({"response_format": {"type": "json_object"}}, "response_format: is not taken"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0, "stream": True}, "max_tokens"),
    ],
)
def test_what_is_not_done_is_refused_in_openais_shape(agent_app, change, reason):
    answer = ask(agent_app()[0], **change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert reason in error["message"] and "\n" not in error["message"]


def test_a_client_that_was_told_no_model_is_answered_and_a_wrong_one_is_not(agent_app):
    app, _ = agent_app()
    assert ask(app, model="dummy").json()["model"] == "atlas"  # what huggingface_hub sends
    assert ask(app, model="gpt").status_code == 404


def test_the_policy_writes_no_more_tokens_than_asked_for(agent_app):
    app, _ = agent_app()
    for asked in ({"max_tokens": 50}, {"max_completion_tokens": 50, "max_tokens": 90}):
        answer = ask(app, **asked).json()
        [choice] = answer["choices"]
        assert answer["usage"]["completion_tokens"] == 50
        assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
    app, _ = agent_app(max_tokens=50)
    assert ask(app, max_tokens=500).json()["usage"]["completion_tokens"] == 50


@pytest.mark.parametrize("stream", [True, False])
def test_too_many_wait_and_one_that_left_frees_its_place(agent_app, stream):
    app, opened = agent_app(engine=Held, concurrency=1, max_waiting=1)
    engine, service = opened.agent.engine, app.state.service

    async def use(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            held = asyncio.create_task(client.post(CHAT, json={**ASKED, "stream": stream}))
            await asyncio.to_thread(wait_until, lambda: engine.begun == 1)
            waits = asyncio.create_task(client.post(CHAT, json=ASKED))
            await asyncio.to_thread(wait_until, lambda: service.waiting == 1)
            refused = await client.post(CHAT, json=ASKED)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert "questions are waiting" in refused.json()["error"]["message"]
            held.cancel()
            await asyncio.to_thread(wait_until, lambda: engine.begun == 2)
            assert len(engine.released) == 1
            engine.loop.call_soon_threadsafe(engine.go.set)
            assert (await waits).status_code == 200

    with serving(app) as url:
        asyncio.run(use(url))
    assert len(engine.released) == 2


def test_a_search_that_fails_is_an_error_and_no_answer(agent_app):
    async def fail(query, k):
        raise RetrieverUnavailable("http://x: gave up")

    app, _ = agent_app(searcher=fail)
    answer = ask(app)
    assert answer.status_code == 503 and "gave up" in answer.json()["error"]["message"]
    last = ask(app, stream=True).text.strip().split("\n\n")[-1]
    assert "gave up" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_a_question_that_takes_too_long_is_given_up(agent_app):
    app, opened = agent_app(engine=Held, max_deadline_seconds=1)
    assert ask(app).status_code == 504
    assert len(opened.agent.engine.released) == 1


def test_a_token_guards_all_but_the_page(agent_app, tmp_path):
    (tmp_path / "token").write_text("secret")
    app, _ = agent_app(token_file=str(tmp_path / "token"))
    refused = ask(app)
    assert refused.status_code == 401 and "bearer token" in refused.json()["error"]["message"]
    assert ask(app, headers={"Authorization": "Bearer secret"}).status_code == 200
    with TestClient(app) as client:
        assert client.get("/").status_code == client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(("option", "value"), [("concurrency", 0), ("max_waiting", -1), ("max_tokens", 0)])
def test_limits_that_mean_nothing_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} = {value}"):
        ServeAgentConfig(policy="atlas", retriever="none", **{option: value})


def test_wrong_places_are_one_line(capsys):
    assert sleuth.main(["serve-agent", "--policy", "nowhere", "--retriever", "none", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("sleuth: policy = 'nowhere': ")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_person_asks_in_a_browser_and_reads_the_answer_and_its_sources(agent_app, tmp_path):
    app, _ = agent_app(["<think> <b>look</b></think><search> fox</search>", TURNS[1]])
    with serving(app) as url:
        browser = Browser(tmp_path / "profile")
        try:
            browser.call("Page.enable")
            browser.call("Page.navigate", url=url)
            browser.wait_for("document.readyState === 'complete' && document.forms.length")
            browser.type("Which fox?")
            browser.wait_for("element('status').textContent.startsWith('answered')")
            assert browser.evaluate("element('answer').textContent") == "red"
            steps = browser.evaluate("[...document.querySelectorAll('#steps p')].map(p => p.textContent)")
            assert steps == ["<b>look</b>", "search: fox", "now"]
            cited = "[...document.querySelectorAll('.cited')].map(item => item.dataset.id)"
            assert browser.evaluate(cited) == ["0"]
            assert browser.evaluate("element('hits').children.length") == 1
            browser.evaluate("fetch = async () => Response.json({error: {message: 'no'}}, {status: 429})")
            browser.type("Again?")
            browser.wait_for("element('status').textContent === 'no'")
            assert browser.evaluate("element('status').className") == "error"
            browser.evaluate("fetch = async () => { throw new TypeError('Failed to fetch') }")
            browser.type("Still there?")
            browser.wait_for("element('status').textContent === 'the server does not answer'")
        finally:
            browser.process.kill()
