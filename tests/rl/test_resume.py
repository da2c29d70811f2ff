"""A training process that is killed, at any moment and inside a save, ends as if it had never been."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.checkpoint import best_checkpoint, latest_checkpoint
from data.run_dir import read_metrics
from tests.processes import PATIENCE_SECONDS, ROOT, sleuth

CRITIC = ("--preset=search_r1_ppo", "--algorithm.critic_learning_rate=1e-2")
ADAPTERS = ("--lora.rank=4", "--lora.dropout=0.1")
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
    "-m",
    "scripts",
]


def words(toy, out, steps, options):
    """The command line of a training that saves every step and evaluates every second."""
    return [
        *("--policy", f"{toy / 'policy'}", "--questions", f"{toy / 'train.jsonl'}", "--out", f"{out}"),
        *("--dev_questions", f"{toy / 'dev.jsonl'}", "--retriever", f"{toy / 'index'}", f"--steps={steps}"),
        *("--save_every=1", "--eval_every=2", "--keep_checkpoints=1", "--device=cpu", "--deterministic=true"),
        *("--protocol.max_turns=2", "--rollout.questions_per_step=2", "--rollout.group_size=4"),
        *("--algorithm.learning_rate=4e-3", "--algorithm.warmup_steps=3", *options),
    ]


def logged(out):
    return len({row["step"] for row in read_metrics(out)})


def until(process, happened):
    """Wait until something `happened`, looking every other millisecond."""
    while not happened():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)


def is_open(process, out):
    """Return whether the process holds the run folder, so that it is resuming, or in a step."""
    file = out / "run.pid"
    return file.exists() and file.read_text().strip() == str(process.pid)


def kill_at_random(process, out, steps, moments):
    """Kill after so many steps: while resuming, in a rollout, an update, a save or an evaluation."""
    until(process, lambda: is_open(process, out) and logged(out) >= steps)
    deadline = time.monotonic() + moments.uniform(0, 1)
    until(process, lambda: time.monotonic() > deadline or logged(out) > steps + 1)
    process.kill()


def kill_inside_a_save(process, out):
    """Kill while a checkpoint is half written."""
    until(process, lambda: is_open(process, out))

    def half_written():
        return list((out / "checkpoints").glob(".step-*.building-*"))

    while True:
        until(process, half_written)
        os.kill(process.pid, signal.SIGSTOP)  # so that it is still half written when it is killed
        if half_written():
            break
        os.kill(process.pid, signal.SIGCONT)
    process.kill()


def outcome(out):
    """The hash of every file of the last checkpoint and all metrics but the times."""
    last, best = latest_checkpoint(out / "checkpoints"), best_checkpoint(out / "checkpoints")
    assert last is not None and best is not None
    hashes = {
        str(file.relative_to(last.path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(last.path.rglob("*"))
        if file.is_file()
    }
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(out)]
    return {"step": last.step, "files": hashes, "metrics": rows, "best": (best[0].step, best[1])}


def finish(process):
    """Wait for a process that is to end well."""
    assert process.wait(5 * PATIENCE_SECONDS) == 0, process.stderr.read()[-3000:]


def check_kills(toy, folder, kills, steps, options):
    """Kill a run so many times, every third time inside a save; compare it with one left alone."""
    moments = random.Random(kills)
    whole, killed = folder / "whole", folder / "killed"
    finish(sleuth("train", *words(toy, whole, steps, options)))  # not in this process, which other tests used
    for number in range(kills):
        process = sleuth("train", *words(toy, killed, steps, options))
        if number % 3 == 1:
            kill_inside_a_save(process, killed)
        else:
            kill_at_random(process, killed, 1 + number * (steps - 3) // kills, moments)
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    finish(sleuth("train", *words(toy, killed, steps, options)))
    expected = outcome(whole)
    assert expected["step"] == steps and len(expected["metrics"]) == steps + steps // 2
    assert {"model.safetensors", "optimizer.safetensors", "trainer.json"} <= expected["files"].keys()
    assert outcome(killed) == expected
    assert not [path for path in (killed / "checkpoints").glob(".*") if path.is_dir()]
    return expected


@pytest.mark.slow
def test_three_kills_leave_no_trace(toy, tmp_path):
    """Policy, adapters, reference, critic and both optimisers, bit for bit."""
    expected = check_kills(toy, tmp_path, 3, 6, [*CRITIC, *ADAPTERS])
    assert {"adapter.safetensors", "critic_optimizer.safetensors"} <= expected["files"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [CRITIC, ("--preset=search_r1_grpo", *ADAPTERS)], ids=["critic", "adapters"]
)
def test_twenty_kills_leave_no_trace(toy, tmp_path, options):
    check_kills(toy, tmp_path, 20, 24, options)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_two_processes_one_of_which_is_killed_fails_and_can_be_resumed(toy, tmp_path, rank):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    subprocess.run([*TORCHRUN, "train", *words(toy, whole, 4, CRITIC)], check=True, **started)
    again = [*TORCHRUN, "train", *words(toy, killed, 4, CRITIC)]
    process = subprocess.Popen(again, **started)
    until(process, lambda: logged(killed) >= 2)
    os.kill(sorted(children(process))[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1 and "SIGKILL" in said and logged(killed) < 4
    subprocess.run(again, check=True, **started)
    assert outcome(killed) == outcome(whole)
