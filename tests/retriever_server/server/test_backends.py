"""Another generation takes over under load: no request fails, none mixes two, the old one is closed."""

import asyncio
import json
import threading

import httpx
import pytest
from fastapi.testclient import TestClient

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.indexes.base import open_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.backends import HotSwappable, RetrieverLease, stamp
from retriever_server.server.batching import Batching


class Numbered(Retriever):
    """Generation g<number>; every hit says it. Fails if it is searched after it was closed."""

    def __init__(self, number: int) -> None:
        self.generation, self.closed = f"g{number}", False

    def search(self, queries, k, where=None):
        assert not self.closed
        return [[Hit(Passage("1", self.generation), 1.0, self.generation)] for _ in queries]

    def close(self):
        self.closed = True


def test_under_load_no_request_fails_and_none_mixes_generations():
    made = [Numbered(0)]

    def reopen():
        made.append(Numbered(len(made)))
        return made[-1]

    live = HotSwappable(made[0], reopen)

    async def ask(client) -> set[str]:
        # More queries than a batch holds: they travel in several.
        body = {"queries": [f"q{i}" for i in range(8)]}
        answer = (await client.post("/v1/search", json=body)).raise_for_status().json()
        generations = {hit["generation"] for result in answer["results"] for hit in result["hits"]}
        assert generations == {answer["generation"]}
        return generations

    async def run() -> set[str]:
        app = create_app({"default": live}, batching=Batching(max_batch=3, threads=2))
        seen: set[str] = set()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            for _ in range(5):
                asked = [asyncio.create_task(ask(client)) for _ in range(20)]
                await asyncio.sleep(0.002)
                assert await asyncio.to_thread(live.reload)
                for task in asked:
                    seen |= await task
            await app.state.service.batcher.close()
        return seen

    assert len(asyncio.run(run())) > 1
    assert [retriever.closed for retriever in made] == [True] * 5 + [False]


def test_the_old_one_is_closed_once_its_last_user_has_left():
    opened = RetrieverLease(Numbered(0))
    with opened:
        opened.retire()
        with opened:
            pass
        assert not opened.retriever.closed
    assert opened.retriever.closed


def test_what_does_not_open_or_search_takes_nobodys_place():
    broken = Numbered(1)
    broken.closed = True
    found = iter([DataError("truncated"), broken, Numbered(0)])

    def reopen():
        retriever = next(found)
        if isinstance(retriever, Exception):
            raise retriever
        return retriever

    live = HotSwappable(Numbered(0), reopen)
    app = create_app({"default": live}, token="t")
    with TestClient(app, headers={"Authorization": "Bearer t"}) as server:
        unknown = server.post("/admin/reload?backend=other")
        assert unknown.status_code == 422 and "must be one of default" in unknown.json()["detail"]
        answer = server.post("/admin/reload")
        assert answer.status_code == 409 and "truncated" in answer.json()["detail"]
        assert server.post("/admin/reload").status_code == 409
        same = server.post("/admin/reload")  # the same generation again
        assert same.json() == {"swapped": False, "generations": {"default": "g0"}}
        assert server.post("/retrieve", json={"queries": ["a"]}).json()["generation"] == "g0"


def test_a_retriever_without_a_place_cannot_be_reloaded():
    with pytest.raises(ConfigError, match="no place on disk"):
        HotSwappable(Numbered(0)).reload()


def test_a_new_stamp_swaps_and_metrics_tell():
    numbers, swapped = [0], threading.Event()
    live = HotSwappable(Numbered(0), lambda: Numbered(numbers[0]), lambda: (numbers[0],))
    with TestClient(create_app({"default": live}, watch_seconds=0.01)) as server:
        noted, live.on_swap = live.on_swap, lambda: (noted(), swapped.set())
        numbers[0] = 1
        assert swapped.wait(timeout=20)
        assert server.get("/healthz").json()["generation"] == "g1"
        text = server.get("/metrics").text
    assert 'generation="g0"} 0.0' in text and 'generation="g1"} 1.0' in text


def test_the_stamp_changes_with_the_index_and_with_what_a_yaml_names(tmp_path):
    folder, config = tmp_path / "index", tmp_path / "fuse.yaml"
    config.write_text(f"class_path: Fuse\ninit_args: {{parts: [{folder}, none]}}\n")
    before = [stamp(str(folder)), stamp(str(config))]
    assert before[0] == ()
    folder.mkdir()
    write_jsonl(folder / "manifest.json", [{}])
    after = [stamp(str(folder)), stamp(str(config))]
    assert after[0] != before[0] and after[1] != before[1]
    assert after == [stamp(str(folder)), stamp(str(config))]


def test_a_corpus_rewritten_under_the_server_is_5xx_without_a_path_and_never_another_text(tmp_path):
    texts = [f"w{i} " + "old " * 2000 for i in range(40)]  # pages of a map would be gone
    rows = [
        {"id": str(i), "text": text, "metadata": {"url": f"http://x/{i}"}} for i, text in enumerate(texts)
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    live = HotSwappable(BM25Index.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index"))
    with TestClient(create_app({"default": live}), raise_server_exceptions=False) as client:
        assert "old" in client.post("/retrieve", json={"queries": ["w30"]}).text
        for new in (texts[0].replace("old", "new"), ""):
            with open(tmp_path / "corpus.jsonl", "w") as file:  # the same inode, shorter
                file.write(json.dumps({"id": "30", "text": new}) + "\n")
            for path, body in (
                ("/retrieve", {"queries": ["w30"]}),
                ("/search", {"query": "w30"}),
                ("/access", {"urls": ["30"]}),
                ("/access", {"urls": ["http://x/30"]}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 503, (path, answer.text)
                assert "not what was indexed" in answer.text and str(tmp_path) not in answer.text
        [result] = client.post("/v1/search", json={"queries": ["w30"]}).json()["results"]
        assert result["hits"] == [] and "not what was indexed" in result["error"]
    with pytest.raises(DataError, match=r"changed since .* was built"):
        open_index(tmp_path / "index")
