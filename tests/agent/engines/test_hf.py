"""The hf engine against plain forwards: its cache, its rows and its sampling change no number."""

import asyncio
from typing import Any

import pytest
import torch

from agent.engines.base import FinishReason, Sampling
from agent.engines.hf import HFEngine
from agent.engines.sampling import draw
from data.errors import ConfigError, EngineError
from tests.fakes import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


def plain_logprobs(model, token_ids):
    """Log-prob of each token from the second on, by one forward pass without any cache."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


async def two_turns(engine, name, first, observation, sampling):
    """A trajectory of two turns; returns its ids and where each turn's tokens lie."""
    one = await engine.generate(first, sampling, name)
    ids = first + one.token_ids + observation
    await asyncio.sleep(0)
    two = await engine.generate(ids, sampling, name)
    await engine.release(name)
    spans = [(len(first), one), (len(ids), two)]
    return ids + two.token_ids, spans


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3"])
def test_logprobs_equal_a_plain_forward_over_turns_and_rows(kind):
    model = tiny_model(kind, len(TOKENIZER))
    engine = HFEngine(model, TOKENIZER, max_rows=3)  # 7 trajectories: rows are reused and moved

    async def run():
        jobs = [
            two_turns(
                engine,
                f"t{i}",
                list(range(5 + 3 * i, 25 + 9 * i)),
                list(range(40, 47 + 11 * i)),
                Sampling(max_tokens=4 + 3 * (i % 3), seed=i),
            )
            for i in range(7)
        ]
        return await asyncio.gather(*jobs)

    for ids, spans in asyncio.run(run()):
        expected = plain_logprobs(model, ids)
        for start, completion in spans:
            end = start + len(completion.token_ids)
            assert ids[start:end] == completion.token_ids
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected[start - 1 : end - 1], atol=1e-4, rtol=0
            )


def test_what_a_trajectory_samples_does_not_depend_on_its_batch():
    model = tiny_model("qwen2", len(TOKENIZER))

    def sample(names, rows):
        engine = HFEngine(model, TOKENIZER, max_rows=rows)

        async def run():
            jobs = [
                engine.generate(list(range(10, 20 + n)), Sampling(max_tokens=12, seed=n), str(n))
                for n in names
            ]
            return [c.token_ids for c in await asyncio.gather(*jobs)]

        return dict(zip(names, asyncio.run(run()), strict=True))

    together, alone = sample(range(6), 6), sample([4], 1)
    assert together[4] == alone[4]


def test_a_second_turn_feeds_only_what_is_new():
    model = tiny_model("qwen2", len(TOKENIZER))
    engine = HFEngine(model, TOKENIZER)
    fed = []
    forward = model.forward

    def spy(input_ids, **kwargs):
        fed.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    model.forward = spy
    asyncio.run(two_turns(engine, "t", list(range(50)), list(range(9)), Sampling(max_tokens=3, seed=0)))
    assert fed == [50, 1, 1, 1 + 9, 1, 1]  # the last token of the first turn, then the observation


