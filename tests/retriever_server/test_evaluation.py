"""Evaluating a retriever: metrics, DPR's answers, significance, the files it reads, the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.formats.beir import load_queries
from data.formats.trec import load_qrels, load_run, write_run
from data.jsonl import read_jsonl, write_jsonl
from data.metrics.significance import randomisation_p
from data.records import Hit, Passage, Question
from retriever_server.evaluation import (
    METRICS,
    compare,
    has_answer,
    judge,
    judge_answers,
    means,
    parse_metrics,
    rank_all,
)
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retriever import Retriever
from scripts.__main__ import main
from tests.samples import quick

IR = Path(__file__).parents[2].parent / "shared/data/ir"


def hits(*ids: str, texts: tuple[str, ...] = ()) -> list[Hit]:
    texts = texts or ("text",) * len(ids)
    return [Hit(Passage(id_, text), 1.0, "g") for id_, text in zip(ids, texts, strict=True)]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_hits_are_judged_in_their_order_and_a_query_without_hits_gets_0():
    rankings = {"1": hits("x", "b", "a"), "2": [], "unjudged": hits("a")}
    qrels = {"1": {"a": 2, "b": 1, "c": 0}, "2": {"a": 1}, "other": {"a": 1}}
    values = judge(rankings, qrels, parse_metrics("MRR@10, map, recall@2, P@3, nDCG@3", 100))
    assert values["RR@10"] == {"1": 0.5, "2": 0.0}
    assert values["AP"]["1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (values["R@2"]["1"], values["P@3"]["1"]) == (0.5, pytest.approx(2 / 3))
    gain, ideal = 1 / np.log2(3) + 2 / np.log2(4), 2 + 1 / np.log2(3)
    assert means(values)["nDCG@3"] == pytest.approx(gain / ideal / 2)


def test_a_written_run_keeps_the_order_of_hits_that_score_the_same(tmp_path):
    """trec_eval reads float32 and orders ties by id: read so, the run scores as the rankings did."""
    scores = [3.0, 3.0, 3.0 - 1e-12, 1.0, 1.0, -2.0, -2.0]
    ranking = [Hit(Passage(id_, ""), score, "g") for id_, score in zip("bcadfeg", scores, strict=True)]
    write_run(tmp_path / "a.run", {"q": ranking, "r": ranking[::-1]}, "g")
    rows = [line.split() for line in (tmp_path / "a.run").read_text().splitlines()]
    kept = {"q": "bcadfeg", "r": "gefdacb"}
    for query, order in kept.items():
        mine = [(np.float32(row[4]), row[2]) for row in rows if row[0] == query]
        assert "".join(id_ for _, id_ in sorted(mine, reverse=True)) == order
        assert "".join(hit.passage.id for hit in load_run(tmp_path / "a.run")[query]) == order
    assert [float(row[4]) for row in rows[:1]] == [3.0] and float(rows[3][4]) == 1.0


@pytest.mark.parametrize("name", ["accuracy@3", "R@x", "nDCG@101"])
def test_wrong_metrics_are_refused(name):
    with pytest.raises(
        ConfigError, match=f"metric '{name}': (must be nDCG@k, recall|looks at more than top_k = 100)"
    ):
        parse_metrics(f"P@3,{name}", 100)


def test_ids_that_do_not_meet_are_said():
    with pytest.raises(
        DataError, match=r"none of the queries \(1\) has qrels: their ids are such as '1' and 'q1'"
    ):
        judge({"1": []}, {"q1": {"a": 1}}, parse_metrics("P@3", 10))


@pytest.mark.parametrize(
    ("text", "golds", "found"),
    [
        ("It was Élan Vital's end.", ["elan", "ÉLAN vital"], True),
        ("A party of 1,000", ["art"], False),
        ("A party of 1,000", ["1,000"], True),
        ("red fox", ["fox red"], False),
        ("İSTANBUL büyük", ["istanbul"], True),
        ("anything", ["", "  "], False),
    ],
)
def test_an_answer_is_found_as_whole_words_in_any_case(text, golds, found):
    assert has_answer(text, golds) is found


def test_answers_count_from_the_rank_of_the_first_passage_that_holds_one():
    queries = [Question("1", "?", ("fox",)), Question("2", "?", ("sea",)), Question("3", "?", ())]
    rankings = {"1": hits("a", "b", texts=("sea", "a fox")), "2": hits("a", texts=("fox",)), "3": []}
    values = judge_answers(rankings, queries, 5)
    assert values == {"answer@1": {"1": 0.0, "2": 0.0}, "answer@5": {"1": 1.0, "2": 0.0}}
    with pytest.raises(DataError, match=r"none of the queries \(1\) has gold answers"):
        judge_answers(rankings, queries[2:], 5)


def test_the_randomisation_equals_all_sign_flips():
    differences = np.array([[0.3], [0.1], [0.2], [-0.05], [0.4], [0.0], [0.25]])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
    exact = (np.abs(differences[:, 0] @ signs) >= abs(differences.sum()) - 1e-12).mean()
    assert randomisation_p(differences)[0] == pytest.approx(exact, abs=0.01)


def test_two_retrievers_are_compared_query_by_query():
    ids = [str(i) for i in range(40)]
    ours, other = {"P@1": {i: 1.0 for i in ids}}, {"P@1": {i: float(int(i) % 2) for i in ids}}
    found = compare(ours, other)["P@1"]
    assert (
        found["difference"] == 0.5 and 0.3 < found["low"] < 0.5 < found["high"] < 0.7 and found["p"] < 0.001
    )
    assert compare(ours, ours)["P@1"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


@pytest.mark.parametrize(
    "text", ["query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n", "1 0 a 2\n\n1 0 b 0\n", "1 a 2\n1 b 0\n"]
)
def test_qrels_are_read_in_both_forms(tmp_path, text):
    assert load_qrels(write(tmp_path / "qrels", text)) == {"1": {"a": 2, "b": 0}}


@pytest.mark.parametrize(
    ("load", "name", "text", "message"),
    [
        (load_qrels, "q.tsv", "1 a 2\n1 b\n", "q.tsv:2: 2 fields, expected 3"),
        (load_qrels, "q.tsv", "1 a 2\n1 b x\n", "q.tsv:2: relevance 'x': must be a whole number"),
        (load_qrels, "q.tsv", "query-id corpus-id score\n", "q.tsv: no judgements"),
        (load_queries, "q.tsv", "1\tfox\n2\n", "q.tsv:2: no text"),
        (load_queries, "q.jsonl", '{"question": "fox"}\n', "q.jsonl:1: no id"),
        (load_queries, "q.tsv", "1\tfox\n1\tsea\n", "q.tsv:2: id '1' stands there twice"),
        (load_queries, "q.jsonl", '{"id": 1, "text": 3}\n', 'q.jsonl:1: "query" must be a string, found 3'),
    ],
)
def test_a_wrong_line_is_named(tmp_path, load, name, text, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / name, text))


def test_queries_are_read_as_json_lines_and_as_a_table(tmp_path):
    beir = load_queries(write(tmp_path / "a.jsonl", '{"_id": 1, "text": "fox", "answers": "x"}\n'))
    table = load_queries(write(tmp_path / "a.tsv", "1\tfox\n"))
    turned = load_queries(write(tmp_path / "b.tsv", "text\tquery-id\nfox\t1\n"))
    assert turned == table
    assert beir == [Question("1", "fox", ("x",))]
    assert table == [Question("1", "fox", ())]


def test_the_command_scores_compares_and_writes_all(tmp_path, capsys):
    write_jsonl(
        tmp_path / "c.jsonl", [{"id": i, "text": t} for i, t in (("a", "red fox"), ("b", "blue sea"))]
    )
    BM25Index.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "index")
    write_jsonl(
        tmp_path / "q.jsonl",
        [{"id": "1", "question": "fox?", "golden_answers": ["red"]}, {"id": "2", "question": "sea"}],
    )
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tb\t1\n")
    arguments = {
        **{"retriever": tmp_path / "index", "queries": tmp_path / "q.jsonl", "qrels": tmp_path / "qrels.tsv"},
        **{"answers": "true", "compare": "none", "metrics": "RR@10", "out": tmp_path / "out"},
    }
    assert main(["evaluate-retriever", *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "second: none" in said and "metric queries first second first - second [95 %] p" in said
    assert "RR@10 2 1.0000 0.0000 +1.0000" in said  # the first is better
    scores = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert (scores["RR@10"]["mean"], scores["RR@10"]["difference"], scores["answer@1"]["queries"]) == (
        1.0,
        1.0,
        1,
    )
    assert scores["RR@10"]["compared_mean"] == 0.0
    rows = list(read_jsonl(tmp_path / "out/queries.jsonl"))
    assert rows[1] == {"id": "2", "question": "sea", "scores": {"RR@10": 1.0}, "compared": {"RR@10": 0.0}}
    line = (tmp_path / "out/run.trec").read_text().splitlines()[0].split()
    assert (line[:4], line[5].split("-")[0]) == (["1", "Q0", "a", "1"], "bm25")
    assert (
        main(["evaluate-retriever", f"--retriever={tmp_path / 'index'}", f"--queries={tmp_path / 'q.jsonl'}"])
        == 2
    )
    assert "nothing to judge by: give --qrels FILE" in capsys.readouterr().err


def test_a_fused_retriever_is_shown_beside_its_parts(tmp_path, capsys, caplog):
    rows = [("a", "red fox"), ("b", "blue sea"), ("c", "grey cow")]
    write_jsonl(tmp_path / "c.jsonl", [{"id": i, "text": t} for i, t in rows])
    corpus = Corpus(tmp_path / "c.jsonl")
    BM25Index.build(corpus, tmp_path / "index")
    write_jsonl(tmp_path / "q.jsonl", [{"id": "1", "question": "fox"}, {"id": "2", "question": "cow"}])
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tc\t1\n")
    never = {"class_path": f"{__name__}.LastFirst", "init_args": {"corpus": str(tmp_path / "c.jsonl")}}
    fused = {
        "class_path": "Fuse",
        "init_args": {"parts": [str(tmp_path / "index"), never], "weights": [0.01, 3]},
    }
    cached = {"class_path": "Cached", "init_args": {"retriever": fused}}
    (tmp_path / "fused.yaml").write_text(json.dumps(cached))
    words = ["--queries", tmp_path / "q.jsonl", "--qrels", tmp_path / "qrels.tsv", "--metrics", "RR@10"]
    words += ["--retriever", tmp_path / "fused.yaml", "--out", tmp_path / "out"]
    assert main(["evaluate-retriever", *map(str, words)]) == 0
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["RR@10"]
    bm25, last = found["parts"].values()
    assert (bm25, last) == (1.0, (1 / 3 + 1) / 2) and found["mean"] < 1
    said = capsys.readouterr().out
    assert "fused, and its parts alone" in said and f"{last:.4f}" in said and "last first (part 2)" in said
    assert "(part 1) alone 1.0000, fused 0.6667" in caplog.text


class LastFirst(Retriever):
    """Ranks the passages of a corpus from the last to the first, whatever is asked."""

    def __init__(self, corpus: str) -> None:
        self.passages, self.generation = [*Corpus(corpus)][::-1], "last first"

    def search(self, queries, k, where=None):
        ranking = [Hit(passage, -float(i), self.generation) for i, passage in enumerate(self.passages)]
        return [ranking[:k] for _ in queries]


def test_where_leaves_out_what_it_does_not_allow(tmp_path, capsys):
    rows = [{"id": i, "text": "red fox", "metadata": {"year": y}} for i, y in (("a", 1990), ("b", 2001))]
    write_jsonl(tmp_path / "c.jsonl", rows)
    BM25Index.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "index")
    queries, qrels = write(tmp_path / "q.tsv", "1\tfox\n"), write(tmp_path / "qrels.tsv", "1 b 1\n")
    files = (f"--retriever={tmp_path / 'index'}", f"--queries={queries}", f"--qrels={qrels}")
    asked = ["evaluate-retriever", *files]
    for where, found in (('{"year": {"gte": 2000}}', 1.0), ('{"year": 1990}', 0.0)):
        out = tmp_path / f"out{found}"
        assert main([*asked, "--metrics=RR", f"--where={where}", f"--out={out}"]) == 0
        written = json.loads((out / "scores.json").read_text())
        assert (written["scores"]["RR"]["mean"], written["where"]) == (found, json.loads(where))
    assert main([*asked, '--where={"year": {"near": 1}}']) == 2
    assert "filter on 'year'" in capsys.readouterr().err


def test_a_benchmark_goes_from_its_folder_to_scores_and_a_run_that_scores_the_same(tmp_path, capsys):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows = [
        {"_id": i, "title": "", "text": t} for i, t in (("1", "red fox"), ("a", "a fox"), ("b", "blue sea"))
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(folder / "queries.jsonl", [{"_id": "1", "text": "red fox"}, {"_id": "2", "text": "sea"}])
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tb\t1\n")
    corpus, index, run = (str(tmp_path / name) for name in ("c.jsonl", "index", "a.run"))
    assert main(["corpus", f"--source={folder}", f"--out={corpus}"]) == 0
    assert main(["index", f"--corpus={corpus}", f"--out={index}"]) == 0
    asked = ["evaluate-retriever", f"--benchmark={folder}", "--metrics=RR@1", "--top_k=1"]
    for retriever, out in ((index, "live"), (run, "from_file")):
        files = (f"--retriever={retriever}", f"--out={tmp_path / out}", f"--run_out={run}")
        assert main([*asked, *files, "--query_template={query} {instruction}"]) == 0
        scores = json.loads((tmp_path / out / "scores.json").read_text())["scores"]
        assert scores["RR@1"]["mean"] == 1.0  # the passage 1, the query 1 itself, is left out
    assert main([*asked, f"--retriever={index}", "--queries=q.jsonl"]) == 2
    for template in ("{text}", "find", "{query.text}"):
        assert main([*asked, f"--retriever={index}", f"--query_template={template}"]) == 2
        assert "a text that names {query}, and may name {instruction}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("collection", "analyzer", "ndcg"),
    quick(
        [("cranfield", "plain", 0.366)],
        [("cranfield", "plain", 0.366), ("vaswani", "english", 0.441), ("vaswani", "anserini", 0.436)],
    ),
)
def test_bm25_reaches_its_scores_on_the_classic_collections(tmp_path, collection, analyzer, ndcg):
    folder = IR / collection
    if not folder.exists():
        pytest.skip("shared/data is not here")
    corpus = Corpus(folder / "corpus.jsonl")
    index = BM25Index.build(corpus, tmp_path / "index", analyzer=analyzer)
    rankings = rank_all(index, load_queries(folder / "queries.jsonl"), 10)
    values = judge(rankings, load_qrels(folder / "qrels.tsv"), parse_metrics("nDCG@10", 10))
    assert round(means(values)["nDCG@10"], 3) >= ndcg


@pytest.mark.parametrize(
    ("text", "gold", "found"),
    [
        ("京都大学は日本にある。", "京都大学", True),
        ("京都大学は日本にある。", "大京", False),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ", True),
        ("The capital is 北京。", "北京", True),
        ("partial art", "art", True),
        ("partially", "partial", False),
    ],
)
def test_an_answer_is_found_where_a_script_writes_no_spaces(text, gold, found):
    assert has_answer(text, [gold]) is found


@pytest.mark.parametrize(
    "name",
    ["P@0", "nDCG@0", "R@0", "RR@0", "AP@00", "P(rel=0)@5", "AP(rel=3000000000)", "P@3.5", "P", "RBP(p=2)",
     "nDCG(gains={1:3000000000})@5", "IPrec@2", "Judged@0", "RBP", "R@True", "BPM"],
)  # fmt: skip
def test_a_metric_out_of_range_is_one_line_and_ends_no_process(name):
    with pytest.raises(ConfigError, match="metric") as caught:
        parse_metrics(f"P@5,{name}", 100)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_may_have_commas_in_brackets_and_grades_be_large():
    names = [str(measure) for measure in parse_metrics("nDCG(gains={1:2,2:5})@5, P@3", 100)]
    assert len(names) == 2 and names[1] == "P@3"
    qrels = {"q": {"a": 1_000_000, "b": -1_000_000, "c": 5000}}
    values = judge({"q": hits("c", "a", "b")}, qrels, parse_metrics("nDCG@5,P@3,AP,Bpref,IPrec@0.5", 100))
    assert values["P@3"]["q"] == pytest.approx(2 / 3) and 0 < values["nDCG@5"]["q"] < 1


def test_queries_with_grades_below_0_alone_score_0():
    """trec_eval crashes on them."""
    found = {"p": hits("a", "b"), "q": hits("b", "a")}
    values = judge(found, {"p": {"a": -1}, "q": {"b": -2, "c": -1}}, parse_metrics(METRICS, 100))
    assert {value for of in values.values() for value in of.values()} == {0.0}


def test_a_run_of_other_queries_is_refused(tmp_path, capsys):
    for name, text in (("a.trec", "q9 Q0 x 1 2.0 r\n"), ("q.tsv", "1\tfox\n"), ("qrels.tsv", "1 0 x 1\n")):
        write(tmp_path / name, text)
    asked = [f"--retriever={tmp_path / 'a.trec'}", f"--queries={tmp_path / 'q.tsv'}"]
    assert main(["evaluate-retriever", *asked, f"--qrels={tmp_path / 'qrels.tsv'}"]) == 2
    assert "a.trec: ranks none of the queries ('q9' there, '1' here)" in capsys.readouterr().err


def test_the_command_says_a_wrong_metric_a_wrong_grade_and_a_wrong_id_in_one_line(tmp_path, capsys):
    write_jsonl(tmp_path / "c.jsonl", [{"id": "a\tb", "text": "red fox"}])
    BM25Index.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "index")
    queries, qrels = (
        write(tmp_path / "q.tsv", "1\tfox\n"),
        write(tmp_path / "qrels.tsv", "1 0 x 3000000000\n"),
    )
    asked = [
        "evaluate-retriever",
        f"--retriever={tmp_path / 'index'}",
        f"--queries={queries}",
        f"--qrels={qrels}",
    ]
    for options, said in (
        (["--metrics=P@0"], "metric 'P@0': 0 must be 1 to 1,000,000"),
        ([], "qrels.tsv:1: relevance '3000000000': must be a whole number of at most 1,000,000"),
    ):
        assert main([*asked, *options]) == 2
        assert said in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    write(qrels, "1 0 x 1\n")
    assert main([*asked, "--metrics=P@5", f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr()
    assert (
        "P@5" in said.out and r"'a\tb' as field 3: a table cannot hold it" in said.err
    )  # scores are shown first


def test_err_is_its_formula_whatever_the_ids_are():
    """Chapelle et al. 2009, grades up to 4; its script takes no ids but numbers, and none with blanks."""
    qrels, rankings = {"q two": {"Grey heron": 2}}, {"q two": hits("fox", "Grey heron")}
    [values] = judge(rankings, qrels, parse_metrics("ERR@10", 10)).values()
    assert values == {"q two": pytest.approx((2**2 - 1) / 2**4 / 2)}


def test_no_metric_at_all_is_refused():
    for names in ("", " , "):
        with pytest.raises(ConfigError, match=r"metrics .*: name one"):
            parse_metrics(names, 10)
