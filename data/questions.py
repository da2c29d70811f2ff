"""Question sets from local files, folders and the Hugging Face hub, in one form and with ids that differ.

Read are our own rows {id, question, golden_answers, metadata} and Search-R1's {data_source, prompt, ability,
reward_model.ground_truth.target, extra_info}, whose index starts again in every set it was merged from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.jsonl import numbered_jsonl, read_json
from data.records import Question

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_GOLD_KEYS = ("golden_answers", "gold_answers", "answers", "answer")


@dataclass(frozen=True)
class _Row:
    record: Mapping[str, Any]
    where: str
    number: int
    """Counted from 0 in its file or split."""
    set_name: str
    split: str

    @property
    def extra(self) -> Mapping[str, Any]:
        extra = self.record.get("extra_info")
        return extra if isinstance(extra, Mapping) else {}

    @property
    def data_source(self) -> str:
        return str(self.record.get("data_source") or self.set_name)


def load_questions(source: str, split: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions of one source, or of several with commas between them; at most `limit` in all.

    A source is a file (.jsonl, .jsonl.gz, .json, .parquet), a folder that `datasets` can read, or a hub name
    such as "org/name" or "org/name:config". `split` chooses one: needed where a hub name or folder has
    several; of a file's rows those that name another are left out.

    A row's own id is kept where no other row has it. Otherwise, and where there is none, the id is
    "<data_source>/<split>/<id or extra_info.index or row>". It does not depend on `limit`.
    Raises DataError "FILE:LINE: what is wrong", also for a row without a question or a gold answer.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: must be >= 1, or None for all")
    rows = [row for name in _source_names(source) for row in _read_source(name, split)]
    # All rows are parsed, so that ids and errors are the same with a limit and without.
    questions = [_parse_row(row, unique) for row, unique in zip(rows, _unique_ids(rows), strict=True)]
    return questions[:limit]


def hash_questions(questions: Sequence[Question]) -> str:
    """First 16 hexadecimal digits of a SHA-256 over all that a question says, in their order."""
    said = [[q.id, q.text, list(q.gold_answers), dict(q.metadata)] for q in questions]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _source_names(source: str) -> list[str]:
    if Path(source).expanduser().exists():
        return [source]
    names = [name.strip() for name in source.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"questions = {source!r}: name a file, a folder or a data set of the hub")
    return names


def _read_source(name: str, split: str | None) -> list[_Row]:
    path = Path(name).expanduser()
    if path.is_file():
        rows = list(_read_file(path, split))
    elif path.is_dir() or _is_hub_name(name):
        rows = list(_read_dataset(name, split))
    else:
        raise DataError(f"{name}: no such file")
    kept = [row for row in rows if split in (None, row.split)]
    if not kept:
        found = ", ".join(sorted({row.split for row in rows}))
        raise DataError(f"{name}: no row of split {split!r}, only of {found}" if rows else f"{name}: no rows")
    return kept


def _is_hub_name(name: str) -> bool:
    looks_like_a_file = name.startswith(".") or name.endswith(FILE_KINDS)
    return _HUB_NAME.fullmatch(name) is not None and not looks_like_a_file


def _read_file(path: Path, split: str | None) -> Iterator[_Row]:
    set_name = path.resolve().parent.name or "questions"
    for number, (where, record) in enumerate(_file_records(path)):
        row = _Row(record, where, number, set_name, split or path.name.split(".")[0])
        own_split = row.extra.get("split")
        yield row if own_split is None else _Row(record, where, number, set_name, str(own_split))


def _file_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, record) of every row of a file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")) or (path.suffix == ".json" and not _is_array(path)):
        for line, record in numbered_jsonl(path):
            yield f"{path}:{line}", record
    elif path.suffix in (".json", ".parquet"):
        records = read_json(path) if path.suffix == ".json" else _parquet_records(path)
        for number, record in enumerate(records, start=1):
            if not isinstance(record, Mapping):
                raise DataError(f"{path}: row {number}: expected an object {{...}}")
            yield f"{path}: row {number}", record
    else:
        raise DataError(f"{path}: unknown kind of file; {', '.join(FILE_KINDS)} are read")


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _parquet_records(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read ({_first_line(error)})") from error


def _read_dataset(name: str, split: str | None) -> Iterator[_Row]:
    """The rows of a hub name or a folder, through `datasets`."""
    folder = Path(name).expanduser().is_dir()
    if not folder:
        from data.hub import find_dataset

        find_dataset(name.partition(":")[0], "questions")
    import datasets

    hub = _HUB_NAME.fullmatch(name)
    where, config = (str(Path(name).expanduser()), None) if folder or not hub else hub.group("name", "config")
    try:
        splits = datasets.load_dataset(where, config)
    except Exception as error:  # it raises of every kind: offline, not found, no such config, malformed
        tried = "`datasets` cannot read this folder" if folder else "no file here, and not had from the hub"
        needs = "" if folder else "; this needs the network, or a local .jsonl, .json or .parquet file"
        raise DataError(f"{name}: {tried} ({_first_line(error)}){needs}") from error
    assert isinstance(splits, Mapping), "load_dataset without a split gives all of them"
    chosen = split or (next(iter(splits)) if len(splits) == 1 else None)
    if chosen not in splits:
        raise ConfigError(f"{name}: split = {split!r}: must be one of {', '.join(map(str, splits))}")
    set_name = Path(where).resolve().name if folder else where.rpartition("/")[2]
    for number, record in enumerate(splits[chosen]):
        yield _Row(dict(record), f"{name}: row {number + 1} of {chosen}", number, set_name, str(chosen))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def _unique_ids(rows: Sequence[_Row]) -> Iterator[str]:
    own_ids = [_own_id(row) for row in rows]
    counts = Counter(own_ids)
    taken = {own for own in own_ids if own is not None and counts[own] == 1}
    repeated: Counter[str] = Counter()
    for row, own in zip(rows, own_ids, strict=True):
        if own in taken:
            yield own
            continue
        index = row.extra.get("index")
        last = own if own is not None else row.number if index is None else index
        name = unique = f"{row.data_source}/{row.split}/{last}"
        while unique in taken or repeated[unique]:
            repeated[name] += 1
            unique = f"{name}#{repeated[name]}"  # the second of its name is #2
        repeated[unique] += 1
        yield unique


def _own_id(row: _Row) -> str | None:
    own = row.record.get("id")
    if own is None or own == "":
        return None
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise DataError(f'{row.where}: "id" must be a string, found {own!r}')
    return str(own)


def _parse_row(row: _Row, question_id: str) -> Question:
    try:
        return Question(
            id=question_id,
            text=_question_text(row),
            gold_answers=_gold_answers(row.record),
            metadata=_metadata(row),
        )
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from error


def _question_text(row: _Row) -> str:
    for value in (row.record.get("question"), row.extra.get("question")):
        if value is not None and not isinstance(value, str):
            raise ValueError(f'"question" must be a string, found {str(value)[:40]!r}')
        if value and value.strip():
            return value.strip()
    _, found, text = _prompt_text(row.record.get("prompt")).rpartition("Question: ")
    if not found or not text.strip():
        raise ValueError('no question: "question" is missing or empty, and no prompt holds "Question: ..."')
    return text.strip()


def _prompt_text(prompt: Any) -> str:
    """What the last user message of a prompt says; a prompt may be one string too."""
    if isinstance(prompt, str):
        return prompt
    messages = [m for m in _as_list(prompt) if isinstance(m, Mapping) and m.get("role") == "user"]
    return str(messages[-1].get("content") or "") if messages else ""


def _gold_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    reward_model = record.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    for value in (*map(record.get, _GOLD_KEYS), truth):
        if isinstance(value, Mapping):  # Search-R1's {"target": ...}, SQuAD's {"text": [...]}
            value = value.get("target", value.get("text"))
        if golds := tuple(dict.fromkeys(_answer_strings(_as_list(value)))):
            return golds
    raise ValueError("no gold answer")


def _answer_strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"a gold answer must be a string, found {str(value)[:40]!r}")
        if text := str(value).strip():
            yield text


def _as_list(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value  # a numpy array, out of pandas
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _metadata(row: _Row) -> dict[str, Any]:
    given = row.record.get("metadata") or {}
    if not isinstance(given, Mapping):
        raise ValueError('"metadata" must be an object')
    named = {key: row.record.get(key) for key in ("kind", "cluster", "data_source")}
    # Tables fill the fields that a row does not have with None: what is None says nothing.
    said = {key: value for source in (given, named) for key, value in source.items() if value is not None}
    return {"data_source": row.set_name, **said}
