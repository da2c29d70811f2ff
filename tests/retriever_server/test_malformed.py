"""Requests made against the OpenAPI description, right and wrong: never a 5xx. And a soak."""

import gc
import os
from contextlib import suppress

import pytest
from fastapi.testclient import TestClient

from data.records import Hit, Passage
from retriever_server.app import Limits, create_app
from retriever_server.retriever import Retriever
from tests.retriever_server.test_adapters import Fixed, LengthScorer


class Anything(Retriever):
    """Finds a passage for everything; has an encoder and a scorer."""

    generation, encoder, scorer = "a", Fixed("dense"), LengthScorer()

    def search(self, queries, k, where=None):
        [query.encode() for query in queries]  # as a tokenizer would
        return [[Hit(Passage("1", query, "T"), 1.0, "a")] * k for query in queries]


@pytest.mark.parametrize(
    "examples", [pytest.param(12, id="few"), pytest.param(600, id="ten-thousand", marks=pytest.mark.slow)]
)
def test_no_request_makes_the_server_fail(examples):
    """`examples` right ones and as many wrong ones of each route with a body or parameters."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    app = create_app(Anything(), Limits(max_body_bytes=100_000))
    description = schemathesis.openapi.from_asgi("/openapi.json", app)
    asked = 0

    with TestClient(app, raise_server_exceptions=False) as server:
        for found in description.get_all_operations():
            for mode in schemathesis.GenerationMode:
                strategy = found.ok().as_strategy(generation_mode=mode)

                @given(case=strategy)
                @settings(
                    max_examples=examples,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def check(case):
                    nonlocal asked
                    asked += 1
                    response = case.call(session=server)
                    assert response.status_code < 500, (case.as_curl_command(), response.text)

                with suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
                    check()
    assert asked >= 17 * examples


@pytest.mark.slow
def test_memory_stays_the_same_over_many_requests():
    """Not ten minutes by the clock but as many requests: after a start, memory may grow by 3 % at most."""

    def resident_bytes() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with TestClient(create_app(Anything())) as server:
        sizes = []
        for _ in range(4):
            for i in range(2500):
                assert server.post("/retrieve", json={"queries": [f"{i}"] * 4}).status_code == 200
            sizes.append(resident_bytes())
    assert sizes[-1] < 1.03 * sizes[1], sizes
