"""Question sets from local files, folders and the Hugging Face hub, in one form and with ids that differ.

Read are our own rows {id, question, golden_answers, metadata} and Search-R1's {data_source, prompt, ability,
reward_model.ground_truth.target, extra_info}, whose index starts again in every set it was merged from.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError, first_line
from data.formats.answer_sets import SETS, common_row, set_names
from data.formats.rows import id_of, object_of
from data.formats.search_r1 import GOLD_KEYS, extra_of, gold_answers, question_text
from data.formats.squad import is_impossible
from data.formats.tables import KINDS, Rows, at, ending_of, read_rows, saved_files
from data.jsonl import check_is_file
from data.metrics.answers import NORMALIZERS
from data.records import Question

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class _Row:
    record: Mapping[str, Any]
    where: str
    number: int
    """Counted from 0 in its file or split."""
    set_name: str
    split: str

    @property
    def data_source(self) -> str:
        return str(self.record.get("data_source") or self.set_name)


def load_questions(
    source: str, split: str | None = None, limit: int | None = None, normalizer: str | None = None
) -> list[Question]:
    """The questions of one source, or of several with commas between them; at most `limit` in all.

    A source is a file (.jsonl, .json, .csv or .tsv, also with .gz, .parquet, .arrow or .feather), a folder of
    such files or one that `datasets` saved, a name of `data.formats.answer_sets` (nq, ..., search_r1), or a
    hub name such as "org/name" or "org/name:config". A .json file may be SQuAD's own; SQuAD 2.0's questions
    without an answer are left out.
    `split` chooses one: needed where a hub name or folder has several; of a file's rows those that name
    another are left out.

    A row's own id is kept where no other row has it. Otherwise, and where there is none, the id is
    "<data_source>/<split>/<id or extra_info.index or row>". It does not depend on `limit`.
    `normalizer`: how all of their answers are compared (`data.metrics.answers`), whatever their metadata say.
    Raises DataError "FILE:LINE: what is wrong", also for a row without a question or a gold answer.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: must be >= 1, or null for all")
    rows = [row for name in _source_names(source) for row in _read_source(name, split)]
    # All rows are parsed, so that ids and errors are the same with a limit and without.
    questions = [
        _parse_row(row, unique, normalizer) for row, unique in zip(rows, _unique_ids(rows), strict=True)
    ]
    return questions[:limit]


def _source_names(source: str) -> list[str]:
    if Path(source).expanduser().exists():
        return [source]
    given = [name.strip() for name in source.split(",") if name.strip()]
    names = [name for part in given for name in ([part] if Path(part).exists() else set_names(part))]
    if not names:
        raise ConfigError(f"questions = {source!r}: name a file, a folder or a data set of the hub")
    return names


def _read_source(name: str, split: str | None) -> list[_Row]:
    path = Path(name).expanduser()
    if path.is_dir():
        rows = list(_read_folder(path, split))
    elif path.exists() or not (name in SETS or _is_hub_name(name)):
        rows = list(_read_file(path, split))
    elif name in SETS:
        found = SETS[name]
        rows = [replace(row, set_name=name) for row in _read_hub(found.source, split or found.split, name)]
    else:
        rows = list(_read_hub(name, split))
    kept = [row for row in rows if split in (None, row.split)]
    if not kept:
        found = ", ".join(sorted({row.split for row in rows}))
        raise DataError(f"{name}: no row of split {split!r}, only of {found}" if rows else f"{name}: no rows")
    asked = [row for row in kept if not is_impossible(row.record)]
    if left := len(kept) - len(asked):
        logger.warning(
            "%s: %d of %d questions have no answer (SQuAD 2.0, MuSiQue): left out", name, left, len(kept)
        )
    return asked


def _is_hub_name(name: str) -> bool:
    looks_like_a_file = name.startswith(".") or ending_of(Path(name)) in KINDS
    return _HUB_NAME.fullmatch(name) is not None and not looks_like_a_file


def _read_file(path: Path, split: str | None) -> Iterator[_Row]:
    name = path.name.split(".")[0]  # a file that is named for a set is that set, else its folder names it
    set_name = name if name in SETS else path.resolve().parent.name or "questions"
    for number, (where, record) in enumerate(_rows_of(path)):
        with at(where):
            own = extra_of(record).get("split")
        yield _Row(record, where, number, set_name, str(own or split or path.name.split(".")[0]))


