"""Counts of each term in each passage, block by block on disk, so that a killed run goes on."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import numpy as np

from data.corpus import Corpus, hash_text
from data.machine.processes import in_processes
from retriever_server.indexes.analyzers import Analyzer
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.shards import Progress, silent

BLOCK_BYTES = 1 << 24
"""Bytes of the corpus counted in memory at once: about 200 MB."""
_TOLD = 500
"""Passages after which the progress is told."""


@dataclass(frozen=True)
class TermCounts:
    """The counts of a corpus: of block i the files i.words.npy, i.lengths.npy, and i.counts.npy last."""

    folder: Path
    spans: list[range]
    """Passages of each block."""
    words: np.ndarray
    """(V,) hashes of the terms, ascending."""
    lengths: np.ndarray
    """(P,) tokens of each passage."""

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield term (a row of `words`), passage and how often, by term and then passage.   (N,) each"""
        for number, span in enumerate(self.spans):
            row_of = np.searchsorted(self.words, np.load(_file(self.folder, number, "words")))
            keys, occurrences = np.load(_file(self.folder, number, "counts"))
            yield row_of[keys >> 32], (keys & 0xFFFFFFFF).astype(np.int64) + span.start, occurrences

    def document_frequencies(self) -> np.ndarray:
        """Count the passages that each term stands in.   (V,)"""
        size = len(self.words)
        return sum((np.bincount(terms, minlength=size) for terms, _, _ in self.blocks()), np.zeros(size, int))


def count_terms(
    folder: Path,
    corpus: Corpus,
    analyze: Analyzer,
    title_boost: int,
    progress: Progress = silent,
    processes: int = 1,
) -> TermCounts:
    """Count title (`title_boost` times) and text of all passages; blocks that lie in `folder` are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, BLOCK_BYTES * len(corpus) // max(1, Path(corpus.path).stat().st_size))
    spans = [range(start, min(start + size, len(corpus))) for start in range(0, len(corpus), size)]
    missing = {i: span for i, span in enumerate(spans) if not _file(folder, i, "counts").exists()}
    counting = _Counting(folder, corpus, analyze, title_boost, missing)
    with closing(in_processes(counting, min(processes, len(missing)) or 1, "counting")) as done:
        for _ in progress(chain.from_iterable(map(range, done)), sum(map(len, missing.values()))):
            pass
    words, lengths = (
        np.concatenate([np.load(_file(folder, i, name)) for i in range(len(spans))])
        for name in ("words", "lengths")
    )
    return TermCounts(folder, spans, np.unique(words), lengths.astype(np.int64))


@dataclass(frozen=True)
class _Counting:
    """Blocks to count; goes to other processes."""

    folder: Path
    corpus: Corpus
    analyze: Analyzer
    title_boost: int
    missing: dict[int, range]

    def share(self, first: int, step: int) -> Iterator[int]:
        """Write every `step`-th of the missing blocks; yields how many passages were read since the last."""
        for number, span in islice(self.missing.items(), first, None, step):
            yield from self._write(number, span)

    def _write(self, number: int, span: range) -> Iterator[int]:
        vocabulary: defaultdict[str, int] = defaultdict(count().__next__)
        lengths, tokens = array("I"), array("I")
        for at in span:
            passage = self.corpus[at]
            words = self.analyze(passage.title) * self.title_boost + self.analyze(passage.text)
            tokens.extend(map(vocabulary.__getitem__, words))
            lengths.append(len(words))
            if len(lengths) % _TOLD == 0:
                yield _TOLD
        hashes = np.fromiter(map(hash_text, vocabulary), np.uint64, len(vocabulary))
        hashes, row_of = np.unique(hashes, return_inverse=True)
        terms = row_of.astype(np.uint64)[np.array(tokens, np.int64)]
        passages = np.repeat(np.arange(len(lengths), dtype=np.uint64), np.array(lengths, np.int64))
        keys, occurrences = np.unique(terms << np.uint64(32) | passages, return_counts=True)
        counts = np.stack([keys, occurrences.astype(np.uint64)])
        arrays = {"words": hashes, "lengths": np.array(lengths, np.int32), "counts": counts}
        for name, each in arrays.items():
            save_array(_file(self.folder, number, name), each)
        yield len(lengths) % _TOLD


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:05d}.{name}.npy"
