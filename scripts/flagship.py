"""`sleuth flagship`: a real language model learns what to search, on two cores, with its controls.

Each stage is a command of its own in a process of its own, leaves its result in the folder, and is passed
over where that is there already. The last of them compares.

OUT/corpus.jsonl, index/, demonstrations.jsonl, questions.jsonl    the data
OUT/warm/, control/       policies: after the warm start; after more of it, for the time that GRPO took
OUT/grpo/                 the run, with evaluations/ of all policies, report.html
OUT/phases.json, results.json, results.md
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from data.checkpoint import best_checkpoint
from data.errors import ConfigError, SleuthError, require
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.machine.device import cpu_has_bfloat16, resolve_device
from data.metrics.answers import cover_em
from data.records import FORMAT_VERSION
from data.run_dir import check_free, describe_difference
from data.text import markdown_table
from scripts.console import going_on
from scripts.phases import Phases, run_stage

RECIPE = Path(__file__).parent / "configs" / "flagship.yaml"
_OWN = {
    "corpus.jsonl", "index", "demonstrations.jsonl", "questions.jsonl", "test.jsonl", "warm", "control",
    "grpo", "phases.json", "results.json", "results.md",
}  # fmt: skip
PASSAGE_WORDS = 30
TAUGHT = 3500
"""Training questions that demonstrations are made of; the others are GRPO's."""
WARM_STEPS = 80
WARM = {
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "batch_size": 8,
    "group_by_length": True,
    "save_every": 40,
}
EVALUATIONS = {
    "untrained": "SmolLM2 as it comes",
    "before": "after the warm start",
    "after": "after GRPO",
    "control": "more of the same warm start instead, for the same time",
    "closed-book": "after GRPO, every search finds nothing",
    "random-passages": "after GRPO, passages drawn at random",
}
METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "found": lambda record: float(finds_answer(record)),
    "em": lambda record: record["em"],
    "f1": lambda record: record["f1"],
    "valid format": lambda record: float(record["valid_format"]),
    "searches": lambda record: float(len(record["searches"])),
}
PAIRS = (("before", "after"), ("control", "after"), ("before", "control"))


