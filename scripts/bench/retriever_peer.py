"""The peer of `scripts.bench.retrievers`: sentence-transformers' own trainer beside the same recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.jsonl import read_json, read_jsonl, write_json
from retriever_server.retriever import Retriever
from scripts.bench.retriever_world import Training, Work, minilm

LOSS = {"class_path": "MultipleNegativesRankingLoss", "init_args": {"scale": 20.0}}
PEER = Training({"class_path": "pretrained"}, LOSS, steps=60, batch_size=32, learning_rate=3e-5)


def peer(work: Work) -> dict[str, Any]:
    """Two trainings of MiniLM by sentence-transformers' own trainer and by the recipe, in turns, once."""
    path = work.folder / "models" / "peer.json"
    if not path.exists():
        work.pairs()
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for number in range(2):
            for name, train in (("plain", _train_plainly), ("ours", _train_recipe)):
                start = time.process_time()
                inner = train(work, work.folder / "models" / f"peer-{name}-{number}")
                seconds[name].append(inner)
                seconds.setdefault(f"{name}, all", []).append(time.process_time() - start)
        write_json(path, seconds)
    return read_json(path)


def _train_plainly(work: Work, out: Path) -> float:
    """Train as the documentation of sentence-transformers shows; return CPU seconds of `trainer.train`."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import set_seed

    set_seed(0)
    corpus = work.corpus("train")
    rows = list(read_jsonl(work.pairs()))
    found = [corpus.get(each["positives"][0]) for each in rows]
    texts = [f"{p.title}\n{p.text}".strip() for p in found if p is not None]
    data = Dataset.from_dict({"anchor": [each["query"] for each in rows], "positive": texts})
    model = SentenceTransformer(minilm(), device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir=str(out), max_steps=min(PEER.steps, work.most_steps),
        per_device_train_batch_size=PEER.batch_size, learning_rate=PEER.learning_rate, warmup_steps=0.1,
        batch_sampler="no_duplicates", use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model, scale=20.0)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    start = time.process_time()
    trainer.train()
    spent = time.process_time() - start
    model.save_pretrained(str(out / "model"))
    return spent


def _train_recipe(work: Work, out: Path) -> float:
    """The recipe of the same; CPU seconds from its first step to its last."""
    import shutil

    from retriever_server.training.run import train

    shutil.rmtree(out, ignore_errors=True)
    training = replace(PEER, model={**PEER.model, "init_args": {"base": minilm()}})
    recipe = work.recipe(out.name, training)
    times: list[float] = []
    train(recipe, on_start=lambda step: times.append(time.process_time()),
          progress=lambda step, steps: times.append(time.process_time()))  # fmt: skip
    return times[-1] - times[0]


def peer_model(name: str) -> Callable[[Work, str], Retriever]:
    """Return what makes the retriever of one of the two."""

    def make(work: Work, on: str) -> Retriever:
        peer(work)
        return work.encoded(work.folder / "models" / f"peer-{name}-0" / "model", on, f"peer-{name}")

    return make


def speed(work: Work) -> dict[str, Any]:
    """Steps a CPU second, ours over theirs."""
    found = peer(work)
    plain, ours = min(found["plain"]), min(found["ours"])
    return {"training speed": f"{plain / ours:.3f} x ({ours:.1f} s against {plain:.1f} s of CPU)"}
