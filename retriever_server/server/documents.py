"""Look up documents of a corpus by the id of a passage, or by the url in the metadata of its passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.columns import load_columns
from data.records import Passage
from retriever_server.filters import one_of

if TYPE_CHECKING:
    from data.corpus import Corpus


def is_url(place: str) -> bool:
    """Whether it may name passages by the url in their metadata."""
    return "://" in place


def find_documents(corpus: Corpus, places: Sequence[str]) -> list[Passage | None]:
    """Return the document at each place: a passage by its id, or all passages of a url in one.

    None where there is none: nothing outside the corpus is ever looked for.
    """
    documents = {place: corpus.get(place) for place in places}
    urls = [place for place, found in documents.items() if found is None and is_url(place)]
    parts: dict[str, list[Passage]] = {url: [] for url in urls}
    positions = load_columns(corpus).result().positions("url", one_of(urls)) if urls else ()
    for position in sorted(set(map(int, positions))):
        passage = corpus[position]
        if isinstance(url := passage.metadata["url"], str):
            parts[url].append(passage)
    for url, found in parts.items():
        if found:
            text = "\n".join(part.text for part in found)
            documents[url] = Passage(found[0].id, text, found[0].title, found[0].metadata)
    return [documents[place] for place in places]