def main(
    data: str,
    out: str = "runs/flagship",
    policy: str = "smollm2",
    seed: int = 0,
    warm_steps: int = WARM_STEPS,
    steps: int | None = None,
    test_questions: int = 300,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Warm-start SmolLM2-135M, let GRPO find what to search, and compare with controls; 1 to 2.5 hours.

    The warm start teaches format and reading, with queries that are poor on purpose. The control is more of
    the same warm start for the CPU seconds that GRPO took. The same command goes on where it was stopped.

    Args:
        data: Folder with corpus.jsonl, train.jsonl and dev.jsonl, such as SQuAD's (docs/flagship.md).
        out: Folder for everything.
        policy: What is taught: a short name, folder or hub name.
        seed: Of the questions drawn, the warm start and GRPO.
        warm_steps: Steps of the warm start.
        steps: Steps of GRPO; none: those of scripts/configs/flagship.yaml.
        test_questions: Dev questions that every policy answers, drawn at random.
        dtype: What is computed in: float32, bfloat16, or auto: bfloat16 where it is multiplied natively.
    """
    for name, value in (
        ("warm_steps", warm_steps),
        ("test_questions", test_questions),
        ("steps", steps or 1),
    ):
        require(value >= 1, name, value, ">= 1")
    missing = [name for name in ("corpus", "train", "dev") if not (Path(data) / f"{name}.jsonl").is_file()]
    if missing:
        raise ConfigError(f"data = {data}: holds no {', '.join(f'{name}.jsonl' for name in missing)}")
    from agent.policy_folder import find_policy

    find_policy(policy)
    wanted = {"data": data, "policy": policy, "seed": seed, "warm_steps": warm_steps, "steps": steps}
    wanted |= {"test_questions": test_questions, "dtype": dtype}
    dtype = begun_as(Path(out) / "flagship.json", wanted)["dtype"]
    run = Flagship(Path(out), Path(data), policy, seed, dtype)
    with going_on(out):
        run.make_data(test_questions)
        run.warm_start(policy, "warm", warm_steps)
        run.train(steps)
        run.warm_start(str(run.out / "warm"), "control", run.control_steps(warm_steps))
        run.evaluate()
    run.conclude()


def begun_as(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run, kept in `file`, with the dtype that auto means; ConfigError for others."""
    begun = read_json(file) if file.exists() else {}
    auto = "bfloat16" if resolve_device("auto") == "cuda" or cpu_has_bfloat16() else "float32"
    dtype = begun.get("dtype", auto) if wanted["dtype"] == "auto" else wanted["dtype"]
    now = {"format_version": FORMAT_VERSION, **wanted, "dtype": dtype}
    folder = begun.pop("folder", "")  # where its relative paths begin
    if not begun:
        check_free(file.parent, _OWN)
        write_json(file, now | {"folder": str(Path.cwd())})
    elif changed := describe_difference(begun, now, folder=folder):
        raise ConfigError(f"{file.parent} was begun otherwise ({'; '.join(changed)}): choose another --out")
    return now


class Flagship:
    """The stages, over one folder."""

    def __init__(self, out: Path, data: Path, policy: str, seed: int, dtype: str = "float32") -> None:
        self.out, self.data, self.policy, self.seed, self.dtype = out, data, policy, seed, dtype
        out.mkdir(parents=True, exist_ok=True)
        self.phases = Phases(out / "phases.json")
        self.recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))

    def make_data(self, test_questions: int) -> None:
        """Passages cut short, their index, demonstrations, and the questions to train and to test on."""
        corpus, index, made = (self.out / name for name in ("corpus.jsonl", "index", "demonstrations.jsonl"))
        source, train = self.data / "corpus.jsonl", self.data / "train.jsonl"
        self._stage("corpus", corpus, source, out=corpus, words=PASSAGE_WORDS)
        self._stage("index", index / "manifest.json", corpus=corpus, out=index, analyzer="english")
        taken = {"take": TAUGHT, "rest": self.out / "questions.jsonl", "queries": "random_words"}
        self._stage(
            "demonstrations", made, questions=train, retriever=index, out=made, seed=self.seed, **taken
        )
        if not (self.out / "test.jsonl").exists():
            rows = list(read_jsonl(self.data / "dev.jsonl"))
            drawn = random.Random(7).sample(rows, min(test_questions, len(rows)))
            write_jsonl(self.out / "test.jsonl", drawn)

    def warm_start(self, policy: str, name: str, steps: int) -> None:
        """Teach a policy by the demonstrations, into the folder `name`."""
        out = self.out / name
        if (out / "config.json").exists() and not (out / "checkpoints").exists():
            return
        seed = self.seed + (name == "control")
        settings = {**WARM, "steps": steps, "seed": seed, "precision": self.dtype}
        training = {f"training.{key}": value for key, value in settings.items()}
        made = self.out / "demonstrations.jsonl"
        self._stage(
            "warm-start",
            None,
            policy=policy,
            demonstrations=made,
            out=out,
            phase=name,
            **training,
            **self.limits,
        )

    def train(self, steps: int | None) -> None:
        """GRPO with live searches, resumed where it was stopped."""
        out = self.out / "grpo"
        if out.exists() and read_json(out / "run.json").get("status") == "finished":
            return
        places = {"policy": self.out / "warm", "questions": self.out / "questions.jsonl", "out": out}
        more: dict[str, Any] = {} if steps is None else {"steps": steps}
        more |= {"retriever": self.out / "index", "seed": self.seed, "dtype": self.dtype}
        self._stage("train", None, config=RECIPE, phase="grpo", **places, **more)

    def control_steps(self, warm_steps: int) -> int:
        """Steps of more warm start that take the CPU seconds of GRPO."""
        return max(1, round(warm_steps * self.phases.seconds["grpo cpu"] / self.phases.seconds["warm cpu"]))

    @property
    def trained(self) -> Path:
        """The policy after GRPO."""
        best = best_checkpoint(self.out / "grpo" / "checkpoints")
        if best is None:
            raise SleuthError(f"{self.out / 'grpo'}: its training has ended without a checkpoint")
        return best[0].path

    @property
    def limits(self) -> dict[str, Any]:
        """The protocol's options, as the recipe has them."""
        return {f"protocol.{key}": value for key, value in self.recipe["protocol"].items()}

    def evaluate(self) -> None:
        """All policies and controls on the same questions, greedily."""
        index, trained = self.out / "index", self.trained
        policies = {"untrained": self.policy, "before": self.out / "warm", "control": self.out / "control"}
        retrievers = {"closed-book": "none", "random-passages": f"random:{index}"}
        for name in EVALUATIONS:
            out = self.out / "grpo" / "evaluations" / name
            places = {
                "policy": policies.get(name, trained),
                "retriever": retrievers.get(name, index),
                "out": out,
            }
            rest = {"questions": self.out / "test.jsonl", "max_rows": 64, "dtype": self.dtype}
            phase = f"evaluate {name}"
            self._stage("evaluate", out / "scores.json", phase=phase, **places, **rest, **self.limits)

    def conclude(self) -> None:
        """Write and print the comparison, and the report of the run."""
        evaluations = self.out / "grpo" / "evaluations"
        results = compare(evaluations) | {"dtype": self.dtype, "seconds": self.phases.seconds}
        write_json(self.out / "results.json", results)
        text = as_markdown(results)
        (self.out / "results.md").write_text(text, encoding="utf-8")
        print(text)
        self._run(["report", str(self.out / "grpo")])

    def _stage(self, command: str, made: Path | None, *first: Path, phase: str = "", **options: Any) -> None:
        """Run a command unless what it makes is there; its seconds are kept, those of the CPU apart."""
        if made is not None and made.exists():
            return
        argv = [command, *map(str, first)]
        for key, value in options.items():
            argv += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        before = _cpu_seconds()
        try:
            with self.phases.timed(phase or command):
                self._run(argv)
        finally:
            self.phases.add(f"{phase or command} cpu", _cpu_seconds() - before)

    def _run(self, argv: Sequence[str]) -> None:
        if status := run_stage(argv):
            raise SleuthError(f"`sleuth {argv[0]}` ended with status {status}; its reason stands above")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def finds_answer(record: Mapping[str, Any]) -> bool:
    """Return whether a passage shown says a gold answer."""
    golds, normalizer = record["gold_answers"], record["metadata"].get("normalizer", "squad")
    return any(
        cover_em(hit["text"], golds, normalizer) for search in record["searches"] for hit in search["hits"]
    )


