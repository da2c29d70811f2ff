"""Folders of BEIR's and BRIGHT's form, and TREC's runs and qrels."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import ConfigError, DataError
from data.formats.benchmarks import (
    benchmark_passages,
    is_benchmark,
    load_benchmark,
    without_excluded,
)
from data.formats.trec import load_qrels, load_run


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "scifact"
    rows = [
        ("d1", "Rome", "A city."),
        ("d2", "Only a title", ""),
        ("q1", "", "the query itself"),
        ("d4", "", ""),
    ]
    corpus = [{"_id": i, "title": t, "text": x, "metadata": {}} for i, t, x in rows]
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "queries.jsonl", [{"_id": q, "text": f"what is {q}"} for q in ("q1", "q2", "q3")])
    (folder / "qrels").mkdir()
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(f"{head}q1\td1\t2\nq2\td2\t1\n")
    (folder / "qrels" / "dev.tsv").write_text(f"{head}q3\td1\t1\nq1\tq1\t1\n")
    return folder


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def bright(tmp_path):
    folder = tmp_path / "BRIGHT"
    for name, ids in (("documents", ("a/1", "a/2", "b/1")), ("long_documents", ("a", "b"))):
        write_parquet(
            folder / name / "earth_science-00000-of-00001.parquet",
            [{"id": i, "content": f"about {i}"} for i in ids],
        )
    gold = {"gold_ids": ["a/1"], "gold_ids_long": ["a"]}
    rows = [
        {"id": "0", "query": "why?", **gold, "excluded_ids": ["b/1"]},
        {"id": "1", "query": "how?", **gold, "excluded_ids": ["N/A"]},
    ]
    for domain in ("earth_science", "leetcode"):
        write_parquet(folder / "examples" / f"{domain}-00000-of-00001.parquet", rows)
    return folder


def test_a_split_of_beir_has_the_queries_that_it_judges(beir):
    test, dev = load_benchmark(str(beir)), load_benchmark(f"{beir}:dev")
    assert [query.id for query in test.queries] == ["q1", "q2"]
    assert test.qrels == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert [query.text for query in dev.queries] == ["what is q1", "what is q3"]


def test_the_passage_that_is_the_query_is_excluded_unless_it_is_relevant(beir):
    assert load_benchmark(str(beir)).excluded == {"q1": {"q1"}, "q2": {"q2"}}
    assert load_benchmark(f"{beir}:dev").excluded == {"q3": {"q3"}}


def test_passages_of_a_title_alone_keep_it_and_empty_ones_are_counted(beir, caplog):
    assert list(benchmark_passages(str(beir))) == [
        {"id": "d1", "title": "Rome", "text": "A city."},
        {"id": "d2", "title": "", "text": "Only a title"},
        {"id": "q1", "title": "", "text": "the query itself"},
    ]
    assert "1 passages without any text" in caplog.text


def test_a_wrong_split_and_a_wrong_domain_name_those_there_are(beir, bright):
    with pytest.raises(ConfigError, match="must be one of dev, test"):
        load_benchmark(f"{beir}:train")
    with pytest.raises(ConfigError, match="must name a domain, one of earth_science, leetcode"):
        load_benchmark(f"{bright}:biology")
    assert not is_benchmark(beir.parent)
    assert is_benchmark(beir) and is_benchmark(f"{bright}:leetcode")


def test_bright_has_exclusions_by_query_and_an_instruction_by_domain(bright):
    short = load_benchmark(f"{bright}:earth_science")
    assert short.excluded == {"0": {"b/1"}}
    assert short.qrels == {"0": {"a/1": 1}, "1": {"a/1": 1}}
    assert short.instruction == (
        "Given a earth_science post, retrieve relevant passages that help answer the post"
    )
    assert load_benchmark(f"{bright}:leetcode").instruction == (
        "Given a coding problem, retrieve relevant examples that help answer the problem"
    )


def test_long_documents_of_bright_have_qrels_of_their_own(bright):
    long = load_benchmark(f"{bright}:earth_science-long")
    assert long.qrels["0"] == {"a": 1}
    assert "relevant documents" in long.instruction
    assert [row["id"] for row in benchmark_passages(f"{bright}:earth_science-long")] == ["a", "b"]
    assert next(row["text"] for row in benchmark_passages(f"{bright}:earth_science")) == "about a/1"


def test_a_run_is_ranked_by_score_and_ties_as_trec_eval_does(tmp_path):
    path = tmp_path / "a.run"
    path.write_text(
        "q1 Q0 d1 1 2.0 my run\nq1 Q0 d3 2 3.5 my run\nq1 Q0 d2 3 2.0 my run\nq2 Q0 d1 1 1 my run\n"
    )
    run = load_run(path)
    assert [(hit.passage.id, hit.score) for hit in run["q1"]] == [("d3", 3.5), ("d2", 2.0), ("d1", 2.0)]
    assert run["q2"][0].generation == "my run"
    left = without_excluded(run, {"q1": frozenset(["d3"])}, 1)
    assert [hit.passage.id for hit in left["q1"]] == ["d2"]
    assert [hit.passage.id for hit in left["q2"]] == ["d1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("q1 Q0 d1 1 2.0", r":1: 5 fields, expected 6"),
        ("qid iter docno rank sim run_id", r":1: rank 'rank': must be a whole number"),
        ("q1 Q0 d1 1 high x", r":1: score 'high': must be a number"),
        ("q1 Q0 d1 1 2 x\nq1 Q0 d1 2 1 x", r":2: passage 'd1' stands there twice"),
        ("\n", "no rankings"),
    ],
)
def test_a_wrong_line_of_a_run_is_named(tmp_path, lines, message):
    path = tmp_path / "a.run"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        load_run(path)


def test_qrels_come_back_as_they_were_written(tmp_path):
    qrels = {"q1": {"d1": 2, "d2": 0}, "q2": {"d9": 1}}
    lines = [f"{query}\t0\t{id_}\t{grade}\n" for query, of in qrels.items() for id_, grade in of.items()]
    (tmp_path / "qrels.trec").write_text("".join(lines))
    assert load_qrels(tmp_path / "qrels.trec") == qrels
