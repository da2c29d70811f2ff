"""Guards against a policy's collapse: LLDS, DPPO's mask, more modes for the sampler, by plain loops."""

import math
from dataclasses import replace

import pytest
import torch

from rl.algorithm.losses import (
    PolicyTokens,
    ScoredTokens,
    clip_fraction,
    dppo,
    llds,
    policy_loss,
    sampler_weights,
)
from rl.algorithm.presets import AlgorithmConfig, preset_fields

ROW = torch.tensor([0, 0, 0, 0, 1, 1, 2])
TURN = torch.tensor([0, 0, 1, 1, 0, 0, 0])
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
OLD = torch.tensor([-1.0, -2.0, -1.0, -0.5, -1.0, -1.0, -3.0])
CHANGE = torch.tensor([0.5, -0.2, -0.7, 0.1, -0.9, -0.3, -0.4])


def tokens(change=CHANGE):
    return PolicyTokens((OLD + change).requires_grad_(), OLD, ADVANTAGES, ROW)


@pytest.mark.parametrize("gate", ["action", "response"])
def test_llds_is_its_definition_in_loops(gate):
    given = tokens()
    units = list(zip(ROW.tolist(), TURN.tolist() if gate == "action" else [0] * 7, strict=True))
    expected = []
    for at, unit in enumerate(units):
        moved = sum(CHANGE[other].item() for other in range(7) if units[other] == unit)
        preserved = ADVANTAGES[at] >= 0 and moved < 0
        expected.append(max(0.0, -CHANGE[at].item()) if preserved else 0.0)
    unit = ROW * 2 + TURN if gate == "action" else ROW
    found = llds(given, unit)
    assert found.tolist() == pytest.approx(expected)
    # The first turn became likelier as a whole: its one loss is forgiven by the action gate alone.
    assert (expected[1] > 0) == (gate == "response")


def test_llds_pulls_up_what_fell_and_nothing_else():
    given = tokens()
    llds(given, ROW * 2 + TURN).sum().backward()
    assert given.logprobs.grad.tolist() == [0, 0, -1, 0, 0, 0, -1]


def test_llds_does_nothing_on_policy():
    given = tokens(torch.zeros(7))
    loss = llds(given, ROW).sum()
    loss.backward()
    assert loss == 0 and not given.logprobs.grad.any()


def test_dppo_masks_by_the_change_of_probability_not_by_the_ratio():
    """Rare token, common token; raised, lowered; good, bad: by hand, bounds .2."""
    grid = [
        # old p, new p, A, masked
        (0.001, 0.1, 1.0, False),  # a ratio of 100, and hardly any probability
        (0.5, 0.75, 1.0, True),  # a ratio of 1.5
        (0.5, 0.75, -1.0, False),  # the update goes back
        (0.75, 0.5, -1.0, True),
        (0.75, 0.5, 1.0, False),
        (0.3, 0.45, 1.0, False),
    ]
    old, new = (torch.tensor([row[at] for row in grid]).log() for at in (0, 1))
    advantages = torch.tensor([row[2] for row in grid])
    given = PolicyTokens(new.requires_grad_(), old, advantages, torch.arange(len(grid)))
    algorithm = AlgorithmConfig(surrogate="dppo")
    loss = dppo(given, algorithm)
    loss.sum().backward()
    for at, (old_p, new_p, advantage, masked) in enumerate(grid):
        expected = 0.0 if masked else -new_p / old_p * advantage
        assert loss[at].item() == pytest.approx(expected)
        assert float(given.logprobs.grad[at]) == pytest.approx(expected)
    assert float(clip_fraction(given, algorithm)) == pytest.approx(2 / 6)


def test_further_modes_for_the_sampler_are_those_of_trl():
    random = torch.Generator().manual_seed(0)
    old, sampler = (-3 * torch.rand(7, generator=random) for _ in range(2))
    cap, ratio = 2.0, (old - sampler).exp()
    expected = [float(r) if 1 / cap <= r <= cap else 0.0 for r in ratio]
    assert 0.0 in expected and any(expected)
    assert sampler_weights("token_mask", cap, old, sampler, ROW).tolist() == pytest.approx(expected)
    product = [math.prod(r.item() for r, row in zip(ratio, ROW, strict=True) if row == at) for at in range(3)]
    expected = [min(cap, product[row]) for row in ROW.tolist()]
    found = sampler_weights("sequence_truncate", cap, old, sampler, ROW)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_policy_loss_adds_what_is_asked_for():
    given = tokens()
    sampler = OLD - torch.tensor([0.0, 0.0, 0.0, 0.0, -2.0, -2.0, 0.0])
    parts = vars(given) | {"entropy": torch.zeros(7), "sampler_logprobs": sampler, "turns": TURN}
    scored = ScoredTokens(**parts, sampled=torch.ones(7, dtype=torch.bool), ref_logprobs=None)
    plain = AlgorithmConfig(**{**preset_fields("stable"), "llds_coefficient": 0, "off_policy_threshold": 0})
    bare, _ = policy_loss(scored, plain)
    full, totals = policy_loss(scored, replace(plain, llds_coefficient=0.1, off_policy_threshold=0.5))
    kept = torch.tensor([1, 1, 1, 1, 0, 0, 1])  # the second trajectory has become too unlikely, and was bad
    torch.testing.assert_close(full, bare * kept + 0.1 * llds(given, ROW * 2 + TURN))
    assert totals["policy/off_policy_fraction"] == (2, 7)
    assert totals["policy/llds_fraction"] == (2, 7)


def test_the_preset_stable_learns_nothing_else_than_its_surrogate_on_policy():
    scored = tokens(torch.zeros(7))
    algorithm = AlgorithmConfig(**preset_fields("stable"))
    assert algorithm.updates_per_rollout > 1 and algorithm.llds_coefficient > 0
    dppo(scored, algorithm).sum().backward()
    torch.testing.assert_close(scored.logprobs.grad, -ADVANTAGES)
