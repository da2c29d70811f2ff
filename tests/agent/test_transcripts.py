"""Trajectories come back from JSON as they went in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from agent.transcripts import from_record, to_record
from data.errors import DataError
from data.records import Hit, Passage, Question

text = st.text(max_size=20)
number = st.floats(allow_nan=False)
json_value = st.recursive(st.none() | st.booleans() | st.integers() | text, lambda v: st.lists(v, max_size=2))


@st.composite
def segments(draw):
    kind = draw(st.sampled_from(SegmentKind))
    ids = draw(st.lists(st.integers(0, 200_000), max_size=4))
    logprobs = (
        draw(st.lists(number | st.none(), min_size=len(ids), max_size=len(ids))) if kind == "policy" else None
    )
    return Segment(kind, ids, draw(text), logprobs, draw(st.integers(0, 9)))


metadata = st.dictionaries(text, json_value, max_size=2)
hits = st.builds(Hit, st.builds(Passage, text, text, text, metadata), number, text)
trajectories = st.builds(
    Trajectory,
    question=st.builds(
        Question,
        text,
        text,
        st.lists(text, max_size=3).map(tuple),
        metadata,
    ),
    segments=st.lists(segments(), max_size=3),
    stop_reason=st.sampled_from(StopReason),
    answer=st.none() | text,
    searches=st.lists(
        st.builds(
            SearchRecord, text, st.lists(hits, max_size=2), number, st.none() | text, st.integers(0, 5)
        ),
        max_size=2,
    ),
    invalid_actions=st.integers(0, 5),
    valid_format=st.booleans(),
)


@given(trajectories)
def test_a_trajectory_comes_back_from_json_without_loss(trajectory):
    back = from_record(json.loads(json.dumps(to_record(trajectory))))
    assert back == trajectory
    assert (back.token_ids, back.loss_mask) == (trajectory.token_ids, trajectory.loss_mask)
    assert isinstance(back.stop_reason, StopReason)


def one():
    return Trajectory(
        Question("q1", "Where?", ("there",)),
        [Segment(SegmentKind.POLICY, [1, 2], "hi", [-0.5, -0.25], 3)],
        StopReason.ANSWERED,
        "there",
    )


def test_the_compact_form_counts_tokens_but_holds_none():
    record = to_record(one(), tokens=False)
    assert record["segments"] == [{"kind": "policy", "text": "hi", "tokens": 2, "weights_version": 3}]
    with pytest.raises(DataError, match=r"'q1': no field 'token_ids' .a compact record holds no tokens"):
        from_record(record)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "'q1': format_version 2, not 1"),
        ({"format_version": None}, "'q1': no trajectory, as written by `sleuth evaluate`"),
        ({"stop_reason": "bored"}, "'q1': 'bored' is not a valid StopReason"),
        ({"segments": None}, "'q1'"),
    ],
)
def test_a_wrong_field_is_named_with_its_trajectory(change, match):
    with pytest.raises(DataError, match=match):
        from_record(to_record(one()) | change)


def test_a_missing_field_is_named_with_its_trajectory():
    record = to_record(one())
    del record["searches"]
    with pytest.raises(DataError, match="'q1': no field 'searches'"):
        from_record(record)
