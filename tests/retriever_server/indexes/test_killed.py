"""SIGKILL at random moments: to whoever builds an index, to whoever serves it, in the middle of a swap."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from data.errors import ConfigError
from data.jsonl import write_jsonl
from retriever_server.indexes import term_counts
from retriever_server.indexes.base import open_index, verify_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.encoded import EncodedIndex
from scripts.__main__ import main
from tests.processes import Forked
from tests.retriever_server.running import (
    NUMBERED,
    build_numbered_index,
    checked_number,
    running_server,
)
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder, tiny_model

IDS = list(range(NUMBERED))
PATIENCE_SECONDS = 600


def build_on_and_on(folder: Path, log: Path, first: int) -> None:
    for number in range(first, 10**9):
        built = build_numbered_index(folder, number)
        with log.open("a") as file:
            print(number, built, file=file, flush=True)


class Builder:
    """A process that replaces an index without a pause; its generations go to a log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "built"
        self.log.touch()

    def built(self) -> dict[str, int]:
        """Generation -> number."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return {line[1]: int(line[0]) for line in lines if len(line) == 2}

    def start(self) -> None:
        known = self.built()
        self.process = Forked(build_on_and_on, self.folder, self.log, len(known) + 1)
        wait_until(lambda: len(self.built()) > len(known))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)


class Clients(threading.Thread):
    """Asks for every passage, on and on; what is answered is of one generation and right."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.numbers, self.trouble = url, {}, None
        self.stopped, self.server_is_down = threading.Event(), threading.Event()

    def stop(self, *_) -> None:
        self.stopped.set()
        self.join(timeout=PATIENCE_SECONDS)

    def run(self) -> None:
        while not self.stopped.is_set() and self.trouble is None:
            try:
                self.ask()
            except httpx.TransportError as error:
                if not self.server_is_down.is_set():
                    self.trouble = error
            except Exception as error:
                self.trouble = error

    def ask(self) -> str:
        """The generation of one answer."""
        body = {"queries": [f"w{i}" for i in IDS], "top_k": 1}
        answer = httpx.post(f"{self.url}/v1/search", json=body, timeout=PATIENCE_SECONDS)
        generation, number = checked_number(answer.raise_for_status().json(), IDS)
        assert self.numbers.setdefault(generation, number) == number
        return generation


