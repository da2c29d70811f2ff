"""`sleuth expand`: a corpus in, the same with what a generator adds to each passage out."""

from __future__ import annotations

from typing import Any

from scripts.console import track


def main(corpus: str, out: str, generator: dict[str, Any], passages_at_once: int = 32) -> None:
    """Expand the passages of a corpus once, for sparse retrievers. Killed, it goes on when started again.

    The expansion is kept in the metadata of a passage, whose text stays as it was; `passage_template`
    "{title}\\n{text} {expansion}" puts it before an encoder.

    Args:
        corpus: JSON lines of passages, or the folder of an index.
        out: File for the expanded ones.
        generator: class_path and init_args of what is called with passages and gives a text for each, such
            as {class_path: retriever_server.training.expansion.Seq2SeqQueries, init_args: {model: NAME}}.
        passages_at_once: How many the generator is given in one call.
    """
    from retriever_server.indexes.open_corpus import corpus_of
    from retriever_server.open_retriever import READER
    from retriever_server.training.expansion import Generator, expand

    generate = READER.plan(generator, (Generator,), "generator: ")
    settings = {"generator": generator}
    expand(corpus_of(corpus), generate(), out, passages_at_once, track("expanding passages"), settings)
    print(f"expanded passages in {out}")
