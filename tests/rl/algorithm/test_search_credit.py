"""Credit of searches: potentials, events, and what of them lies on which token."""

import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.records import Hit, Passage, Question
from rl.algorithm.advantages import ADVANTAGES, RewardBatch
from rl.algorithm.presets import AlgorithmConfig
from rl.algorithm.search_credit import POTENTIALS, events, query_span, search_credit

QUESTION = Question("1", "Who?", ("Ada Lovelace",), {"supporting_ids": ["a", "b", "c"]})
CREDIT = AlgorithmConfig(advantage="search_credit")
decode = "".join
every_potential = pytest.mark.parametrize("potential", POTENTIALS)


def written(*finds, question=QUESTION, thought="so "):
    """A trajectory whose n-th search finds these passages; its tokens are characters."""
    segments, searches = [Segment(SegmentKind.PROMPT, ["Q"], "Q")], []
    for turn, found in enumerate(finds):
        text = f"{thought}<search>who {turn}</search>"
        segments.append(Segment(SegmentKind.POLICY, list(text), text))
        segments.append(Segment(SegmentKind.OBSERVATION, ["x"] * 7, "x"))
        texts = {"b": "It was Ada Lovelace."}
        hits = [Hit(Passage(id_, texts.get(id_, "Nothing.")), 1.0, "g") for id_ in found]
        searches.append(SearchRecord(f"who {turn}", hits, 0.1, turn=turn))
    segments.append(Segment(SegmentKind.POLICY, list("<answer>Ada</answer>"), ""))
    return Trajectory(question, segments, StopReason.ANSWERED, "Ada", searches)


def turn_tokens(trajectory):
    return [len(s.token_ids) for s in trajectory.segments if s.kind is SegmentKind.POLICY]


def credit(*trajectories, **changes):
    algorithm = replace(CREDIT, **changes)
    counts = [turn_tokens(t) for t in trajectories]
    found = search_credit(trajectories, counts, len(trajectories), algorithm, decode)
    return found.split([sum(each) for each in counts])


def test_potentials_of_one_trajectory_by_hand():
    searched = written("b", "ax", "", "c")
    assert events(searched, "coverage") == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert events(searched, "coverage_ordered") == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert events(searched, "answer_match") == [1, 0, 0, 0]
    both = replace(searched, question=replace(QUESTION, metadata={**QUESTION.metadata, "kind": "comparison"}))
    assert events(both, "coverage_ordered") == events(searched, "coverage")


@every_potential
@pytest.mark.parametrize("seed", range(5))
def test_events_telescope_to_the_potential_of_all_searches(potential, seed):
    draw = random.Random(seed)
    searched = written(*("".join(draw.sample("abcxyz", draw.randint(0, 3))) for _ in range(6)))
    earned = events(searched, potential)
    assert min(earned) >= 0
    assert sum(earned) == pytest.approx(POTENTIALS[potential](QUESTION, searched.searches))


@every_potential
def test_a_repeated_search_earns_nothing(potential):
    assert events(written("ab", "ab", "b"), potential)[1:] == [0, 0]


def test_a_group_of_one_and_a_group_that_agrees_earn_nothing():
    assert not credit(written("a"))[0].any()
    assert not torch.cat(credit(written("a", "b"), written("a", "b"))).any()
    third = credit(written("a", "b"), written("a"))  # nobody else made a second search
    assert not torch.cat(third).any()


def test_credit_lies_on_the_query_with_the_mass_of_its_turn():
    finds = [("a", "b"), ("x", "b"), ("x", "x"), ("a",)]
    group = [written(*each) for each in finds]
    found = credit(*group, credit_weight=0.5)
    for at in range(2):
        earned = {row: events(t, "coverage")[at] for row, t in enumerate(group) if len(t.searches) > at}
        mean, spread = fmean(earned.values()), stdev(earned.values())
        for row, event in earned.items():
            text = "".join(group[row].segments[1 + 2 * at].token_ids)
            start = sum(turn_tokens(group[row])[:at])
            part = found[row][start : start + len(text)]
            query = range(text.index("who"), text.index("who") + len("who 0"))
            expected = 0.5 * (event - mean) / (spread + 1e-4) * len(text) / len(query)
            on = [expected if place in query else 0.0 for place in range(len(text))]
            assert part.tolist() == pytest.approx(on, abs=1e-4)
            assert float(part.sum()) == pytest.approx(
                0.5 * len(text) * (event - mean) / (spread + 1e-4), abs=1e-3
            )
    assert not any(each[-len("<answer>Ada</answer>") :].any() for each in found)


def test_the_permuted_control_gives_the_same_events_to_others():
    group = [written(*each) for each in ("a", "x", "x", "b")]
    plain = [round(float(each.sum()), 4) for each in credit(*group)]
    shuffled = []
    for seed in range(8):
        counts = [turn_tokens(t) for t in group]
        permuted = replace(CREDIT, credit_permuted=True)
        found = search_credit(group, counts, 4, permuted, decode, seed).split([sum(each) for each in counts])
        shuffled.append([round(float(each.sum()), 4) for each in found])
        assert sorted(shuffled[-1]) == sorted(plain)
    assert any(each != plain for each in shuffled)


def test_the_query_is_found_in_its_tag_and_not_in_the_thought():
    token_ids = ["who ", "1? ", "<search>", "w", "ho", " 1", "</", "search>"]
    assert query_span(token_ids, "who 1", decode) == (3, 6)
    assert query_span(token_ids, "ho 1</", decode) == (4, 7)
    assert query_span(token_ids, "elsewhere", decode) == (0, 8)
    assert query_span(token_ids, "", decode) == (0, 8)


def test_the_outcome_stays_on_all_tokens():
    counts = torch.tensor([2, 3])
    rewards, turns = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), torch.zeros(5, dtype=torch.long)
    earned = torch.tensor([0.0, 0.5, 0.0, -0.5, 0.0])
    batch = RewardBatch(rewards, counts, turns, 2, credit=earned)
    outcome = ADVANTAGES["grpo"](batch, 1.0, 1.0)
    torch.testing.assert_close(ADVANTAGES["search_credit"](batch, 1.0, 1.0), outcome + earned)
