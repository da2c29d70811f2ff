"""MTEB's protocols, under the real package: a tiny task scores what our own evaluation scores."""

import pytest

from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import write_jsonl
from data.records import Question
from retriever_server.evaluation import judge, means, parse_metrics, rank_all
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.mteb import MTEBEncoder, MTEBRetriever
from tests.retriever_server.tiny_encoders import FakeEncoder


@pytest.fixture(autouse=True, scope="module")
def package():
    """Imported by the process alone that tests it: it takes seconds."""
    pytest.importorskip("mteb", minversion="2")


PASSAGES = [
    ("d1", "Rome", "the capital city of the north"),
    ("d2", "", "one red fox in the big city"),
    ("d3", "Sea", "the old blue sea"),
    ("d4", "River", "a small river is not a sea"),
    ("d5", "Empty", ""),
]
QUERIES = {"q1": "capital city", "q2": "blue sea", "q3": "red river", "q4": "fox"}
QRELS = {"q1": {"d1": 1}, "q2": {"d3": 2, "d4": 1}, "q3": {"d4": 1}, "q4": {"d3": 1}}


def task(kind="Retrieval", top_ranked=None, instruction=None):
    """A retrieval task of MTEB's that lies in memory."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="SleuthTiny", type=kind, description="A few sentences.", reference="https://example.org",
            dataset={"path": "none", "revision": "1"}, category="t2t", eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="ndcg_at_10", date=("2020-01-01", "2020-01-01"), dialect=[],
            domains=[], task_subtypes=[], license="cc-by-4.0", annotations_creators="derived",
            modalities=["text"], sample_creation="created", bibtex_citation="",
        )  # fmt: skip

        def load_data(self, num_proc=None, **_):
            rows = [{"id": i, "text": text} for i, text in QUERIES.items()]
            if instruction:
                rows = [row | {"instruction": instruction} for row in rows]
            corpus = [{"id": i, "title": title, "text": text} for i, title, text in PASSAGES]
            split = {
                "queries": Dataset.from_list(rows), "corpus": Dataset.from_list(corpus),
                "relevant_docs": QRELS, "top_ranked": top_ranked,
            }  # fmt: skip
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Tiny()


def score(model, of):
    import mteb

    results = mteb.evaluate(model, of, cache=None, show_progress_bar=False, co2_tracker=False)
    return results.task_results[0].scores["test"][0]


def our_scores(retriever):
    rankings = rank_all(retriever, [Question(i, text, ()) for i, text in QUERIES.items()], 5)
    values = means(judge(rankings, QRELS, parse_metrics("nDCG@3,R@1", 5)))
    return {"ndcg_at_3": values["nDCG@3"], "recall_at_1": values["R@1"]}


def corpus_of(tmp_path):
    rows = [{"id": i, "title": t if x else "", "text": x or t} for i, t, x in PASSAGES]
    write_jsonl(tmp_path / "ours.jsonl", rows)
    return Corpus(tmp_path / "ours.jsonl")


@pytest.mark.slow
def test_a_retriever_scores_in_mteb_what_it_scores_here(tmp_path):
    model = MTEBRetriever(lambda corpus: BM25Index.build(corpus, tmp_path / "theirs"), "bm25")
    found = score(model, task())
    expected = our_scores(BM25Index.build(corpus_of(tmp_path), tmp_path / "ours"))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert 0 < expected["ndcg_at_3"] < 1
    from mteb import SearchProtocol

    assert isinstance(model, SearchProtocol)
    assert model.mteb_model_meta.name == "sleuth/bm25"
    model.close()


def test_an_encoder_scores_in_mteb_what_its_index_scores_here(tmp_path):
    encoder = FakeEncoder()
    found = score(MTEBEncoder(encoder), task())
    expected = our_scores(FlatIndex.build(corpus_of(tmp_path), tmp_path / "flat", encoder, "float32"))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    from mteb import EncoderProtocol

    assert isinstance(MTEBEncoder(encoder), EncoderProtocol)


def test_candidates_and_instructions_of_a_task_are_heeded(tmp_path):
    seen = []

    class Spy(BM25Index):
        def search(self, queries, k, where=None):
            seen.extend(queries)
            return super().search(queries, k, where)

    def make(corpus):
        index = BM25Index.build(corpus, tmp_path / "index", overwrite=True)
        index.__class__ = Spy
        return index

    model = MTEBRetriever(make, "bm25")
    candidates = {"q1": ["d2"], "q2": ["d4"], "q3": ["d4", "d2"], "q4": ["d3"]}
    score(model, task("InstructionReranking", candidates, "in the north"))
    assert seen == [f"{text} in the north" for text in QUERIES.values()]
    rows = [{"id": i, "text": text} for i, text in QUERIES.items()]
    model.index([{"id": i, "title": t, "text": x} for i, t, x in PASSAGES])
    found = model.search(rows, top_k=5, top_ranked=candidates)
    assert {id_: set(of_query) for id_, of_query in found.items()} == {
        "q1": {"d2"}, "q2": {"d4"}, "q3": {"d2", "d4"}, "q4": set(),
    }  # fmt: skip
    model.close()


def test_tasks_of_mteb_without_a_search_run(tmp_path):
    from mteb.mocks.mock_tasks import MockSTSTask

    assert -1 <= score(MTEBEncoder(FakeEncoder()), MockSTSTask())["main_score"] <= 1


def test_only_dense_encoders_and_no_revision(tmp_path):
    with pytest.raises(ConfigError, match="makes multi vectors; index it"):
        MTEBEncoder(FakeEncoder("multi"))
    with pytest.raises(ConfigError, match="give the folder of that revision"):
        MTEBEncoder(FakeEncoder(), "main")
