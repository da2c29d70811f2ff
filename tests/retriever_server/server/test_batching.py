"""The batcher: what travels together, who fails alone, who is left out, who is sent away."""

import asyncio
import threading

import pytest

from data.errors import ConfigError, DataError, RetrieverUnavailable
from retriever_server.server.batching import Batcher, Batching, Overloaded, run_isolated


class Recorder:
    """Work that records its batches; while `gate` is shut it waits."""

    def __init__(self) -> None:
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.batches.append(list(items))
        self.entered.set()
        assert self.gate.wait(timeout=20)
        if "bad" in items:
            raise ZeroDivisionError("bad")
        return [item.upper() for item in items]


async def batcher_run(settings: Batching, use):
    batcher = Batcher(settings)
    try:
        return await use(batcher)
    finally:
        await batcher.close()


def test_items_of_different_requests_travel_together_each_different_one_once():
    work = Recorder()

    async def use(batcher):
        return await asyncio.gather(*(batcher.run("k", work, items) for items in (["a", "b"], ["b"], ["c"])))

    answers = asyncio.run(batcher_run(Batching(window_seconds=1, max_batch=4), use))
    assert answers == [["A", "B"], ["B"], ["C"]]
    assert work.batches == [["a", "b", "c"]]


def test_keys_never_mix_and_batches_are_no_larger_than_allowed():
    work = Recorder()

    async def use(batcher):
        asked = [batcher.run(key, work, [f"{key}{i}" for i in range(5)]) for key in ("x", "y")]
        return await asyncio.gather(*asked)

    answers = asyncio.run(batcher_run(Batching(max_batch=2), use))
    assert answers == [[f"{key}{i}".upper() for i in range(5)] for key in ("x", "y")]
    assert all(len(batch) <= 2 and len({item[0] for item in batch}) == 1 for batch in work.batches)
    assert {batch[0][0] for batch in work.batches[:2]} == {"x", "y"}  # a long request holds up nobody


def test_a_large_request_is_worked_on_in_pieces_and_others_are_served_between_them():
    work, many = Recorder(), [f"m{i}" for i in range(2560)]
    work.gate.clear()

    async def use(batcher):
        large = asyncio.create_task(batcher.run("k", work, many))
        await asyncio.to_thread(work.entered.wait, 20)
        assert 0 < batcher.waiting <= 128  # of it
        others = [asyncio.create_task(batcher.run(key, work, [key])) for key in ("k", "other")]
        await asyncio.sleep(0)
        work.gate.set()
        answers = await asyncio.gather(large, *others)
        assert batcher.waiting == 0
        return answers

    large, *others = asyncio.run(batcher_run(Batching(max_batch=64, max_waiting=200), use))
    assert large == [item.upper() for item in many] and others == [["K"], ["OTHER"]]
    served = [i for i, batch in enumerate(work.batches) if {"k", "other"} & {*batch}]
    assert len(work.batches) >= 40 and served[-1] <= 4


def test_a_request_larger_than_the_queue_is_taken_where_nobody_waits():
    work = Recorder()

    async def use(batcher):
        return await batcher.run("k", work, list("abcde"))

    assert asyncio.run(batcher_run(Batching(max_batch=2, max_waiting=2), use)) == list("ABCDE")


def test_of_a_large_request_that_left_nothing_more_is_worked_on():
    work = Recorder()
    work.gate.clear()

    async def use(batcher):
        large = asyncio.create_task(batcher.run("k", work, [f"m{i}" for i in range(1000)]))
        await asyncio.to_thread(work.entered.wait, 20)
        large.cancel()
        last = asyncio.create_task(batcher.run("k", work, ["last"]))
        await asyncio.sleep(0)
        work.gate.set()
        return await last, batcher.waiting

    assert asyncio.run(batcher_run(Batching(max_batch=10), use)) == (["LAST"], 0)
    assert len(work.batches) == 2


def test_only_the_bad_item_fails():
    work = Recorder()
    items = ["a", "b", "bad", "c", "d"]
    outcomes = run_isolated(work, items)
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == ["A", "B", "C", "D"]
    assert isinstance(outcomes[2], ZeroDivisionError)


@pytest.mark.parametrize("error", [RetrieverUnavailable("nobody"), DataError("wrong filter")])
def test_what_smaller_batches_would_not_avoid_is_not_tried_again(error):
    calls = []

    def work(items):
        calls.append(items)
        raise error

    assert run_isolated(work, ["a", "b"]) == [error, error]
    assert calls == [["a", "b"]]


def test_too_few_results_are_an_error_of_every_item():
    outcomes = run_isolated(lambda items: [], ["a", "b"])
    assert [str(outcome) for outcome in outcomes] == ["0 results for 1 items"] * 2


def test_who_is_cancelled_is_taken_out_and_makes_room():
    work = Recorder()
    work.gate.clear()

    async def use(batcher):
        first = asyncio.create_task(batcher.run("k", work, ["a"]))
        await asyncio.to_thread(work.entered.wait, 20)
        leaving = asyncio.create_task(batcher.run("k", work, ["b", "c"]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 queries are waiting; try again in 1 s"):
            await batcher.run("k", work, ["d"])
        leaving.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batcher.waiting == 0
        last = asyncio.create_task(batcher.run("k", work, ["d"]))
        await asyncio.sleep(0)
        work.gate.set()
        return await first, await last

    assert asyncio.run(batcher_run(Batching(max_waiting=2), use)) == (["A"], ["D"])
    assert work.batches == [["a"], ["d"]]


def test_who_waits_when_it_closes_is_told():
    work = Recorder()
    work.gate.clear()

    async def use():
        batcher = Batcher(Batching())
        asked = [asyncio.create_task(batcher.run("k", work, ["a"]))]
        await asyncio.to_thread(work.entered.wait, 20)
        asked.append(asyncio.create_task(batcher.run("k", work, ["b"])))
        await asyncio.sleep(0)
        await batcher.close()
        work.gate.set()
        return [str(outcome) for task in asked for outcome in await task]

    assert asyncio.run(use()) == ["the server is stopping"] * 2


def test_one_batcher_serves_one_event_loop_after_another():
    batcher, work = Batcher(Batching()), Recorder()
    for item in ("a", "b"):
        assert asyncio.run(batcher.run("k", work, [item])) == [item.upper()]
    assert asyncio.run(batcher.run("k", work, [])) == []


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="threads = 0: must be >= 1"):
        Batching(threads=0)
    with pytest.raises(ConfigError, match="window_seconds = 2: must be from 0 to 1"):
        Batching(window_seconds=2)