def compare(folder: Path) -> dict[str, Any]:
    """Means with 95 % intervals of every evaluation in the folder, and of paired differences."""
    import numpy as np

    from agent.evaluation.records import read_records
    from data.metrics.significance import estimate

    def estimates(values: Any, ids: Sequence[str]) -> dict[str, Any]:
        return dict(zip(METRICS, estimate(values, ids), strict=True))

    tables = {
        name: {r["id"]: [metric(r) for metric in METRICS.values()] for r in read_records(folder / name)}
        for name in EVALUATIONS
        if (folder / name / "scores.json").exists()
    }
    ids = sorted(set.intersection(*map(set, tables.values())))
    values = {name: np.array([table[id_] for id_ in ids]) for name, table in tables.items()}
    return {
        "format_version": FORMAT_VERSION,
        "questions": len(ids),
        "scores": {name: estimates(each, ids) for name, each in values.items()},
        "em where found": {n: float(v[v[:, 0] > 0, 1].mean()) for n, v in values.items() if v[:, 0].any()},
        "differences": {
            f"{after} less {before}": estimates(values[after] - values[before], ids)
            for before, after in PAIRS
            if {before, after} <= values.keys()
        },
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The comparison as two tables."""
    from data.metrics.significance import format_estimate

    rows = []
    for name, row in results["scores"].items():
        estimates = [format_estimate(row[metric]) for metric in ("found", "em", "f1")]
        means = [f"{row[metric]['mean']:.2f}" for metric in ("valid format", "searches")]
        reading = results["em where found"].get(name)
        told = "-" if reading is None else f"{reading:.3f}"
        rows.append((f"{name}: {EVALUATIONS[name]}", *estimates, *means, told))
    less = [
        (name, *(format_estimate(row[metric]) for metric in ("found", "em", "f1")))
        for name, row in results["differences"].items()
    ]
    parts = (
        f"{results['questions']} questions, greedy; 95 % intervals by bootstrap over questions\n",
        markdown_table(("", "found", "EM", "F1", "valid format", "searches", "EM where found"), rows),
        markdown_table(("paired difference", "found", "EM", "F1"), less),
    )
    return "\n".join(parts)
