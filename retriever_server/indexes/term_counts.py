"""Counts of each term in each passage, in blocks that go to disk one by one."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.records import Passage
from retriever_server.indexes.checksums import save_array

BLOCK_TOKENS = 1 << 22
"""Tokens counted in memory at once: about 150 MB."""


@dataclass(frozen=True)
class TermCounts:
    """The counts of a corpus; its blocks lie in a folder that goes when they have been used."""

    vocabulary: dict[str, int]
    """Term -> number, in the order of appearance."""
    lengths: np.ndarray
    """(P,) tokens of each passage."""
    files: list[Path]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Term, passage and how often, sorted by term and then passage; later blocks hold later passages."""
        for file in self.files:
            keys, occurrences = np.load(file)
            yield (keys >> 32).astype(np.int64), (keys & 0xFFFFFFFF).astype(np.int64), occurrences

    def document_frequencies(self) -> np.ndarray:
        """In how many passages each term stands.   (V,)"""
        size = len(self.vocabulary)
        return sum((np.bincount(terms, minlength=size) for terms, _, _ in self.blocks()), np.zeros(size, int))


@contextmanager
def count_terms(
    folder: Path, passages: Iterable[Passage], analyze: Callable[[str], list[str]], title_boost: int
) -> Iterator[TermCounts]:
    """Count title (`title_boost` times) and text of all passages; blocks lie in `folder` until the end."""
    vocabulary: dict[str, int] = {}
    lengths, tokens, files = array("I"), array("I"), []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def close_block() -> None:
            files.append(Path(scratch) / f"{len(files)}.npy")
            _write_block(files[-1], tokens, lengths)
            del tokens[:]

        for passage in passages:
            words = analyze(passage.title) * title_boost + analyze(passage.text)
            tokens.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
            lengths.append(len(words))
            if len(tokens) >= BLOCK_TOKENS:
                close_block()
        close_block()
        yield TermCounts(vocabulary, np.array(lengths, np.int64), files)


def lucene_length(lengths: np.ndarray) -> np.ndarray:
    """Return the lengths that Lucene reads back from the byte it keeps of each: exact below 40.

    Above, 24 + what the four leading bits of length - 24 hold (Lucene's SmallFloat.intToByte4).
    100 -> 96, 1000 -> 984
    """
    above = np.maximum(lengths - 24, 1)
    dropped_bits = np.maximum(np.floor(np.log2(above)).astype(np.int64) - 3, 0)
    return np.where(lengths < 40, lengths, 24 + (above >> dropped_bits << dropped_bits))


def _write_block(file: Path, tokens: array, lengths: array) -> None:
    """Return the counts of the last passages, those that `tokens` are of."""
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    first = int(np.searchsorted(ends, ends[-1] - len(tokens), side="right")) if len(ends) else 0
    passages = np.repeat(np.arange(first, len(sizes), dtype=np.uint64), sizes[first:])
    terms = np.array(tokens, np.uint64)
    keys, occurrences = np.unique(terms << np.uint64(32) | passages, return_counts=True)
    save_array(file, np.stack([keys, occurrences.astype(np.uint64)]))
