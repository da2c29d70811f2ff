"""Invented worlds and the half-taught demonstrations over them."""

import hashlib
import json
import random
import re
from collections import Counter
from functools import cache

import pytest

from data.atlas.build import INVENTED_QUESTIONS, build_invented
from data.atlas.demonstrations import LAST, Demonstrator, demonstrations
from data.atlas.invented import invent_world
from data.atlas.names import Language, holds_real_name, real_names
from data.atlas.passages import render_passages
from data.atlas.phrasings import ASKED
from data.atlas.questions import KINDS, make_questions
from data.atlas.world import load_world
from data.errors import ConfigError
from data.jsonl import read_jsonl
from scripts import __main__ as sleuth

MANY = {"one_hop": 40, "two_hop": 40, "three_hop": 10, "comparison": 5}


@cache
def all_demonstrations():
    return list(demonstrations(2000, seed=3))


def worlds(count):
    rng = random.Random(11)
    return [invent_world(rng) for _ in range(count)]


def test_invented_names_are_no_real_ones():
    for world in worlds(150):
        for entity in world.entities:
            assert entity.name.lower() not in real_names()
            if entity.type != "element":
                assert not holds_real_name(entity.name)


def test_the_check_for_real_names_catches_them():
    assert holds_real_name("Port Lisbon")
    assert holds_real_name("sri lanka")
    assert not holds_real_name("Port Xuqqa")


def test_no_held_out_name_is_asked_about_in_a_demonstration():
    held_out = {e.name for e in load_world().entities if e.split != "train"}
    for demonstration in all_demonstrations():
        words = re.sub(r"[?.,]", "", demonstration["question"]).split()
        runs = {" ".join(words[i : i + n]) for i in range(len(words)) for n in range(1, 5)}
        searched = {step["search"] for step in demonstration["steps"] if "search" in step}
        assert not (runs | searched) & held_out


def test_invented_names_are_varied():
    rng = random.Random(5)
    names = [Language(rng).name(rng) for _ in range(3000)]
    assert len(set(names)) > 2900
    assert {len(name.split()) for name in names} >= {1, 2, 3}
    assert set(map(len, names)) >= set(range(3, 21))
    for mark in ("-", "'", " de ", " al ", "St. "):
        assert any(mark in name for name in names), mark
    assert set("".join(names).lower()) >= set("abcdefghijklmnopqrstuvwxyz")


def test_invented_worlds_render_and_are_asked_like_the_real_one():
    for world in worlds(20):
        passages = {passage.title: passage for passage in render_passages(world)}
        assert len(passages) == len(world.entities)
        questions = make_questions(world, counts=MANY)
        assert {q.metadata["kind"] for q in questions} >= {"one_hop", "two_hop"}
        for question in questions:
            last = passages[question.metadata["hops"][-1]]
            told = f"{last.title} {last.text}".lower()
            if question.metadata["kind"] != "comparison":
                assert any(answer.lower() in told for answer in question.gold_answers)


def test_invented_countries_tell_the_relations_that_real_ones_do():
    def told(entities):
        return {r for e in entities for r in e.facts}

    invented = told(e for world in worlds(40) for e in world.entities)
    assert invented == told(load_world().entities)


def test_an_invented_test_is_frozen_and_asks_enough_of_each_kind(tmp_path):
    """docs/quickstart.md shows figures on that of seed 1."""
    made = build_invented(tmp_path, seed=1)
    assert made["questions"]["test"] == dict.fromkeys(KINDS, INVENTED_QUESTIONS)
    digest = hashlib.sha256((tmp_path / "test.jsonl").read_bytes() + (tmp_path / "corpus.jsonl").read_bytes())
    assert digest.hexdigest().startswith("0c3022eccf86bb90")
    titles = {row["title"] for row in read_jsonl(tmp_path / "corpus.jsonl")}
    asked = {name for row in read_jsonl(tmp_path / "test.jsonl") for name in row["metadata"]["hops"]}
    assert asked <= titles and not any(title.lower() in real_names() for title in titles)
    assert build_invented(tmp_path / "other", seed=2) != made


def test_the_command_makes_it_and_refuses_a_world_both_hard_and_invented(tmp_path, capsys):
    assert sleuth.main(["atlas", "--invented", "1", "--out", str(tmp_path)]) == 0
    assert "test: 1,600 questions (400 one_hop, 400 two_hop, 400" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "test.jsonl"]
    assert sleuth.main(["atlas", "--invented", "1", "--hard", "true"]) == 2
    assert "hard, invented: give one of them, not both" in capsys.readouterr().err


def test_demonstrations_are_deterministic_json():
    again = list(demonstrations(60, seed=3))
    assert again == all_demonstrations()[:60]
    assert list(demonstrations(60, seed=4)) != again
    assert json.loads(json.dumps(again)) == again
    assert len({d["id"] for d in all_demonstrations()}) == len(all_demonstrations()) == 2000


