"""Shared parts of the formats of training data: items read, and the texts of examples to write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.formats.rows import first_of, id_of, list_of, text_of
from data.records import Example, Passage, Qrels, Question

if TYPE_CHECKING:
    from data.corpus import Corpus
    from data.examples import Examples

Items = Iterator[tuple[str, Passage | Example]]
"""A place in a file, and a passage or an example. The passages of an example come at any time."""


@dataclass(frozen=True)
class Format:
    """A project's form of training data: its reader and its writer.

    read: of a file or folder, the split of its qrels, and the folder for images that come as bytes.
    """

    read: Callable[[Path, str, Path], Items]
    write: Callable[[Examples, Path], None] | None = None
    has_ids: bool = True
    """Ids of passages; without, they are told by their texts."""
    has_images: bool = False
    has_passages: bool = True
    """Without, its ids are those of a corpus that must be given."""


def items_of(
    place: str, query: Any, positives: Sequence[Passage], negatives: Sequence[Passage], **fields: Any
) -> Items:
    """The passages of an example, then the example; those without a text belong to none."""
    yield from ((place, passage) for passage in (*positives, *negatives))
    good, bad = (tuple(p.id for p in side if p.text or p.image) for side in (positives, negatives))
    yield place, Example(text_of(query, "query"), good, bad, **fields)


def judged_items(place: str, queries: Iterable[Question], qrels: Qrels) -> Items:
    """An example of each query that has judgements: what is relevant, and what is not."""
    for query in queries:
        if judged := qrels.get(query.id):
            good = tuple(id_ for id_, relevance in judged.items() if relevance > 0)
            bad = tuple(id_ for id_ in judged if judged[id_] <= 0)
            image = str(query.metadata.get("query_image") or "")
            example = Example(query.text, good, bad, None, query.id, query.gold_answers, query_image=image)
            yield f"{place}: query {query.id}", example


def passage_of(id_: Any, title: Any, text: Any, name: str = "id") -> Passage:
    """A passage by its id, or named by its text where it has none."""
    title, text = text_of(title, "title").strip(), text_of(text, "text").strip()
    return title_as_text(Passage(id_of(id_, name) or text_id(title, text), text, title))


def title_as_text(passage: Passage) -> Passage:
    """A passage of a title alone as one of a text."""
    return passage if passage.text else replace(passage, title="", text=passage.title)


def text_id(title: str, text: str) -> str:
    """The id of a passage that came without one: the same text, the same id."""
    content = f"{title}\n{text.strip()}".encode("utf-8", "surrogatepass")
    return "t" + hashlib.blake2b(content, digest_size=8).hexdigest()


def passages_in(value: Any, name: str, *ids: str) -> list[Passage]:
    """The passages in a list of objects {id, title, text} or of texts, or in one; `ids`: names of the id."""
    passages = []
    for each in [value] if isinstance(value, str) else list_of(value, name):
        row = {"text": each} if isinstance(each, str) else each
        if not isinstance(row, Mapping) or not {"text", "title"} & row.keys():
            raise ValueError(f'"{name}" must be texts or objects with "text", found {each!r:.40}')
        passages.append(passage_of(first_of(row, *ids), row.get("title"), row.get("text"), ids[0]))
    return passages


def query_ids(examples: Iterable[Example]) -> list[str]:
    """The query_id of each example; one without gets a name that no other has."""
    given = [example.query_id for example in examples]
    taken = set(given)
    names = []
    for number, id_ in enumerate(given):
        name = id_ or unnamed(number)
        while not id_ and name in taken:
            name += "'"
        names.append(name)
    return names


def unnamed(number: int) -> str:
    """The query_id of an example that came without one, counted from 0."""
    return f"row-{number}"


def passages_by_id(corpus: Corpus, ids: Iterable[str]) -> list[Passage]:
    """The passages of these ids."""
    return [passage for id_ in ids if (passage := corpus.get(id_))]


def one_text(passage: Passage) -> str:
    """Title and text, for formats without titles."""
    return f"{passage.title} {passage.text}".strip()
