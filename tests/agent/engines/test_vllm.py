"""The vllm engine against servers that speak vLLM's wire: load, deaths, restarts, seeds, stops, weights."""

import asyncio
import copy
from contextlib import ExitStack

import pytest
import torch

from agent.engines.base import FinishReason, Sampling
from agent.engines.hf import HFEngine
from agent.engines.transport import FolderTransport
from agent.engines.vllm import VLLMEngine
from agent.engines.vllm_process import server_command, start_servers
from agent.trajectory import Picture
from data.errors import ConfigError, EngineError
from retriever_server.client import pool
from retriever_server.client.pool import servers_at
from tests.fake_vllm import FakeVLLM
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import serving

TOKENIZER = byte_tokenizer(merges=("e r",))
PROMPTS = [list(range(10, 20 + n)) for n in range(6)]


def llama():
    return tiny_model("llama", len(TOKENIZER))


def running(count, act, folder=None, model=None, transport=None, **faults):
    """Return what `act(engine, fakes)` gives for an engine over so many fake servers."""
    model = model or llama()
    fakes = [FakeVLLM(copy.deepcopy(model), TOKENIZER) for _ in range(count)]
    for name, value in faults.items():
        setattr(fakes[0], name, value)

    def write(target, state):
        model.save_pretrained(target, state_dict=state)

    transport = transport or (FolderTransport(write, folder) if folder else None)

    async def run(urls):
        engine = VLLMEngine(servers_at(urls, "urls"), [7], transport, deadline_seconds=20)
        try:
            return await act(engine, fakes)
        finally:
            await engine.close()

    with ExitStack() as stack:
        urls = [stack.enter_context(serving(fake.app)) for fake in fakes]
        return asyncio.run(run(urls))


async def complete(engine, **sampling):
    """The completions of all prompts at once, each with a seed of its own."""
    jobs = [
        engine.generate(prompt, Sampling(max_tokens=12, seed=n, **sampling), str(n))
        for n, prompt in enumerate(PROMPTS)
    ]
    return await asyncio.gather(*jobs)


