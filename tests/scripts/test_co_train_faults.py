"""A full disk or a kill in every stage of a round, a retriever that diverges: all by real commands."""

import re
import resource
import signal
import sys

import pytest
import yaml

from data.jsonl import read_json, write_jsonl
from scripts import co_train
from scripts.__main__ import main
from tests.processes import Forked
from tests.retriever_server.tiny_encoders import tiny_model
from tests.retriever_server.training.recipes import component
from tests.toy import bigram_policy

FAULTS = (
    ("evaluate", 500), ("mine", 500), ("train-retriever", 20_000), ("train-retriever", 120_000),
    ("index", 500), ("gate", 100), ("train", 20_000),
)  # fmt: skip
"""Commands of a round, and a size that a file of theirs exceeds: trajectories, examples, the copy of an
encoder that is checked before it learns, its optimiser, vectors, the decision, the policy."""
MADE = (
    "state.json", "round-0/examples.jsonl", "round-0/retriever/model/model.safetensors",
    "round-0/index/manifest.json", "round-0/gate.json", "round-0/policy/checkpoints/*/model.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy that asks for a fox and answers A, B or C; the passages of which half say C; their index."""
    folder = tmp_path_factory.mktemp("foxes")
    bigram_policy().save(folder / "policy", "compact")
    rows = [{"id": str(i), "title": f"T{i}", "text": f"fox {i} of {'CB'[i % 2]}"} for i in range(24)]
    write_jsonl(folder / "corpus.jsonl", rows)
    for name in ("train", "dev"):
        asked = [
            {"id": f"{name}{i}", "question": f"{name} {i}?", "golden_answers": ["C"],
             "metadata": {"supporting_ids": [str(2 * i)]}}
            for i in range(12)
        ]  # fmt: skip
        write_jsonl(folder / f"{name}.jsonl", asked)
    encoder = tiny_model(folder / "encoder", "dense")
    recipe = {"model": component("pretrained", base=encoder, max_tokens=24), "batch_size": 4, "steps": 3,
              "loss": component("MultipleNegativesRankingLoss", scale=20.0), "learning_rate": 1e-3,
              "train": [], "out": "", "device": "cpu"}  # fmt: skip
    (folder / "retriever.yaml").write_text(yaml.safe_dump(recipe))
    policy = {"policy": "", "questions": "", "retriever": "", "out": "", "device": "cpu",
              "deterministic": True, "rollout": {"questions_per_step": 2, "group_size": 2}}  # fmt: skip
    (folder / "policy.yaml").write_text(yaml.safe_dump(policy))
    assert main(["index", f"--corpus={folder / 'corpus.jsonl'}", f"--encoder={encoder}",
                 f"--out={folder / 'index'}", "--device=cpu"]) == 0  # fmt: skip
    return folder


def loop(world, out, recipe="retriever.yaml"):
    """The exit status of a round of `sleuth co-train`."""
    given = {"policy": world / "policy", "retriever": world / "index", "corpus": world / "corpus.jsonl",
             "questions": world / "train.jsonl", "dev_questions": world / "dev.jsonl", "k": 2, "rounds": 1,
             "train_recipe": world / "policy.yaml", "retriever_recipe": world / recipe, "steps": 1,
             "rollout_questions": 12, "style": "question", "out": out}  # fmt: skip
    return main(["co-train", *(f"--{name}={value}" for name, value in given.items())])


def command(argv, limit, killed):
    """A command whose files may not become larger than `limit`: the write fails, or kills it."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
    sys.exit(main(argv))


@pytest.fixture
def run(monkeypatch):
    """Runs the stages in forks, the first of `faults` once with its limit; `ends` notes the ends."""

    class Run:
        faults, killed = [], False

        def __init__(self):
            self.ends = []

        def __call__(self, argv):
            name = argv[0]
            limit = self.faults.pop(0)[1] if self.faults and self.faults[0][0] == name else None
            with Forked(command, argv, limit, self.killed) as process:
                _, said = process.communicate(timeout=300)
                self.ends.append((name, process.returncode, said.splitlines()))
            return process.returncode

    found = Run()
    monkeypatch.setattr(co_train, "run_stage", found)
    return found


def made(out):
    """The files of a loop that must be the same, but for its own place; the index by its files' checksums."""
    files = [file for pattern in MADE for file in sorted(out.glob(pattern))]
    assert len(files) == len(MADE)
    return [re.sub(rb'"checksum": "[^"]*"', b"", f.read_bytes().replace(bytes(out), b"")) for f in files]


def kept(out):
    """Files of a loop's folder, byte for byte."""
    return {file: file.read_bytes() for file in out.glob("round-0/[!.]*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_cut_short_in_every_stage_the_same_command_ends_with_the_same_bytes(
    world, tmp_path, run, killed, capsys
):
    assert loop(world, tmp_path / "whole") == 0
    run.faults, run.killed = list(FAULTS), killed
    for name, _ in FAULTS:
        before = kept(tmp_path / "cut")
        assert loop(world, tmp_path / "cut") == 2, run.ends[-1]
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sleuth: ")]
        assert re.search(rf"round 0, \w+: sleuth {name} ended with status -?\d+; mend what", line)
        cut, status, said = run.ends[-1]
        assert cut == name and status == (-signal.SIGXFSZ if killed else 2), "\n".join(said)
        if not killed:
            assert [x for x in said if x.startswith("sleuth: ")] == said[-1:] and "Traceback" not in said
        assert kept(tmp_path / "cut").items() >= before.items()
    assert loop(world, tmp_path / "cut") == 0
    assert made(tmp_path / "cut") == made(tmp_path / "whole")


@pytest.mark.slow
def test_a_retriever_whose_training_diverges_is_refused_and_the_policy_learns_on(world, tmp_path, run):
    recipe = yaml.safe_load((world / "retriever.yaml").read_text())
    (world / "diverges.yaml").write_text(yaml.safe_dump(recipe | {"learning_rate": 1e30}))
    assert loop(world, tmp_path, "diverges.yaml") == 0
    state = read_json(tmp_path / "state.json")["state"]
    assert re.match(r"the training diverged: step \d: the (loss|gradient)", state["history"][0]["refused"])
    assert state["retriever"] == str(world / "index") and "round-0/policy" in state["policy"]
    assert [name for name, *_ in run.ends].count("index") == 0
