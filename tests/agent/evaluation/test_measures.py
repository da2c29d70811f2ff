"""Measures of a question's record and of a run, against tables computed by hand."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from agent.evaluation.measures import evaluation_record
from agent.evaluation.samples import pass_at, sampled
from agent.evaluation.scores import macro_mean, score
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import DataError
from data.metrics import significance
from data.metrics.answers import contains, exact_match, f1, hotpot_f1, triviaqa_em
from data.metrics.significance import bootstrap
from data.records import Hit, Passage, Question
from rl.algorithm.rewards import REWARDS


def asked(name="q", gold=("right",), **metadata):
    return Question(name, f"Who is {name}?", gold, metadata)


def tried(question, answer="right", found=(), confidence=None, stop=StopReason.ANSWERED):
    """A trajectory whose i-th search found the passages of the i-th word of `found`, a letter each."""
    searches = [
        SearchRecord("q", [Hit(Passage(p, "t", p.upper()), 1.0, "g1") for p in word], 0.1) for word in found
    ]
    segments = [
        Segment(SegmentKind.PROMPT, [1] * 10, "?"),
        *(Segment(SegmentKind.OBSERVATION, [1] * 5, "!") for _ in found),
        Segment(SegmentKind.POLICY, [1] * 3, f"<answer>{answer}</answer>", None),
    ]
    return Trajectory(question, segments, stop, answer, searches, confidence=confidence, seconds=2.0)


def test_a_record_says_when_the_evidence_was_in_what_was_new_and_what_it_cost():
    question = asked(supporting_ids=["a", "d"])
    record = evaluation_record(tried(question, found=("ab", "bd", "ad", "xy"), confidence=0.7))
    assert (record["evidence_recall"], record["searches_after_evidence"]) == (1.0, 2)
    assert record["novelty"] == [1.0, 0.5, 0.0, 1.0]
    assert (record["tokens_in"], record["tokens_out"], record["seconds"]) == (30, 3, 2.0)
    assert (record["confidence"], record["generations"], record["abstained"]) == (0.7, ["g1"], False)
    half = evaluation_record(tried(question, found=("ab", "")))
    assert (half["evidence_recall"], half["searches_after_evidence"], half["novelty"]) == (0.5, None, [1, 0])
    titled = evaluation_record(tried(asked(supporting_titles=["A"]), found=("xa",)))
    unknown = evaluation_record(tried(asked(), found=("ab",)))
    for found, in_vain in (("ab ab ba", 0), ("ab ab ba ab", 1), ("a a a b b b b", 2), ("", 0)):
        again = evaluation_record(tried(asked(), found=found.split()))
        assert again["searches_after_nothing_new"] == in_vain
    assert (titled["evidence_recall"], unknown["evidence_recall"]) == (1.0, None)


def test_a_run_against_a_table_by_hand():
    rows = [
        ("right", 0.9, "a"),
        ("wrong", 0.8, ""),
        ("I don't know", None, "ab"),
        (None, None, ""),
        ("right", 0.3, ""),
    ]
    records = [
        evaluation_record(tried(asked(f"q{i}", supporting_ids=["a"]), answer, tuple(found), confidence))
        for i, (answer, confidence, found) in enumerate(rows)
    ]
    scores = score(records)
    assert (scores["coverage"], scores["abstained_rate"]) == (0.6, 0.2)
    assert scores["accuracy_given_answered"]["mean"] == pytest.approx(2 / 3)
    assert scores["evidence_recall"]["mean"] == pytest.approx(2 / 5)
    assert scores["searches_after_evidence"] == 0.5  # q0 none, q2 one
    assert scores["searches_after_nothing_new"] == 0
    found = scores["calibration"]
    assert (found["n"], found["brier"]) == (3, pytest.approx((0.01 + 0.64 + 0.49) / 3))
    assert (found["auc"], found["aurc"]) == (0.5, pytest.approx((0 + 1 / 2 + 1 / 3) / 3))
    assert scores["right_within_searches"] == {"0": 0.2, "1": 0.4, "2": 0.4}
    assert scores["cost_per_right_answer"] == {
        "tokens_in": 32.5,
        "tokens_out": 7.5,
        "seconds": 5.0,
        "searches": 1.5,
    }
    json.dumps(scores, allow_nan=False)


def test_one_question_with_nothing_known_scores_without_a_nan():
    scores = score([evaluation_record(tried(asked(), None, stop=StopReason.TURN_LIMIT))])
    assert scores["accuracy_given_answered"]["mean"] is None and scores["cost_per_right_answer"] is None
    json.dumps(scores, allow_nan=False)


# ---- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        chosen = list(itertools.combinations([1] * right + [0] * (samples - right), k))
        assert pass_at(k, np.array([right]), samples)[0] == pytest.approx(np.mean([any(c) for c in chosen]))


def test_several_samples_of_a_question_are_one_question():
    questions = sampled([asked("a"), asked("b")], 3)
    assert [q.id for q in questions] == ["a", "b", "a~2", "b~2", "a~3", "b~3"]
    answers = ["right", "right", "wrong", "right", "wrong", "right"]
    scores = score([tried(q, answer) for q, answer in zip(questions, answers, strict=True)])
    assert (scores["n"], scores["clusters"], scores["samples"]) == (2, 2, 3)
    assert scores["em"]["mean"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["pass"]["2"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["pass"]["3"]["mean"] == 1
    with pytest.raises(DataError, match="from 2 to 3 samples"):
        score([tried(q) for q in questions[:5]])


def test_samples_of_a_sample_are_samples_of_its_question():
    second = sampled([asked("a")], 2)[1]
    assert {each.metadata["sample_of"] for each in sampled([second], 3)} == {"a"}


def test_intervals_of_the_mean_of_samples_hold_the_truth_in_95_of_100_runs(monkeypatch):
    """Questions of a chance ~ Beta(1, 2), 4 samples each; nominal 95 %."""
    monkeypatch.setattr(significance, "RESAMPLES", 2000)
    generator, held, trials = np.random.default_rng(1), 0, 300
    names = [str(i) for i in range(60)]
    for _ in range(trials):
        chances = generator.beta(1, 2, 60)
        means = (generator.random((60, 4)) < chances[:, None]).mean(axis=1, keepdims=True)
        low, high = bootstrap(means, names)[:, 0]
        held += low <= 1 / 3 <= high
    assert 0.90 <= held / trials <= 0.98


# ---- sets --------------------------------------------------------------------------------------


def test_the_macro_mean_weighs_sets_alike_and_its_interval_shrinks_as_that_of_independent_ones():
    one = {"mean": 0.5, "low": 0.4, "high": 0.6}
    found = macro_mean([one] * 4)
    assert found == {"mean": 0.5, "low": pytest.approx(0.45), "high": pytest.approx(0.55)}
    questions = [asked(f"n{i}", data_source="nq") for i in range(30)] + [asked("m", data_source="musique")]
    scores = score([tried(q, "right" if q.id == "m" else "wrong") for q in questions])
    assert (scores["em"]["mean"], scores["macro_em"]["mean"]) == (pytest.approx(1 / 31), 0.5)
    assert list(scores["by_set"]) == ["musique", "nq"]


def test_official_metrics_of_single_sets():
    assert (hotpot_f1("yes it is", ["yes"]), f1("yes it is", ["yes"])) == (0.0, 0.5)
    assert (hotpot_f1("Yes.", ["yes"]), hotpot_f1("the red fox", ["red fox cub"])) == (
        1.0,
        pytest.approx(0.8),
    )
    assert (
        triviaqa_em("New_York-City", ["new york city"]),
        exact_match("New_York-City", ["new york city"]),
    ) == (1, 0)
    assert (contains("a politician.", ["Politician"]), contains("Polit", ["Politician"])) == (1, 0)
    scores = score([tried(asked("a", ("The Beatles",), data_source="popqa"), "it was The Beatles")])
    assert scores["official"]["metric"] == "contains" and scores["official"]["mean"] == 1


SQUAD = Path(__file__).parents[4] / "shared" / "data" / "squad" / "dev.jsonl"


@pytest.mark.skipif(not SQUAD.exists(), reason="needs ../shared/data")
def test_em_and_f1_agree_with_those_of_transformers_for_squad_on_2000_pairs():
    from transformers.data.metrics import squad_metrics

    golds = [json.loads(line)["golden_answers"][0] for line in SQUAD.read_text().splitlines()]
    draw = random.Random(0)
    for _ in range(2000):
        gold = draw.choice(golds)
        words = draw.choice(golds).split() + gold.split() if draw.random() < 0.7 else gold.split()
        answer = " ".join(draw.sample(words, draw.randint(1, len(words))))
        if draw.random() < 0.3:
            answer = f"The {gold.upper()}!"
        if not squad_metrics.get_tokens(gold) or not squad_metrics.get_tokens(answer):
            continue  # what normalizes to nothing stands for itself here (data/metrics/answers.py)
        assert exact_match(answer, [gold]) == squad_metrics.compute_exact(gold, answer)
        assert f1(answer, [gold]) == pytest.approx(squad_metrics.compute_f1(gold, answer))


def test_the_truth_reward_is_ternary():
    truth = REWARDS["truth"]
    answers = ["Right.", "I don't know", "wrong", None]
    assert [truth(tried(asked(), answer)) for answer in answers] == [1, 0, -1, -1]
