"""Speed and memory of one GRPO update against TRL's `GRPOTrainer`, on the same trajectories (Linux, CPU).

    python -m scripts.bench.train_step [--trajectories 16] [--threads 1]

The model has the shapes of SmolLM2-135M and random weights; the trajectories have lengths of 64 to 1,024
tokens (the quantiles of a log-uniform distribution): a prompt, then what the policy wrote (two fifths of
the rest) and what it read, in one to four searches. Each side runs in a process of its own:

ours       `Learner.learn`: packed micro-batches of as many tokens as TRL's have, padding included
trl        `GRPOTrainer.train`, which gets the trajectories from a `rollout_func` with an `env_mask`. It pads
           them to the longest prompt and the longest completion of the whole batch
trl_valid  the same; but on a CPU TRL applies the head to padding, prompts and observations, too, and here
           to the positions with a token of a completion alone, as on a GPU

Same settings: float32, GRPO with the token average, on-policy, no KL, AdamW, gradient checkpointing as is
TRL's default. TRL's micro-batches are of `rows` trajectories, accumulated to one update. The gradient
norms must agree. A short update goes first: libraries are loaded, the optimiser has its state.

Seconds are those of the forward and backward passes and the optimiser (and TRL's padding, a trifle);
where other work shares the machine, those of the processor compare better than those of the clock.
Memory is the process's peak resident size (VmHWM) in the update, less its resident size just before, which
holds the weights and the optimiser's state, and no gradients: those are in what is printed first, and
taken off in what is printed beside it.
The floor is the time of the products of forward and backward alone, of real tokens, and of the head at
policy tokens, at the rate of the layers' matrix products. At last ours runs once more, under the profiler.
"""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from agent.policy import Policy
from agent.protocol import COMPACT
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.records import Question
from rl.algorithm.rewards import Reward
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.learner.learner import Learner
from rl.learner.workers import Workers, averages
from rl.rollouts import Collected, Group
from scripts.bench.rollout import hardware

GROUP = 4
SHORTEST, LONGEST = 64, 1024
RATE = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    eos_token_id=0,
)


