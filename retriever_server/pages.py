"""The pages of a corpus, by the id of a passage or by the url in the metadata of one or more passages."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from data.corpus import Corpus
from data.records import Passage


class Pages:
    """`get("7")` is passage 7; `get("https://...")` all passages of that url as one."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def get(self, place: str) -> Passage | None:
        """The page, or None: nothing outside the corpus is ever looked for.

        The first url reads the whole corpus once (about 10 s a million passages).
        """
        if (passage := self._corpus.get(place)) is not None or "://" not in place:
            return passage
        hashes, positions = self._urls
        first, last = np.searchsorted(hashes, _hash(place)), np.searchsorted(hashes, _hash(place), "right")
        parts = [self._corpus[int(at)] for at in positions[first:last]]
        parts = [part for part in parts if part.metadata["url"] == place]
        if not parts:
            return None
        text = "\n".join(part.text for part in parts)
        return Passage(parts[0].id, text, parts[0].title, parts[0].metadata)

    @cached_property
    def _urls(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of all urls, and the position of the passage of each.   (U,), (U,)"""
        found = [
            (_hash(str(url)), position)
            for position, passage in enumerate(self._corpus)
            if (url := passage.metadata.get("url"))
        ]
        table = np.array(found, dtype=np.uint64).reshape(-1, 2)
        order = np.argsort(table[:, 0], kind="stable")  # passages of one url stay in their order
        return table[order, 0], table[order, 1]


def _hash(url: str) -> np.uint64:
    digest = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest))
