"""`POST /admin/passages`: a change answers at once, is one generation, and wrong ones change nothing."""

import json
import threading

import pytest
from fastapi.testclient import TestClient

from data.errors import ConfigError, StorageError
from retriever_server.indexes import living
from retriever_server.indexes.base import open_index
from retriever_server.indexes.generation import building
from retriever_server.retrievers.fuse import Fuse
from retriever_server.server.app import create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.running import build_small_index, wait_until

ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
def live(tmp_path) -> HotSwappable:
    return HotSwappable(open_index(build_small_index(tmp_path)))


@pytest.fixture
def server(live):
    with TestClient(create_app({"default": live}, token="t", admin_token="admin")) as client:
        yield client


def ids(server, query: str) -> list[str]:
    answer = server.post("/v1/search", json={"queries": [query]}, headers=ADMIN).json()
    [result] = answer["results"]
    assert {hit["generation"] for hit in result["hits"]} <= {answer["generation"]}
    return [hit["id"] for hit in result["hits"]]


def change(server, **body):
    return server.post("/admin/passages", content=json.dumps(body), headers=ADMIN)


def test_what_is_added_is_found_at_once_and_what_is_deleted_is_not(server):
    before = server.get("/healthz").json()["generation"]
    answer = change(server, add=[{"id": "new", "text": "yellow submarine"}])
    assert answer.status_code == 200 and answer.json()["swapped"] is True
    assert answer.json()["generations"]["default"] != before
    assert ids(server, "submarine") == ["new"]
    moved = {"id": "new", "contents": '"Boats"\ngrey submarine'}
    assert change(server, add=[moved]).status_code == 422
    assert change(server, add=[moved], replace=True).json()["swapped"] is True
    assert ids(server, "yellow") == [] and ids(server, "grey") == ["new"]
    assert change(server, delete=["new", "1"]).status_code == 200
    assert ids(server, "submarine") == [] and ids(server, "fox") == ["0", "2"]
    assert change(server, add=[{"id": 9, "text": "a fox"}]).status_code == 200
    assert change(server, delete=[9, "0"]).status_code == 200 and ids(server, "fox") == ["2"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "must hold add"),
        ({"add": [{"id": "9", "text": "a"}], "delete": ["1"]}, "and not both"),
        ({"add": []}, "add"),
        ({"add": [{"id": "9"}]}, 'add.0: neither "contents"'),
        ({"add": [{"text": "a"}]}, "add.0: "),
        ({"add": [{"id": "1", "text": "a"}]}, "the index: has a passage '1' already"),
        ({"add": [{"id": "9\udc00", "text": "a"}]}, "half a surrogate pair"),
        ({"add": [{"id": "9", "text": "a", "image": "/etc/passwd"}]}, "names a file"),
        ({"add": [{"id": "9", "text": "a"}, {"id": 9, "text": "b"}]}, "add.1: has the id '9' of add.0"),
        ({"delete": ["nobody"]}, "the index: has no passage 'nobody'"),
        ({"delete": ["1", "\udc00"]}, "half a surrogate pair"),
        ({"delete": ["0", "1", "2", "3"]}, "all of its 4 passages"),
        ({"delete": [True]}, "delete.0"),
        ({"delete": ["1"], "backend": "other"}, "backend 'other'"),
        ({"remove": ["1"]}, "remove"),
    ],
)
def test_a_wrong_change_is_422_and_changes_nothing(server, live, body, said):
    before = live.generation
    answer = change(server, **body)
    assert answer.status_code == 422 and said in answer.json()["detail"]
    assert live.generation == before


def test_only_administrators_change_passages(server):
    for headers, status in (({}, 401), ({"Authorization": "Bearer t"}, 403)):
        answer = server.post("/admin/passages", json={"delete": ["1"]}, headers=headers)
        assert answer.status_code == status
    assert server.post("/admin/passages", content="{", headers=ADMIN).status_code == 400


def test_what_is_no_index_and_an_index_that_is_being_built_are_409(server, live, monkeypatch):
    index = live.current.retriever
    monkeypatch.setattr(living, "PATIENCE_SECONDS", 0.1)
    with building(index.path):
        answer = change(server, delete=["1"])
    assert answer.status_code == 409 and "being built there by process" in answer.json()["detail"]
    app = create_app(Fuse([index, index]), token="t", admin_token="admin")
    with TestClient(app) as other:
        answer = change(other, delete=["1"])
        assert answer.status_code == 409 and "Fuse: passages are deleted from an index" in answer.text


def test_an_index_at_a_short_relative_path_is_named_without_its_place(tmp_path, monkeypatch):
    build_small_index(tmp_path).rename(tmp_path / "s")
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise StorageError(f"{tmp_path}/s/part-0001.jsonl: cannot be written: No space left on device")

    with TestClient(create_app(open_index("s"), token="t", admin_token="admin")) as server:
        answer = change(server, delete=["s"])
        assert answer.json()["detail"] == "the index: has no passage 's'; nothing was deleted"
        monkeypatch.setattr(living, "write_json", full)
        answer = change(server, delete=["1"])
        said = "not changed: the index/part-0001.jsonl: cannot be written: No space left on device"
        assert (answer.status_code, answer.json()["detail"]) == (409, said)


def test_many_changes_are_compacted_in_the_background(server, live, monkeypatch):
    monkeypatch.setattr(living, "MOST_PARTS", 3)
    for number in range(8):
        assert change(server, add=[{"id": f"n{number}", "text": f"whale w{number}"}]).status_code == 200
    wait_until(lambda: len(live.current.retriever.manifest.parts) <= 3)
    assert [ids(server, f"w{i}") for i in range(8)] == [[f"n{i}"] for i in range(8)]


def test_an_index_that_cannot_be_compacted_stays_and_says_why_in_one_line(server, live, monkeypatch, caplog):
    def refuse(index):
        raise ConfigError("too few passages")

    monkeypatch.setattr(type(live.current.retriever), "compact", refuse)
    assert change(server, add=[{"id": "new", "text": "a whale"}]).status_code == 200
    wait_until(lambda: "was not compacted: too few passages" in caplog.text)
    assert ids(server, "whale") == ["new"] and "Traceback" not in caplog.text


def test_changes_at_once_are_all_kept(server):
    answers = []

    def add(number: int) -> None:
        answers.append(change(server, add=[{"id": f"n{number}", "text": f"w{number}"}]).status_code)

    threads = [threading.Thread(target=add, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    assert [ids(server, f"w{i}") for i in range(6)] == [[f"n{i}"] for i in range(6)]
