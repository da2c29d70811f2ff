"""Advantages against hand-computed numbers, loops over their definitions, and what must not change them."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.algorithm.advantages import ADVANTAGES, RewardBatch, gae
from rl.algorithm.credit import place_rewards, whiten

GROUPED = ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "turn"]

# A batch is a list of trajectories, each a list of turns, each the rewards of its policy tokens: quarters,
# so that sums are exact and equal returns are equal.
token_rewards = st.integers(-4, 4).map(lambda n: n / 4)
trajectories = st.lists(st.lists(token_rewards, min_size=1, max_size=4), max_size=3)


@st.composite
def batches(draw, group_sizes=(2, 3, 4)):
    group_size = draw(st.sampled_from(group_sizes))
    count = group_size * draw(st.integers(1, 3))
    return draw(st.lists(trajectories, min_size=count, max_size=count)), group_size


def flat(batch, group_size, values=None):
    tokens = [(reward, number) for turns in batch for number, turn in enumerate(turns) for reward in turn]
    return RewardBatch(
        torch.tensor([reward for reward, _ in tokens]),
        torch.tensor([sum(len(turn) for turn in turns) for turns in batch]),
        torch.tensor([number for _, number in tokens], dtype=torch.long),
        group_size,
        values,
        values,  # any number a token does for the credit of searches
    )


def against(mine, returns, scale):
    """One return against those of its group, its own among them."""
    if max(returns) == min(returns):
        return 0.0
    difference = mine - statistics.mean(returns)
    if scale == "spread":
        return difference / (statistics.stdev(returns) + 1e-4)
    return difference * len(returns) / (len(returns) - 1) if scale == "leave one out" else difference


def by_loops(name, batch, group_size, gamma, gae_lambda=1.0, values=()):
    scale = {"grpo": "spread", "turn": "spread", "rloo": "leave one out"}.get(name)
    expected, values = [], list(values)
    for position, turns in enumerate(batch):
        start = position // group_size * group_size
        group = [other for other in batch[start : start + group_size] if other]
        rewards = [reward for turn in turns for reward in turn]
        own = [values.pop(0) for _ in rewards] if name == "gae" else [0.0] * len(rewards)
        own.append(0.0)
        number = [k for k, turn in enumerate(turns) for _ in turn]
        for i in range(len(rewards)):
            later = range(i, len(rewards))
            if name == "gae":
                steps = [rewards[j] + gamma * own[j + 1] - own[j] for j in later]
                expected.append(sum((gamma * gae_lambda) ** k * step for k, step in enumerate(steps)))
            elif name == "reinforce_pp":
                expected.append(sum(gamma ** (j - i) * rewards[j] for j in later))
            elif name == "turn":
                there = [other for other in group if len(other) > number[i]]
                totals = [to_go(other, number[i], gamma) for other in there]
                expected.append(against(to_go(turns, number[i], gamma), totals, scale))
            else:
                totals = [sum(map(sum, other)) for other in group]
                expected.append(against(sum(rewards), totals, scale))
    return torch.tensor(expected)


def to_go(turns, number, gamma):
    return sum(gamma ** (k - number) * sum(turns[k]) for k in range(number, len(turns)))


@pytest.mark.parametrize("name", ADVANTAGES)
@given(batch=batches(), gamma=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_equal_to_loops_over_the_definition(name, batch, gamma, seed):
    batch, group_size = batch
    tokens = flat(batch, group_size).rewards.numel()
    values = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    result = ADVANTAGES[name](flat(batch, group_size, values), gamma, 0.5)
    credited = name in ("search_credit", "answer_likelihood")
    outcome = "grpo" if credited else name
    expected = by_loops(outcome, batch, group_size, gamma, 0.5, values.tolist())
    expected = expected + values if credited else expected
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


BY_HAND = {
    "grpo": [0.8659, -0.8659, -0.8659, 0.8659, 1.4999, -0.5, -0.5, -0.5],
    "dr_grpo": [0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5],
    "rloo": [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2, -2 / 3, -2 / 3, -2 / 3],
    "reinforce_pp_baseline": [0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5],
    "reinforce_pp": [1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_groups_by_hand(name):
    batch = [[[0.0, reward]] for reward in (1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0)]
    expected = torch.tensor(BY_HAND[name]).repeat_interleave(2)
    result = ADVANTAGES[name](flat(batch, 4), 1.0, 1.0)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_turns_by_hand():
    # Returns from the first turn on: .5 + 1 = 1.5, 0 and 0; from the second: 1 and 0, of two who got there.
    batch = [[[0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0]], [[0.0]]]
    first, second = 2 / 3**0.5, 0.5**0.5
    expected = torch.tensor([first, second, second, -first / 2, -first / 2, -second, -first / 2])
    torch.testing.assert_close(ADVANTAGES["turn"](flat(batch, 3), 1.0, 1.0), expected, atol=5e-4, rtol=0)


# Four policy tokens, three observation tokens between the second and the third, the reward on the last.
VALUES = torch.tensor([0.3, 0.4, 0.6, 0.7])
REWARDS = torch.tensor([0.0, 0.0, 0.0, 1.0])
CORRECT = torch.tensor([0.637, 0.566, 0.385, 0.300])


def estimate(values, gamma, gae_lambda):
    turns = torch.tensor([0, 0, 1, 1])
    return gae(RewardBatch(REWARDS, torch.tensor([4]), turns, 1, values), gamma, gae_lambda)


def padded_gae(observation_values, gamma, gae_lambda, skip=False):
    """The recursion over (T,) positions, with three observation tokens in the midst of the policy's four."""
    values = [*VALUES[:2].tolist(), *observation_values, *VALUES[2:].tolist()]
    mask = [1, 1, 0, 0, 0, 1, 1]
    advantages, advantage, following = [0.0] * 7, 0.0, 0.0
    for t in reversed(range(7)):
        if skip and not mask[t]:
            continue
        delta = (1.0 if t == 6 else 0.0) + gamma * following - values[t]
        advantage = delta + gamma * gae_lambda * advantage
        advantages[t], following = advantage, values[t]
    return torch.tensor([a for a, m in zip(advantages, mask, strict=True) if m])