def wait_until(condition, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def whole_generation(folder: Path) -> str:
    """The generation at `folder`/index, read to the last byte; what lies beside is whole or does not open."""
    for left in folder.glob(".index.building-*"):
        if not (left / "manifest.json").is_file():
            with pytest.raises(ConfigError, match=r"no such folder|no index: manifest.json"):
                open_index(left)
        else:
            verify_index(left)
    found = verify_index(folder / "index").generation
    hits = open_index(folder / "index").search([f"w{i}" for i in IDS], 1)
    assert [hit.passage.id for [hit] in hits] == list(map(str, IDS))
    assert {hit.generation for [hit] in hits} == {found}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_killed_during_swaps_builder_and_server_leave_the_old_or_the_new_generation(tmp_path, kills):
    rng, builder = random.Random(kills), Builder(tmp_path)
    options = ["--watch_seconds", "0.02"]
    build_numbered_index(tmp_path, 0)
    builder.start()
    with ExitStack() as servers:
        server = servers.enter_context(running_server(tmp_path / "index", *options))
        clients = Clients(server.url)
        servers.push(clients.stop)
        clients.start()
        for kill in range(kills):
            seen = len(clients.numbers)
            wait_until(lambda seen=seen: clients.trouble or len(clients.numbers) > seen + 2)
            time.sleep(rng.uniform(0, 0.3))
            if kill % 2 == 0:
                builder.kill()
                at_rest = whole_generation(tmp_path)
                wait_until(lambda now=at_rest: clients.ask() == now)
                builder.start()
            else:
                clients.server_is_down.set()
                server.process.kill()
                server.process.wait(timeout=20)
                server = servers.enter_context(running_server(tmp_path / "index", *options, port=server.port))
                clients.ask()
                clients.server_is_down.clear()
        builder.kill()
        clients.stop()
        whole_generation(tmp_path)
    assert clients.trouble is None
    built = builder.built()
    wrong = {name: number for name, number in clients.numbers.items() if built.get(name, number) != number}
    assert len(clients.numbers) > 2 * kills and wrong == {}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders at once")
def test_at_no_moment_is_there_no_index(tmp_path, monkeypatch):
    before, rename, there = build_numbered_index(tmp_path, 0), os.rename, []

    def rename_and_look(*paths) -> None:
        rename(*paths)
        there.append((tmp_path / "index").exists())

    monkeypatch.setattr(os, "rename", rename_and_look)
    assert build_numbered_index(tmp_path, 1) != before
    assert all(there) and open_index(tmp_path / "index").generation != before


def test_an_index_replaced_while_it_is_opened_is_not_mixed(tmp_path, monkeypatch):
    build_numbered_index(tmp_path, 1)
    open_files, opened = BM25Index.open, []

    def replace_and_open(path, manifest, corpus):
        if not opened:
            opened.append(manifest.generation)  # checked, and then:
            opened.append(build_numbered_index(tmp_path, 2))
        return open_files(path, manifest, corpus)

    monkeypatch.setattr(BM25Index, "open", replace_and_open)
    index = open_index(tmp_path / "index")
    assert opened[0] != opened[1] == index.generation
    assert index.search(["w7"], 1)[0][0].passage.text == "w7 of 2"


def test_what_killed_builds_left_goes_with_the_next(tmp_path):
    for name, file in ((".index.building-left", "terms.npy"), (".index.building-old", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"half")
    (tmp_path / ".index.lock").write_text("7 on a host that is no more\n")
    found = build_numbered_index(tmp_path, 1)
    assert verify_index(tmp_path / "index").generation == found
    assert list(tmp_path.glob(".index*")) == []


def test_a_killed_removal_leaves_no_index_with_missing_files(tmp_path, monkeypatch):
    build_numbered_index(tmp_path, 0)
    remove = shutil.rmtree

    def remove_others(path, **options) -> None:
        if ".index.building-" not in Path(path).name:  # there it is killed
            remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_others)
    build_numbered_index(tmp_path, 1)
    [left] = tmp_path.glob(".index.building-*")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        open_index(left)


class Slow(FakeEncoder):
    padded_tokens = real_tokens = 1
    images = 0

    def encode(self, texts, role):
        time.sleep(0.02)
        return super().encode(texts, role)


def index(argv: list[str]) -> None:
    from retriever_server.encoders import loading
    from retriever_server.indexes import encoded

    EncodedIndex.passages_per_shard, term_counts.BLOCK_BYTES = 100, 100_000
    if "--encoder=atlas" in argv:  # a name that is known, for the command looks first
        loading.load_encoder, encoded.resolve_device = (lambda *_, **__: Slow()), (lambda _: "cpu")
    sys.exit(main(["index", *argv]))


WHOLE = ("*.done", "*.counts.npy")


class Indexing:
    """`sleuth index` with small shards."""

    def __init__(self, corpus: Path, out: Path, options: list[str]) -> None:
        self.out = out
        self.argv = [f"--corpus={corpus}", f"--out={out}", *options]

    def begin(self) -> Forked:
        """Its process, once that has written something."""
        before, process = self.traces(), Forked(index, self.argv)
        wait_until(lambda: self.traces() != before or process.poll() is not None)
        return process

    def finish(self) -> float:
        """Seconds from its first file to its end."""
        process = self.begin()
        begun = time.monotonic()
        assert process.wait(timeout=PATIENCE_SECONDS) == 0
        return time.monotonic() - begun

    def traces(self) -> list[str]:
        beside = self.out.parent.glob(f".{self.out.name}.*")
        return sorted(str(path) for folder in beside for path in [folder, *folder.glob("*.done")])

    def shards_done(self) -> int:
        """Return how many shards or blocks are whole."""
        beside = self.out.parent
        return sum(1 for end in WHOLE for _ in beside.glob(f".{self.out.name}.*/{end}"))


@pytest.mark.parametrize(
    ("kind", "encoder", "kills"),
    [
        ("bm25", None, 1),
        pytest.param("flat", "atlas", 1, marks=pytest.mark.slow),
        pytest.param("bm25", None, 10, marks=pytest.mark.slow),
        pytest.param("inverted", "sparse", 10, marks=pytest.mark.slow),
        pytest.param("flat", "dense", 10, marks=pytest.mark.slow),
    ],
)
def test_sleuth_index_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, kind, encoder, kills):
    rng, corpus = random.Random(kills), tmp_path / "corpus.jsonl"
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(20_000 if encoder is None else 2000)]
    write_jsonl(corpus, [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    options = [f"--kind={kind}"]
    if encoder is not None:
        name = encoder if encoder == "atlas" else tiny_model(tmp_path / "model", encoder)
        options.append(f"--encoder={name}")
    whole = Indexing(corpus, tmp_path / "whole", options)
    seconds = whole.finish()
    killed = Indexing(corpus, tmp_path / "killed", options)
    killed_at, done = 0, 0
    while killed_at < kills:
        process = killed.begin()
        begun = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, seconds))
            seconds = time.monotonic() - begun  # done before: the machine is quicker now
        in_time = process.poll() is None
        process.kill()
        process.wait(timeout=20)
        killed_at += in_time
        if killed.out.exists():  # too late: all is done, from the beginning again
            assert verify_index(killed.out).checksums == verify_index(whole.out).checksums
            shutil.rmtree(killed.out)
            done = 0
        else:
            assert killed.shards_done() >= done  # nothing is lost
            done = killed.shards_done()
    killed.finish()
    assert verify_index(killed.out).checksums == verify_index(whole.out).checksums
    assert killed.traces() == []
