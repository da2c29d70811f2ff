"""Mining: which passages become negatives, and a run that was killed comes out as one that was not."""

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.training.examples import as_dataset
from retriever_server.training.mining import Rules, mine
from tests.retriever_server.training.mined import Lengths, Numbered, write_corpus, write_examples


def mined(tmp_path, rules, teacher=None, texts=None, **fields):
    """query -> negatives, and the first example, of ten queries."""
    corpus = write_corpus(tmp_path, **texts or {})
    examples = write_examples(tmp_path, corpus, **fields)
    mine(examples, Numbered(str(corpus.path)), corpus, tmp_path / "out.jsonl", Rules(**rules), teacher)
    found = Examples(tmp_path / "out.jsonl", corpus)
    return {example.query: example.negatives for example in found}, found


def test_negatives_are_what_is_found_between_the_ranks_without_positives(tmp_path):
    negatives, found = mined(tmp_path, {"first_rank": 2, "last_rank": 4})
    assert negatives["3"] == ("5", "6", "7") and negatives["9"] == ("11", "12", "13")
    assert found[3].scores == {"3": 100.01, "5": 98.01, "6": 97.01, "7": 96.01}
    assert found[3].provenance["generation"] == found[3].provenance["scores"] == "numbered"
    assert found[3].provenance["rules"] == {"first_rank": 2, "last_rank": 4}


def test_several_positives_do_not_use_up_ranks(tmp_path):
    negatives, _ = mined(tmp_path, {"last_rank": 3}, positives=["4", "5", "6"])
    assert negatives["4"] == ("7", "8", "9") and negatives["0"] == ("0", "1", "2")


def test_at_most_so_many_and_a_random_pick_repeats(tmp_path):
    assert mined(tmp_path, {"per_query": 2})[0]["0"] == ("1", "2")
    first, other = (tmp_path / name for name in ("first", "other"))
    first.mkdir(), other.mkdir()
    one, two = (
        mined(path, {"per_query": 3, "pick": "random", "last_rank": 20})[0] for path in (first, other)
    )
    assert one == two and len({tuple(int(n) - int(q) for n in of) for q, of in one.items()}) > 5


def test_texts_of_a_positive_and_repeated_texts_are_no_negatives(tmp_path):
    texts = {"p1": "Passage  number 0", "p3": "passage number 2"}
    assert mined(tmp_path, {"last_rank": 4}, texts=texts)[0]["0"] == ("2", "4")


def test_a_positive_of_a_repeated_query_is_no_negative(tmp_path):
    corpus = write_corpus(tmp_path)
    rows = [{"query": "7", "positives": ["7"]}, {"query": "7 ", "positives": ["8"]}]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    examples = Examples(tmp_path / "examples.jsonl", corpus)
    mine(examples, Numbered(str(corpus.path)), corpus, tmp_path / "out.jsonl", Rules(last_rank=2))
    assert [e.negatives for e in Examples(tmp_path / "out.jsonl", corpus)] == [("9", "10"), ("9", "10")]


def test_passages_with_the_answer_are_no_negatives(tmp_path):
    assert mined(tmp_path, {"last_rank": 3}, answers=["number 2"])[0]["0"] == ("1", "3")
    other = tmp_path / "kept"
    other.mkdir()
    kept = mined(other, {"last_rank": 3, "keep_answers": True}, answers=["number 2"])
    assert kept[0]["0"] == ("1", "2", "3")


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"margin": 3.0}, ("3", "4", "5")),  # scores fall by one a rank
        ({"relative_margin": 0.0399}, ("4", "5")),
        ({"margin": 3.0, "relative_margin": 0.0399}, ("4", "5")),
        ({"margin": -10.0}, ("1", "2", "3", "4", "5")),
    ],
)
def test_negatives_keep_a_margin_to_the_positive(tmp_path, rules, expected):
    assert mined(tmp_path, {"last_rank": 5, **rules})[0]["0"] == expected


def test_margins_go_by_the_worst_positive(tmp_path):
    negatives, _ = mined(tmp_path, {"last_rank": 5, "margin": 2.0}, positives=["0", "2"])
    assert negatives["0"] == ("4", "5", "6")


def test_nothing_keeps_a_margin_to_a_positive_that_was_not_found(tmp_path):
    negatives, found = mined(tmp_path, {"last_rank": 5, "margin": 0.0}, positives=["20"])
    assert negatives["0"] == () and found[0].scores is None