def test_ids_logprobs_and_seeds_are_those_of_the_hf_engine():
    over_http = running(2, lambda engine, _: complete(engine))
    here = asyncio.run(complete(HFEngine(llama(), TOKENIZER)))
    assert [c.token_ids for c in over_http] == [c.token_ids for c in here]
    for one, other in zip(over_http, here, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_stop_string_is_looked_for_by_the_server_and_its_ids_are_kept():
    async def act(engine, fakes):
        ids = (await complete(engine))[0].token_ids
        stop = next(char for char in map(str, map(TOKENIZER.decode, ids)) if char.isascii())
        done = await engine.generate(PROMPTS[0], Sampling(max_tokens=12, seed=0, stop=(stop,)), "s")
        return ids, stop, done, fakes[0].requests[-1]["sampling_params"]

    ids, stop, done, asked = running(1, act)
    assert done.finish_reason is FinishReason.STOP and TOKENIZER.decode(done.token_ids[-1:]) == stop
    assert done.token_ids == ids[: len(done.token_ids)] and len(done.token_ids) < len(ids)
    assert asked["include_stop_str_in_output"] and not asked["skip_special_tokens"]
    assert asked["stop_token_ids"] == [7] and len(done.logprobs) == len(done.token_ids)


def test_trajectories_go_where_the_fewest_are_and_stay_there():
    async def act(engine, fakes):
        for name in "abcd":
            await engine.generate(PROMPTS[0], Sampling(max_tokens=1), name)
        counts = [len(fake.requests) for fake in fakes]
        for _ in range(3):
            await engine.generate(PROMPTS[0], Sampling(max_tokens=1), "a")
        stayed = sorted(len(fake.requests) for fake in fakes)
        await engine.release("a")
        await engine.release("c")  # both were where "e" now has more room
        await engine.generate(PROMPTS[0], Sampling(max_tokens=1), "e")
        return counts, stayed, sorted(s.load for s in engine.pool.servers)

    assert running(2, act) == ([2, 2], [2, 5], [1, 2])


def test_what_a_dead_server_was_asked_is_asked_elsewhere_with_its_seed(monkeypatch):
    monkeypatch.setattr(pool, "HEALTH_EVERY_SECONDS", 0.05)

    async def act(engine, fakes):
        expected = await complete(engine)
        for n in range(len(PROMPTS)):
            await engine.release(str(n))
        fakes[0].hangs = True  # what it was asked waits; only the health check says that it is dead
        asked = asyncio.ensure_future(complete(engine))
        await asyncio.sleep(0.1)
        fakes[0].dead = True
        restarted = await asked
        fakes[0].hangs = fakes[0].dead = False
        while len(engine.pool.live) < 2:
            await asyncio.sleep(0.02)
        return expected, restarted

    expected, restarted = running(2, act)
    assert [c.token_ids for c in restarted] == [c.token_ids for c in expected]


def test_with_no_server_left_one_line_says_what_happened_to_each():
    async def act(engine, fakes):
        await engine.start()
        fakes[0].dead = True
        await engine.generate([1, 2], Sampling(), "t")

    with pytest.raises(EngineError, match=r"none of 1 servers is left: http.*answered 503"):
        running(1, act)


def test_a_server_that_is_not_there_is_waited_for_until_the_deadline():
    engine = VLLMEngine(servers_at(["http://127.0.0.1:9"], "urls"), deadline_seconds=0.3)
    with pytest.raises(EngineError, match=r"there after 0.3 s: http://127.0.0.1:9/health: ConnectError"):
        asyncio.run(engine.generate([1], Sampling(), "t"))


def test_a_completion_has_a_deadline():
    async def act(engine, fakes):
        await engine.start()
        engine.deadline_seconds = 0.2
        try:
            await engine.generate([1, 2], Sampling(), "t")
        finally:
            fakes[0].hangs = False

    with pytest.raises(EngineError, match=r"no completion within engine.deadline_seconds = 0.2"):
        running(1, act, hangs=True)


def test_a_full_context_is_a_limit_and_not_an_error():
    async def act(engine, _):
        full = await engine.generate([1] * 256, Sampling(), "full")
        return full, await engine.generate([1] * 250, Sampling(max_tokens=50, seed=1), "nearly")

    full, nearly = running(1, act)
    assert (full.token_ids, full.finish_reason) == ([], FinishReason.LENGTH)
    assert len(nearly.token_ids) <= 6


def test_new_weights_are_loaded_by_all_while_paused_and_named_on_completions(tmp_path):
    model = llama()

    async def act(engine, fakes):
        before = await complete(engine)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        await engine.update_weights(None, 3)
        kept = [path.name for path in tmp_path.iterdir()]
        after, calls = await complete(engine), [list(fake.calls) for fake in fakes]
        await engine.update_weights(None, 4)
        return before, after, calls, kept, [path.name for path in tmp_path.iterdir()]

    before, after, calls, kept, later = running(2, act, tmp_path, model)
    here = asyncio.run(complete(HFEngine(model, TOKENIZER)))
    assert calls[0] == calls[1] == ["pause keep", "sleuth_reload", "reset True", "resume"]
    assert {c.weights_version for c in before} == {0} and {c.weights_version for c in after} == {3}
    assert [c.token_ids for c in after] == [c.token_ids for c in here] != [c.token_ids for c in before]
    assert kept == ["weights-000003"] and later == ["weights-000004"]


def test_what_begins_with_the_older_weights_while_new_ones_are_on_their_way_costs_no_server(tmp_path):
    async def act(engine, fakes):
        load, early = engine._load, []

        async def late(server):
            early.append(asyncio.ensure_future(complete(engine)))
            await asyncio.sleep(0.3)
            await load(server)

        engine._load = late
        await engine.update_weights(None, 1)
        return await early[0], len(engine.pool.live), await complete(engine)

    early, live, after = running(1, act, tmp_path)
    assert live == 1 and {c.weights_version for c in early} == {0}
    assert {c.weights_version for c in after} == {1}


def test_a_server_that_was_started_without_our_worker_reloads_by_its_own(tmp_path):
    async def act(engine, fakes):
        await engine.update_weights(None, 1)
        return fakes[0].calls, fakes[0].version

    calls, version = running(1, act, tmp_path, worker=False)
    assert calls[1:3] == ["sleuth_reload", "reload_weights"] and version == "1"


def test_a_server_that_was_restarted_with_its_first_weights_is_given_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "HEALTH_EVERY_SECONDS", 0.05)

    async def act(engine, fakes):
        await engine.update_weights(None, 2)
        fakes[0].version = "default"  # nobody saw it go
        completions = await complete(engine)
        while len(engine.pool.live) < 2:
            await asyncio.sleep(0.02)
        return [c.weights_version for c in completions], fakes[0].version

    versions, caught_up = running(2, act, tmp_path)
    assert set(versions) == {2} and caught_up == "2"


def test_what_it_cannot_do_is_said_in_one_line(tmp_path):
    engine = VLLMEngine(servers_at(["http://127.0.0.1:9"], "urls"))
    with pytest.raises(EngineError, match="not shown pictures"):
        asyncio.run(engine.generate([1], Sampling(), "t", [Picture("a.png", 0, 1)]))
    with pytest.raises(EngineError, match="empty prompt"):
        asyncio.run(engine.generate([], Sampling(), "t"))
    with pytest.raises(EngineError, match="without a transport"):
        asyncio.run(engine.update_weights(None, 1))
    with pytest.raises(ConfigError, match="must be like http"):
        servers_at(["127.0.0.1:8000"], "engine.urls")
    with pytest.raises(ConfigError, match=r"engine.python = '/no/python': no such program"):
        server_command("/no/python", "model", "float32")


def test_a_server_that_is_no_vllm_is_refused_by_its_place(monkeypatch):
    engine = VLLMEngine(servers_at(["http://127.0.0.1:9"], "urls"))

    async def nothing(*_):
        return {server: None for server in engine.pool.servers}

    monkeypatch.setattr(engine.pool, "start", nothing)
    monkeypatch.setattr(engine.pool, "on_all", nothing)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9: no vLLM server by /v1/models"):
        asyncio.run(engine.generate([1], Sampling(), "t"))


def test_a_server_that_ends_while_it_starts_is_noticed_with_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: no room'\nexit 1\n")
    python.chmod(0o755)
    started = start_servers(server_command(str(python), "model", "float32"), {}, 1, tmp_path)
    engine = VLLMEngine(started, deadline_seconds=20)
    with pytest.raises(EngineError, match=r"vllm-0: exit status 1: ValueError: no room \(see .*vllm-0.log"):
        asyncio.run(engine.generate([1], Sampling(), "t"))
