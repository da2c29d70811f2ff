"""Scores against their definitions, intervals against theory, and evaluations that go on after a kill."""

import asyncio
import json

import numpy as np
import pytest

from agent.evaluation.compare import paired_difference
from agent.evaluation.evaluate import evaluate
from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import read_records
from agent.evaluation.scores import score
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError, DataError, RetrieverError, RunStopped
from data.metrics import significance
from data.metrics.significance import RESAMPLES, bootstrap, format_estimate
from data.records import Hit, Passage, Question
from tests.samples import quick

SETTINGS = {"policy": "p", "protocol": "compact", "retriever": "g1", "sampling": {"temperature": 0.0}}


def question(i, kind="one_hop", cluster=None):
    metadata = {"kind": kind} | ({"cluster": cluster} if cluster else {})
    return Question(f"q{i}", f"What is {i}?", (f"answer {i}",), metadata)


def trajectory(asked, answer="wrong", searches=1, stop=StopReason.ANSWERED, valid=True):
    hit = Hit(Passage("p1", "text", "title"), 1.5, "g1")
    return Trajectory(
        question=asked,
        segments=[
            Segment(SegmentKind.PROMPT, [1, 2, 3], asked.text),
            Segment(SegmentKind.POLICY, [4, 5], f"<answer>{answer}</answer>", [-0.1, -0.2]),
        ],
        stop_reason=stop,
        answer=answer,
        searches=[SearchRecord("query", [hit], 0.01)] * searches,
        valid_format=valid,
    )


def right(asked, **kwargs):
    return trajectory(asked, asked.gold_answers[0], **kwargs)


def record(asked, correct):
    return evaluation_record(right(asked) if correct else trajectory(asked))


# ---- scores ------------------------------------------------------------------------------------


def test_scores_are_counted_over_all_and_by_kind():
    scores = score(
        [
            right(question(1), searches=1),
            trajectory(question(2), "answer 2 and more", searches=2, valid=False),
            right(question(3, "two_hop"), searches=3),
            trajectory(question(4, "two_hop"), None, 2, StopReason.TURN_LIMIT, valid=False),
        ]
    )
    assert (scores["n"], scores["em"]["mean"], scores["cover_em"]["mean"]) == (4, 0.5, 0.75)
    assert scores["f1"]["mean"] == pytest.approx((1 + 2 * 0.5 * 1 / 1.5 + 1) / 4)
    assert (scores["searches_per_question"], scores["valid_format_rate"], scores["answered_rate"]) == (
        2.0,
        0.5,
        0.75,
    )
    assert scores["stop_reasons"] == {"answered": 3, "turn_limit": 1}
    assert scores["policy_tokens_per_question"] == 2.0
    assert scores["by_kind"]["two_hop"]["searches_per_question"] == 2.5
    assert scores["by_kind"]["two_hop"]["em"]["mean"] == 0.5


def test_kinds_come_by_number_of_hops_and_then_by_name():
    kinds = ["three_hop", "comparison", "two_hop", "bridge", "one_hop"]
    scores = score([right(question(i, kind)) for i, kind in enumerate(kinds)])
    assert list(scores["by_kind"]) == ["one_hop", "two_hop", "three_hop", "bridge", "comparison"]


def test_a_failed_search_counts_as_wrong_and_is_shown():
    scores = score([right(question(1)), right(question(2), stop=StopReason.SEARCH_FAILED)])
    assert (scores["em"]["mean"], scores["search_failed"], scores["n"]) == (0.5, 1, 2)


def test_records_and_trajectories_score_alike():
    items = [right(question(1)), trajectory(question(2))]
    assert score(items) == score([evaluation_record(item) for item in items])


def test_every_question_is_scored_exactly_once():
    items = [right(question(1)), right(question(2))]
    with pytest.raises(DataError, match="more than once: q1"):
        score([*items, items[0]])
    with pytest.raises(DataError, match="trajectories: missing 1 question: q3"):
        score(items, [question(1), question(2), question(3)])
    with pytest.raises(DataError, match="questions: missing 1 question: q2"):
        score(items, [question(1)])
    with pytest.raises(DataError, match="0 trajectories"):
        score([])


# ---- intervals ---------------------------------------------------------------------------------


def test_with_single_questions_the_interval_is_that_of_the_binomial():
    values = (np.arange(400) < 120).astype(float)[:, None]
    low, high = bootstrap(values, [str(i) for i in range(400)])[:, 0]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.004), pytest.approx(0.3 + half, abs=0.004))


