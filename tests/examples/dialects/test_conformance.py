"""The same scripted policy through our own rollout and through each dialect, by the real packages."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trl
from fastapi import FastAPI
from trl import GRPOConfig, GRPOTrainer

from agent.protocol import HERMES, Answer
from agent.rollout import Agent
from agent.tools import Search
from agent.trajectory import SegmentKind
from data.jsonl import write_jsonl
from rl.episodes import SearchEpisodes
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import build_small_index, serving
from tests.scripted import ScriptedEngine

END = "<|im_end|>"
QWEN = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
ACTIONS = [Search("fox"), Search("sea"), Answer("blue")]
TURNS = [HERMES.render_turn("I look", action) for action in ACTIONS]


@dataclass
class Seen:
    """Outcome of the script; `ids` from the prompt's end to the end of the last observation."""

    observations: list[str]
    searches: int
    reward: float
    ids: list[int] | None = None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy's folder, an index, a question; episodes over them."""
    folder = tmp_path_factory.mktemp("dialects")
    build_small_index(folder)
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    tokenizer = byte_tokenizer("<|endoftext|>", "<unk>", "<|im_start|>", END, *tags)
    tokenizer.eos_token, tokenizer.unk_token, tokenizer.chat_template = END, "<unk>", QWEN.read_text()
    model = tiny_model("qwen2", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = [{"id": "q", "question": "What is it?", "golden_answers": ["blue"]}]
    write_jsonl(folder / "questions.jsonl", rows)
    parts = [str(folder / name) for name in ("questions.jsonl", "index", "policy")]
    return folder, parts, SearchEpisodes(*parts, rewards={"f1": 0.5})


@pytest.fixture(scope="module")
def ours(world):
    """The script in our own rollout."""
    episodes = world[2]
    engine = ScriptedEngine(episodes.agent.tokenizer, TURNS)
    agent = replace(episodes.agent, engine=engine)
    assert isinstance(agent, Agent)
    [trajectory] = asyncio.run(agent.rollout(episodes.questions))
    observed = [s for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]
    said = [s.text.split("user\n", 1)[1].split(END)[0] for s in observed]
    ids = [token for s in trajectory.segments[1:-1] for token in s.token_ids]
    return Seen(said, len(trajectory.searches), 0.5, ids)


def through_openenv(world):
    """Reset and steps over a WebSocket, turns as token ids."""
    pytest.importorskip("openenv", reason="needs openenv: examples/openenv/README.md")
    from examples.openenv.server import SearchWorldClient, Turn, make_app

    encode = world[2].agent.tokenizer.encode

    async def play(url):
        async with SearchWorldClient(base_url=url) as env:
            read, ids = [await env.reset(index=0)], []
            for turn in TURNS:
                ids += encode(turn)
                read.append(await env.step(Turn(token_ids=encode(turn))))
                ids += read[-1].observation.token_ids
            return read, ids, await env.state()

    with serving(make_app(world[2])) as url:
        read, ids, state = asyncio.run(play(url))
    assert [r.done for r in read] == [False, False, False, True] and read[1].reward is None
    assert "What is it?" in read[0].observation.text
    assert (state.stop_reason, state.step_count, state.question) == ("answered", 3, "What is it?")
    said = [r.observation.text.split("user\n", 1)[1].split(END)[0] for r in read[1:-1]]
    return Seen(said, state.searches, read[-1].reward, ids[: -len(encode(TURNS[-1]))])


def through_verifiers(world, monkeypatch, carries_ids):
    """An episode of the environment package, the policy behind an endpoint of messages or of tokens."""
    reason = "needs verifiers: examples/verifiers/README.md"
    vf = pytest.importorskip("verifiers.v1", reason=reason)
    monkeypatch.syspath_prepend(str(Path("examples/verifiers").resolve()))
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(body: dict):
        turn = TURNS[sum(message["role"] == "assistant" for message in body["messages"])]
        thought, content = turn.removeprefix("<think>").split("</think>")  # as a reasoning parser does
        message = {"role": "assistant", "content": content, "reasoning_content": thought}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}

    encode, decode = world[2].agent.tokenizer.encode, world[2].agent.tokenizer.decode

    @app.post("/inference/v1/generate")
    def generate(body: dict):
        ids = encode(TURNS[decode(body["token_ids"]).count("<|im_start|>assistant") - 1] + END)
        logprobs = {"content": [{"token": f"token_id:{token}", "logprob": -1.0} for token in ids]}
        return {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}]}

    names = ("questions", "retriever", "tokenizer")
    taskset = dict(zip(names, world[1], strict=True)) | {"id": "sleuth-search", "rewards": {"f1": 0.5}}
    env = vf.load_environment(vf.resolve_env_config({"taskset": taskset}))

    async def play(url):
        to = {"base_url": f"{url}/v1", "api_key_var": "NO_KEY"}
        client = vf.EvalClientConfig(**to)
        if carries_ids:
            renderer = {"renderer": {"name": "qwen3"}, "renderer_model_name": world[1][2]}
            client = vf.TrainClientConfig(**to, **renderer)
        async with env.serving():
            [task] = env.taskset
            [slot] = env.slots(task)
            return await env.run_slot(slot, vf.ModelContext(model="m", client=client))

    with serving(app) as url:
        episode = asyncio.run(play(url))
    assert episode.ok, episode.errors
    [trace] = episode.traces
    said = [m.content for m in trace.branches[-1].messages if m.role == "user"]
    assert "What is it?" in said[0]
    [branch], ids = trace.branches, None
    if carries_ids:
        ids = branch.token_ids[branch.sampled_mask.index(True) : -len(encode(TURNS[-1] + END))]
    return Seen(said[1:], trace.metrics["searches"], trace.rewards["sleuth"].value, ids)