def test_a_scorer_judges_positives_and_negatives(tmp_path):
    scorer = Lengths()
    negatives, found = mined(tmp_path, {"last_rank": 9, "margin": 1.0}, scorer, positives=["8"])
    assert negatives["2"] == ("2", "3", "4", "5", "6", "7")  # 9 to 11 score higher than 8
    assert found[2].scores == {"8": 8.0, **{id_: float(id_) for id_ in negatives["2"]}}
    assert found[2].provenance["scores"] == "numbers"


def test_a_teacher_without_a_number_is_an_error(tmp_path):
    scorer = Lengths()
    scorer.score = lambda pairs: [float("nan")] * len(pairs)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="numbers: gives no number for query '0'"):
        mined(tmp_path, {}, scorer)


def test_without_margins_only_what_is_kept_is_scored(tmp_path):
    scorer = Lengths()
    mined(tmp_path, {"last_rank": 20, "per_query": 2}, scorer)
    assert scorer.pairs == 10 * 3


def test_a_second_retriever_scores_what_it_finds(tmp_path):
    corpus = write_corpus(tmp_path)
    teacher = Numbered(str(corpus.path), step=2, name="teacher")
    negatives, found = mined(tmp_path, {"last_rank": 4, "margin": 2.0}, teacher)
    # The teacher finds 0, 2, 4, 6, 8 for query 0: 1 and 3 are below all of these.
    assert negatives["0"] == ("1", "3", "4") and found[0].scores == {"0": 100.01, "4": 98.01}


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path)
    examples = write_examples(tmp_path, corpus, 10)
    retriever = Numbered(str(corpus.path))
    mine(examples, retriever, corpus, tmp_path / "whole.jsonl", queries_at_once=3)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    for fails_after, cut in ((0, b""), (2, b""), (2, b"torn"), (3, b"one line")):
        out = tmp_path / "killed.jsonl"
        broken = Numbered(str(corpus.path))
        broken.fails_after = fails_after
        with pytest.raises(KeyboardInterrupt):
            mine(examples, broken, corpus, out, queries_at_once=3)
        assert not out.exists()
        part = tmp_path / "killed.jsonl.part"
        if cut:  # what a kill in the middle of writing leaves
            lines = part.read_bytes().splitlines(keepends=True)
            part.write_bytes(b"".join(lines[:-1]) + (lines[-1][:30] if cut == b"torn" else b""))
        resumed = Numbered(str(corpus.path))
        mine(examples, resumed, corpus, out, queries_at_once=3)
        assert out.read_bytes() == expected and not part.exists()
        assert sum(resumed.batches) == 10 - 3 * (fails_after - bool(cut))
        out.unlink()


def test_a_finished_file_is_kept_and_another_run_is_refused(tmp_path):
    corpus = write_corpus(tmp_path)
    examples, out = write_examples(tmp_path, corpus), tmp_path / "out.jsonl"
    first, again = Numbered(str(corpus.path)), Numbered(str(corpus.path))
    assert mine(examples, first, corpus, out) == mine(examples, again, corpus, out)
    assert not again.batches
    for others in (
        lambda: mine(examples, again, corpus, out, Rules(per_query=3)),
        lambda: mine(examples, Numbered(str(corpus.path), name="other"), corpus, out),
        lambda: mine(write_examples(tmp_path, corpus, 9), again, corpus, out),
    ):
        with pytest.raises(
            ConfigError, match="comes from other queries, another retriever or other settings"
        ):
            others()


def test_what_was_mined_is_refused_after_the_corpus_changed(tmp_path):
    _, found = mined(tmp_path, {})
    with found.corpus.path.open("a") as file:
        file.write('{"id": "new", "text": "one more"}\n')
    with pytest.raises(DataError, match=r"out.jsonl:1: made from a corpus of hash"):
        Examples(tmp_path / "out.jsonl", Corpus(tmp_path / "corpus.jsonl"))


@pytest.mark.parametrize("other, message", [("29", "is not in"), ("3", "has another text in")])
def test_hits_of_another_corpus_are_refused(tmp_path, other, message):
    theirs = write_corpus(tmp_path)
    retriever = Numbered(str(theirs.path))
    (tmp_path / "ours").mkdir()
    rows = [{"id": p.id, "text": "changed" if p.id == other == "3" else p.text} for p in theirs]
    write_jsonl(tmp_path / "ours" / "corpus.jsonl", [row for row in rows if row["id"] != "29"])
    corpus = Corpus(tmp_path / "ours" / "corpus.jsonl")
    examples = write_examples(tmp_path, corpus)
    with pytest.raises(DataError, match=f"'{other}'.* {message}"):
        mine(examples, retriever, corpus, tmp_path / "out.jsonl")


