"""A retriever behind a server: a new index serves once it is reloaded, or one line says why not."""

import threading

import httpx
import pytest

from data.errors import RetrieverError, RetrieverRefused, RetrieverUnavailable
from retriever_server.indexes.manifest import read_manifest
from rl.co_training import live
from tests.retriever_server.answering import answering
from tests.retriever_server.running import build_numbered_index, running_server


@pytest.fixture
def served(tmp_path):
    """A place with the index of one corpus, the index of another, and a token."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        build_numbered_index(tmp_path / str(number), number)
    live.put_in_place(tmp_path / "1" / "index", tmp_path / "place")
    (tmp_path / "token").write_text("word\n")
    return tmp_path


def generation(folder):
    return read_manifest(folder).generation


@pytest.mark.slow
def test_a_new_index_serves_after_the_reload_and_no_request_fails(served):
    token = str(served / "token")
    with running_server(served / "place", "--admin_token_file", token, "--watch_seconds", "3600") as server:
        live.check_generation(server.url, generation(served / "1" / "index"))
        failures, over = [], threading.Event()

        def search():
            with httpx.Client() as client:
                while not over.wait(0.002):
                    answer = client.post(f"{server.url}/retrieve", json={"queries": ["w7"], "topk": 1})
                    failures.extend([answer.text] * (answer.status_code != 200))

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        for swap in range(8):
            index = served / str(2 - swap % 2) / "index"
            live.put_in_place(index, served / "place")
            live.reload(server.url, token, generation(index))
            live.reload(server.url, token, generation(index))  # a loop that was killed does it again
        over.set()
        for thread in threads:
            thread.join()
        assert not failures
        with pytest.raises(RetrieverError, match=r"serves bm25-.*, the loop is at bm25-.*: put the index"):
            live.check_generation(server.url, generation(served / "2" / "index"))


def test_a_server_that_will_not_reload_is_said_in_one_line(served):
    new = generation(served / "2" / "index")
    with running_server(served / "place", "--admin_token_file", str(served / "token")) as server:
        with pytest.raises(RetrieverRefused, match=r"/admin/reload: answered 40[13]"):
            live.reload(server.url, None, new)
        (served / "place" / "manifest.json").write_text("{")
        with pytest.raises(RetrieverRefused, match=r"/admin/reload: answered 409: .*not swapped"):
            live.reload(server.url, str(served / "token"), new)
    with pytest.raises(RetrieverUnavailable, match="ConnectError"):
        live.reload(server.url, str(served / "token"), new)


def test_one_that_goes_on_with_the_old_index_is_waited_for_until_the_deadline():
    routes = {"admin__reload": lambda _: (200, {}), "healthz": lambda _: (200, {"generation": "old"})}
    with (
        answering(**routes) as server,
        pytest.raises(RetrieverUnavailable, match="still serves old, not new"),
    ):
        live.reload(server.url, None, "new", deadline_seconds=0.2)


def test_what_answers_something_else_is_said_in_one_line():
    with (
        answering(healthz=lambda _: (200, ["a page"])) as server,
        pytest.raises(RetrieverRefused, match=r"/healthz: answered 200: \["),
    ):
        live.check_generation(server.url, "new")


def test_all_workers_must_agree():
    says = iter(["new"] * 5 + ["old"] + ["new"] * live.AGREE)
    routes = {"admin__reload": lambda _: (200, {}), "healthz": lambda _: (200, {"generation": next(says)})}
    with answering(**routes) as server:
        live.reload(server.url, None, "new")
        assert server.paths().count("/healthz") == 6 + live.AGREE
