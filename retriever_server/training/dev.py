"""Scores of a model in training on dev queries, by the index and metrics that serve later."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.formats.beir import load_queries
from data.formats.rows import passage_row
from data.formats.trec import load_qrels
from data.jsonl import write_jsonl
from data.progress import Bar, Track, no_bar
from data.records import Qrels, Question
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.encoders.spec import EncodingSpec, Kind
from retriever_server.evaluation import judge, means, parse_metrics, rank_all
from retriever_server.indexes.manifest import index_kind
from retriever_server.retriever import Retriever
from retriever_server.retrievers.rerank import CrossEncoder, Rerank
from retriever_server.training.examples import PassageKeys, content_key, passage_key
from retriever_server.training.recipe import DevConfig

_TOP_K, _RERANKED = 100, 20


def read_dev(config: DevConfig) -> tuple[list[Any], Sequence[Question], Qrels]:
    """Measures, queries and judgements of dev. Raises ConfigError or DataError."""
    assert config.queries is not None and config.qrels is not None
    measures = parse_metrics(config.metrics, _TOP_K)
    qrels = load_qrels(config.qrels)
    queries = [query for query in load_queries(config.queries) if query.id in qrels][: config.limit]
    if not queries:
        raise ConfigError(f"dev.queries {config.queries}: none has judgements in {config.qrels}")
    return measures, queries, {query.id: qrels[query.id] for query in queries}


class DevSet:
    """Queries, their relevant passages among others, and a folder of its own for what is made of them."""

    def __init__(self, config: DevConfig, corpus: str, folder: Path, bar: Bar = no_bar) -> None:
        """Read all, and write the corpus that is searched. Raises ConfigError or DataError."""
        self.bar = bar
        self.measures, self.queries, self.qrels = read_dev(config)
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        self.corpus = _sample(Corpus(config.corpus or corpus), self.qrels, config.passages, folder)

    def check_held_out(self, examples: Examples, shared: str) -> None:
        """Raise DataError where an example asks a dev question, or is answered by a dev question's passage.

        shared: what may be, as in `DevConfig`. Texts are compared whatever their case and blanks.
        """
        questions = {content_key(query.asked) for query in self.queries} if shared != "all" else set()
        relevant = relevant_in(self.qrels) if shared == "nothing" else set()
        gold = {passage_key(p) for id_ in relevant if (p := self.corpus.get(id_))}
        key_of = PassageKeys(examples.corpus)
        for index, example in enumerate(examples if questions else ()):
            asked = content_key(example.asked) in questions
            positions = examples.corpus.positions(example.positives).tolist() if gold else ()
            if asked or any(key_of(position) in gold for position in positions):
                what, allow = "is answered by a passage that answers a dev question", "passages"
                if asked:
                    what, allow = "is a dev question", "all"
                raise DataError(
                    f"{examples.place(index)}: query {example.query[:60]!r} {what}, so that dev would "
                    f"score what was learned by heart: hold it out, or allow it by dev.shared: {allow}"
                )

    def score(self, open_retriever: Callable[[Path], Retriever]) -> dict[str, float]:
        """Metric -> mean over the queries, of the retriever opened over an empty folder."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            retriever = open_retriever(place / "index")
            track = Track("searching dev queries", self.bar)
            values = judge(rank_all(retriever, self.queries, _TOP_K, track), self.qrels, self.measures)
            retriever.close()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return means(values)

    def score_model(self, model: Any, kind: Kind, spec: EncodingSpec | None) -> dict[str, float]:
        """The metrics of an encoder by an exact index in float32, of a reranker over the hits of BM25."""
        if spec is None:
            return self.score(lambda place: self._reranked(model, place))
        encoder, of = SentenceEncoder(model, spec), index_kind(kind.index)
        track = Track("encoding dev passages", self.bar)
        return self.score(lambda place: of.build(self.corpus, place, encoder, "float32", progress=track))

    def _reranked(self, model: Any, place: Path) -> Retriever:
        first = index_kind("bm25").build(self.corpus, place, analyzer="stopwords")
        return Rerank(first, CrossEncoder(model.eval(), name="the model in training"), _RERANKED)


def relevant_in(qrels: Qrels) -> set[str]:
    """The ids of all passages that are relevant to a query."""
    return {id_ for of in qrels.values() for id_, grade in of.items() if grade > 0}


def _sample(corpus: Corpus, qrels: Qrels, size: int, folder: Path) -> Corpus:
    """The corpus, or of a larger one all relevant passages and others evenly, as a file in `folder`."""
    folder.mkdir(parents=True)
    relevant = relevant_in(qrels)
    if size == 0 or len(corpus) <= size:
        return corpus
    step = max(1, len(corpus) // max(1, size - len(relevant)))
    evenly = [corpus[position] for position in range(0, len(corpus), step)]
    wanted = {passage.id: passage for passage in evenly}
    wanted |= {id_: found for id_ in relevant if (found := corpus.get(id_)) is not None}
    write_jsonl(
        folder / "corpus.jsonl", (passage_row(passage, folder) for _, passage in sorted(wanted.items()))
    )
    return Corpus(folder / "corpus.jsonl")
