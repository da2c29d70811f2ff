"""Credit by the likelihood of the gold answer: the probes, gains that telescope, and who is paid."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from agent.policy import load_policy
from agent.protocol import COMPACT, SEARCH_R1, Answer
from agent.tools import Search
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.atlas.build import build_atlas
from data.corpus import Corpus
from data.questions import load_questions
from data.records import Hit
from rl.algorithm.advantages import ADVANTAGES, RewardBatch
from rl.algorithm.answer_likelihood import VALUES, answer_credit, probes, turn_credit, turn_gains
from rl.algorithm.presets import AlgorithmConfig
from tests.rl.algorithm.test_search_credit import QUESTION, turn_tokens, written

CREDIT = AlgorithmConfig(advantage="answer_likelihood", credit_weight=0.2)
encode: Any = list  # tokens are characters
decode: Any = "".join
every_value = pytest.mark.parametrize("value", VALUES)


def credit(group, logprobs, outcomes, seed=0, **changes):
    counts = [turn_tokens(t) for t in group]
    algorithm = replace(CREDIT, **changes)
    found = answer_credit(group, counts, len(group), algorithm, logprobs, outcomes, seed)
    return [part.tolist() for part in found.split([sum(each) for each in counts])]


def test_a_probe_is_the_context_of_a_turn_then_the_answer_of_which_alone_is_scored():
    searched = written("a", "b")
    found = probes(searched, COMPACT, encode)
    assert len(found) == 3  # before each turn
    for at, probe in enumerate(found):
        before = [token for segment in searched.segments[: 1 + 2 * at] for token in segment.token_ids]
        context, scored = probe.segments
        assert context.token_ids == before + encode("<think> </think><answer>")
        assert (scored.kind, scored.token_ids) == (SegmentKind.POLICY, encode(" Ada Lovelace"))
        assert probe.loss_mask == [0] * len(context.token_ids) + [1] * len(scored.token_ids)


def test_the_gold_answer_stands_in_no_context_and_not_in_the_trajectory():
    secret = replace(QUESTION, gold_answers=("Xyzzy",))
    searched = written("a", "b", question=secret)
    before = searched.token_ids
    for probe in probes(searched, COMPACT, encode):
        assert "Xyzzy" not in decode(probe.segments[0].token_ids)
        assert decode(probe.token_ids).endswith("<answer> Xyzzy")
    assert searched.token_ids == before and "Xyzzy" not in decode(before)


def test_a_thought_that_the_prompt_has_begun_is_not_begun_again():
    searched = written("a")
    opened = replace(searched.segments[0], text="?<think>", token_ids=encode("?<think>"))
    begun = replace(searched, segments=[opened, *searched.segments[1:]])
    first = probes(begun, SEARCH_R1, encode)[0].segments[0].token_ids
    assert decode(first) == "?<think>  </think><answer>"


def test_a_question_without_answers_has_no_probes_and_earns_nothing():
    unanswered = written("a", "b", question=replace(QUESTION, gold_answers=()))
    assert probes(unanswered, COMPACT, encode) == []
    assert not any(credit([unanswered] * 2, [[], []], [1.0, -1.0])[0])


@every_value
def test_gains_telescope_and_the_last_turn_has_none(value):
    logprobs = [-4.0, -2.5, -3.0, -0.1]
    gains = turn_gains(written("a", "b", "c"), logprobs, value)
    assert len(gains) == 3
    assert sum(gains) == pytest.approx(VALUES[value](-0.1) - VALUES[value](-4.0))


def test_values_are_those_of_the_papers():
    gains = turn_gains(written("a"), [-3.0, -1.0], "log_ratio")
    assert gains == pytest.approx([math.log(3.1 / 1.1)])  # V_1 - V_0 = log(d_0 / d_1) - log(d_0 / d_0)
    gains = turn_gains(written("a"), [-3.0, -1.0], "probability")
    assert gains == pytest.approx([math.exp(-1) - math.exp(-3)])


@every_value
def test_a_search_that_shows_nothing_new_gains_nothing(value):
    repeated = turn_gains(written("ab", "ab", "b"), [-3.0, -2.0, -1.0, -0.5], value)
    assert repeated[0] > 0 and repeated[1:] == [0, 0]
    harmful = turn_gains(written("ab", "ab"), [-3.0, -2.0, -2.5], value)
    assert harmful[1] < 0


def test_a_turn_is_credited_for_its_window_and_the_outcome_within_reach():
    gains = [1.0, 0.5, -0.25, 2.0]
    for turn, found in enumerate(turn_credit(gains, outcome=0.7)):
        top = sum(0.8**step * gains[turn + step] for step in range(3) if turn + step < 4)
        below = sum(0.8**step for step in range(3) if turn + step < 4)
        fill = 2 * 0.8 ** (4 - turn) * 0.7 if turn + 3 > 4 else 0.0
        assert found == pytest.approx(top / below + fill)


def test_credit_lies_on_all_tokens_of_its_turn_and_none_on_the_last_turn():
    group = [written("a", "b"), written("x")]
    logprobs = [[-3.0, -2.0, -0.5], [-3.0, -3.5]]
    found = credit(group, logprobs, [1.0, -1.0])
    for row, trajectory in enumerate(group):
        own = turn_credit(turn_gains(trajectory, logprobs[row], "log_ratio"), [1.0, -1.0][row])
        expected = [0.2 * each for each in own] + [0.0]
        lengths = turn_tokens(trajectory)
        flat = [each for each, length in zip(expected, lengths, strict=True) for _ in range(length)]
        assert found[row] == pytest.approx(flat)


def test_the_permuted_control_gives_the_same_gains_to_others():
    group = [written("a"), written("b"), written("c"), written("x")]
    logprobs = [[-3.0, end] for end in (-0.5, -1.0, -2.0, -4.0)]
    plain = [round(sum(each), 3) for each in credit(group, logprobs, [0.0] * 4)]
    shuffled = []
    for seed in range(8):
        again = credit(group, logprobs, [0.0] * 4, seed, credit_permuted=True)
        shuffled.append([round(sum(each), 3) for each in again])
        assert sorted(shuffled[-1]) == sorted(plain)
    assert any(each != plain for each in shuffled)


def test_the_outcome_stays_on_all_tokens():
    counts, turns = torch.tensor([2, 2]), torch.tensor([0, 1, 0, 1])
    earned = torch.tensor([0.3, 0.0, -0.3, 0.0])
    batch = RewardBatch(torch.tensor([0.0, 1.0, 0.0, 0.0]), counts, turns, 2, credit=earned)
    outcome = ADVANTAGES["grpo"](batch, 1.0, 1.0)
    torch.testing.assert_close(ADVANTAGES["answer_likelihood"](batch, 1.0, 1.0), outcome + earned)


@pytest.mark.slow
@torch.no_grad()
def test_a_planted_useful_search_gains_the_most_in_four_of_five_trajectories(tmp_path):
    """Three searches in the embedded world, one of which finds the answer; the seed policy judges."""
    build_atlas(tmp_path)
    policy, draw = load_policy("atlas", "cpu", "float32"), random.Random(0)
    passages = list(Corpus(tmp_path / "corpus.jsonl"))
    named = {passage.id: passage for passage in passages}

    def ids(text):
        return policy.tokenizer.encode(text, add_special_tokens=False)

    def segment(kind, text):
        return Segment(kind, ids(text), text)

    def gains(question, shown):
        segments, searches = [segment(SegmentKind.PROMPT, COMPACT.prompt(question.text))], []
        for turn, passage in enumerate(shown):
            read = COMPACT.render_observation(COMPACT.render_passages([passage]))
            segments.append(segment(SegmentKind.POLICY, COMPACT.render_turn("", Search(passage.title))))
            segments.append(segment(SegmentKind.OBSERVATION, read))
            searches.append(SearchRecord(passage.title, [Hit(passage, 1.0, "g")], 0.0, turn=turn))
        segments.append(segment(SegmentKind.POLICY, COMPACT.render_turn("", Answer("?"))))
        searched = Trajectory(question, segments, StopReason.ANSWERED, "?", searches)
        logprobs = []
        for probe in probes(searched, COMPACT, ids):
            answer = torch.tensor(probe.segments[1].token_ids)[:, None]
            logits = policy.model(torch.tensor([probe.token_ids])).logits[0, -len(answer) - 1 : -1]
            logprobs.append(float(logits.log_softmax(-1).gather(1, answer).mean()))
        return turn_gains(searched, logprobs, "log_ratio")

    asked = [q for q in load_questions(str(tmp_path / "dev.jsonl")) if q.metadata["kind"] == "two_hop"]
    found = 0
    for question in draw.sample(asked, 40):
        planted, shown = draw.randrange(3), draw.sample(passages, 3)
        shown[planted] = named[question.metadata["entities"][-1]]
        own = gains(question, shown)
        found += own.index(max(own)) == planted
    assert found >= 32
