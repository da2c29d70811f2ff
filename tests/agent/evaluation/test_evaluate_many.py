"""Evaluations of many questions: bounded memory, and nothing asked twice, whatever was killed."""

import asyncio
import gc
import json
import sys
import weakref
from pathlib import Path

import pytest

from agent.evaluation.evaluate import roll_out_each
from agent.policy import Policy
from agent.protocol import COMPACT
from agent.rollout import Agent
from data.errors import DataError
from data.jsonl import write_jsonl
from data.records import Question
from scripts.bench.killed import differing, measure, start
from tests.fakes import DictSearcher, byte_tokenizer, tiny_model
from tests.retriever_server.running import build_small_index
from tests.scripted import ScriptedEngine

QUESTIONS = [Question(f"q{i}", f"What is {i}?", ("red",)) for i in range(6)]


class Remembering(ScriptedEngine):
    """Answers at once; remembers what it drew from for each question, and how many were alive."""

    def __init__(self):
        super().__init__(byte_tokenizer(), ["<think> a </think><answer> red</answer>"])
        self.seeds, self.alive, self.most = {}, 0, 0

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()):
        self.seeds[trajectory_id.split("/")[0]] = sampling.seed
        self.alive += 1
        self.most = max(self.most, self.alive)
        await asyncio.sleep(0)
        return await super().generate(prompt_ids, sampling, trajectory_id)

    async def release(self, trajectory_id):
        self.alive -= 1


def roll_out(questions, on_finished=lambda trajectory: None):
    engine = Remembering()
    agent = Agent(engine, engine.tokenizer, DictSearcher({}), COMPACT, max_live=3)
    asyncio.run(roll_out_each(agent, questions, 7, on_finished))
    return engine


def test_what_a_question_draws_does_not_depend_on_which_others_are_asked():
    whole, rest = roll_out(QUESTIONS), roll_out(QUESTIONS[4:])
    assert rest.seeds == {id_: whole.seeds[id_] for id_ in ("q4", "q5")}
    assert len(set(whole.seeds.values())) == 6


def test_few_are_alive_at_once_and_none_is_kept():
    finished, kept = [], []

    def on_finished(trajectory):
        finished.append(trajectory.question.id)
        kept.append(weakref.ref(trajectory))
        gc.collect()
        assert sum(each() is not None for each in kept) <= 3

    assert roll_out(QUESTIONS, on_finished).most == 3
    assert sorted(finished) == [q.id for q in QUESTIONS]


def test_the_first_failure_ends_all_and_is_raised_as_it_is():
    def fail(trajectory):
        raise DataError("no")

    with pytest.raises(DataError, match=r"^no$"):
        roll_out(QUESTIONS, fail)


SCRIPT = """
import sys
import agent.engines.hf
from tests.scripted import ScriptedEngine
from scripts import __main__ as sleuth

class Forgetful(ScriptedEngine):
    async def release(self, trajectory_id):
        self._turns.pop(trajectory_id)
        self.prompts.clear()

TURNS = ["<think> a </think><search> fox</search>", "<think> b </think><answer> red</answer>"]
agent.engines.hf.HFEngine = lambda model, tokenizer, rows, **_: Forgetful(tokenizer, TURNS)
sys.exit(sleuth.main(["evaluate", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_twenty_thousand_questions_killed_twice_are_each_recorded_once_in_bounded_memory(tmp_path):
    tokenizer = byte_tokenizer()
    Policy(tiny_model("qwen2", len(tokenizer)), tokenizer).save(tmp_path / "policy", "compact")
    build_small_index(tmp_path)
    rows = ({"id": f"q{i}", "question": f"fox {i}?", "golden_answers": ["red"]} for i in range(20_000))
    write_jsonl(tmp_path / "questions.jsonl", rows)
    out = tmp_path / "out"
    given = {"policy": "policy", "questions": "questions.jsonl", "retriever": "index", "out": "out"}
    options = [word for key, name in given.items() for word in (f"--{key}", str(tmp_path / name))]
    command = [sys.executable, "-c", SCRIPT, *options]
    for stop in (6000, 12_000):
        start(command, out, stop)
    kept = (out / "trajectories.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()[:12_000]
    *_, first, _, most = start(command, out, None)
    lines = (out / "trajectories.jsonl").read_bytes().splitlines()
    assert lines[:12_000] == kept
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) == 20_000
    assert json.loads((out / "scores.json").read_text())["em"]["mean"] == 1.0
    assert float(most) - float(first) < 100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_a_policy_over_http_killed_twice_leaves_the_records_of_one_that_was_left_alone(tmp_path):
    rows = measure(tmp_path, questions=300, kills=2, policy="atlas")
    assert [row[:2] for row in rows] == [
        ("whole", "itself"),
        *[("parts", "kill -9")] * 2,
        ("parts", "itself"),
    ]
    assert 0 < int(rows[1][2]) < int(rows[2][2]) < 300 == int(rows[3][2])
    assert differing(tmp_path / "whole", tmp_path / "parts") == []
    path = tmp_path / "parts" / "trajectories.jsonl"
    path.write_text(path.read_text().replace('"stop_reason": "answered"', '"stop_reason": "lost"', 1))
    assert len(differing(tmp_path / "whole", tmp_path / "parts")) == 1
