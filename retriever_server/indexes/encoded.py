"""The base of indexes of an encoder's vectors: building in shards, opening with checks, searching."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from data.corpus import Corpus, JoinedCorpus
from data.errors import ConfigError, DataError
from data.machine.device import resolve_device
from data.records import Passage
from retriever_server.encoders.spec import Encoder, EncodingSpec, Vectors, rows_of, similarities, take
from retriever_server.indexes.base import Index, PositionSearch, Ranking, open_index
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.generation import building, found_at, write_generation
from retriever_server.indexes.manifest import Manifest, built_spec, check_same, generation_name
from retriever_server.indexes.shards import Progress, Shards, silent
from retriever_server.retriever import Filter, Query, Scores


class VectorSearch(PositionSearch):
    """Ranks passages by the vectors of an encoder, however these are stored."""

    encoder: Encoder

    @abstractmethod
    def rank(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """Rank the best `k` positions that `mask` (P,) allows for each encoded query."""

    def find(self, queries: Sequence[Query], k: int, mask: np.ndarray | None) -> list[Ranking]:
        return self.rank(self.encoder.encode(queries, "query"), k, mask)


class EncodedIndex(VectorSearch, Index):
    """An index over the vectors of an encoder; its kinds say what is stored and how it is ranked."""

    vectors: ClassVar[str]
    """The kind of encoder it needs."""
    passages_per_shard: ClassVar[int] = 50_000
    whole: bool = True
    """False where only the largest entries of a vector are stored."""

    def __init__(
        self, path: Path, manifest: Manifest, corpus: Corpus, encoder: Encoder, device: str = "cpu"
    ) -> None:
        self.path, self.manifest, self.corpus, self.encoder = path, manifest, corpus, encoder
        self.generation, self.device, self.folders = manifest.generation, device, manifest.folders(path)
        starts = np.cumsum([0, *map(len, corpus.parts)]).tolist()
        skipped = [
            start + np.load(file)
            for start, folder in zip(starts, self.folders, strict=False)
            for file in sorted(folder.glob("*.skipped.npy"))
        ]
        rows = np.concatenate([np.zeros(0, np.int64), *skipped])
        self.skipped = rows[corpus.alive[rows]] if isinstance(corpus, JoinedCorpus) else rows
        """Rows of passages that could not be encoded: no search finds them."""

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        out: str | Path,
        encoder: Encoder,
        dtype: str = "float16",
        overwrite: bool = False,
        progress: Progress = silent,
        passages_per_shard: int | None = None,
        on_error: str = "stop",
        encode: Callable[[Shards, Progress], None] = Shards.encode,
        **settings: Any,
    ) -> Self:
        """Encode the corpus, index the vectors into the folder `out`; opened.

        dtype: float32, float16 or int8 of what is stored. settings: of the kind (`checked_settings`).
        on_error: skip leaves out passages whose image cannot be read; stop raises DataError naming one.
        encode: writes the missing shards, here or elsewhere.
        A build that was killed goes on after its last whole shard. Raises ConfigError for a wrong
        setting or an encoder of another kind.
        """
        out = Path(out)
        shards, settings = cls.plan(corpus, out, encoder, dtype, passages_per_shard, on_error, **settings)

        def write(folder: Path) -> None:
            cls.write(folder, shards, settings)

        found = found_at(out, generation_name(cls.kind, settings, corpus.content_hash), overwrite)
        if found is None or shards.folder.exists():
            with building(out):
                if found is None:
                    encode(shards, progress)
                    shards.check_some()
                    write_generation(out, cls.kind, settings, corpus, write, overwrite, encoder.spec, dtype)
                shutil.rmtree(shards.folder, ignore_errors=True)
        return open_index(out, encoder=encoder)  # type: ignore[return-value]

    @classmethod
    def plan(
        cls, corpus: Corpus, out: Path, encoder: Encoder, dtype: str,
        passages_per_shard: int | None = None, on_error: str = "stop", **settings: Any,
    ) -> tuple[Shards, dict[str, Any]]:  # fmt: skip
        """Return the shards that `build` would write first, and all settings, to encode some elsewhere."""
        if encoder.spec.kind != cls.vectors:
            raise ConfigError(
                f"encoder {encoder.spec.model}: makes {encoder.spec.kind} vectors, "
                f"an index of kind {cls.kind} needs {cls.vectors}"
            )
        checked = cls.checked_settings(corpus, encoder.spec, **settings)
        size = cls.passages_per_shard if passages_per_shard is None else passages_per_shard
        shards = Shards.beside(out, corpus, encoder, dtype, size, on_error)
        skips = {"on_error": on_error} if on_error != "stop" else {}
        return shards, {"encoder": encoder.spec.hash, "dtype": dtype, **checked, **skips}

    @classmethod
    def write_part(
        cls,
        folder: Path,
        corpus: Corpus,
        settings: dict[str, Any],
        encoder: Encoder,
        place: Path,
        progress: Progress = silent,
        **_: Any,
    ) -> None:
        """As `Index.write_part`; place: where the folder will be."""
        size, on_error = cls.passages_per_shard, settings.get("on_error", "stop")
        shards = Shards.beside(place, corpus, encoder, settings["dtype"], size, on_error)
        shards.encode(progress)
        shards.check_some()
        cls.write(folder, shards, settings)

    def write_merged(self, folder: Path) -> None:
        """As `Index.write_merged`: what is stored is copied, and nothing encoded."""
        shards = Shards(
            folder / ".stored", self.corpus, self.encoder, self.manifest.dtype, self.passages_per_shard
        )
        for shard in range(len(shards)):
            shards.save(shard, self.arrays(np.array([self.row(at) for at in shards.positions(shard)])))
        self.write(folder, shards, self.manifest.settings)
        shutil.rmtree(shards.folder)
        self.save_skipped(folder)

    def save_skipped(self, folder: Path) -> None:
        """Note which passages of those that are left could not be encoded."""
        if len(self.skipped):
            assert isinstance(self.corpus, JoinedCorpus)
            save_array(folder / "00000.skipped.npy", self.corpus.places()[self.skipped])

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is stored of some rows, ascending, as the arrays of a shard, where that is stored."""
        raise NotImplementedError

    @classmethod
    def open(
        cls,
        path: Path,
        manifest: Manifest,
        corpus: Corpus,
        encoder: Encoder | None = None,
        device: str = "auto",
        recheck: int = 4,
        **options: Any,
    ) -> Self:
        """Open the index in the folder `path`; call `open_index`, which checks its files first.

        encoder: one that is loaded; else the one of the manifest is. recheck: so many passages are
        encoded again and compared with what is stored. options: of the kind.
        Raises DataError if the encoder is not the one that built the index.
        """
        from retriever_server.encoders.loading import load_encoder

        encoder = encoder or load_encoder(built_spec(path, manifest), device=device)
        check_same(path, manifest, encoder)
        index = cls(path, manifest, corpus, encoder, resolve_device(device), **options)
        index.check_encoder(recheck)
        return index

    @classmethod
    @abstractmethod
    def checked_settings(cls, corpus: Corpus, spec: EncodingSpec, **settings: Any) -> dict[str, Any]:
        """Return all settings of the kind as JSON, defaults filled in; ConfigError for a wrong one."""

    @classmethod
    @abstractmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """Put the files of the index into `folder`, from all shards."""

    @abstractmethod
    def stored(self, position: int) -> np.ndarray:
        """Return what is stored of a passage, as float32: one row, or one a token."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the passages indexed."""

    def reopened(self) -> Index:
        """As `Index.reopened`, with the encoder that is loaded, which needs no check any more."""
        return open_index(self.path, **{**self.options, "encoder": self.encoder, "recheck": 0})

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        """As `Retriever.score`: of what is stored of the passages."""
        vectors = self.encoder.encode(queries, "query")
        return [self._score_one(take(vectors, np.array([i])), each) for i, each in enumerate(passages)]

    def _score_one(self, query: Vectors, passages: Sequence[Passage]) -> dict[str, float]:
        places = self.places(passages)
        allowed = np.zeros(len(self), bool)
        allowed[list(places.values())] = True
        allowed[self.skipped] = False
        if not allowed.any():
            return {}
        [(found, scores)] = self.rank(query, len(places), allowed)
        known = dict(zip(found.tolist(), scores.tolist(), strict=True))
        unfound = {position: 0.0 for position in np.flatnonzero(allowed).tolist() if self.vectors == "sparse"}
        known = unfound | known  # what shares no word with the query
        return {id_: known[position] for id_, position in places.items() if position in known}

    def _mask(self, where: Filter | None) -> np.ndarray | None:
        mask = super()._mask(where)
        if not len(self.skipped):
            return mask
        mask = np.ones(len(self), bool) if mask is None else mask.copy()
        mask[self.skipped] = False
        return mask

    def describe(self) -> dict[str, Any]:
        of = {"generation": self.generation, "passages": len(self.corpus), "dtype": self.manifest.dtype}
        of |= {"skipped": len(self.skipped)} if len(self.skipped) else {}
        return {"kind": self.kind, **of, "settings": self.manifest.settings, "spec": self.manifest.spec}

    def check_encoder(self, count: int) -> None:
        """Encode `count` passages again; DataError if they are not what is stored (cosine <= .999)."""
        passages = sum(map(len, self.corpus.parts))
        if len(self) != passages:
            raise DataError(f"{self.path}: {len(self)} passages, its corpus has {passages}")
        count = min(count, len(self.corpus))
        positions = [len(self.corpus) * i // count for i in range(count)]
        positions = [position for position in positions if self.row(position) not in self.skipped]

        def stored(position: int) -> np.ndarray:
            return self.stored(self.row(position))

        check_encodes(self.encoder, self.corpus, positions, stored, self.path, self.whole)


def check_encodes(
    encoder: Encoder, corpus: Corpus, positions: list[int], stored: Any, path: Path, whole: bool = True
) -> None:
    """DataError unless the encoder makes of these passages what `stored(position)` gives.

    Where the vectors are not `whole`, only what is stored of them counts.
    """
    if not positions:
        return
    passages = [corpus[position] for position in positions]
    again = encoder.encode([encoder.spec.render(passage) for passage in passages], "passage")
    for i, position in enumerate(positions):
        here, there = rows_of(again, i), stored(position)
        least = float(similarities(here if whole else here * (there != 0), there).min())
        if not least > 0.999:
            raise DataError(
                f"{path}: passage {passages[i].id!r} is stored with another vector than "
                f"{encoder.spec.model} makes of it (cosine {least:.4f}): another encoder, prompt or corpus"
            )