def test_the_bootstrap_agrees_with_a_plain_loop_over_clusters_of_unequal_size():
    generator = np.random.default_rng(3)
    clusters = [f"c{i}" for i, size in enumerate(generator.integers(1, 9, 30)) for _ in range(size)]
    values = generator.random(len(clusters))
    groups = [values[[c == name for c in clusters]] for name in dict.fromkeys(clusters)]
    means = [
        np.concatenate([groups[i] for i in generator.integers(0, 30, 30)]).mean() for _ in range(RESAMPLES)
    ]
    assert bootstrap(values[:, None], clusters)[:, 0] == pytest.approx(
        np.percentile(means, [2.5, 97.5]), abs=0.004
    )


def test_questions_that_fail_together_widen_the_interval():
    items = [(right if i % 2 else trajectory)(question(10 * i + j, cluster=f"c{i}"), searches=1)
             for i in range(20) for j in range(10)]  # fmt: skip
    alone = [(right if i % 2 else trajectory)(question(10 * i + j)) for i in range(20) for j in range(10)]
    clustered, single = score(items), score(alone)
    assert (clustered["clusters"], single["clusters"]) == (20, 200)
    width = [s["em"]["high"] - s["em"]["low"] for s in (clustered, single)]
    assert width[0] == pytest.approx(width[1] * np.sqrt(10), rel=0.1)


def coverage(clusters, a, b, trials=300):
    """Share of intervals that hold the true mean: clusters of ten questions of one chance ~ Beta(a, b)."""
    generator, hits = np.random.default_rng(0), 0
    names = [str(i) for i in range(clusters) for _ in range(10)]
    for _ in range(trials):
        chances = generator.beta(a, b, clusters).repeat(10)
        low, high = bootstrap((generator.random(len(chances)) < chances)[:, None].astype(float), names)[:, 0]
        hits += low <= a / (a + b) <= high
    return hits / trials


@pytest.mark.parametrize(("clusters", "least"), quick([(5, 0.88)], [(5, 0.88), (10, 0.91), (20, 0.91)]))
@pytest.mark.parametrize(("a", "b"), quick([(1.4, 0.6)], [(1.4, 0.6), (3, 3)]))
def test_intervals_of_few_clusters_hold_the_true_mean(monkeypatch, clusters, least, a, b):
    monkeypatch.setattr(significance, "RESAMPLES", 2000)
    assert coverage(clusters, a, b) >= least


def test_below_twenty_clusters_the_interval_is_wider_and_says_so():
    for clusters, few in ((19, True), (20, False)):
        items = [(right if i % 2 else trajectory)(question(10 * i + j, cluster=f"c{i}"))
                 for i in range(clusters) for j in range(3)]  # fmt: skip
        estimate = score(items)["em"]
        assert ("few_clusters" in estimate) == few
        assert format_estimate(estimate).endswith(" (19 clusters)" if few else "]")
    assert significance._tail(20) == 0.025 > significance._tail(19) > significance._tail(5) > 0


def test_one_cluster_has_a_mean_and_no_interval():
    scores = score([right(question(1, cluster="c")), trajectory(question(2, cluster="c"))])
    assert scores["em"] == {"mean": 0.5, "low": None, "high": None}
    assert format_estimate(scores["em"]) == "0.500"
    assert format_estimate({"mean": 0.617, "low": 0.53, "high": 0.6871}) == "0.617 [0.530, 0.687]"


def test_many_clusters_go_through_in_blocks():
    values = np.random.default_rng(0).random((1500, 1))
    low, high = bootstrap(values, [str(i) for i in range(1500)])[:, 0]
    assert low < values.mean() < high < low + 0.04


# ---- differences -------------------------------------------------------------------------------


