"""Proof of the closed loop in the world that is hard to search: every cell by the product's commands.

    nice -n 19 python -m scripts.bench.co_training --encoder TINY --out runs/co_training [--seeds 3]
    nice -n 19 python -m scripts.bench.co_training --encoder MINILM --recipe true --out runs/co_minilm

All arms begin with one warm-started policy and one dense index, and make the same number of policy steps:

    loop      `sleuth co-train`, labels by `answer`
    alone     the policy's steps with the first index
    pairs     the index trained on as many (question, gold passages) pairs, with mined negatives, no gate
    shuffled  the index trained on the loop's last examples, positives exchanged among them, no gate
    gold      as loop, labels by `gold`: the ceiling, one seed

With `--recipe` retriever, policy and sizes are those of `scripts/configs/co_train_atlas.yaml`, the encoder is
taken as it is; gold is not made.

Killed, the same command goes on: each cell is a folder, noted in OUT/done with its processor seconds. A
command runs in a fork of this process, so that nothing is imported twice.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.checkpoint import latest_checkpoint
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.metrics.significance import estimate, format_estimate
from data.questions import load_questions
from scripts import co_train
from scripts.__main__ import main as sleuth
from scripts.__main__ import run_script
from scripts.bench.co_training_world import mean_pooled
from scripts.gate import REFUSED

K, ROUNDS = 2, 2
WARM_STEPS, PLAIN_STEPS, POLICY_RATE, RETRIEVER_STEPS, RETRIEVER_RATE = 150, 100, 3e-4, 60, 3e-4
SMALLER = 2
"""One in so many questions of dev and test is asked."""
Cell = dict[str, Any]


def forked(argv: Sequence[str]) -> tuple[int, float]:
    """Run `sleuth ARGV...` in a fork; return its exit status and the processor seconds it took."""
    sys.stdout.flush()
    if not (child := os.fork()):
        co_train.run_stage = lambda argv: forked(argv)[0]
        os._exit(sleuth(list(argv)))
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


class Bench:
    """The cells of the proof in a folder."""

    steps, rolled_out = 6, 1500
    arms = ("alone", "pairs", "shuffled")

    def __init__(self, out: Path, encoder: str) -> None:
        self.out, self.encoder = out.resolve(), encoder
        self.world, self.warm, self.index = self.out / "world", self.out / "warm", self.out / "index"
        plain = self.out / "plain"
        self.lesson = {"examples": str(plain / "pairs.jsonl"), "corpus": str(plain / "corpus.jsonl")}
        self.test, self.dev = self.world / "test_few.jsonl", self.world / "dev_few.jsonl"

    def run(self, cell: str, command: str, **given: Any) -> Path:
        """Run a command into the folder of a cell, once."""
        note = self.out / "done" / f"{cell.replace('/', '.')}.json"
        if not note.exists():
            options = {name.replace("__", "."): v for name, v in given.items()} | {"out": self.out / cell}
            argv = [command, *(f"--{name}={value}" for name, value in options.items())]
            print(f"== {cell}: sleuth {command}", flush=True)
            status, seconds = forked(argv)
            if status not in (0, REFUSED):
                raise SystemExit(f"{cell}: sleuth {' '.join(argv)} ended with status {status}")
            write_json(note, {"argv": argv, "processor_seconds": round(seconds, 1)})
        return self.out / cell

    def begin(self) -> None:
        """Make what all arms share: world, warm start, first index, recipes; print the headroom."""
        self.run("world", "atlas", hard="true")
        for name, few in (("test", self.test), ("dev", self.dev)):
            write_jsonl(few, list(read_jsonl(self.world / f"{name}.jsonl"))[::SMALLER])
        self.run("warm", "warm-start", policy="atlas", demonstrations=self.world / "demonstrations.jsonl",
                 protocol__top_k=K, training__steps=WARM_STEPS, training__learning_rate=1e-3)  # fmt: skip
        self.run("plain", "atlas")
        self.first_index()
        start = self.agent(self.warm, self.index)
        self.run("start", "evaluate", **start, questions=self.test, controls="oracle")
        self.run("start_dev", "evaluate", **start, questions=self.dev)

    def first_index(self) -> None:
        """Write the recipes and index by a tiny encoder that has learnt the plain world's questions."""
        write_recipes(self, mean_pooled(self.encoder, self.out / "base"))
        self.run("encoder", "train-retriever", config=self.out / "encoder.yaml")
        self.run("index", "index", encoder=self.out / "encoder/model", corpus=self.world / "corpus.jsonl")

    def agent(self, policy: Any, index: Any) -> Cell:
        """Options that say who searches where."""
        return {"policy": policy, "retriever": index, "protocol__top_k": K}

    def loop(self, seed: int, labels: str = "answer", name: str = "loop", rounds: int = ROUNDS) -> Cell:
        """Return the last policy and index of `sleuth co-train`, and its history."""
        folder = self.run(
            f"{seed}/{name}", "co-train", policy=self.warm, retriever=self.index,
            corpus=self.world / "corpus.jsonl", questions=self.world / "train.jsonl", dev_questions=self.dev,
            held_out=self.world / "test.jsonl", train_recipe=self.out / "policy.yaml",
            retriever_recipe=self.out / "retriever.yaml", labels=labels, style="question", k=K, rounds=rounds,
            steps=self.steps, rollout_questions=self.rolled_out, samples=1, temperature=0.5, seed=seed,
            replay=self.lesson["examples"], replay_corpus=self.lesson["corpus"], replay_share=0.5,
            stop_without_gain="false",
        )  # fmt: skip
        state = read_json(folder / "state.json")["state"]
        return {"policy": state["policy"], "index": state["retriever"], "history": state["history"]}

    def learn(self, seed: int, arm: str, at: int, policy: Any, index: Any) -> Any:
        """Return the policy after the steps of one round, made as co-train makes them."""
        folder = self.run(
            f"{seed}/{arm}-{at}/policy", "train", config=self.out / "policy.yaml",
            **self.agent(policy, index), questions=self.world / "train.jsonl", dev_questions=self.dev,
            steps=self.steps, save_every=self.steps, seed=seed + at,
        )  # fmt: skip
        last = latest_checkpoint(folder / "checkpoints")
        assert last is not None
        return last.path

    def retriever(self, cell: str, examples: Path | None = None) -> Path:
        """Return the index of a retriever trained on these examples and the replay, or the replay alone."""
        source = [self.lesson | {"negatives": 1}]
        if examples is not None:
            given = {"examples": str(examples), "corpus": str(self.world / "corpus.jsonl"), "negatives": 1}
            source = [given, *source]
        recipe = {"config": self.out / "retriever.yaml", "train": json.dumps(source)}
        self.run(f"{cell}/retriever", "train-retriever", **recipe)
        model = self.out / cell / "retriever" / "model"
        return self.run(f"{cell}/index", "index", encoder=model, corpus=self.world / "corpus.jsonl")

    def alone(self, seed: int) -> Cell:
        """Arm (a)."""
        policy: Any = self.warm
        for at in range(ROUNDS):
            policy = self.learn(seed, "alone", at, policy, self.index)
        return {"policy": policy, "index": self.index}

    def pairs(self, seed: int) -> Cell:
        """Arm (b)."""
        policy, index = self.warm, self.index
        for at in range(ROUNDS):
            cell, path = f"{seed}/pairs-{at}", self.out / f"{seed}/pairs-{at}/pairs.jsonl"
            count = len(list(read_jsonl(self.out / f"{seed}/loop/round-{at}/examples.jsonl")))
            questions = load_questions(str(self.world / "train.jsonl"))
            rows = [
                {"query_id": q.id, "query": q.text, "positives": q.metadata["supporting_ids"],
                 "provenance": {"style": "question"}}
                for q in random.Random(f"{seed}/{at}").sample(questions, count)
            ]  # fmt: skip
            write_jsonl(path, rows)
            mined = self.run(f"{cell}/mined.jsonl", "mine", queries=path, retriever=index, per_query=1)
            index = self.retriever(cell, mined)
            policy = self.learn(seed, "pairs", at, policy, index)
        return {"policy": policy, "index": index}

    def shuffled(self, seed: int) -> Cell:
        """Arm (c): its policy makes no step, as recall alone is asked."""
        rows = list(read_jsonl(self.out / f"{seed}/loop/round-{ROUNDS - 1}/examples.jsonl"))
        positives = [row["positives"] for row in rows]
        random.Random(seed).shuffle(positives)
        for row, other in zip(rows, positives, strict=True):
            row |= {"positives": other, "negatives": [n for n in row.get("negatives", ()) if n not in other]}
        path = self.out / f"{seed}/shuffled/examples.jsonl"
        write_jsonl(path, rows)
        return {"policy": self.warm, "index": self.retriever(f"{seed}/shuffled", path)}

    def answers(self, cell: str, policy: Any, index: Any) -> Path:
        """Evaluate on the test questions, greedily."""
        return self.run(f"{cell}/test", "evaluate", **self.agent(policy, index), questions=self.test)

    def seed(self, seed: int) -> None:
        """Make all cells of a seed; OUT/SEED/arms.json says who stands for which arm."""
        arms = {"loop": self.loop(seed)}
        before, after = (self.warm, self.index), (arms["loop"]["policy"], arms["loop"]["index"])
        self.answers(f"{seed}/loop", *after)
        for name in self.arms:
            arms[name] = getattr(self, name)(seed)
            if name != "shuffled":
                self.answers(f"{seed}/{name}", arms[name]["policy"], arms[name]["index"])
        self.answers(f"{seed}/new_policy", after[0], before[1])
        self.answers(f"{seed}/new_index", before[0], after[1])
        write_json(
            self.out / f"{seed}/arms.json", {n: {k: str(v) for k, v in a.items()} for n, a in arms.items()}
        )

    def extra(self) -> None:
        """Make the ceiling, and a third round of the first seed: one seed each."""
        gold = self.loop(0, "gold", "gold")
        self.answers("0/gold", gold["policy"], gold["index"])
        if not (self.out / "0/drift").exists():
            shutil.copytree(self.out / "0/loop", self.out / "0/drift.tmp")
            (self.out / "0/drift.tmp").rename(self.out / "0/drift")
        for at, entry in enumerate(self.loop(0, name="drift", rounds=ROUNDS + 1)["history"]):
            new = self.out / f"0/drift/round-{entry['round']}/index"
            self.run(f"0/drift_{at}.json", "gate", trajectories=self.out / "start_dev/trajectories.jsonl",
                     k=K, old=self.index, new=new, questions=self.dev)  # fmt: skip