def test_a_prompt_that_a_group_shares_is_fed_once_and_changes_no_number():
    model, fed = tiny_model("qwen3", len(TOKENIZER)), []
    model.register_forward_pre_hook(lambda m, a, kw: fed.append(kw["input_ids"].shape), with_kwargs=True)
    prompts = [list(range(5, 45)), list(range(60, 75))]
    jobs = [(f"t{i}", prompts[i % 2], list(range(40, 50)), Sampling(max_tokens=6, seed=i)) for i in range(8)]

    async def all_of(jobs):
        engine = HFEngine(model, TOKENIZER, max_rows=8)
        return await asyncio.gather(*(two_turns(engine, *job) for job in jobs))

    together = asyncio.run(all_of(jobs))
    assert fed[0] == (2, 40)
    for job, (ids, spans) in zip(jobs, together, strict=True):
        [(alone, spans_alone)] = asyncio.run(all_of([job]))
        assert ids == alone
        for (_, one), (_, other) in zip(spans, spans_alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({tuple(ids) for ids, _ in together[::2]}) == 4


def test_instructions_that_all_prompts_begin_with_are_fed_once_and_change_no_number():
    model, fed = tiny_model("gemma3", len(TOKENIZER)), []
    spy = lambda m, a, kw: fed.append(tuple(kw["input_ids"].shape))  # noqa: E731
    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    instructions, sampling = list(range(5, 65)), [Sampling(max_tokens=5, seed=i) for i in range(5)]
    prompts = [instructions + list(range(100 + 10 * i, 106 + 10 * i)) for i in (0, 1, 1, 2)]
    prompts.append(list(range(200, 240)))  # begins otherwise

    async def run():
        engine = HFEngine(model, TOKENIZER, max_rows=8)
        return await asyncio.gather(
            *(engine.generate(ids, each, str(each.seed)) for ids, each in zip(prompts, sampling, strict=True))
        )

    together = asyncio.run(run())
    hook.remove()
    assert [shape for shape in fed if shape[1] > 1] == [(2, 66), (2, 6)]
    for ids, completion in zip(prompts, together, strict=True):
        expected = plain_logprobs(model, ids + completion.token_ids)[len(ids) - 1 :]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_cache_holds_no_more_rows_than_were_needed():
    engine = HFEngine(tiny_model("qwen2", len(TOKENIZER)), TOKENIZER, max_rows=5000)
    sampling = Sampling(max_tokens=3)

    async def run(count):
        await asyncio.gather(*(two_turns(engine, str(i), [1, 2], [3], sampling) for i in range(count)))
        return engine._cache.storage.shape[2]

    assert [asyncio.run(run(count)) for count in (3, 2, 4)] == [3, 3, 6]


def test_greedy_equals_generate():
    model = tiny_model("llama", len(TOKENIZER))
    prompt = list(range(30, 60))
    completion = asyncio.run(
        HFEngine(model, TOKENIZER).generate(prompt, Sampling(temperature=0, max_tokens=20), "t")
    )
    generate: Any = model.generate
    theirs = generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
    assert completion.token_ids == theirs[0, len(prompt) :].tolist()
    assert completion.finish_reason is FinishReason.LENGTH


def test_stops_at_a_tag_inside_a_merged_token_and_keeps_the_sampled_id():
    tokenizer = byte_tokenizer(merges=("> .", "c h"))
    model = tiny_model("qwen2", len(tokenizer))
    text = "<search>x</search>. more"
    script = tokenizer.encode(text)
    forced = iter(script)
    model.forward = _forcing(model.forward, lambda: next(forced))
    sampling = Sampling(temperature=0, max_tokens=40, stop=("</search>", "</answer>"))
    completion = asyncio.run(HFEngine(model, tokenizer).generate([1, 2], sampling, "t"))
    assert completion.finish_reason is FinishReason.STOP
    assert tokenizer.decode(completion.token_ids) == "<search>x</search>."  # the overhang stays
    assert completion.token_ids == script[: len(completion.token_ids)]


def _forcing(forward, next_token):
    def forced(**kwargs):
        output = forward(**kwargs)
        output.logits[:, -1, next_token()] = 1e4
        return output

    return forced


def test_a_watched_completion_is_told_as_it_grows():
    engine, told = HFEngine(tiny_model("qwen2", len(TOKENIZER)), TOKENIZER), []
    engine.watch("a", lambda ids: told.append(list(ids)))

    async def run():
        done = await engine.generate([5, 6], Sampling(max_tokens=4, seed=1), "a")
        await engine.generate([5, 6], Sampling(max_tokens=4, seed=1), "b")
        await engine.release("a")
        await engine.generate([5, 6], Sampling(max_tokens=4, seed=1), "a")
        return done

    done = asyncio.run(run())
    assert told == [done.token_ids[: n + 1] for n in range(len(done.token_ids))]


def test_end_of_sequence_ends_a_completion():
    model = tiny_model("qwen2", len(TOKENIZER))
    model.forward = _forcing(model.forward, lambda: TOKENIZER.eos_token_id)
    completion = asyncio.run(HFEngine(model, TOKENIZER).generate([5], Sampling(), "t"))
    assert completion.token_ids == [TOKENIZER.eos_token_id]
    assert completion.finish_reason is FinishReason.STOP


def test_new_weights_forget_the_cache():
    model = tiny_model("qwen2", len(TOKENIZER))
    engine = HFEngine(model, TOKENIZER)

    async def run():
        first = await engine.generate([1, 2, 3], Sampling(max_tokens=3), "t")
        other = tiny_model("qwen2", len(TOKENIZER), seed=1)
        await engine.update_weights(other.state_dict(), version=7)
        ids = [1, 2, 3, *first.token_ids]
        return ids, await engine.generate(ids, Sampling(max_tokens=3), "t")

    ids, second = asyncio.run(run())
    assert second.weights_version == 7
    expected = plain_logprobs(model, ids + second.token_ids)[len(ids) - 1 :]
    torch.testing.assert_close(torch.tensor(second.logprobs), expected, atol=1e-4, rtol=0)


def test_a_cancelled_waiter_does_not_stop_the_others():
    engine = HFEngine(tiny_model("qwen2", len(TOKENIZER)), TOKENIZER, max_rows=1)

    async def run():
        tasks = [
            asyncio.create_task(engine.generate([n + 1], Sampling(max_tokens=30), str(n))) for n in range(3)
        ]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        await engine.release("0")
        return await tasks[2]

    assert asyncio.run(run()).token_ids


def test_a_model_that_fails_is_an_engine_error_for_every_waiter():
    model = tiny_model("qwen2", len(TOKENIZER))

    def broken(**kwargs):
        raise RuntimeError("out of memory")

    model.forward = broken

    async def run():
        jobs = [HFEngine(model, TOKENIZER).generate([1], Sampling(), str(n)) for n in range(2)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, EngineError) and "out of memory" in str(result)


def test_draw_follows_the_distribution_and_its_truncation():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    uniforms = [(i + 0.5) / 4000 for i in range(4000)]
    for sampling, allowed in ((Sampling(), 4), (Sampling(top_k=2), 2), (Sampling(top_p=0.7), 2)):
        tokens, logprobs = draw(logits, [sampling] * 4000, uniforms)
        kept = torch.softmax(logits[0], -1)[:allowed]
        share = torch.bincount(torch.tensor(tokens), minlength=4)[:allowed] / 4000
        torch.testing.assert_close(share, kept / kept.sum(), atol=1e-3, rtol=0)
        assert logprobs[0] == pytest.approx(torch.log_softmax(logits[0], -1)[tokens[0]].item())


def test_draw_renormalises_log_probs_of_the_rows_that_ask():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    samplings = [Sampling(top_k=2, renormalise=True), Sampling(top_k=2), Sampling(renormalise=True)]
    tokens, logprobs = draw(logits, samplings, [0.1] * 3)
    assert tokens == [0, 0, 0]
    within, whole = torch.log_softmax(logits[0, :2], -1)[0], torch.log_softmax(logits[0], -1)[0]
    assert logprobs == pytest.approx([within.item(), whole.item(), whole.item()])


def test_draw_mixes_greedy_and_sampled_rows():
    logits = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    tokens, _ = draw(logits, [Sampling(temperature=0), Sampling()], [0.0, 0.9999])
    assert tokens == [1, 1]


def test_sampling_refuses_what_it_cannot_mean():
    with pytest.raises(ConfigError, match=r"sampling.top_p = 0: must be in \(0, 1\]"):
        Sampling(top_p=0).check()


def test_new_weights_in_mid_completion_go_on_where_the_old_ones_were():
    model = tiny_model("qwen2", len(TOKENIZER))
    other = tiny_model("qwen2", len(TOKENIZER), seed=1).state_dict()
    engine = HFEngine(model, TOKENIZER, max_rows=2)
    prompts, written = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], {}

    async def run():
        jobs = [
            asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=20 + n, seed=n), str(n)))
            for n, prompt in enumerate(prompts)
        ]
        while max(written.values(), default=0) < 7:
            await asyncio.sleep(0)
            written.update((r.trajectory_id, len(r.new_ids)) for r in engine._writing.values())
        await engine.update_weights(other, version=5)
        done = await asyncio.gather(*jobs[:2])
        await engine.release("0")
        return [*done, await jobs[2]]

    before = tiny_model("qwen2", len(TOKENIZER))
    done = asyncio.run(run())
    assert [each.weights_version for each in done] == [0, 0, 5]  # the third had no row yet
    for n, each in enumerate(done):
        assert len(each.token_ids) == 20 + n
        ids, start = prompts[n] + each.token_ids, len(prompts[n]) - 1
        old, new = plain_logprobs(before, ids)[start:], plain_logprobs(model, ids)[start:]
        cut = written.get(str(n), 0)
        expected = torch.cat([old[:cut], new[cut:]])
        torch.testing.assert_close(torch.tensor(each.logprobs), expected, atol=1e-4, rtol=0)
