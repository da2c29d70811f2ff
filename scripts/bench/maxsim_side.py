"""One system of `scripts.bench.maxsim`, in a process and perhaps an interpreter of its own.

    PYTHON maxsim_side.py build SYSTEM FOLDER
    PYTHON maxsim_side.py serve SYSTEM FOLDER    # lines of JSON in, {"batch", "options"}; lines of JSON out

The other interpreter has none of our packages: what is ours is imported only where our index is.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

K = 10
Search = Callable[[Sequence[np.ndarray], dict[str, int]], list[list[str]]]


def save_multi(folder: Path, name: str, values: np.ndarray, offsets: np.ndarray) -> None:
    """Write the token vectors of texts.   (T, D), (N + 1,)"""
    np.save(folder / f"{name}-offsets.npy", offsets)
    np.save(folder / f"{name}-values.npy", values.astype(np.float32))


def load_multi(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what `save_multi` wrote, mapped."""
    return np.load(folder / f"{name}-values.npy", mmap_mode="r"), np.load(folder / f"{name}-offsets.npy")


def build(system: str, folder: Path) -> dict[str, Any]:
    """Build an index, unless it is there.   -> seconds, most megabytes of the process, bytes on disk"""
    place = folder / system
    noted = folder / f"{system}.json"
    if not noted.exists():
        build_one = (_plaid_builder if system == "fast-plaid" else _our_builder)(folder, place)
        start = time.perf_counter(), time.process_time()
        build_one()
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        made = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "bytes": size}
        noted.write_text(json.dumps(made))
    return json.loads(noted.read_text())


def serve(system: str, folder: Path) -> None:
    """Open an index and search all queries as often as a line asks for it."""
    search = (_open_plaid if system == "fast-plaid" else _open_ours)(folder, folder / system)
    _answer({})
    values, offsets = load_multi(folder, "queries")
    queries = np.split(np.array(values), offsets[1:-1])
    for line in sys.stdin:
        asked = json.loads(line)
        size, options, times, spent, found = asked["batch"], asked["options"], [], [], []
        search(queries[:size], options)  # warm
        for at in range(0, len(queries), size):
            start = time.perf_counter(), time.process_time()
            found += search(queries[at : at + size], options)
            times.append(1000 * (time.perf_counter() - start[0]))
            spent.append(1000 * (time.process_time() - start[1]))
        _answer(
            {
                "ms": times,
                "cpu_ms": spent,
                "found": found,
                "own_mb": _resident("Anon"),
                "mapped_mb": _resident("File"),
            }
        )


def _answer(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _resident(of: str) -> int:
    [kilobytes] = re.findall(rf"Rss{of}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) // 1024


def _encoder(folder: Path) -> Any:
    """Return an encoder of what is encoded already: a passage is its row."""
    from retriever_server.encoders.spec import Encoder, EncodingSpec, Multi

    values, offsets = load_multi(folder, "passages")

    class Given(Encoder):
        spec = EncodingSpec(
            "given", "multi", "given", values.shape[1], similarity="maxsim", passage_template="{title}"
        )

        def encode(self, inputs: Sequence[Any], role: Any) -> Multi:
            parts = [values[offsets[row] : offsets[row + 1]] for row in (int(str(each)) for each in inputs)]
            return Multi(np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))

    return Given()


def _our_builder(folder: Path, place: Path) -> Callable[[], Any]:
    from data.corpus import Corpus
    from retriever_server.indexes.maxsim import MaxSimIndex

    corpus, dtype = Corpus(folder / "passages.jsonl"), place.name.partition("-")[2]
    return lambda: MaxSimIndex.build(corpus, place, _encoder(folder), dtype)


def _open_ours(folder: Path, place: Path) -> Search:
    import torch

    from retriever_server.encoders.spec import Multi
    from retriever_server.indexes.base import open_index

    torch.set_num_threads(1)
    index: Any = open_index(place, encoder=_encoder(folder))

    def search(queries: Sequence[np.ndarray], options: dict[str, int]) -> list[list[str]]:
        index.candidates = options["candidates"]
        joined = Multi(np.concatenate(queries), np.cumsum([0, *map(len, queries)], dtype=np.int64))
        return [[str(position) for position in positions] for positions, _ in index.rank(joined, K)]

    return search


def _plaid_builder(folder: Path, place: Path) -> Callable[[], Any]:
    import torch
    from fast_plaid.search import FastPlaid  # pyright: ignore[reportMissingImports]  # of a peer, not ours

    torch.set_num_threads(1)
    values, offsets = load_multi(folder, "passages")
    passages = [torch.from_numpy(np.array(each)) for each in np.split(values, offsets[1:-1])]
    return lambda: FastPlaid(index=str(place), device="cpu").create(documents_embeddings=passages)


def _open_plaid(folder: Path, place: Path) -> Search:
    import torch
    from fast_plaid.search import FastPlaid  # pyright: ignore[reportMissingImports]  # of a peer, not ours

    torch.set_num_threads(1)
    index = FastPlaid(index=str(place), device="cpu")

    def search(queries: Sequence[np.ndarray], options: dict[str, int]) -> list[list[str]]:
        asked = [torch.from_numpy(each) for each in queries]
        found = index.search(queries_embeddings=asked, top_k=K, show_progress=False, n_processes=1, **options)
        return [[str(row) for row, _ in hits] for hits in found]

    return search


if __name__ == "__main__":
    _, what, system, folder = sys.argv
    if what == "build":
        _answer(build(system, Path(folder)))
    else:
        serve(system, Path(folder))
