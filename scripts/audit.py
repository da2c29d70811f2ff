"""`sleuth audit`: which questions can be answered from a corpus at all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data.errors import require
from data.questions import load_questions
from data.text import counted
from scripts.console import show_table, track


def main(
    questions: str,
    corpus: Path,
    split: str | None = None,
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None,
    out: Path | None = None,
) -> None:
    """Show the share of questions whose answer stands in a passage of the corpus, by set and by kind.

    What no passage says cannot be searched for: trained on, such questions teach guessing. Answers that are
    yes or no can be found anywhere and are counted apart.

    Args:
        questions: JSONL, parquet, folder or name; several separated by commas.
        corpus: JSON lines of passages, or the folder of an index.
        split: Split of the questions, where there are several.
        normalizer: Normal form of answers: squad, or unicode for scripts without spaces; none: as each
            question's metadata say, else squad.
        out: Folder for answerable.jsonl, unanswerable.jsonl and audit.json.
    """
    from data.metrics.answerability import answerable, audit, show_rows, write_audit
    from retriever_server.indexes.open_corpus import corpus_of

    require(out is None or out.is_dir() or not out.exists(), "out", str(out), "a folder, not a file")
    asked = load_questions(questions, split, normalizer=normalizer)
    read = corpus_of(corpus)
    found = answerable(asked, track("reading the corpus")(read, len(read)))
    audited = audit(asked, found)
    columns, rows = show_rows(audited)
    show_table(f"{counted(len(read), 'passage')} of {corpus}", columns, rows)
    if out:
        write_audit(out, asked, found, audited)
