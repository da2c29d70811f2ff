"""The checks of `scripts/gpu_check.sh`: each part in a process of its own, with a limit, its result kept.

A part returns numbers; what it expects it asserts. Models have the shapes of SmolLM2-135M and random weights
on a GPU, two narrow layers on a CPU, where the whole only shows that it runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.errors import require

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
Numbers = dict[str, Any]


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with random weights on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.bench.train_step import LLAMA

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = LLAMA if CUDA else LlamaConfig(**{**LLAMA.to_dict(), **small, "head_dim": 16})
    return LlamaForCausalLM(shape).to(torch.device(DEVICE), dtype).eval()  # pyright: ignore[reportArgumentType]


def learner(model: Any, packing: bool) -> Any:
    """A learner over the model, with micro-batches of 8,192 tokens."""
    from agent.policy import Policy
    from agent.protocol import COMPACT
    from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
    from rl.learner.learner import Learner
    from rl.learner.workers import Workers

    config = TrainConfig(
        **dict.fromkeys(("policy", "questions", "retriever", "out"), ""),  # type: ignore[arg-type]
        rollout=RolloutConfig(questions_per_step=4, group_size=4),
        algorithm=AlgorithmConfig(learning_rate=1e-6),
        micro_batch_tokens=8192 if CUDA else 2048,
        packing=packing,
        gradient_checkpointing=True,
    )
    return Learner(Policy(model, None), config, COMPACT, Workers())  # type: ignore[arg-type]


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def tests() -> Numbers:
    """The tests that need a GPU."""
    if not CUDA:
        return {"not run": "no GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-200:]]
    assert done.returncode == 0, done.stdout[-2000:]
    return {"pytest": last[0]}


def packing() -> Numbers:
    """Log-probs and gradients of packed rows against padded ones, and seconds of an update of each."""
    from rl.learner.batch import micro_batches
    from rl.learner.logprobs import Scorer
    from rl.rollouts import Collected
    from scripts.bench.train_step import make_groups

    groups = make_groups(16, 1024 if CUDA else 128)
    done = [t for group in groups for t in group.trajectories]
    results, numbers = [], {}
    for packed in (True, False):
        model = make_model(DTYPE)
        policy = learner(model, packed)
        parts: dict[int, Any] = {}
        scorer = Scorer(model, policy.config.rollout)
        for batch in micro_batches(done, range(16), policy.config.micro_batch_tokens, packed):
            logprobs = scorer(batch).logprobs
            (-logprobs.sum() / 1000).backward()
            parts |= dict(zip(batch.rows, logprobs.detach().split(batch.counts.tolist()), strict=True))
        found = torch.cat([parts[row] for row in range(16)]).float().cpu()
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()]).cpu()
        results.append((found, gradient))
        model.zero_grad()
        collected = Collected(groups, len(groups), len(groups), {})
        policy.learn(collected, 0)
        name = "packed" if packed else "padded"
        numbers[f"{name}, seconds of an update"] = timed(lambda: policy.learn(collected, 1))  # noqa: B023
    (one, first), (other, second) = results
    numbers["largest difference of a log-prob"] = float((one - other).abs().max())
    numbers["relative difference of the gradient"] = float((first - second).norm() / second.norm())
    assert numbers["relative difference of the gradient"] < (0.05 if CUDA else 1e-3), numbers
    return numbers


def masters() -> Numbers:
    """A hundred updates of bfloat16 weights with their float32 copies, against float32 all through."""
    from rl.algorithm.presets import AlgorithmConfig
    from rl.learner.optimizer import Optimizer

    changes = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 256).to(DEVICE, dtype)
        optimizer = Optimizer(layer, AlgorithmConfig(), 1e-5)
        before = layer.weight.detach().float().clone()
        for step in range(100):
            torch.manual_seed(step % 2)
            layer(torch.randn(8, 256).to(DEVICE, dtype)).float().square().mean().backward()
            optimizer.update()
        changes[name] = layer.weight.detach().float() - before
    plain = changes["float32"]
    error = float((changes["bfloat16"] - plain).norm() / plain.norm())
    assert error < 0.6, (
        error
    )  # without the copies nothing of it would be left: an update is below the rounding
    return {"relative error of the change of the weights": error}


def engine() -> Numbers:
    """Tokens a second of the hf engine: 64 prompts of 200 tokens in groups of 8, 128 tokens each."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from agent.engines.base import Sampling
    from agent.engines.hf import HFEngine

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0})))
    rows, written = (64, 128) if CUDA else (8, 16)
    sampler = HFEngine(make_model(DTYPE), tokenizer, max_rows=rows)

    async def all_of(number: int) -> None:
        prompts = [[1 + (7 * i + j) % 40_000 for j in range(200)] for i in range(rows // 8)]
        names = [f"{number}/{i}" for i in range(rows)]
        calls = [
            sampler.generate(prompts[i // 8], Sampling(max_tokens=written, seed=i), name)
            for i, name in enumerate(names)
        ]
        await asyncio.gather(*calls)
        for name in names:
            await sampler.release(name)

    asyncio.run(all_of(0))
    seconds = timed(lambda: asyncio.run(all_of(1)))
    return {"rows": rows, "tokens a second": rows * written / seconds}


def train_step() -> Numbers:
    """Seconds of one update against TRL's GRPOTrainer on the same trajectories; the gradient norms agree."""
    command = [sys.executable, "-m", "scripts.bench.train_step", "--trajectories", "8" if not CUDA else "16"]
    found = {}
    for side in ("ours", "trl"):
        if importlib.util.find_spec("trl") is None and side == "trl":
            found[side] = None
            continue
        done = subprocess.run([*command, "--side", side], check=True, stdout=subprocess.PIPE, text=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    numbers = {f"{side}, seconds": each["seconds"] for side, each in found.items() if each}
    if found["trl"] is None:
        return {**numbers, "trl": "not installed"}
    ours, theirs = (found[side]["gradient_norm"] for side in ("ours", "trl"))
    assert abs(ours - theirs) < 0.05 * theirs, (ours, theirs)
    return {**numbers, "gradient norms": [ours, theirs]}


def encode() -> Numbers:
    """Passages a second of a random encoder, and its index on the device against one on the CPU."""
    from data.atlas.build import build_atlas
    from data.corpus import Corpus
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.indexes.manifest import index_kind

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_atlas(folder / "world")
        encoder = load_encoder("atlas", device=DEVICE)
        corpus = Corpus(folder / "world" / "corpus.jsonl")
        texts = [passage.text for passage in corpus][: None if CUDA else 400]
        encoder.encode(texts[:64], "passage")
        seconds = timed(lambda: encoder.encode(texts, "passage"))
        queries = texts[:100]
        index = index_kind("flat").build(corpus, folder / "index", encoder)
        took = timed(lambda: index.search(queries, 10))
        found = index.search(queries, 10)
        self_found = sum(corpus[i].id in [h.passage.id for h in hits] for i, hits in enumerate(found))
        assert self_found > 90, self_found
    return {
        "passages a second": len(texts) / seconds,
        "flat index, queries a second": len(queries) / took,
        "flat index, passages that find themselves of 100": self_found,
    }


def flat() -> Numbers:
    """Exact search over 200,000 vectors of 384 on the device, against numpy."""
    import numpy as np

    count = 200_000 if CUDA else 5_000
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((count, 384), dtype=np.float32)
    queries = generator.standard_normal((64, 384), dtype=np.float32)
    there = torch.from_numpy(vectors).to(DEVICE)

    def search() -> Any:
        return torch.topk(torch.from_numpy(queries).to(DEVICE) @ there.T, 10).indices.cpu()

    search()
    seconds, expected = timed(search), np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    same = float((search().numpy() == expected).mean())
    assert same > 0.99, same
    return {"vectors": count, "queries a second": 64 / seconds, "share of the same ranks": same}


def flagship() -> Numbers:
    """`sleuth flagship` for a few steps, with the seed policy in the embedded world."""
    from data.atlas.build import build_atlas

    with tempfile.TemporaryDirectory() as place:
        world = Path(place) / "world"
        build_atlas(world)
        sizes = ["--warm_steps", "2", "--steps", "2", "--test_questions", "8"]
        command = [
            sys.executable,
            "-m",
            "scripts",
            "flagship",
            "--data",
            str(world),
            "--policy",
            "atlas",
            *sizes,
        ]
        done = subprocess.run([*command, "--out", f"{place}/out"], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        results = json.loads((Path(place) / "out" / "results.json").read_text())
    return {f"{name}, seconds": value for name, value in results["seconds"].items() if "cpu" not in name}


def vllm() -> Numbers:
    """Weights handed to vLLM servers, where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        return {"not run": "vllm is not installed"}
    live = "tests/agent/engines/test_vllm_live.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or gpu", "-p", "no:cacheprovider", live]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return {"pytest": done.stdout.strip().splitlines()[-1]}


PARTS: dict[str, tuple[Callable[[], Numbers], float]] = {
    "packing": (packing, 60),
    "masters": (masters, 40),
    "engine": (engine, 60),
    "train_step": (train_step, 120),
    "encode": (encode, 60),
    "flat": (flat, 40),
    "tests": (tests, 90),
    "flagship": (flagship, 180),
    "vllm": (vllm, 180),
}
"""Each part and the most seconds it may take."""


def hardware() -> str:
    """Name of the device and the versions of what computes on it."""
    import transformers

    name = torch.cuda.get_device_name() if CUDA else "no GPU"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


def run_part(name: str, limit: float) -> Numbers:
    """The result of one part out of a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-m", "scripts.bench.gpu_check", "--part", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            result = {"status": "passed", "numbers": json.loads(lines[-1])}
            if "not run" in result["numbers"]:
                result["status"] = "not run"
        else:
            result = {"status": "failed", "reason": (done.stderr or done.stdout)[-1500:]}
    except subprocess.TimeoutExpired:
        result = {"status": "failed", "reason": f"took more than {limit:.0f} s"}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def as_markdown(machine: str, results: dict[str, Numbers]) -> str:
    """One row a part."""

    def told(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"{machine}", "", "| part | result | seconds | numbers |", "|---|---|---|---|"]
    for name, each in results.items():
        numbers = "; ".join(f"{key} {told(value)}" for key, value in each.get("numbers", {}).items())
        said = numbers or each.get("reason", "").strip().replace("|", "/").replace("\n", " ")[-200:]
        lines.append(f"| {name} | {each['status']} | {each.get('seconds', '')} | {said} |")
    return "\n".join([*lines, ""])


def main(out: str = "runs/gpu_check", seconds: float = 480.0, parts: str = "", part: str = "") -> int:
    """Run the checks that have no result in `out`, while there is time, and write gpu_check.json and .md.

    Args:
        out: Folder of the results.
        seconds: For all parts of this start together.
        parts: Only these, with commas between.
        part: Run this one here and print its numbers as JSON.
    """
    if part:
        print(json.dumps(PARTS[part][0]()))
        return 0
    wanted = [each.strip() for each in parts.split(",") if each.strip()]
    require(PARTS.keys() >= {*wanted}, "parts", parts, f"of {', '.join(PARTS)}")
    folder, end = Path(out), time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    file, machine = folder / "gpu_check.json", hardware()
    known = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, Numbers] = known["parts"] if known.get("machine") == machine else {}
    print(machine, flush=True)
    for name in wanted or PARTS:
        if results.get(name, {}).get("status") == "passed":
            continue
        left = end - time.monotonic()
        if left < 5:
            results.setdefault(name, {"status": "not run", "reason": "no time was left"})
        else:
            results[name] = run_part(name, min(left, PARTS[name][1] * (1 if CUDA else 5)))
        print(
            f"{name}: {results[name]['status']} {results[name].get('numbers') or results[name].get('reason')}"
        )
        file.write_text(json.dumps({"machine": machine, "parts": results}, indent=1) + "\n")
        (folder / "gpu_check.md").write_text(as_markdown(machine, results))
    print(f"{folder / 'gpu_check.md'}")
    return int(any(each["status"] == "failed" for each in results.values()))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
