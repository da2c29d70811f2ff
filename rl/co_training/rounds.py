"""Rounds of co-training as stages: what each reads, what it leaves behind, and which comes next.

    rollout   the policy searches on training questions (sampled) and on dev questions (greedy)
    label     its searches become examples; those of dev questions judge the retriever
    train     the retriever learns from the examples
    index     the new index
    gate      does it find more of what the policy looks for on dev?
    swap      it serves from here on, or the old one stays
    policy    the policy goes on learning with what serves

A stage leaves all it makes in its own place and is noted when that is whole, so a loop that is killed goes
on with the stage that it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.jsonl import read_json, write_json
from data.records import FORMAT_VERSION

STAGES = ("rollout", "label", "train", "index", "gate", "swap", "policy")
MOST_REFUSALS = 2
"""Refused gates in a row that end the loop."""


@dataclass(frozen=True)
class State:
    """Progress of the loop. `retriever` and `policy` are what serves and what searches now."""

    policy: str
    retriever: str
    round: int = 0
    stage: str = STAGES[0]
    refusals: int = 0
    """Refused gates in a row."""
    ended: str = ""
    """Reason to end the loop before its last round."""
    history: tuple[Mapping[str, Any], ...] = field(default=())
    """A record of each round: its gate, and the scores of its policy on dev questions."""

    def next(self) -> State:
        """The state after the present stage."""
        at = STAGES.index(self.stage) + 1
        if at < len(STAGES):
            return replace(self, stage=STAGES[at])
        ended = f"{MOST_REFUSALS} refused gates in a row" if self.refusals >= MOST_REFUSALS else ""
        return replace(self, stage=STAGES[0], round=self.round + 1, ended=ended)

    def noted(self, **fields: Any) -> State:
        """The state with more in the record of its round."""
        return replace(self, history=(*self.history[:-1], {**self.history[-1], **fields}))

    def refused(self, reason: str) -> State:
        """The state after a round that has no new retriever: it goes on with the policy."""
        return replace(self.noted(refused=reason), stage="swap")


Stage = Callable[[State], State]
"""Does the work of a stage; returns the state with what it changed."""


def run_rounds(start: State, rounds: int, stages: Mapping[str, Stage], path: Path) -> State:
    """Run the stages of each round in turn, from where the file at `path` says; return the last state.

    Ends after `rounds`, MOST_REFUSALS refused gates in a row, or where a stage says so. Raises ConfigError
    where the file was begun with another policy or retriever.
    """
    state = load_state(path, start)
    while state.round < rounds and not state.ended:
        after = stages[state.stage](state)
        state = after if after.ended else after.next()
        _save(path, state, start)
    return state


def load_state(path: Path, start: State) -> State:
    """The state on disk, or `start` where there is none."""
    if not path.exists():
        return start
    try:
        record = read_json(path)
        begun, state = record["start"], record["state"]
        found = State(**state | {"history": tuple(state["history"])})
        if record["format_version"] != FORMAT_VERSION or found.stage not in STAGES:
            raise ValueError("another format")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no state of co-training: {type(error).__name__} {error}") from error
    for name in ("policy", "retriever"):
        if begun[name] != getattr(start, name):
            raise ConfigError(
                f"{name} = {getattr(start, name)}: {path} was begun with {begun[name]}; choose another --out"
            )
    return found


def _save(path: Path, state: State, start: State) -> None:
    begun = {"policy": start.policy, "retriever": start.retriever}
    write_json(path, {"format_version": FORMAT_VERSION, "start": begun, "state": asdict(state)})
