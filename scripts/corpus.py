"""`sleuth corpus`: a folder of documents in, the passages of a corpus out."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Any, Literal

from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.text import counted
from scripts.console import bar

logger = logging.getLogger(__name__)


def main(
    source: str, out: str, words: int = 100, overlap: int = 0, on_error: Literal["stop", "skip"] = "stop"
) -> None:
    """Cut text, Markdown, HTML, PDF files or Wikipedia dumps into the passages of a corpus.

    A table (.csv, .tsv, .parquet, .feather, .json), a folder that `datasets` saved and a test collection of
    BEIR's, BRIGHT's or ViDoRe's form give their passages as they are, one of SQuAD's own files its
    paragraphs; ViDoRe's pictures go into the folder `images` beside --out.

    Args:
        source: A file, or a folder that is read with all its subfolders (other files are passed over); a
            corpus (.jsonl), whose passages are cut smaller; a table (.csv, .parquet, ...), a row a passage;
            FOLDER or FOLDER:DOMAIN of a test collection.
        out: JSON lines file to write; one that exists is replaced when all is done.
        words: About how many words a passage has; it ends with a sentence.
        overlap: About how many words a passage repeats of the one before, in whole sentences.
        on_error: What to do with a file that cannot be read: stop, or skip it and say so.
    """
    from data.formats.documents import DUMPS, READERS, find_files, reason_without_text

    if (whole := _whole_passages(source, Path(out).parent)) is not None:
        write_jsonl(out, whole)
        print(f"the passages of {source} are in {out}")
        return
    if not 0 <= overlap < words:
        raise ConfigError(f"words = {words}, overlap = {overlap}: must be 0 <= overlap < words")
    files, root = find_files(Path(source), (*READERS, *DUMPS))
    counts = {"passages": 0, "skipped": 0}
    without: dict[str, list[Path]] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for path, open_file in _with_bar(files):
            try:
                before = counts["passages"]
                for row in _passages(path, root, words, overlap, open_file):
                    counts["passages"] += 1
                    yield row
                if counts["passages"] == before:
                    without.setdefault(reason_without_text(path), []).append(path)
            except DataError as error:
                if on_error == "stop":
                    raise DataError(f"{error} (--on_error skip leaves such files out)") from error
                counts["skipped"] += 1
                logger.warning("skipped: %s", error)
        if not counts["passages"]:
            raise DataError(
                f"source = {source}: no text in {counted(len(files), 'file')}{_left_out(without)}"
            )

    write_jsonl(out, rows())
    skipped = f", {counted(counts['skipped'], 'file')} skipped" if counts["skipped"] else ""
    made = f"{counted(counts['passages'], 'passage')} from {counted(len(files), 'file')}"
    print(f"{made} in {out}{skipped}{_left_out(without)}")


def _whole_passages(source: str, folder: Path) -> Iterable[dict[str, Any]] | None:
    """Return the passages of what is cut into them already, as lines of a corpus in `folder`; else None."""
    from data.formats.benchmarks import benchmark_passages, is_benchmark
    from data.formats.documents import is_table, table_passages
    from data.formats.tables import is_squad_file, read_squad, saved_files

    if is_squad_file(Path(source)):
        return read_squad(Path(source)).passages or None
    tables = [Path(source)] if is_table(Path(source)) else [*chain(*saved_files(Path(source)).values())]
    if tables:
        return chain.from_iterable(table_passages(table, folder) for table in tables)
    return benchmark_passages(source, folder) if is_benchmark(source) else None


def _left_out(without: dict[str, list[Path]]) -> str:
    """Return how many files gave no passage, and why."""
    reasons = (f"{len(paths):,} {reason} (such as {paths[0].name})" for reason, paths in without.items())
    return (
        f"; {counted(sum(map(len, without.values())), 'file')} gave nothing: {', '.join(reasons)}"
        if without
        else ""
    )


def _passages(path: Path, root: Path, words: int, overlap: int, open_file: Any) -> Iterator[dict[str, Any]]:
    from data.formats.documents import passages_of

    passages = passages_of(path, root, words, overlap, open_file)
    # A file that breaks half-way gives nothing; a dump is too large to wait for its end.
    return passages if ".xml" in path.suffixes else iter(list(passages))


def _with_bar(files: list[Path]) -> Iterator[tuple[Path, Callable[[Path], IO[bytes]]]]:
    """Each file and what opens it, while a bar shows how many bytes of all have been read."""
    sizes = [path.stat().st_size for path in files]
    with bar("reading files", sum(sizes), unit="bytes") as move:
        for path, begin in zip(files, accumulate(sizes, initial=0), strict=False):
            move(begin)
            yield path, partial(_opened, begin, move)
        move(sum(sizes))


def _opened(begin: int, move: Callable[[int], None], path: Path) -> IO[bytes]:
    """The open file, which tells with each read how far it is."""

    class Watched(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            count = super().readinto(buffer)
            move(begin + self.tell())
            return count

    return io.BufferedReader(Watched(path))
