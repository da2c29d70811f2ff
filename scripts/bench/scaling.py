"""Trajectories a second of 1 to 1,024 engines and 1 to 64 retriever replicas, from measured service times.

    python -m scripts.bench.scaling --passages FOLDER --index INDEX --policy smollm2 [--engine.name vllm ...]
    python -m scripts.bench.scaling --times '{"engine": [0.58, 0.024], "client": 0.006, ...}'

The service times are measured here (service_times.py), or given: those of another machine, of a roofline.
They are of a turn: a trajectory takes `searches` + 1 turns of the engine, with a search after each but the
last.

engine      a turn takes A + B n seconds where n trajectories share the engine: A for its steps, B for what
            each row adds to them and for reading what is new
client      c seconds of the processor in the process that runs the trajectories: tokenizing, rendering,
            HTTP. One process is one core; as many as `clients`, each with its own trajectories
retriever   a batch of q queries takes d + e q seconds; queries that come meanwhile make the next batch

The computation: at a throughput X every station has a mean residence (engine: A / (1 - B x); client:
c / (1 - c x); retriever: its batch and half the one before; x the visits a second of one of them), and X is
where Little's law gives the trajectories there are. The simulation follows single trajectories with turns of
different lengths through the same stations, and says how far the computation is off.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from agent.engines.config import EngineConfig

BATCH = 128
"""Queries that a replica takes at once, at most."""
ENGINES, REPLICAS = (1, 4, 16, 64, 256, 1024), (1, 4, 16, 64)
CHECKED = ((1, 1, 1), (4, 1, 4), (16, 1, 1), (16, 4, 16), (64, 1, 64), (64, 16, 16))
"""Engines, replicas and clients that are simulated, too."""


@dataclass(frozen=True)
class Times:
    """Service times in seconds."""

    engine: tuple[float, float]
    """A and B."""
    client: float
    retriever: tuple[float, float]
    """d and e."""
    network: float = 0.001
    """There and back, of a search."""


class Layout(NamedTuple):
    """The number of each."""

    engines: int
    replicas: int
    clients: int
    rows: int = 64
    """Trajectories alive for each engine."""
    searches: float = 2.5

    @property
    def trajectories(self) -> int:
        """Alive at once."""
        return self.engines * self.rows


class Flow(NamedTuple):
    """The figures of a layout."""

    rate: float
    """Trajectories a second."""
    busiest: str
    busy: float
    """Share of its capacity that the busiest station uses."""


# ---- computed --------------------------------------------------------------------------------------


def visits(layout: Layout, rate: float) -> dict[str, float]:
    """Visits a second of one engine, client and replica."""
    return {
        "engine": rate * (layout.searches + 1) / layout.engines,
        "client": rate * (layout.searches + 1) / layout.clients,
        "retriever": rate * layout.searches / layout.replicas,
    }


def capacities(times: Times) -> dict[str, float]:
    """The visits a second that each kind of station could take at most."""
    fixed, each = times.retriever
    return {
        "engine": 1 / times.engine[1],
        "client": 1 / times.client,
        "retriever": BATCH / (fixed + BATCH * each),
    }


def alive(times: Times, layout: Layout, rate: float) -> float:
    """The trajectories that are somewhere in the loop at this throughput (Little's law at each station)."""
    each = visits(layout, rate)
    busy = {name: each[name] / capacity for name, capacity in capacities(times).items()}
    if max(busy.values()) >= 1:
        return float("inf")
    engine = times.engine[0] / (1 - busy["engine"])
    client = times.client / (1 - busy["client"])
    fixed, query = times.retriever
    queries = max(1.0, each["retriever"] * fixed / (1 - each["retriever"] * query))
    batch = fixed + query * queries
    retriever = batch * (1 + min(1.0, each["retriever"] * (fixed + query)) / 2) + times.network
    turns = layout.searches + 1
    return rate * (turns * (engine + client) + layout.searches * retriever)


def flow(times: Times, layout: Layout) -> Flow:
    """The throughput at which as many trajectories are alive as the layout has, by halving."""
    low, high = 0.0, min(capacity / visits(layout, 1.0)[name] for name, capacity in capacities(times).items())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if alive(times, layout, middle) < layout.trajectories else (low, middle)
    return Flow(low, *_busiest(times, layout, low))


def _busiest(times: Times, layout: Layout, rate: float) -> tuple[str, float]:
    each = visits(layout, rate)
    busy = {name: each[name] / capacity for name, capacity in capacities(times).items()}
    # An engine always holds its share of the trajectories: it is what bounds, unless another is full.
    full = {name: share for name, share in busy.items() if name != "engine" and share > 0.8}
    name = max(full, key=full.__getitem__) if full else "engine"
    return name, busy[name]


# ---- simulated -------------------------------------------------------------------------------------


class Simulation:
    """The same stations, event by event; each trajectory that ends makes room for a new one."""

    def __init__(self, times: Times, layout: Layout, seed: int = 0) -> None:
        self.times, self.layout, self.draw = times, layout, random.Random(seed)
        self.now, self.done = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._engines = [_Engine(self) for _ in range(layout.engines)]
        self._clients = [_Queue(self) for _ in range(layout.clients)]
        self._replicas = [_Batches(self) for _ in range(layout.replicas)]

    def run(self, trajectories: int) -> float:
        """Trajectories a second over so many, after as many as are alive have warmed it up."""
        for number in range(self.layout.trajectories):
            self.begin(number)
        warm = 2 * self.layout.trajectories
        since = 0.0
        while self.done < warm + trajectories:
            self.now, _, act = heapq.heappop(self._events)
            before = self.done
            act()
            if before < warm <= self.done:
                since = self.now
        return trajectories / (self.now - since)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Let something happen then."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def begin(self, number: int) -> None:
        """A trajectory with as many searches as drawn; it stays with its client and its engine."""
        whole = int(self.layout.searches)
        spread = self.draw.randint(-min(whole, 1), min(whole, 1))
        searches = whole + spread + (self.draw.random() < self.layout.searches - whole)
        engine = min(self._engines, key=lambda each: len(each.ends))
        client = self._clients[number % len(self._clients)]
        self._turn(number, searches, engine, client)

    def _turn(self, number: int, searches: int, engine: _Engine, client: _Queue) -> None:
        def written() -> None:
            client.add(self.times.client, acted)

        def acted() -> None:
            if searches:
                replica = min(self._replicas, key=lambda each: len(each.waiting))
                self.after(self.times.network, lambda: replica.add(found))
            else:
                self.done += 1
                self.begin(number)

        def found() -> None:
            self._turn(number, searches - 1, engine, client)

        engine.add(self.draw.uniform(0.25, 1.75), written)


class _Engine:
    """Rows advance together, the slower the more they are."""

    def __init__(self, world: Simulation) -> None:
        self.world, self.ends = world, list[tuple[float, int, Callable[[], None]]]()
        self._advanced, self._at, self._version = 0.0, 0.0, 0

    def add(self, length: float, then: Callable[[], None]) -> None:
        self._advance()
        heapq.heappush(self.ends, (self._advanced + length, next(self.world._order), then))
        self._plan()

    def _advance(self) -> None:
        elapsed, self._at = self.world.now - self._at, self.world.now
        self._advanced += elapsed / self._turn_seconds() if self.ends else 0.0

    def _turn_seconds(self) -> float:
        fixed, each = self.world.times.engine
        return fixed + each * len(self.ends)

    def _plan(self) -> None:
        self._version += 1
        version, left = self._version, max(0.0, self.ends[0][0] - self._advanced)
        self.world.after(left * self._turn_seconds(), lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:  # somebody came since
            return
        self._advance()
        then = heapq.heappop(self.ends)[2]
        if self.ends:
            self._plan()
        then()


class _Queue:
    """One after the other."""

    def __init__(self, world: Simulation) -> None:
        self.world, self._free = world, 0.0

    def add(self, seconds: float, then: Callable[[], None]) -> None:
        self._free = max(self._free, self.world.now) + seconds
        self.world.after(self._free - self.world.now, then)


class _Batches:
    """All that wait together, as soon as it is free."""

    def __init__(self, world: Simulation) -> None:
        self.world, self.waiting, self._busy = world, deque[Callable[[], None]](), False

    def add(self, then: Callable[[], None]) -> None:
        self.waiting.append(then)
        if not self._busy:
            self._take()

    def _take(self) -> None:
        batch = [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]
        self._busy = bool(batch)
        if batch:
            fixed, each = self.world.times.retriever
            self.world.after(fixed + each * len(batch), lambda: self._done(batch))

    def _done(self, batch: list[Callable[[], None]]) -> None:
        self._take()
        for then in batch:
            then()


# ---- printing --------------------------------------------------------------------------------------


def table(times: Times, clients: Callable[[int], int], rows: int, searches: float) -> list[str]:
    """Lines of Markdown: trajectories a second, the share of linear growth, and what bounds it."""
    one = flow(times, Layout(1, 1, 1, rows, searches)).rate
    lines = ["| engines | clients | " + " | ".join(f"{r} replicas" for r in REPLICAS) + " |"]
    lines.append("|---" * (len(REPLICAS) + 2) + "|")
    for engines in ENGINES:
        cells = []
        for replicas in REPLICAS:
            found = flow(times, Layout(engines, replicas, clients(engines), rows, searches))
            linear = found.rate / (engines * one)
            cells.append(f"{found.rate:,.4g} ({linear:.0%}, {found.busiest} {found.busy:.0%})")
        lines.append(f"| {engines:,} | {clients(engines)} | " + " | ".join(cells) + " |")
    return lines


def check(times: Times, rows: int, searches: float) -> list[str]:
    """Lines that set the computation beside the simulation."""
    lines = ["| engines | replicas | clients | computed | simulated | off |", "|---|---|---|---|---|---|"]
    for engines, replicas, clients in CHECKED:
        layout = Layout(engines, replicas, clients, rows, searches)
        computed = flow(times, layout).rate
        simulated = Simulation(times, layout).run(4 * layout.trajectories)
        off = computed / simulated - 1
        lines.append(
            f"| {engines} | {replicas} | {clients} | {computed:.4g} | {simulated:.4g} | {off:+.1%} |"
        )
    return lines


def main(
    passages: str | None = None,
    index: str | None = None,
    policy: str = "smollm2",
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    threads: int = 1,
    times: dict | None = None,
    rows: int = 64,
    searches: float = 2.5,
) -> None:
    """Measure service times, or take those given, and print the tables.

    Args:
        passages: Folder with corpus.jsonl and dev.jsonl, to measure with.
        index: Of the retriever that is measured; none: BM25 over the passages.
        policy: To measure the engine with.
        engine: hf or vllm, to measure.
        threads: That torch may use.
        times: engine [A, B], client, retriever [d, e] and network in seconds; what is missing is measured.
        rows: Trajectories alive for each engine.
        searches: Of a trajectory, on average.
    """
    given = dict(times or {})
    missing = {"engine", "client", "retriever"} - set(given)
    if missing:
        from scripts.bench.service_times import measure

        given |= measure(missing, passages, index, policy, engine, threads)
    engine_times, of_retriever = tuple(given.pop("engine")), tuple(given.pop("retriever"))
    found = Times(engine=engine_times, retriever=of_retriever, **given)
    print(found)
    print("\n".join(["", "one client process", *table(found, lambda engines: 1, rows, searches)]))
    print("\n".join(["", "a client for each engine", *table(found, lambda engines: engines, rows, searches)]))
    print("\n".join(["", *check(found, rows, searches)]))
    near = replace(found, client=1e-9, retriever=(1e-9, 1e-9), network=0.0)
    print(f"\nengines alone: {flow(near, Layout(1, 1, 1, rows, searches)).rate:.4g} trajectories/s each")


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
