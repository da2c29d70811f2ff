"""A disk that fills up during a build: one line, the old index still there, what was encoded kept."""

import random
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.errors import StorageError
from data.jsonl import write_jsonl
from retriever_server.indexes.ann import AnnIndex
from retriever_server.indexes.base import open_index, verify_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.inverted import InvertedIndex
from retriever_server.indexes.maxsim import MaxSimIndex
from scripts.__main__ import main
from tests.processes import Forked
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder
from tests.samples import quick

DISK_BYTES = 8 << 20


@contextmanager
def files_of_at_most(size: int):
    """No file of this process may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path):
    """A small disk, where this user may mount one."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(tmp_path / "disk")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def leave_free(disk: Path, size: int) -> None:
    """Fill the disk up to `size` bytes."""
    with open(disk / "filler", "wb") as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - size))


def make_corpus(path: Path, count: int, longest: int = 8) -> Corpus:
    """Passages of the words of the fake encoder, those at the end longer."""
    rng = random.Random(count)
    texts = [" ".join(rng.choices(WORDS, k=1 + i * longest // count)) for i in range(count)]
    write_jsonl(path, [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)])
    return Corpus(path)


def build(corpus: Path, out: Path, limit: int | None) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(["index", f"--corpus={corpus}", f"--out={out}", "--overwrite=true"]))


def index(corpus: Path, out: Path, limit: int | None = None) -> tuple[int, list[str]]:
    """Exit status and lines of errors of `sleuth index`, in a process with files of at most `limit`."""
    process = Forked(build, corpus, out, limit)
    _, said = process.communicate(timeout=120)
    assert process.returncode is not None
    return process.returncode, said.splitlines()


def assert_one_line_and_the_old_index(done, out: Path, generation: str) -> None:
    status, said = done
    assert status == 2, said
    assert [line for line in said if line.startswith("sleuth: ")] == said
    assert any(f"{out}: the index could not be written" in line for line in said)
    assert verify_index(out).generation == open_index(out).generation == generation
    left = {path.name.partition("-")[0] for path in out.parent.glob(".*")}
    assert left <= {".index.counting"}  # with them the build goes on


def test_sleuth_index_with_files_that_may_not_grow(tmp_path):
    make_corpus(tmp_path / "large.jsonl", 3000)
    old = BM25Index.build(make_corpus(tmp_path / "small.jsonl", 10), tmp_path / "out/index")
    done = index(tmp_path / "large.jsonl", tmp_path / "out/index", limit=20_000)
    assert_one_line_and_the_old_index(done, tmp_path / "out/index", old.generation)


@pytest.mark.parametrize("free", quick([100_000], [0, 100_000, 2_400_000]))
def test_sleuth_index_on_a_disk_that_is_full(tmp_path, disk, free):
    """At its first file, at what is counted on the way, at the postings."""
    make_corpus(tmp_path / "large.jsonl", 30_000)
    old = BM25Index.build(make_corpus(tmp_path / "small.jsonl", 10), disk / "out/index")
    leave_free(disk, free)
    done = index(tmp_path / "large.jsonl", disk / "out/index")
    assert_one_line_and_the_old_index(done, disk / "out/index", old.generation)
    (disk / "filler").unlink()
    assert index(tmp_path / "large.jsonl", disk / "out/index")[0] == 0


@pytest.mark.parametrize(("kind", "limit"), [(AnnIndex, 2000), (InvertedIndex, 2000), (MaxSimIndex, 12_000)])
def test_what_was_encoded_is_kept(tmp_path, kind, limit):
    """The first shards fit, the last do not; or they do, and what is made of them does not."""
    corpus, out = make_corpus(tmp_path / "c.jsonl", 100, 40), tmp_path / "index"
    encoder = FakeEncoder(kind.vectors)
    with pytest.raises(StorageError, match=r"could not be written"), files_of_at_most(limit):
        kind.build(corpus, out, encoder, passages_per_shard=20)
    shards, _ = kind.plan(corpus, out, encoder, "float16", 20)
    done = [shard for shard in range(5) if shard not in shards.missing()]
    assert done and not out.exists()
    encoded, encoder.encoded = encoder.encoded, 0
    found = kind.build(corpus, out, encoder, passages_per_shard=20)
    assert encoded >= 20 * len(done) and encoder.encoded == 20 * (5 - len(done)) + 4
    whole = kind.build(corpus, tmp_path / "whole", FakeEncoder(kind.vectors), passages_per_shard=20)
    assert found.manifest.checksums == whole.manifest.checksums
