"""Micro-batches: every trajectory once, whole, within the budget; packed rows keep to themselves."""

from dataclasses import replace

import pytest
import torch

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from rl.learner.batch import MicroBatch, micro_batches
from tests.fakes import question

PROMPT, POLICY, OBSERVATION = SegmentKind
VOCABULARY = 64


def make_trajectory(seed: int, longest: int = 9) -> Trajectory:
    """Prompt, policy, observation, policy, each of 2 to `longest` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (4,), generator=generator).tolist()
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator).split(lengths)
    segments = [
        Segment(kind, part.tolist(), "", (-part - 1.0).tolist() if kind is POLICY else None)
        for kind, part in zip([PROMPT, POLICY, OBSERVATION, POLICY], ids, strict=True)
    ]
    return Trajectory(question(), segments, StopReason.ANSWERED, "Paris")


BATCH = [make_trajectory(seed) for seed in range(8)]
ROWS = [7, 0, 2, 3, 5, 6]


def unpack(batch: MicroBatch, tensor: torch.Tensor) -> list[list]:
    """The row of (R, T) that belongs to each trajectory, without padding."""
    if batch.attention_mask is None:
        return [part.tolist() for part in tensor[0].split(batch.lengths)]
    return [row[:length].tolist() for row, length in zip(tensor, batch.lengths, strict=True)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 50, 80, 10_000])
def test_every_trajectory_is_in_one_micro_batch_token_for_token(packing, max_tokens):
    seen = []
    for batch in micro_batches(BATCH, ROWS, max_tokens, packing):
        seen += batch.rows
        chosen = [BATCH[row] for row in batch.rows]
        assert unpack(batch, batch.token_ids) == [t.token_ids for t in chosen]
        assert unpack(batch, batch.position_ids) == [list(range(len(t.token_ids))) for t in chosen]
        assert unpack(batch, batch.loss_mask) == [[bool(m) for m in t.loss_mask] for t in chosen]
        assert batch.lengths == [len(t.token_ids) for t in chosen]
        assert batch.counts.tolist() == [sum(t.loss_mask) for t in chosen]
        # The sampler's log-probs name their tokens, see make_trajectory.
        assert (-batch.sampler_logprobs - 1).tolist() == batch.token_ids[batch.loss_mask].tolist()
        assert batch.sampled.all()
        assert batch.row.bincount().tolist() == batch.counts.tolist()
        assert batch.token_ids.numel() <= max_tokens or len(batch.rows) == 1
        assert packing or batch.attention_mask.sum(1).tolist() == batch.lengths  # type: ignore[union-attr]
    assert sorted(seen) == sorted(ROWS)


def test_packing_wastes_no_token_and_fills_the_first_bin_that_has_room():
    def sized(length):
        return replace(BATCH[0], segments=[Segment(PROMPT, [1] * length, "")])

    sizes = [sized(length) for length in (30, 60, 35, 20, 40, 120, 10)]
    bins = [batch.lengths for batch in micro_batches(sizes, range(7), 100)]
    assert bins == [[120], [60, 40], [35, 30, 20, 10]]
    for batch in micro_batches(sizes, range(7), 100):
        assert batch.token_ids.shape == (1, sum(batch.lengths))


def test_padding_is_least_where_lengths_are_alike():
    widths = [batch.token_ids.shape[1] for batch in micro_batches(BATCH, ROWS, 60, packing=False)]
    assert widths == sorted(widths, reverse=True)


def test_observations_in_the_loss_are_all_tokens_but_the_prompts():
    (batch,) = micro_batches(BATCH, [0], 10_000, train_observations=True)
    prompt = len(BATCH[0].segments[0].token_ids)
    assert batch.loss_mask[0].tolist() == [i >= prompt for i in range(len(BATCH[0].token_ids))]
    written = torch.tensor(BATCH[0].loss_mask[prompt:], dtype=torch.bool)
    assert torch.equal(batch.sampled, written)


def test_a_log_prob_of_zero_was_sampled_and_only_none_was_not():
    prompt = BATCH[0].segments[0]
    written = replace(BATCH[0], segments=[prompt, Segment(POLICY, [3, 4, 5], "", [0.0, None, -1.0])])
    given = replace(BATCH[0], segments=[prompt, Segment(POLICY, [3, 4], "", None)])
    (batch,) = micro_batches([written, given], [0, 1], 10_000)
    assert batch.sampled.tolist() == [True, False, True, False, False]
    assert batch.sampler_logprobs[batch.sampled].tolist() == [0.0, -1.0]


def test_the_first_token_of_a_trajectory_is_never_trained():
    """Nothing predicts it; packed, the token before it is another trajectory's."""
    bare = replace(BATCH[0], segments=[Segment(POLICY, [3, 4, 5], "", [-1.0, -2.0, -3.0])])
    (batch,) = micro_batches([bare, bare], [0, 1], 10_000)
    assert batch.loss_mask.tolist() == [[False, True, True] * 2]
    assert batch.sampler_logprobs.tolist() == [-2.0, -3.0] * 2
    assert batch.counts.tolist() == [2, 2]


def test_no_rows_make_no_micro_batch():
    assert list(micro_batches(BATCH, [], 100)) == []
