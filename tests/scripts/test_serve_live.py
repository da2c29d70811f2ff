"""`sleuth serve` while it runs: a new index in the same folder, several workers, one of them killed."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from data.corpus import Corpus
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from tests.retriever_server.running import build_small_index, running_server, wait_until


def build_other_index(folder: Path) -> str:
    """Replace the index by one of another corpus; its generation."""
    write_jsonl(folder / "other.jsonl", [{"id": "9", "title": "T", "text": "fox of another corpus"}])
    return BM25Index.build(Corpus(folder / "other.jsonl"), folder / "index", overwrite=True).generation


def generation(url: str) -> str:
    return httpx.get(f"{url}/healthz", timeout=60).json()["generation"]


def test_a_new_index_in_the_same_folder_takes_over_and_no_request_fails(tmp_path):
    index, stop, answers = build_small_index(tmp_path), threading.Event(), []

    def ask(url: str) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                body = {"queries": ["fox", "fox sea"], "topk": 1, "return_scores": True}
                answer = client.post(f"{url}/retrieve", json=body)
                texts = [row[0]["document"]["text"] for row in answer.raise_for_status().json()["result"]]
                answers.append((answer.json()["generation"], *("another" in text for text in texts)))

    with running_server(index, "--watch_seconds", "0.1") as server:
        before = generation(server.url)
        threads = [threading.Thread(target=ask, args=[server.url]) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) > 10)
        after = build_other_index(tmp_path)
        wait_until(lambda: generation(server.url) == after)
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 10 or not any(thread.is_alive() for thread in threads))
        stop.set()
        for thread in threads:
            thread.join(timeout=20)
    assert set(answers) == {(before, False, False), (after, True, True)}


def test_what_is_no_index_takes_nobodys_place(tmp_path):
    index = build_small_index(tmp_path)
    with running_server(index, "--watch_seconds", "0.05") as server:
        before = generation(server.url)
        (index / "manifest.json").write_text("{}")
        time.sleep(0.5)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert generation(server.url) == before
        assert httpx.post(f"{server.url}/retrieve", json={"queries": ["fox"]}, timeout=60).status_code == 200


@pytest.mark.slow
def test_workers_share_the_port_are_replaced_and_swap_together(tmp_path):
    index = build_small_index(tmp_path)
    (tmp_path / "token").write_text("t")
    options = ["--workers", "2", "--watch_seconds", "0", "--token_file", str(tmp_path / "token")]
    headers = {"Authorization": "Bearer t"}

    def serve(url: str, name: str) -> bool:
        """Return whether two workers say that they serve this generation."""
        try:
            text = httpx.get(f"{url}/metrics", headers=headers, timeout=60).text
        except httpx.TransportError:
            return False
        return f'sleuth_generation{{backend="default",generation="{name}"}} 2.0' in text

    with running_server(index, *options) as server:
        before = generation(server.url)
        wait_until(lambda: serve(server.url, before))
        first = workers_of(server.process.pid)[0]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in workers_of(server.process.pid))
        wait_until(lambda: len(workers_of(server.process.pid)) == 2 and serve(server.url, before))
        after = build_other_index(tmp_path)
        answer = httpx.post(f"{server.url}/admin/reload", headers=headers, timeout=60)
        assert answer.json() == {"swapped": True, "generations": {"default": after}}
        wait_until(lambda: serve(server.url, after))
        living = workers_of(server.process.pid)
        assert server.stop() == 0
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in living))


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
