"""Test collections with pictures: ViDoRe's two layouts, BEIR-like folders with images."""

from __future__ import annotations

import json

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.formats.benchmarks import benchmark_passages, is_benchmark, load_benchmark
from data.jsonl import write_jsonl
from data.pages.images import png, read_image
from data.records import Item, Question
from retriever_server.evaluation import rank_all
from scripts import __main__ as sleuth
from tests.data.formats.test_benchmarks import write_lines, write_parquet

Image = pytest.importorskip("PIL.Image")


def picture(colour: str) -> dict:
    return {"bytes": png(Image.new("RGB", (20, 10), colour)), "path": None}


@pytest.fixture
def vidore(tmp_path):
    folder = tmp_path / "docvqa_beir"
    pages = [{"corpus-id": n, "image": picture(colour)} for n, colour in enumerate(("red", "green", "blue"))]
    write_parquet(folder / "corpus" / "test-00000-of-00002.parquet", pages[:2])
    write_parquet(folder / "corpus" / "test-00001-of-00002.parquet", pages[2:])
    queries = [{"query-id": n, "query": f"what is on {n}?"} for n in range(3)]
    write_parquet(folder / "queries" / "test-00000-of-00001.parquet", queries)
    qrels = [{"query-id": 0, "corpus-id": 2, "score": 1.0}, {"query-id": 1, "corpus-id": 0, "score": 2.0}]
    write_parquet(folder / "qrels" / "test-00000-of-00001.parquet", qrels)
    return folder


def test_vidore_has_the_queries_that_are_judged(vidore):
    assert is_benchmark(vidore)
    benchmark = load_benchmark(str(vidore))
    assert [(q.id, q.text) for q in benchmark.queries] == [("0", "what is on 0?"), ("1", "what is on 1?")]
    assert benchmark.qrels == {"0": {"2": 1}, "1": {"0": 2}}
    with pytest.raises(ConfigError, match=r":dev: must name a split, one of test"):
        load_benchmark(f"{vidore}:dev")


def test_its_pages_become_a_corpus_with_pictures(vidore, tmp_path):
    out = tmp_path / "ours" / "corpus.jsonl"
    assert sleuth.main(["corpus", str(vidore), "--out", str(out)]) == 0
    corpus = Corpus(out)
    assert [p.id for p in corpus] == ["0", "1", "2"]
    assert [read_image(p.image).getpixel((0, 0)) for p in corpus] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert json.loads(out.read_text().splitlines()[0])["image"].startswith("images/")


def test_texts_in_the_layout_of_the_hub_are_read(tmp_path):
    folder = tmp_path / "nfcorpus"
    write_parquet(
        folder / "corpus" / "corpus-00000-of-00001.parquet",
        [{"_id": "d1", "title": "Oslo", "text": "A city."}],
    )
    write_parquet(
        folder / "queries" / "queries-00000-of-00001.parquet", [{"_id": "q1", "text": "which city?"}]
    )
    qrels = [{"query-id": "q1", "corpus-id": "d1", "score": 1}]
    write_parquet(folder / "qrels" / "test-00000-of-00001.parquet", qrels)
    benchmark = load_benchmark(str(folder))
    assert [(q.id, q.text) for q in benchmark.queries] == [("q1", "which city?")]
    assert benchmark.qrels == {"q1": {"d1": 1}}
    [row] = benchmark_passages(str(folder))
    assert (row["id"], row["title"], row["text"]) == ("d1", "Oslo", "A city.")
    with pytest.raises(ConfigError, match=r":train: must name a split, one of test"):
        load_benchmark(f"{folder}:train")


def test_the_newer_names_and_texts_are_read(tmp_path):
    folder = tmp_path / "v3"
    page = {"corpus_id": 7, "image": picture("red"), "markdown": "# Red"}
    write_parquet(folder / "corpus" / "test-00000-of-00001.parquet", [page])
    write_parquet(folder / "queries" / "test-00000-of-00001.parquet", [{"query_id": 1, "query": "red?"}])
    qrels = [{"query_id": 1, "corpus_id": 7, "score": 1}]
    write_parquet(folder / "qrels" / "test-00000-of-00001.parquet", qrels)
    assert load_benchmark(str(folder)).qrels == {"1": {"7": 1}}
    assert next(iter(benchmark_passages(str(folder), tmp_path)))["text"] == "# Red"


def test_the_first_form_has_a_question_and_its_page_on_a_row(tmp_path):
    rows = [
        {"query": "a?", "image": picture("red"), "image_filename": "r.png"},
        {"query": "b?", "image": picture("red"), "image_filename": "r.png"},
        {"query": None, "image": picture("blue"), "image_filename": "b.png"},
    ]
    write_parquet(tmp_path / "v1" / "data" / "test-00000-of-00001.parquet", rows)
    benchmark = load_benchmark(str(tmp_path / "v1"))
    assert benchmark.qrels == {"0": {"r.png": 1}, "1": {"r.png": 1}}
    assert [row["id"] for row in benchmark_passages(str(tmp_path / "v1"), tmp_path)] == ["r.png", "b.png"]
    other = tmp_path / "documents" / "data"
    write_parquet(other / "a.parquet", [{"title": "no pages here"}])
    assert not is_benchmark(other.parent)


def test_a_row_without_its_id_or_with_a_broken_picture_is_refused(vidore, tmp_path):
    write_parquet(vidore / "corpus" / "test-00001-of-00002.parquet", [{"corpus-id": 9, "image": 7}])
    with pytest.raises(DataError, match="page '9': an image must be a path or bytes, found int"):
        list(benchmark_passages(str(vidore), tmp_path))
    (vidore / "queries" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: cannot be read"):
        load_benchmark(str(vidore))


def test_a_beir_folder_may_have_images_on_both_sides(tmp_path):
    folder = tmp_path / "emoji"
    write_lines(
        folder / "corpus.jsonl", [{"_id": "d1", "image": "pics/a.png"}, {"_id": "d2", "text": "a cat"}]
    )
    write_lines(
        folder / "queries.jsonl", [{"_id": "q1", "text": "cat"}, {"_id": "q2", "image": "pics/b.png"}]
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    out = tmp_path / "ours" / "corpus.jsonl"
    write_jsonl(out, benchmark_passages(str(folder), out.parent))
    assert [(p.id, p.text) for p in Corpus(out)] == [("d1", ""), ("d2", "a cat")]
    assert (out.parent / json.loads(out.read_text().splitlines()[0])["image"]).resolve() == (
        folder / "pics" / "a.png"
    )  # fmt: skip
    cat, drawing = load_benchmark(str(folder)).queries
    assert cat.asked == "cat"
    assert drawing.asked == Item(str(folder / "pics" / "b.png"))


def test_an_evaluation_searches_with_the_image_of_a_query():
    class Seen:
        def search(self, queries, k, where=None):
            self.queries = queries
            return [[] for _ in queries]

    seen = Seen()
    rank_all(seen, [Question("1", "x", (), {"query_image": "a.png"}), Question("2", "y", ())], 5)  # type: ignore
    assert seen.queries == [Item("a.png", "x"), "y"]