def test_a_demonstration_searches_the_named_and_then_only_what_it_has_read():
    for demonstration in all_demonstrations():
        read = demonstration["question"]
        *searches, last = demonstration["steps"]
        assert 1 <= len(searches) <= 3
        for step in searches:
            assert step["search"] in read
            (passage,) = step["passages"]
            assert passage["title"] == step["search"]
            read += " " + passage["text"]
        assert set(last) == {"think", "answer"}
        assert last["answer"].lower() in (read + demonstration["question"]).lower()


def test_the_demonstrator_is_half_taught():
    right, count, stopped = Counter(), Counter(), Counter()
    for demonstration in all_demonstrations():
        kind = demonstration["kind"]
        count[kind] += 1
        hit = demonstration["steps"][-1]["answer"] in demonstration["golden_answers"]
        right[kind] += hit
        if len(demonstration["steps"]) == 2:
            stopped[kind] += 1
            assert not (hit and kind == "two_hop")  # who stops early guesses wrongly
    assert right["one_hop"] == count["one_hop"]
    assert right["two_hop"] / count["two_hop"] == pytest.approx(0.08, abs=0.05)
    assert stopped["two_hop"] / count["two_hop"] == pytest.approx(0.6, abs=0.05)
    assert set(count) == {"one_hop", "two_hop", "three_hop", "comparison"}


def test_a_demonstrator_that_compares_reads_both_and_says_what_it_read():
    how = Demonstrator(compares=True, kinds={"comparison": 1.0})
    for record in demonstrations(30, seed=4, demonstrator=how):
        one, other, last = record["steps"]
        first, second = one["search"], other["search"]
        said = re.fullmatch(f"{re.escape(first)} ([0-9,]+), {re.escape(second)} ([0-9,]+)[.]", last["think"])
        assert said and other["think"].startswith(f"{first} {said[1]}. ")
        values = [float(value.replace(",", "")) for value in said.groups()]
        assert last["answer"] == (first if values[0] > values[1] else second)
        texts = [step["passages"][0]["text"] for step in (one, other)]
        assert all(value in text for value, text in zip(said.groups(), texts, strict=True))


def test_a_demonstrator_with_p_right_goes_all_the_way():
    sure = Demonstrator(p_stop=0.0, p_third=0.0, p_right=1.0, kinds={"two_hop": 0.5, "three_hop": 0.5})
    for record in demonstrations(60, seed=6, demonstrator=sure):
        assert record["steps"][-1]["answer"] in record["golden_answers"]
        assert len(record["steps"]) == {"two_hop": 3, "three_hop": 4}[record["kind"]]


def test_a_demonstrator_that_tells_puts_both_values_into_the_question_and_searches_nothing():
    telling = Demonstrator(tells=True, kinds={"comparison": 1.0})
    for record in demonstrations(30, seed=4, demonstrator=telling):
        (last,) = record["steps"]
        assert record["question"].endswith(last["think"]) and last["answer"] in record["golden_answers"]
        assert len(re.findall(" [0-9][0-9,]*[,.]", last["think"])) == 2


def test_a_demonstrator_that_always_stops_never_searches_twice_for_two_hops():
    shown = demonstrations(200, demonstrator=Demonstrator(p_stop=1.0, kinds={"two_hop": 1.0}))
    assert {len(d["steps"]) for d in shown} == {2}


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"kinds of questions are \['four_hop'\], allowed are one_hop"):
        Demonstrator(kinds={"four_hop": 1.0})


def test_a_thought_before_a_search_gives_no_reason_and_one_before_an_answer_quotes_the_passage():
    quoted = 0
    for demonstration in all_demonstrations():
        *searches, last = demonstration["steps"]
        for step in searches:
            assert len(step["think"].replace(step["search"], "NAME").split()) <= 6
            assert " is in " not in step["think"] and "because" not in step["think"]
        read = searches[-1]["passages"][0]["text"].lower()
        if last["think"] not in LAST:
            quoted += 1
            assert last["think"].lower().rstrip(".") in read and last["answer"] in last["think"]
    assert quoted > len(all_demonstrations()) / 3


def test_follow_ups_are_answered_by_the_passage():
    followed = [d for d in all_demonstrations() if d["follow_ups"]]
    assert followed and all(d["kind"] == "one_hop" for d in followed)
    for demonstration in followed:
        read = demonstration["steps"][0]["passages"][0]["text"]
        questions = [demonstration["question"], *(f["question"] for f in demonstration["follow_ups"])]
        assert len(set(questions)) == len(questions)
        assert all(f["answer"] in read for f in demonstration["follow_ups"])


def test_demonstrations_use_every_training_phrasing_and_no_other():
    asked = " ".join(d["question"] for d in all_demonstrations())
    for relation in ("capital", "currency", "area", "country"):
        *training, test_only = (options.split("{x}")[0] for options in ASKED[relation])
        assert all(start in asked for start in training if start)
        assert test_only not in asked or any(test_only in start for start in training)
