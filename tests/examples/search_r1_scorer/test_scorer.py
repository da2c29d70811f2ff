"""The scorers give what the published ones gave, and are rewards by their names."""

from pathlib import Path

import pytest

from data.jsonl import read_json
from examples.search_r1_scorer.scorer import search_r1_em, search_r1_em_format
from rl.algorithm.rewards import combine
from tests.rl.algorithm.test_rewards import SEARCH, rollout

PUBLISHED = read_json(Path(__file__).with_name("search_r1_scores.json"))


def earned(name, trajectory):
    [reward] = combine({name: 1.0})([trajectory])
    return reward.total


@pytest.mark.parametrize("row", PUBLISHED["rows"], ids=lambda row: f"{row[0]}: {row[1][-40:]!r}")
def test_it_gives_what_the_published_ones_gave(row):
    prompt, response, gold_answers, *published = row
    whole = PUBLISHED["prompts"][prompt] + response
    ours = [
        search_r1_em(whole, gold_answers),
        search_r1_em_format(whole, gold_answers),
        search_r1_em_format(whole, gold_answers, retrieval_score=0.1),
    ]
    assert ours == published


@pytest.mark.parametrize(("turn", "gold"), [(SEARCH, "Beijing"), ("no action at all", "and")])
def test_the_prompts_example_and_what_the_policy_is_told_are_answers_to_it(turn, gold):
    assert earned("search_r1_legacy", rollout([turn], gold)) == 1.0


@pytest.mark.parametrize(("gibberish", "paid"), [("asdf", 0.1), ("", 0.1), ("<answer> Paris </answer>", 0.8)])
def test_gibberish_is_paid_as_a_wrong_answer(gibberish, paid):
    assert earned("search_r1_legacy_format", rollout([gibberish])) == pytest.approx(paid)
