"""The load that a retrieval server bears: any URL of Search-R1's /retrieve, and a peer's procedure beside it.

    python -m scripts.bench.server --questions FILE --urls '{"ours": "http://127.0.0.1:8000"}'
    python -m scripts.bench.server --questions FILE --index INDEX --peer true

loads   single   64 clients, each asks one query after the other, all different
        batch    4 clients, requests of 64 queries
        many     500 clients of single queries; a 429 or 503 is asked again after its Retry-After, for 30 s
peer    the procedure of Search-R1's server (its retrieval_server.py), written anew: a thread a request,
        one padded encoder call (mean pooling) and one IndexFlatIP search a request, rows of a `datasets`
        table looked up one by one, nothing batched across requests; on the vectors and with the model of
        INDEX (kind flat)

With --index the servers are started here, one after the other, each alone on the machine.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import ConfigError

LOADS = {"single": (64, 1), "batch": (4, 64), "many": (500, 1)}
"""Name -> clients, queries a request."""
_LONGEST_RETRY_SECONDS = 30.0


@dataclass
class Tally:
    """The outcome of the requests of one load."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of each request that was answered, with its retries."""
    troubles: Counter[str] = field(default_factory=Counter)
    """Statuses and broken connections, those that a retry mended too."""
    lost: int = 0
    """Requests without an answer in the end."""


class Client:
    """One kept-alive connection; as little work as possible beside the server that is measured."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer; OSError or EOFError if the connection breaks."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = (
            f"POST /retrieve HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
            await reader.readexactly(int(headers.get("content-length", 0)))
            return int(lines[0].split()[1]), headers
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask_until_answered(client: Client, body: bytes, tally: Tally) -> None:
    """One request, with retries as the server says."""
    start = time.perf_counter()
    while True:
        try:
            status, headers = await client.ask(body)
        except (OSError, EOFError) as error:
            tally.troubles[type(error).__name__] += 1
            tally.lost += 1
            return
        if status == 200:
            tally.seconds.append(time.perf_counter() - start)
            return
        tally.troubles[str(status)] += 1
        wait = float(headers.get("retry-after", 0)) if status in (429, 503) else _LONGEST_RETRY_SECONDS
        if time.perf_counter() - start + wait >= _LONGEST_RETRY_SECONDS:
            tally.lost += 1
            return
        await asyncio.sleep(wait)


async def drive(url: str, load: str, questions: list[str], seconds: float, top_k: int) -> dict[str, Any]:
    """The figures of one load on one server."""
    clients, size = LOADS[load]
    bodies = make_bodies(questions, size, top_k)
    tally = Tally()
    start = time.perf_counter()

    async def run() -> None:
        client = Client(url)
        while time.perf_counter() - start < seconds:
            await ask_until_answered(client, next(bodies), tally)
        client.close()

    await asyncio.gather(*(run() for _ in range(clients)))
    took = time.perf_counter() - start
    return summarise(tally, size, took)


def make_bodies(questions: list[str], size: int, top_k: int) -> Iterator[bytes]:
    """Requests of `size` queries, no two queries alike: past the end each question gets a number."""
    number = 0
    while True:
        queries = []
        for _ in range(size):
            turn, place = divmod(number, len(questions))
            queries.append(f"{questions[place]} {turn}" if turn else questions[place])
            number += 1
        yield json.dumps({"queries": queries, "topk": top_k, "return_scores": True}).encode()


def summarise(tally: Tally, size: int, took: float) -> dict[str, Any]:
    """Rates and percentiles as JSON."""
    ordered = sorted(tally.seconds)
    answered = len(ordered)

    def percentile(p: float) -> float:
        return round(1000 * ordered[min(int(p * answered), answered - 1)], 1) if ordered else float("nan")

    return {
        "queries_per_second": round(answered * size / took, 1),
        "p50_ms": percentile(0.50),
        "p95_ms": percentile(0.95),
        "p99_ms": percentile(0.99),
        "requests": answered + tally.lost,
        "lost": tally.lost,
        "troubles": dict(tally.troubles),
    }


@contextmanager
def started(command: list[str]) -> Iterator[str]:
    """The URL that a server prints once it listens; it is stopped at the end."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise ConfigError(f"{' '.join(command)}: printed {line!r} and no address")
        yield line[line.index("http://") :].strip()
    finally:
        process.terminate()
        process.wait(timeout=60)


