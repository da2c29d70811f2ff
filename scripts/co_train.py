"""`sleuth co-train`: policy and retriever train each other, in rounds of commands that also run alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError, SleuthError, require_range
from rl.co_training.rounds import State, run_rounds


@dataclass(frozen=True)
class CoTrainConfig:
    """Who trains whom on what."""

    policy: str
    """The policy to begin with: a folder, a hub name, atlas or smollm2."""
    retriever: str
    """The index to begin with: a folder."""
    corpus: str
    """The passages of the index."""
    questions: str
    """Training questions."""
    dev_questions: str
    """Questions that judge: the policy by its answers, a new retriever by the policy's searches."""
    train_recipe: str
    """YAML file for `sleuth train`; its policy, retriever, questions, steps and out are set here."""
    retriever_recipe: str
    """YAML file for `sleuth train-retriever`; its train and out are set here."""
    out: str
    """Folder of the loop."""
    held_out: str | None = None
    """More questions that must not train the retriever, such as the test's; files separated by commas."""
    rounds: int = 2
    steps: int = 20
    """Steps of the policy a round; weights go on, the optimizer begins anew."""
    rollout_questions: int = 256
    """Training questions searched a round; each round takes the next ones."""
    dev_limit: int | None = None
    """Only the first so many dev questions."""
    samples: int = 4
    """Trajectories a training question."""
    temperature: float = 1.0
    labels: Literal["gold", "answer", "quote", "opened"] = "answer"
    """Labeller that makes a passage positive (see `sleuth mine`)."""
    style: Literal["query", "question", "history"] = "query"
    """Text that a new retriever learns from, and is asked once it serves."""
    negatives: int = 1
    """Passages a search showed beside a useful one, for each example of the retriever."""
    k: int = 3
    """Passages a search shows, at the gate as to the policy."""
    max_plain_loss: float = 0.01
    """Most recall that plain questions may lose at the gate."""
    from_scratch: bool = True
    """Train the retriever from the recipe's own base each round; false: from the last one that passed."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a number that is out of range."""
        require_range(self, "", ">= 1", "rounds", "steps", "rollout_questions", "samples", "k")


def main(config: CoTrainConfig) -> None:
    """Train policy and retriever on each other's work: roll out, label, train, gate, index, swap, and on.

    A new retriever serves only where it finds more of what the policy looks for on dev questions. Killed, the
    same command goes on. OUT/state.json says how far it is, OUT/round-N holds what a round made.
    """
    from data.questions import load_questions

    out = Path(config.out)
    for path in (config.train_recipe, config.retriever_recipe, config.corpus):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
    asked = load_questions(config.questions)
    if (needed := config.rounds * config.rollout_questions) > len(asked):
        raise ConfigError(
            f"rollout_questions = {config.rollout_questions}: {config.rounds} rounds need {needed:,}, "
            f"{config.questions} has {len(asked):,} questions"
        )
    out.mkdir(parents=True, exist_ok=True)
    loop = _Loop(config, out, random.Random(config.seed).sample(asked, needed))
    stages = {
        name: getattr(loop, name) for name in ("rollout", "label", "train", "index", "gate", "swap", "policy")
    }
    start = State(config.policy, config.retriever)
    try:
        state = run_rounds(start, config.rounds, stages, out / "state.json")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what is done is kept in {out}: start the same command again to go on"
        ) from None
    _show(state)