def close(one, other):
    return torch.allclose(one, other, atol=6e-4, rtol=0)


def test_gae_carries_value_and_advantage_through_observations():
    assert close(estimate(VALUES, 1.0, 0.95), CORRECT)
    assert close(padded_gae([3.3] * 3, 1.0, 0.95, skip=True), CORRECT)


def test_a_recursion_that_steps_through_observations_gives_other_advantages():
    leaky, zeroed = padded_gae([3.3] * 3, 1.0, 0.95), padded_gae([0.0] * 3, 1.0, 0.95)
    assert close(leaky, torch.tensor([0.954, 0.899, 0.385, 0.300]))
    assert close(zeroed, torch.tensor([0.507, 0.428, 0.385, 0.300]))
    assert not close(leaky, CORRECT) and not close(zeroed, CORRECT)


def test_gae_discounts_once_a_policy_token():
    assert close(estimate(torch.zeros(4), 0.99, 1.0), torch.tensor([0.970, 0.980, 0.990, 1.0]))


def test_gae_without_values_is_refused():
    with pytest.raises(ValueError, match="advantage gae needs the critic's values"):
        gae(flat([[[1.0]]], 1), 1.0, 1.0)


@pytest.mark.parametrize("name", GROUPED)
@given(batch=batches(), gamma=st.sampled_from([0.5, 1.0]))
def test_advantages_of_a_group_sum_to_zero(name, batch, gamma):
    batch, group_size = batch
    episodes = flat(batch, group_size)
    advantages = ADVANTAGES[name](episodes, gamma, 1.0)
    turns = episodes.turns if name == "turn" else torch.zeros_like(episodes.turns)
    sums = {}
    for key, value in {  # one token speaks for its trajectory, or its turn
        (row, number): value
        for row, number, value in zip(episodes.row.tolist(), turns.tolist(), advantages.tolist(), strict=True)
    }.items():
        group = (key[0] // group_size, key[1])
        sums[group] = sums.get(group, 0.0) + value
    assert all(abs(total) < 1e-5 for total in sums.values())


@pytest.mark.parametrize("name", GROUPED)
@given(batch=batches(), data=st.data())
def test_the_order_within_a_group_changes_nothing(name, batch, data):
    batch, size = batch
    order = [
        start + i
        for start in range(0, len(batch), size)
        for i in data.draw(st.permutations(range(size)), label="order")
    ]
    straight, shuffled = flat(batch, size), flat([batch[i] for i in order], size)
    expected = ADVANTAGES[name](straight, 1.0, 1.0).split(straight.counts.tolist())
    result = ADVANTAGES[name](shuffled, 1.0, 1.0).split(shuffled.counts.tolist())
    for position, i in enumerate(order):
        torch.testing.assert_close(result[position], expected[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_equal_rewards_has_no_advantage(name):
    assert not ADVANTAGES[name](flat([[[1.2]]] * 8, 8), 1.0, 1.0).any()  # whose mean in fp32 is not 1.2
    assert not ADVANTAGES[name](flat([[[0.3]]] * 3 + [[[1.0]]] * 3, 3), 1.0, 1.0).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_trajectories_without_policy_tokens_are_not_compared(name):
    alone, values = [[[0.0]], [[1.0]], [[0.5, 0.0]]], torch.rand(4)
    result = ADVANTAGES[name](flat([[], *alone], 4, values), 0.9, 0.9)
    torch.testing.assert_close(result, ADVANTAGES[name](flat(alone, 3, values), 0.9, 0.9))
    assert ADVANTAGES[name](flat([[], []], 2, torch.zeros(0)), 1.0, 1.0).shape == (0,)


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(ValueError, match="5 trajectories do not divide into groups of 2"):
        ADVANTAGES["grpo"](flat([[[0.0]]] * 5, 2), 1.0, 1.0)


def test_rewards_lie_on_the_last_token_of_their_turn():
    placed = place_rewards([[0.2, 1.0], [], [0.5]], [[2, 3], [], [1]])
    assert placed.tolist() == pytest.approx([0, 0.2, 0, 0, 1, 0.5])


def test_the_reward_of_a_turn_without_tokens_stays_with_its_trajectory():
    placed = place_rewards([[0.25, 0.5, 1.0], [0.5, 2.0]], [[0, 2, 0], [0, 1]])
    assert placed.tolist() == [0, 1.75, 2.5]


def test_whitened_advantages_have_mean_0_and_spread_1():
    result = whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(result, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (5 / 3) ** 0.5)
    assert not whiten(torch.full((5,), 1.2)).any()
    assert whiten(torch.zeros(0)).shape == (0,)


def test_whitening_in_two_processes_is_that_of_one():
    whole = torch.randn(10) * 3 + 7
    sums = []
    for part in (whole[:3], whole[3:]):
        whiten(part, lambda own: sums.append(own) or own)
    parts = [whiten(part, lambda own: sums[0] + sums[1]) for part in (whole[:3], whole[3:])]
    torch.testing.assert_close(torch.cat(parts), whiten(whole))
