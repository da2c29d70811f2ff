"""Weights that go to an engine in another process: the same run as here, or a stop with the numbers."""

import asyncio
import copy
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from agent.engines.base import Sampling
from agent.engines.config import EngineConfig
from agent.engines.vllm import VLLMEngine
from agent.policy import load_policy
from data.checkpoint import latest_checkpoint
from data.errors import EngineError, RunStopped
from data.run_dir import read_metrics
from data.settings import LoraConfig
from retriever_server.client.pool import Server
from retriever_server.client.search_client import SearchClient
from rl.learner.learner import Learner
from rl.learner.workers import Workers
from rl.weight_sync import WeightSync
from scripts import __main__ as sleuth
from scripts.train import train
from scripts.wiring import open_client
from tests.fake_vllm import FakeVLLM
from tests.retriever_server.running import serving
from tests.samples import quick
from tests.toy import toy_config


@pytest.fixture
def vllm(toy):
    """A fake server of the toy policy, with its URL as `url`."""
    policy = load_policy(str(toy / "policy"), "cpu")
    fake = FakeVLLM(copy.deepcopy(policy.model), policy.tokenizer)
    with serving(fake.app) as fake.url:
        yield fake


def over(vllm, toy, out, **changes):
    engine = EngineConfig(name="vllm", urls=vllm.url, deadline_seconds=30)
    config = toy_config(toy, out, steps=3, save_every=1, deterministic=False)
    return replace(config, engine=engine, **changes)


def curve(out):
    names = ("reward/mean", "policy/entropy", "policy/grad_norm", "rollout/searches")
    return [[row[name] for name in names] for row in read_metrics(out)]


