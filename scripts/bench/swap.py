"""`sleuth train` on the embedded world with every kind of retriever, changed by one line of the recipe.

    python -m scripts.bench.swap --model MINILM --out runs/swap

Encoders are made of one model on disk (all-MiniLM-L6-v2), so that nothing else is downloaded: `flat` is it;
`maxsim` takes its token vectors before pooling; `inverted` weighs its word pieces by their rarity in the
corpus, which is lexical and no SPLADE; the reranker is it with a new head, taught for some steps which
passage a name of the training questions belongs to. Then each retriever trains for a few steps. Of two-hop
questions two things are counted: whether a hop's passage is found by its name, and the share of gold passages
that the trajectories were shown.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from data.corpus import Corpus
from data.jsonl import read_jsonl
from data.run_dir import read_metrics
from retriever_server.open_retriever import open_retriever

RECIPE = Path(__file__).parents[1] / "configs/atlas.yaml"
ENCODED = {"flat": "dense", "inverted": "sparse", "maxsim": "multi"}
TOP_K = 3


def main() -> None:
    """Make the encoders, train for some steps with each retriever, and print what each found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("runs/swap"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--teach", type=int, default=60, help="steps of the reranker's lesson")
    parser.add_argument("--depth", type=int, default=10, help="hits that the reranker orders")
    parser.add_argument("--retrievers", nargs="+", default=["bm25", *ENCODED, "hybrid.yaml", "reranked.yaml"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.chdir(given.out)
    if not Path("atlas/corpus.jsonl").exists():
        sleuth("atlas", "--out", "atlas")
    sleuth("index", "--corpus", "atlas/corpus.jsonl", "--out", "bm25", "--title_boost", "3")
    for kind, make in (("inverted", save_sparse), ("maxsim", save_multi), ("reranker", save_reranker)):
        if not Path("models", kind).exists():
            make(given.model, f"models/{kind}", given.teach)
    for kind in ENCODED:
        encoder = given.model if kind == "flat" else f"models/{kind}"
        sleuth("index", "--corpus", "atlas/corpus.jsonl", "--out", kind, "--encoder", encoder)
    write_compositions(given.depth)
    print("| retriever | by name | steps | processor s | searches | gold shown | reward |")
    print("|---|---|---|---|---|---|---|")
    for name in given.retrievers:
        before = processor_seconds()
        run = train(name, given.steps)
        seconds = processor_seconds() - before
        found = f"{found_by_name(name):.3f} | {given.steps} | {seconds:.0f}"
        print(f"| `{name}` | {found} | {described(run)} |", flush=True)


def processor_seconds() -> float:
    """Return CPU seconds of all commands that ended so far: on a busy machine the clock says little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sleuth(*words: str) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "scripts", *words], check=True, stdout=sys.stderr)


def write_compositions(depth: int) -> None:
    """hybrid.yaml and reranked.yaml over the indexes that lie here."""
    scorer = {"class_path": "CrossEncoder", "init_args": {"model": "models/reranker", "max_length": 128}}
    arguments = {"retriever": "bm25", "scorer": scorer, "depth": depth}
    rerank = {"class_path": "Rerank", "init_args": arguments}
    described = {
        "hybrid": {"class_path": "Fuse", "init_args": {"parts": ["bm25", "flat"]}},
        "reranked": {"class_path": "Cached", "init_args": {"retriever": rerank}},
    }
    for name, content in described.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))


def train(retriever: str, steps: int) -> Path:
    """A run of the embedded world's recipe with this one line changed; its folder."""
    recipe = RECIPE.read_text().replace("runs/atlas/", "atlas/")
    recipe = re.sub("(?m)^retriever: .*$", f"retriever: {retriever}", recipe)
    run = Path("runs", Path(retriever).stem)
    Path(f"{run.name}-recipe.yaml").write_text(recipe)
    few = ["--steps", str(steps), "--eval_every", "0", "--keep_rollouts_every", "1", "--out", str(run)]
    sleuth("train", "--config", f"{run.name}-recipe.yaml", *few)
    return run


def described(run: Path) -> str:
    """Searches a trajectory, share of gold passages shown, reward; means over the steps."""
    rows = read_metrics(run)
    searches, reward = (
        sum(row[name] for row in rows) / len(rows) for name in ("rollout/searches", "reward/mean")
    )
    kept = [row for file in sorted(run.glob("rollouts/*.jsonl")) for row in read_jsonl(file)]
    two_hop = [row for row in kept if row["metadata"]["kind"] == "two_hop"]
    shown = sum(share_shown(row) for row in two_hop) / len(two_hop)
    return f"{searches:.2f} | {shown:.3f} | {reward:.3f}"


def share_shown(row: dict[str, Any]) -> float:
    """Return the share of the gold passages of a trajectory's question that a search of it found."""
    gold = set(row["metadata"]["entities"])
    return len(gold & {hit["id"] for search in row["searches"] for hit in search["hits"]}) / len(gold)


def found_by_name(retriever: str) -> float:
    """Share of the hops of two-hop dev questions whose passage is in the best 3 for the hop's name."""
    questions = [q["metadata"] for q in read_jsonl("atlas/dev.jsonl") if q["metadata"]["kind"] == "two_hop"]
    hops = {pair for q in questions for pair in zip(q["hops"], q["entities"], strict=True)}
    names, gold = zip(*sorted(hops), strict=True)
    opened = open_retriever(retriever)
    rankings = opened.search(list(names), TOP_K)
    opened.close()
    found = [id_ in {hit.passage.id for hit in hits} for hits, id_ in zip(rankings, gold, strict=True)]
    return sum(found) / len(found)


def save_sparse(model: str, out: str, _: int) -> None:
    """Word pieces, each with the logarithm of its rarity among the passages."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [passage.contents for passage in Corpus("atlas/corpus.jsonl")]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    counts = Counter(token for row in ids for token in set(row))
    weights = [math.sqrt(math.log(1 + len(texts) / (counts[i] or 1))) for i in range(len(tokenizer))]
    module = SparseStaticEmbedding(tokenizer, torch.tensor(weights), frozen=True)
    SparseEncoder(modules=[module], device="cpu").save(out)


def save_multi(model: str, out: str, _: int) -> None:
    """The token vectors of the model, normalised."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = [Transformer(model), MultiVectorMask(), Normalize("token_embeddings")]
    MultiVectorEncoder(modules=modules, device="cpu").save(out)


def save_reranker(model: str, out: str, steps: int, batch: int = 16) -> None:
    """The model with a new head, taught which passage is a name's, and which is another that BM25 finds."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for step, pairs in enumerate(lessons(steps, batch)):
        names, texts, labels = zip(*pairs, strict=True)
        features = tokenizer(
            list(names), list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        logits = net(**features).logits[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"reranker: step {step}, loss {loss.item():.3f}", file=sys.stderr)
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)


def lessons(steps: int, batch: int) -> list[list[tuple[str, str, float]]]:
    """(name, passage, whether it is the name's): of training questions only; half of them are."""
    corpus, index = Corpus("atlas/corpus.jsonl"), open_retriever("bm25")
    hops = {
        pair
        for q in read_jsonl("atlas/train.jsonl")
        for pair in zip(q["metadata"]["hops"], q["metadata"]["entities"], strict=True)
    }
    rng = random.Random(0)
    chosen = rng.sample(sorted(hops), steps * batch // 2)
    pairs = []
    for (name, id_), hits in zip(chosen, index.search([name for name, _ in chosen], 10), strict=True):
        [gold] = [passage for passage in [corpus.get(id_)] if passage]
        others = [hit.passage for hit in hits if hit.passage.id != id_] or [rng.choice(corpus)]
        pairs += [(name, gold.contents, 1.0), (name, rng.choice(others).contents, 0.0)]
    return [pairs[i : i + batch] for i in range(0, len(pairs), batch)]


if __name__ == "__main__":
    main()
