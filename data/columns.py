"""The metadata of a corpus in columns on disk, so that a filter reads a field and not every passage.

A sealed Arrow file, mapped, lies in the folder of an index, or from the first use on in the user's cache. A
batch of it holds values of one field and one type, and the positions of their passages; a list gives several.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from data.errors import StorageError

if TYPE_CHECKING:
    from data.corpus import Corpus, JoinedCorpus

logger = logging.getLogger(__name__)

METADATA = "corpus.metadata"
"""Its name in the folder of an index."""
_VALUES_TOGETHER = 1 << 18

_LOADING: WeakKeyDictionary[Corpus, Future[Columns | JoinedColumns]] = WeakKeyDictionary()
_LOCK, _ONE_AT_A_TIME = threading.Lock(), threading.Lock()


class Columns:
    """The values of every field; those of nested objects are in none."""

    def __init__(self, content: Any) -> None:
        """content: the bytes of the Arrow file."""
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.py_buffer(content))
        self._batches: dict[bytes, list[tuple[str, Any]]] = defaultdict(list)
        for number in range(reader.num_record_batches):
            batch, about = reader.get_batch_with_custom_metadata(number)
            self._batches[about[b"field"]].append((about[b"type"].decode(), batch))

    def positions(self, field: str, agrees: Callable[[str, Any], Any]) -> np.ndarray:
        """Positions of the passages with a value that agrees; one may come several times.

        agrees: given a type (see `json_type`) and N values of it, whether each does, (N,) booleans. Strings
        come as an Arrow array of their UTF-8, numbers as float64 (N,), an "integer" that none is as digits.
        """
        found = [np.zeros(0, np.int32)]
        for kind, batch in self._batches.get(encode(field), ()):
            values = batch.column("value")
            if kind == "number":
                values = np.frombuffer(values.buffers()[2], np.float64, len(values))
            found.append(batch.column("position").to_numpy()[np.asarray(agrees(kind, values), bool)])
        return np.concatenate(found)


class JoinedColumns:
    """The columns of a `JoinedCorpus`, from those of its parts."""

    def __init__(self, corpus: JoinedCorpus) -> None:
        self._corpus, self._columns = corpus, [load_columns(part).result() for part in corpus.parts]

    def positions(self, field: str, agrees: Callable[[str, Any], Any]) -> np.ndarray:
        spans = zip(self._corpus.spans(), self._columns, strict=True)
        rows = np.concatenate([span.start + columns.positions(field, agrees) for span, columns in spans])
        return self._corpus.positions_of_rows(rows[self._corpus.alive[rows]])


def json_type(value: Any) -> str:
    """ "string", "number", "True", "False", "None" or "other": to Python True is 1, to JSON it is not."""
    if isinstance(value, bool) or value is None:
        return repr(value)
    return "string" if isinstance(value, str) else "number" if isinstance(value, int | float) else "other"


def is_float(value: int | float) -> bool:
    """Return whether a float equals this number."""
    try:
        return isinstance(value, float) or float(value) == value
    except OverflowError:
        return False


def encode(text: str) -> bytes:
    """UTF-8, also of half a surrogate pair; in the order of the code points."""
    return text.encode("utf-8", "surrogatepass")


def load_columns(corpus: Corpus) -> Future[Columns | JoinedColumns]:
    """The columns of a corpus, on the way in a thread of their own: its index may be older and have none."""
    with _LOCK:
        if (loading := _LOADING.get(corpus)) is None:
            loading = _LOADING[corpus] = Future()
            loading.set_running_or_notify_cancel()  # so that nobody who waits can cancel it for others
            threading.Thread(target=_load, args=(corpus, loading), daemon=True).start()
        return loading


async def wait_for_columns(corpus: Corpus) -> None:
    """Return when they are there, without a thread that waits."""
    await asyncio.wrap_future(load_columns(corpus))


def save_columns(corpus: Corpus, path: Path) -> None:
    """Write the file; raises StorageError."""
    from data.atomic import write_sealed

    with write_sealed(path) as file:
        _write(corpus, file)


def _load(corpus: Corpus, loading: Future[Columns | JoinedColumns]) -> None:
    try:
        loading.set_result(_columns_of(corpus))
    except BaseException as error:
        loading.set_exception(error)


def _columns_of(corpus: Corpus) -> Columns | JoinedColumns:
    if corpus.parts[0] is not corpus:
        return JoinedColumns(cast("JoinedCorpus", corpus))
    with _ONE_AT_A_TIME:
        return Columns(_kept(corpus))


def _kept(corpus: Corpus) -> Any:
    """The Arrow file of its index or of the cache; made if there is none, in memory for a small corpus."""
    import pyarrow as pa

    from data.atomic import read_sealed
    from data.offsets import cached_file

    if corpus.index_folder and (found := read_sealed(corpus.index_folder / METADATA)) is not None:
        return found
    place = cached_file(f"{corpus.content_hash}.metadata")
    if place and corpus.offsets.with_metadata and corpus.offsets.is_slow:
        if (found := read_sealed(place)) is not None:
            return found
        logger.info("%s: reading the metadata of all passages once, for filters", corpus.path)
        try:
            save_columns(corpus, place)
            return read_sealed(place)
        except StorageError as error:
            logger.warning("%s: its metadata stays in memory: %s", corpus.path, error)
    sink = pa.BufferOutputStream()
    _write(corpus, sink)
    return sink.getvalue()


def _write(corpus: Corpus, file: Any) -> None:
    import pyarrow as pa

    schema = pa.schema([("position", pa.int32()), ("value", pa.large_binary())])
    with pa.ipc.new_file(file, schema) as writer:
        for part in _parts(corpus) if corpus.offsets.with_metadata else ():
            for (field, kind), (positions, values) in part.items():
                batch = pa.record_batch(
                    [pa.array(positions, pa.int32()), pa.array(values, pa.large_binary())], schema=schema
                )
                writer.write_batch(batch, custom_metadata={"field": encode(field), "type": kind})


Part = dict[tuple[str, str], tuple[list[int], list[bytes]]]
"""Field and type -> positions and values."""


def _parts(corpus: Corpus) -> Iterator[Part]:
    part, count = defaultdict(lambda: ([], [])), 0
    for position, passage in enumerate(corpus):
        for field, kind, value in _scalars(passage.metadata):
            positions, values = part[field, kind]
            positions.append(position)
            values.append(value)
            count += 1
        if count >= _VALUES_TOGETHER:
            yield part
            part, count = defaultdict(lambda: ([], [])), 0
    yield part


def _scalars(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, bytes]]:
    """Field, type and bytes of every value that a filter can ask for."""
    for field, found in metadata.items():
        for value in found if isinstance(found, list) else [found]:
            kind = json_type(value)
            if kind == "string":
                yield field, kind, encode(value)
            elif kind == "number" and is_float(value):
                yield field, kind, struct.pack("=d", value)
            elif kind == "number":
                yield field, "integer", str(value).encode()
            elif kind != "other":
                yield field, kind, b""
