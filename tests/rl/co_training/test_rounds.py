"""Rounds of co-training: their order, what ends them, and going on after a kill at any stage."""

from dataclasses import replace

import pytest

from data.errors import ConfigError, DataError
from rl.co_training.rounds import STAGES, State, run_rounds

START = State("p0", "r0")


class Killed(Exception):
    pass


def stages(calls, killed_at=None, passes=True):
    """Stages that note what they did; the gate passes or not."""

    def stage(name):
        def work(state):
            if len(calls) == killed_at:
                raise Killed
            calls.append((state.round, name, state.policy, state.retriever))
            if name == "swap":
                return replace(state, retriever=f"r{state.round + 1}", refusals=0) if passes else replace(
                    state, refusals=state.refusals + 1
                )  # fmt: skip
            return replace(state, policy=f"p{state.round + 1}") if name == "policy" else state

        return work

    return {name: stage(name) for name in STAGES}


def test_each_round_runs_all_stages_and_the_next_begins_with_what_it_made(tmp_path):
    calls = []
    state = run_rounds(START, 2, stages(calls), tmp_path / "state.json")
    assert [call[1] for call in calls] == [*STAGES, *STAGES]
    assert calls[7] == (1, "rollout", "p1", "r1")
    assert (state.round, state.policy, state.retriever) == (2, "p2", "r2")


@pytest.mark.parametrize("killed_at", range(14))
def test_killed_at_any_stage_it_does_the_same_work_once(killed_at, tmp_path):
    whole, broken = [], []
    last = run_rounds(START, 2, stages(whole), tmp_path / "whole.json")
    with pytest.raises(Killed):
        run_rounds(START, 2, stages(broken, killed_at), tmp_path / "state.json")
    assert run_rounds(START, 2, stages(broken), tmp_path / "state.json") == last
    assert broken == whole
    assert (tmp_path / "state.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_two_refused_gates_in_a_row_end_the_loop(tmp_path):
    calls = []
    state = run_rounds(START, 5, stages(calls, passes=False), tmp_path / "state.json")
    assert state.round == 2 and state.retriever == "r0"


def test_a_loop_of_another_policy_is_refused(tmp_path):
    run_rounds(START, 1, stages([]), tmp_path / "state.json")
    with pytest.raises(ConfigError, match=r"policy = p9: .*state\.json was begun with p0"):
        run_rounds(State("p9", "r0"), 1, stages([]), tmp_path / "state.json")


def test_a_file_that_is_no_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"format_version": 1}')
    with pytest.raises(DataError, match=r"state\.json: no state of co-training: KeyError 'start'"):
        run_rounds(START, 1, stages([]), tmp_path / "state.json")