@pytest.mark.parametrize(
    ("lora", "handed"),
    quick(
        [(LoraConfig(rank=2), "adapter")],
        [(LoraConfig(), "merged"), (LoraConfig(rank=2), "merged"), (LoraConfig(rank=2), "adapter")],
    ),
    ids=["full", "lora-merged", "lora-adapter"],
)
def test_a_run_over_http_is_the_run_in_process(vllm, toy, tmp_path, lora, handed):
    config = over(vllm, toy, tmp_path / "http", lora=lora, keep_rollouts_every=3)
    train(replace(config, engine=replace(config.engine, lora=handed)))
    assert vllm.calls.count("sleuth_adapter") == (3 if handed == "adapter" else 0)
    train(toy_config(toy, tmp_path / "here", steps=3, deterministic=False, lora=lora))
    for row, other in zip(curve(tmp_path / "http"), curve(tmp_path / "here"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    rows = read_metrics(tmp_path / "http")
    assert all(row["sync/probe_largest_difference"] < 1e-4 for row in rows)
    assert vllm.version == "3" and rows[-1]["policy/sampler_difference"] < 1e-4
    [kept] = (tmp_path / "http" / "rollouts").iterdir()
    assert '"weights_version": 2' in kept.read_text() and '"weights_version": 1' not in kept.read_text()


def stale(vllm, toy, out, **changes):
    """An asynchronous run over the server."""
    config = over(vllm, toy, out, **changes)
    rollout = replace(config.rollout, max_staleness=1)
    return replace(config, rollout=rollout, algorithm=replace(config.algorithm, importance="token"))


@pytest.mark.slow
def test_rollouts_over_http_go_on_during_updates(vllm, toy, tmp_path, monkeypatch):
    """The first search waits for an update, which waits for what the policy writes after it."""
    learn, begun = Learner.learn, []

    def long(self, collected, step):
        begun.append(step)
        asked, deadline = len(vllm.requests), time.monotonic() + 20
        while step == 0 and len(vllm.requests) == asked:
            assert time.monotonic() < deadline, "rollouts stand still during the update"
            time.sleep(0.01)
        return learn(self, collected, step)

    class Straggling(SearchClient):
        def __init__(self):
            self.inner, self.waited = open_client(str(toy / "index")), False

        async def search(self, query, k):
            first, self.waited = not self.waited, True
            while first and not begun:
                await asyncio.sleep(0.01)
            return await self.inner.search(query, k)

        def query_style(self):
            return self.inner.query_style()

        async def close(self):
            await self.inner.close()

    monkeypatch.setattr(Learner, "learn", long)
    train(stale(vllm, toy, tmp_path), Straggling())
    rows = read_metrics(tmp_path)
    assert begun == [0, 1, 2] and [row["step"] for row in rows] == [1, 2, 3]
    assert 0 < max(row["rollout/staleness"] for row in rows) <= 1
    assert all(row["sync/probe_largest_difference"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_an_update_that_is_interrupted_is_whole_in_what_is_saved(vllm, toy, tmp_path, monkeypatch):
    learn = Learner.learn

    def interrupted(self, collected, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return learn(self, collected, step)

    monkeypatch.setattr(Learner, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stale(vllm, toy, tmp_path))
    assert latest_checkpoint(tmp_path / "checkpoints").step == 2
    monkeypatch.setattr(Learner, "learn", learn)
    train(stale(vllm, toy, tmp_path))
    assert [row["step"] for row in read_metrics(tmp_path)][-1] == 3


@pytest.mark.slow
def test_a_head_left_behind_stops_the_run_with_the_numbers_and_its_state(vllm, toy, tmp_path):
    vllm.stale_head = True
    said = r"policy's weights after step 1: .* differ by [\d.e-]+ nats on average.*allowed on average: 0.001"
    with pytest.raises(RunStopped, match=said + ".*start the same command again"):
        train(over(vllm, toy, tmp_path))
    assert latest_checkpoint(tmp_path / "checkpoints").step == 1
    vllm.stale_head = False
    train(over(vllm, toy, tmp_path))
    assert vllm.version == "3"


@pytest.mark.slow
def test_servers_that_die_stop_the_run_with_its_state(vllm, toy, tmp_path):
    def dies(step):
        vllm.dead = step == 2

    with pytest.raises(RunStopped, match=r"none of 1 servers is left: .*the state before this step is saved"):
        train(over(vllm, toy, tmp_path), on_step=dies)
    assert latest_checkpoint(tmp_path / "checkpoints").step == 2


@pytest.mark.slow
def test_a_server_of_another_policy_is_not_evaluated(vllm, toy, tmp_path, capsys):
    with torch.no_grad():
        vllm.engine.model.get_output_embeddings().weight.mul_(0.9)
    options = {
        "--policy": toy / "policy",
        "--questions": toy / "dev.jsonl",
        "--retriever": toy / "index",
        "--out": tmp_path / "out",
        "--engine.name": "vllm",
        "--engine.urls": vllm.url,
    }
    argv = ["evaluate", *(str(word) for pair in options.items() for word in pair)]
    assert sleuth.main(argv) == 2
    assert "does not have the policy's weights at the start" in capsys.readouterr().err
    with torch.no_grad():
        vllm.engine.model.get_output_embeddings().weight.div_(0.9)
    assert sleuth.main(argv) == 0
    assert sleuth.main(["ask", "Who?", *argv[1:3], *argv[5:7], *argv[9:]]) == 3  # it has no answer


def test_what_cannot_be_done_over_http_is_refused(vllm, toy, tmp_path, monkeypatch):
    config = over(vllm, toy, tmp_path)
    with pytest.raises(ValueError, match="deterministic = True: must be false with engine vllm"):
        replace(config, deterministic=True)
    with pytest.raises(ValueError, match=r"engine.lora = 'adapter': must be merged where lora.rank is 0"):
        replace(config, engine=replace(config.engine, lora="adapter"))
    with pytest.raises(ValueError, match=r"engine.urls = 'http.*: must be none for engine hf"):
        EngineConfig(urls=vllm.url)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"engine.urls = None: must be given where several processes"):
        train(replace(config, engine=EngineConfig(name="vllm")))


def test_a_failure_of_the_leader_is_raised_by_all():
    class Follower(Workers):
        def gather(self, value):
            return [({}, "engine vllm: none is left"), value]

    class Learner:
        def weights_for_engine(self):
            return None

    engine = VLLMEngine([Server("http://127.0.0.1:9")])
    sync = WeightSync(engine, Learner(), EngineConfig(), Follower(1, 2), [], Sampling())
    with pytest.raises(EngineError, match="none is left"):
        asyncio.run(sync.update(5))
    assert engine.weights_version == 5
