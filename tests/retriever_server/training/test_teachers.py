"""Labels of several teachers, added stage by stage, and queries cropped from passages."""

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.formats.beir import load_queries
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.training.teachers import Ranks, crops, label
from tests.retriever_server.training.mined import Numbered, write_corpus, write_examples

RANKS = Ranks((1, 2), (5, 6))


@pytest.fixture
def taught(tmp_path):
    corpus = write_corpus(tmp_path)
    queries = load_queries(write_examples(tmp_path, corpus).path)
    return corpus, queries, lambda step: Numbered(str(corpus.path), step=step, name=f"step {step}")


def test_each_teachers_first_ranks_are_positives_and_deeper_ones_negatives(tmp_path, taught):
    corpus, queries, teacher = taught
    [stage] = label(queries, [teacher(1)], corpus, tmp_path / "out", RANKS)
    example = Examples(stage, corpus)[3]
    assert (example.positives, example.negatives) == (("3", "4"), ("7", "8"))
    alone = Examples(tmp_path / "out" / "teacher_1.jsonl", corpus)[3]
    assert list((alone.scores or {}).values()) == [100.01, 99.01, 96.01, 95.01]


def test_stages_add_teachers_and_no_positive_of_one_is_a_negative_of_another(tmp_path, taught):
    corpus, queries, teacher = taught
    stages = label(queries, [teacher(1), teacher(4), teacher(2)], corpus, tmp_path / "out", RANKS)
    found = [Examples(path, corpus)[0] for path in stages]
    assert [example.positives for example in found] == [("0", "1"), ("0", "1", "4"), ("0", "1", "4", "2")]
    # Teacher 2's rank 2 is passage 4, teacher 1's rank 5: it has become a positive.
    assert [example.negatives for example in found] == [
        ("4", "5"),
        ("16", "5", "20"),
        ("16", "8", "5", "20", "10"),
    ]
    assert found[2].provenance["teachers"] == ["step 1", "step 4", "step 2"]


def test_a_teacher_that_was_asked_is_not_asked_again(tmp_path, taught):
    corpus, queries, teacher = taught
    label(queries, [teacher(1)], corpus, tmp_path / "out", RANKS)
    again, added = teacher(1), teacher(2)
    label(queries, [again, added], corpus, tmp_path / "out", RANKS)
    assert not again.batches and added.batches
    with pytest.raises(ConfigError, match=r"teacher_1.jsonl: comes from other queries"):
        label(queries, [added], corpus, tmp_path / "out", RANKS)


def test_a_teacher_that_finds_nothing_is_an_error(tmp_path, taught):
    corpus, queries, teacher = taught
    silent = teacher(1)
    silent.search = lambda queries, k, where=None: [[] for _ in queries]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="step 1: finds nothing for query '0'"):
        label(queries, [silent], corpus, tmp_path / "out", RANKS)


@pytest.mark.parametrize("ranks", [((0, 1), (5, 6)), ((3, 2), (5, 6)), ((1, 5), (5, 6)), ((1, 2), (6, 5))])
def test_wrong_ranks_are_refused(ranks):
    with pytest.raises(ConfigError, match="negatives after them"):
        Ranks(*ranks)


def test_crops_are_whole_sentences_of_their_passage_and_repeat(tmp_path):
    sentences = ["The fox runs over the hill.", "Short one.", "Nobody has ever seen it sleep."]
    rows = [{"id": f"p{i}", "text": " ".join(sentences)} for i in range(8)] + [
        {"id": "tiny", "text": "too short"}
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    corpus = Corpus(tmp_path / "corpus.jsonl")
    found = list(crops(corpus, max_words=6))
    assert found == list(crops(corpus, max_words=6)) != list(crops(corpus, max_words=6, seed=1))
    assert {example.query for example in found} == {sentences[0], sentences[2]}
    assert [example.positives for example in found] == [(f"p{i}",) for i in range(8)]
    both = list(crops(corpus, per_passage=5, max_words=6))
    assert len(both) == 16 and len({example.query_id for example in both}) == 16
    write_jsonl(tmp_path / "crops.jsonl", (example.as_record() for example in both))
    assert len(Examples(tmp_path / "crops.jsonl", corpus)) == len(list(read_jsonl(tmp_path / "crops.jsonl")))
