"""A weak encoder for the closed loop's proof."""

from __future__ import annotations

from pathlib import Path


def mean_pooled(name: str, out: Path) -> Path:
    """Return the folder of a sentence-transformers model: the mean of the token vectors of any BERT."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    if not out.exists():
        bert = Transformer(name)
        pooled = [bert, Pooling(bert.get_embedding_dimension()), Normalize()]
        SentenceTransformer(modules=pooled, device="cpu").save(str(out))
    return out