class _Loop:
    """The stages of a round, each a command of its own."""

    def __init__(self, config: CoTrainConfig, out: Path, questions: Sequence[Any]) -> None:
        self.config, self.out, self.questions = config, out, questions

    def rollout(self, state: State) -> State:
        from data.atlas.build import question_row
        from data.jsonl import read_json, write_jsonl

        config, folder = self.config, self._folder(state)
        first = state.round * config.rollout_questions
        part = self.questions[first : first + config.rollout_questions]
        write_jsonl(folder / "questions.jsonl", map(question_row, part))
        agent = {"policy": state.policy, "retriever": state.retriever, "protocol.top_k": config.k}
        sampled = {"samples": config.samples, "temperature": config.temperature, "seed": config.seed}
        sampled |= {"questions": folder / "questions.jsonl", "out": folder / "rollout"}
        self._run(state, "evaluate", agent | sampled)
        dev = {"questions": config.dev_questions, "out": folder / "dev"}
        dev |= {} if config.dev_limit is None else {"limit": config.dev_limit}
        self._run(state, "evaluate", agent | dev)
        scores = read_json(folder / "dev" / "scores.json")
        entry = {
            "round": state.round,
            "policy": state.policy,
            "retriever": state.retriever,
            "em": scores["em"],
        }
        return replace(state, history=(*state.history, entry))

    def label(self, state: State) -> State:
        config, folder = self.config, self._folder(state)
        held_out = ",".join(filter(None, [config.dev_questions, config.held_out]))
        common = {"labels": config.labels, "style": config.style, "corpus": config.corpus}
        self._run(state, "mine", common | {
            "trajectories": folder / "rollout" / "trajectories.jsonl",
            "held_out": held_out,
            "out": folder / "examples.jsonl",
        })  # fmt: skip
        return state

    def train(self, state: State) -> State:
        folder = self._folder(state)
        source = [{
            "examples": str(folder / "examples.jsonl"),
            "corpus": self.config.corpus,
            "negatives": self.config.negatives,
        }]  # fmt: skip
        given = {
            "config": self.config.retriever_recipe,
            "train": json.dumps(source),
            "out": folder / "retriever",
        }
        if not self.config.from_scratch and (last := self._last_model(state)):
            given |= {"model.init_args.base": last}
        self._run(state, "train-retriever", given)
        return state

    def index(self, state: State) -> State:
        folder = self._folder(state)
        self._run(state, "index", {
            "encoder": folder / "retriever" / "model", "corpus": self.config.corpus, "out": folder / "index",
        })  # fmt: skip
        return state

    def gate(self, state: State) -> State:
        from scripts.gate import REFUSED

        config, folder = self.config, self._folder(state)
        self._run(state, "gate", {
            "trajectories": folder / "dev" / "trajectories.jsonl",
            "old": state.retriever,
            "new": folder / "index",
            "questions": config.dev_questions,
            "k": config.k,
            "max_plain_loss": config.max_plain_loss,
            "out": folder / "gate.json",
        }, allowed=(0, REFUSED))  # fmt: skip
        return state

    def swap(self, state: State) -> State:
        from data.jsonl import read_json

        folder = self._folder(state)
        decision = read_json(folder / "gate.json")
        history = (*state.history[:-1], {**state.history[-1], "gate": decision})
        if not decision["passed"]:
            return replace(state, history=history, refusals=state.refusals + 1)
        return replace(state, history=history, refusals=0, retriever=str(folder / "index"))

    def policy(self, state: State) -> State:
        from data.checkpoint import latest_checkpoint

        config, folder = self.config, self._folder(state)
        self._run(state, "train", {
            "config": config.train_recipe,
            "policy": state.policy,
            "retriever": state.retriever,
            "questions": config.questions,
            "dev_questions": config.dev_questions,
            "protocol.top_k": config.k,
            "steps": config.steps,
            "save_every": config.steps,
            "seed": config.seed + state.round,
            "out": folder / "policy",
        })  # fmt: skip
        last = latest_checkpoint(folder / "policy" / "checkpoints")
        assert last is not None  # a training that ends well has saved
        return replace(state, policy=str(last.path))

    def _folder(self, state: State) -> Path:
        folder = self.out / f"round-{state.round}"
        folder.mkdir(exist_ok=True)
        return folder

    def _last_model(self, state: State) -> str | None:
        model = Path(state.retriever).parent / "retriever" / "model"
        return str(model) if model.is_dir() else None

    def _run(
        self, state: State, command: str, given: dict[str, Any], allowed: tuple[int, ...] = (0,)
    ) -> None:
        """Run `sleuth COMMAND`; its own resuming takes up what an earlier run began."""
        print(f"-- round {state.round}, {state.stage}: sleuth {command}", flush=True)
        options = [f"--{name}={value}" for name, value in given.items()]
        status = subprocess.run([sys.executable, "-m", "scripts", command, *options], check=False).returncode
        if status in (130, -2):
            raise KeyboardInterrupt
        if status not in allowed:
            raise SleuthError(
                f"round {state.round}, {state.stage}: sleuth {command} ended with status {status}; "
                "mend what it says above and start the same command again"
            )


def _show(state: State) -> None:
    from data.significance import format_estimate
    from scripts.console import show_table

    rows = []
    for entry in state.history:
        gate = entry.get("gate")
        passed = "" if gate is None else "passed" if gate["passed"] else f"refused: {gate['reason']}"
        recall = "" if gate is None else f"{gate['old_found']:.3f} -> {gate['new_found']:.3f}"
        rows.append([entry["round"], format_estimate(entry["em"]), recall, passed])
    show_table("", ("round", "EM on dev, at its start", "dev searches that find", "gate"), rows)
    print(f"policy: {state.policy}\nretriever: {state.retriever}")
