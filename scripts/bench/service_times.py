"""Measurements of `scripts.bench.scaling`: seconds of a turn of the engine, of the agent, of a search.

engine      8, 16 and 32 trajectories with 600 tokens in their caches read 400 more and write 90 each, all at
            once; the line through the three times. One engine, on all that the machine gives it
client      seconds of this process's processor for a turn: trajectories of the bench's plans over the vLLM
            engine, before a server that answers at once with tokens of no model, and the retriever that is
            measured; both in processes of their own
retriever   a server that is started for it: requests of 1, 8, 32 and 128 different queries, one after the
            other; the line through their medians
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.engines.base import Engine, Sampling
from agent.engines.config import EngineConfig
from agent.engines.vllm import VLLMEngine
from agent.policy import Policy, load_policy
from agent.rollout import Agent
from data.errors import ConfigError
from retriever_server.client.pool import Server
from retriever_server.client.search_client import connect
from scripts.bench.rollout_engines import NEVER, PROTOCOL, EndlessHF, Laid, ServerSide, Work, make_work
from scripts.bench.server import Client, make_bodies, started

if TYPE_CHECKING:
    from fastapi import FastAPI

ROWS = (8, 16, 32)
HELD, READ, WRITTEN = 600, 400, 90
"""Tokens of a trajectory before its turn, new in it, and written: about the means of the plans."""
TRAJECTORIES = 128


def measure(
    wanted: set[str], passages: str | None, index: str | None, source: str, config: EngineConfig, threads: int
) -> dict[str, Any]:
    """The times of `wanted`, of engine, client and retriever, as `scaling.Times` takes them."""
    import torch

    torch.set_num_threads(threads)
    if passages is None:
        raise ConfigError("give --passages FOLDER with corpus.jsonl and dev.jsonl, or all --times")
    found: dict[str, Any] = {}
    policy = load_policy(source, "cpu", "float32")
    with tempfile.TemporaryDirectory(prefix="sleuth-times-") as scratch:
        folder = Path(scratch)
        work = make_work(policy, Path(passages), TRAJECTORIES, folder / "bm25")
        if "engine" in wanted:
            found["engine"] = measure_engine(work, source, config, folder)
        served = ["scripts", "serve", "--index", index or str(folder / "bm25"), "--port", "0"]
        with started(served) as retriever:
            if "retriever" in wanted:
                found["retriever"] = asyncio.run(measure_retriever(retriever, work))
            if "client" in wanted:
                found["client"] = measure_client(policy, work, retriever)
    return found


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the seconds at 0 (never below 0), and for each more."""
    slope, start = np.polyfit(xs, ys, 1)
    return max(0.0, float(start)), float(slope)


# ---- engine ----------------------------------------------------------------------------------------


def measure_engine(work: Work, source: str, config: EngineConfig, folder: Path) -> tuple[float, float]:
    """A and B of the engine that `config` names."""
    if config.name == "hf":
        engine: Engine = EndlessHF(work.policy, max(ROWS))
        return line(ROWS, [asyncio.run(_turn_seconds(engine, work, rows)) for rows in (2, *ROWS)][1:])
    side = ServerSide(work, config, source, folder)
    try:
        return line(ROWS, [side.runner.run(_turn_seconds(side.engine, work, r)) for r in (2, *ROWS)][1:])
    finally:
        side.close()


_NUMBERS = count()


async def _turn_seconds(engine: Engine, work: Work, rows: int) -> float:
    """Seconds of a turn that so many trajectories take at once."""
    numbers = [next(_NUMBERS) for _ in range(rows)]
    names = [f"turn {number}" for number in numbers]
    text = " ".join(hit.passage.text for hit in work.retriever.search([work.questions[0].text], 40)[0])
    ids = work.policy.tokenizer.encode(text, add_special_tokens=False)
    # Each its own: a server shares the cache of equal prefixes.
    prompts = [ids[13 * n : 13 * n + HELD + READ] for n in numbers]
    if min(map(len, prompts)) < HELD + READ:
        raise ConfigError(f"the passages found are {len(ids)} tokens long, too few")
    sampling = Sampling(max_tokens=1, stop=NEVER, seed=rows)
    held = (engine.generate(ids[:HELD], sampling, name) for ids, name in zip(prompts, names, strict=True))
    await asyncio.gather(*held)
    sampling = Sampling(max_tokens=WRITTEN, stop=NEVER, seed=rows)
    started = time.perf_counter()
    turns = (engine.generate(ids, sampling, name) for ids, name in zip(prompts, names, strict=True))
    done = await asyncio.gather(*turns)
    seconds = time.perf_counter() - started
    assert all(len(each.token_ids) == WRITTEN for each in done)
    for name in names:
        await engine.release(name)
    print(f"engine: {rows} trajectories, {seconds:.2f} s a turn", file=sys.stderr)
    return seconds


# ---- client ----------------------------------------------------------------------------------------


def canned_app() -> FastAPI:
    """A server that speaks vLLM's wire: as many tokens as are asked for, of no model."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI()
    app.get("/health")(lambda: {})
    app.get("/v1/models")(lambda: {"data": [{"max_model_len": 8192}]})

    async def generate(request: Request) -> Response:
        wanted = (await request.json())["sampling_params"]["max_tokens"]
        ids = [300 + number % 999 for number in range(wanted)]
        content = [{"token": "x", "logprob": -1.0, "token_id": token} for token in ids]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "length"}
        return Response(json.dumps({"choices": [choice]}), media_type="application/json")

    generate.__annotations__ = {"request": Request}
    app.post("/inference/v1/generate")(generate)
    return app


def serve_canned() -> None:
    """Serve it on a free port, and print where."""
    import uvicorn

    from retriever_server.server.connections import listen

    with listen("127.0.0.1", 0) as listener:
        print(f"canned at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(canned_app(), log_level="warning")).run(sockets=[listener])


def measure_client(policy: Policy, work: Work, retriever: str) -> float:
    """Seconds of the processor for a turn, with its search."""

    async def run(url: str) -> float:
        engine, client = VLLMEngine([Server(url)]), connect(retriever)
        agent = Agent(Laid(engine, work), policy.tokenizer, client, PROTOCOL, max_live=64)
        async with client:
            await agent.rollout(work.questions[:4], seed=1)
            started = time.process_time()
            done = await agent.rollout(work.questions, seed=2)
            spent = time.process_time() - started
        await engine.close()
        return spent / sum(len(each.searches) + 1 for each in done)

    with started(["scripts.bench.service_times"]) as url:
        return asyncio.run(run(url))


# ---- retriever -------------------------------------------------------------------------------------


async def measure_retriever(url: str, work: Work, repeats: int = 15) -> tuple[float, float]:
    """d and e of the server at `url`."""
    questions, client = [question.text for question in work.questions], Client(url)
    sizes = (1, 8, 32, 128)
    number = count()
    make: Callable[[int], Any] = lambda size: make_bodies(  # noqa: E731
        [f"{text} {next(number)}" for text in questions], size, PROTOCOL.top_k
    )
    medians = []
    for size in sizes:
        bodies, seconds = make(size), []
        for _ in range(repeats):
            started = time.perf_counter()
            status, _ = await client.ask(next(bodies))
            seconds.append(time.perf_counter() - started)
            assert status == 200
        medians.append(statistics.median(seconds))
        print(f"retriever: {size} queries in {medians[-1] * 1000:.1f} ms", file=sys.stderr)
    client.close()
    return line(sizes, medians)


if __name__ == "__main__":
    serve_canned()
