"""Several processes train as one: replicated or sharded, and however uneven their work is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.run_dir import read_metrics
from tests.rl.learner.one_update import CASES

REPO = Path(__file__).parents[3]


def launch(processes, *command):
    """A module of ours with its arguments, in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), "-m", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folders of gradients that one process and two wrote."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for processes, folder in enumerate(folders, start=1):
        launch(processes, "tests.rl.learner.one_update", folder)
    return folders


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_have_the_gradient_of_one(recorded, case):
    """Also where one of them has all the trajectories, and the other none."""
    one, two = (load_file(folder / "-".join(case)) for folder in recorded)
    assert one.keys() == two.keys() and any(value.any() for value in one.values())
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize(
    "options",
    [["--preset=ppo", "--sharding=fsdp"], pytest.param(["--preset=dapo"], marks=pytest.mark.slow)],
    ids=str,
)
def test_two_processes_roll_out_what_one_does_and_leave_a_policy(toy, tmp_path, options):
    """The same trajectories and rewards in the first step, uneven as they are; then to the end."""
    first = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch(
            processes,
            *("scripts", "train", "--policy", toy / "policy", "--questions", toy / "train.jsonl"),
            *("--dev_questions", toy / "dev.jsonl", "--retriever", toy / "index", "--out", out),
            *("--steps=2", "--eval_every=2", "--device=cpu", "--deterministic=true"),
            *("--protocol.max_turns=2", "--rollout.questions_per_step=3", "--rollout.group_size=4"),
            *("--micro_batch_tokens=100", *options),
        )
        first.append({k: v for k, v in read_metrics(out)[0].items() if not k.startswith("time/")})
        AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step-000002")
    assert first[0] == pytest.approx(first[1], rel=1e-3, abs=1e-5)
