"""Policies trained with one kind of retriever, tested with the others, in the world that is hard to search.

    nice -n 19 python -m scripts.bench.transfer --encoder MINILM --sparse SPLADE --out runs/co_minilm

From one warm-started policy a policy is trained with each of BM25, dense vectors, sparse vectors and late
interaction; `sleuth matrix --diagonal` tests each with each on test questions. Dense and sparse encoders are
taken as they are; late interaction has the dense encoder's token vectors after a short training on the plain
world's questions. OUT may be that of `scripts.bench.co_training --recipe true`, whose world and warm start
are taken; killed, the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from data.checkpoint import latest_checkpoint
from scripts.__main__ import run_script
from scripts.bench.co_training import RecipeBench

LATE_STEPS = 30


def main(
    encoder: str, sparse: str, out: Path = Path("runs/co_minilm"), steps: int = 16, seed: int = 0
) -> None:
    """Train four policies and print the matrix.

    Args:
        encoder: Folder or name of the sentence-transformers model of dense vectors.
        sparse: Folder or name of a masked language model trained as SPLADE.
        out: Folder of the cells.
        steps: Steps of each policy, of 8 questions and 8 trajectories.
        seed: Seed of the policies.
    """
    out.mkdir(parents=True, exist_ok=True)
    bench = RecipeBench(out, encoder)
    bench.begin()
    corpus, trained, cell = bench.world / "corpus.jsonl", {}, f"transfer/{seed}"
    model = {"class_path": "colbert", "init_args": {
        "base": encoder, "dimension": None, "query_tokens": None, "passage_tokens": 64}}  # fmt: skip
    loss = {
        "class_path": "ContrastiveDistillation",
        "init_args": {"similarity": "maxsim", "temperature": 0.5, "distill_weight": 0.0},
    }
    recipe = {"model": model, "loss": loss, "train": [bench.lesson], "steps": LATE_STEPS, "batch_size": 16,
              "learning_rate": 2e-5, "save_every": 1000, "out": ""}  # fmt: skip
    (out / "late.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    late = bench.run("transfer/late", "train-retriever", config=out / "late.yaml") / "model"
    kinds = {"bm25": {}, "dense": {"encoder": encoder}, "sparse": {"encoder": sparse, "kind": "inverted"},
             "late": {"encoder": late}}  # fmt: skip
    indexes = {
        name: str(bench.run(f"transfer/index_{name}", "index", corpus=corpus, **options))
        for name, options in kinds.items()
    }
    for name, index in indexes.items():
        folder = bench.run(
            f"{cell}/{name}", "train", config=out / "policy.yaml", **bench.agent(bench.warm, index),
            questions=bench.world / "train.jsonl", dev_questions=bench.dev, eval_every=0, save_every=steps,
            steps=steps, seed=seed, rollout__questions_per_step=8,
        )  # fmt: skip
        last = latest_checkpoint(folder / "checkpoints")
        assert last is not None
        trained[name] = str(last.path)
    made = bench.run(f"{cell}/matrix", "matrix", policies=json.dumps(trained), retrievers=json.dumps(indexes),
                     protocol__top_k=2, questions=bench.test, diagonal="true")  # fmt: skip
    print((made / "matrix.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