def _rows_of(path: Path) -> Rows:
    check_is_file(path)
    if ending_of(path) not in KINDS:
        raise DataError(
            f"{path}: unknown kind of file; {', '.join(KINDS)} are read, those of text also in .gz"
        )
    for place, row in read_rows(path):
        with at(place):
            common = dict(common_row(row))
        yield place, common


def _read_folder(path: Path, split: str | None) -> Iterator[_Row]:
    """The rows of a split of a folder; `datasets` has saved it, or says which files belong to it."""
    import datasets

    try:
        found = saved_files(path) or datasets.load_dataset_builder(str(path)).config.data_files or {}
    except Exception as error:  # it raises of every kind
        raise DataError(f"{path}: `datasets` finds no data in this folder ({first_line(error)})") from error
    files = {str(name): [Path(file) for file in files] for name, files in found.items()}
    chosen = _choose(str(path), split, list(files))
    rows = (row for file in files[chosen] for row in _rows_of(file))
    for number, (where, record) in enumerate(rows):
        yield _Row(record, where, number, path.resolve().name, chosen)


def _read_hub(name: str, split: str | None, known_as: str = "") -> Iterator[_Row]:
    """The rows of a split of a hub name, through `datasets`; `known_as`: the set that was asked for."""
    from data.models.hub import find_dataset

    find_dataset(name.partition(":")[0], f"questions: {known_as}" if known_as else "questions")
    import datasets

    where, config = name.partition(":")[0], name.partition(":")[2] or None
    try:
        splits = datasets.load_dataset(where, config)
    except Exception as error:  # it raises of every kind: offline, not found, no such config, malformed
        needs = "this needs the network, or a local .jsonl, .json or .parquet file"
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{name}: no file here, and the hub did not give it ({reason}); {needs}") from error
    assert isinstance(splits, Mapping), "load_dataset without a split gives all of them"
    chosen = _choose(name, split, list(map(str, splits)))
    for number, record in enumerate(splits[chosen]):
        row = f"{name}: row {number + 1} of {chosen}"
        yield _Row(dict(common_row(dict(record))), row, number, where.rpartition("/")[2], chosen)


def _choose(name: str, split: str | None, there: Sequence[str]) -> str:
    chosen = split or (there[0] if len(there) == 1 else "")
    if chosen not in there:
        raise ConfigError(f"{name}: split = {split!r}: must be one of {', '.join(there)}")
    return chosen


def _unique_ids(rows: Sequence[_Row]) -> Iterator[str]:
    own_ids = [_own_id(row) for row in rows]
    counts = Counter(own_ids)
    taken = {own for own in own_ids if own is not None and counts[own] == 1}
    repeated: Counter[str] = Counter()
    for row, own in zip(rows, own_ids, strict=True):
        if own in taken:
            yield own
            continue
        index = extra_of(row.record).get("index")
        last = own if own is not None else row.number if index is None else index
        name = unique = f"{row.data_source}/{row.split}/{last}"
        while unique in taken or repeated[unique]:
            repeated[name] += 1
            unique = f"{name}#{repeated[name]}"  # the second of its name is #2
        repeated[unique] += 1
        yield unique


def _own_id(row: _Row) -> str | None:
    with at(row.where):
        return id_of(row.record.get("id")) or None


def _parse_row(row: _Row, question_id: str, normalizer: str | None) -> Question:
    with at(row.where):
        if not (golds := gold_answers(row.record)):
            there = ", ".join(key for key, value in row.record.items() if value not in (None, ""))
            raise ValueError(f"no gold answer: none of {', '.join(GOLD_KEYS)} holds one; there are {there}")
        metadata = _metadata(row) | ({"normalizer": normalizer} if normalizer else {})
        question = Question(question_id, question_text(row.record), golds, metadata)
        if question.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer {question.normalizer!r}: must be one of {', '.join(NORMALIZERS)}")
        return question


def _metadata(row: _Row) -> dict[str, Any]:
    given = object_of(row.record.get("metadata"), "metadata")
    beside = ("kind", "cluster", "data_source")
    named = object_of({key: row.record.get(key) for key in beside}, ", ".join(beside))
    try:
        json.dumps((given, named))
    except TypeError as error:  # bytes and spans of time, which parquet has
        raise ValueError(f'"metadata" must be JSON ({error})') from error
    # Tables fill the fields that a row does not have with None or "", which say nothing.
    said = {
        key: value for source in (given, named) for key, value in source.items() if value not in (None, "")
    }
    return {"data_source": row.set_name, **said}
