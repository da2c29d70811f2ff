"""Requests made against the OpenAPI description, right and wrong, by HTTP: never a 5xx, never no answer."""

from contextlib import suppress
from itertools import count

import pytest

from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server.app import Limits, create_app
from tests.retriever_server.running import serving
from tests.retriever_server.server.test_embeddings import Fixed, LengthScorer

HANG_SECONDS = 30


class Anything(Retriever):
    """Finds a passage for everything, images too; has an encoder and a scorer."""

    generation, encoder, scorer = "a", Fixed("dense"), LengthScorer()

    def search(self, queries, k, where=None):
        texts = [query if isinstance(query, str) else query.text for query in queries]
        [text.encode() for text in texts]  # as a tokenizer would
        return [[Hit(Passage("1", text, "T"), 1.0, "a")] * k for text in texts]

    def takes_images(self):
        return True


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "at_once"), [(50, 4), (10_000, 100)])
def test_no_malformed_request_makes_the_server_fail_or_hang(wanted, at_once):
    """`wanted` wrong ones, and right ones beside them, `at_once` of each route and kind in turn."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from requests import Session

    asked, session = dict.fromkeys(schemathesis.GenerationMode, 0), Session()
    wrong = schemathesis.GenerationMode.NEGATIVE

    def ask(operation, mode, turn: int) -> None:
        @seed(turn)
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=at_once,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            asked[mode] += 1
            response = case.call(base_url=url, session=session, timeout=HANG_SECONDS)
            # Who asks for an answer within no time rightly gets none in time.
            too_late = response.status_code == 504 and "deadline_seconds" in str(case.body)
            assert response.status_code < 500 or too_late, (case.as_curl_command(), response.text)
            described = operation.definition.raw["responses"]
            assert str(response.status_code) in described, (case.as_curl_command(), response.status_code)

        with suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
            check()

    with serving(create_app(Anything(), Limits(max_body_bytes=100_000))) as url:
        description = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [found.ok() for found in description.get_all_operations()]
        assert len(operations) >= 15
        for turn in count():
            for operation in operations:
                for mode in asked:
                    ask(operation, mode, turn)
            if asked[wrong] >= wanted:
                break
    print(f"{asked[wrong]} wrong, {sum(asked.values())} in all")