def peer_app(opened: Any) -> Any:
    """The application of a server by Search-R1's procedure, over an open flat index."""
    import datasets
    import faiss
    import numpy as np
    import torch
    from fastapi import FastAPI
    from pydantic import BaseModel

    flat = faiss.IndexFlatIP(opened.encoder.spec.dimension)
    flat.add(opened.rows[np.arange(len(opened))])
    rows = datasets.load_dataset("json", data_files=str(opened.corpus.path), split="train")
    app, model = FastAPI(), opened.encoder._model

    @torch.no_grad()
    def encode(queries: list[str]) -> np.ndarray:  # padded to the longest of the request, mean pooling
        inputs = model.tokenizer(queries, max_length=256, padding=True, truncation=True, return_tensors="pt")
        hidden = model[0].auto_model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()

    class Ask(BaseModel):
        queries: list[str]
        topk: int | None = None
        return_scores: bool = False

    def retrieve(ask: Ask):  # no `async`: FastAPI gives it a thread of its own
        scores, found = flat.search(encode(ask.queries), ask.topk or 3)
        documents = [[rows[int(i)] for i in row] for row in found]
        result = []
        for row, of_row in zip(documents, scores, strict=True):
            result.append([{"document": d, "score": float(s)} for d, s in zip(row, of_row, strict=True)])
        return {"result": result}

    # The annotation is a local class: resolved here, not from the module.
    retrieve.__annotations__["ask"] = Ask
    app.post("/retrieve")(retrieve)
    return app


def serve_peer(index: str) -> None:
    """Serve a flat index by the procedure of Search-R1's server, on a free port."""
    import uvicorn

    from retriever_server.open_retriever import open_retriever
    from retriever_server.server.connections import listen

    app = peer_app(open_retriever(index))
    with listen("127.0.0.1", 0) as listener:
        print(f"peer at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def main(
    questions: str | None = None,
    urls: dict[str, str] | None = None,
    index: str | None = None,
    peer: bool = False,
    loads: list[str] | None = None,
    seconds: float = 20.0,
    top_k: int = 3,
    serve_options: list[str] | None = None,
    serve_peer_of: str | None = None,
) -> None:
    """Drive servers with each load and print a JSON line for each.

    Args:
        questions: File of queries, one a line.
        urls: Servers that run already, by name.
        index: Folder of an index to serve here, or a YAML file that names one.
        peer: Drive the peer's procedure on that index too.
        loads: Some of single, batch, many; all without.
        seconds: How long each load asks.
        top_k: Passages a query.
        serve_options: More options of `sleuth serve`.
        serve_peer_of: Only serve that index as the peer does.
    """
    if serve_peer_of is not None:
        return serve_peer(serve_peer_of)
    if questions is None or not (urls or index):
        raise ConfigError("give --questions FILE, and --urls or --index")
    texts = [line for line in Path(questions).read_text(encoding="utf-8").splitlines() if line.strip()]
    for name, url in (urls or {}).items():
        _report(name, url, texts, loads, seconds, top_k)
    commands = {"ours": ["scripts", "serve", "--index", str(index), "--port", "0", *(serve_options or [])]}
    if peer:
        commands["peer"] = ["scripts.bench.server", "--serve_peer_of", str(index)]
    for name, command in commands.items() if index else ():
        with started(command) as url:
            _report(name, url, texts, loads, seconds, top_k)


def _report(
    name: str, url: str, texts: list[str], loads: list[str] | None, seconds: float, top_k: int
) -> None:
    asyncio.run(drive(url, "batch", texts, 1.0, top_k))  # warm
    for load in loads or LOADS:
        figures = asyncio.run(drive(url, load, texts, seconds, top_k))
        print(json.dumps({"server": name, "load": load, **figures}), flush=True)


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
