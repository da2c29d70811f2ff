"""A world in which GRPO can be watched: a bigram policy that searches for `fox` and answers A, B or C.

The policy is a real Qwen2 over a byte tokenizer. Its layers write nothing at first, so what it says
depends on the last token alone, with probabilities that a test can read off `NEXT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agent.policy import Policy
from data.jsonl import write_jsonl
from rl.config import AlgorithmConfig, ProtocolConfig, RolloutConfig, TrainConfig
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import build_small_index

TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "answer", "information") for slash in ("", "/")]
NEXT: dict[str, Mapping[str, float]] = {
    "Ċ": {"<think>": 1},  # the newline that ends the prompt
    "</information>": {"<think>": 1},
    "<think>": {"</think>": 1},
    "</think>": {"<search>": 0.5, "<answer>": 0.5},
    "<search>": {"f": 1},
    "f": {"o": 1},
    "o": {"x": 1},
    "x": {"</search>": 1},
    "<answer>": {"A": 0.3, "B": 0.3, "C": 0.4},
    "A": {"</answer>": 1},
    "B": {"</answer>": 1},
    "C": {"</answer>": 1},
}


def bigram_policy(changes: Mapping[str, Mapping[str, float]] | None = None) -> Policy:
    """A policy whose next token has the probabilities of NEXT, but for `changes`; others about e^-12."""
    tokenizer = byte_tokenizer(*TAGS)
    model = tiny_model("qwen2", len(tokenizer), eos_token_id=tokenizer.eos_token_id, num_hidden_layers=1)
    size = model.config.hidden_size
    ids: Any = tokenizer.convert_tokens_to_ids
    model.set_output_embeddings(torch.nn.Linear(size, len(tokenizer), bias=False))
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif "_proj" in name:
                parameter.mul_(0.02)  # what the layers learn to write stays small, too
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        head.zero_()
        for axis, (token, following) in enumerate({**NEXT, **(changes or {})}.items()):
            embedding[ids(token), axis] = 1  # normalised to sqrt(size) by the last norm
            head[:, axis] = -12 / math.sqrt(size)
            for successor, probability in following.items():
                head[ids(successor), axis] = math.log(probability) / math.sqrt(size)
    return Policy(model.eval(), tokenizer)


def build_toy(folder: Path) -> Path:
    """Policy, index, twelve questions whose answer is A, and as many for dev."""
    bigram_policy().save(folder / "policy", "compact")
    build_small_index(folder)
    for name in ("train", "dev"):
        rows = [{"id": f"{name}{i}", "question": f"{name} {i}?", "golden_answers": ["A"]} for i in range(12)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def toy_config(folder: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of a few small deterministic steps; groups hold four."""
    values: dict[str, Any] = {
        "policy": str(folder / "policy"),
        "questions": str(folder / "train.jsonl"),
        "dev_questions": str(folder / "dev.jsonl"),
        "retriever": str(folder / "index"),
        "out": str(out),
        "steps": 2,
        "protocol": ProtocolConfig(max_turns=2, top_k=3),
        "rollout": RolloutConfig(questions_per_step=3, group_size=4, retriever_deadline_seconds=20),
        "algorithm": AlgorithmConfig(learning_rate=1e-2),
        "device": "cpu",
        "deterministic": True,
    }
    return TrainConfig(**values | changes)
