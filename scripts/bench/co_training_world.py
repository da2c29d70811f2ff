"""A weak encoder, and what it learns before the closed loop's proof begins."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.questions import load_questions


def mean_pooled(name: str, out: Path) -> Path:
    """Return the folder of a sentence-transformers model: the mean of the token vectors of any BERT."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    if not out.exists():
        bert = Transformer(name)
        pooled = [bert, Pooling(bert.get_embedding_dimension()), Normalize()]
        SentenceTransformer(modules=pooled, device="cpu").save(str(out))
    return out


def plain_pairs(questions: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield what the first encoder learns: one step of a question of the plain world, and its passage.

    Every second query is the plain question, with its first passage, as the gate asks plain questions, too.
    """
    rng = random.Random(0)
    several = [q for q in load_questions(str(questions)) if q.metadata["kind"] != "comparison"]
    for number, question in enumerate(rng.sample(several, count)):
        path = list(zip(question.metadata["hops"], question.metadata["entities"], strict=True))
        name, passage = rng.choice(path) if number % 2 else ("", path[0][1])
        query = f"{question.text} [SEP] {name}" if name else question.text
        yield {"query_id": question.id, "query": query, "positives": [passage],
               "provenance": {"style": "question"}}  # fmt: skip
