"""Questions and rewards of a taskset of verifiers."""

import asyncio
from dataclasses import replace

import pytest

from agent.protocol import COMPACT
from agent.rollout import Agent
from data.errors import ConfigError, DataError
from data.questions import load_questions
from rl.algorithm.rewards import combine
from tests.fakes import DictSearcher, byte_tokenizer
from tests.scripted import ScriptedEngine

TASKSET = """
import verifiers.v1 as vf
__all__ = ["Capitals"]

class Data(vf.TaskData):
    answer: str

class Capital(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def same_length(self, trace) -> float:
        return float(len(trace.last_reply) == len(self.data.answer))

class Capitals(vf.Taskset[Capital, vf.TasksetConfig]):
    def load(self):
        for answer in ("Paris", "Rome"):
            yield Capital(Data(prompt=f"Which city, {answer[0]}?", answer=answer), self.config.task)
"""


def test_a_taskset_gives_questions_and_rewards(tmp_path, monkeypatch):
    pytest.importorskip("verifiers.v1", reason="needs verifiers: examples/verifiers/README.md")
    from examples.verifiers.taskset_questions import main

    (tmp_path / "capital_cities.py").write_text(TASKSET)
    monkeypatch.syspath_prepend(str(tmp_path))
    main({"id": "capital-cities"}, tmp_path / "train.jsonl")
    questions = load_questions(str(tmp_path / "train.jsonl"))
    assert [(q.text, q.gold_answers) for q in questions] == [
        ("Which city, P?", ("Paris",)),
        ("Which city, R?", ("Rome",)),
    ]
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, ["<think>t</think><answer>Lyons</answer>"])
    agent = Agent(engine, tokenizer, DictSearcher({}), COMPACT)
    trajectories = asyncio.run(agent.rollout(questions))
    reward = combine({"examples.verifiers.taskset_questions:taskset_reward": 0.5, "em": 1.0})
    assert [r.total for r in reward(trajectories)] == [1.0, 0.0]
    assert [r.total for r in reward([replace(t, answer=None) for t in trajectories])] == [0.0, 0.0]
    with pytest.raises(DataError, match="task 0 has no 'gold': --answer must be of answer"):
        main({"id": "capital-cities"}, tmp_path / "train.jsonl", answer="gold")
    stray = replace(trajectories[0], question=replace(questions[0], metadata={}))
    with pytest.raises(ConfigError, match="is of no taskset"):
        reward([stray])
