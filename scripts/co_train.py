"""`sleuth co-train`: policy and retriever train each other, in rounds of commands that also run alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from data.checkpoint import latest_checkpoint
from data.corpus import Corpus
from data.errors import ConfigError, SleuthError, require, require_range
from data.jsonl import read_json, write_jsonl
from data.questions import load_questions
from data.run_dir import read_run
from data.secret import read_secret
from data.yaml_file import read_yaml
from rl.co_training.rounds import State, load_state, run_rounds
from scripts.command_line import arguments_of
from scripts.console import going_on, show_table
from scripts.phases import run_stage

AGENT = ("protocol", "engine", "device", "dtype")
"""Keys of the policy's recipe that decide how it answers, in training and elsewhere."""
LEAST_HEADROOM = 0.15
"""Below this a loop has nothing to show."""


@dataclass(frozen=True)
class CoTrainConfig:
    """Settings of the loop: policy, retriever, questions, recipes, and the sizes of a round."""

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
    """YAML file for `sleuth train`; its policy, retriever, questions, steps and out are set here. Every stage
    takes its protocol, engine, device and dtype."""
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
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None
    """Normal form of answers: squad, or unicode for scripts without spaces; none: as each question's
    metadata say, else squad."""
    dev_limit: int | None = None
    """Only the first so many dev questions."""
    samples: int = 4
    """Trajectories a training question."""
    temperature: float = 1.0
    labels: Literal["gold", "answer", "quote", "opened", "fork", "likelihood"] = "answer"
    """Labeller that makes a passage positive (see `sleuth mine`)."""
    style: Literal["query", "question", "history"] = "query"
    """Text that a new retriever learns from, and is asked once it serves."""
    negatives: int = 1
    """Passages a search showed beside a useful one, for each example of the retriever."""
    k: int = 3
    """Passages a search shows, at the gate as to the policy."""
    max_plain_loss: float = 0.01
    """Most recall that plain questions may lose at the gate."""
    replay: str | None = None
    """Examples of the first retriever's training, or the like, mixed in so that nothing is forgotten."""
    replay_corpus: str | None = None
    """Their passages, if they are not those of `corpus`."""
    replay_share: float = 0.2
    """Their share of the batches."""
    server: str | None = None
    """URL of the server, or of replicas with commas between, that serves the index at `retriever`: the policy
    searches there, and a new index is put at that place and reloaded."""
    admin_token_file: str | None = None
    """File with the word that /admin/reload needs."""
    stop_without_gain: bool = True
    """End where the policy's EM on dev did not rise in a round."""
    from_scratch: bool = True
    """Train the retriever from the recipe's own base each round; false: from the last one that passed."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_range(self, "", ">= 1", "rounds", "steps", "rollout_questions", "samples", "k")
        require(0 < self.replay_share < 1, "replay_share", self.replay_share, "in (0, 1)")


def main(config: CoTrainConfig) -> None:
    """Train policy and retriever on each other's work: roll out, label, train, gate, index, swap, and on.

    A new retriever serves only where it finds more of what the policy looks for on dev questions. Killed, the
    same command goes on. OUT/state.json says how far it is, OUT/round-N holds what a round made.
    """
    out = Path(config.out)
    replayed = (config.replay, config.replay_corpus)
    for path in (config.train_recipe, config.retriever_recipe, config.corpus, *replayed):
        if path and not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
    _check_recipes(config)
    _check_corpus(config)
    for judging in filter(None, (config.dev_questions, config.held_out)):
        load_questions(judging, normalizer=config.normalizer)
    asked = load_questions(config.questions, normalizer=config.normalizer)
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
    before = load_state(out / "state.json", start)
    if before.history:
        say_headroom(before.history[0])
    with going_on(out):
        state = run_rounds(start, config.rounds, stages, out / "state.json")
        if len(state.history) == state.round:  # what the last round was good for
            state = loop.score(state)
    from rl.co_training.report import write_report

    _show(state)
    print(f"{write_report(out)} shows the rounds")


def _check_recipes(config: CoTrainConfig) -> None:
    """Raise ConfigError where a recipe is none of its command, which its stage would say hours later."""
    from scripts import train, train_retriever

    at_hand = ["--policy=p", "--retriever=r", "--questions=q", "--dev_questions=d", "--out=o"]
    recipe = arguments_of(train.main, [f"--config={config.train_recipe}", *at_hand], "sleuth train")
    if config.server and recipe["deterministic"]:
        raise ConfigError(f"{config.train_recipe}: deterministic needs an index in process, not server")
    if config.admin_token_file:
        read_secret(config.admin_token_file, "admin_token_file")
    sets = json.dumps([{"examples": "e", "corpus": config.corpus}])
    argv = [f"--config={config.retriever_recipe}", f"--train={sets}"]
    arguments_of(train_retriever.main, argv, "sleuth train-retriever")


def _check_corpus(config: CoTrainConfig) -> None:
    """Raise ConfigError where the index to begin with is none, or one of other passages."""
    from retriever_server.indexes.manifest import read_manifest

    index = read_manifest(Path(config.retriever))
    if not index.parts and Corpus(config.corpus).content_hash != index.corpus_hash:
        raise ConfigError(f"corpus = {config.corpus}: not the passages of the index {config.retriever}")


class _Loop:
    """The stages of a round, each a command of its own."""

    def __init__(self, config: CoTrainConfig, out: Path, questions: Sequence[Any]) -> None:
        self.config, self.out, self.questions = config, out, questions
        recipe = read_yaml(Path(config.train_recipe))
        shared = {key: recipe[key] for key in AGENT if key in recipe}
        self.shared = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in shared.items()}

    def rollout(self, state: State) -> State:
        config, folder = self.config, self._folder(state)
        after = self.score(state)
        if state.round == 0:
            say_headroom(after.history[0])
        elif config.stop_without_gain:
            was, now = (entry["em"]["mean"] for entry in after.history[-2:])
            if now <= was:
                return replace(after, ended=f"no gain: EM {now:.3f} on dev after {was:.3f}")
        first = state.round * config.rollout_questions
        part = self.questions[first : first + config.rollout_questions]
        write_jsonl(folder / "questions.jsonl", (question.as_record() for question in part))
        sampled = {"samples": config.samples, "temperature": config.temperature, "seed": config.seed}
        sampled |= {"questions": folder / "questions.jsonl", "out": folder / "rollout"}
        self._run(state, "evaluate", self._agent(state) | sampled)
        return after

    def score(self, state: State) -> State:
        """Evaluate the policy on dev, in the first round also with the passages that each question needs."""
        config, folder = self.config, self._folder(state)
        dev = {"questions": config.dev_questions, "out": folder / "dev", **self._judging()}
        dev |= {} if config.dev_limit is None else {"limit": config.dev_limit}
        dev |= {} if state.round else {"controls": "oracle", "corpus": config.corpus}
        self._run(state, "evaluate", self._agent(state) | dev)
        entry = {"round": state.round, "policy": state.policy, "retriever": state.retriever}
        entry["em"] = read_json(folder / "dev" / "scores.json")["em"]
        if not state.round:
            controls = read_json(folder / "dev" / "controls.json")["controls"]
            oracle = controls.get("oracle", {}).get("em", {}).get("mean")
            entry["headroom"] = None if oracle is None else oracle - entry["em"]["mean"]
        return replace(state, history=(*state.history, entry))

    def label(self, state: State) -> State:
        from rl.co_training.labels import SCORED
        from scripts.mine import NOTHING

        config, folder = self.config, self._folder(state)
        held_out = ",".join(filter(None, [config.dev_questions, config.held_out]))
        searched = {"trajectories": folder / "rollout" / "trajectories.jsonl"}
        given = searched | {"labels": config.labels, "style": config.style, "corpus": config.corpus}
        given |= {"held_out": held_out, "out": folder / "examples.jsonl"}
        if config.labels in SCORED:
            by = {"by": json.dumps(SCORED[config.labels]), "out": folder / "scores.jsonl"}
            self._run(state, "score-searches", self._agent(state) | searched | by)
            given["scores"] = folder / "scores.jsonl"
        if self._run(state, "mine", given, allowed=(0, NOTHING)) == NOTHING:
            return state.refused("no search has a label")
        return state

    def train(self, state: State) -> State:
        folder = self._folder(state)
        given = {
            "config": self.config.retriever_recipe,
            "train": json.dumps(self._train_sets(folder)),
            "out": folder / "retriever",
        }
        last = Path(state.retriever).parent / "retriever" / "model"
        if not self.config.from_scratch and last.is_dir():
            given |= {"model.init_args.base": last}
        if self._run(state, "train-retriever", given, allowed=(0, 2)):
            found = (folder / "retriever" / "run.json").is_file() and read_run(folder / "retriever")["reason"]
            if not found or not re.match(r"step \d+: the (loss|gradient)", found):
                self._fail(state, "train-retriever", 2)
            return replace(state.refused(f"the training diverged: {found}"), refusals=state.refusals + 1)
        return state

    def _train_sets(self, folder: Path) -> list[dict[str, Any]]:
        """The examples of this round, read as the recipe reads its first set, and those that are replayed."""
        config = self.config
        sets = read_yaml(Path(config.retriever_recipe)).get("train") or [{}]
        of = {**sets[0], "corpus": config.corpus, "negatives": config.negatives}
        own = {**of, "examples": str(folder / "examples.jsonl")}
        if not config.replay:
            return [own]
        share = config.replay_share
        old = {**of, "examples": config.replay, "corpus": config.replay_corpus or config.corpus}
        return [{**own, "weight": 1 - share}, {**old, "weight": share}]

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
            **self._judging(),
            "k": config.k,
            "max_plain_loss": config.max_plain_loss,
            "out": folder / "gate.json",
        }, allowed=(0, REFUSED))  # fmt: skip
        return state

    def swap(self, state: State) -> State:
        from retriever_server.indexes.manifest import read_manifest
        from rl.co_training.live import put_in_place, reload

        index = self._folder(state) / "index"
        state = state.noted(gate=(decision := read_json(index.with_name("gate.json"))))
        if not decision["passed"]:
            return replace(state.noted(refused=decision["reason"]), refusals=state.refusals + 1)
        if self.config.server:
            put_in_place(index, Path(self.config.retriever))
            reload(self.config.server, self.config.admin_token_file, read_manifest(index).generation)
        return replace(state, refusals=0, retriever=str(index))

    def policy(self, state: State) -> State:
        config, folder = self.config, self._folder(state)
        self._run(state, "train", {
            "config": config.train_recipe,
            **self._agent(state),
            "questions": config.questions,
            "dev_questions": config.dev_questions,
            **self._judging(),
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

    def _judging(self) -> dict[str, Any]:
        """The option of a command that reads the questions and compares answers with theirs."""
        return {"normalizer": self.config.normalizer} if self.config.normalizer else {}

    def _agent(self, state: State) -> dict[str, Any]:
        """The options of an agent of this state. RetrieverError where its server serves another index."""
        from retriever_server.indexes.manifest import read_manifest
        from rl.co_training.live import check_generation

        if self.config.server:
            check_generation(self.config.server, read_manifest(Path(state.retriever)).generation)
        retriever = self.config.server or state.retriever
        given = {"policy": state.policy, "retriever": retriever, "protocol.top_k": self.config.k}
        return {**self.shared, **given}

    def _run(self, state: State, command: str, given: dict[str, Any], allowed: tuple[int, ...] = (0,)) -> int:
        """Run `sleuth COMMAND`; its own resuming takes up what an earlier run began. Its exit status."""
        print(f"-- round {state.round}, {state.stage}: sleuth {command}", flush=True)
        options = [f"--{name}={value}" for name, value in given.items()]
        status = run_stage([command, *options])
        if status not in allowed:
            self._fail(state, command, status)
        return status

    def _fail(self, state: State, command: str, status: int) -> NoReturn:
        raise SleuthError(
            f"round {state.round}, {state.stage}: sleuth {command} ended with status {status}; "
            "mend what it says above and start the same command again"
        )


def say_headroom(first: Mapping[str, Any]) -> None:
    """Print by how much the policy could be better if every search found what it needs."""
    if (headroom := first.get("headroom")) is None:
        return print("headroom unknown: the dev questions name no gold passages")
    print(f"headroom: EM with the oracle's passages less that at the start: {headroom:+.3f}")
    if headroom < LEAST_HEADROOM:
        print(f"nothing to show: below {LEAST_HEADROOM} a better retriever cannot help this policy much")


def _show(state: State) -> None:
    from rl.co_training.report import COLUMNS, round_rows

    show_table("", COLUMNS, round_rows(state.history))
    if state.ended:
        print(f"ended: {state.ended}")
    print(f"policy: {state.policy}\nretriever: {state.retriever}")
