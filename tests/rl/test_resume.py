"""A training process that is killed, at any moment and inside a save, ends as if it had never been."""

import hashlib
import multiprocessing
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
from scripts import train
from scripts.__main__ import main
from scripts.command_line import call
from tests.rl.learner.test_workers import REPO, launch

CRITIC = ("--preset=search_r1_ppo", "--algorithm.critic_learning_rate=1e-2")
ADAPTERS = ("--lora.rank=4", "--lora.dropout=0.1")
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, then forked
PROCESSES.set_forkserver_preload([__name__, "rl.trainer", "scripts.wiring"])


def words(toy, out, steps, options):
    """The command line of a training that saves every step and evaluates every second."""
    return [
        *("--policy", f"{toy / 'policy'}", "--questions", f"{toy / 'train.jsonl'}", "--out", f"{out}"),
        *("--dev_questions", f"{toy / 'dev.jsonl'}", "--retriever", f"{toy / 'index'}", f"--steps={steps}"),
        *("--save_every=1", "--eval_every=2", "--keep_checkpoints=1", "--device=cpu", "--deterministic=true"),
        *("--protocol.max_turns=2", "--rollout.questions_per_step=2", "--rollout.group_size=4"),
        *("--algorithm.learning_rate=4e-3", "--algorithm.warmup_steps=3", *options),
    ]


def sleuth(argv, log):
    """The body of a training process: `sleuth ARGV...`, what it says in `log`."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(main(argv))


def start(toy, out, steps, options):
    """A process of that training."""
    log = out.with_suffix(".log")
    process = PROCESSES.Process(target=sleuth, args=(["train", *words(toy, out, steps, options)], log))
    process.start()
    return process


def logged(out):
    return len({row["step"] for row in read_metrics(out)})


def until(running, happened):
    """Wait until something `happened`, looking every other millisecond."""
    while not happened():
        assert running(), "ended before it could be killed"
        time.sleep(0.002)


def is_open(process, out):
    """Whether the process holds the run folder, so that it is resuming, or in a step."""
    file = out / "run.pid"
    return file.exists() and file.read_text().strip() == str(process.pid)


def kill_at_random(process, out, steps, moments):
    """Kill after so many steps: while resuming, in a rollout, an update, a save or an evaluation."""
    until(process.is_alive, lambda: is_open(process, out) and logged(out) >= steps)
    deadline = time.monotonic() + moments.uniform(0, 1)
    until(process.is_alive, lambda: time.monotonic() > deadline or logged(out) > steps + 1)
    process.kill()


def kill_inside_a_save(process, out):
    """Kill while a checkpoint is half written."""
    until(process.is_alive, lambda: is_open(process, out))

    def half_written():
        return list((out / "checkpoints").glob(".step-*.building-*"))

    while True:
        until(process.is_alive, half_written)
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


def check_kills(toy, folder, kills, steps, options):
    """Kill a run so many times, every third time inside a save; compare it with one left alone."""
    moments = random.Random(kills)
    whole, killed = folder / "whole", folder / "killed"
    call(train.main, train.expand(words(toy, whole, steps, options)), prog="sleuth train")
    for number in range(kills):
        process = start(toy, killed, steps, options)
        if number % 3 == 1:
            kill_inside_a_save(process, killed)
        else:
            kill_at_random(process, killed, 1 + number * (steps - 3) // kills, moments)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(toy, killed, steps, options)
    process.join()
    assert process.exitcode == 0, killed.with_suffix(".log").read_text()[-3000:]
    expected = outcome(whole)
    assert expected["step"] == steps and len(expected["metrics"]) == steps + steps // 2
    assert {"model.safetensors", "optimizer.safetensors", "trainer.json"} <= expected["files"].keys()
    assert outcome(killed) == expected
    assert not [path for path in (killed / "checkpoints").glob(".*") if path.is_dir()]
    return expected


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
    launch(2, "scripts", "train", *words(toy, whole, 4, CRITIC))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts", "train"]
    process = subprocess.Popen(
        [sys.executable, *command, *words(toy, killed, 4, CRITIC)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until(lambda: process.poll() is None, lambda: logged(killed) >= 2)
    os.kill(sorted(children(process))[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1 and "SIGKILL" in said and logged(killed) < 4
    launch(2, "scripts", "train", *words(toy, killed, 4, CRITIC))
    assert outcome(killed) == outcome(whole)