def test_the_paired_difference_is_of_the_same_questions_whatever_their_order():
    questions = [question(i, "two_hop" if i % 2 else "one_hop") for i in range(100)]
    before = [record(q, i % 2 == 0) for i, q in enumerate(questions)]
    after = [record(q, True) for q in questions][::-1]
    difference = paired_difference(before, after)
    assert difference["em"]["mean"] == 0.5 and difference["n"] == 100
    assert 0.39 < difference["em"]["low"] < 0.42 and 0.58 < difference["em"]["high"] < 0.61
    assert difference["by_kind"]["two_hop"]["em"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert difference["by_kind"]["one_hop"]["em"]["mean"] == 0.0
    assert (difference["before"], difference["after"]) == (0.5, 1.0)


def test_a_difference_of_different_questions_names_the_missing_ones():
    before = [record(question(i), True) for i in range(3)]
    with pytest.raises(DataError, match="after: missing 2 questions: q1, q2"):
        paired_difference(before, before[:1])
    with pytest.raises(DataError, match="before: missing 1 question: q2"):
        paired_difference(before[:2], before)


# ---- evaluations on disk -----------------------------------------------------------------------


class Rollouts:
    """A rollout function that answers rightly, remembers what it was asked, and may die after some."""

    def __init__(self, die_after=None):
        self.asked, self.die_after = [], die_after

    async def __call__(self, questions, on_finished):
        for i, asked in enumerate(questions):
            if i == self.die_after:
                raise RetrieverError("gone")
            self.asked.append(asked.id)
            on_finished(right(asked))


QUESTIONS = [question(i) for i in range(6)]


def run(rollouts, out, questions=QUESTIONS, **changes):
    return asyncio.run(evaluate(questions, rollouts, out, SETTINGS | changes))


def test_an_evaluation_writes_records_and_scores(tmp_path):
    scores = run(Rollouts(), tmp_path / "after")
    assert scores["em"]["mean"] == 1.0
    assert json.loads((tmp_path / "after" / "scores.json").read_text()) == scores
    records = read_records(tmp_path / "after")
    assert [r["id"] for r in records] == [q.id for q in QUESTIONS]
    assert records[0]["em"] == 1.0 and "token_ids" not in records[0]["segments"][0]


def test_an_evaluation_that_was_killed_asks_only_what_is_left(tmp_path):
    with pytest.raises(RetrieverError):
        run(Rollouts(die_after=4), tmp_path)
    assert len(read_records(tmp_path)) == 4 and not (tmp_path / "scores.json").exists()
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(path.read_bytes()[:-50])  # the kill came in mid-line
    again = Rollouts()
    assert run(again, tmp_path)["n"] == 6
    assert again.asked == ["q3", "q4", "q5"]
    assert [r["id"] for r in read_records(tmp_path)] == [q.id for q in QUESTIONS]
    finished = Rollouts()
    assert run(finished, tmp_path)["n"] == 6 and finished.asked == []


def test_another_evaluation_in_the_same_folder_is_refused_by_what_differs(tmp_path):
    run(Rollouts(), tmp_path)
    with pytest.raises(ConfigError, match=r"policy: 'p' -> 'other'"):
        run(Rollouts(), tmp_path, policy="other")
    with pytest.raises(ConfigError, match=r"sampling\.temperature: 0\.0 -> 1\.0"):
        run(Rollouts(), tmp_path, sampling={"temperature": 1.0})
    with pytest.raises(ConfigError, match="questions"):
        run(Rollouts(), tmp_path, questions=[*QUESTIONS[:-1], question(9)])


def test_a_question_that_never_comes_back_is_an_error_not_a_smaller_n(tmp_path):
    async def forgetful(questions, on_finished):
        for asked in questions[1:]:
            on_finished(right(asked))

    with pytest.raises(DataError, match="missing 1 question: q0"):
        run(forgetful, tmp_path)
    assert not (tmp_path / "scores.json").exists()


def test_a_question_that_comes_back_twice_is_an_error(tmp_path):
    async def eager(questions, on_finished):
        on_finished(right(questions[0]))
        on_finished(right(questions[0]))

    with pytest.raises(DataError, match="'q0' was rolled out twice"):
        run(eager, tmp_path)
    with pytest.raises(DataError, match="questions: question ids occur more than once: q0"):
        run(eager, tmp_path / "other", questions=[QUESTIONS[0]] * 2)


def test_half_of_a_surrogate_pair_in_an_answer_becomes_a_replacement_character(tmp_path):
    async def odd(questions, on_finished):
        for asked in questions:
            on_finished(trajectory(asked, "\ud83d <b>"))

    run(odd, tmp_path)
    assert read_records(tmp_path)[0]["answer"] == "\ufffd <b>"


def failed(asked):
    search = SearchRecord("query", [], 30.0, "RetrieverUnavailable: gave up")
    return Trajectory(asked, [], StopReason.SEARCH_FAILED, searches=[search])


def test_failed_searches_are_asked_again_on_resume(tmp_path):
    questions = [question(i) for i in range(10)]

    async def one_fails(todo, on_finished):
        for asked in todo:
            on_finished(failed(asked) if asked.id == "q3" else right(asked))

    first = asyncio.run(evaluate(questions, one_fails, tmp_path, SETTINGS))
    assert first["search_failed"] == 1 and first["em"]["mean"] == 0.9
    asked_again = []

    async def all_well(todo, on_finished):
        asked_again.extend(asked.id for asked in todo)
        for asked in todo:
            on_finished(right(asked))

    second = asyncio.run(evaluate(questions, all_well, tmp_path, SETTINGS))
    assert asked_again == ["q3"] and second["search_failed"] == 0 and second["em"]["mean"] == 1.0


def test_too_many_failed_searches_stop_the_evaluation_and_score_nothing(tmp_path):
    questions = [question(i) for i in range(10)]

    async def down(todo, on_finished):
        on_finished(right(todo[0]))
        for asked in todo[1:]:
            on_finished(failed(asked))

    with pytest.raises(RunStopped, match=r"failed for 2 of 3 questions asked \(Retr.*gave up\); the others"):
        asyncio.run(evaluate(questions, down, tmp_path, SETTINGS))
    assert not (tmp_path / "scores.json").exists()