def make_model() -> LlamaForCausalLM:
    """SmolLM2-135M without what it knows."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).to(torch.device(DEVICE))  # pyright: ignore[reportArgumentType]


def make_groups(count: int, longest: int = LONGEST) -> list[Group]:
    """Trajectories in groups, no two of a group with the same reward."""
    draw = random.Random(0)
    lengths = [round(SHORTEST * (longest / SHORTEST) ** ((i + 0.5) / count)) for i in range(count)]
    draw.shuffle(lengths)
    done = [make_trajectory(length, draw) for length in lengths]
    return [
        Group(number, done[start : start + GROUP], [_reward(t, draw) for t in done[start : start + GROUP]])
        for number, start in enumerate(range(0, count, GROUP))
    ]


def make_trajectory(length: int, draw: random.Random) -> Trajectory:
    """A prompt, one to four searches and an answer, of random tokens."""
    prompt = draw.randint(16, 48)
    searches = draw.randint(1, 4)
    written = _cut((length - prompt) * 2 // 5, searches + 1)
    read = _cut(length - prompt - sum(written), searches)
    spans = [(SegmentKind.PROMPT, prompt)]
    for turn, count in enumerate(written):
        spans.append((SegmentKind.POLICY, count))
        spans += [(SegmentKind.OBSERVATION, read[turn])] if turn < searches else []
    segments = [
        Segment(
            kind,
            [draw.randrange(1, LLAMA.vocab_size) for _ in range(count)],
            "",
            [-10.8] * count if kind is SegmentKind.POLICY else None,
        )
        for kind, count in spans
    ]
    return Trajectory(Question("q", "?", ("x",)), segments, StopReason.ANSWERED, "x")


def _cut(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _reward(trajectory: Trajectory, draw: random.Random) -> Reward:
    turns = sum(segment.kind is SegmentKind.POLICY for segment in trajectory.segments)
    return Reward([0.0] * (turns - 1) + [draw.random()], {})


def prompt_tokens(trajectory: Trajectory) -> int:
    """Tokens before the first that was not given."""
    return len(trajectory.segments[0].token_ids)


@dataclass
class Meter:
    """Measurements of one update."""

    fed_tokens: int = 0
    """Padding included."""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int = 0
    """Beyond what was there at the start."""
    gradient_norm: float = 0.0

    def watch(self, model: LlamaForCausalLM) -> None:
        """Count the tokens that the trunk is fed from here on."""

        def count(module: object, args: tuple, kwargs: dict[str, Any]) -> None:
            self.fed_tokens += kwargs["input_ids"].numel()

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)

    def start(self) -> None:
        """Give back what is free, and count from here."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.fed_tokens, self.peak_bytes = 0, -_resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
        self.seconds, self.processor_seconds = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        """Take time and peak, when the device is done."""
        torch.ones(1, device=DEVICE).item()
        self.seconds += time.perf_counter()
        self.processor_seconds += time.process_time()
        self.peak_bytes += _resident("VmHWM")

    def line(self, real_tokens: int) -> str:
        """All of it in a line."""
        gradients = make_model().num_parameters() * 4
        return (
            f"{self.fed_tokens:7,} tokens fed ({self.fed_tokens / real_tokens:.2f} a real one)"
            f" {self.seconds:6.1f} s ({self.processor_seconds:.1f} of the processor)"
            f" {real_tokens / self.seconds:6.1f} real tokens/s"
            f" {self.peak_bytes / 1e6:6,.0f} MB ({(self.peak_bytes - gradients) / 1e6:,.0f} less gradients)"
            f"  gradient norm {self.gradient_norm:.4f}"
        )

    def against(self, other: Meter) -> str:
        """Return how much faster and leaner it was."""
        return (
            f"{other.seconds / self.seconds:.2f} times the tokens/s"
            f" ({other.processor_seconds / self.processor_seconds:.2f} by the processor's time),"
            f" {self.peak_bytes / other.peak_bytes:.2f} of the memory"
        )


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def ours(count: int, rows: int, profile: bool = False) -> Meter:
    """`Learner.learn`; with `profile` the operations are printed by their share of the time."""
    groups, model, meter = make_groups(count), make_model(), Meter()
    config = TrainConfig(
        **dict.fromkeys(("policy", "questions", "retriever", "out"), ""),  # type: ignore[arg-type]
        rollout=RolloutConfig(questions_per_step=len(groups), group_size=GROUP),
        algorithm=AlgorithmConfig(learning_rate=RATE),
        micro_batch_tokens=rows * padded_tokens(groups),
        gradient_checkpointing=True,
    )
    model.train()
    policy = Policy(model, None)  # type: ignore[arg-type]  # no text is read or written
    learner = Learner(policy, config, COMPACT, Workers())
    first, size = make_groups(count, SHORTEST + 1), len(groups)
    learner.learn(Collected(first, size, size, {}), 0)
    collected = Collected(groups, size, size, {})
    meter.watch(model)
    if profile:
        print_profile(lambda: learner.learn(collected, 1))
        return meter
    meter.start()
    measured = learner.learn(collected, 1)
    meter.stop()
    meter.gradient_norm = averages(measured)["policy/grad_norm"]
    return meter


def padded_tokens(groups: list[Group]) -> int:
    """Width of TRL's rows: the longest prompt and the longest completion."""
    done = [t for group in groups for t in group.trajectories]
    return max(map(prompt_tokens, done)) + max(len(t.token_ids) - prompt_tokens(t) for t in done)


def trl(count: int, rows: int) -> Meter:
    """`GRPOTrainer.train` for two updates, of which the second is measured."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    meter, model = Meter(), make_model()
    batches = iter([make_groups(count, SHORTEST + 1), make_groups(count)])

    class OfTheSecond(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            meter.start()

        def on_step_end(self, args, state, control, **kwargs):
            meter.stop()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            lambda prompts, completions, reward, **columns: reward,
            GRPOConfig(
                folder,
                use_cpu=DEVICE == "cpu",
                bf16=False,
                learning_rate=RATE,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=count // rows,
                num_generations=GROUP,
                max_completion_length=LONGEST,
                max_steps=2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
            ),
            Dataset.from_dict({"prompt": ["?"] * count}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"?": 0})), eos_token="?", pad_token="?"
            ),
            callbacks=[OfTheSecond()],
            rollout_func=lambda prompts, trainer: as_trl_rollouts(next(batches)),
        )
        meter.watch(model)
        trainer.train()
    meter.gradient_norm = next(log["grad_norm"] for log in trainer.state.log_history if log["step"] == 2)
    return meter


def as_trl_rollouts(groups: list[Group]) -> dict[str, list]:
    """Return columns as a `rollout_func` does; `reward` is handed on to the reward function."""
    columns: dict[str, list] = {
        k: [] for k in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "reward")
    }
    for trajectory, reward in (
        (t, r) for g in groups for t, r in zip(g.trajectories, g.rewards, strict=True)
    ):
        start = prompt_tokens(trajectory)
        columns["prompt_ids"].append(trajectory.token_ids[:start])
        columns["completion_ids"].append(trajectory.token_ids[start:])
        columns["logprobs"].append([logprob or 0.0 for logprob in trajectory.logprobs[start:]])
        columns["env_mask"].append(trajectory.loss_mask[start:])
        columns["reward"].append(reward.total)
    return columns


def trl_valid(count: int, rows: int) -> Meter:
    """TRL with the head where there is a token of a completion, as it does with Triton."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # type: ignore  # the kernel itself asks elsewhere
    return trl(count, rows)


