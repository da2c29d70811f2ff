"""Several corpora as one, without the passages that were deleted from them."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np

from data.corpus import Corpus
from data.records import Passage


class JoinedCorpus(Corpus):
    """The passages of several corpora in order; a position counts those that are not deleted.

    No two passages that are left may share an id.
    """

    def __init__(self, parts: Sequence[Corpus], deleted: np.ndarray) -> None:
        """deleted: rows, which are places among the passages of all parts; ascending."""
        self._parts, self.path, self.index_folder = tuple(parts), parts[0].path, None
        self._made_from: Any = parts, deleted
        self._starts = np.cumsum([0, *map(len, parts)])
        self.alive = np.ones(self._starts[-1], bool)
        """Whether each row is not deleted. (R,)"""
        self.alive[deleted] = False
        self.rows = np.flatnonzero(self.alive).astype(np.int32) if len(deleted) else None
        self.content_hash = join_hashes([part.content_hash for part in parts], deleted)

    @property
    def parts(self) -> Sequence[Corpus]:
        """As `Corpus.parts`."""
        return self._parts

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedCorpus, self._made_from

    def __len__(self) -> int:
        return len(self.alive) if self.rows is None else len(self.rows)

    def __getitem__(self, position: SupportsIndex) -> Passage:
        """As `Corpus.__getitem__`."""
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)} in {self.path} and what was added")
        row = position if self.rows is None else int(self.rows[position])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part][row - int(self._starts[part])]

    def position_of(self, passage_id: str) -> int | None:
        """As `Corpus.position_of`."""
        for part, start in zip(self.parts, self._starts.tolist(), strict=False):
            if (at := part.position_of(passage_id)) is not None and self.alive[start + at]:
                return int(self.positions_of_rows(np.array([start + at]))[0])
        return None

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """As `Corpus.positions`."""
        found = np.full(len(ids), -1, np.int64)
        for part, start in zip(self.parts, self._starts.tolist(), strict=False):
            at = part.positions(ids)
            known = np.flatnonzero(at >= 0)
            known = known[self.alive[start + at[known]]]
            found[known] = self.positions_of_rows(start + at[known])
        return found

    def positions_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of rows that are not deleted."""
        return rows if self.rows is None else np.searchsorted(self.rows, rows)

    def places(self) -> np.ndarray:
        """Return the position of each row, -1 if it was deleted.   (R,)"""
        return np.where(self.alive, np.cumsum(self.alive) - 1, -1)

    def spans(self) -> list[slice]:
        """Return the rows of each part."""
        return [slice(*each) for each in pairwise(self._starts.tolist())]


def join_hashes(hashes: Sequence[str], deleted: np.ndarray) -> str:
    """Return the content hash of joined corpora."""
    digest = hashlib.sha256(" ".join(hashes).encode())
    digest.update(np.asarray(deleted, np.int64).tobytes())
    return digest.hexdigest()[:16]
