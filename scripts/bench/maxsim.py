"""MaxSim beside fast-plaid, on the same token vectors, in one run and in turns, one thread each.

    python3.11 -m venv PEER && PEER/bin/pip install fast-plaid==1.7.0.290
    python -m scripts.bench.maxsim --corpus corpus.jsonl --questions questions.jsonl \
        --model MINILM_FOLDER --work runs/maxsim --peer_python PEER/bin/python

fast-plaid is built for an older torch than ours, so it runs in an interpreter of its own; without
`peer_python` ours is measured alone. The vectors are a dense model's token vectors, projected to `dimension`
by random orthogonal directions and normalised. Passages beyond the `encoded` first ones are made up: half of
the tokens of one of these, half of another, plus noise. Every system is a process of its own
(`maxsim_side.py`) that reads them from `work`, where all that is made is kept. Recall is that of the ten best
by exact MaxSim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.questions import load_questions
from data.text import markdown_table
from retriever_server.encoders.spec import Multi
from scripts.bench.indexes import NOISE, overlap
from scripts.bench.maxsim_side import K, load_multi, save_multi

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
_SIDE = Path(__file__).with_name("maxsim_side.py")


@dataclass
class Way:
    """One way to search: a system and how much of it is looked at; and what was measured."""

    system: str
    name: str
    options: dict[str, int]
    single_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_rates: list[float] = field(default_factory=list)
    recall: float = 0.0

    def row(self) -> list[str]:
        """Return the figures under WAY."""
        times = [*np.percentile(self.single_ms, [50, 95]), np.median(self.cpu_ms)]
        rates = [np.median(self.rates), np.median(self.cpu_rates)]
        return [self.name, *(f"{ms:.1f}" for ms in times), *(f"{r:.0f}" for r in rates), f"{self.recall:.3f}"]


SYSTEM = ("system", "build s", "of a processor", "build, most MB", "bytes on disk", "own MB", "mapped MB")
WAY = (
    *("way", "p50 ms", "p95 ms", "p50 ms of a processor"),
    *("queries/s, in batches", "queries a second of a processor", f"recall@{K}"),
)
OURS = [
    Way("ours-int8", "`maxsim`, int8, 256 candidates (default)", {"candidates": 256}),
    Way("ours-int8", "`maxsim`, int8, 1,024 candidates", {"candidates": 1024}),
    Way("ours-float16", "`maxsim`, float16, 256 candidates", {"candidates": 256}),
]
PLAID = [
    Way("fast-plaid", "fast-plaid, 4 bits, as it comes", {}),
    Way("fast-plaid", "fast-plaid, 1 cell a token, 256 scored", {"n_ivf_probe": 1, "n_full_scores": 256}),
    Way("fast-plaid", "fast-plaid, 32 cells, 8,192 scored", {"n_ivf_probe": 32, "n_full_scores": 8192}),
]


class Side:
    """A system in a process of its own, asked by lines of JSON."""

    def __init__(self, python: str, system: str, folder: Path) -> None:
        command = [python, "-P", str(_SIDE)]
        env = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(_SIDE.parents[2])}
        self.built = json.loads(
            subprocess.run([*command, "build", system, folder], env=env, check=True, stdout=subprocess.PIPE)
            .stdout.splitlines()[-1]
        )  # fmt: skip
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*command, "serve", system, folder], env=env, stdin=pipe, stdout=pipe
        )
        self._read()  # it is open

    def row(self) -> list[str]:
        """Return the figures of building under SYSTEM."""
        built = self.built
        return [
            f"{built['seconds']:.1f}",
            f"{built['cpu_seconds']:.1f}",
            f"{built['peak_mb']:,}",
            f"{built['bytes']:,}",
        ]

    def ask(self, batch: int, options: dict[str, int]) -> dict[str, Any]:
        """Search all queries, `batch` at a time.   -> ms of each batch, what was found, memory"""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"batch": batch, "options": options}).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        while line := self._process.stdout.readline():
            if line.startswith(b"{"):  # libraries may print, too
                return json.loads(line)
        raise SystemExit(f"{self._process.args}: ended early")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main(
    corpus: str,
    questions: str,
    model: str,
    work: str,
    peer_python: str | None = None,
    count: int = 6_000,
    encoded: int = 1_500,
    queries: int = 100,
    dimension: int = 128,
    batch: int = 64,
    rounds: int = 3,
) -> None:
    """Print two Markdown tables: of the systems, and of the ways to search them.

    encoded: so many passages of the corpus are encoded. rounds: every way is measured so often.
    """
    folder = Path(work) / f"{count}x{dimension}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "queries-values.npy").exists():
        make_vectors(folder, corpus, questions, model, count, encoded, queries, dimension)
    exact = exact_rankings(folder)
    tokens = load_multi(folder, "passages")[1][-1]
    print(f"{count:,} passages, {tokens:,} token vectors of {dimension}; {len(exact)} questions, first {K}\n")
    ways = [*OURS, *(PLAID if peer_python else [])]
    sides = {}
    for name in dict.fromkeys(way.system for way in ways):
        python = sys.executable if name.startswith("ours") else str(peer_python)
        sides[name] = Side(python, name, folder)
    memory = {
        name: measure(side, [way for way in ways if way.system == name], exact)
        for name, side in sides.items()
    }
    for _ in range(rounds):
        for way in ways:
            single, together = (sides[way.system].ask(size, way.options) for size in (1, batch))
            way.single_ms += single["ms"]
            way.cpu_ms += single["cpu_ms"]
            way.rates.append(1000 * len(exact) / sum(together["ms"]))
            way.cpu_rates.append(1000 * len(exact) / sum(together["cpu_ms"]))
    print(markdown_table(SYSTEM, [(name, *side.row(), *memory[name]) for name, side in sides.items()]))
    for side in sides.values():
        side.close()
    print(f"{batch} queries a batch\n\n{markdown_table(WAY, [way.row() for way in ways])}", end="")


def measure(side: Side, ways: Sequence[Way], exact: list[list[str]]) -> list[str]:
    """Search once by each way, as a warm-up: recall, and the memory held after the first."""
    first = None
    for way in ways:
        answer = side.ask(1, way.options)
        first = first or [f"{answer['own_mb']:,}", f"{answer['mapped_mb']:,}"]
        way.recall = overlap(answer["found"], exact)
    return first or []


def make_vectors(
    folder: Path,
    corpus: str,
    questions: str,
    model: str,
    count: int,
    encoded: int,
    queries: int,
    dimension: int,
) -> None:
    """Write passages.jsonl, whose titles are row numbers, and the token vectors of passages and queries."""
    from retriever_server.encoders.loading import load_encoder
    from scripts.bench.swap import save_multi as save_model

    save_model(model, str(folder / "model"), 0)
    encoder = load_encoder(str(folder / "model"), max_tokens=256)
    texts = [encoder.spec.render_text(passage) for passage in islice(Corpus(corpus), encoded)]
    asked = [question.text for question in islice(load_questions(questions), queries)]
    rng = np.random.default_rng(0)
    onto = np.linalg.qr(rng.standard_normal((encoder.spec.dimension, dimension)))[0].astype(np.float32)
    real = project(encoder.encode(texts, "passage"), onto)
    made_up = [mixture(real, rng) for _ in range(count - len(real))]
    passages = [*(real[i] for i in range(len(real))), *made_up]
    save_multi(folder, "passages", np.concatenate(passages), np.cumsum([0, *map(len, passages)]))
    found = project(encoder.encode(asked, "query"), onto)
    save_multi(folder, "queries", found.values, found.offsets)
    rows = ({"id": str(i), "title": str(i), "text": "passage"} for i in range(count))
    write_jsonl(folder / "passages.jsonl", rows)


def mixture(real: Multi, rng: np.random.Generator) -> np.ndarray:
    """Return the first half of a real passage's tokens and the second of another's, plus noise of NOISE."""
    one, other = (real[int(i)] for i in rng.integers(len(real), size=2))
    tokens = np.concatenate([one[: len(one) // 2], other[len(other) // 2 :]])
    noise = rng.standard_normal(tokens.shape, np.float32) * (NOISE / tokens.shape[1] ** 0.5)
    return normalise(tokens + noise)


def project(multi: Multi, onto: np.ndarray) -> Multi:
    """Project vectors and scale them to length 1.   of (T, D) -> of (T, dimension)"""
    return Multi(normalise(multi.values @ onto), multi.offsets)


def normalise(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact_rankings(folder: Path) -> list[list[str]]:
    """Return the ids of the best passages of each query by exact MaxSim of float32 vectors."""
    file = folder / "exact.npy"
    if not file.exists():
        (values, offsets), (asked, starts) = load_multi(folder, "passages"), load_multi(folder, "queries")
        best = []
        for start, end in pairwise(starts):
            scores = np.maximum.reduceat(values @ asked[start:end].T, offsets[:-1]).sum(1)
            best.append(np.argsort(-scores, kind="stable")[:K])
        np.save(file, np.array(best))
    return [[str(i) for i in row] for row in np.load(file)]


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