SIDES: dict[str, Callable[[int, int], Meter]] = {"ours": ours, "trl": trl, "trl_valid": trl_valid}


def products() -> list[tuple[int, int, int]]:
    """Inputs, outputs and number of the matrices of all layers."""
    hidden, inner, layers = LLAMA.hidden_size, LLAMA.intermediate_size, LLAMA.num_hidden_layers
    narrow = hidden // 3  # key-value heads
    return [
        (hidden, hidden, 2 * layers),
        (hidden, narrow, 2 * layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
    ]


def floor_flops(groups: list[Group]) -> float:
    """Return operations: two a weight and token forward, twice that backward; attention half the square."""
    done = [t for group in groups for t in group.trajectories]
    weights = sum(inputs * outputs * number for inputs, outputs, number in products())
    trunk = 2 * weights * sum(len(t.token_ids) for t in done)
    head = 2 * LLAMA.hidden_size * LLAMA.vocab_size * sum(sum(t.loss_mask) for t in done)
    scores = 2 * LLAMA.num_hidden_layers * LLAMA.hidden_size * sum(len(t.token_ids) ** 2 for t in done)
    return 3.0 * (trunk + head + scores)


def matmul_rate(tokens: int) -> float:
    """FLOPs a second of the products of a layer, forward and backward, the best of five of each."""
    flops = seconds = 0.0
    for inputs, outputs, number in products():
        x, w, y = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        for product in (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x):  # noqa: B023
            seconds += number * min(_seconds(product) for _ in range(5))
            flops += number * 2.0 * tokens * inputs * outputs
    return flops / seconds


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return (time.process_time() - started) / torch.get_num_threads()


def print_profile(run: Callable[[], object]) -> None:
    """Shares of the operations that take most of the time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[event.key] += event.self_cpu_time_total
    total = sum(spent.values())
    for name, microseconds in spent.most_common(14):
        print(f"  {microseconds / total:6.1%}  {name}")


def main(
    trajectories: int = 16,
    rows: int = 2,
    threads: int = 1,
    sides: str = "ours,trl,trl_valid",
    side: str = "",
) -> None:
    """Compare one update of ours with TRL's.

    Args:
        trajectories: In the update; a multiple of 4 and of `rows`.
        rows: TRL's per_device_train_batch_size; our micro-batches have as many tokens.
        threads: That torch may use.
        sides: Which to run, ours among them.
        side: Run this one alone, in this process, and print its numbers as JSON.
    """
    torch.set_num_threads(threads)
    if side:
        print(json.dumps(asdict(SIDES[side](trajectories, rows))))
        return
    groups = make_groups(trajectories)
    done = [t for group in groups for t in group.trajectories]
    real, written = sum(len(t.token_ids) for t in done), sum(sum(t.loss_mask) for t in done)
    print(f"{hardware()}; torch {torch.__version__}; {trajectories} trajectories, rows {rows}")
    print(f"{real:,} tokens, {written:,} of them the policy's; TRL's rows have {padded_tokens(groups):,}")
    found = {}
    for name in sides.split(","):
        options = {"side": name, "trajectories": trajectories, "rows": rows, "threads": threads}
        found[name] = meter = measure_apart(options)
        print(f"{name:<10} {meter.line(real)}", flush=True)
    mine = found["ours"]
    for name, other in found.items():
        if other is not mine:
            print(f"ours against {name}: {mine.against(other)}")
    rate = matmul_rate(rows * padded_tokens(groups))
    floor = floor_flops(groups) / rate
    print(f"matrix products run at {rate / 1e9:.1f} GFLOP/s: the floor is {floor:.1f} s,", end=" ")
    print(f"{floor / mine.processor_seconds:.0%} of ours; with what checkpointing runs again,", end=" ")
    print(f"{floor * 4 / 3 / mine.processor_seconds:.0%}. Where the time goes:")
    ours(trajectories, rows, profile=True)


def measure_apart(options: dict[str, object]) -> Meter:
    """One side in a fresh process, so that memory is its own."""
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "scripts.bench.train_step", *argv]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Meter(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