def pretrained(base: str | Path) -> Cell:
    """Return the part of a recipe that names the model."""
    return {"class_path": "pretrained", "init_args": {"base": str(base), "max_tokens": 64}}


class RecipeBench(Bench):
    """The loop and the arms with the sizes of `scripts/configs/co_train_atlas.yaml`."""

    steps, rolled_out = 8, 600

    def __init__(self, out: Path, encoder: str) -> None:
        super().__init__(out, encoder)
        self.dev = self.world / "dev.jsonl"

    def first_index(self) -> None:
        """Write the recipes with this encoder, and index by it as it is."""
        recipe = yaml.safe_load(Path("scripts/configs/retriever/minilm_searches.yaml").read_text())
        recipe["model"]["init_args"]["base"] = self.encoder
        (self.out / "retriever.yaml").write_text(yaml.safe_dump(recipe))
        shutil.copy("scripts/configs/atlas.yaml", self.out / "policy.yaml")
        corpus = self.world / "corpus.jsonl"
        self.run("index", "index", encoder=self.encoder, corpus=corpus, query_style="question")


def write_recipes(bench: Bench, base: Path) -> None:
    """Write what `sleuth train` and `sleuth train-retriever` are given by every arm."""
    policy = {"policy": str(bench.warm), "questions": "", "retriever": "", "out": "", "eval_every": 0,
              "rollout": {"questions_per_step": 8, "group_size": 8},
              "algorithm": {"learning_rate": POLICY_RATE, "warmup_steps": 2, "clip_high": 0.28}}  # fmt: skip
    common = {"loss": {"class_path": "MultipleNegativesRankingLoss", "init_args": {"scale": 20.0}},
              "batch_size": 32, "save_every": 1000, "out": ""}  # fmt: skip
    encoder = common | {"model": pretrained(base), "train": [bench.lesson], "steps": PLAIN_STEPS,
                        "learning_rate": 3e-4, "out": str(bench.out / "encoder")}  # fmt: skip
    retriever = common | {"model": pretrained(bench.out / "encoder/model"), "train": [],
                          "steps": RETRIEVER_STEPS, "learning_rate": RETRIEVER_RATE}  # fmt: skip
    for name, recipe in (("policy", policy), ("encoder", encoder), ("retriever", retriever)):
        (bench.out / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def scores(folder: Path) -> tuple[np.ndarray, list[str]]:
    """EM of each question in the order of their ids, and its cluster."""
    rows = sorted(read_jsonl(folder / "trajectories.jsonl"), key=lambda row: row["id"])
    return np.array([row["em"] for row in rows]), [row["metadata"]["cluster"] for row in rows]


def found(bench: Bench, index: Any) -> tuple[np.ndarray, list[str]]:
    """Return for the warm start's dev searches whether the index finds something needed, and the clusters."""
    from retriever_server.open_retriever import open_retriever
    from rl.co_training.gate import _found, read_asked

    asked = list(read_asked(bench.out / "start_dev/trajectories.jsonl"))
    return _found(open_retriever(str(index)), asked, K), [each.question.metadata["cluster"] for each in asked]


def report(bench: Bench, seeds: Sequence[int]) -> None:
    """Print what the seeds that are done show: means over them, clusters of questions resampled."""
    start, clusters = scores(bench.out / "start")
    oracle = read_json(bench.out / "start/controls.json")["controls"]["oracle"]["em"]["mean"]
    room = f"oracle EM {oracle:.3f} - start {start.mean():.3f} = {oracle - start.mean():.3f}"
    print(f"\nseeds {list(seeds)}; headroom: {room}")

    def mean(cell: str) -> np.ndarray:
        return np.mean([scores(bench.out / f"{seed}/{cell}/test")[0] for seed in seeds], axis=0)

    def say(name: str, values: np.ndarray, groups: list[str], signed: bool = False) -> None:
        print(f"| {name} | {format_estimate(estimate(values[:, None], groups)[0], signed)} |")

    loop, policy, index = mean("loop"), mean("new_policy"), mean("new_index")
    arms = {arm: mean(arm) for arm in bench.arms if arm != "shuffled"}
    cells = {"start": start, "loop": loop, **arms,
             "policy after, retriever before": policy, "policy before, retriever after": index}  # fmt: skip
    for name, values in cells.items():
        say(f"EM, {name}", values, clusters)
    differences = {"loop - start": loop - start, **{f"loop - {arm}": loop - arms[arm] for arm in arms},
                   "policy": (loop - index + policy - start) / 2,
                   "retriever": (loop - policy + index - start) / 2,
                   "interaction": loop - policy - index + start}  # fmt: skip
    for name, values in differences.items():
        say(f"EM, {name}", values, clusters, signed=True)
    before, asked = found(bench, bench.index)
    replayed = found(bench, bench.retriever("replayed"))[0]
    say(f"recall@{K}, before", before, asked)
    say(f"recall@{K}, replay alone - before", replayed - before, asked, signed=True)
    for name in ("loop", *bench.arms):
        if name == "alone":
            continue
        each = [found(bench, read_json(bench.out / f"{seed}/arms.json")[name]["index"])[0] for seed in seeds]
        say(f"recall@{K}, {name} - before", np.mean(each, axis=0) - before, asked, signed=True)
        say(f"recall@{K}, {name} - replay alone", np.mean(each, axis=0) - replayed, asked, signed=True)
    spent = sum(read_json(note)["processor_seconds"] for note in (bench.out / "done").glob("*.json"))
    print(f"{spent / 60:.0f} processor minutes so far", flush=True)


def main(
    encoder: str, out: Path = Path("runs/co_training_proof"), seeds: int = 3, recipe: bool = False
) -> None:
    """Make every cell that is not there yet; print the figures after each seed.

    Args:
        encoder: Folder or name of the BERT, or sentence-transformers model, that the retriever begins with.
        out: Folder of the cells.
        seeds: Seeds of the arms.
        recipe: Loop and arms as in `scripts/configs/co_train_atlas.yaml`; the encoder is MiniLM.
    """
    import datasets  # noqa: F401  imported before the forks
    import sentence_transformers  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    out.mkdir(parents=True, exist_ok=True)
    bench = (RecipeBench if recipe else Bench)(out, encoder)
    bench.begin()
    for seed in range(seeds):
        bench.seed(seed)
        report(bench, range(seed + 1))
    if not recipe:
        bench.extra()


if __name__ == "__main__":
    run_script(main)