def through_trl_tools(world, tmp_path):
    """A training step of GRPOTrainer with environment_factory; the answer is a call, too."""
    from examples.trl.tool_environment import make_factory

    folder, _, episodes = world
    encode = episodes.agent.tokenizer.encode
    answer = TURNS[-1].split("<answer>")[0] + '<tool_call>{"name": "answer", "arguments": {"answer": "blue"}}'
    turns = [*(turn + END for turn in TURNS[:-1]), f"{answer}</tool_call>{END}", f"Done.{END}"]

    class Scripted(GRPOTrainer):
        calls = 0

        def _generate_single_turn(self, prompt_ids, *_, **__):
            self.calls += 1
            return [encode(turns[self.calls - 1])] * len(prompt_ids), None

        def _generate(self, prompts):
            made = super()._generate(prompts)
            self.seen = made[1], made[2], [e._episode for e in self.environments]
            return made

    factory, dataset = make_factory(episodes)
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 1, "report_to": []}
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_completion_length=4000, save_strategy="no", **settings
    )
    trainer = Scripted(str(folder / "policy"), args=args, train_dataset=dataset, environment_factory=factory)
    trainer.train()
    [ids, twin], [mask, _], [episode, _] = trainer.seen
    assert ids == twin and sum(mask) == sum(len(encode(turn)) for turn in turns)
    said = [s.text.split("user\n", 1)[1].split(END)[0] for s in episode.ledger.segments[2::2]]
    reward = trainer.state.log_history[0]["rewards/ToolEnvironment/mean"]
    tail = len(
        encode(f"{turns[2]}\n<|im_start|>user\n<tool_response>\nThe question is over.\n</tool_response>")
    )
    tail += len(encode(f"{END}\n<|im_start|>assistant\n{turns[3]}"))
    return Seen(said, len(episode.trajectory.searches), reward, ids[:-tail])


def test_openenv_conforms(world, ours):
    assert through_openenv(world) == ours


@pytest.mark.parametrize(
    "carries_ids", [pytest.param(False, marks=pytest.mark.slow), True], ids=["messages", "tokens"]
)
def test_verifiers_conforms(world, ours, monkeypatch, carries_ids):
    expected = ours if carries_ids else replace(ours, ids=None)
    assert through_verifiers(world, monkeypatch, carries_ids) == expected


def test_trl_tools_conform(world, ours, tmp_path):
    assert through_trl_tools(world, tmp_path) == ours