def test_a_retriever_that_changes_meanwhile_is_refused(tmp_path):
    corpus = write_corpus(tmp_path)
    retriever = Numbered(str(corpus.path))
    search = retriever.search
    retriever.search = lambda *of: (search(*of), setattr(retriever, "generation", "newer"))[0]  # type: ignore
    with pytest.raises(DataError, match="changed from numbered to newer meanwhile"):
        mine(write_examples(tmp_path, corpus), retriever, corpus, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "rules", [{"first_rank": 0}, {"first_rank": 9, "last_rank": 8}, {"per_query": 0}, {"pick": "best"}]
)
def test_wrong_rules_are_refused(rules):
    with pytest.raises(ConfigError, match=f"{next(iter(rules))} = .*must be"):
        Rules(**rules)


def test_a_real_index_mines(tmp_path):
    rows = [
        {"id": str(i), "text": text} for i, text in enumerate(["red fox", "red sea", "a blue sea", "sky"])
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    corpus = Corpus(tmp_path / "corpus.jsonl")
    index = BM25Index.build(corpus, tmp_path / "index")
    write_jsonl(tmp_path / "e.jsonl", [{"query": "red fox", "positives": ["0"]}])
    summary = mine(Examples(tmp_path / "e.jsonl", corpus), index, corpus, tmp_path / "out.jsonl")
    [line] = read_jsonl(tmp_path / "out.jsonl")
    assert line["negatives"] == ["1"] and set(line["scores"]) == {"0", "1"} and summary.negatives == 1
    assert line["provenance"]["generation"] == index.generation


def test_a_retriever_as_teacher_scores_every_pair(tmp_path):
    """BM25 finds nothing for queries of words that their passages do not hold; its score is 0 there."""
    corpus = write_corpus(tmp_path, p3="a red fox", p4="the blue sea")
    examples = write_examples(tmp_path, corpus, 10)
    teacher = BM25Index.build(corpus, tmp_path / "teacher")
    mine(examples, Numbered(str(corpus.path)), corpus, tmp_path / "out.jsonl", Rules(per_query=3), teacher)
    for example in (found := Examples(tmp_path / "out.jsonl", corpus)):
        assert set(example.scores) == {*example.positives, *example.negatives}
        assert not example.is_scored_by_miner and example.provenance["scores"] == teacher.generation
    [hits] = teacher.search(["5"], 1)
    assert found[5].scores["5"] == pytest.approx(hits[0].score, abs=1e-6) and found[3].scores["3"] == 0
    assert len(as_dataset(found, negatives=3, labels=True)) == 10  # none is left out


def test_the_miners_own_scores_hold_what_it_did_not_find(tmp_path):
    rows = [{"id": str(i), "text": f"red {'fox ' * i}"} for i in range(9)]
    write_jsonl(tmp_path / "corpus.jsonl", [*rows, {"id": "sea", "text": "the blue sea"}])
    corpus = Corpus(tmp_path / "corpus.jsonl")
    index = BM25Index.build(corpus, tmp_path / "index")
    write_jsonl(tmp_path / "e.jsonl", [{"query": "fox", "positives": ["sea"]}])
    mine(Examples(tmp_path / "e.jsonl", corpus), index, corpus, tmp_path / "out.jsonl", Rules(last_rank=2))
    [found] = Examples(tmp_path / "out.jsonl", corpus)
    assert found.is_scored_by_miner and len(found.negatives) == 2
    assert found.scores["sea"] == 0 and min(found.scores[id_] for id_ in found.negatives) > 0


def test_the_miners_own_scores_are_no_labels_unless_told(tmp_path):
    mined(tmp_path, {"per_query": 2})
    found = Examples(tmp_path / "out.jsonl", Corpus(tmp_path / "corpus.jsonl"))
    says = (
        r"out.jsonl:1: its scores are those of the retriever that mined it \(numbered\), no teacher's: mine"
    )
    for form in ("tuple", "pair", "list"):
        with pytest.raises(DataError, match=says):
            as_dataset(found, negatives=2, labels=True, form=form)
    assert len(as_dataset(found, negatives=2, labels=True, labels_of="any")) == 10
    assert len(as_dataset(found, negatives=2)) == 10


def test_a_scorer_that_gives_too_few_numbers_is_refused(tmp_path):
    scorer = Lengths()
    scorer.score = lambda pairs: [1.0]  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"numbers: gave 1 numbers for \d+ pairs"):
        mined(tmp_path, {}, scorer)
