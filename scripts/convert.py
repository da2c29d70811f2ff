"""`sleuth convert`: training data of other projects into ours, and ours into theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from data.text import counted
from scripts.console import track

Format = Literal[
    "sleuth",
    "tevatron",
    "tevatron-v2",
    "bge",
    "sentence-transformers",
    "beir",
    "vidore",
    "dpr",
    "msmarco",
    "labelled",
    "questions",
]


def main(
    source: str,
    out: str,
    source_format: Format = "sleuth",
    target_format: Format = "sleuth",
    corpus: str | None = None,
    split: str = "train",
    on_error: Literal["stop", "skip"] = "stop",
) -> None:
    """Convert queries with their good and bad passages: other formats into ours, ours into others.

    Args:
        source: File or folder. Ours is a file of JSON lines of ids, beside its --corpus.
        out: Into ours: folder for examples.jsonl and corpus.jsonl. Into others: file or folder.
        source_format: What `source` is; sentence-transformers also reads plain pairs (.csv, .tsv, .jsonl).
        target_format: What to write.
        corpus: Passages that the source refers to; without it they are written from the source.
        split: beir, vidore: which qrels; of vidore it is mostly test.
        on_error: stop, or skip: leave out and count examples that are wrong (no positive, dangling ids).
    """
    if (source_format == "sleuth") == (target_format == "sleuth"):
        raise ConfigError(
            f"--source_format {source_format} --target_format {target_format}: "
            "one of them must be sleuth, and not both"
        )
    if target_format != "sleuth":
        _to(target_format, source, out, corpus, on_error)
        return
    from retriever_server.training.convert import convert_from

    done = convert_from(source_format, source, out, corpus, split, on_error, track("reading examples"))
    left_out = [f"{count:,} {what}" for what, count in done.left_out.items() if count]
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    passages = counted(len(done.corpus), "passage")
    print(f"{counted(done.count, 'example')} in {done.examples}, {passages}{note}")


def _to(target_format: str, source: str, out: str, corpus: str | None, on_error: Any) -> None:
    from data.examples import Examples
    from retriever_server.indexes.open_corpus import corpus_of
    from retriever_server.training.convert import convert_to

    beside = Path(source).with_name("corpus.jsonl")
    if corpus is None and not beside.exists():
        raise ConfigError(f"--corpus: must be given, as there is no {beside}")
    examples = Examples(source, corpus_of(corpus or beside), on_error)
    convert_to(target_format, examples, out)
    print(f"{counted(len(examples), 'example')} in {out}")
